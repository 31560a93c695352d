"""Low-rank algebra: what can be said about `sum_i B_i A_i` without ever forming an R x C matrix.

Axes: R rows (a layer's outputs), C columns (its inputs), K rank. Everything goes through QR of the factors
and an SVD of the small K x K core between them, in float64. For `W = B A`, `B = Q_B R_B` and `A^T = Q_A R_A`:
`W = Q_B (R_B R_A^T) Q_A^T`, so the core has W's singular values, and its singular vectors are W's in the
orthonormal bases Q_B and Q_A. Cost O((R + C) K^2 + K^3) where a dense SVD costs O(R C min(R, C)).

    >>> one = LowRank(np.ones((2, 1)), np.array([[1.0, 2.0, 3.0]]))
    >>> round(distance(stack([one, one], [0.5, 0.5]), one), 12)
    0.0
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

Doubles = npt.NDArray[np.float64]


@dataclass(frozen=True)
class LowRank:
    """The matrix `B_RK @ A_KC` [R, C] as its two factors, in float64."""

    B_RK: Doubles
    A_KC: Doubles

    @classmethod
    def of(cls, B_RK: npt.NDArray[Any], A_KC: npt.NDArray[Any]) -> LowRank:
        """From factors of any float type."""
        return cls(np.asarray(B_RK, np.float64), np.asarray(A_KC, np.float64))

    @property
    def rank(self) -> int:
        """How many columns B has: an upper bound of the matrix's rank."""
        return int(self.A_KC.shape[0])

    @property
    def shape(self) -> tuple[int, int]:
        return self.B_RK.shape[0], self.A_KC.shape[1]

    def dense(self) -> Doubles:
        """The matrix itself, for small ones."""
        return self.B_RK @ self.A_KC

    def norm(self) -> float:
        """Frobenius norm."""
        core_KK = np.linalg.qr(self.B_RK).R @ np.linalg.qr(self.A_KC.T).R.T
        return float(np.linalg.norm(core_KK))


def stack(matrices: Iterable[LowRank], weights: Sequence[float]) -> LowRank:
    """`sum_i w_i B_i A_i` exactly: the B side by side, the `w_i A_i` below each other; the ranks add up."""
    matrices = list(matrices)
    return LowRank(
        np.concatenate([matrix.B_RK for matrix in matrices], axis=1),
        np.concatenate([w * matrix.A_KC for matrix, w in zip(matrices, weights, strict=True)]),
    )


def truncate(matrix: LowRank, rank: int) -> tuple[LowRank, float]:
    """The nearest matrix of at most `rank` in Frobenius norm (Eckart-Young), and how far off it is.

    The singular values are shared evenly: `B = U S^(1/2)`, `A = S^(1/2) V^T`. The second value is
    `||W - W_rank|| / ||W||`, from the singular values left out; 0.0 for a zero matrix.
    """
    left_RK, left_KK = np.linalg.qr(matrix.B_RK)
    right_CK, right_KK = np.linalg.qr(matrix.A_KC.T)
    U_KK, sigma_K, Vt_KK = np.linalg.svd(left_KK @ right_KK.T, full_matrices=False)
    root_K = np.sqrt(sigma_K[:rank])
    best = LowRank(left_RK @ (U_KK[:, :rank] * root_K), (root_K[:, None] * Vt_KK[:rank]) @ right_CK.T)
    total = float(np.linalg.norm(sigma_K))
    return best, float(np.linalg.norm(sigma_K[rank:])) / total if total else 0.0


def distance(matrix: LowRank, other: LowRank) -> float:
    """`||W - V|| / ||V||` in Frobenius norm; infinite where only V is zero, 0.0 where both are."""
    difference, size = stack([matrix, other], [1.0, -1.0]).norm(), other.norm()
    if size:
        return difference / size
    return float("inf") if difference else 0.0
