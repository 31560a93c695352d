"""The training objective: softmax over cosine / temperature (MergeRec sec. 2.2).

Its negatives are the other items of the batch, or, where users must not see each other's (`clients.training.
private`), items of the public catalog.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from common.models.encoder import Encoder


def in_batch_loss(
    z_BE: Tensor,
    item_UE: Tensor,
    target_B: Tensor,
    blocked_BU: Tensor,
    temperature: float,
    log_q_U: Tensor | None = None,
) -> Tensor:
    """Mean over the batch of `-log softmax_u(z . e_u / temperature)[target]`.

    `item_UE` are the U distinct candidates of the batch, `target_B` each row's own among them;
    candidates where `blocked_BU` is True are left out of that row's softmax. Embeddings are unit-norm.
    `log_q_U`, the logarithm of the probability that a candidate is in a batch, is subtracted from its logits
    (Yi et al., "Sampling-bias-corrected neural modeling", RecSys 2019): without it popular items are
    negatives more often than others, and the scores learn to hold their popularity against them.
    """
    logits_BU = z_BE @ item_UE.T / temperature
    if log_q_U is not None:
        logits_BU = logits_BU - log_q_U
    return nn.functional.cross_entropy(logits_BU.masked_fill(blocked_BU, -torch.inf), target_B)


def own_candidates_loss(z_UE: Tensor, item_UIE: Tensor, blocked_UI: Tensor, temperature: float) -> Tensor:
    """For each user `-log softmax_i(z . e_i / temperature)[0]` over candidates of its own (U).

    The first candidate is the target; those where `blocked_UI` is True are left out. Embeddings: unit norm.
    """
    logits_UI = torch.einsum("ue,uie->ui", z_UE, item_UIE) / temperature
    first_U = torch.zeros(len(z_UE), dtype=torch.int64, device=z_UE.device)
    return nn.functional.cross_entropy(
        logits_UI.masked_fill(blocked_UI, -torch.inf), first_U, reduction="none"
    )


class TwoTower(nn.Module):
    """An encoder with its loss, in the shape that `transformers.Trainer` trains: batch in, loss out.

    Both towers are the same encoder. Only `trainable` parameters get gradients; the embedding tables do not.
    """

    def __init__(self, encoder: Encoder, trainable: set[str], temperature: float) -> None:
        super().__init__()
        self.backbone = encoder.model
        self.encoder = encoder
        self._temperature = temperature
        self._trainable = sorted(trainable)
        for name, parameter in self.backbone.named_parameters():
            parameter.requires_grad_(name in trainable)

    def forward(
        self,
        history_ids_BT: Tensor,
        history_mask_BT: Tensor,
        item_ids_UT: Tensor,
        item_mask_UT: Tensor,
        target_B: Tensor,
        blocked_BU: Tensor,
        log_q_U: Tensor | None = None,
    ) -> dict[str, Tensor]:
        """`{"loss": scalar}` for a batch of `dataset.TrainingBatches`."""
        z_BE = self.encoder.forward(history_ids_BT, history_mask_BT)
        item_UE = self.encoder.forward(item_ids_UT, item_mask_UT)
        loss = in_batch_loss(z_BE, item_UE, target_B, blocked_BU, self._temperature, log_q_U)
        return {"loss": loss}

    def embed(self, ids_NT: Tensor, mask_NT: Tensor) -> Tensor:
        """Unit-norm embeddings `z_NE`."""
        return self.encoder.forward(ids_NT, mask_NT)

    def own_losses(self, z_UE: Tensor, target_UE: Tensor, negative_UIE: Tensor, blocked_UI: Tensor) -> Tensor:
        """Each user's own loss (U), by embeddings that nobody else's loss goes through."""
        candidate_UIE = torch.cat([target_UE[:, None], negative_UIE], dim=1)
        return own_candidates_loss(z_UE, candidate_UIE, blocked_UI, self._temperature)

    def trained_tensors(self) -> dict[str, Tensor]:
        """The trainable parameters, by their names in the model's file (not copied)."""
        parameters = dict(self.backbone.named_parameters())
        return {name: parameters[name].detach() for name in self._trainable}

    def load_trained(self, tensors: dict[str, Tensor]) -> None:
        """Put `trained_tensors` of an earlier moment back in place."""
        parameters = dict(self.backbone.named_parameters())
        with torch.no_grad():
            for name in self._trainable:
                parameters[name].copy_(tensors[name])
