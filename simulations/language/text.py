"""Text to learn a language model from, made of public catalogs alone.

A pseudo-user likes a *theme*: a brand, a category, or a word of titles that a few items of a catalog share.
Its history and the candidate to name are items of the theme; the other candidates are drawn from outside it.
Three kinds of documents come of it: *shelves*, titles of a theme one after another; *copies*, prompts whose
history is their candidates in another order; and *prompts* in the very template of instruction ranking. Every
token of the first two is learned, of the last only the answer. So the model learns words and what goes with
what; to copy a title, which answers alone teach too thinly; and which candidate fits a history. Interactions
are nowhere read.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from common.catalog import Catalog
from common.errors import DataError
from common.language.prompts import Template
from common.language.records import Ranking, title_key

_WORD = re.compile(r"[^\W\d_]{3,}")
Rows = npt.NDArray[np.int64]
_MIN_MEMBERS, _MAX_MEMBERS = 2, 300


@dataclass(frozen=True)
class Shelf:
    """One domain's titles, and for each theme the rows of its items."""

    titles: list[str]
    themes: list[Rows]
    themes_of: list[list[int]]


class PseudoUsers:
    """Draws pseudo-users from `catalogs`, titles cut to `title_words`. Raises DataError without a theme."""

    def __init__(self, catalogs: Mapping[str, Catalog], title_words: int) -> None:
        self._shelves = [_shelf(catalog, title_words) for _, catalog in sorted(catalogs.items())]
        self._weights = np.array([len(shelf.titles) for shelf in self._shelves], dtype=np.float64)
        self._weights /= self._weights.sum()

    def titles(self) -> Iterator[str]:
        """Every title."""
        for shelf in self._shelves:
            yield from shelf.titles

    def groups(self) -> Iterator[list[str]]:
        """The titles of each theme, theme after theme."""
        for shelf in self._shelves:
            for theme in shelf.themes:
                yield [shelf.titles[row] for row in theme]

    def shelf(self, rng: np.random.Generator, items: int) -> list[str]:
        """Up to `items` titles of one theme."""
        shelf, members, _ = self._theme(rng)
        return [shelf.titles[row] for row in members[:items]]

    def copy(self, rng: np.random.Generator, items: int) -> Ranking:
        """Different titles of a domain, `items` at most, as candidates and in another order as history."""
        shelf = self._domain(rng)
        titles: list[str] = []
        while len(titles) < 2:  # two draws may be of one title
            rows = rng.integers(len(shelf.titles), size=items)
            titles = list({title_key(shelf.titles[row]): shelf.titles[row] for row in rows}.values())
        return Ranking("pseudo", tuple(rng.permutation(titles).tolist()), tuple(titles), None)

    def ranking(
        self, rng: np.random.Generator, history: int, candidates: int, noise: float, informed: float = 1.0
    ) -> Ranking:
        """A pseudo-user: up to `history` titles, `candidates` titles of which one is of the same theme.

        Each title of the history but one is, with probability `noise`, any item of the domain. The answer is
        the one that fits or, with probability `1 - informed`, any candidate: a model then learns to name one,
        not which.
        """
        shelf, members, theme = self._theme(rng)
        past = members[1 : 1 + min(history, len(members) - 1)].copy()
        for place in range(len(past) - 1):
            if rng.random() < noise:
                past[place] = rng.integers(len(shelf.titles))
        titles = [shelf.titles[members[0]]]
        seen = {title_key(titles[0]), *(title_key(shelf.titles[row]) for row in past)}
        for row in rng.integers(len(shelf.titles), size=20 * candidates):
            title = shelf.titles[row]
            if len(titles) == candidates:
                break
            if title_key(title) not in seen and theme not in shelf.themes_of[row]:
                seen.add(title_key(title))
                titles.append(title)
        order = rng.permutation(len(titles))
        answer = 0 if rng.random() < informed else rng.integers(len(titles))
        return Ranking(
            "pseudo",
            tuple(shelf.titles[row] for row in rng.permutation(past)),
            tuple(titles[place] for place in order),
            target=int(np.flatnonzero(order == answer)[0]),
        )

    def _theme(self, rng: np.random.Generator) -> tuple[Shelf, Rows, int]:
        """A domain by its size, one of its items, one of the item's themes; the theme's rows in any order."""
        shelf = self._domain(rng)
        while not (own := shelf.themes_of[rng.integers(len(shelf.titles))]):
            pass
        theme = own[rng.integers(len(own))]
        return shelf, rng.permutation(shelf.themes[theme]), theme

    def _domain(self, rng: np.random.Generator) -> Shelf:
        return self._shelves[rng.choice(len(self._shelves), p=self._weights)]


def split_catalogs(
    catalogs: Mapping[str, Catalog], share: float, seed: int
) -> tuple[dict[str, Catalog], dict[str, Catalog]]:
    """`(learned, held back)`: each catalog in two, `share` of its items held back, drawn with `seed`."""
    parts: tuple[dict[str, Catalog], dict[str, Catalog]] = ({}, {})
    for name, catalog in sorted(catalogs.items()):
        held_I = np.random.default_rng([seed, len(catalog)]).random(len(catalog)) < share
        for part, rows in zip(parts, (np.flatnonzero(~held_I), np.flatnonzero(held_I)), strict=True):
            columns = {key: [column[row] for row in rows] for key, column in catalog.attributes.items()}
            part[name] = Catalog(name, [catalog.item_ids[row] for row in rows], columns)
    return parts


def cut(title: str, words: int) -> str:
    """The first `words` words of a title, without the comma that may then end it."""
    return " ".join(title.split()[:words]).rstrip(",;:-& ")


def document(template: Template, ranking: Ranking) -> tuple[str, str]:
    """A prompt and its answer."""
    return template.ranking_prompt(ranking), template.ranking_answer(ranking)


def lines(template: Template, titles: Sequence[str]) -> str:
    """Titles as a history shows them."""
    return "\n".join(template.ranking.history_item.format(title=title) for title in titles)


def _shelf(catalog: Catalog, title_words: int) -> Shelf:
    column = catalog.attributes.get("title", [])
    rows = [row for row, title in enumerate(column) if cut(title, title_words)]
    titles = [cut(column[row], title_words) for row in rows]
    members: dict[tuple[str, str], list[int]] = defaultdict(list)
    for place, row in enumerate(rows):
        for name in ("brand", "category"):
            if value := catalog.attributes.get(name, [""] * len(column))[row]:
                members[name, value.casefold()].append(place)
        for word in dict.fromkeys(_WORD.findall(titles[place].casefold())):  # in the same order each time
            members["word", word].append(place)
    kept = [found for found in members.values() if _MIN_MEMBERS <= len(found) <= _MAX_MEMBERS]
    if not kept or len(set(map(title_key, titles))) < _MIN_MEMBERS:
        raise DataError(
            f"catalog of {catalog.domain!r}: no brand, category or word is shared by {_MIN_MEMBERS} items",
            next_step="use a larger catalog",
        )
    themes_of: list[list[int]] = [[] for _ in titles]
    for theme, found in enumerate(kept):
        for place in found:
            themes_of[place].append(theme)
    return Shelf(titles, [np.array(found) for found in kept], themes_of)
