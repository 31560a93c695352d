"""Sign election and the disjoint mean of TIES, for every method that fuses sparse vectors that way."""

from __future__ import annotations

import numpy as np

from server.merging._vectors import Floats


def agreeing_mean(tau_NX: Floats, lambda_: float) -> Floats:
    """Each vector's entries that have the elected sign, divided by how many have it, times `lambda_`.

    The sum over N is the disjoint mean [X]. The elected sign is that of the sum (in float64, so that it is
    the same in any order of the vectors); a sum of zero elects nothing. Returns [N, X]; may reuse `tau_NX`.
    """
    elected_X = np.sign(tau_NX.sum(0, dtype=np.float64)).astype(np.float32)
    agree_NX = (tau_NX * elected_X) > 0
    share_X = np.float32(lambda_) / np.maximum(agree_NX.sum(0, dtype=np.float32), 1)
    tau_NX *= agree_NX
    tau_NX *= share_X
    return tau_NX
