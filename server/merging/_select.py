"""The k-th largest magnitude of whole vectors, exactly, without holding them.

A sample gives a narrow bracket around the threshold; a pass over the vectors counts what lies above the
bracket and keeps what lies in it, of which the answer is one. Should the bracket miss, it is widened and
read again. Memory is the bracket's values: about a percent of each vector, a few where it is small.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping

import numpy as np

from server.merging._passes import in_shares, sample
from server.merging._vectors import Block, Floats, Vectors

SAMPLE = 1 << 16


def largest(vectors: Vectors, density: float) -> Floats:
    """For each vector the smallest magnitude among its `round(density * P)` largest (at least one): [N].

    All vectors in one pass, after a sample of them. Raises VectorError as the source does.
    """
    total = sum(math.prod(shape) for shape in vectors.shapes.values())
    keep = min(total, max(1, round(density * total)))
    sample_NM, margin_N = _samples(vectors, total, (total - keep) / total)
    place = (total - keep) / total * sample_NM.shape[1]
    threshold_N = np.empty(len(sample_NM), np.float32)
    left = list(range(len(sample_NM)))
    while left:
        bracket = {n: _bracket(sample_NM[n], place, margin_N[n]) for n in left}
        above, inside = _between(vectors, bracket)
        for n in list(left):
            rank = keep - above[n]  # among those inside, counted from the largest
            if 1 <= rank <= len(inside[n]):
                threshold_N[n] = np.partition(inside[n], len(inside[n]) - rank)[len(inside[n]) - rank]
                left.remove(n)
            elif bracket[n][0] < 0 and bracket[n][1] == np.inf:  # NaN, from a source that does not refuse it
                threshold_N[n] = np.nan
                left.remove(n)
            margin_N[n] *= 4
    return threshold_N


def _bracket(sample_M: Floats, place: float, margin: float) -> tuple[np.float32, np.float32]:
    """Magnitudes between which that of `place` in the sorted sample lies, in all likelihood."""
    low = sample_M[int(place - margin)] if place - margin >= 0 else np.float32(-1)
    high = sample_M[int(place + margin)] if place + margin < len(sample_M) else np.float32(np.inf)
    return low, high


def _between(
    vectors: Vectors, bracket: Mapping[int, tuple[np.float32, np.float32]]
) -> tuple[dict[int, int], dict[int, Floats]]:
    """For each vector how many magnitudes lie above its bracket, and those within it."""

    def look(blocks: Iterator[Block]) -> dict[int, tuple[int, Floats]]:
        above = dict.fromkeys(bracket, 0)
        kept: dict[int, list[Floats]] = {n: [np.empty(0, np.float32)] for n in bracket}
        over_X, within_X = np.empty(0, np.bool_), np.empty(0, np.bool_)
        for block in blocks:
            width = block.tau_NX.shape[1]
            if len(over_X) < width:
                over_X, within_X = np.empty(width, np.bool_), np.empty(width, np.bool_)
            for n, (low, high) in bracket.items():
                magnitude_X = np.abs(block.tau_NX[n], out=block.tau_NX[n])
                np.greater(magnitude_X, high, out=over_X[:width])
                np.greater_equal(magnitude_X, low, out=within_X[:width])
                above[n] += int(np.count_nonzero(over_X[:width]))
                np.not_equal(over_X[:width], within_X[:width], out=within_X[:width])
                kept[n].append(magnitude_X[within_X[:width]])
        return {n: (above[n], np.concatenate(kept[n])) for n in bracket}

    parts = in_shares(vectors, look)
    return (
        {n: sum(part[n][0] for part in parts) for n in bracket},
        {n: np.concatenate([part[n][1] for part in parts]) for n in bracket},
    )


def _samples(vectors: Vectors, total: int, share: float) -> tuple[Floats, list[float]]:
    """Sorted magnitudes of a sample of each vector [N, M], and how many places its `share` may be off."""
    runs_NRX = sample(vectors)
    if runs_NRX is None:
        sample_NM = _strided(vectors, total)
        sample_NM.sort(1)
        return sample_NM, [_margin(sample_NM.shape[1])] * len(sample_NM)
    np.abs(runs_NRX, out=runs_NRX)
    sample_NM = np.sort(runs_NRX.reshape(len(runs_NRX), -1), 1)
    margins = []
    for magnitude_RX, sample_M in zip(runs_NRX, sample_NM, strict=True):
        # runs at even distances: their error shows in how much each differs from the next
        above_R = (magnitude_RX > sample_M[int(share * (len(sample_M) - 1))]).mean(1)
        error = math.sqrt(float(np.square(np.diff(above_R)).sum()) / 2) / len(above_R)
        margins.append(6 * error * len(sample_M) + 8)
    return sample_NM, margins


def _strided(vectors: Vectors, total: int) -> Floats:
    """About `SAMPLE` magnitudes of every vector at even distances [N, M], by a whole pass."""
    stride = max(1, total // SAMPLE)
    picked, offset = [], 0
    for block in vectors.blocks():
        picked.append(np.abs(block.tau_NX[:, offset::stride]))
        offset = (offset - block.tau_NX.shape[1]) % stride
    return np.concatenate(picked, 1)


def _margin(count: int) -> float:
    """Eight standard errors of a share, at most a half, of `count` draws; in places."""
    return 8 * math.sqrt(count) / 2 + 8
