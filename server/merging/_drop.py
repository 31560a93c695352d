"""Dropping entries by chance, from a seed, for every method that does so.

What is drawn depends on the seed, the vector's label, the tensor's name and the place in it: not on the
order of the vectors, on how many there are or on who reads them. An entry is kept where its number, uniform
in [0, 1), is below the probability to keep it.
"""

from __future__ import annotations

import math
from typing import Annotated

import numpy as np
import numpy.typing as npt

from server.merging._options import Bounds
from server.merging._vectors import Block

Seed = Annotated[int, Bounds(ge=0)]


def drop(block: Block, p: float, seed: int) -> None:
    """Zero each entry of every vector with probability `p`, in place. Survivors are not rescaled here.

    An entry's number has 24 bits, as `random(dtype=float32)` has; `p` is rounded to float32. One byte of it
    decides for nearly all: the other 16 bits are drawn for those alone whose byte is the border's.
    """
    keep = np.float32(1 - p)
    if keep == 1:  # every number is below
        return
    border, rest = divmod(math.ceil(float(keep) * 2**24), 1 << 16)
    for vector, tau_X in enumerate(block.tau_NX):
        bits = block.random(seed, vector).bit_generator
        byte_X = _drawn(bits, "u1", len(tau_X))
        kept_X = byte_X < border
        if rest:
            tied_T = np.flatnonzero(byte_X == border)
            kept_X[tied_T] = _drawn(bits, "<u2", len(tied_T)) < rest
        tau_X *= kept_X


def _drawn(bits: np.random.BitGenerator, dtype: str, count: int) -> npt.NDArray[np.unsignedinteger]:
    """`count` whole numbers of 8 or 16 bits, from words of 64 bits of which the lowest bits come first."""
    words = bits.random_raw(-(-count * np.dtype(dtype).itemsize // 8))
    return words.astype("<u8", copy=False).view(dtype)[:count]
