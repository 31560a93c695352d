"""Ranking prompts from pseudo-users: histories and candidates made of catalogs alone, without any label.

A pseudo-user of a domain has a history of items from its catalog, and candidates drawn from the rest. Its
history is one item (MergeRec), random items, or rolled out: from a random item on, a chooser - the domain's
own adapter - picks the next item among as many candidates as the prompt will have, and its last pick stands
among the final candidates, at a random place, as a real next item does in a real prompt. Nobody's choice is
known, so no prompt has a target. Equal seeds give equal prompts.

Titles that read alike count as one item: an answer could not tell them apart.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Literal

import numpy as np

from common.catalog import Catalog
from common.errors import DataError
from common.language.records import Ranking, title_key

Histories = Literal["one-item", "random", "rolled-out"]
Choose = Callable[[str, Sequence[Ranking]], list[int]]  # (domain, rankings) -> number of the candidate picked


def pseudo_rankings(
    catalogs: Mapping[str, Catalog],
    count: int,
    *,
    candidates: int,
    histories: Histories = "random",
    history_items: int = 5,
    seed: int = 0,
    choose: Choose | None = None,
) -> dict[str, list[Ranking]]:
    """`count` pseudo-users over all domains, as evenly as it goes: domain -> rankings without target.

    A history has 1 to `history_items` items (one, for "one-item"). `choose` picks for "rolled-out". Raises
    DataError naming the domain whose catalog has no titles, or too few for `candidates` and a history.
    """
    longest = 1 if histories == "one-item" else history_items
    found: dict[str, list[Ranking]] = {}
    for index, (domain, catalog) in enumerate(sorted(catalogs.items())):
        own = count // len(catalogs) + (index < count % len(catalogs))
        titles = _titles(catalog, longest + candidates)
        generator = np.random.default_rng([seed, index])
        lengths = generator.integers(1, longest + 1, own)
        drawn = [generator.permutation(len(titles)).tolist() for _ in range(own)]
        if histories == "rolled-out":
            if choose is None:
                raise DataError(
                    "rolled-out pseudo-users need a model that chooses", next_step="give `choose`"
                )
            found[domain] = _rolled_out(
                domain, titles, drawn, lengths.tolist(), candidates, choose, generator
            )
        else:
            found[domain] = [
                _ranking(domain, titles, order[:length], order[length : length + candidates])
                for order, length in zip(drawn, lengths, strict=True)
            ]
    return found


def _rolled_out(
    domain: str,
    titles: Sequence[str],
    drawn: Sequence[list[int]],
    lengths: Sequence[int],
    candidates: int,
    choose: Choose,
    generator: np.random.Generator,
) -> list[Ranking]:
    """Each history grown from its first item by `choose`; what it picks beyond the history is a candidate."""
    rows = [order[:1] for order in drawn]  # the history and, at the end, the last pick
    for length in range(1, max(lengths, default=0) + 1):
        growing = [user for user, wanted in enumerate(lengths) if wanted >= length]
        offered = [_others(len(titles), rows[user], candidates, generator) for user in growing]
        asked = [_ranking(domain, titles, rows[u], offer) for u, offer in zip(growing, offered, strict=True)]
        for user, offer, pick in zip(growing, offered, choose(domain, asked), strict=True):
            rows[user] = [*rows[user], offer[pick]]
    found = []
    for *history, last in rows:
        others = [*_others(len(titles), [*history, last], candidates - 1, generator), last]
        order = generator.permutation(candidates)
        found.append(_ranking(domain, titles, history, [others[place] for place in order]))
    return found


def _others(items: int, without: Sequence[int], count: int, generator: np.random.Generator) -> list[int]:
    free = np.setdiff1d(np.arange(items), np.array(without))
    chosen: list[int] = generator.choice(free, count, replace=False).tolist()
    return chosen


def _ranking(
    domain: str, titles: Sequence[str], history: Sequence[int], candidates: Sequence[int]
) -> Ranking:
    return Ranking(
        f"pseudo-{domain}", tuple(titles[i] for i in history), tuple(titles[i] for i in candidates), None
    )


def _titles(catalog: Catalog, needed: int) -> list[str]:
    """The distinct titles of a catalog, in its order."""
    column = catalog.attributes.get("title")
    if column is None:
        raise DataError(
            f"domain {catalog.domain!r}: its catalog has no attribute `title`, of which prompts are made",
            next_step="ask its owner to publish titles, or use a method that needs no prompts",
        )
    titles = list({title_key(title): title for title in reversed(column) if title.strip()}.values())[::-1]
    if len(titles) < needed:
        raise DataError(
            f"domain {catalog.domain!r}: its catalog has {len(titles)} different titles, history and "
            f"candidates take {needed}",
            next_step="lower instruction.candidates or history_items, or leave the domain out",
        )
    return titles
