"""Pseudo-users: histories that nobody had, made from the public catalogs and the domains' teachers.

Every item of every catalog is a pseudo-user with that one item as its history ("one-item"). With
`history_length` n > 1 each history has a length drawn from 1..n and is rolled out by the domain's teacher
("rolled-out"): it scores all items of the domain, the items of the history are masked, and the next item is
drawn from the softmax of the best k at a temperature. No user data is involved anywhere. Another source is
another function in `SOURCES`.

A share of each catalog is held back: such an item never begins a history that is learned from, and is never
rolled out into one. Which pseudo-users are drawn in which step, and which items are held back, is fixed by
the seed before learning begins, so a restarted server draws the same ones.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
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
Held = Mapping[str, NDArray[np.int64]]  # domain -> items held back, in the order in which they are used

SCORE_ROWS = 256


@dataclass(frozen=True)
class Draws:
    """N draws in order: the domain's index, the first item, and the history's length, each [N]."""

    domain_N: NDArray[np.int64]
    item_N: NDArray[np.int64]
    length_N: NDArray[np.int64]


@dataclass(frozen=True)
class Seeds:
    """What some histories of one domain grow from; `barred` items are not rolled out."""

    starts: list[int]
    lengths: list[int]
    barred: list[int]
    seed: int


@dataclass(frozen=True)
class TeacherModel:
    """A teacher while it is in memory: its tensors, and its embeddings of all items of one domain."""

    encoder: Encoder
    params: Mapping[str, Tensor]
    texts: DomainTexts
    items_IE: Tensor


@dataclass(frozen=True)
class Source:
    """One kind of pseudo-users; `teacher` says whether `histories` needs the domain's teacher."""

    name: str
    teacher: bool
    histories: Callable[[Seeds, LearningSection, TeacherModel | None], list[History]]


def source_of(learning: LearningSection) -> Source:
    """The kind of pseudo-users that the configuration asks for."""
    return SOURCES["one-item" if learning.history_length == 1 else "rolled-out"]


def hold_back(sizes: Mapping[str, int], learning: LearningSection, seed: int) -> dict[str, NDArray[np.int64]]:
    """Items of each domain (`sizes`: items a domain) that are never learned from, in the order of their use.

    `learning.holdout` of each catalog, at least one item where there are two or more.
    """
    held: dict[str, NDArray[np.int64]] = {}
    for index, (name, size) in enumerate(sizes.items()):
        count = min(max(1, round(learning.holdout * size)), size - 1) if learning.holdout else 0
        held[name] = np.random.default_rng([seed, 3, index]).permutation(size)[:count]
    return held


def held_users(held: NDArray[np.int64], size: int, learning: LearningSection, seed: int) -> Seeds:
    """The held-back pseudo-users of a domain with `size` items: at most `learning.holdout_users`."""
    starts = held[: learning.holdout_users]
    lengths = np.random.default_rng([seed, 4]).integers(1, learning.history_length + 1, len(starts))
    return Seeds(starts.tolist(), np.minimum(lengths, max(size - 1, 1)).tolist(), [], seed + 1)


def draw(
    sizes: Mapping[str, int],
    count: int,
    learning: LearningSection,
    seed: int,
    held: Held | None = None,
) -> Draws:
    """`count` draws over the items of all domains (`sizes`: items a domain) that are not held back.

    All such items of all catalogs are shuffled together and used up before any comes again. Raises
    DataError when a catalog is too small for the seen item to be left out.
    """
    check_sizes(sizes, learning)
    generator = np.random.default_rng([seed, 1])
    nothing = np.empty(0, np.int64)
    free = [
        np.setdiff1d(np.arange(size), held.get(name, nothing) if held else nothing)
        for name, size in sizes.items()
    ]
    domain_I = np.repeat(np.arange(len(sizes)), [len(items) for items in free])
    item_I = np.concatenate(free)
    epochs = -(-count // len(item_I))
    order_N = np.concatenate([generator.permutation(len(item_I)) for _ in range(epochs)])[:count]
    domain_N = domain_I[order_N]
    pairs = zip(sizes.values(), free, strict=True)
    longest_D = np.array([max(1, min(size - 1, len(items))) for size, items in pairs])
    length_N = np.minimum(generator.integers(1, learning.history_length + 1, count), longest_D[domain_N])
    return Draws(domain_N, item_I[order_N], length_N)


def check_sizes(sizes: Mapping[str, int], learning: LearningSection) -> None:
    """Raises DataError when a catalog is too small for the seen item to be left out."""
    for name, size in sizes.items():
        if size < 1 + learning.mask_seen:
            raise DataError(
                f"domain {name!r}: a catalog of {size} item(s) leaves nothing to recommend",
                next_step="give the domain more items, or leave it out of learned merging",
            )


def _one_item(seeds: Seeds, learning: LearningSection, teacher: TeacherModel | None) -> list[History]:
    return [(int(start),) for start in seeds.starts]


def _rolled_out(seeds: Seeds, learning: LearningSection, teacher: TeacherModel | None) -> list[History]:
    if teacher is None:
        raise DataError("rolled-out pseudo-users need a teacher", next_step="set learning.history_length = 1")
    return roll_out(
        teacher.encoder,
        teacher.params,
        teacher.texts,
        teacher.items_IE,
        seeds.starts,
        seeds.lengths,
        learning,
        seeds.seed,
        seeds.barred,
    )


SOURCES = {
    source.name: source
    for source in (Source("one-item", False, _one_item), Source("rolled-out", True, _rolled_out))
}


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
    barred: Sequence[int] = (),
) -> list[History]:
    """Histories that begin with `starts` and are continued by the teacher to `lengths` items.

    No item occurs twice in a history, and no `barred` one is added. `params` are the teacher's tensors,
    `items_IE` its item embeddings.
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
            if barred:
                scores_BI[:, list(barred)] = float("-inf")
            following_B = _sample(scores_BI, length + len(barred), learning, generator)
            for u, item in zip(chosen, following_B, strict=True):
                histories[u] = (item, *histories[u])
    return histories


def _sample(scores_BI: Tensor, out: int, learning: LearningSection, generator: torch.Generator) -> list[int]:
    """One item a row from the tempered softmax over its best k, `out` being out of play; drawn on the CPU."""
    k = min(learning.rollout_top_k, scores_BI.shape[1] - out)
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
