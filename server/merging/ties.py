"""TIES: trim, elect signs, and average what agrees.

Yadav et al., "TIES-Merging", NeurIPS 2023, algorithm 1:
1. trim: of each vector keep the top `density` of `abs(tau_d)`, counted over the whole vector (mergekit:
   per tensor) and over its own tensors only (frozen tables are not in it). Entries that equal the
   threshold are all kept, so that nothing depends on an arbitrary choice among equals.
2. elect: at each position the sign of the sum of the survivors; a sum of zero elects nothing.
3. disjoint mean: the mean over the survivors that have the elected sign; times `lambda`.

Other tools: mergekit and peft cut `density` times the size off to a whole number where we round, and elect
plus where the sum is zero, so of +1 and -1 they keep +1.

The processed vectors are each vector's agreeing survivors divided by their number at that position.
"""

from __future__ import annotations

import numpy as np

from server.merging import Block, Density, Floats, Kernel, Vectors, Weight, merge_method
from server.merging._elect import agreeing_mean
from server.merging._select import largest


@merge_method(
    "ties",
    paper="Yadav et al., NeurIPS 2023, algorithm 1",
    equation="tau = lambda mean_{d: sign(trim(tau_d)) = sign(sum_d trim(tau_d))} trim(tau_d)",
    splits=True,
)
def ties(vectors: Vectors, *, density: Density = 0.2, lambda_: Weight = 1.0) -> Kernel:
    """Keep the largest entries of each vector, elect a sign at each position, average what agrees.

    Needs nothing else. Two passes over the files, after a sample: the first finds each vector's threshold,
    and holds about a percent of each vector, or a few where it is small.
    """
    threshold_N = largest(vectors, density)

    def kernel(block: Block) -> Floats:
        tau_NX = block.tau_NX
        for tau_X, threshold in zip(tau_NX, threshold_N, strict=True):
            tau_X *= np.abs(tau_X) >= threshold
        return agreeing_mean(tau_NX, lambda_)

    return kernel
