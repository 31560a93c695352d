"""Dropping entries by chance, from a seed, for every method that does so.

What is drawn depends on the seed, the vector's label, the tensor's name and the place in it: not on the
order of the vectors, on how many there are or on who reads them.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Annotated

import numpy as np
import numpy.typing as npt

from server.merging._draws import generator
from server.merging._options import Bounds
from server.merging._vectors import BLOCK_VALUES, Block

Seed = Annotated[int, Bounds(ge=0)]


def dropper(p: float, seed: int) -> Callable[[Block], None]:
    """What zeroes each entry of every vector of a block with probability `p`, in place, without rescaling.

    For blocks of `BLOCK_VALUES` at most.

    An entry is kept where a byte drawn for it is below a threshold: the whole part of `256 (1 - p)`, or one
    more at as many places as make up for the rest (`1 - p` to 24 bits). Those places are shuffled by the
    seed, and every block of every vector begins somewhere else among them, by chance.
    """
    keep = np.float32(1 - p)
    if keep == 1:
        return lambda block: None
    threshold_X = _thresholds(float(keep), seed)

    def drop(block: Block) -> None:
        for vector, tau_X in enumerate(block.tau_NX):
            bits = block.random(seed, vector).bit_generator
            begin = int(bits.random_raw()) % BLOCK_VALUES
            tau_X *= _bytes(bits, len(tau_X)) < threshold_X[begin : begin + len(tau_X)]

    return drop


def _thresholds(keep: float, seed: int) -> npt.NDArray[np.unsignedinteger]:
    """`BLOCK_VALUES` thresholds of a byte whose mean is `256 keep`, in an order by chance, twice over."""
    low, higher = divmod(math.ceil(keep * 256 * BLOCK_VALUES), BLOCK_VALUES)
    threshold_X = np.full(BLOCK_VALUES, low, np.uint16)
    threshold_X[:higher] = low + 1
    generator(seed, "thresholds").shuffle(threshold_X)
    return np.tile(threshold_X if low == 255 else threshold_X.astype(np.uint8), 2)


def _bytes(bits: np.random.BitGenerator, count: int) -> npt.NDArray[np.uint8]:
    """`count` bytes, from words of 64 bits of which the lowest bits come first."""
    return bits.random_raw(-(-count // 8)).astype("<u8", copy=False).view(np.uint8)[:count]
