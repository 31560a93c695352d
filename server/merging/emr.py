"""EMR: one unified vector, and for each domain a mask and a rescaler that bring its own vector back.

Huang et al., "EMR-Merging", NeurIPS 2024:
1. elect: `tau_uni = sign(sum_d tau_d) * max_{d: sign agrees} abs(tau_d)`; a sum of zero elects nothing;
2. mask: `M_d = [tau_d * tau_uni > 0]`;
3. rescale: `lambda_d = sum abs(tau_d) / sum abs(M_d * tau_uni)`, over the whole vector.

The paper's model for domain d is `theta_0 + lambda_d M_d tau_uni`: `emr_for_domain`. It needs the domain at
inference, and one bit for each parameter and domain beside the unified vector: it is N models, not one.
The method `emr` is step 1 alone, `theta_0 + tau_uni`: one model that does not know the domain. The paper does
not propose it as a model: each entry is the largest of all, so it overshoots. It is here to be compared.

The authors' code elects minus where the sum is zero and rescales by sums of each tensor's means; here the
sums run over the entries, as in the paper. A domain whose vector agrees nowhere gets zero.
"""

from __future__ import annotations

import numpy as np

from server.merging import Block, Floats, Kernel, Vectors, merge_method, unknown_name
from server.merging._elect import elected_sign


@merge_method(
    "emr",
    paper="Huang et al., NeurIPS 2024: the unified vector",
    equation="tau = sign(sum_d tau_d) max_{d: sign(tau_d) = sign(sum_d tau_d)} abs(tau_d)",
)
def emr(vectors: Vectors) -> Kernel:
    """Elect a sign at each position and take the largest magnitude that has it: the unified vector alone.

    The paper's method needs the domain at inference (a mask and a scale for each): `emr_for_domain`. This is
    its shared part, used as one model. Needs nothing else. One pass over the files.
    """
    return lambda block: unified(block.tau_NX)


def emr_for_domain(vectors: Vectors, label: str) -> dict[str, Floats]:
    """The vector of the model for domain `label`: `lambda_d M_d tau_uni`, float32, tensor by tensor.

    One pass over all vectors; memory is the result. Raises ConfigError for an unknown label, VectorError as
    the source does.
    """
    if label not in vectors.labels:
        raise unknown_name("domain", label, vectors.labels)
    own = list(vectors.labels).index(label)
    result = {tensor: np.empty(shape, np.float32) for tensor, shape in vectors.shapes.items()}
    own_sum = masked_sum = 0.0
    for block in vectors.blocks():
        values_X = _masked(block, own)
        own_sum += float(np.abs(block.tau_NX[own]).sum(dtype=np.float64))
        masked_sum += float(np.abs(values_X).sum(dtype=np.float64))
        result[block.name].reshape(-1)[block.start : block.stop] = values_X
    rescaler = own_sum / masked_sum if masked_sum > 0 else 0.0
    for values in result.values():
        values *= np.float32(rescaler)
    return result


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
