"""Choosing: the proxy against a naive version, the rule on constructed tables, the judge on real models."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch

from common.catalog import Catalog
from common.config import LearningSection, TextSection
from common.errors import ConfigError
from common.vectors import TaskVector
from server.learning.choose import Judge, agreement, gains, pick
from server.learning.prepare import load_inputs


def naive_ndcg(student: list[float], teacher: list[float]) -> float:
    """The teacher's best 10, graded by rank; items that are hidden (-inf) are worth nothing."""
    order = sorted(range(len(teacher)), key=lambda i: -teacher[i])[:10]
    gain = {i: 1 / math.log2(rank + 2) for rank, i in enumerate(order) if teacher[i] > -math.inf}
    ranked = sorted(range(len(student)), key=lambda i: -student[i])[:10]
    found = sum(gain.get(i, 0.0) / math.log2(rank + 2) for rank, i in enumerate(ranked))
    return found / sum(value / math.log2(rank + 2) for rank, value in enumerate(gain.values()))


@pytest.mark.parametrize("items", [4, 10, 25])
def test_agreement_against_naive(items: int) -> None:
    generator = torch.Generator().manual_seed(items)
    s_BC, t_BC = torch.randn(2, 6, items, generator=generator).unbind()
    s_BC[0, 1] = t_BC[0, 1] = -math.inf  # a seen item
    got = agreement(s_BC, gains(t_BC))
    expected = [naive_ndcg(s, t) for s, t in zip(s_BC.tolist(), t_BC.tolist(), strict=True)]
    assert got.tolist() == pytest.approx(expected, rel=1e-5)
    assert agreement(t_BC, gains(t_BC)).tolist() == pytest.approx([1.0] * 6)


def test_the_best_average_wins_among_those_that_are_nowhere_much_worse() -> None:
    scores = {
        "greedy": {"a": 0.9, "b": 0.4},  # the best average, but far behind in b
        "even": {"a": 0.6, "b": 0.59},
        "behind": {"a": 0.55, "b": 0.6},
    }
    choice = pick(scores, margin=0.31)
    assert choice["chosen"] == "greedy"
    scores["greedy"]["a"] = 0.65
    choice = pick(scores, margin=0.06)
    assert choice["chosen"] == "even"
    assert {label: row["allowed"] for label, row in choice["scores"].items()} == {
        "greedy": False,
        "even": True,
        "behind": False,
    }
    assert choice["scores"]["greedy"]["worst_domain"] == "b"
    assert choice["scores"]["greedy"]["shortfall"] == pytest.approx(0.2)
    assert choice["scores"]["even"]["average"] == pytest.approx(0.595)
    assert "0.5950" in choice["why"]


def test_where_no_candidate_is_good_everywhere_the_least_bad_one_is_taken() -> None:
    choice = pick({"left": {"a": 0.9, "b": 0.1}, "right": {"a": 0.3, "b": 0.6}}, margin=0.05)
    assert choice["chosen"] == "left"  # 0.5 behind in b; the other is 0.6 behind in a
    assert "every candidate is more than 0.05 below" in choice["why"]
    assert not any(row["allowed"] for row in choice["scores"].values())


def test_equals_are_taken_in_the_order_given() -> None:
    assert pick({"x": {"a": 0.5}, "y": {"a": 0.5}}, margin=0.0)["chosen"] == "x"


def learning(**changes: object) -> LearningSection:
    return LearningSection.model_validate({"precision": "fp32", "holdout": 0.5, **changes})


def judge(
    base: Path, taus: dict[str, TaskVector], catalogs: dict[str, Catalog], work: Path, **changes: object
) -> Judge:
    target = changes.pop("target", "own")
    inputs = load_inputs(base, taus, catalogs, learning(**changes), TextSection(), seed=0, pooling="auto")
    return Judge(inputs, target, work)  # type: ignore[arg-type]


@pytest.mark.parametrize("length", [1, 3])
def test_a_teacher_agrees_with_itself(
    base: Path, taus: dict[str, TaskVector], catalogs: dict[str, Catalog], tmp_path: Path, length: int
) -> None:
    own = judge(base, taus, catalogs, tmp_path, history_length=length)
    zero = {name: torch.zeros_like(tensor) for name, tensor in taus["toys"].items()}
    scores = {name: own.score(tau) for name, tau in {**taus, "base": zero}.items()}
    for domain in taus:
        assert scores[domain][domain] == pytest.approx(1.0)
        assert all(scores[other][domain] < 0.999 for other in scores if other != domain)


def test_an_ensemble_asks_every_teacher(
    base: Path, taus: dict[str, TaskVector], catalogs: dict[str, Catalog], tmp_path: Path
) -> None:
    """Two of three teachers are the same model: a merge like them agrees more than their own teacher did."""
    twins = {"garden": taus["garden"], "kitchen": taus["garden"], "toys": taus["toys"]}
    both = judge(base, twins, catalogs, tmp_path, target="ensemble")
    own = judge(base, twins, catalogs, tmp_path, target="own")
    assert own.score(taus["toys"])["toys"] == pytest.approx(1.0)
    assert both.score(taus["toys"])["toys"] < 0.999
    assert both.score(taus["garden"])["toys"] > own.score(taus["garden"])["toys"]


def test_nothing_held_back_is_named(
    base: Path, taus: dict[str, TaskVector], catalogs: dict[str, Catalog], tmp_path: Path
) -> None:
    with pytest.raises(ConfigError, match="no held-back pseudo-users"):
        judge(base, taus, catalogs, tmp_path, holdout=0.0)
