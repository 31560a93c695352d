"""Losses against naive float64 versions; masks; gradients stay finite where items are masked."""

from __future__ import annotations

import math

import pytest
import torch

from server.learning.losses import entropy, mergerec


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
