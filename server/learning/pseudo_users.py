"""Pseudo-users: histories that nobody had, made from the public catalogs and the domains' teachers.

Every item of every catalog is a pseudo-user with that one item as its history. With `history_length`
n > 1 each history has a length drawn from 1..n and is rolled out by the domain's teacher: it scores all
items of the domain, the items of the history are masked, and the next item is drawn from the softmax of
the best k at a temperature. No user data is involved anywhere.

Which pseudo-users are drawn in which step is fixed by the seed before learning begins, so a restarted
server draws the same ones.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from common.config import LearningSection
from common.errors import DataError
from common.models.encoder import Encoder
from server.learning.teachers import DomainTexts, encode

History = tuple[int, ...]  # item indices, most recent first

SCORE_ROWS = 256


@dataclass(frozen=True)
class Draws:
    """N draws in order: the domain's index, the first item, and the history's length, each [N]."""

    domain_N: NDArray[np.int64]
    item_N: NDArray[np.int64]
    length_N: NDArray[np.int64]


def draw(sizes: Mapping[str, int], count: int, learning: LearningSection, seed: int) -> Draws:
    """`count` draws over the items of all domains (`sizes`: items a domain).

    All items of all catalogs are shuffled together and used up before any comes again. Raises DataError
    when a catalog is too small for the seen item to be left out.
    """
    for name, size in sizes.items():
        if size < 1 + learning.mask_seen:
            raise DataError(
                f"domain {name!r}: a catalog of {size} item(s) leaves nothing to recommend",
                next_step="give the domain more items, or leave it out of learned merging",
            )
    generator = np.random.default_rng([seed, 1])
    domain_I = np.repeat(np.arange(len(sizes)), list(sizes.values()))
    item_I = np.concatenate([np.arange(size) for size in sizes.values()])
    epochs = -(-count // len(item_I))
    order_N = np.concatenate([generator.permutation(len(item_I)) for _ in range(epochs)])[:count]
    domain_N = domain_I[order_N]
    longest_D = np.maximum(np.array(list(sizes.values())) - 1, 1)
    length_N = np.minimum(generator.integers(1, learning.history_length + 1, count), longest_D[domain_N])
    return Draws(domain_N, item_I[order_N], length_N)


@torch.no_grad()
def roll_out(
    encoder: Encoder,
    params: Mapping[str, Tensor] | None,
    texts: DomainTexts,
    items_IE: Tensor,
    starts: Sequence[int],
    lengths: Sequence[int],
    learning: LearningSection,
    seed: int,
) -> list[History]:
    """Histories that begin with `starts` and are continued by the teacher to `lengths` items.

    No item occurs twice in a history. `params` are the teacher's tensors, `items_IE` its item embeddings.
    """
    generator = torch.Generator().manual_seed(seed)
    histories: list[History] = [(int(start),) for start in starts]
    for length in range(1, max(lengths, default=1)):
        growing = [u for u, wanted in enumerate(lengths) if wanted > length]
        users_UE = embed_histories(encoder, params, texts, items_IE, [histories[u] for u in growing])
        for first in range(0, len(growing), SCORE_ROWS):
            chosen = growing[first : first + SCORE_ROWS]
            scores_BI = users_UE[first : first + SCORE_ROWS] @ items_IE.T
            seen_BL = torch.tensor([histories[u] for u in chosen], device=scores_BI.device)
            scores_BI.scatter_(1, seen_BL, float("-inf"))
            following_B = _sample(scores_BI, length, learning, generator)
            for u, item in zip(chosen, following_B, strict=True):
                histories[u] = (item, *histories[u])
    return histories


def _sample(scores_BI: Tensor, seen: int, learning: LearningSection, generator: torch.Generator) -> list[int]:
    """One item a row from the tempered softmax over its best k; drawn on the CPU, alike everywhere."""
    k = min(learning.rollout_top_k, scores_BI.shape[1] - seen)
    best_BK, items_BK = scores_BI.topk(k, dim=1)
    weights_BK = (best_BK.double().cpu() / learning.rollout_temperature).softmax(1)
    place_B1 = torch.multinomial(weights_BK, 1, generator=generator)
    result: list[int] = items_BK.cpu().gather(1, place_B1).squeeze(1).tolist()
    return result


def embed_histories(
    encoder: Encoder,
    params: Mapping[str, Tensor] | None,
    texts: DomainTexts,
    items_IE: Tensor,
    histories: Sequence[History],
) -> Tensor:
    """Embeddings [U, E] of the histories; one that reads exactly like its item reuses the item's."""
    users_UE = items_IE[[history[0] for history in histories]].clone()
    ids = [texts.history(history) for history in histories]
    other = [u for u, history in enumerate(histories) if ids[u] != texts.items[history[0]]]
    if other:
        users_UE[other] = encode(encoder, [ids[u] for u in other], params)
    return users_UE
