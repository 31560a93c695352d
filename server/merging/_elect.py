"""Sign election and the disjoint mean of TIES, for every method that fuses sparse vectors that way."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from server.merging._vectors import Floats


def elected_sign(tau_NX: Floats) -> Floats:
    """The sign of the sum at each position [X], as -1, 0 or 1; the sum is taken in float64.

    So it is the same in any order of the vectors; a sum of zero elects nothing.
    """
    elected_X: Floats = np.sign(tau_NX.sum(0, dtype=np.float64)).astype(np.float32)
    return elected_X


def agreeing_mean(tau_NX: Floats, lambda_: float) -> Floats:
    """Each vector's entries that have the elected sign, divided by how many have it, times `lambda_`.

    The sum over N is the disjoint mean [X]. Returns [N, X]; may reuse `tau_NX`.
    """
    elected_X = elected_sign(tau_NX)
    count_X: npt.NDArray[Any] = np.zeros(tau_NX.shape[1], np.uint8 if len(tau_NX) < 256 else np.int32)
    for tau_X in tau_NX:  # row by row: what fits the processor's cache is several times faster
        tau_X *= elected_X
        np.maximum(tau_X, 0, out=tau_X)
        count_X += tau_X > 0
    elected_X *= np.float32(lambda_)
    elected_X /= np.maximum(count_X, 1)
    tau_NX *= elected_X
    return tau_NX
