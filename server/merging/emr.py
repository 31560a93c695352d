"""EMR: one unified vector, and for each domain a mask and a rescaler that bring its own vector back.

Huang et al., "EMR-Merging", NeurIPS 2024:
1. elect: `tau_uni = sign(sum_d tau_d) * max_{d: sign agrees} abs(tau_d)`; a sum of zero elects nothing;
2. mask: `M_d = [tau_d * tau_uni > 0]`;
3. rescale: `lambda_d = sum abs(tau_d) / sum abs(M_d * tau_uni)`, over the whole vector.

The paper's model for domain d is `theta_0 + lambda_d M_d tau_uni`: the option `domain = "d"`. It needs the
domain at inference: one merged model for each, or one bit for each parameter and domain beside the unified
vector. It is N models, not one. Without a domain `emr` is step 1 alone, `theta_0 + tau_uni`: one model that
does not know the domain. The paper does not propose it as a model: each entry is the largest of all, so it
overshoots. It is here to be compared.

The authors' code elects minus where the sum is zero and rescales by sums of each tensor's means; here the
sums run over the entries, as in the paper. A domain whose vector agrees nowhere gets zero.
"""

from __future__ import annotations

import numpy as np

from server.merging import Block, Floats, Kernel, Vectors, merge_method, unknown_name
from server.merging._elect import elected_sign


@merge_method(
    "emr",
    paper="Huang et al., NeurIPS 2024: the unified vector, or one domain's own model",
    equation="tau = sign(sum_d tau_d) max_{d: sign(tau_d) = sign(sum_d tau_d)} abs(tau_d); "
    "for domain d: lambda_d M_d tau, M_d = [tau_d tau > 0], lambda_d = sum abs(tau_d) / sum abs(M_d tau)",
)
def emr(vectors: Vectors, *, domain: str = "") -> Kernel:
    """Elect a sign at each position and take the largest magnitude that has it: the unified vector.

    The paper's method needs the domain at inference: `domain` names a model, and the result is that domain's
    own, masked and rescaled; merge once for each. Without it the shared part alone is one model, and
    overshoots. Needs nothing else. One pass over the files, two for a domain.
    """
    if not domain:
        return lambda block: unified(block.tau_NX)
    if domain not in vectors.labels:
        raise unknown_name("domain", domain, vectors.labels)
    own = list(vectors.labels).index(domain)
    scale = np.float32(_rescaler(vectors, own))

    def kernel(block: Block) -> Floats:
        values_X = _masked(block, own)
        values_X *= scale
        return values_X

    return kernel


def _rescaler(vectors: Vectors, own: int) -> float:
    """Step 3 for vector `own`; 0 where it agrees nowhere."""
    own_sum = masked_sum = 0.0
    for block in vectors.blocks():
        own_sum += float(np.abs(block.tau_NX[own]).sum(dtype=np.float64))
        masked_sum += float(np.abs(_masked(block, own)).sum(dtype=np.float64))
    return own_sum / masked_sum if masked_sum > 0 else 0.0


def unified(tau_NX: Floats) -> Floats:
    """Step 1 for one block: [X]."""
    elected_X = elected_sign(tau_NX)
    elected_X *= np.maximum((tau_NX * elected_X).max(0), 0)
    return elected_X


def _masked(block: Block, own: int) -> Floats:
    """Step 2 for one block of vector `own`: `M_d tau_uni` [X]."""
    unified_X = unified(block.tau_NX)
    unified_X *= np.sign(block.tau_NX[own]) == np.sign(unified_X)
    return unified_X
