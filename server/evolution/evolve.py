"""The two stages of Evo-Merging over a pool of adapters (METHODS, "Evo-Merging"; Chen et al., 2025).

Stage 1 ("ratios") searches `a` in [0, 1]^N with all scales at 1/N, and minimises `loss + l1 * ||a||_1`.
Stage 2 ("scales") keeps the best `a` and searches signed `b` in [-bound, bound]^N for `loss + l2 * ||b||_1`.
The paper does not say where the searches start: here stage 1 starts at `initial_ratio`, stage 2 at 1/N (or
`initial_scale`), which is the result of stage 1.

Read literally, the penalties are sums over adapters: with a hundred of them, `0.05 * ||a||_1` is worth up to
5 nats a token, more than most fine-tuning gains. `penalty = "mean"` divides both by N.

A scale multiplies A and B alike, so an adapter's own update counts with `b_i^2`: signs decide only about the
terms `B_i A_j` of two different adapters.
"""

from __future__ import annotations

import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from common.language.pool import Candidate, Pool
from common.progress import NO_REPORT, Report
from server.evolution.fitness import Fitness
from server.evolution.options import EvolutionOptions
from server.evolution.search import Found, Point, Record, Stage, search

RECORD_FILE = "evolution.jsonl"


@dataclass(frozen=True)
class Evolved:
    """The merged adapter, the candidate that it is, and how the two stages went."""

    adapter: dict[str, Tensor]
    candidate: Candidate
    stages: dict[str, Found]
    seconds: float

    def facts(self, labels: Sequence[str]) -> dict[str, Any]:
        """For journals and tables; with a `warning` where the penalty, not the samples, decided."""
        begun = [found.start_loss for found in self.stages.values() if found.start_loss is not None]
        even, end = min(begun, default=math.inf), self.stages["scales"].loss
        warning = (
            f"the penalty outweighs what the adapters save: the result has a loss of {end:.4f}, equal "
            f"weights had {even:.4f}; use penalty = 'mean', or lower ratio_penalty and scale_penalty"
        )
        return {
            **({"warning": warning} if end > even else {}),
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
    """Search signed scales at fixed ratios: the second stage, and with all ratios at 1 LoRAHub."""

    def with_scales(points: Sequence[Point]) -> Sequence[float]:
        return fitness.losses([Candidate.of(ratios, point) for point in points])

    return search(stage, with_scales, record, report)


def _inputs(pool: Pool, fitness: Fitness, options: EvolutionOptions, seed: int) -> Mapping[str, Any]:
    """All that the result follows from."""
    return {
        "adapters": pool.digests,
        "fitness": dict(fitness.key),
        "options": options.model_dump(mode="json"),
        "seed": seed,
    }
