"""DARE: drop most entries of each vector by chance, rescale the rest, add the vectors up.

Yu et al., "Language Models are Super Mario", ICML 2024:
1. drop: `m_d ~ Bernoulli(p)` entry by entry, `(1 - m_d) tau_d`;
2. rescale the survivors by `1 / (1 - p)`, so that the expectation is `tau_d`;
3. merge by any rule: here the sum of Task Arithmetic; `dare-ties` elects signs.

Each vector has its own mask, drawn from `seed` and the vector's label; two merges with one seed are the same
to the bit.

Other tools call `1 - p` the density and draw from one global generator, so their masks depend on the order of
the models. mergekit (`dare_linear`) rescales so that the L1 norm of each tensor stays what it was, not by
`1 / (1 - p)`; peft rescales as here.
"""

from __future__ import annotations

import numpy as np

from server.merging import Block, Floats, Kernel, Probability, Vectors, Weight, merge_method
from server.merging._drop import Seed, dropper


@merge_method(
    "dare",
    paper="Yu et al., ICML 2024, with Task Arithmetic",
    equation="tau = lambda sum_d (1 - m_d) tau_d / (1 - p), m_d ~ Bernoulli(p)",
    splits=True,
    linear=True,
)
def dare(vectors: Vectors, *, p: Probability = 0.9, lambda_: Weight = 0.3, seed: Seed = 0) -> Kernel:
    """Drop each entry with probability `p`, rescale the survivors, add the vectors up.

    Needs nothing else. One pass over the files and one random number for each entry.
    """
    drop = dropper(p, seed)

    def kernel(block: Block) -> Floats:
        drop(block)
        tau_NX = block.tau_NX
        tau_NX *= np.float32(lambda_ / (1 - p))
        return tau_NX

    return kernel
