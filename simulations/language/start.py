"""Where a small language model begins: not at random numbers, because it sees few steps.

`co_occurrence` factorises how often tokens share a theme of a catalog (positive pointwise mutual information,
as in Levy and Goldberg 2014), so that words that go together begin with similar embeddings. `near_identity`
begins attention where a token looks for similar tokens and hands on what it finds (in the manner of
Trockman and Kolter 2023, "Mimetic initialization of self-attention layers"). `induction` sets one head of
each of the first two layers so that together they go on as a sequence went on before (the circuit of Olsson
et al. 2022, "In-context learning and induction heads"), which naming a candidate needs and millions of
tokens would be spent on to find. The model is a plain Llama or Qwen2 all the same.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

_LOOK, _HAND_ON = 0.5, 0.3
ROPE_THETA = 1e6  # Qwen2's: half of a head's rotations are slow enough to compare content over a prompt
_CONSTANT = 0.3  # of a unit embedding, in its last place, for the head that looks one token back
_BACK, _KEEP, _MATCH = 6.0, 0.15, 2.5


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
    turn_KK = torch.linalg.qr(torch.randn(dimensions, dimensions)).Q
    embedding_VK @= turn_KK  # so that no place is more telling than another
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


@torch.no_grad()
def induction(model: Any) -> None:
    """Set the first head of the first two layers, in place; for a model of two layers and heads or more.

    Layer 1 looks one token back and keeps the first `h` (the size of a head) places of what it finds in the
    next `h`. Layer 2 looks for a token that is kept there like the one that it is at, and hands on what
    stands there, which is what came after. All embeddings get one constant place for the first look.
    """
    config, (first, second) = model.config, (layer.self_attn for layer in model.model.layers[:2])
    size = config.hidden_size // config.num_attention_heads
    pairs, here = size // 2, torch.eye(size, config.hidden_size)
    model.get_input_embeddings().weight[:, -1] = _CONSTANT
    angle_P = config.rope_parameters["rope_theta"] ** (-torch.arange(pairs) / pairs)
    for projection, turn in ((first.q_proj, 0.0), (first.k_proj, 1.0)):
        projection.weight[:size] = 0
        projection.weight[:size, -1] = torch.cat([(turn * angle_P).cos(), (turn * angle_P).sin()])
        projection.weight[:size, -1] *= _BACK / (_CONSTANT * config.hidden_size**0.5)
    slow = torch.cat([torch.arange(pairs // 2, pairs), torch.arange(pairs + pairs // 2, size)])
    for projection, place in ((second.q_proj, 0), (second.k_proj, size)):
        projection.weight[:size] = 0
        projection.weight[slow, place + torch.arange(len(slow))] = _MATCH
    for attention in (first, second):
        attention.v_proj.weight[:size] = here
    first.o_proj.weight[size : 2 * size] = 0  # nothing else writes there
    first.o_proj.weight[:, :size] = _KEEP * here.roll(size, dims=1).T
    second.o_proj.weight[:, :size] = _HAND_ON * here.T
