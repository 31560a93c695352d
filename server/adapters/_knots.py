"""KnOTS: task updates rotated into one basis before they are merged, from the factors alone.

Stoica et al., "Model merging with SVD to tie the Knots", ICLR 2025. For one layer with the updates
`W_i = s_i B_i A_i` [R, C] the concatenation `[W_1 ... W_N] = U S [V_1^T ... V_N^T]` gives a basis `U` that
all share and a part `V_i^T` [K, C] for each adapter; the parts are merged entry by entry and multiplied back.

The concatenation is never formed. With `[B_1 ... B_N] = Q R` and `s_i A_i^T = Q_i R_i` it is
`Q [R_1' ... R_N'] diag(Q_1^T ... Q_N^T)` where `R_i' = (columns of R that belong to i) R_i^T`; the SVD of
that small middle, `sum_i r_i` on a side, is the SVD of the whole.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from common.low_rank import Doubles, LowRank
from server.merging import Floats

NEGLIGIBLE = 1e-6  # singular values below this share of the largest are rounding of float32 weights


@dataclass(frozen=True)
class Aligned:
    """One layer's updates in their common basis: `W_i = U_RK diag(sigma_K) V_i^T`."""

    U_RK: Doubles
    sigma_K: Doubles
    inner: tuple[LowRank, ...]  # V_i^T [K, C] as [K, r_i] times [r_i, C]

    @property
    def part_shape(self) -> tuple[int, int]:
        """[K, C] of each part."""
        return self.inner[0].shape

    def part(self, adapter: int, *, scaled: bool) -> Floats:
        """`V_i^T` [K, C] of one adapter; `diag(sigma) V_i^T` where `scaled`."""
        inner = self.inner[adapter]
        left_KJ = self.sigma_K[:, None] * inner.B_RK if scaled else inner.B_RK
        return (left_KJ @ inner.A_KC).astype(np.float32)

    def restore(self, merged_KC: Floats, *, scaled: bool) -> LowRank:
        """The merged update: `U` times the merged part, and `diag(sigma)` where that is not in it yet."""
        return LowRank.of(self.U_RK if scaled else self.U_RK * self.sigma_K, merged_KC)


def align(updates: Sequence[LowRank]) -> Aligned:
    """The common basis of `updates` (all [R, C]); directions below `NEGLIGIBLE` are left out, one is kept."""
    left_RJ, left_JJ = np.linalg.qr(np.concatenate([update.B_RK for update in updates], axis=1))
    borders = np.cumsum([update.rank for update in updates])[:-1]
    bases, middles = [], []
    for columns_JK, update in zip(np.split(left_JJ, borders, axis=1), updates, strict=True):
        basis_CK, right_KK = np.linalg.qr(update.A_KC.T)
        bases.append(basis_CK)
        middles.append(columns_JK @ right_KK.T)
    U_JK, sigma_K, Vt_KJ = np.linalg.svd(np.concatenate(middles, axis=1), full_matrices=False)
    keep = max(1, int(np.count_nonzero(sigma_K > NEGLIGIBLE * sigma_K[0])))
    sides = np.cumsum([basis_CK.shape[1] for basis_CK in bases])[:-1]
    parts = np.split(Vt_KJ[:keep], sides, axis=1)
    inner = tuple(LowRank(part, basis_CK.T) for part, basis_CK in zip(parts, bases, strict=True))
    return Aligned(left_RJ @ U_JK[:, :keep], sigma_K[:keep], inner)
