"""Localize-and-Stitch without data: keep the largest few percent of each vector, average where they meet.

He et al., "Localize-and-Stitch", TMLR 2024 (arXiv:2408.13656):
1. localize: `gamma_d` marks the top `density` of `abs(tau_d)`, over the whole vector;
2. stitch: `gamma'_d = gamma_d / sum_j gamma_j`, `tau = sum_d gamma'_d tau_d`.

This is the paper's data-free variant (5% kept). Its main variant trains each mask on labelled examples of the
domain and keeps 1%; that needs the private data, so it cannot run at the server and is not here. Unlike TIES
no sign is elected: where two vectors both kept an entry, their mean is taken whatever its signs.

The authors' code keeps what is strictly above the k-th magnitude, and localizes in the transformer layers
only; here entries equal to the threshold are all kept, and every tensor takes part. An entry that is zero is
never kept.
"""

from __future__ import annotations

import numpy as np

from server.merging import Block, Density, Floats, Kernel, Vectors, merge_method
from server.merging._select import largest


@merge_method(
    "localize-and-stitch",
    paper="He et al., TMLR 2024 (arXiv:2408.13656), the data-free variant",
    equation="tau = sum_d gamma_d tau_d / sum_d gamma_d, gamma_d = 1 on the top density of abs(tau_d)",
    splits=True,
)
def localize_and_stitch(vectors: Vectors, *, density: Density = 0.05) -> Kernel:
    """Keep the largest entries of each vector and average them where several vectors keep one.

    The data-free variant; the one that trains its masks needs a domain's private data. Needs nothing else.
    Two passes over the files, after a sample: the first finds each vector's threshold,
    and holds about a percent of each vector, or a few where it is small.
    """
    threshold_N1 = largest(vectors, density)[:, None]

    def kernel(block: Block) -> Floats:
        tau_NX = block.tau_NX
        tau_NX *= np.abs(tau_NX) >= threshold_N1
        tau_NX /= np.maximum(np.count_nonzero(tau_NX, axis=0), 1).astype(np.float32)
        return tau_NX

    return kernel
