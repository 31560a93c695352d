"""Weight Averaging: the mean of the task vectors.

Wortsman et al., "Model soups", ICML 2022, eq. 1: `theta = mean_d theta_d = theta_0 + mean_d tau_d`.
"""

from __future__ import annotations

import numpy as np

from server.merging import Kernel, Vectors, merge_method


@merge_method(
    "weight-averaging", paper="Wortsman et al., ICML 2022, eq. 1", equation="tau = mean_d tau_d", linear=True
)
def weight_averaging(vectors: Vectors) -> Kernel:
    """The mean of the vectors; needs nothing else. One pass over the files."""
    share_N = np.full(len(vectors.labels), 1 / len(vectors.labels), np.float32)
    return lambda block: share_N @ block.tau_NX
