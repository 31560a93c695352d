"""The search itself, on losses that are formulas: bounds, resuming, penalties, what is not finite."""

import json
import math

import numpy as np
import pytest
import torch

from common.errors import ConfigError, ModelError
from common.language.pool import Pool
from server.evolution.evolve import evolve
from server.evolution.options import EvolutionOptions
from server.evolution.search import Record, Stage, search
from tests.unit.language.test_pool import SHAPES, adapters

GOAL = (0.9, -0.4, 0.3)


class Killed(BaseException):
    """Stands for kill -9: nothing catches it."""


class Quadratic:
    """Loss `||b - goal||^2 + 0.1 ||a - 0.8||^2`; dies after `dies_after` generations."""

    def __init__(self, goal=GOAL, dies_after=None, bad=None):
        self.goal, self.dies_after, self.bad = np.array(goal), dies_after, bad
        self.seen, self.generations = [], 0
        self.key = {"goal": list(goal)}

    def losses(self, candidates):
        if self.generations == self.dies_after:
            raise Killed
        self.generations += 1
        self.seen += candidates
        losses = []
        for number, candidate in enumerate(candidates):
            a, b = np.array(candidate.ratios), np.array(candidate.scales)
            loss = float(((b - self.goal) ** 2).sum() + 0.1 * ((a - 0.8) ** 2).sum())
            losses.append(self.bad if self.bad is not None and number % 3 == 0 else loss)
        return losses


def merge(fitness, work, count=3, seed=0, **options):
    return evolve(Pool(adapters(count)), fitness, EvolutionOptions(**options), work, seed=seed)


def test_both_stages_find_a_minimum_within_their_bounds(tmp_path):
    fitness = Quadratic()
    found = merge(fitness, tmp_path, ratio_penalty=0, scale_penalty=0, scale_iterations=40)
    np.testing.assert_allclose(found.candidate.scales, GOAL, atol=0.05)
    np.testing.assert_allclose(found.candidate.ratios, 0.8, atol=0.2)
    assert all(0 <= value <= 1 for candidate in fitness.seen for value in candidate.ratios)
    assert all(-1.5 <= value <= 1.5 for candidate in fitness.seen for value in candidate.scales)
    assert not found.facts(["a", "b", "c"])["not_finite"]


def test_a_minimum_outside_the_bounds_is_approached_from_inside(tmp_path):
    fitness = Quadratic(goal=(3.0, -3.0, 0.0))
    found = merge(fitness, tmp_path, scale_penalty=0, scale_iterations=60, ratio_iterations=2)
    np.testing.assert_allclose(found.candidate.scales, (1.5, -1.5, 0.0), atol=0.05)
    assert all(-1.5 <= value <= 1.5 for candidate in fitness.seen for value in candidate.scales)


def test_the_penalty_is_the_sum_of_magnitudes_or_their_mean(tmp_path):
    for penalty, divisor in (("sum", 1), ("mean", 3)):
        found = merge(Quadratic(), tmp_path / penalty, penalty=penalty, scale_penalty=0.3)
        stage = found.stages["scales"]
        size = sum(abs(value) for value in found.candidate.scales)
        assert stage.objective == pytest.approx(stage.loss + 0.3 * size / divisor)
        stage = found.stages["ratios"]
        assert stage.objective == pytest.approx(stage.loss + 0.05 * sum(found.candidate.ratios) / divisor)


def test_a_penalty_that_switches_the_adapters_off_is_told(tmp_path):
    even = Quadratic(goal=(1 / 3,) * 3)  # equal weights are the best there is
    found = merge(even, tmp_path / "much", scale_penalty=5)
    assert np.abs(found.candidate.scales).max() < 0.05
    assert "equal weights had" in found.facts(["a", "b", "c"])["warning"]
    found = merge(even, tmp_path / "none", ratio_penalty=0, scale_penalty=0)
    assert "warning" not in found.facts(["a", "b", "c"])


def test_just_the_planned_evaluations_are_made(tmp_path):
    fitness = Quadratic()
    options = EvolutionOptions(ratio_iterations=3, scale_iterations=5, population=6)
    found = evolve(Pool(adapters(3)), fitness, options, tmp_path)
    assert len(fitness.seen) == options.evaluations(3) == 1 + 18 + 1 + 30
    assert found.facts(["a", "b", "c"])["evaluations"] == len(fitness.seen)
    assert EvolutionOptions().evaluations(50) == 802
    assert EvolutionOptions().evaluations(51) == 1202


