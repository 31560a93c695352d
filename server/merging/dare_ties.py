"""DARE-TIES: drop most entries of each vector by chance, rescale the rest, elect signs, average what agrees.

Yu et al., "Language Models are Super Mario", ICML 2024, steps 1 and 2 (see `dare`), then steps 2 and 3 of
TIES (Yadav et al., NeurIPS 2023). Nothing is trimmed by size: dropping takes the place of trimming, as in
mergekit and peft.

Other tools: mergekit rescales by the L1 norm of each tensor, and its `dare_ties` adds what agrees instead of
averaging it unless `normalize` is set. peft rescales and averages as here. Both elect plus where the sum is
zero, so of +1 and -1 they keep +1; here a sum of zero elects nothing.
"""

from __future__ import annotations

from server.merging import Block, Floats, Kernel, Probability, Vectors, Weight, merge_method
from server.merging._drop import Seed, dropper
from server.merging._elect import agreeing_mean


@merge_method(
    "dare-ties",
    paper="Yu et al., ICML 2024, with the sign election of TIES",
    equation="tau = lambda mean_{d: sign(v_d) = sign(sum_d v_d)} v_d, v_d = (1 - m_d) tau_d / (1 - p)",
    splits=True,
)
def dare_ties(vectors: Vectors, *, p: Probability = 0.9, lambda_: Weight = 1.0, seed: Seed = 0) -> Kernel:
    """Drop each entry with probability `p`, rescale the survivors, elect signs, average what agrees.

    Needs nothing else. One pass over the files and one random number for each entry.
    """
    drop = dropper(p, seed)

    def kernel(block: Block) -> Floats:
        drop(block)
        return agreeing_mean(block.tau_NX, lambda_ / (1 - p))  # one scale for all: it elects nothing else

    return kernel
