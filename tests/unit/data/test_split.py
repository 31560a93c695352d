"""k-core against a naive one, leave-one-out, ties, repeats."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from clients.data.split import k_core, keep_unrepeated, leave_one_out, time_order
from common.errors import DataError

PAIRS = st.lists(st.tuples(st.integers(0, 7), st.integers(0, 7)), max_size=60)


def _codes(pairs: list[tuple[int, int]]) -> tuple[np.ndarray, np.ndarray]:
    users, items = zip(*pairs, strict=True) if pairs else ((), ())
    return np.array(users, dtype=np.int32), np.array(items, dtype=np.int32)


def _naive(pairs: list[tuple[int, int]], k_user: int, k_item: int) -> list[bool]:
    """Remove one offending user or item at a time."""
    alive = set(range(len(pairs)))
    while True:
        for axis, k in ((0, k_user), (1, k_item)):
            counts: dict[int, int] = {}
            for n in alive:
                counts[pairs[n][axis]] = counts.get(pairs[n][axis], 0) + 1
            bad = next((code for code, count in sorted(counts.items()) if count < k), None)
            if bad is not None:
                alive -= {n for n in alive if pairs[n][axis] == bad}
                break
        else:
            return [n in alive for n in range(len(pairs))]


@settings(max_examples=150, deadline=None)
@given(PAIRS, st.integers(0, 4), st.integers(0, 4))
def test_k_core_equals_the_naive_one(pairs: list[tuple[int, int]], k_user: int, k_item: int) -> None:
    user_N, item_N = _codes(pairs)
    core = k_core(user_N, item_N, k_user=k_user, k_item=k_item)
    assert core.keep_N.tolist() == _naive(pairs, k_user, k_item)
    kept = [pair for pair, keep in zip(pairs, core.keep_N, strict=True) if keep]
    assert core.dropped_users == len({u for u, _ in pairs}) - len({u for u, _ in kept})
    assert core.dropped_items == len({i for _, i in pairs}) - len({i for _, i in kept})


def test_k_core_cascades() -> None:
    pairs = [(0, 0), (0, 1), (1, 0), (1, 1), (2, 1), (2, 2)]
    core = k_core(*_codes(pairs), k_user=2, k_item=2)
    assert core.keep_N.tolist() == [True] * 4 + [False] * 2 and core.rounds == 2


def test_leave_one_out_in_time_order_with_stable_ties() -> None:
    user_N = np.array([1, 0, 1, 0, 1, 0, 1], dtype=np.int32)
    item_N = np.array([9, 1, 8, 2, 7, 3, 6], dtype=np.int32)
    time_N = np.array([5, 3, 5, 1, 4, 2, 5], dtype=np.float64)
    order = time_order(user_N, time_N)
    split = leave_one_out(user_N[order], item_N[order])
    assert split.users.tolist() == [0, 1]
    assert [history.tolist() for history in split.train] == [[2], [7, 9]]
    assert split.valid.tolist() == [3, 8] and split.test.tolist() == [1, 6]


def test_short_history_is_refused() -> None:
    with pytest.raises(DataError, match="fewer than 3"):
        leave_one_out(np.zeros(2, np.int32), np.zeros(2, np.int32))


@pytest.mark.parametrize(
    ("policy", "kept"),
    [
        ("keep", [1, 1, 1, 1, 1, 1]),
        ("exact", [1, 0, 1, 1, 1, 1]),
        ("consecutive", [1, 0, 0, 1, 1, 1]),
        ("first", [1, 0, 0, 1, 0, 1]),
    ],
)
def test_repeats(policy: str, kept: list[int]) -> None:
    user_N = np.array([0, 0, 0, 0, 0, 1], dtype=np.int32)
    item_N = np.array([4, 4, 4, 5, 4, 4], dtype=np.int32)
    time_N = np.array([1, 1, 2, 3, 4, 4], dtype=np.float64)
    keep_N = keep_unrepeated(user_N, item_N, time_N, policy)  # type: ignore[arg-type]
    assert keep_N.tolist() == [bool(k) for k in kept]
