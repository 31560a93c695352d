"""Held-back pseudo-users: never learned from; early stop, best coefficients, fall-back, search, resume."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from pydantic import ValidationError

from common.catalog import Catalog
from common.config import LearningSection, TextSection
from common.learning_state import LearningState, read_trajectory
from common.vectors import TaskVector
from server.learning import LearnedMerge, learn
from server.learning.objective import Objective
from server.learning.prepare import PseudoDomain, load_inputs, pseudo_domains, sample_items
from server.learning.pseudo_users import draw, held_users, hold_back
from server.learning.search import grid

SIZES = {"a": 40, "b": 25, "c": 2}


def section(**changes: Any) -> LearningSection:
    values = {"steps": 12, "batch_size": 4, "precision": "fp32", "holdout": 0.2, "evaluate_every_steps": 2}
    return LearningSection.model_validate({**values, **changes})


class Killed(BaseException):
    """Stands for kill -9."""


class Case:
    """The pico federation; `run` learns domain-wise in a folder of its own."""

    def __init__(self, base: Path, taus: dict[str, TaskVector], catalogs: dict[str, Catalog]) -> None:
        self.base, self.taus, self.catalogs = base, taus, catalogs

    def run(
        self, work: Path, learning: LearningSection, killed_at: tuple[str, int] | None = None
    ) -> LearnedMerge:
        def report(*, phase: str, step: int = 0, **rest: Any) -> None:
            if (phase, step) == killed_at:
                raise Killed

        return learn(
            self.base,
            self.taus,
            self.catalogs,
            objective="mergerec",
            granularity="domain",
            learning=learning,
            text=TextSection(),
            work=work,
            report=report,
        )

    def domains(self, learning: LearningSection, work: Path) -> list[PseudoDomain]:
        inputs = load_inputs(
            self.base, self.taus, self.catalogs, learning, TextSection(), seed=0, pooling="auto"
        )
        return pseudo_domains(inputs, "own", work)[0]


@pytest.fixture(scope="module")
def case(base: Path, taus: dict[str, TaskVector], catalogs: dict[str, Catalog]) -> Case:
    return Case(base, taus, catalogs)


def values(merged: LearnedMerge) -> list[float]:
    return list(merged.coefficients["all"].values())


def test_the_share_is_held_back_and_never_drawn() -> None:
    learning = section()
    held = hold_back(SIZES, learning, 3)
    assert {name: len(items) for name, items in held.items()} == {"a": 8, "b": 5, "c": 1}
    draws = draw(SIZES, 500, learning, 3, held)
    for index, (name, size) in enumerate(SIZES.items()):
        drawn = set(draws.item_N[draws.domain_N == index].tolist())
        assert drawn == set(range(size)) - set(held[name].tolist())
    again = hold_back(SIZES, learning, 3)
    assert all(np.array_equal(held[name], again[name]) for name in SIZES)
    assert not np.array_equal(held["a"], hold_back(SIZES, learning, 4)["a"])
    assert len(held_users(held["a"], 40, section(holdout_users=3), 3).starts) == 3


def test_nothing_held_back_draws_what_was_drawn_before_there_was_a_holdout() -> None:
    """The reference preset: a permutation of all items of all catalogs from the seed alone."""
    learning = LearningSection.model_validate({"preset": "reference"})
    held = hold_back(SIZES, learning, 0)
    assert not any(len(items) for items in held.values())
    draws = draw(SIZES, 67, learning, 0, held)
    order = np.random.default_rng([0, 1]).permutation(67)
    assert np.array_equal(draws.item_N, np.concatenate([np.arange(size) for size in SIZES.values()])[order])


def test_no_learned_history_holds_a_held_back_item(case: Case, tmp_path: Path) -> None:
    """Neither drawn nor rolled out; the held-back histories begin with nothing else."""
    learning = section(history_length=6, steps=60, rollout_temperature=10.0)
    for domain in case.domains(learning, tmp_path):
        held = hold_back({n: len(c.item_ids) for n, c in sorted(case.catalogs.items())}, learning, 0)
        mine = set(held[domain.texts.name].tolist())
        learned = {domain.histories[row] for row in domain.rows.values()}
        assert learned
        assert not any(mine & set(history) for history in learned)
        assert {domain.histories[row][-1] for row in domain.held} == mine
        assert max(len(history) for history in learned) > 1


def test_items_that_are_ranked_are_drawn_and_leave_something_to_rank() -> None:
    learning = section(holdout_items=4)
    assert sample_items(9, [(1,)], learning, 0).tolist() == sorted(
        set(sample_items(9, [(1,)], learning, 0).tolist())
    )
    assert len(sample_items(9, [(1,)], learning, 0)) == 4
    assert len(sample_items(9, [(1, 2, 3, 4, 5, 6)], learning, 0)) == 7
    assert sample_items(3, [(1,)], learning, 0).tolist() == [0, 1, 2]


def test_a_rate_that_only_harms_falls_back_to_the_start(case: Case, tmp_path: Path) -> None:
    merged = case.run(tmp_path, section(learning_rate=3.0, patience=2, steps=20))
    assert merged.facts["fallback"]
    assert merged.facts["best_step"] == 0
    assert merged.facts["steps"] == 4  # two evaluations without a lower loss, two steps apart
    assert values(merged) == pytest.approx([0.2] * 3)
    lines = read_trajectory(merged.trajectory_path)
    assert [line["step"] for line in lines if "held_back" in line] == [0, 2, 4]
    assert lines[-1]["coefficients"] != merged.coefficients
    assert min(line["held_back"] for line in lines if "held_back" in line) == lines[0]["held_back"]
    assert merged.facts["held_back_loss"] == {"initial": lines[0]["held_back"], "best": lines[0]["held_back"]}


def test_the_best_coefficients_are_kept(case: Case, tmp_path: Path) -> None:
    """A good start and a rate at which it then runs over the optimum."""
    merged = case.run(tmp_path, section(learning_rate=0.05, patience=9, steps=24))
    lines = [line for line in read_trajectory(merged.trajectory_path) if "held_back" in line]
    best = min(lines, key=lambda line: line["held_back"])
    assert merged.facts["best_step"] == best["step"]
    assert merged.coefficients == best["coefficients"]
    assert best["step"] > 0
    assert not merged.facts["fallback"]
    assert merged.facts["held_back_loss"]["best"] == best["held_back"] < lines[0]["held_back"]


def test_state_takes_note_of_evaluations() -> None:
    state = LearningState.start(0.2, 1, 1)
    seen = []
    for step, loss in enumerate([1.0, 0.8, 0.9, 0.7, 0.7, 0.75]):
        state.step, state.coefficients_GD = step, torch.full((1, 1), float(step))
        state.evaluated(loss, patience=2)
        seen.append((state.best_step, state.waited, state.stopped))
    assert seen == [
        (0, 0, False), (1, 0, False), (1, 1, False), (3, 0, False), (3, 1, False), (3, 2, True),
    ]  # fmt: skip
    assert float(state.result) == 3.0
    assert (state.initial_loss, state.best_loss) == (1.0, 0.7)


def test_held_back_loss_is_that_of_the_loss_itself(case: Case, tmp_path: Path) -> None:
    """Against scores made by hand: every item is ranked, each domain counts alike."""
    from common.coefficients import group_tensors
    from server.learning.losses import LOSSES, mergerec
    from server.learning.merged import MergedModel
    from server.learning.teachers import with_vector

    learning = section(holdout=0.3)
    inputs = load_inputs(case.base, case.taus, case.catalogs, learning, TextSection(), seed=0, pooling="auto")
    domains, _ = pseudo_domains(inputs, "own", tmp_path)
    vectors = [case.taus[name] for name in inputs.domains]
    merged = MergedModel(inputs.base, vectors, group_tensors(vectors[0], "domain"), inputs.device)
    values_GD = torch.tensor([[0.1, 0.4, -0.2]])
    got = Objective(LOSSES["mergerec"], inputs, merged, domains).held_back(values_GD)
    student = with_vector(inputs.base, merged.vector(values_GD))
    means = []
    for domain in domains:
        teacher = inputs.model(domain.texts.name)
        losses = []
        for row in domain.held:
            (item,) = domain.histories[row]
            s_I, t_I = (
                z_IE @ z_IE[item]
                for z_IE in (inputs.encoder.encode(domain.texts.items, 8, p) for p in (student, teacher))
            )
            seen_1I = torch.arange(len(domain.texts))[None] == item
            losses.append(float(mergerec(s_I[None], t_I[None], seen_1I)))
        means.append(sum(losses) / len(losses))
    assert got == pytest.approx(sum(means) / len(means), rel=1e-4)


RESUMABLE = {
    "steps": 18,
    "learning_rate": 0.05,
    "patience": 9,
    "evaluate_every_steps": 4,
    "history_length": 3,
    "refresh_every_steps": 5,
    "initial_search": True,
}


@pytest.fixture(scope="module")
def whole(case: Case, tmp_path_factory: pytest.TempPathFactory) -> LearnedMerge:
    """The run that nothing interrupted."""
    return case.run(tmp_path_factory.mktemp("whole"), section(**RESUMABLE))


@pytest.mark.parametrize("killed_at", [("learn", 3), ("learn", 12), ("learn", 17), ("search", 3)])
def test_killed_and_continued_is_the_same(
    case: Case, whole: LearnedMerge, tmp_path: Path, killed_at: tuple[str, int]
) -> None:
    learning = section(**RESUMABLE)
    with pytest.raises(Killed):
        case.run(tmp_path / "cut", learning, killed_at)
    continued = case.run(tmp_path / "cut", learning)
    assert continued.coefficients == whole.coefficients
    assert continued.facts == whole.facts
    assert read_trajectory(continued.trajectory_path) == read_trajectory(whole.trajectory_path)
    again = case.run(tmp_path / "cut", learning, ("learn", 1))  # nothing is left to do, nothing is killed
    assert again.facts == whole.facts
    state = json.loads((tmp_path / "cut" / "state.json").read_text())
    assert state["best_step"] == whole.facts["best_step"]


def test_an_early_stop_is_final(case: Case, tmp_path: Path) -> None:
    learning = section(learning_rate=3.0, patience=1, steps=20)
    first = case.run(tmp_path, learning)
    assert first.facts["steps"] == 2
    assert case.run(tmp_path, learning, ("learn", 3)).facts == first.facts


def test_search_begins_at_the_lowest_held_back_loss(case: Case, tmp_path: Path) -> None:
    merged = case.run(tmp_path, section(initial_search=True, initial=-0.5, steps=2))
    tried = merged.facts["search"]
    assert merged.facts["initial"] != -0.5  # a start away from every teacher
    assert tried[f"{merged.facts['initial']:g}"] == min(tried.values())
    first = read_trajectory(merged.trajectory_path)[0]
    assert list(first["coefficients"]["all"].values()) == pytest.approx([merged.facts["initial"]] * 3)
    assert first["held_back"] == min(tried.values())


@pytest.mark.parametrize("count", [1, 2, 8, 32])
def test_grid_knows_how_many_vectors_there_are(count: int) -> None:
    plain = grid(count, 0.2, processed=False)
    assert plain[0] == 0.2
    assert min(plain[1:]) == pytest.approx(0.5 / count, rel=0.01)
    assert max(plain[1:]) == pytest.approx(min(1.0, 2 / count**0.5), rel=0.01)
    assert len(set(plain)) == len(plain)
    assert grid(count, 1.0, processed=True) == [1.0, 0.5, 0.75, 1.25, 1.5, 2.0]


def test_search_without_held_back_users_is_refused() -> None:
    with pytest.raises(ValidationError, match="holdout above 0"):
        LearningSection(initial_search=True, holdout=0.0)


def test_reference_preset_holds_nothing_back(case: Case, tmp_path: Path) -> None:
    learning = LearningSection.model_validate(
        {"preset": "reference", "steps": 3, "batch_size": 4, "precision": "fp32"}
    )
    merged = case.run(tmp_path, learning)
    assert (learning.holdout, learning.initial_search, learning.target) == (0.0, False, "own")
    lines = read_trajectory(merged.trajectory_path)
    assert not any("held_back" in line for line in lines)
    assert lines[-1]["coefficients"] == merged.coefficients
    assert merged.facts == {"steps": 3, "initial": 0.2, "fallback": False}
