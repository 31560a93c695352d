"""A baseline for benchmarks: the optimisation loop of MergeRec's reference implementation, re-created.

This is our own code, written from a description of what that loop computes and in which order; nothing of
Isthmus uses it. What costs time in the reference is kept:

1. The model's parameters, frozen embedding tables too, are one flat vector `[P]`, the task vectors one dense
   matrix `[D, P]` in float32.
2. Each step rebuilds all parameters from all D vectors while autograd records: domain-wise as the sum of a
   `[D, P]` matrix of products, layer-wise tensor by tensor, each written to its slice of a flat vector.
3. The model's tensors are Python slices of the merged flat vector. The backward pass of each slice makes a
   vector of P zeros, fills in its part, and adds it to the sum.
4. The loss is a Python loop over the samples, each with its row of a matrix of teacher scores.
5. One Adam step on the coefficients.

`mended=True` is the same loop with its costly line mended: one `torch.split` cuts the flat vector, whose
backward pass is one concatenation. Layer-wise the writing to slices, which costs the same again, becomes
one concatenation too; so this is a harder baseline than the one line alone.

Two things differ from the reference so that losses can be compared: dropout is off, and pooling minds the
mask.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from benchmarks.learned_task import ALPHA, TEMPERATURE, Batch
from common.models.encoder import Encoder


class ReferenceLoop:
    """`step(batch)` is one optimisation step; `coefficients_GD` what it learns, one row a group.

    base: every parameter of the model by name. vectors: D task vectors; a tensor that one lacks counts as
    zeros. groups: group label -> names of its tensors; names in no group belong to the last one.
    Memory: (D + 1) times the model, and in a domain-wise step D times the model again.
    """

    def __init__(
        self,
        encoder: Encoder,
        base: Mapping[str, Tensor],
        vectors: Sequence[Mapping[str, Tensor]],
        groups: Mapping[str, Sequence[str]],
        *,
        initial: float = 0.2,
        mended: bool = False,
    ) -> None:
        device = encoder.device
        self.encoder = encoder
        self.mended = mended
        self.shapes = {name: base[name].shape for name in sorted(base)}
        self.sizes = [shape.numel() for shape in self.shapes.values()]
        self.base_P = torch.cat([base[name].reshape(-1) for name in self.shapes])
        self.tau_DP = torch.zeros(len(vectors), sum(self.sizes), device=device)
        for tau_P, vector in zip(self.tau_DP, vectors, strict=True):
            for name, part_P in zip(self.shapes, tau_P.split(self.sizes), strict=True):
                if name in vector:
                    part_P.copy_(vector[name].reshape(-1))
        place = {name: index for index, names in enumerate(groups.values()) for name in names}
        self.group_of = [place.get(name, len(groups) - 1) for name in self.shapes]
        self.coefficients_GD = nn.Parameter(torch.full((len(groups), len(vectors)), initial, device=device))
        self.adam = torch.optim.Adam([self.coefficients_GD], lr=1e-3, weight_decay=0.0)

    def step(self, batch: Batch) -> float:
        """One step; returns the loss before it."""
        self.adam.zero_grad()
        loss = self.loss(batch)
        loss.backward()  # type: ignore[no-untyped-call]
        self.adam.step()
        return float(loss.detach())

    def loss(self, batch: Batch) -> Tensor:
        """The mean over a Python loop of samples."""
        users_BE = self.encoder.forward(batch.input_ids_BT, batch.mask_BT, params=self.tensors())
        losses = []
        for user_E, domain, teacher_I in zip(users_BE, batch.domain_B, batch.teacher_scores, strict=True):
            student_I = user_E @ batch.student_items[domain].T
            losses.append(_sample_loss(student_I[None], teacher_I[None]))
        return torch.stack(losses).mean()

    def tensors(self) -> dict[str, Tensor]:
        """The merged model's tensors by name, cut from the merged flat vector."""
        merged_P = self._merge_by_layer() if len(self.coefficients_GD) > 1 else self._merge_whole()
        if self.mended:
            parts = torch.split(merged_P, self.sizes)
            return {
                name: part.view(shape) for (name, shape), part in zip(self.shapes.items(), parts, strict=True)
            }
        tensors, start = {}, 0
        for name, shape in self.shapes.items():
            tensors[name] = merged_P[start : start + shape.numel()].view(shape)
            start += shape.numel()
        return tensors

    def _merge_whole(self) -> Tensor:
        weighted_DP = self.coefficients_GD[0][:, None] * self.tau_DP
        return self.base_P + weighted_DP.sum(dim=0)

    def _merge_by_layer(self) -> Tensor:
        parts, start = [], 0
        merged_P = torch.zeros_like(self.base_P)
        for size, group in zip(self.sizes, self.group_of, strict=True):
            stop = start + size
            weighted_DP = self.coefficients_GD[group][:, None] * self.tau_DP[:, start:stop]
            part_P = self.base_P[start:stop] + weighted_DP.sum(dim=0)
            if self.mended:
                parts.append(part_P)
            else:
                merged_P[start:stop] = part_P
            start = stop
        return torch.cat(parts) if self.mended else merged_P


def _sample_loss(student_1I: Tensor, teacher_1I: Tensor) -> Tensor:
    """Cross-entropy with the teacher's best item, plus the distillation term."""
    label_1 = teacher_1I.argmax(dim=-1)
    recommendation = nn.functional.cross_entropy(student_1I, label_1)
    distillation = nn.functional.kl_div(
        nn.functional.log_softmax(student_1I / TEMPERATURE, dim=-1),
        nn.functional.softmax(teacher_1I / TEMPERATURE, dim=-1),
        reduction="batchmean",
    )
    return recommendation + ALPHA * TEMPERATURE**2 * distillation
