"""Ranking tasks from a domain: what is drawn, what never is, and what is left out by name."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from clients.data.domain import Domain
from clients.data.instructions import ranking_set, rankings_of, read_tallrec
from common.errors import DataError

TALLREC = Path(__file__).parents[3] / "../shared/data/tallrec"


def tiny(titles: list[str], train: list[list[int]], valid: list[int], test: list[int]) -> Domain:
    return Domain(
        name="tiny",
        item_ids=[f"i{n:02d}" for n in range(len(titles))],
        attributes={"title": titles, "brand": ["acme"] * len(titles)},
        user_ids=[f"u{n}" for n in range(len(train))],
        train=[np.array(history, dtype=np.int32) for history in train],
        valid=np.array(valid, dtype=np.int32),
        test=np.array(test, dtype=np.int32),
        public_attributes=("title",),
    )


@pytest.mark.parametrize("split", ["train", "valid", "test"])
def test_what_a_task_holds(pico_domain: Any, split: Any) -> None:
    titles = pico_domain.attributes["title"]
    found = rankings_of(pico_domain, split, seed=3, candidates=10, history_items=3)
    assert len(found) == len(pico_domain.user_ids)
    places = set()
    for row, ranking in enumerate(found):
        train = [int(item) for item in pico_domain.train[row]]
        valid, test = int(pico_domain.valid[row]), int(pico_domain.test[row])
        history, target = {
            "train": (train[:-1], train[-1]),
            "valid": (train, valid),
            "test": ([*train, valid], test),
        }[split]
        assert ranking.user == pico_domain.user_ids[row]
        assert list(ranking.history) == [titles[item] for item in history[-3:]]
        assert ranking.target is not None
        assert ranking.candidates[ranking.target] == titles[target]
        others = {title for n, title in enumerate(ranking.candidates) if n != ranking.target}
        assert len(others) == 9
        assert not others & {titles[item] for item in (*train, valid, test)}
        places.add(ranking.target)
    assert len(places) > 5
    assert found == rankings_of(pico_domain, split, seed=3, candidates=10, history_items=3)
    other = rankings_of(pico_domain, split, seed=4, candidates=10, history_items=3)
    assert [own.candidates for own in found] != [own.candidates for own in other]


def test_fewer_users_are_a_part_of_more(pico_domain: Any) -> None:
    every = rankings_of(pico_domain, "test", 0, 10)
    few, more = (rankings_of(pico_domain, "test", 0, 10, max_users=count) for count in (5, 12))
    assert [len(few), len(more)] == [5, 12]
    assert all(ranking in more for ranking in few)
    assert all(ranking in every for ranking in more)


def test_every_position_of_a_training_sequence() -> None:
    domain = tiny([f"t{n}" for n in range(12)], [[0, 1, 2, 3]], [4], [5])
    found = rankings_of(domain, "train", 0, 3, positions="all")
    assert [ranking.history for ranking in found] == [("t0",), ("t0", "t1"), ("t0", "t1", "t2")]
    seen = {f"t{n}" for n in range(6)}
    for ranking, target in zip(found, ("t1", "t2", "t3"), strict=True):
        assert set(ranking.candidates) & seen == {target}


def test_cold_targets_occur_in_no_sequence() -> None:
    titles = [f"t{n}" for n in range(9)]
    domain = tiny(titles, [[0, 1], [1, 2], [2, 0]], [2, 5, 1], [6, 1, 5])
    found = ranking_set(domain, "test", 0, 3, "cold")
    assert [(own.user, own.candidates[own.target or 0]) for own in found.rankings] == [("u0", "t6")]
    assert found.left_out == {"not-cold": 2}
    assert [own.user for own in rankings_of(domain, "valid", 0, 3, "cold")] == ["u1"]
    with pytest.raises(DataError, match=r"no cold ranking task in split 'test' \(2 not-cold\)"):
        rankings_of(tiny(titles, [[0, 1], [1, 2]], [2, 0], [2, 1]), "test", 0, 3, "cold")
    with pytest.raises(DataError, match="never cold"):
        rankings_of(domain, "train", 0, 3, "cold")


def test_titles_that_occur_twice_are_drawn_once() -> None:
    titles = ["mine", "next", "Mine ", "NEXT", "a", "A", "b  c", "B C", "d"]
    for seed in range(20):
        (ranking,) = rankings_of(tiny(titles, [[0, 0]], [0], [1]), "test", seed, 4)
        assert {title.lower() for title in ranking.candidates} == {"next", "a", "b c", "d"}
    with pytest.raises(DataError, match="1 few-candidates"):
        rankings_of(tiny(titles, [[0, 0]], [0], [1]), "test", 0, 5)


def test_items_without_title_are_left_out_and_counted() -> None:
    titles = ["", "a", "b", "c", "d", " "]
    domain = tiny(titles, [[0, 1], [0, 5], [1, 2]], [2, 0, 3], [3, 4, 0])
    found = ranking_set(domain, "test", 0, 2)
    assert [own.history for own in found.rankings] == [("a", "b")]
    assert found.left_out == {"no-history": 1, "no-title": 1}


def test_long_titles_can_be_cut() -> None:
    titles = ["one two three", "one two four", "five six seven", "eight nine ten"]
    domain = tiny(titles, [[0, 0]], [0], [2])
    (ranking,) = rankings_of(domain, "test", 0, 2, title_words=2)
    assert set(ranking.candidates) == {"five six", "eight nine"}  # "one two" is the user's own
    assert ranking.history == ("one two",) * 3


def test_what_cannot_be_ranked_is_named(make_domain: Callable[..., Any]) -> None:
    domain = make_domain()
    with pytest.raises(DataError, match="40 few-candidates"):
        rankings_of(domain, "test", 0, 40)
    with pytest.raises(DataError, match="no choice"):
        rankings_of(domain, "test", 0, 1)
    bare = replace(domain, attributes={"brand": domain.attributes["brand"]}, public_attributes=("brand",))
    with pytest.raises(DataError, match="no attribute 'title'"):
        rankings_of(bare, "test", 0, 5)


def test_tallrec(tmp_path: Path) -> None:
    entries = [
        {"instruction": "Will it do? ", "input": "A: b\n", "output": "Yes."},
        {"instruction": "Will it do?", "input": "", "output": "no"},
    ]
    path = tmp_path / "some.json"
    path.write_text(json.dumps(entries))
    first, second = read_tallrec(path)
    assert (first.text, first.answer) == ("Will it do?\nA: b", True)
    assert (second.text, second.answer) == ("Will it do?", False)
    for bad, words in (
        ([], "empty one"),
        ([*entries, {"instruction": "x", "input": "y"}], "entry 2 lacks"),
        ([{"instruction": "x", "input": "y", "output": "maybe private"}], "entry 0 is neither Yes nor No"),
        ([{"instruction": "", "input": " ", "output": "Yes."}], "entry 0 asks nothing"),
    ):
        path.write_text(json.dumps(bad))
        with pytest.raises(DataError, match=words) as caught:
            read_tallrec(path)
        assert "private" not in str(caught.value)
    path.write_text("{")
    with pytest.raises(DataError, match="not JSON"):
        read_tallrec(path)


@pytest.mark.skipif(not TALLREC.is_dir(), reason="../shared/data/tallrec is not there")
@pytest.mark.parametrize("name", ["movie.test.json", "book.valid.json"])
def test_the_real_tallrec_files(name: str) -> None:
    records = read_tallrec(TALLREC / name)
    assert len(records) > 500
    assert 0.2 < sum(bool(record.answer) for record in records) / len(records) < 0.8
    assert all("Preference" in record.text for record in records)
