"""k-core filtering and the leave-one-out split (MergeRec sec. 2).

>>> import numpy as np
>>> user_N, item_N = np.array([0, 0, 1]), np.array([0, 1, 0])
>>> k_core(user_N, item_N, k_user=2, k_item=1).keep_N.tolist()
[True, True, False]
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np
import numpy.typing as npt

from clients.data.records import IntArray, TimeArray
from common.errors import DataError

BoolArray = npt.NDArray[np.bool_]
Duplicates = Literal["keep", "exact", "consecutive", "first"]
MIN_HISTORY = 3  # train, validation and test need one item each


@dataclass(frozen=True)
class Core:
    """What a k-core keeps: `keep_N` over the interactions, and why the rest went."""

    keep_N: BoolArray
    rounds: int
    dropped_users: int
    dropped_items: int


def k_core(user_N: IntArray, item_N: IntArray, *, k_user: int, k_item: int) -> Core:
    """Drop users with fewer than `k_user` and items with fewer than `k_item` interactions until none is left.

    Interactions are counted, not distinct pairs (as the Amazon 5-core sets do). The result is the unique
    largest such subset, whatever the order of removal. Both arrays hold N codes from 0.
    """
    keep_N = np.ones(len(user_N), dtype=bool)
    users, items = int(user_N.max(initial=-1)) + 1, int(item_N.max(initial=-1)) + 1
    rounds = 0
    while True:
        per_user = np.bincount(user_N[keep_N], minlength=users)
        per_item = np.bincount(item_N[keep_N], minlength=items)
        next_N = keep_N & (per_user[user_N] >= k_user) & (per_item[item_N] >= k_item)
        if np.array_equal(next_N, keep_N):
            break
        keep_N, rounds = next_N, rounds + 1
    return Core(
        keep_N,
        rounds,
        len(np.unique(user_N)) - int((per_user > 0).sum()),
        len(np.unique(item_N)) - int((per_item > 0).sum()),
    )


def time_order(user_N: IntArray, time_N: TimeArray) -> npt.NDArray[np.int64]:
    """Row numbers sorted by user, then time; equal times keep the order of the file (stable)."""
    return np.lexsort((time_N, user_N)).astype(np.int64)


def keep_unrepeated(user_N: IntArray, item_N: IntArray, time_N: TimeArray, policy: Duplicates) -> BoolArray:
    """Which of N interactions, sorted by user and time, survive the policy on repeats.

    - `keep`: all of them;
    - `exact` (default elsewhere): the same user, item and time twice is one event exported twice, so the
      first stays; buying the same thing again later is behaviour and stays;
    - `consecutive`: also collapse runs of one item inside a user's history to their first;
    - `first`: each user-item pair once, at its first time.
    """
    keep_N = np.ones(len(user_N), dtype=bool)
    if policy == "keep" or not len(user_N):
        return keep_N
    by_pair = np.lexsort((np.arange(len(user_N)), time_N, item_N, user_N))
    same_N = (np.diff(user_N[by_pair]) == 0) & (np.diff(item_N[by_pair]) == 0)
    if policy != "first":
        same_N &= np.diff(time_N[by_pair]) == 0
    keep_N[by_pair[1:][same_N]] = False
    if policy == "consecutive":
        rows = np.flatnonzero(keep_N)
        run_N = (np.diff(user_N[rows]) == 0) & (np.diff(item_N[rows]) == 0)
        keep_N[rows[1:][run_N]] = False
    return keep_N


@dataclass(frozen=True)
class LeaveOneOut:
    """U users: training histories in time order, and the items held out for validation and test."""

    users: IntArray
    train: list[IntArray]
    valid: IntArray
    test: IntArray


def leave_one_out(user_N: IntArray, item_N: IntArray) -> LeaveOneOut:
    """The last item is the test, the one before it the validation, the rest train.

    `user_N` must be sorted, rows of one user in time order; `users` lists its distinct codes in that order.
    Raises DataError when a user has fewer than three interactions.
    """
    users, starts = np.unique(user_N, return_index=True)
    ends = np.append(starts[1:], len(user_N))
    if len(users) and int((ends - starts).min()) < MIN_HISTORY:
        raise DataError(
            f"a user has fewer than {MIN_HISTORY} interactions, so leave-one-out has nothing to train on",
            next_step="drop such users first (k-core does)",
        )
    item_N = item_N.astype(np.int32)
    train = [item_N[start : end - 2].copy() for start, end in zip(starts, ends, strict=True)]
    return LeaveOneOut(users.astype(np.int32), train, item_N[ends - 2], item_N[ends - 1])
