"""RegMean: each linear layer by least squares, so that its outputs stay those of every model on its inputs.

Jin et al., "Dataless Knowledge Fusion by Merging Weights of Language Models", ICLR 2023, equation 1 and
section 3.3: `W^T = (sum_d G_d)^-1 sum_d G_d W_d^T` with `G_d = X_d^T X_d`, whose entries off the diagonal are
multiplied by `alpha`. With `W_d = W_0 + tau_d` the base drops out, and the same holds of the task vectors.
Everything that is no linear layer: the mean.

Here the inputs are those of pseudo-users, not of training data, and each G_d is a mean over tokens: a domain
with a large catalog weighs as much as any other (the paper: as many examples of each). A small `ridge`
pulls towards the mean, so that inputs which are always zero do not matter.
"""

from __future__ import annotations

from typing import Annotated

import numpy as np

from server.merging import Block, Bounds, Floats, Grams, Kernel, Vectors, merge_method
from server.merging._gram import RIDGE, Ridge, shares
from server.merging._vectors import Doubles

Alpha = Annotated[float, Bounds(ge=0, le=1)]
ALPHA = 0.9


@merge_method(
    "regmean",
    paper="Jin et al., ICLR 2023, equation 1, on pseudo-users",
    equation="tau = (sum_d tau_d G_d) (sum_d G_d)^-1; G_d = alpha X_d^T X_d off the diagonal",
    unit="matrix",
    needs="grams",
)
def regmean(vectors: Vectors, grams: Grams, *, alpha: Alpha = ALPHA, ridge: Ridge = RIDGE) -> Kernel:
    """Least squares in every linear layer: outputs as each model's own, on what its own layer is given.

    Needs the catalogs: items of each are run through that domain's model. Time: one pass of each model over
    its items, with a C by C product a token and layer, and one solution of C equations a matrix of C
    columns. Memory: the N Gram matrices of one transformer layer.
    """

    def kernel(block: Block) -> Floats:
        gram_NCC = grams.get(block.name)
        if gram_NCC is None:
            return np.asarray(block.tau_NX.mean(0))
        return regression(gram_NCC, block.matrices(), alpha, ridge).reshape(-1)

    return kernel


def regression(gram_NCC: Doubles, tau_NRC: Floats, alpha: float, ridge: float) -> Floats:
    """The merged change [R, C] of one linear layer by RegMean's equation 1."""
    parts_NRC = shares((_shrunk(gram_CC, alpha) for gram_CC in gram_NCC), tau_NRC, ridge)
    return np.asarray(parts_NRC.sum(0), np.float32)


def _shrunk(gram_CC: Doubles, alpha: float) -> Doubles:
    """The Gram matrix with `alpha` times its entries off the diagonal."""
    result_CC = alpha * gram_CC
    result_CC.flat[:: len(gram_CC) + 1] = np.diag(gram_CC)
    return result_CC
