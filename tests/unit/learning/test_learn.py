"""The learning loop: resume, switches, trajectory, and that it learns what it minimises."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from common.catalog import Catalog
from common.config import LearningSection, TextSection
from common.errors import ConfigError, DataError, ModelError, VectorError
from common.learning_state import read_trajectory
from common.models.encoder import Encoder
from common.vectors import TaskVector
from server.learning import LearnedMerge, learn
from server.learning.losses import LOSSES


class Killed(BaseException):
    """Stands for kill -9: nothing catches it, nothing is saved after it."""


class Killer:
    """A report that ends the process, so to speak, at a step of a phase; and counts what it hears."""

    def __init__(self, phase: str = "", step: int = -1) -> None:
        self.at = (phase, step)
        self.heard: list[tuple[str, int]] = []

    def __call__(
        self,
        *,
        phase: str,
        step: int = 0,
        total: int = 0,
        loss: float | None = None,
        bytes_sent: int | None = None,
    ) -> None:
        self.heard.append((phase, step))
        if (phase, step) == self.at:
            raise Killed


class Case:
    """The pico federation with a short learning section; `run` learns in a folder of its own."""

    def __init__(self, base: Path, taus: dict[str, TaskVector], catalogs: dict[str, Catalog]) -> None:
        self.base, self.taus, self.catalogs = base, taus, catalogs

    def run(self, work: Path, report: Killer | None = None, **changes: Any) -> LearnedMerge:
        arguments: dict[str, Any] = {
            "objective": "mergerec",
            "granularity": "layer",
            "learning": learning(),
            "text": TextSection(max_seq_len=32),
            "seed": 3,
            "taus": self.taus,
            "catalogs": self.catalogs,
            **changes,
        }
        taus, catalogs = arguments.pop("taus"), arguments.pop("catalogs")
        return learn(self.base, taus, catalogs, work=work, report=report or Killer(), **arguments)


def learning(**changes: Any) -> LearningSection:
    values = {
        "steps": 24,
        "batch_size": 6,
        "learning_rate": 1e-2,
        "refresh_every_steps": 7,
        "history_length": 3,
        "precision": "fp32",
        "holdout": 0.0,
    }
    return LearningSection.model_validate({**values, **changes})


@pytest.fixture
def case(base: Path, taus: dict[str, TaskVector], catalogs: dict[str, Catalog]) -> Case:
    return Case(base, taus, catalogs)


def same(left: LearnedMerge, right: LearnedMerge) -> bool:
    return left.coefficients == right.coefficients and all(
        torch.equal(left.vector[name], right.vector[name]) for name in right.vector
    )


@pytest.mark.parametrize(
    "killed_at", [("teachers", 1), ("items", 1), ("learn", 3), ("learn", 10), ("learn", 23)]
)
def test_killed_and_continued_is_the_same(case: Case, tmp_path: Path, killed_at: tuple[str, int]) -> None:
    whole = case.run(tmp_path / "whole")
    with pytest.raises(Killed):
        case.run(tmp_path / "cut", Killer(*killed_at))
    resumed = Killer()
    continued = case.run(tmp_path / "cut", resumed)
    assert same(continued, whole)
    assert read_trajectory(continued.trajectory_path) == read_trajectory(whole.trajectory_path)
    steps = [step for phase, step in resumed.heard if phase == "learn"]
    assert steps[0] == {("learn", 23): 21}.get(killed_at, 1)  # goes on after the last saved step
    again = Killer()
    assert same(case.run(tmp_path / "cut", again), whole)
    assert not again.heard  # nothing left to do


def test_a_line_cut_off_by_a_kill_is_written_again(case: Case, tmp_path: Path) -> None:
    whole = case.run(tmp_path / "whole")
    with pytest.raises(Killed):
        case.run(tmp_path / "cut", Killer("learn", 15))
    with (tmp_path / "cut" / "trajectory.jsonl").open("a") as stream:
        stream.write('{"step": 11, "loss": 1.0, "coefficients": {}}\n{"step": 12, "lo')
    case.run(tmp_path / "cut")
    assert read_trajectory(tmp_path / "cut" / "trajectory.jsonl") == read_trajectory(whole.trajectory_path)


def test_trajectory_has_every_step(case: Case, tmp_path: Path) -> None:
    merged = case.run(tmp_path)
    lines = [json.loads(line) for line in merged.trajectory_path.read_text().splitlines()]
    assert [line["step"] for line in lines] == list(range(25))
    assert lines[0]["loss"] is None
    assert all(
        value == pytest.approx(0.2) for row in lines[0]["coefficients"].values() for value in row.values()
    )
    assert lines[-1]["coefficients"] == merged.coefficients
    assert list(merged.coefficients) == ["layer-0", "layer-1", "rest"]
    assert list(merged.coefficients["rest"]) == ["garden", "kitchen", "toys"]
    assert merged.seconds > 0


@pytest.mark.parametrize("objective", sorted(LOSSES))
@pytest.mark.parametrize("granularity", ["domain", "layer", "tensor"])
def test_the_loss_falls(case: Case, tmp_path: Path, objective: str, granularity: str) -> None:
    section = learning(steps=60, batch_size=28, history_length=1, item_embeddings="stale")
    merged = case.run(tmp_path, objective=objective, granularity=granularity, learning=section)
    losses = [line["loss"] for line in read_trajectory(merged.trajectory_path)[1:]]
    assert sum(losses[-5:]) < sum(losses[:5])


def test_vector_is_the_sum_at_the_coefficients(case: Case, tmp_path: Path) -> None:
    merged = case.run(tmp_path)
    name = "encoder.layer.1.output.dense.weight"
    expected = sum(merged.coefficients["layer-1"][d] * tau[name] for d, tau in case.taus.items())
    torch.testing.assert_close(merged.vector[name], expected, rtol=1e-5, atol=1e-6)


def test_order_of_arrival_does_not_matter(case: Case, tmp_path: Path) -> None:
    backwards = dict(reversed(case.taus.items()))
    assert same(case.run(tmp_path / "a"), case.run(tmp_path / "b", taus=backwards))


def test_seed_and_inputs_decide(case: Case, tmp_path: Path) -> None:
    first = case.run(tmp_path)
    assert not same(first, case.run(tmp_path, seed=4))  # another seed is another run, in the same folder
    assert same(first, case.run(tmp_path))


@pytest.mark.parametrize(
    "change",
    [
        {"item_embeddings": "stale"},
        {"mask_seen": False},
        {"history_length": 1},
        {"temperature": 0.2},
        {"vectors": "bf16"},
    ],
)
def test_each_switch_matters(case: Case, tmp_path: Path, change: dict[str, Any]) -> None:
    assert not same(case.run(tmp_path / "a"), case.run(tmp_path / "b", learning=learning(**change)))


def test_stale_items_are_encoded_once_and_shared_between_methods(
    case: Case, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    encoded: list[int] = []
    original = Encoder.encode

    def counting(self: Encoder, ids: Any, *args: Any, **kwargs: Any) -> torch.Tensor:
        encoded.append(len(ids))
        return original(self, ids, *args, **kwargs)

    monkeypatch.setattr(Encoder, "encode", counting)
    section = learning(item_embeddings="stale", history_length=1)
    case.run(tmp_path / "a", learning=section, cache=tmp_path / "cache")
    assert sorted(encoded) == [7, 7, 9, 9, 12, 12]  # each catalog by its teacher and by the initial merge
    encoded.clear()
    case.run(tmp_path / "b", learning=section, granularity="domain", cache=tmp_path / "cache")
    case.run(tmp_path / "c", learning=section, objective="adamerging", cache=tmp_path / "cache")
    assert encoded == []


def test_refreshed_items_are_encoded_again(case: Case, tmp_path: Path) -> None:
    report = Killer()
    case.run(tmp_path, report)
    assert sum(heard == ("items", 0) for heard in report.heard) == 4  # at steps 1, 8, 15 and 22


def test_ties_processed_vectors_start_at_one(case: Case, tmp_path: Path) -> None:
    merged = case.run(tmp_path, process="ties", process_options={"density": 0.5})
    first = read_trajectory(merged.trajectory_path)[0]["coefficients"]
    assert all(value == 1.0 for row in first.values() for value in row.values())
    started = case.run(tmp_path / "b", process="ties", learning=learning(initial=0.7, steps=1))
    first = read_trajectory(started.trajectory_path)[0]["coefficients"]
    assert first["rest"]["toys"] == pytest.approx(0.7)


def test_adamerging_needs_no_teacher(case: Case, tmp_path: Path) -> None:
    report = Killer()
    case.run(tmp_path, report, objective="adamerging", learning=learning(history_length=1))
    files = list((tmp_path / "cache").iterdir())
    assert len(files) == 3  # only the initial item embeddings of the three domains


def test_adam_is_that_of_torch(case: Case, tmp_path: Path) -> None:
    """Two steps by hand from the recorded trajectory: Adam moves by the learning rate at first."""
    merged = case.run(tmp_path, learning=learning(steps=2))
    first, second, _ = read_trajectory(merged.trajectory_path)
    for group, row in first["coefficients"].items():
        for domain, value in row.items():
            assert abs(second["coefficients"][group][domain] - value) == pytest.approx(1e-2, rel=1e-2)


def test_reference_preset() -> None:
    section = LearningSection.model_validate({"preset": "reference", "steps": 20})
    assert (section.item_embeddings, section.mask_seen, section.history_length) == ("stale", False, 1)
    assert (section.learning_rate, section.batch_size, section.steps) == (1e-3, 16, 20)
    assert LearningSection.model_validate(section.model_dump()) == section


def test_bad_input_is_named(case: Case, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="'toys' has a task vector but no catalog"):
        case.run(tmp_path, catalogs={k: v for k, v in case.catalogs.items() if k != "toys"})
    name = "embeddings.LayerNorm.weight"
    broken = {**case.taus, "toys": {**case.taus["toys"], name: torch.full((16,), float("nan"))}}
    with pytest.raises(VectorError, match=f"toys, tensor '{name}'"):
        case.run(tmp_path, taus=broken)
    with pytest.raises(ConfigError, match="unknown vector process 'weight-averaging'"):
        case.run(tmp_path, process="weight-averaging")
    with pytest.raises(ModelError, match="the loss is nan at step"):
        case.run(tmp_path, learning=learning(learning_rate=1e30))
    with pytest.raises(DataError, match="no text in colour"):
        case.run(tmp_path, text=TextSection(attributes=("colour",)))
