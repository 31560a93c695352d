"""The step of `server.learning` as a contender of benchmarks, and the floor that it cannot go below."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

from benchmarks.learned_task import ALPHA, TEMPERATURE, Batch, Model
from common.coefficients import Granularity, group_tensors
from server.learning.losses import mergerec
from server.learning.merged import MergedModel

INITIAL = 0.2
LEARNING_RATE = 1e-3


class OurStep:
    """The engine's step: what `server.learning` does with one batch of pseudo-users."""

    def __init__(
        self,
        model: Model,
        taus: Sequence[dict[str, Tensor]],
        granularity: Granularity,
        kept: Literal["fp32", "bf16"] = "fp32",
    ) -> None:
        groups = group_tensors(model.trainable, granularity)
        self.encoder = model.encoder
        self.merged = MergedModel(model.base, taus, groups, model.encoder.device, kept)
        self.values_GD = torch.full((len(groups), len(taus)), INITIAL, requires_grad=True)
        self.adam = torch.optim.Adam([self.values_GD], lr=LEARNING_RATE)

    def gradient(self, batch: Batch) -> tuple[float, Tensor]:
        """Loss and coefficient gradients [G, D] at the present coefficients."""
        self.merged.set_coefficients(self.values_GD)
        loss = batch_loss(self.encoder.forward(batch.input_ids_BT, batch.mask_BT, self.merged.params), batch)
        return float(loss.detach()), self.merged.gradient(loss)

    def step(self, batch: Batch) -> float:
        """One step; returns the loss before it."""
        loss, self.values_GD.grad = self.gradient(batch)
        self.adam.step()
        return loss


class BareStep:
    """The same forward and backward pass of the base model alone, and nothing else."""

    def __init__(self, model: Model) -> None:
        self.encoder = model.encoder
        self.params = {name: model.base[name].clone().requires_grad_() for name in model.trainable}

    def step(self, batch: Batch) -> float:
        """Loss and its gradients of every tensor that a vector holds."""
        users_BE = self.encoder.forward(batch.input_ids_BT, batch.mask_BT, self.params)
        loss = batch_loss(users_BE, batch)
        torch.autograd.grad(loss, list(self.params.values()), allow_unused=True)
        return float(loss.detach())


def batch_loss(users_BE: Tensor, batch: Batch) -> Tensor:
    """The mean MergeRec loss, scored domain by domain; teacher scores are made when they are needed."""
    total = users_BE.new_zeros(())
    for domain, rows in batch.slices():
        s_BI = users_BE[rows] @ batch.student_items[domain].T
        t_BI = batch.teacher_users_BE[rows] @ batch.teacher_items[domain].T
        total = total + mergerec(s_BI, t_BI, temperature=TEMPERATURE, alpha=ALPHA).sum()
    return total / len(batch.domain_B)


def read_once(flats: Sequence[Tensor]) -> None:
    """Read every value of the vectors once, as fast as a reduction does."""
    for flat_P in flats:
        flat_P.view(torch.int32).amax()