@pytest.mark.parametrize("dies_after", [0, 1, 4, 7, 8, 11])
def test_a_killed_search_goes_on_to_the_same_result(tmp_path, dies_after):
    options = {"ratio_iterations": 6, "scale_iterations": 6}
    whole = merge(Quadratic(), tmp_path / "whole", **options)
    killed = Quadratic(dies_after=dies_after)
    with pytest.raises(Killed):
        merge(killed, tmp_path / "work", **options)
    with (tmp_path / "work" / "evolution.jsonl").open("a") as record:
        record.write('{"step": 99, "lo')  # what a kill in the middle of a write leaves
    rest = Quadratic()
    resumed = merge(rest, tmp_path / "work", **options)
    assert killed.generations + rest.generations == 14
    assert resumed.candidate == whole.candidate
    assert resumed.stages == whole.stages
    assert all(torch.equal(resumed.adapter[name], whole.adapter[name]) for name in SHAPES)
    again = Quadratic(dies_after=0)
    assert merge(again, tmp_path / "work", **options).candidate == whole.candidate  # nothing left to ask


def test_a_search_of_other_inputs_begins_anew(tmp_path):
    merge(Quadratic(), tmp_path, ratio_iterations=2, scale_iterations=2)
    for change in ({"seed": 1}, {"sigma": 0.1}, {"count": 4, "fitness": Quadratic((0, 0, 0, 0))}):
        fitness = change.pop("fitness", Quadratic())
        merge(fitness, tmp_path, ratio_iterations=2, scale_iterations=2, **change)
        assert fitness.generations == 6


def test_a_damaged_line_is_evaluated_again(tmp_path):
    options = {"ratio_iterations": 3, "scale_iterations": 2}
    whole = merge(Quadratic(), tmp_path, **options)
    path = tmp_path / "evolution.jsonl"
    lines = path.read_text().splitlines()
    changed = json.loads(lines[3]) | {"points": "0" * 64}
    path.write_text("\n".join([*lines[:3], json.dumps(changed), *lines[4:]]) + "\n")
    rest = Quadratic()
    assert merge(rest, tmp_path, **options).candidate == whole.candidate
    assert rest.generations == 7 - 2


def test_permuted_adapters_give_the_same_merge(tmp_path):
    pool = adapters(3)
    options = EvolutionOptions(ratio_iterations=2, scale_iterations=3)
    one = evolve(Pool(pool), Quadratic(), options, tmp_path / "1")
    other = evolve(Pool(dict(reversed(pool.items()))), Quadratic(), options, tmp_path / "2")
    assert one.candidate == other.candidate
    assert all(torch.equal(one.adapter[name], other.adapter[name]) for name in SHAPES)


def test_one_adapter_is_enough(tmp_path):
    found = merge(Quadratic(goal=(0.7,)), tmp_path, count=1, scale_penalty=0)
    assert found.candidate.scales[0] == pytest.approx(0.7, abs=0.02)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_losses_that_are_not_finite_are_the_worst_and_counted(tmp_path, bad):
    fitness = Quadratic(bad=bad)
    found = merge(fitness, tmp_path, scale_penalty=0)
    stages = found.stages.values()
    assert sum(stage.not_finite for stage in stages) == 2 * (1 + 20 * 7)
    assert all(math.isfinite(stage.loss) for stage in stages)
    np.testing.assert_allclose(found.candidate.scales, GOAL, atol=0.1)
    resumed = merge(Quadratic(dies_after=0), tmp_path, scale_penalty=0)
    assert (resumed.candidate, resumed.stages) == (found.candidate, found.stages)


def test_nothing_finite_at_all_is_an_error(tmp_path):
    class Nothing(Quadratic):
        def losses(self, candidates):
            return [math.nan] * len(candidates)

    with pytest.raises(ModelError, match="no finite loss in 401 candidates of stage ratios"):
        merge(Nothing(), tmp_path)


def test_a_search_never_ends_worse_than_it_began(tmp_path):
    """From the minimum itself every step is a worse one."""
    stage = Stage("scales", (0.25, -0.5), -1.5, 1.5, 0.0, 4, 6, 0.3, 0)

    def evaluate(points):
        return [sum((x - y) ** 2 for x, y in zip(point, stage.start, strict=True)) for point in points]

    found = search(stage, evaluate, Record(tmp_path / "r.jsonl", {}))
    assert (found.point, found.generation, found.loss) == (stage.start, 0, 0.0)


def test_a_start_outside_the_bounds_is_refused(tmp_path):
    with pytest.raises(ConfigError, match=r"stage scales starts outside \[-1.5, 1.5\]"):
        merge(Quadratic(), tmp_path, ratio_iterations=0, initial_scale=2.0)


def test_numpys_global_generator_is_left_alone(tmp_path):
    before = np.random.get_state()[1].copy()
    merge(Quadratic(), tmp_path, ratio_iterations=1, scale_iterations=1)
    assert (np.random.get_state()[1] == before).all()
