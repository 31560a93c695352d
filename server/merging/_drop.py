"""Dropping entries by chance, from a seed, for every method that does so.

What is drawn depends on the seed, the vector's label, the tensor's name and the place in it: not on the
order of the vectors, on how many there are or on who reads them. An entry is kept where its number, uniform
in [0, 1), is below the probability to keep it.
"""

from __future__ import annotations

from typing import Annotated

import numpy as np

from server.merging._options import Bounds
from server.merging._vectors import Block

Seed = Annotated[int, Bounds(ge=0)]


def drop(block: Block, p: float, seed: int) -> None:
    """Zero each entry of every vector with probability `p`, in place. Survivors are not rescaled here."""
    keep = np.float32(1 - p)
    drawn_X = np.empty(block.tau_NX.shape[1], np.float32)
    for vector, tau_X in enumerate(block.tau_NX):
        block.random(seed, vector).random(out=drawn_X, dtype=np.float32)
        tau_X *= drawn_X < keep
