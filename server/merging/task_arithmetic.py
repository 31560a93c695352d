"""Task Arithmetic: the scaled sum of the task vectors.

Ilharco et al., "Editing models with task arithmetic", ICLR 2023: `theta = theta_0 + lambda sum_d tau_d`.
"""

from __future__ import annotations

import numpy as np

from server.merging import Kernel, Vectors, Weight, merge_method


@merge_method(
    "task-arithmetic", paper="Ilharco et al., ICLR 2023", equation="tau = lambda sum_d tau_d", linear=True
)
def task_arithmetic(vectors: Vectors, *, lambda_: Weight = 0.3) -> Kernel:
    """`lambda` times the sum of the vectors; needs nothing else. One pass over the files."""
    weight_N = np.full(len(vectors.labels), lambda_, np.float32)
    return lambda block: weight_N @ block.tau_NX
