"""TIES: trim, elect signs, and average what agrees.

Yadav et al., "TIES-Merging", NeurIPS 2023, algorithm 1:
1. trim: of each vector keep the top `density` of `abs(tau_d)`, counted over the whole vector (not per
   tensor, as some tools do) and over its own tensors only (frozen tables are not in it). Entries that
   equal the threshold are all kept, so that nothing depends on an arbitrary choice among equals.
2. elect: at each position the sign of the sum of the survivors; a sum of zero elects nothing.
3. disjoint mean: the mean over the survivors that have the elected sign; times `lambda`.

As a process, each vector keeps its agreeing survivors divided by their number at that position, so that
the sum of the processed vectors, coefficients 1, is the TIES merge itself.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch

from common.vectors import TaskVector
from server.merging import Density, Weight, merge_method, vector_process


@merge_method(
    "ties",
    paper="Yadav et al., NeurIPS 2023, algorithm 1",
    equation="tau = lambda mean_{d: sign(trim(tau_d)) = sign(sum_d trim(tau_d))} trim(tau_d)",
)
def ties(taus: Sequence[TaskVector], *, density: Density = 0.2, lambda_: Weight = 1.0) -> TaskVector:
    """Trim, elect, disjoint mean, times `lambda`. Raises ConfigError, VectorError."""
    return {
        name: (agreeing_DX.sum(0) / count_X).mul_(lambda_)
        for name, agreeing_DX, count_X in _agreeing(taus, density)
    }


@vector_process("ties", initial=1.0)
def ties_process(taus: Sequence[TaskVector], *, density: Density = 0.2) -> list[TaskVector]:
    """The N vectors whose plain sum is `ties(taus, density=density)`. Raises ConfigError, VectorError."""
    processed: list[TaskVector] = [{} for _ in taus]
    for name, agreeing_DX, count_X in _agreeing(taus, density):
        for vector, share_X in zip(processed, agreeing_DX / count_X, strict=True):
            vector[name] = share_X.contiguous()
    return processed


def _agreeing(taus: Sequence[TaskVector], density: float) -> Iterator[tuple[str, torch.Tensor, torch.Tensor]]:
    """For each tensor: its survivors with the elected sign [D, ...] and their number (at least 1) [...]."""
    thresholds = [_threshold(tau, density) for tau in taus]
    for name in taus[0]:
        tau_DX = torch.stack([tau[name].to(torch.float32) for tau in taus])
        for row_X, threshold in zip(tau_DX, thresholds, strict=True):
            row_X.masked_fill_(row_X.abs() < threshold, 0.0)
        elected_X = tau_DX.sum(0, dtype=torch.float64).sign().to(torch.float32)  # any order, same sign
        agree_DX = (tau_DX * elected_X) > 0
        yield name, tau_DX * agree_DX, agree_DX.sum(0).clamp_(min=1)


def _threshold(tau: TaskVector, density: float) -> float:
    """The smallest magnitude among the `round(density * P)` largest (at least one) of the whole vector."""
    magnitude_P = torch.cat([tensor.to(torch.float32).abs().flatten() for tensor in tau.values()])
    total = magnitude_P.numel()
    keep = max(1, round(density * total))
    return float(torch.kthvalue(magnitude_P, total - keep + 1).values)
