"""WUDI-Merging: the change that interferes least, where each vector's rows stand for its layer's inputs.

Cheng et al., "Whoever Started the Interference Should End It: Guiding Data-Free Model Merging via Task
Vectors", ICML 2025, equation for a linear layer:

    minimise over tau   sum_d ||(tau - tau_d) tau_d^T||_F^2 / ||tau_d||_F^2.

The paper takes 300 steps of Adam from the sum of the vectors. The objective is quadratic, so it is solved
here, with `G_d = tau_d^T tau_d / ||tau_d||_F^2`: `tau sum_d G_d = sum_d tau_d G_d`. Where that has many
solutions, `ridge = 0` gives the one that gradient descent from the sum ends in: outside the rows of all tau_d
both are zero. Biases, norms and embedding tables: the mean, as public implementations do.

The exact minimum is not what the paper's few steps reach. Where N vectors of R rows just about fill the C
columns, it fits their noise: on four made-up 384 by 1536 matrices its norm was 4.7 times that of the sum. So
the default has a `ridge` of 1% of the mean eigenvalue: there 1.04 times, and the objective was 1/500 of what
it is at the sum.

The processed vectors are the terms `tau_d G_d (sum_d G_d)^-1` of the solution. A zero vector takes part with
nothing.
"""

from __future__ import annotations

import numpy as np

from server.merging import Block, Floats, Kernel, Vectors, merge_method
from server.merging._gram import Ridge, shares
from server.merging._vectors import Doubles


@merge_method(
    "wudi",
    paper="Cheng et al., ICML 2025, WUDI-Merging, solved in closed form",
    equation="tau = (sum_d tau_d G_d) (sum_d G_d)^-1 with G_d = tau_d^T tau_d / ||tau_d||^2",
    unit="matrix",
    splits=True,
)
def wudi(vectors: Vectors, *, ridge: Ridge = 0.01) -> Kernel:
    """The matrix that differs least from each vector's on the directions which that vector itself uses.

    Needs nothing else. Time: one solution of C equations a matrix of C columns, and 6 N matrix products;
    memory: one matrix of every vector, twice in float64, and three C by C matrices.
    """

    def kernel(block: Block) -> Floats:
        count = len(block.tau_NX)
        if not block.is_linear:
            return block.tau_NX / np.float32(count)
        tau_NRC = block.matrices()
        parts_NRC = shares((_own_gram(tau_RC) for tau_RC in tau_NRC), tau_NRC, ridge)
        return parts_NRC.astype(np.float32).reshape(count, -1)

    return kernel


def _own_gram(tau_RC: Floats) -> Doubles:
    """`tau^T tau / ||tau||_F^2`, [C, C] with trace 1; zeros for a zero matrix."""
    scaled_RC = tau_RC.astype(np.float64)
    norm = float(np.linalg.norm(scaled_RC))
    if norm > 0:
        scaled_RC /= norm
    gram_CC: Doubles = scaled_RC.T @ scaled_RC
    return gram_CC
