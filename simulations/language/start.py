"""Where a small language model begins: not at random numbers, because it sees few steps.

`co_occurrence` factorises how often tokens share a theme of a catalog (positive pointwise mutual information,
as in Levy and Goldberg 2014), so that words that go together begin with similar embeddings. `near_identity`
begins attention where a token looks for similar tokens and hands on what it finds (in the manner of
Trockman and Kolter 2023, "Mimetic initialization of self-attention layers"). The model is a plain Llama or
Qwen2 all the same.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

_LOOK, _HAND_ON = 0.5, 0.3


def co_occurrence(groups: Iterable[Sequence[Sequence[int]]], vocabulary: int, dimensions: int) -> Tensor:
    """Unit embeddings [vocabulary, dimensions] from groups of titles, each title a list of token ids.

    Two tokens count together once for each group in which both occur, the less the larger the group. Tokens
    of no group get a random one.
    """
    counts = np.zeros((vocabulary, vocabulary), dtype=np.float32)
    for titles in groups:
        found = np.unique([token for title in titles for token in title])
        counts[np.ix_(found, found)] += 1 / len(found)
    count_VV = torch.from_numpy(counts)
    token_V = count_VV.sum(dim=1).clamp(min=1e-9)
    count_VV.mul_(token_V.sum()).div_(token_V[:, None]).div_(token_V[None, :])
    count_VV.log_().clamp_(min=0)
    left_VK, size_K, _ = torch.svd_lowrank(count_VV, q=dimensions, niter=2)
    embedding_VK = left_VK * size_K.sqrt()
    embedding_VK += 0.05 * embedding_VK.norm(dim=1).mean() / dimensions**0.5 * torch.randn_like(embedding_VK)
    return torch.nn.functional.normalize(embedding_VK, dim=1)


@torch.no_grad()
def near_identity(model: Any) -> None:
    """Add identity matrices to the projections of attention, in place."""
    for layer in model.model.layers:
        attention = layer.self_attn
        for projection, amount in (
            (attention.q_proj, _LOOK),
            (attention.k_proj, _LOOK),
            (attention.v_proj, 1.0),
            (attention.o_proj, _HAND_ON),
        ):
            projection.weight += amount * torch.eye(*projection.weight.shape)
