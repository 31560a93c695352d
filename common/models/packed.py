"""Encoding histories of different lengths side by side, without computing anything for padding.

The tokens of a batch become one row, `[1, X]`, and all that works token by token (projections, norms, the
feed-forward layers) runs on it. Attention alone needs histories apart: queries, keys and values are spread
over a padded batch `[B, T]` and the results are gathered again. On the CPU attention up to `PLAIN_TOKENS` is
spelt out, because torch's fused one takes a third of a whole training step in bfloat16, most of it in its
backward pass; longer ones are fused.

A model that was loaded with `attn_implementation=NAME` runs on `Packing` alone: it sees no mask. The results
are those of the padded batch but for rounding. The row ends with tokens that stand for nothing, up to a
multiple of `MULTIPLE`: products of bfloat16 matrices of odd sizes take a fifth longer.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, PretrainedConfig

NAME = "isthmus-packed"
PLAIN_TOKENS = 256
MULTIPLE = 16
_OFFSET = {
    "bert": False,
    "roberta": True,
    "xlm-roberta": True,
}  # positions count from behind the padding's id


def can_pack(config: PretrainedConfig, device: str) -> bool:
    """Whether models of this kind run packed: absolute positions, and a device on which it was measured."""
    return config.model_type in _OFFSET and device == "cpu"


class Packing:
    """Which token of a padded batch is where in the row. `mask_BT` has ones, then zeros, in every row."""

    def __init__(self, mask_BT: Tensor) -> None:
        self.mask_BT = mask_BT.bool()
        mask = self.mask_BT.reshape(-1)
        cells = mask.nonzero().squeeze(-1)
        self.tokens = len(cells)
        # of each token, its flat place in [B, T]; of those that stand for nothing, any
        self.cells_X = nn.functional.pad(cells, (0, -self.tokens % MULTIPLE))
        rows = mask.cumsum(0) - 1
        self.rows = rows.clamp(min=0)  # of each place in [B, T] its token; of padding any
        self.rows_or_none = torch.where(mask, rows, len(self.cells_X))
        hidden_BT = torch.zeros(mask_BT.shape, device=mask_BT.device)
        hidden_BT.masked_fill_(~self.mask_BT, torch.finfo(torch.float32).min)
        self.added_B11T = hidden_BT[:, None, None, :]

    def inputs(self, input_ids_BT: Tensor, config: PretrainedConfig) -> dict[str, Any]:
        """What the model takes in the place of ids and mask."""
        positions_X = self.cells_X % input_ids_BT.shape[1]
        if _OFFSET[config.model_type]:
            positions_X = positions_X + int(config.pad_token_id) + 1
        ids_X = input_ids_BT.reshape(-1).index_select(0, self.cells_X)
        return {"input_ids": ids_X[None], "position_ids": positions_X[None], "packing": self}

    def pad(self, values_XE: Tensor) -> Tensor:
        """Values of tokens [X, E] as [B, T, E]; what stands at padding is arbitrary and gets no gradient."""
        padded: Tensor = _Pad.apply(values_XE, self)  # type: ignore[no-untyped-call]
        return padded.view(*self.mask_BT.shape, -1)

    def gather(self, values_BTE: Tensor) -> Tensor:
        """Values of a padded batch as those of its tokens [X, E]."""
        gathered: Tensor = _Gather.apply(values_BTE.flatten(0, 1), self)  # type: ignore[no-untyped-call]
        return gathered


class _Pad(torch.autograd.Function):
    """Both directions are one `index_select`: the backward pass that autograd has for it is far slower."""

    @staticmethod
    def forward(ctx: Any, values_XE: Tensor, packing: Packing) -> Tensor:
        ctx.packing = packing
        return values_XE.index_select(0, packing.rows)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        grad_XE = grads[0].index_select(0, ctx.packing.cells_X)
        grad_XE[ctx.packing.tokens :] = 0
        return grad_XE, None


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, values_RE: Tensor, packing: Packing) -> Tensor:
        ctx.packing = packing
        return values_RE.index_select(0, packing.cells_X)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        none_1E = grads[0].new_zeros(1, grads[0].shape[1])
        return torch.cat([grads[0], none_1E]).index_select(0, ctx.packing.rows_or_none), None


def _attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    packing: Packing,
    scaling: float | None = None,
    dropout: float = 0.0,
    **_: Any,
) -> tuple[Tensor, None]:
    """Attention within each history; queries, keys and values are [1, heads, X, E / heads]."""
    heads, width = query.shape[1], query.shape[3]
    scaling = width**-0.5 if scaling is None else scaling

    def spread(values: Tensor) -> Tensor:
        padded_BTE = packing.pad(values.transpose(1, 2).reshape(-1, heads * width))
        return padded_BTE.view(*padded_BTE.shape[:2], heads, width).transpose(1, 2)

    q, k, v = spread(query), spread(key), spread(value)  # [B, heads, T, E / heads]
    if packing.mask_BT.shape[1] > PLAIN_TOKENS:
        seen_B11T = packing.mask_BT[:, None, None, :]
        mixed = nn.functional.scaled_dot_product_attention(q, k, v, seen_B11T, dropout, scale=scaling)
    else:
        share = torch.softmax(torch.matmul(q, k.transpose(2, 3)) * scaling + packing.added_B11T, dim=-1)
        mixed = torch.matmul(nn.functional.dropout(share, p=dropout, training=module.training), v)
    gathered_XE = packing.gather(mixed.transpose(1, 2).flatten(2))
    return gathered_XE.view(1, -1, heads, width), None


AttentionInterface.register(NAME, _attention)
