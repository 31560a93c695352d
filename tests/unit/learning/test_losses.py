"""Losses against naive float64 versions; masks; gradients stay finite where items are masked."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from common.config import LearningSection
from server.learning.losses import (
    LOSSES,
    Scores,
    candidates,
    entropy,
    mergerec,
    ranking_distillation,
)


def scores(seed: int, users: int = 3, items: int = 7) -> torch.Tensor:
    return torch.rand(users, items, generator=torch.Generator().manual_seed(seed)) * 2 - 1


def softmax(row: list[float]) -> list[float]:
    top = max(row)
    weights = [math.exp(value - top) for value in row]
    return [weight / sum(weights) for weight in weights]


def kept(row: torch.Tensor, seen: torch.Tensor | None) -> list[float]:
    return [float(v) for i, v in enumerate(row) if seen is None or not seen[i]]


def seen_items() -> torch.Tensor:
    seen = torch.zeros(3, 7, dtype=torch.bool)
    seen[0, 1] = seen[1, 4] = seen[1, 5] = seen[2, 0] = True
    return seen


@pytest.mark.parametrize("masked", [False, True])
def test_entropy_against_naive(masked: bool) -> None:
    s_BI, seen = scores(0), seen_items() if masked else None
    for b, value in enumerate(entropy(s_BI, seen)):
        p = softmax(kept(s_BI[b], None if seen is None else seen[b]))
        assert float(value) == pytest.approx(-sum(x * math.log(x) for x in p), rel=1e-5)


@pytest.mark.parametrize("masked", [False, True])
def test_mergerec_against_naive(masked: bool) -> None:
    s_BI, t_BI, seen = scores(1), scores(2), seen_items() if masked else None
    got = mergerec(s_BI, t_BI, seen, temperature=0.1, alpha=10.0)
    for b, value in enumerate(got):
        row_seen = None if seen is None else seen[b]
        s, t = kept(s_BI[b], row_seen), kept(t_BI[b], row_seen)
        rec = -math.log(softmax(s)[t.index(max(t))])
        p, q = softmax([x / 0.1 for x in t]), softmax([x / 0.1 for x in s])
        kl = sum(x * (math.log(x) - math.log(y)) for x, y in zip(p, q, strict=True))
        assert float(value) == pytest.approx(rec + 10.0 * 0.01 * kl, rel=1e-4)


def test_distillation_vanishes_where_student_is_the_teacher() -> None:
    t_BI = scores(3)
    loss = mergerec(t_BI, t_BI, alpha=1e6)
    assert loss.tolist() == pytest.approx(mergerec(t_BI, t_BI, alpha=0.0).tolist())


def test_masked_gradients_are_finite_and_leave_seen_items_alone() -> None:
    s_BI, t_BI, seen = scores(4).requires_grad_(), scores(5), seen_items()
    (entropy(s_BI, seen).sum() + mergerec(s_BI, t_BI, seen).sum()).backward()
    assert s_BI.grad is not None
    assert torch.isfinite(s_BI.grad).all()
    assert not s_BI.grad[seen].any()


def test_the_label_is_the_best_item_that_is_not_masked() -> None:
    t_BI = torch.tensor([[0.9, 0.5, 0.1]])
    s_BI = torch.tensor([[0.3, 0.2, 0.1]])
    seen = torch.tensor([[True, False, False]])
    unmasked = mergerec(s_BI, t_BI, alpha=0.0)
    masked = mergerec(s_BI, t_BI, seen, alpha=0.0)
    assert float(unmasked) == pytest.approx(-math.log(softmax([0.3, 0.2, 0.1])[0]), rel=1e-5)
    assert float(masked) == pytest.approx(-math.log(softmax([0.2, 0.1])[0]), rel=1e-5)


@pytest.mark.parametrize("masked", [False, True])
def test_candidates_are_the_best_and_others_that_are_not_seen(masked: bool) -> None:
    t_BI, seen = scores(6), seen_items() if masked else None
    items_BK = candidates(t_BI, seen, 2, 3, np.random.default_rng(0))
    assert items_BK.shape == (3, 5)
    for b, row in enumerate(items_BK.tolist()):
        allowed = [i for i in range(7) if seen is None or not seen[b, i]]
        assert set(row) <= set(allowed)
        assert len(set(row)) == 5
        assert row[:2] == sorted(allowed, key=lambda i: -float(t_BI[b, i]))[:2]
    again = candidates(t_BI, seen, 2, 3, np.random.default_rng(0))
    assert torch.equal(items_BK, again)
    assert not torch.equal(items_BK, candidates(t_BI, seen, 2, 3, np.random.default_rng(1)))


def test_candidates_of_a_small_catalog_are_all_of_it() -> None:
    everything = candidates(scores(6), None, 50, 50, np.random.default_rng(0))
    assert [sorted(row) for row in everything.tolist()] == [list(range(7))] * 3
    most = candidates(scores(6), seen_items(), 4, 50, np.random.default_rng(0))
    assert most.shape == (3, 5)  # a row with two seen items has no more
    assert candidates(scores(6), None, 3, 0, np.random.default_rng(0)).shape == (3, 3)


def test_random_candidates_come_from_all_that_is_left() -> None:
    t_BI = torch.linspace(1, 0, 7)[None]
    drawn = [candidates(t_BI, None, 2, 1, np.random.default_rng(seed))[0, 2].item() for seed in range(60)]
    assert set(drawn) == {2, 3, 4, 5, 6}


@pytest.mark.parametrize("masked", [False, True])
def test_ranking_distillation_against_naive(masked: bool) -> None:
    s_BI, t_BI, seen = scores(7).double(), scores(8).double(), seen_items() if masked else None
    learning = LearningSection(candidates=2, random_negatives=2, temperature=0.3)
    got = LOSSES["ranking-distillation"].compute(Scores(s_BI, t_BI, seen, np.random.default_rng(5)), learning)
    items_BK = candidates(t_BI, seen, 2, 2, np.random.default_rng(5)).tolist()
    for b, value in enumerate(got):
        p = softmax([float(t_BI[b, i]) / 0.3 for i in items_BK[b]])
        q = softmax([float(s_BI[b, i]) / 0.3 for i in items_BK[b]])
        assert float(value) == pytest.approx(
            sum(x * (math.log(x) - math.log(y)) for x, y in zip(p, q, strict=True)), rel=1e-4
        )
    everything = torch.arange(7).expand(3, 7)
    assert ranking_distillation(t_BI, t_BI + 1.0, everything).tolist() == pytest.approx([0.0] * 3, abs=1e-5)


def test_ranking_distillation_moves_candidates_alone() -> None:
    s_BI, t_BI = scores(9).requires_grad_(), scores(10)
    items_BK = candidates(t_BI, seen_items(), 2, 1, np.random.default_rng(0))
    (gradient_BI,) = torch.autograd.grad(ranking_distillation(s_BI, t_BI, items_BK).sum(), [s_BI])
    moved = gradient_BI != 0
    assert torch.equal(moved, torch.zeros_like(moved).scatter_(1, items_BK, True))


def test_registry_says_which_losses_need_teachers() -> None:
    assert {name: loss.teacher for name, loss in LOSSES.items()} == {
        "adamerging": False,
        "mergerec": True,
        "ranking-distillation": True,
    }
