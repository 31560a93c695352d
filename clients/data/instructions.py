"""Instruction data from an owner's data: ranking tasks from a domain folder, questions from a TALLRec file.

A ranking task is one user's history and `candidates` titles: the item that the user took next, and others
that the user never had, in random order. Rules:

- protocol "warm": the next item of the split (leave-one-out). "cold": only those next items that occur in no
  training or validation sequence of anybody (for split "valid": in no training sequence);
- negatives are drawn evenly from the items with a title; none is in the user's history, validation or test,
  and no two candidates, and no candidate and item of the user, have the same title;
- everything is a function of seed, split and the user's row, so that fewer users are a part of more;
- what cannot be made is left out and counted (`RankingSet.left_out`), never silently.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import numpy.typing as npt

from clients.data.domain import Domain
from common.errors import DataError, suggest
from common.language.records import Ranking, YesNo, cut_title, title_key

Protocol = Literal["warm", "cold"]
Split = Literal["train", "valid", "test"]
_SPLITS: tuple[Split, ...] = ("train", "valid", "test")
_DRAW_AT_ONCE = 4


@dataclass(frozen=True)
class RankingSet:
    """Ranking tasks, and why users (for "train": positions) of the split have none.

    `left_out`: "not-cold" (the target occurs in a sequence), "no-title" (the target has none), "no-history"
    (no item of the history has a title), "few-candidates" (too few other titles that the user never had).
    """

    rankings: list[Ranking]
    left_out: dict[str, int]


def rankings_of(
    domain: Domain,
    split: Split,
    seed: int,
    candidates: int = 30,
    protocol: Protocol = "warm",
    *,
    history_items: int = 10,
    max_users: int | None = None,
    positions: Literal["all", "last"] = "last",
    title_words: int = 0,
) -> list[Ranking]:
    """The ranking tasks of `ranking_set`. Raises DataError where there is none."""
    return ranking_set(
        domain, split, seed, candidates, protocol, history_items=history_items, max_users=max_users,
        positions=positions, title_words=title_words,
    ).rankings  # fmt: skip


def ranking_set(
    domain: Domain,
    split: Split,
    seed: int,
    candidates: int = 30,
    protocol: Protocol = "warm",
    *,
    history_items: int = 10,
    max_users: int | None = None,
    positions: Literal["all", "last"] = "last",
    title_words: int = 0,
) -> RankingSet:
    """Ranking tasks of a domain, in the order of its users, and what was left out.

    `history_items` newest items of the history are kept. `max_users` is a seeded draw among the users whose
    target the protocol allows. `positions` is for split "train": every position of the training sequence from
    the second on, or only the last. `title_words` cuts titles to so many words (0: whole). The user of a
    ranking is the domain's own id: it stays here. Raises DataError where no task can be made.
    """
    if candidates < 2:
        raise DataError(f"{candidates} candidates are no choice", next_step="ask for 2 or more")
    if protocol == "cold" and split == "train":
        raise DataError("training targets are never cold", next_step='use protocol "warm" for split "train"')
    sampler = _Sampler(domain, title_words)
    targets = list(_targets(domain, split, positions))
    left_out: Counter[str] = Counter()
    if protocol == "cold":
        known_I = _occurring(domain, split)
        cold = [target for target in targets if not known_I[target.item]]
        left_out["not-cold"] = len(targets) - len(cold)
        targets = cold
    targets = _drawn(targets, max_users, seed)
    rankings = []
    for target in targets:
        found = sampler.ranking(target, seed, _SPLITS.index(split), candidates, history_items)
        if isinstance(found, str):
            left_out[found] += 1
        else:
            rankings.append(found)
    if not rankings:
        reasons = ", ".join(f"{count} {reason}" for reason, count in sorted(left_out.items())) or "no users"
        raise DataError(
            f"domain {domain.name!r}: no {protocol} ranking task in split {split!r} ({reasons})",
            next_step="ask for fewer candidates, use the other protocol, or check the titles",
        )
    return RankingSet(rankings, {reason: count for reason, count in left_out.items() if count})


def read_tallrec(path: Path) -> list[YesNo]:
    """The questions of a TALLRec file: a JSON list of objects with `instruction`, `input` and `output`.

    `output` is "Yes." or "No.". The file names no users, so each question is its own user here. Raises
    DataError naming the entry, never its content.
    """
    try:
        entries = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise DataError(f"{path}: no such file", next_step="check the path") from None
    except (ValueError, RecursionError):
        raise DataError(f"{path}: not JSON", next_step="obtain the file again") from None
    if not isinstance(entries, list) or not entries:
        raise DataError(
            f"{path}: not a list of questions, or an empty one", next_step="obtain the file again"
        )
    return [_question(path, row, entry) for row, entry in enumerate(entries)]


def _question(path: Path, row: int, entry: object) -> YesNo:
    keys = ("instruction", "input", "output")
    if not isinstance(entry, dict) or not all(isinstance(entry.get(key), str) for key in keys):
        raise DataError(
            f"{path}: entry {row} lacks a text in {', '.join(keys)}", next_step="obtain the file again"
        )
    answer = {"yes": True, "no": False}.get(entry["output"].strip().rstrip(".").lower())
    if answer is None:
        raise DataError(
            f"{path}: the output of entry {row} is neither Yes nor No", next_step="mend that entry"
        )
    text = "\n".join(part.strip() for part in (entry["instruction"], entry["input"]) if part.strip())
    if not text:
        raise DataError(f"{path}: entry {row} asks nothing", next_step="mend that entry")
    return YesNo(str(row), text, answer)


@dataclass(frozen=True)
class _Target:
    """Item `item` that user `user` took after `history`."""

    user: int
    item: int
    history: npt.NDArray[np.int32]


def _targets(domain: Domain, split: Split, positions: Literal["all", "last"]) -> Iterator[_Target]:
    for user, train in enumerate(domain.train):
        if split == "test":
            yield _Target(user, int(domain.test[user]), np.append(train, domain.valid[user]))
        elif split == "valid":
            yield _Target(user, int(domain.valid[user]), train)
        else:
            first = 1 if positions == "all" else max(1, len(train) - 1)
            for position in range(first, len(train)):
                yield _Target(user, int(train[position]), train[:position])


def _occurring(domain: Domain, split: Split) -> npt.NDArray[np.bool_]:
    """True for items in a training sequence, and for split "test" in a validation item, too."""
    known_I = np.zeros(len(domain.item_ids), dtype=bool)
    known_I[np.concatenate(domain.train)] = True
    if split == "test":
        known_I[domain.valid] = True
    return known_I


def _drawn(targets: list[_Target], max_users: int | None, seed: int) -> list[_Target]:
    users = sorted({target.user for target in targets})
    if max_users is None or max_users >= len(users):
        return targets
    kept = set(np.random.default_rng([seed, len(users)]).permutation(users)[:max_users].tolist())
    return [target for target in targets if target.user in kept]


class _Sampler:
    """Titles and their keys, and the items that may be drawn."""

    def __init__(self, domain: Domain, title_words: int) -> None:
        if "title" not in domain.attributes:
            raise DataError(
                f"domain {domain.name!r} has no attribute 'title' to rank by",
                next_step=f"prepare it with titles; {suggest('title', domain.attributes)}",
            )
        self.domain = domain
        self.titles = [cut_title(title, title_words) for title in domain.attributes["title"]]
        self.keys = [title_key(title) for title in self.titles]
        self.drawable = np.flatnonzero([bool(key) for key in self.keys])

    def ranking(
        self, target: _Target, seed: int, split: int, candidates: int, history_items: int
    ) -> Ranking | str:
        """The task of one target, or why there is none."""
        history = [int(item) for item in target.history if self.keys[item]][-history_items:]
        if not self.keys[target.item]:
            return "no-title"
        if not history:
            return "no-history"
        rng = np.random.default_rng([seed, split, target.user, len(target.history)])
        negatives = self._negatives(target, candidates - 1, rng)
        if len(negatives) < candidates - 1:
            return "few-candidates"
        place = int(rng.integers(candidates))
        items = [*negatives[:place], target.item, *negatives[place:]]
        return Ranking(
            self.domain.user_ids[target.user],
            tuple(self.titles[item] for item in history),
            tuple(self.titles[item] for item in items),
            place,
        )

    def _negatives(self, target: _Target, wanted: int, rng: np.random.Generator) -> list[int]:
        own = (*self.domain.train[target.user], self.domain.valid[target.user], self.domain.test[target.user])
        taken = {self.keys[item] for item in own}
        found: list[int] = []
        for item in self._order(wanted, rng):
            if len(found) == wanted:
                break
            if self.keys[item] not in taken:
                taken.add(self.keys[item])
                found.append(int(item))
        return found

    def _order(self, wanted: int, rng: np.random.Generator) -> Iterator[int]:
        """Drawable items at random: a few at first, all of them where these did not do."""
        if _DRAW_AT_ONCE * wanted < len(self.drawable):
            yield from rng.choice(self.drawable, size=_DRAW_AT_ONCE * wanted, replace=False)
        yield from rng.permutation(self.drawable)
