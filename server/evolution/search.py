"""CMA-ES that survives kill -9: one stage of a search, recorded generation by generation.

The recorded losses are the whole state. A search that goes on asks CMA-ES for the same points again (its
random numbers follow from the seed and the stage alone), tells it the recorded losses, and calls the fitness
only for what is not recorded; so the result is the same, bit for bit, and nothing is pickled. A line of the
record holds the digest of its generation's points: where they are not those that are asked for now (another
seed, other inputs), that line and all after it are forgotten.

The start is scored first, as generation 0, and the best point seen wins: a search never ends worse than it
began. A loss that is not finite counts as worse than all others of its generation.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from common.digests import json_digest
from common.errors import ConfigError, ModelError
from common.language.pool import DIGITS
from common.learning_state import Trajectory, read_trajectory
from common.progress import NO_REPORT, Report

Point = tuple[float, ...]
Evaluate = Callable[[Sequence[Point]], Sequence[float]]


@dataclass(frozen=True)
class Stage:
    """What is searched: minimise `loss(x) + penalty * ||x||_1` for `low <= x <= high`, from `start`."""

    name: str
    start: Point
    low: float
    high: float
    penalty: float
    iterations: int
    population: int
    sigma: float
    seed: int


@dataclass(frozen=True)
class Found:
    """The best point of a stage, its loss without and with the penalty, and where it was found."""

    point: Point
    start_loss: float | None  # of where the stage began, without the penalty; None: not finite
    loss: float
    objective: float
    generation: int  # 0: the start was never improved
    evaluations: int
    not_finite: int  # losses that were NaN or infinite
    best_by_generation: list[float | None]  # lowest objective so far


class Record:
    """The record of a search in `path`, JSON lines: one for the inputs, then one for each generation."""

    def __init__(self, path: Path, inputs: Mapping[str, Any]) -> None:
        self._trajectory = Trajectory(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        self._lines = read_trajectory(path)
        self._step = 0
        first = {"step": 0, "inputs": json_digest(inputs)}
        if self._lines[:1] != [first]:
            self._lines = []
        self._forget(len(self._lines) - 1)  # and with it a line that a kill cut off
        if not self._lines:
            self._trajectory.append([first])
            self._lines = [first]

    def losses(self, stage: str, points: Sequence[Point], evaluate: Evaluate) -> list[float]:
        """The losses of the next generation: those that are recorded, else evaluated and recorded now."""
        self._step += 1
        line = {"step": self._step, "stage": stage, "points": json_digest({"points": points})}
        if self._step < len(self._lines):
            recorded = self._lines[self._step]
            if {key: recorded.get(key) for key in line} == line:
                return [math.nan if loss is None else loss for loss in recorded["losses"]]
            self._forget(self._step - 1)
        losses = [float(loss) for loss in evaluate(points)]
        if len(losses) != len(points):
            raise ModelError(f"evolution: {len(points)} candidates got {len(losses)} losses")
        line["losses"] = [loss if math.isfinite(loss) else None for loss in losses]
        self._trajectory.append([line])
        self._lines.append(line)
        return losses

    def _forget(self, step: int) -> None:
        self._trajectory.rewind(step)
        self._lines = self._lines[: step + 1]


def search(stage: Stage, evaluate: Evaluate, record: Record, report: Report = NO_REPORT) -> Found:
    """The best point of `stage`; `evaluate` gives the loss of each point of a generation, without penalty.

    Raises ConfigError for a start outside the bounds, ModelError where no point had a finite loss.
    """
    if not all(stage.low <= value <= stage.high for value in stage.start):
        raise ConfigError(
            f"evolution: stage {stage.name} starts outside [{stage.low:g}, {stage.high:g}]",
            next_step="change the initial value",
        )
    begun = record.losses(stage.name, [stage.start], evaluate)
    best = _Best(stage, start_loss=begun[0] if math.isfinite(begun[0]) else None)
    best.tell([stage.start], begun)
    asker = _asker(stage)
    for generation in range(1, stage.iterations + 1):
        report(phase=f"evolve {stage.name}", step=generation - 1, total=stage.iterations, loss=best.shown)
        asked = asker.ask()
        points = [_rounded(point[: len(stage.start)]) for point in asked]
        asker.tell(asked, best.tell(points, record.losses(stage.name, points, evaluate)))
    report(phase=f"evolve {stage.name}", step=stage.iterations, total=stage.iterations, loss=best.shown)
    return best.found()


@dataclass
class _Best:
    """The best point so far, and the counts."""

    stage: Stage
    start_loss: float | None = None
    point: Point = ()
    loss: float = math.nan
    objective: float = math.inf
    generation: int = -1
    evaluations: int = 0
    not_finite: int = 0
    by_generation: list[float | None] = field(default_factory=list)

    def tell(self, points: Sequence[Point], losses: Sequence[float]) -> list[float]:
        """Take note of a generation; returns finite objectives, what had none being worse than the rest."""
        objectives = [
            loss + self.stage.penalty * sum(map(abs, point))
            for point, loss in zip(points, losses, strict=True)
        ]
        for point, loss, objective in zip(points, losses, objectives, strict=True):
            if math.isfinite(objective) and objective < self.objective:
                self.point, self.loss, self.objective = point, loss, objective
                self.generation = len(self.by_generation)
        finite = [objective for objective in objectives if math.isfinite(objective)]
        worst = max(finite, default=0.0) + 1.0
        self.evaluations += len(points)
        self.not_finite += len(points) - len(finite)
        self.by_generation.append(self.shown)
        return [objective if math.isfinite(objective) else worst for objective in objectives]

    @property
    def shown(self) -> float | None:
        return self.objective if math.isfinite(self.objective) else None

    def found(self) -> Found:
        if self.shown is None:
            raise ModelError(
                f"evolution: no finite loss in {self.evaluations} candidates of stage {self.stage.name}",
                next_step="look at the adapters and at the samples; a base that overflows makes such losses",
            )
        return Found(
            self.point,
            self.start_loss,
            self.loss,
            self.objective,
            self.generation,
            self.evaluations,
            self.not_finite,
            self.by_generation,
        )


def _rounded(point: Sequence[float]) -> Point:
    """To the digits of a candidate, so that what is scored is what can be sent; never -0.0."""
    return tuple(round(float(value), DIGITS) + 0.0 for value in point)


def _asker(stage: Stage) -> Any:
    """A `CMAEvolutionStrategy` with its own generator; one dimension, which `cma` lacks, is two of which one
    does nothing."""
    with warnings.catch_warnings():  # cma warns that it has no matplotlib
        warnings.simplefilter("ignore")
        import cma
    random = np.random.Generator(np.random.PCG64([stage.seed, *stage.name.encode()]))
    start = list(stage.start) if len(stage.start) > 1 else [*stage.start, (stage.low + stage.high) / 2]
    options = {
        "popsize": stage.population,
        "bounds": [stage.low, stage.high],
        "randn": lambda *shape: random.standard_normal(shape),
        "seed": math.nan,  # leave numpy's global generator alone
        "verbose": -9,
    }
    return cma.CMAEvolutionStrategy(start, stage.sigma, options)
