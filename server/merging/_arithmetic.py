"""Sums of task vectors, fp32 on the CPU whatever dtype the vectors came in."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from common.vectors import TaskVector


def weighted_sum(taus: Sequence[TaskVector], weights: Sequence[float]) -> TaskVector:
    """`sum_d weights[d] * tau_d`, one tensor at a time; the vectors are not changed."""
    merged: TaskVector = {}
    for name, first in taus[0].items():
        total = first.to(torch.float32) * weights[0]
        for tau, weight in zip(taus[1:], weights[1:], strict=True):
            total.add_(tau[name].to(torch.float32), alpha=weight)
        merged[name] = total
    return merged
