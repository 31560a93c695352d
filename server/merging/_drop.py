"""Dropping entries by chance, from a seed, for every method that does so.

What is drawn depends on the seed, the vector's label, the tensor's name and the place in it: not on the
order of the vectors, on how many there are or on who reads them. An entry is kept where its number, uniform
in [0, 1), is below the probability to keep it.
"""

from __future__ import annotations

import math
from typing import Annotated

import numpy as np

from server.merging._options import Bounds
from server.merging._vectors import Block

Seed = Annotated[int, Bounds(ge=0)]


def drop(block: Block, p: float, seed: int) -> None:
    """Zero each entry of every vector with probability `p`, in place. Survivors are not rescaled here.

    The generator's numbers are compared as the whole numbers that they are made of (`random(dtype=float32)`
    is the upper 24 of 32 bits, times 2^-24): the same entries, in two thirds of the time.
    """
    keep = np.float32(1 - p)
    if keep == 1:  # every number is below
        return
    limit = np.uint32(math.ceil(float(keep) * 2**24) << 8)
    count = block.tau_NX.shape[1]
    for vector, tau_X in enumerate(block.tau_NX):
        words = block.random(seed, vector).bit_generator.random_raw((count + 1) // 2)
        drawn_X = words.astype("<u8", copy=False).view("<u4")[:count]  # the lower half comes first
        tau_X *= drawn_X < limit
