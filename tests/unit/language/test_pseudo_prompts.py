"""Prompts of pseudo-users: made of the catalog alone, without a label, the same for the same seed."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest

from common.catalog import Catalog
from common.errors import DataError
from common.language.records import Ranking
from server.language.pseudo_prompts import pseudo_rankings
from tests.conftest import WORDS

DOMAINS = ("garden", "tea")


def catalog(domain: str, items: int = 20, **columns: list[str]) -> Catalog:
    start = 7 * len(domain)
    titles = [f"{WORDS[(start + n) % len(WORDS)]} {n}" for n in range(items)]
    return Catalog(domain, [f"{domain}-{n}" for n in range(items)], columns or {"title": titles})


@pytest.mark.parametrize("histories", ["one-item", "random", "rolled-out"])
def test_pseudo_users_are_made_of_the_catalog_alone(histories: Any) -> None:
    asked: list[tuple[str, int]] = []

    def choose(domain: str, rankings: Sequence[Ranking]) -> list[int]:
        asked.append((domain, len(rankings)))
        return [len(ranking.history) % 3 for ranking in rankings]

    def make() -> dict[str, list[Ranking]]:
        return pseudo_rankings(
            {name: catalog(name) for name in DOMAINS},
            7,
            candidates=6,
            histories=histories,
            history_items=4,
            seed=3,
            choose=choose,
        )

    made = make()
    assert {name: len(own) for name, own in made.items()} == {"garden": 4, "tea": 3}
    for name, own in made.items():
        titles = set(catalog(name).attributes["title"])
        for ranking in own:
            assert ranking.target is None and len(ranking.candidates) == 6
            assert set(ranking.history) | set(ranking.candidates) <= titles
            assert not set(ranking.history) & set(ranking.candidates)
            assert 1 <= len(ranking.history) <= (1 if histories == "one-item" else 4)
    assert make() == made
    assert bool(asked) == (histories == "rolled-out")


def test_catalogs_that_make_no_prompts_are_named() -> None:
    twice = catalog("tea", title=["Red cup", "red  CUP"] * 10)
    for bad, said in (
        (twice, "'tea': its catalog has 1 different titles, history and candidates take 8"),
        (catalog("tea", brand=["acme"] * 20), "'tea': its catalog has no attribute `title`"),
    ):
        with pytest.raises(DataError, match=said):
            pseudo_rankings({"tea": bad}, 3, candidates=3)
