"""Singular values of weight matrices, for the methods that merge them: in float64, at their numerical rank.

A direction whose singular value is below `RANK_CUT` of the largest is rounding, not training: a method that
makes all singular values equal would blow it up, and in which direction it points is chance. Such directions
are left out, so that low-rank, repeated and zero matrices have a defined result.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from server.merging._vectors import Doubles

RANK_CUT = 1e-6


def thin_svd(matrix_RC: npt.NDArray[np.floating]) -> tuple[Doubles, Doubles, Doubles]:
    """`u_RK`, `s_K` (largest first), `vt_KC` with `matrix = u diag(s) vt`; K is the rank, 0 for zeros.

    Time: some `6 max(R, C) K^2 + 20 K^3` operations in LAPACK.
    """
    if not matrix_RC.any():
        rows, columns = matrix_RC.shape
        return np.zeros((rows, 0)), np.zeros(0), np.zeros((0, columns))
    u_RK, s_K, vt_KC = np.linalg.svd(matrix_RC.astype(np.float64), full_matrices=False)
    rank = int(np.count_nonzero(s_K > RANK_CUT * s_K[0]))
    return u_RK[:, :rank], s_K[:rank], vt_KC[:rank]


def polar(matrix_RC: Doubles) -> Doubles:
    """The nearest matrix whose singular values are all 1 (on its own rank): `u vt`, the Procrustes solution.

    For independent columns it equals the whitening `M (M^T M)^(-1/2)`.
    """
    u_RK, _, vt_KC = thin_svd(matrix_RC)
    return u_RK @ vt_KC
