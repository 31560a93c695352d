"""TSV-Merge: each matrix's strongest singular vectors, made orthogonal to those of the others.

Gargiulo et al., "Task Singular Vectors", CVPR 2025, section 4 (TSV-Merge):
1. `tau_d = U_d S_d V_d^T`, cut to the `k = floor(min(R, C) / N)` largest singular values (at least one);
2. side by side: `U = [U_1 .. U_N]`, `S = diag(S_1 .. S_N)`, `V = [V_1 .. V_N]`;
3. whiten: `U' = U (U^T U)^(-1/2)` and `V'` alike, that is the orthogonal Procrustes solution;
4. `tau = lambda U' S V'^T`. Biases, norms and embedding tables: the mean.

Here singular vectors that depend on each other (equal vectors, more vectors than rows) span what they span:
the whitening is a pseudo-inverse, while other code leaves the completion to chance. A zero matrix takes
part with nothing. Everything is in float64.

The processed vectors are the terms `lambda U'_d S_d V'_d^T` of the sum.
"""

from __future__ import annotations

import numpy as np

from server.merging import Block, Floats, Kernel, Vectors, Weight, merge_method
from server.merging._matrix import polar, thin_svd


@merge_method(
    "tsv-merge",
    paper="Gargiulo et al., CVPR 2025, TSV-Merge",
    equation="tau = lambda U' S V'^T; U', V' = whitened [U_1 .. U_N], [V_1 .. V_N] cut to rank / N",
    unit="matrix",
    splits=True,
)
def tsv_merge(vectors: Vectors, *, lambda_: Weight = 1.0) -> Kernel:
    """Cut each matrix to the 1/N strongest singular directions, make these orthogonal, and add them up.

    Needs nothing else. Time: N + 2 singular value decompositions of each matrix; memory: one matrix of
    every vector, and two float64 matrices of its size.
    """
    scale = np.float32(lambda_)

    def kernel(block: Block) -> Floats:
        count = len(block.tau_NX)
        if not block.is_linear:
            return block.tau_NX * (scale / np.float32(count))
        keep = max(1, min(block.shape) // count)
        svds = [thin_svd(tau_RC) for tau_RC in block.matrices()]
        parts = [(u_RK[:, :keep], s_K[:keep], vt_KC[:keep]) for u_RK, s_K, vt_KC in svds]
        u_RK = polar(np.concatenate([u for u, _, _ in parts], axis=1))
        vt_KC = polar(np.concatenate([vt for _, _, vt in parts], axis=0))
        stop_N = np.cumsum([len(s) for _, s, _ in parts])
        result_NX = np.empty_like(block.tau_NX)
        for result_X, (_, s_K, _), stop in zip(result_NX, parts, stop_N, strict=True):
            mine = slice(stop - len(s_K), stop)
            result_X[:] = (lambda_ * (u_RK[:, mine] * s_K) @ vt_KC[mine]).reshape(-1)
        return result_NX

    return kernel
