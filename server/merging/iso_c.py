"""Iso-C: the sum of the matrices with all its singular values made equal.

Marczak et al., "No Task Left Behind: Isotropic Model Merging with Common and Task-Specific Subspaces",
ICML 2025, section 4 (Iso-C): `sum_d tau_d = U S V^T`, and `tau = lambda mean(S) U V^T`, so that directions
that few domains share are as strong as those that all share. Biases, norms and embedding tables: the mean.

Here the mean is over the rank of the sum, and only those directions are kept; other code averages over
`min(R, C)` values and fills up with directions that no vector has. They differ for low-rank sums alone.
The paper chooses `lambda` on validation data; without any, 1.
"""

from __future__ import annotations

import numpy as np

from server.merging import Block, Floats, Kernel, Vectors, Weight, merge_method
from server.merging._matrix import thin_svd


@merge_method(
    "iso-c",
    paper="Marczak et al., ICML 2025, Iso-C",
    equation="tau = lambda mean(S) U V^T with U S V^T = sum_d tau_d",
    unit="matrix",
)
def iso_c(vectors: Vectors, *, lambda_: Weight = 1.0) -> Kernel:
    """Add the matrices up and give all directions of the sum the same strength, their mean.

    Needs nothing else. Time: one singular value decomposition of each matrix; memory: one matrix of every
    vector, and four float64 matrices of its size.
    """

    def kernel(block: Block) -> Floats:
        if not block.is_linear:
            return np.asarray(np.float32(lambda_) * block.tau_NX.mean(0))
        u_RK, s_K, vt_KC = thin_svd(block.matrices().sum(0, dtype=np.float64))
        strength = lambda_ * float(s_K.mean()) if len(s_K) else 0.0
        return (strength * (u_RK @ vt_KC)).astype(np.float32).reshape(-1)

    return kernel
