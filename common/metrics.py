"""Ranking metrics: where the one relevant item lands in a full ranking, and what that is worth.

The rule for ties, stated once: **ties count against us**. The relevant item is placed last among
equals, so a constant scorer gets the worst rank, not the best. Ranks start at 1. A score that is not
a number counts as better than the target, and a target without a number as worst.

    >>> rank_B = ranks(torch.tensor([[0.1, 0.9, 0.9]]), torch.tensor([1]))
    >>> rank_B.tolist(), recall_at_k(rank_B, 1), recall_at_k(rank_B, 2)
    ([2], 0.0, 1.0)
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from common.config import RunConfig
from common.errors import DataError

VALID_ANSWERS = "valid-answers"  # share of generated answers that name a candidate


def ranks(scores_BI: Tensor, target_B: Tensor, mask_BI: Tensor | None = None) -> Tensor:
    """The rank (1 = best, int64) of each row's target among all items of the row.

    `mask_BI` is True where an item is left out of the ranking; the target itself is never left out.
    """
    target_B = target_B.to(scores_BI.device, torch.int64)
    target_score_B1 = scores_BI.gather(1, target_B[:, None])
    not_worse_BI = ~(scores_BI < target_score_B1)  # a NaN on either side counts against the target
    if mask_BI is not None:
        not_worse_BI &= ~mask_BI.to(scores_BI.device)
    not_worse_BI.scatter_(1, target_B[:, None], True)
    return not_worse_BI.sum(dim=1)


def recall_at_k(rank_B: Tensor, k: int = 10) -> float:
    """The share of rows whose target is among the first `k`; 0.0 without rows."""
    if rank_B.numel() == 0:
        return 0.0
    return float((rank_B <= k).to(torch.float64).mean())


def ndcg_at_k(rank_B: Tensor, k: int = 10) -> float:
    """Mean of `1 / log2(1 + rank)` where `rank <= k`, else 0 (one relevant item, so the ideal is 1)."""
    return 0.0 if rank_B.numel() == 0 else float(ndcg_gains(rank_B, k).mean())


def ndcg_gains(rank_B: Tensor, k: int = 10) -> Tensor:
    """What each row adds to `ndcg_at_k`, float64: `1 / log2(1 + rank)` where `rank <= k`, else 0."""
    gain_B = 1.0 / torch.log2(1.0 + rank_B.to(torch.float64))
    return torch.where(rank_B <= k, gain_B, torch.zeros_like(gain_B))


def run_metrics(config: RunConfig) -> tuple[str, ...]:
    """Every metric that a run of `config` may report."""
    if config.instruction is None:
        return metric_names(config.evaluation.k)
    return "ndcg@1", "ndcg@3", "recall@1", "recall@3", "recall@10", VALID_ANSWERS


def metric_names(k: int = 10) -> tuple[str, str]:
    """The names under which the two metrics appear everywhere: `recall@k` and `ndcg@k`."""
    return f"recall@{k}", f"ndcg@{k}"


def auc(score_N: Tensor, label_N: Tensor) -> float:
    """P(a positive scores above a negative) + P(equal) / 2, over all pairs of the two classes.

    Ties count half here, as everywhere in the field: there is no list in which one would come first.
    Raises DataError where one class is empty.
    """
    positive_N, negative_N = score_N[label_N.bool()].double(), score_N[~label_N.bool()].double()
    if not len(positive_N) or not len(negative_N):
        raise DataError("AUC needs positives and negatives", next_step="use more records")
    ordered_N = negative_N.sort().values
    below_N = torch.searchsorted(ordered_N, positive_N) + torch.searchsorted(
        ordered_N, positive_N, right=True
    )
    return float(below_N.double().mean() / (2 * len(ordered_N)))


def gauc(score_N: Tensor, label_N: Tensor, users: Sequence[str]) -> tuple[float, int]:
    """The mean AUC of users with both classes (RecBench-MD), and how many users that are.

    Raises DataError where no user has both.
    """
    rows: dict[str, list[int]] = {}
    for row, user in enumerate(users):
        rows.setdefault(user, []).append(row)
    both = [own for own in rows.values() if 0 < int(label_N[own].bool().sum()) < len(own)]
    if not both:
        raise DataError("no user has positives and negatives", next_step="use the AUC over all records")
    return sum(auc(score_N[own], label_N[own]) for own in both) / len(both), len(both)
