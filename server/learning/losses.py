"""Losses on pseudo-users: what learned merging minimises, one value a pseudo-user, in one registry.

Notation: student logits `s_BI`, teacher logits `t_BI` (cosines with the items of the domain, not divided
by a temperature), `seen_BI` true where the item is in the history and the seen item is to be left out of
both. A row must keep at least one item that is not seen. A loss is a function under a decorator:

    @loss("pointwise", paper="...", equation="mean_i (s_i - t_i)^2", teacher=True)
    def _pointwise(scores: Scores, learning: LearningSection) -> Tensor:
        return (scores.s_BI - scores.t_BI).square().mean(-1)

It becomes a merge method of that name; the optimiser, the pseudo-users and the teachers' target are not its
business.

    >>> s_BI = torch.tensor([[1.0, 1.0]])
    >>> round(float(entropy(s_BI)), 4)
    0.6931
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from common.config import LearningSection


@dataclass(frozen=True)
class Scores:
    """What a loss sees of some pseudo-users of one domain; `t_BI` is empty for a loss without teacher."""

    s_BI: Tensor
    t_BI: Tensor
    seen_BI: Tensor | None
    generator: np.random.Generator  # for what a loss draws; the same for the same step and domain


Compute = Callable[[Scores, LearningSection], Tensor]


@dataclass(frozen=True)
class Loss:
    """One registered loss: `compute(scores, learning)` gives [B]."""

    name: str
    paper: str
    equation: str
    teacher: bool
    compute: Compute


LOSSES: dict[str, Loss] = {}


def loss(name: str, *, paper: str, equation: str, teacher: bool) -> Callable[[Compute], Compute]:
    """Register the function as loss `name`; `teacher` says whether it needs the teachers' scores."""

    def register(function: Compute) -> Compute:
        LOSSES[name] = Loss(name, paper, equation, teacher, function)
        return function

    return register


@loss(
    "adamerging",
    paper="Yang et al., ICLR 2024 (entropy of pseudo-users' scores)",
    equation="H(softmax(s))",
    teacher=False,
)
def _adamerging(scores: Scores, learning: LearningSection) -> Tensor:
    return entropy(scores.s_BI, scores.seen_BI)


@loss(
    "mergerec",
    paper="MergeRec: L_rec + alpha L_KD on pseudo-users",
    equation="CE(s, argmax t) + alpha T^2 KL(softmax(t/T) || softmax(s/T))",
    teacher=True,
)
def _mergerec(scores: Scores, learning: LearningSection) -> Tensor:
    temperature, alpha = learning.temperature, learning.distillation_weight
    return mergerec(scores.s_BI, scores.t_BI, scores.seen_BI, temperature=temperature, alpha=alpha)


@loss(
    "ranking-distillation",
    paper="Isthmus: listwise distillation over the teachers' best items, on pseudo-users",
    equation="KL(softmax(t/T) || softmax(s/T)) over the teachers' best items and some others",
    teacher=True,
)
def _ranking_distillation(scores: Scores, learning: LearningSection) -> Tensor:
    items_BK = candidates(
        scores.t_BI, scores.seen_BI, learning.candidates, learning.random_negatives, scores.generator
    )
    return ranking_distillation(scores.s_BI, scores.t_BI, items_BK, temperature=learning.temperature)


def entropy(s_BI: Tensor, seen_BI: Tensor | None = None) -> Tensor:
    """AdaMerging (Yang et al., ICLR 2024, eq. 4): the entropy in nats of `softmax(s)`. Returns [B]."""
    log_p_BI = _log_softmax(s_BI, seen_BI)
    return -(log_p_BI.exp() * _without(log_p_BI, seen_BI)).sum(-1)


def mergerec(
    s_BI: Tensor,
    t_BI: Tensor,
    seen_BI: Tensor | None = None,
    *,
    temperature: float = 0.05,
    alpha: float = 1000.0,
) -> Tensor:
    """MergeRec: `L_rec + alpha L_KD` [B].

    `L_rec = CE(s, argmax t)`; `L_KD = T^2 KL(softmax(t/T) || softmax(s/T))`, both over all items of the
    domain that are not seen.
    """
    label_B = _hide(t_BI, seen_BI).argmax(-1)
    rec_B = -_log_softmax(s_BI, seen_BI).gather(-1, label_B[:, None]).squeeze(-1)
    log_t_BI = _log_softmax(t_BI / temperature, seen_BI)
    log_s_BI = _log_softmax(s_BI / temperature, seen_BI)
    difference_BI = _without(log_t_BI, seen_BI) - _without(log_s_BI, seen_BI)
    kl_B = (log_t_BI.exp() * difference_BI).sum(-1)
    return rec_B + alpha * temperature**2 * kl_B


def candidates(
    t_BI: Tensor, seen_BI: Tensor | None, best: int, random: int, generator: np.random.Generator
) -> Tensor:
    """The teacher's `best` items of each row and `random` others, none twice and none seen: [B, K].

    Where the catalog has fewer, K is smaller, for all rows alike.
    """
    seen = 0 if seen_BI is None else int(seen_BI.sum(-1).max())
    left = t_BI.shape[-1] - seen
    best = min(best, left)
    random = min(random, left - best)
    best_BK = _hide(t_BI, seen_BI).topk(best, dim=-1).indices
    if random == 0:
        return best_BK
    lot_BI = torch.from_numpy(generator.random(tuple(t_BI.shape), dtype=np.float32)).to(t_BI.device)
    lot_BI.scatter_(-1, best_BK, -1.0)
    if seen_BI is not None:
        lot_BI.masked_fill_(seen_BI, -1.0)
    return torch.cat([best_BK, lot_BI.topk(random, dim=-1).indices], dim=-1)


def ranking_distillation(
    s_BI: Tensor, t_BI: Tensor, items_BK: Tensor, *, temperature: float = 0.05
) -> Tensor:
    """`KL(softmax(t_K/T) || softmax(s_K/T))` over the candidates `items_BK` alone. Returns [B].

    The listwise (ListNet, Cao et al., ICML 2007) form of ranking distillation (Tang and Wang, KDD 2018):
    how the best items are ordered counts, not how low the rest of the catalog is.
    """
    log_t_BK = _log_softmax(t_BI.gather(-1, items_BK) / temperature, None)
    log_s_BK = _log_softmax(s_BI.gather(-1, items_BK) / temperature, None)
    return (log_t_BK.exp() * (log_t_BK - log_s_BK)).sum(-1)


def _hide(logits_BI: Tensor, seen_BI: Tensor | None) -> Tensor:
    return logits_BI if seen_BI is None else logits_BI.masked_fill(seen_BI, float("-inf"))


def _log_softmax(logits_BI: Tensor, seen_BI: Tensor | None) -> Tensor:
    return nn.functional.log_softmax(_hide(logits_BI.float(), seen_BI), dim=-1)


def _without(log_p_BI: Tensor, seen_BI: Tensor | None) -> Tensor:
    """Seen items contribute nothing (0 times -inf would be NaN)."""
    return log_p_BI if seen_BI is None else log_p_BI.masked_fill(seen_BI, 0.0)
