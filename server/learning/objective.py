"""What a learned merge minimises: one loss on the pseudo-users of a step, and on those held back.

The held-back loss is a property of the coefficients alone: student items and pseudo-users are encoded by the
merge at these coefficients, whatever the loop's item embeddings are. To stay cheap, at most
`learning.holdout_users` pseudo-users of each domain rank `learning.holdout_items` of its items; the same ones
at every evaluation, in learning and in the search for the initial coefficient.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from server.learning.losses import Loss, Scores
from server.learning.merged import MergedModel
from server.learning.prepare import Inputs, PseudoDomain
from server.learning.teachers import encode, target_scores


class Objective:
    """`loss` on pseudo-users of `domains`, as a function of the merged model's coefficients."""

    def __init__(
        self, loss: Loss, inputs: Inputs, merged: MergedModel, domains: Sequence[PseudoDomain]
    ) -> None:
        self._loss, self._inputs, self._merged, self._domains = loss, inputs, merged, domains
        self.holds_back = any(domain.held for domain in domains)

    def of_step(self, step: int, items: Sequence[Tensor], batch: list[tuple[int, int]]) -> Tensor:
        """Mean loss over the batch: (domain, draw) pairs, embedded together, scored domain by domain.

        `items` are the student's item embeddings; the graph leads to the merged model's tensors.
        """
        batch = sorted(batch)
        rows = [self._domains[index].rows[draw] for index, draw in batch]
        ids = [self._ids(index, row) for (index, _), row in zip(batch, rows, strict=True)]
        input_ids_BT, mask_BT = self._inputs.encoder.batch(ids)
        users_BE = self._inputs.encoder.forward(input_ids_BT, mask_BT, params=self._merged.params)
        total = users_BE.new_zeros(())
        start = 0
        for index in range(len(self._domains)):
            stop = start + sum(domain == index for domain, _ in batch)
            if stop > start:
                s_BI = users_BE[start:stop] @ items[index].T
                generator = np.random.default_rng([self._inputs.seed, 2, step, index])
                total = total + self._losses(index, rows[start:stop], s_BI, None, generator).sum()
            start = stop
        return total / len(batch)

    @torch.no_grad()
    def held_back(self, values_GD: Tensor) -> float:
        """Mean loss of the held-back pseudo-users at these coefficients; every domain counts alike."""
        self._merged.set_coefficients(values_GD)
        encoder, params = self._inputs.encoder, self._merged.params
        means: list[float] = []
        for index, domain in enumerate(self._domains):
            if not domain.held:
                continue
            items_CE = encode(encoder, [domain.texts.items[i] for i in domain.sample_C.tolist()], params)
            users_BE = encode(encoder, [self._ids(index, row) for row in domain.held], params)
            generator = np.random.default_rng([self._inputs.seed, 6, index])
            loss_B = self._losses(index, domain.held, users_BE @ items_CE.T, domain.sample_C, generator)
            means.append(float(loss_B.double().mean()))
        return float(np.mean(means))

    def _ids(self, index: int, row: int) -> list[int]:
        domain = self._domains[index]
        return domain.texts.history(domain.histories[row])

    def _losses(
        self, index: int, rows: list[int], s_BI: Tensor, items: Tensor | None, generator: np.random.Generator
    ) -> Tensor:
        """[B]; `items` are the numbers of the items that the columns of `s_BI` stand for (None: all)."""
        domain = self._domains[index]
        seen_BI = domain.seen(rows, self._inputs.learning.mask_seen)
        if seen_BI is not None:
            seen_BI = seen_BI.to(s_BI.device)
            seen_BI = seen_BI if items is None else seen_BI[:, items]
        t_BI = (
            target_scores(domain.teachers, rows, items, seen_BI) if self._loss.teacher else s_BI.new_empty(0)
        )
        return self._loss.compute(Scores(s_BI, t_BI, seen_BI, generator), self._inputs.learning)
