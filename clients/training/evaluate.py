"""Leave-one-out evaluation with full ranking over the domain's catalog (METHODS).

The history for "valid" is the training sequence, for "test" also the validation item; most recent
first. Ties count against us (`common.metrics`). Users are ranked in batches, so that no matrix of all
users by all items exists. What leaves this module are averages; ranks of single users are written only
to the domain's own folder (`Evaluation.write_per_user`).
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from torch import Tensor

from clients.data.domain import Domain
from clients.training.dataset import domain_tokens, recent_first
from common.config import RunConfig
from common.files import storage_errors
from common.metrics import ndcg_at_k, ranks, recall_at_k
from common.models.encoder import Encoder, ItemTokens
from common.progress import NO_REPORT, Report

Split = Literal["valid", "test"]
SCORES_AT_ONCE = 1 << 24
_ENCODE_AT_ONCE = 2048


@dataclass(frozen=True)
class Evaluation:
    """Averages over users (`metrics`: `recall@k`, `ndcg@k`), and what they were averaged from.

    `user_U` are row numbers in the domain, `rank_U` (1 = best) and `target_U` (item index) belong to them.
    """

    metrics: dict[str, float]
    users: int
    seconds: float
    user_U: npt.NDArray[np.int64]
    rank_U: npt.NDArray[np.int64]
    target_U: npt.NDArray[np.int64]

    def write_per_user(self, path: Path, domain: Domain) -> None:
        """Write `user_id`, `rank`, `target` (item id) as Parquet; for the domain's own folder only."""
        table = pa.table(
            {
                "user_id": [domain.user_ids[int(user)] for user in self.user_U],
                "rank": pa.array(self.rank_U, pa.int32()),
                "target": [domain.item_ids[int(item)] for item in self.target_U],
            }
        )
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = path.with_name(f".{path.name}.tmp")
        with storage_errors(path):
            pq.write_table(table, temporary, compression="zstd")
            temporary.replace(path)


def evaluate(
    encoder: Encoder,
    domain: Domain,
    config: RunConfig,
    split: Split = "test",
    report: Report = NO_REPORT,
    *,
    max_users: int | None = None,
    tokens: ItemTokens | None = None,
    phase: str = "evaluate",
) -> Evaluation:
    """Rank every user's held-out item among all items of the catalog.

    `max_users` (default: the configuration's) limits the users to a seeded draw, the same for every
    model. `tokens` saves tokenising the catalog again. Raises DataError where the catalog has no text.
    """
    started_s = time.monotonic()
    tokens = domain_tokens(encoder, domain, config.text) if tokens is None else tokens
    user_U = draw_users(len(domain.user_ids), max_users or config.evaluation.max_users, config.run.seed)
    total = len(tokens) + len(user_U)
    item_IE = _encode_items(encoder, tokens, config.evaluation.batch_size, report, phase, total)
    target_U = (domain.valid if split == "valid" else domain.test)[user_U].astype(np.int64)
    rows = max(1, SCORES_AT_ONCE // len(tokens))
    found = []
    for start in range(0, len(user_U), min(rows, _ENCODE_AT_ONCE)):
        chosen = user_U[start : start + min(rows, _ENCODE_AT_ONCE)]
        histories = [_history(domain, int(user), split) for user in chosen]
        ids = [
            tokens.history(recent_first(history, config.text.max_history_items), config.text.max_seq_len)
            for history in histories
        ]
        scores_BI = encoder.encode(ids, config.evaluation.batch_size) @ item_IE.T
        mask_BI = _seen(histories, len(tokens)).to(scores_BI.device) if config.evaluation.mask_seen else None
        found.append(ranks(scores_BI, torch.from_numpy(target_U[start : start + len(chosen)]), mask_BI).cpu())
        report(phase=phase, step=len(tokens) + start + len(chosen), total=total)
    rank_U = torch.cat(found)
    k = config.evaluation.k
    return Evaluation(
        metrics={f"recall@{k}": recall_at_k(rank_U, k), f"ndcg@{k}": ndcg_at_k(rank_U, k)},
        users=len(user_U),
        seconds=time.monotonic() - started_s,
        user_U=user_U,
        rank_U=rank_U.numpy(),
        target_U=target_U,
    )


def _encode_items(
    encoder: Encoder, tokens: ItemTokens, batch_size: int, report: Report, phase: str, total: int
) -> Tensor:
    """`item_IE`, in slices so that progress shows."""
    ids = tokens.items()
    order = sorted(range(len(ids)), key=lambda index: len(ids[index]))
    item_IE = torch.empty(len(ids), encoder.dim, device=encoder.device)
    for start in range(0, len(ids), _ENCODE_AT_ONCE):
        chosen = order[start : start + _ENCODE_AT_ONCE]
        item_IE[chosen] = encoder.encode([ids[index] for index in chosen], batch_size)
        report(phase=phase, step=start + len(chosen), total=total)
    return item_IE


def draw_users(users: int, limit: int | None, seed: int) -> npt.NDArray[np.int64]:
    """Which of so many users are evaluated, sorted: all, or a seeded draw of `limit`. Row numbers [U]."""
    if limit is None or limit >= users:
        return np.arange(users)
    return np.sort(np.random.default_rng([seed, users]).choice(users, size=limit, replace=False))


def _history(domain: Domain, user: int, split: Split) -> npt.NDArray[np.int32]:
    history = domain.train[user]
    return history if split == "valid" else np.append(history, domain.valid[user])


def _seen(histories: list[npt.NDArray[np.int32]], items: int) -> Tensor:
    mask_BI = torch.zeros(len(histories), items, dtype=torch.bool)
    for row, history in enumerate(histories):
        mask_BI[row, torch.from_numpy(np.asarray(history, dtype=np.int64))] = True
    return mask_BI
