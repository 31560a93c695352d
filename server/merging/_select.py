"""The k-th largest magnitude of a whole vector, exactly, without holding the vector.

One pass over a vector takes a sample and so a narrow bracket around the threshold; a second counts what
lies above the bracket and keeps what lies in it, of which the answer is one. Should the bracket miss, it
is widened and read again. Memory is the bracket's values: a few percent of the vector.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator

import numpy as np

from server.merging._vectors import Floats, Vectors

SAMPLE = 1 << 16
Read = Callable[[], Iterator[Floats]]


def largest(vectors: Vectors, density: float) -> Floats:
    """For each vector the smallest magnitude among its `round(density * P)` largest (at least one): [N]."""
    total = sum(math.prod(shape) for shape in vectors.shapes.values())
    keep = min(total, max(1, round(density * total)))

    def reader(vector: int) -> Read:
        return lambda: (values_X for _, values_X in vectors.values(vector))

    return np.array([kth_largest(reader(n), total, keep) for n in range(len(vectors.labels))], np.float32)


def kth_largest(read: Read, total: int, k: int) -> np.float32:
    """The k-th largest magnitude (k from 1) of the `total` values that `read()` gives."""
    sample = _sample(read, total)
    place = (total - k) / total * len(sample)  # where the answer would be in the sorted sample
    margin = 8 * math.sqrt(len(sample)) / 2 + 8
    while True:
        low = sample[int(place - margin)] if place - margin >= 0 else np.float32(-1)
        high = sample[int(place + margin)] if place + margin < len(sample) else np.float32(np.inf)
        above, kept = 0, []
        for values_X in read():
            magnitude_X = np.abs(values_X)
            inside_X = magnitude_X[magnitude_X >= low]
            above += int(np.count_nonzero(inside_X > high))
            kept.append(inside_X[inside_X <= high])
        inside = np.concatenate(kept)
        rank = k - above  # among those inside, counted from the largest
        if 1 <= rank <= len(inside):
            return np.float32(np.partition(inside, len(inside) - rank)[len(inside) - rank])
        margin *= 4


def _sample(read: Read, total: int) -> Floats:
    """About `SAMPLE` magnitudes at even distances, sorted."""
    stride = max(1, total // SAMPLE)
    picked, offset = [], 0
    for values_X in read():
        picked.append(np.abs(values_X[offset::stride]))
        offset = (offset - len(values_X)) % stride
    return np.sort(np.concatenate(picked))
