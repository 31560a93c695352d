"""Training examples and the order in which they are seen.

An example is (prefix of a user's **training** sequence, the item that follows it); validation and
test items are never among them. `positions_per_user` "all": every position from the second on is an
example; "last": only the last one of each user.

The order is a pure function of (seed, epoch): an epoch is a seeded permutation of the examples, cut
into whole batches, the remainder dropped. So batch n is the same whether the run was interrupted or not.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import Literal

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.utils.data import Dataset

from clients.data.domain import Domain
from common.config import RunConfig, TextSection
from common.errors import DataError
from common.models.encoder import Encoder, ItemTokens

IntArray = npt.NDArray[np.int64]
Batch = dict[str, Tensor]


def domain_tokens(encoder: Encoder, domain: Domain, text: TextSection) -> ItemTokens:
    """The domain's public catalog tokenised: the same text that the server sees. Raises DataError."""
    return encoder.tokenize_items(domain.catalog().texts(text.attributes), text.max_attribute_tokens)


def recent_first(history: npt.NDArray[np.int32], max_history_items: int) -> list[int]:
    """A time-ordered history as the encoder takes it: most recent first, the oldest left out."""
    return [int(index) for index in history[::-1][:max_history_items]]


class Examples:
    """Where the examples are: example n is (user `user_N[n]`, position `position_N[n]` of its sequence)."""

    def __init__(self, train: Sequence[npt.NDArray[np.int32]], positions: Literal["all", "last"]) -> None:
        lengths_U = np.array([len(history) for history in train], dtype=np.int64)
        if positions == "last":
            self.user_N = np.flatnonzero(lengths_U >= 2)
            self.position_N = lengths_U[self.user_N] - 1
        else:
            counts_U = np.maximum(lengths_U - 1, 0)
            self.user_N = np.repeat(np.arange(len(train)), counts_U)
            first_U = np.cumsum(counts_U) - counts_U
            self.position_N = np.arange(int(counts_U.sum())) - np.repeat(first_U, counts_U) + 1

    def __len__(self) -> int:
        return len(self.user_N)


class TrainingBatches(Dataset[Batch]):
    """Batch `step` for every training step of one domain, ready for `loss.TwoTower`.

    A batch holds each candidate item once (`item_*`, U rows): a target that occurs twice in a batch is one
    candidate and so never its own negative. Beside the targets, the newest `history_negatives` items of each
    history are candidates: the ranking is over the whole catalog, where what was just bought reads most like
    the history and would fill the first places. `blocked_BU` is True where a candidate is an older item of
    the example's own history (or any, with `history_negatives` 0): those are not negatives.
    """

    def __init__(self, encoder: Encoder, domain: Domain, config: RunConfig, steps: int) -> None:
        self._encoder, self._domain, self._text = encoder, domain, config.text
        self._tokens = domain_tokens(encoder, domain, config.text)
        self._examples = Examples(domain.train, config.training.positions_per_user)
        self._steps, self._seed = steps, config.run.seed
        self._history_negatives = config.training.history_negatives
        if len(self._examples) < 2:
            raise DataError(
                f"domain {domain.name!r} has {len(self._examples)} training examples, needs at least 2",
                next_step="use a domain whose users have at least two training interactions",
            )
        self.batch_size = min(config.training.batch_size, len(self._examples))
        self._log_q_I = self._log_q() if config.training.logq_correction else None
        self._order: tuple[int, IntArray] | None = None

    def __len__(self) -> int:
        return self._steps

    @property
    def examples(self) -> int:
        """Number of examples in an epoch (before the remainder is dropped)."""
        return len(self._examples)

    def members(self, step: int) -> IntArray:
        """The examples of batch `step` (B)."""
        per_epoch = len(self._examples) // self.batch_size
        epoch, position = divmod(step, per_epoch)
        if self._order is None or self._order[0] != epoch:
            order_N = np.random.default_rng([self._seed, epoch]).permutation(len(self._examples))
            self._order = (epoch, order_N)
        return self._order[1][position * self.batch_size : (position + 1) * self.batch_size]

    def __getitem__(self, step: int) -> Batch:
        chosen_B = self.members(step)
        histories = [
            self._domain.train[int(user)][: int(position)]
            for user, position in zip(
                self._examples.user_N[chosen_B], self._examples.position_N[chosen_B], strict=True
            )
        ]
        target_B = np.array(
            [
                self._domain.train[int(user)][int(position)]
                for user, position in zip(
                    self._examples.user_N[chosen_B], self._examples.position_N[chosen_B], strict=True
                )
            ]
        )
        newest = (
            [history[-self._history_negatives :] for history in histories] if self._history_negatives else []
        )
        item_U = np.unique(np.concatenate([target_B, *newest]))
        candidate_B = np.searchsorted(item_U, target_B)
        blocked_BU = np.stack([np.isin(item_U, history) for history in histories])
        for row, seen in enumerate(newest):
            blocked_BU[row, np.searchsorted(item_U, seen)] = False
        blocked_BU[np.arange(len(histories)), candidate_B] = False
        text = self._text
        history_ids, history_mask = self._encoder.batch(
            [
                self._tokens.history(recent_first(history, text.max_history_items), text.max_seq_len)
                for history in histories
            ]
        )
        item_ids, item_mask = self._encoder.batch([self._tokens.item(int(item)) for item in item_U])
        batch = {
            "history_ids_BT": history_ids,
            "history_mask_BT": history_mask,
            "item_ids_UT": item_ids,
            "item_mask_UT": item_mask,
            "target_B": torch.from_numpy(candidate_B.astype(np.int64)),
            "blocked_BU": torch.from_numpy(blocked_BU),
        }
        if self._log_q_I is not None:
            batch["log_q_U"] = torch.from_numpy(self._log_q_I[item_U])
        return batch

    def _log_q(self) -> npt.NDArray[np.float32]:
        """For each item `log(1 - (1 - s)^B)`, s its share of the targets: how likely it is in a batch.

        An item that is never a target (but may be a history negative) counts as half a target.
        """
        examples = self._examples
        targets = [
            self._domain.train[int(user)][int(position)]
            for user, position in zip(examples.user_N, examples.position_N, strict=True)
        ]
        count_I = np.bincount(np.array(targets), minlength=len(self._domain.item_ids))
        share_I = np.clip(np.maximum(count_I, 0.5) / len(examples), None, 1 - 1e-9)
        log_q_I: npt.NDArray[np.float32] = np.log(-np.expm1(self.batch_size * np.log1p(-share_I))).astype(
            np.float32
        )
        return log_q_I


def data_digest(domain: Domain, text: TextSection) -> str:
    """SHA-256 (hex) of what fine-tuning reads: item texts, training and validation items; no user ids."""
    digest = hashlib.sha256()
    for strings in domain.catalog().texts(text.attributes):
        digest.update("\x1f".join(strings).encode() + b"\x1e")
    for history in domain.train:
        digest.update(len(history).to_bytes(4, "little") + np.asarray(history, dtype="<i4").tobytes())
    digest.update(np.asarray(domain.valid, dtype="<i4").tobytes())
    digest.update(np.asarray(domain.test, dtype="<i4").tobytes())
    return digest.hexdigest()
