"""From records to a domain: which rows stay, and why the others go.

In order: items and interactions that are wrong (`Issues` decides: refuse or count), repeats, k-core, the
leave-one-out split. A source that comes already split keeps its split and its whole catalog, unless
`resplit` asks otherwise. Pure: nothing is read or written here.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from clients.data.domain import Domain
from clients.data.records import IntArray, Issues, Place, Records
from clients.data.split import MIN_HISTORY, Duplicates, k_core, keep_unrepeated, leave_one_out, time_order
from common.errors import DataError

DEFAULT_K = 5
DEFAULT_PUBLIC = ("title", "brand", "category")
BoolArray = npt.NDArray[np.bool_]


@dataclass(frozen=True)
class Settings:
    """How records become a domain; None means the default for that source.

    `k_core`: 5, or no filtering for a source that is already split. `public`: those of title, brand and
    category that have any text. `item_ids`: `opaque` publishes invented ids and keeps the owner's privately;
    `auto` does so when all ids are numbers, because numbers often follow the order of first purchase.
    """

    k_core: int | None = None
    public: tuple[str, ...] | None = None
    duplicates: Duplicates = "exact"
    resplit: bool = False
    item_ids: Literal["auto", "keep", "opaque"] = "auto"

    def __post_init__(self) -> None:
        if self.k_core is not None and self.k_core < 0:
            raise DataError("k-core must not be negative", next_step="pass --k-core 0 for no filtering")
        if self.public is not None and not self.public:
            raise DataError("no public attribute", next_step="pass --public title, for example")


@dataclass(frozen=True)
class Stage:
    """What is left after one step, and why the rest went."""

    name: str
    users: int
    items: int
    interactions: int


@dataclass(frozen=True)
class Assembled:
    """A domain, the stages that led to it, and public -> own item ids where they differ."""

    domain: Domain
    stages: tuple[Stage, ...]
    private_ids: Mapping[str, str] | None
    k_core: int


def text_columns(records: Records) -> tuple[str, ...]:
    """Attributes with any text among the items that interactions touch, in the order of the source."""
    used = set(records.interactions.item_ids)
    rows = [row for item, row in records.items.rows.items() if item in used]
    return tuple(name for name in records.items.names if any(name in row for row in rows))


def public_columns(records: Records, chosen: tuple[str, ...] | None) -> tuple[str, ...]:
    """The public attributes. Raises DataError when one chosen does not exist or none is left."""
    available = text_columns(records)
    for name in chosen or ():
        if name not in available:
            raise DataError(
                f"{records.items.file}: no attribute {name!r} with any text",
                next_step=f"choose --public among {', '.join(available) or '(there is none)'}",
            )
    public = chosen or tuple(name for name in DEFAULT_PUBLIC if name in available)
    if not public:
        raise DataError(
            f"{records.items.file}: none of {', '.join(DEFAULT_PUBLIC)} has any text",
            next_step=f"choose --public among {', '.join(available) or '(there is none)'}",
        )
    return public


def good_items(records: Records, public: tuple[str, ...], issues: Issues) -> BoolArray:
    """For each item code whether it is known and has a public text; the others go to `issues`."""
    table, items = records.interactions, records.items
    known_I = np.array([item in items.rows for item in table.item_ids], dtype=bool)
    rows = np.flatnonzero(~known_I[table.item_N])
    _add_all(issues, "unknown-items", [table.place(r) for r in rows[:5]], len(rows), _unknown(records))
    texted_I = np.array(
        [any(name in items.rows.get(item, {}) for name in public) for item in table.item_ids], dtype=bool
    )
    bare = [table.item_ids[i] for i in np.flatnonzero(known_I & ~texted_I)]
    places = sorted((items.place(item) for item in bare), key=lambda place: place.line)
    what = f"an item without text: {', '.join(public)} {'are all' if len(public) > 1 else 'is'} empty"
    _add_all(issues, "items-without-text", places[:5], len(places), what)
    return texted_I


def _unknown(records: Records) -> str:
    return f"an interaction with an item that {records.items.file} does not have"


def _add_all(issues: Issues, kind: str, places: list[Place], count: int, what: str) -> None:
    for at, place in enumerate(places):
        issues.add(kind, place, what, more=count - len(places) if at == len(places) - 1 else 0)


def assemble(name: str, records: Records, settings: Settings, issues: Issues) -> Assembled:
    """Build the domain. Raises DataError for what `issues` refuses, or when nothing is left."""
    public = public_columns(records, settings.public)
    good_I = good_items(records, public, issues)
    keep_split = records.presplit and not settings.resplit
    k = settings.k_core if settings.k_core is not None else (0 if keep_split else DEFAULT_K)
    if keep_split and k:
        raise DataError(
            "this source is already split, and a k-core would change its split",
            next_step="add --resplit to filter and split again, or leave --k-core out",
        )
    rows, stages = _filter(records, good_I, settings.duplicates, k, keep_split)
    if not len(rows):
        raise DataError(
            f"{records.interactions.file}: nothing is left after filtering",
            next_step=f"lower --k-core (now {k}), or see `isthmus data check` for what is dropped and why",
        )
    table = records.interactions
    split = leave_one_out(table.user_N[rows], table.item_N[rows])
    kept = np.flatnonzero(good_I) if keep_split else np.unique(table.item_N[rows])
    codes, ids, private = _name_items(records, kept, public, settings.item_ids)
    index_I = np.full(len(table.item_ids), -1, dtype=np.int32)
    index_I[codes] = np.arange(len(codes), dtype=np.int32)
    texts = [records.items.rows[table.item_ids[code]] for code in codes]
    domain = Domain(
        name=name,
        item_ids=ids,
        attributes={key: [text.get(key, "") for text in texts] for key in text_columns(records)},
        user_ids=[table.user_ids[user] for user in split.users],
        train=[index_I[history] for history in split.train],
        valid=index_I[split.valid],
        test=index_I[split.test],
        public_attributes=public,
    )
    return Assembled(domain, tuple(stages), private, k)


def _filter(
    records: Records, good_I: BoolArray, duplicates: Duplicates, k: int, keep_split: bool
) -> tuple[npt.NDArray[np.int64], list[Stage]]:
    """Rows that stay, sorted by user and time, and what was left after each step."""
    table = records.interactions
    rows = time_order(table.user_N, table.time_N)
    stages = [_stage("as read", table.user_N, table.item_N)]

    def narrow(keep: BoolArray, reason: str) -> None:
        nonlocal rows
        if not keep.all():
            rows = rows[keep]
            stages.append(_stage(reason, table.user_N[rows], table.item_N[rows]))

    narrow(good_I[table.item_N[rows]], "without interactions of unknown or textless items")
    if keep_split:
        unsplit = np.array(records.unsplit_users, dtype=np.int32)
        narrow(~np.isin(table.user_N[rows], unsplit), "without users that lack a validation or test item")
    else:
        keep = keep_unrepeated(table.user_N[rows], table.item_N[rows], table.time_N[rows], duplicates)
        narrow(keep, f"without repeats ({duplicates})")
    core = k_core(table.user_N[rows], table.item_N[rows], k_user=max(k, MIN_HISTORY), k_item=max(k, 1))
    what = f"{k}-core" if k > MIN_HISTORY else f"users with at least {max(k, MIN_HISTORY)} interactions"
    narrow(core.keep_N, f"{what}, {core.rounds} rounds")
    return rows, stages


def _stage(name: str, user_N: IntArray, item_N: IntArray) -> Stage:
    return Stage(name, len(np.unique(user_N)), len(np.unique(item_N)), len(user_N))


def _name_items(
    records: Records, kept: npt.NDArray[Any], public: tuple[str, ...], policy: str
) -> tuple[list[int], list[str], dict[str, str] | None]:
    """Codes of the kept items in their final order, their public ids, and public -> own where invented."""
    own = records.interactions.item_ids
    if policy == "auto":
        policy = "opaque" if all(own[code].isdecimal() for code in kept) else "keep"
    if policy == "keep":
        codes = sorted(kept.tolist(), key=lambda code: own[code])
        return codes, [own[code] for code in codes], None

    def text(code: int) -> tuple[str, ...]:
        row = records.items.rows[own[code]]
        return (*(row.get(name, "") for name in public), own[code])

    codes = sorted(kept.tolist(), key=text)
    ids = [f"item-{number:0{len(str(len(codes)))}d}" for number in range(1, len(codes) + 1)]
    return codes, ids, {public_id: own[code] for public_id, code in zip(ids, codes, strict=True)}
