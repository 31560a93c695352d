"""A common coefficient to begin with: one number for all vectors, chosen by the held-back loss.

The best common coefficient depends on how many vectors there are and how much they agree: 1 / N if they are
alike, about 1 / sqrt(N) if they are orthogonal. A few values between half of the first and twice the second
are tried, one pass over the held-back pseudo-users each.

    >>> grid(4, 0.2, processed=False)
    [0.2, 0.125, 0.189, 0.287, 0.435, 0.66, 1.0]
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch

from common.errors import ModelError
from common.progress import Report
from server.learning.objective import Objective

PLAIN_VALUES = 6
PROCESSED_FACTORS = (0.5, 0.75, 1.25, 1.5, 2.0)


def grid(vectors: int, initial: float, *, processed: bool) -> list[float]:
    """What is tried for so many vectors: `initial` first, then others around it."""
    if processed:  # the sum of processed vectors is a merge already
        return [initial, *(round(initial * factor, 6) for factor in PROCESSED_FACTORS)]
    low, high = 0.5 / vectors, min(1.0, 2 / math.sqrt(vectors))
    ratio = (high / low) ** (1 / (PLAIN_VALUES - 1))
    values = [float(f"{low * ratio**place:.3g}") for place in range(PLAIN_VALUES)]
    return [initial, *(value for value in values if value != initial)]


def search(
    objective: Objective, values: Sequence[float], shape: tuple[int, int], report: Report
) -> tuple[float, dict[str, float]]:
    """The value of the lowest held-back loss, and the losses of all by value; `shape` is that of lambda_GD.

    Among equals the first wins. Raises ModelError when no value has a finite loss.
    """
    losses: dict[str, float] = {}
    best, lowest = values[0], math.inf
    for place, value in enumerate(values):
        report(phase="search", step=place, total=len(values))
        loss = objective.held_back(torch.full(shape, value))
        losses[f"{value:g}"] = loss
        if loss < lowest:
            best, lowest = value, loss
    report(phase="search", step=len(values), total=len(values))
    if not math.isfinite(lowest):
        raise ModelError(
            "merging: no common coefficient has a finite held-back loss",
            next_step="look at the vectors' norms; a training that diverged makes such vectors",
        )
    return best, losses
