"""RegMean++: RegMean, where each layer's inputs come out of the layers that are merged already.

Nguyen et al., "RegMean++: Enhancing Effectiveness and Generalization of Regression Mean for Model Merging",
2025: the same least squares as RegMean, but the inputs of layer l are what the merged layers before it make
of domain d's examples, since that is what the merged layer l will be given. Inside a layer (attention, then
the feed-forward part) the inputs are those in domain d's own layer. Layers are taken front to back.
Everything that is no linear layer: the mean, before the next layer is run.

Here the examples are pseudo-users; the rest as `regmean`.
"""

from __future__ import annotations

import numpy as np

from server.merging import Block, Floats, Grams, Kernel, Vectors, merge_method
from server.merging._gram import RIDGE, Ridge
from server.merging._vectors import Doubles
from server.merging.regmean import ALPHA, Alpha, regression


@merge_method(
    "regmean-plus-plus",
    paper="Nguyen et al., 2025, RegMean++, on pseudo-users",
    equation="tau = (sum_d tau_d G_d) (sum_d G_d)^-1; X_d = inputs from the merged layers before",
    unit="matrix",
    needs="grams",
)
def regmean_plus_plus(
    vectors: Vectors, grams: Grams, *, alpha: Alpha = ALPHA, ridge: Ridge = RIDGE
) -> Kernel:
    """Least squares in every linear layer, front to back, on what the merged layers before it give.

    Needs the catalogs: items of each are run through the merged model as it grows, and through that domain's
    layers. Time: two passes of the items of every domain, with a C by C product a token and layer, and one
    solution of C equations a matrix of C columns. Memory: the N Gram matrices of one transformer layer, and
    the merged vector.
    """

    def solve(gram_NCC: Doubles, tau_NRC: Floats) -> Floats:
        return regression(gram_NCC, tau_NRC, alpha, ridge)

    merged = grams.merge_in_order(solve)

    def kernel(block: Block) -> Floats:
        tau_RC = merged.get(block.name)
        return np.asarray(block.tau_NX.mean(0)) if tau_RC is None else tau_RC.reshape(-1)

    return kernel
