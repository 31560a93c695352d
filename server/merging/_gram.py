"""One solver for every method that weighs the rows of a matrix by a Gram matrix: RegMean, RegMean++, WUDI.

Conventions. A linear layer computes `y = x W^T`; its weight, and so each change `tau_n` of it, is [R, C]:
R outputs (rows) by C inputs (columns). The Gram matrix of layer inputs `x_TC` (T tokens) is `x^T x`, [C, C],
symmetric and positive semidefinite. The change that agrees best with all N models on their own inputs,

    minimise over tau   sum_n ||(tau - tau_n) G_n^(1/2)||_F^2 + ridge g ||tau - mean_n tau_n||_F^2 N,

solves `tau A = sum_n tau_n (G_n + ridge g I)` with `A = sum_n (G_n + ridge g I)`, where g is the mean of the
diagonals of the G_n. So `ridge` has no unit, and scaling the Grams or the vectors changes nothing else. The
ridge pulls towards the mean of the vectors, not towards zero: one vector, or equal vectors, come out as they
went in, whatever the Grams are.

What no Gram sees (a singular A) takes the mean: the limit of a ridge that goes to zero.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Annotated

import numpy as np

from server.merging._options import Bounds
from server.merging._vectors import Doubles, Floats

Ridge = Annotated[float, Bounds(ge=0, le=1)]

RIDGE = 1e-6
_BLOCK = 128


def shares(gram_NCC: Iterable[Doubles], tau_NRC: Floats, ridge: float = RIDGE) -> Doubles:
    """Each vector's part of the minimiser, [N, R, C] float64: their sum over N is the minimiser.

    gram_NCC: [N, C, C], or N matrices one after another (each is read once and not kept).
    tau_NRC: the changes of one weight. ridge: see the module; 0 gives the exact minimiser.

    Part n is `tau_n (G_n + r I) A^-1`, computed as `tau_n / N + tau_n (G_n - A / N) A^-1` so that what equal
    vectors and unseen directions keep is exact. Time: `2 N R C^2` for the products, `C^3 / 3` for the
    Cholesky factor and `2 N R C^2` to apply it; a singular A costs an eigen-decomposition, some 10 C^3.
    Memory: about `2 N R C + 3 C^2` float64 values.
    """
    part_NRC: Doubles = tau_NRC.astype(np.float64)
    count, _, columns = part_NRC.shape
    total_CC: Doubles = np.zeros((columns, columns))
    pull_NRC: Doubles = np.empty_like(part_NRC)
    for tau_RC, gram_CC, pull_RC in zip(part_NRC, gram_NCC, pull_NRC, strict=True):
        total_CC += gram_CC
        np.matmul(tau_RC, gram_CC, out=pull_RC)
    mean_CC = total_CC / count
    for tau_RC, pull_RC in zip(part_NRC, pull_NRC, strict=True):
        pull_RC -= tau_RC @ mean_CC
    total_CC.flat[:: columns + 1] += ridge * np.trace(total_CC) / columns
    part_NRC /= count
    part_NRC += _divide(pull_NRC.reshape(-1, columns), total_CC).reshape(part_NRC.shape)
    return part_NRC


def _divide(right_MC: Doubles, total_CC: Doubles) -> Doubles:
    """`right A^-1` for a symmetric positive semidefinite A; its pseudo-inverse where it is singular."""
    limit = len(total_CC) * float(np.finfo(np.float64).eps)
    try:
        lower_CC: Doubles = np.asarray(np.linalg.cholesky(total_CC), np.float64)
    except np.linalg.LinAlgError:
        return _divide_singular(right_MC, total_CC, limit)
    pivot_C = np.diag(lower_CC) ** 2
    if pivot_C.min() <= limit * pivot_C.max():
        return _divide_singular(right_MC, total_CC, limit)
    return _divide_factored(right_MC, lower_CC)


def _divide_factored(right_MC: Doubles, lower_CC: Doubles) -> Doubles:
    """`right (L L^T)^-1` for a lower triangular L, block by block: forwards with L, backwards with L^T."""
    x_CM = right_MC.T.copy()
    starts = range(0, len(lower_CC), _BLOCK)
    for start in starts:
        here = slice(start, start + _BLOCK)
        x_CM[here] -= lower_CC[here, :start] @ x_CM[:start]
        x_CM[here] = np.linalg.solve(lower_CC[here, here], x_CM[here])
    for start in reversed(starts):
        here, after = slice(start, start + _BLOCK), slice(start + _BLOCK, None)
        x_CM[here] -= lower_CC[after, here].T @ x_CM[after]
        x_CM[here] = np.linalg.solve(lower_CC[here, here].T, x_CM[here])
    return x_CM.T


def _divide_singular(right_MC: Doubles, total_CC: Doubles, limit: float) -> Doubles:
    """`right A^+`: directions whose eigenvalue is below `limit` of the largest count as unseen."""
    value_K, vector_CK = np.linalg.eigh(total_CC)
    seen_K = value_K > limit * max(float(value_K[-1]), 0.0)
    vector_CK = vector_CK[:, seen_K]
    result: Doubles = ((right_MC @ vector_CK) / value_K[seen_K]) @ vector_CK.T
    return result
