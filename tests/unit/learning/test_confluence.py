"""Confluence: balancing, distilling, falling back, resuming."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch

from common.catalog import Catalog
from common.config import LearningSection, MergeMethod, RunConfig
from common.errors import ConfigError, ModelError
from common.progress import NO_REPORT
from common.vectors import TaskVector
from server.learning.balance import SCALES, Trial, balance, reweighted
from server.learning.choose import Judge
from server.merge import MergeResult, check_method, run_merge
from server.tensors import merge_tensors

SMALL = {"steps": 3, "rounds": 2, "history_length": 3, "probes": 4, "probe_items": 8}


def merge(
    base: Path,
    taus: Mapping[str, TaskVector],
    catalogs: Mapping[str, Catalog],
    work: Path,
    report: Any = NO_REPORT,
    **options: Any,
) -> MergeResult:
    config = RunConfig(learning=LearningSection(precision="fp32"))
    method = MergeMethod(method="confluence", options={**SMALL, **options})
    return run_merge(method, base, taus, catalogs, config, work, report)


def equal(one: TaskVector, other: TaskVector) -> bool:
    return all(torch.equal(one[name], other[name]) for name in one)


def far(vector: TaskVector) -> dict[str, float]:
    """A stand-in for agreement: best near 3 for a, near 1 for b."""
    value = float(vector["w"])
    return {"a": 1 / (1 + abs(value - 3)), "b": 1 / (1 + abs(value - 1))}


def total(taus: Mapping[str, TaskVector]) -> TaskVector:
    return {"w": torch.stack([tau["w"] for tau in taus.values()]).sum(0)}


def test_balance_never_ends_below_the_rule() -> None:
    taus = {"a": {"w": torch.tensor(3.0)}, "b": {"w": torch.tensor(-1.0)}}
    vector, best, trials = balance(taus, total, far, rounds=4)
    assert len(trials) == len(SCALES) + 4
    assert (trials[0].scale, trials[0].weights) == (1.0, {"a": 1.0, "b": 1.0})
    assert best.worth == max(trial.worth for trial in trials) > trials[0].worth
    weighted = {name: {"w": tau["w"] * best.weights[name]} for name, tau in taus.items()}
    assert torch.allclose(vector["w"], total(weighted)["w"] * best.scale)


def test_without_rounds_the_rule_is_taken_as_it_is() -> None:
    taus = {"a": {"w": torch.tensor(1.0)}, "b": {"w": torch.tensor(2.0)}}
    vector, best, trials = balance(taus, total, far, rounds=0)
    assert len(trials) == 1
    assert (best.scale, best.weights) == (1.0, {"a": 1.0, "b": 1.0})
    assert vector["w"] == 3.0


def test_a_domain_left_behind_gets_more_weight() -> None:
    weights = reweighted({"a": 1.0, "b": 1.0, "c": 1.0}, {"a": 0.7, "b": 0.5, "c": 0.6})
    assert weights["b"] > weights["c"] > weights["a"]
    assert sum(weights.values()) == pytest.approx(3)
    assert reweighted({"a": 1.0, "b": 1.0}, {"a": 0.0, "b": 0.0}) == {"a": 1.0, "b": 1.0}


def test_worth_is_the_geometric_mean() -> None:
    assert Trial(1.0, {}, {"a": 0.25, "b": 1.0}).worth == pytest.approx(0.5)


def test_both_parts_off_is_the_rule(
    base: Path, taus: dict[str, TaskVector], catalogs: dict[str, Catalog], tmp_path: Path
) -> None:
    for rule in ("iso-c", "task-arithmetic"):
        found = merge(base, taus, catalogs, tmp_path / rule, rule=rule, rounds=0, steps=0)
        assert equal(found.vector, merge_tensors(rule, {name: taus[name] for name in sorted(taus)}))


def test_what_it_did_is_told(
    base: Path, taus: dict[str, TaskVector], catalogs: dict[str, Catalog], tmp_path: Path
) -> None:
    phases = []
    found = merge(base, taus, catalogs, tmp_path, lambda *, phase, **_: phases.append(phase))
    assert found.options == {"rule": "iso-c", "learning_rate": 1e-4, **SMALL}
    assert set(found.facts) == {"scale", "weights", "agreement", "fallback"}
    assert set(found.facts["agreement"]) == {"rule", "balanced", "distilled"}
    assert found.coefficients["all"] == {
        name: found.facts["scale"] * weight for name, weight in found.facts["weights"].items()
    }
    assert found.trajectory_path is not None
    lines = [json.loads(line) for line in found.trajectory_path.read_text().splitlines()]
    assert [line["step"] for line in lines] == list(range(len(SCALES) + SMALL["rounds"]))
    for phase in ("balance", "pseudo-users", "distil"):
        assert any(phase in told for told in phases)


def test_distillation_that_helps_is_kept(
    base: Path, taus: dict[str, TaskVector], catalogs: dict[str, Catalog], tmp_path: Path
) -> None:
    start = merge(base, taus, catalogs, tmp_path / "start", steps=0)
    found = merge(base, taus, catalogs, tmp_path / "end", steps=12, learning_rate=1e-3)
    agreement = {stage: Trial(1.0, {}, values).worth for stage, values in found.facts["agreement"].items()}
    assert agreement["distilled"] > agreement["balanced"]
    assert not found.facts["fallback"]
    assert not equal(found.vector, start.vector)


def test_distillation_that_agrees_less_is_thrown_away(
    base: Path,
    taus: dict[str, TaskVector],
    catalogs: dict[str, Catalog],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    start = merge(base, taus, catalogs, tmp_path / "start", steps=0)
    score = Judge.score

    def less(judge: Judge, vector: TaskVector) -> dict[str, float]:
        distilled = (tmp_path / "end" / "confluence" / "student.safetensors").exists()
        return {name: value * (0.5 if distilled else 1.0) for name, value in score(judge, vector).items()}

    monkeypatch.setattr(Judge, "score", less)
    found = merge(base, taus, catalogs, tmp_path / "end", steps=3)
    assert found.facts["fallback"]
    assert equal(found.vector, start.vector)


def test_killed_and_begun_again_it_ends_the_same(
    base: Path,
    taus: dict[str, TaskVector],
    catalogs: dict[str, Catalog],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("server.learning.distil.SAVE_EVERY_STEPS", 2)
    whole = merge(base, taus, catalogs, tmp_path / "whole", steps=5, learning_rate=1e-3)
    seen: list[int] = []

    def kill(*, phase: str, **facts: Any) -> None:
        if phase.endswith("distil"):
            seen.append(facts["step"])
            if facts["step"] == 5 and len(seen) == 5:
                raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        merge(base, taus, catalogs, tmp_path / "killed", kill, steps=5, learning_rate=1e-3)
    again = merge(base, taus, catalogs, tmp_path / "killed", kill, steps=5, learning_rate=1e-3)
    assert seen == [1, 2, 3, 4, 5, 5]
    assert equal(again.vector, whole.vector)


def test_what_was_tried_is_not_tried_again(
    base: Path,
    taus: dict[str, TaskVector],
    catalogs: dict[str, Catalog],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    whole = merge(base, taus, catalogs, tmp_path / "whole")
    score, scored = Judge.score, []

    def counted(judge: Judge, vector: TaskVector) -> dict[str, float]:
        scored.append(vector)
        if len(scored) == 4:
            raise KeyboardInterrupt
        return score(judge, vector)

    monkeypatch.setattr(Judge, "score", counted)
    with pytest.raises(KeyboardInterrupt):
        merge(base, taus, catalogs, tmp_path / "killed")
    again = merge(base, taus, catalogs, tmp_path / "killed")
    trials = len(SCALES) + SMALL["rounds"] + 1  # the last one is the student
    assert len(scored) == trials + 1
    assert (again.facts, equal(again.vector, whole.vector)) == (whole.facts, True)
    merge(base, taus, catalogs, tmp_path / "killed", probes=3)
    assert len(scored) > trials + 1  # other pseudo-users


def test_a_loss_that_is_not_finite_is_named(
    base: Path,
    taus: dict[str, TaskVector],
    catalogs: dict[str, Catalog],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    nan = torch.tensor(float("nan"))
    monkeypatch.setattr("server.learning.distil.ranking_distillation", lambda *_, **__: nan)
    with pytest.raises(ModelError, match="loss is nan at step 1"):
        merge(base, taus, catalogs, tmp_path)


@pytest.mark.parametrize(
    "options",
    [
        {"rule": "regmean"},
        {"rule": "emr"},
        {"steps": -1},
        {"learning_rate": 0.0},
        {"round": 3},
        {"probes": 0},
    ],
)
def test_options_out_of_range_are_refused(options: dict[str, Any]) -> None:
    with pytest.raises(ConfigError):
        check_method(MergeMethod(method="confluence", options=options))
