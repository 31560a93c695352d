"""The two stages of Evo-Merging over a pool of adapters (METHODS, "Evo-Merging"; Chen et al., 2025).

Stage 1 ("ratios") searches `a` in [0, 1]^N with all scales at 1/N, and minimises `loss + l1 * ||a||_1`.
Stage 2 ("scales") keeps the best `a` and searches signed `b` in [-bound, bound]^N for `loss + l2 * ||b||_1`.
The paper does not say where the searches start: here stage 1 starts at `initial_ratio`, stage 2 at 1/N (or
`initial_scale`), which is the result of stage 1.

Read literally, the penalties are sums over adapters: with a hundred of them, `0.05 * ||a||_1` is worth up to 5
nats a token, which no fine-tuning gains. `penalty = "mean"` divides both by N.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from pydantic import Field
from torch import Tensor

from common.config import Frozen
from common.language.pool import Candidate, Pool
from common.progress import NO_REPORT, Report
from common.digests import vector_digest
from server.evolution.fitness import Fitness
from server.evolution.search import Found, Point, Record, Stage, search

MANY = 50  # adapters above which the second stage gets twice the iterations
RECORD_FILE = "evolution.jsonl"


class EvolutionOptions(Frozen):
    """Options of `evo-merging`; the defaults are the paper's, where it gives any."""

    ratio_iterations: int = Field(20, ge=0, description="generations of stage 1; 0 keeps every entry of A")
    scale_iterations: int | None = Field(None, ge=1, description="None: 20, and 40 above 50 adapters")
    population: int = Field(20, ge=4)
    sigma: float = Field(0.05, gt=0)
    ratio_penalty: float = Field(0.05, ge=0)
    scale_penalty: float = Field(0.05, ge=0)
    penalty: Literal["sum", "mean"] = Field("sum", description="mean: divided by the number of adapters")
    bound: float = Field(1.5, gt=0, le=10)
    initial_ratio: float = Field(0.5, ge=0, le=1)
    initial_scale: float | None = Field(None, description="None: 1/N, where stage 1 ended")

    def iterations(self, adapters: int) -> tuple[int, int]:
        """Generations of the two stages."""
        scales = self.scale_iterations or (40 if adapters > MANY else 20)
        return self.ratio_iterations, scales

    def evaluations(self, adapters: int) -> int:
        """How many candidates will be scored in all: what a budget must allow."""
        ratios, scales = self.iterations(adapters)
        return (1 + ratios * self.population if ratios else 0) + 1 + scales * self.population


@dataclass(frozen=True)
class Evolved:
    """The merged adapter, the candidate that it is, and how the two stages went."""

    adapter: dict[str, Tensor]
    candidate: Candidate
    stages: dict[str, Found]
    seconds: float

    def facts(self, labels: Sequence[str]) -> dict[str, Any]:
        """For journals and tables."""
        return {
            "ratios": dict(zip(labels, self.candidate.ratios, strict=True)),
            "scales": dict(zip(labels, self.candidate.scales, strict=True)),
            "evaluations": sum(found.evaluations for found in self.stages.values()),
            "not_finite": sum(found.not_finite for found in self.stages.values()),
            "stages": {
                name: {key: value for key, value in asdict(found).items() if key != "point"}
                for name, found in self.stages.items()
            },
        }


def evolve(
    pool: Pool,
    fitness: Fitness,
    options: EvolutionOptions,
    work: Path,
    *,
    seed: int = 0,
    report: Report = NO_REPORT,
) -> Evolved:
    """Merge `pool` by what `fitness` says. Killed at any point and called again with the same `work`, it goes
    on after the last whole generation, to the same result.

    Raises ConfigError for options that cannot be, ModelError where no candidate had a finite loss, and what
    the fitness raises.
    """
    started_s, n = time.monotonic(), len(pool)
    record = Record(work / RECORD_FILE, _inputs(pool, fitness, options, seed))
    divisor = n if options.penalty == "mean" else 1
    ratio_iterations, scale_iterations = options.iterations(n)
    shared: dict[str, Any] = {"population": options.population, "sigma": options.sigma, "seed": seed}
    stages: dict[str, Found] = {}
    even, ratios = (1 / n,) * n, (1.0,) * n

    if ratio_iterations:
        start = (options.initial_ratio,) * n
        first = Stage("ratios", start, 0.0, 1.0, options.ratio_penalty / divisor, ratio_iterations, **shared)

        def with_ratios(points: Sequence[Point]) -> Sequence[float]:
            return fitness.losses([Candidate.of(point, even) for point in points])

        stages["ratios"] = search(first, with_ratios, record, report)
        ratios = stages["ratios"].point

    scale = 1 / n if options.initial_scale is None else options.initial_scale
    penalty = options.scale_penalty / divisor
    found = scale_search(
        Stage("scales", (scale,) * n, -options.bound, options.bound, penalty, scale_iterations, **shared),
        ratios,
        fitness,
        record,
        report,
    )
    stages["scales"] = found
    candidate = Candidate.of(ratios, found.point)
    return Evolved(pool.mix([candidate])[0], candidate, stages, time.monotonic() - started_s)


def scale_search(stage: Stage, ratios: Point, fitness: Fitness, record: Record, report: Report) -> Found:
    """Search signed scales at fixed ratios: the second stage, and with all ratios at 1 the whole of LoRAHub."""

    def with_scales(points: Sequence[Point]) -> Sequence[float]:
        return fitness.losses([Candidate.of(ratios, point) for point in points])

    return search(stage, with_scales, record, report)


def _inputs(pool: Pool, fitness: Fitness, options: EvolutionOptions, seed: int) -> Mapping[str, Any]:
    """All that the result follows from."""
    return {
        "adapters": {label: vector_digest(pool.adapter(label)) for label in pool.labels},
        "fitness": dict(fitness.key),
        "options": options.model_dump(mode="json"),
        "seed": seed,
    }
