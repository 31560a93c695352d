"""The timeline: where times are, what is cut out, and that its size does not follow the number of entries."""

from __future__ import annotations

import re

import numpy as np
import pytest
from markup import Page

from common.audit.timeline import BINS, LATEST_S, MOST_LANES, Axis, Dot, Lane, moment, timeline

HOUR, DAY = 3600, 86400


def busy(name: str, count: int, seed: int = 0) -> Lane:
    chance = np.random.default_rng(seed)
    kinds = ("catalog", "task-vector", "metrics", "receipt", "message")
    times, picks = chance.integers(DAY, size=count).tolist(), chance.integers(len(kinds), size=count).tolist()
    return Lane(name, [Dot(time_s, kinds[pick], 1000) for time_s, pick in zip(times, picks, strict=True)])


def test_times_keep_their_order_and_their_distances() -> None:
    axis = Axis([100, 200, 400])
    places = [axis.place(time_s) for time_s in (100, 200, 400)]
    assert 0 < places[0] < places[1] < places[2] < 1
    assert places[2] - places[1] == pytest.approx(2 * (places[1] - places[0]))
    assert axis.cuts == []


def test_long_pauses_are_cut_out_and_short_ones_stay() -> None:
    axis = Axis([0, 60, 3000, 3000 + 40 * DAY, 3060 + 40 * DAY])
    assert axis.cuts == [(3000, 3000 + 40 * DAY)]
    assert axis.place(3000) < axis.place(3000 + 20 * DAY) == axis.place(3000 + 40 * DAY)
    assert axis.place(60) - axis.place(0) > 0.005


def test_a_clock_that_is_wrong_by_centuries_leaves_the_rest_readable() -> None:
    axis = Axis([0, *range(1_795_000_000, 1_795_000_900, 30), LATEST_S])
    assert axis.place(1_795_000_870) - axis.place(1_795_000_000) > 0.5


@pytest.mark.parametrize("span", [0, 1, 59, 4000, 5 * HOUR, 3 * DAY, 90 * DAY, 4000 * DAY])
def test_ticks_are_few_round_and_inside(span: int) -> None:
    step = max(1, span // 100)  # no pause long enough to be cut out
    axis = Axis(range(1_795_000_000, 1_795_000_000 + span + 1, step))
    ticks = axis.ticks()
    assert 1 <= len(ticks) <= 11
    assert all(1_795_000_000 <= tick <= 1_795_000_000 + span for tick in ticks)


def test_ten_times_more_entries_do_not_make_a_larger_picture() -> None:
    few, many = timeline([busy("tea sent", 2_000)]), timeline([busy("tea sent", 20_000)])
    assert len(many) < 1.2 * len(few)
    marks = [attrs for name, attrs in Page(many).tags if name == "path" and "mark" in str(attrs.get("class"))]
    assert len(marks) < 5 * (BINS + 1) + 20
    counts = [int(text.replace(",", "")) for text in re.findall(r"<title>([\d,]+) ", many)]
    assert sum(counts) == 20_000
    assert "20,000 messages" in many


def test_findings_have_a_ring_and_a_key() -> None:
    lane = Lane("tea sent", [Dot(0, "catalog", 10), Dot(5, "metrics", 10, found=True)])
    drawn = timeline([lane])
    assert drawn.count('class="ring"') == 2 and "with a finding" in drawn
    assert "ring" not in timeline([Lane("tea sent", lane.dots[:1])])


def test_unknown_kinds_and_too_many_lanes_are_said() -> None:
    drawn = timeline([Lane(f"d{n} sent", [Dot(0, "other", n)]) for n in range(MOST_LANES + 5)])
    assert "of no known kind" in drawn
    assert f"the {MOST_LANES} lanes with the most bytes, of {MOST_LANES + 5}" in drawn
    assert "d64 sent" in drawn and "d0 sent" not in drawn
    assert "nothing to draw" in timeline([Lane("tea sent")])


def test_any_time_of_a_ledger_can_be_said() -> None:
    assert moment(2**53 - 1) == "31 Dec 9999, 23:59 UTC"
