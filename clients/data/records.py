"""What every reader returns: interactions and items, with the place in the files that each came from.

Readers turn a source into `Records`; everything after (check, k-core, split) knows only these. Whatever
is wrong with a row goes to `Issues`, which either refuses at once (`prepare`) or counts (`check`, or kinds
that the owner asked to drop). Places name file, line and column; never an id or a row's content.
"""

from __future__ import annotations

import html
import re
from array import array
from collections.abc import Container, Iterable
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path

import numpy as np
import numpy.typing as npt

from common.catalog import MAX_TEXT_CHARS, UNPRINTABLE
from common.errors import DataError

IntArray = npt.NDArray[np.int32]
TimeArray = npt.NDArray[np.float64]

# kind of problem -> what to do about it (the flag that leaves such rows out is added)
KINDS = {
    "corrupt-lines": "mend or remove that line",
    "bad-times": "mend that timestamp (a number, or ISO 8601)",
    "unknown-items": "add the item to the item file",
    "items-without-text": "give the item a title, or publish an attribute that it has (--public)",
}
MAX_PLACES = 5
MAX_ID_CHARS = 256
_TAG = re.compile(r"</?[A-Za-z][^<>]*>")
_MARKUP = re.compile(r"<[A-Za-z/!][^>]*$|\bvar aPageStart\b|\{\s*(?:color|background)[^}]*\}")


@dataclass(frozen=True)
class Place:
    """Where something was read: a file and a 1-based line (or row, or entry), perhaps a column."""

    file: str
    line: int
    column: int | None = None
    unit: str = "line"

    def __str__(self) -> str:
        if self.unit != "line":
            return f"{self.file}: {self.unit} {self.line}"
        return f"{self.file}:{self.line}" + (f":{self.column}" if self.column else "")


class Issues:
    """Problems of one source: kinds in `tolerated` are counted, any other raises DataError at once."""

    def __init__(self, tolerated: Iterable[str] = ()) -> None:
        self.tolerated = frozenset(tolerated)
        unknown = sorted(self.tolerated - set(KINDS))
        if unknown:
            raise DataError(
                f"no such kind of problem: {unknown[0]!r}", next_step=f"kinds are {', '.join(KINDS)}"
            )
        self.counts: dict[str, int] = {}
        self.places: dict[str, list[str]] = {}
        self.notes: list[str] = []

    def add(self, kind: str, place: Place, what: str, *, more: int = 0) -> None:
        """Record one problem (and `more` alike); `what` describes it without repeating content."""
        if kind not in self.tolerated:
            raise DataError(f"{place}: {what}", next_step=f"{KINDS[kind]}, or leave such out: --drop {kind}")
        self.counts[kind] = self.counts.get(kind, 0) + 1 + more
        places = self.places.setdefault(kind, [])
        if len(places) < MAX_PLACES:
            places.append(str(place))

    def note(self, text: str) -> None:
        """Something harmless that the owner should know."""
        self.notes.append(text)


@dataclass(frozen=True)
class Interactions:
    """N interactions in file order: codes into `user_ids` and `item_ids`, time, and line of each.

    `time_N` is seconds or whatever number orders the file; only its order is used. Ties keep file order.
    """

    user_ids: list[str]
    item_ids: list[str]
    user_N: IntArray
    item_N: IntArray
    time_N: TimeArray
    line_N: IntArray
    file: str
    unit: str = "line"

    def __len__(self) -> int:
        return len(self.user_N)

    def place(self, row: int) -> Place:
        """Where interaction `row` was read."""
        return Place(self.file, int(self.line_N[row]), unit=self.unit)


class InteractionsBuilder:
    """Collects interactions one at a time, 20 bytes each; ids are stored once."""

    def __init__(self, file: str, unit: str = "line") -> None:
        self._file, self._unit = file, unit
        self.users: dict[str, int] = {}
        self.items: dict[str, int] = {}
        self._user, self._item, self._line = array("i"), array("i"), array("i")
        self._time = array("d")

    def add(self, user: str, item: str, time: float, line: int) -> None:
        """Append one interaction."""
        self._user.append(self.users.setdefault(user, len(self.users)))
        self._item.append(self.items.setdefault(item, len(self.items)))
        self._time.append(time)
        self._line.append(line)

    def build(self) -> Interactions:
        """The table. Raises DataError when there is not one interaction."""
        if not self._user:
            raise DataError(
                f"{self._file}: no interactions in it", next_step="check that this is the interactions file"
            )
        return Interactions(
            list(self.users),
            list(self.items),
            np.frombuffer(self._user, dtype=np.int32),
            np.frombuffer(self._item, dtype=np.int32),
            np.frombuffer(self._time, dtype=np.float64),
            np.frombuffer(self._line, dtype=np.int32),
            self._file,
            self._unit,
        )


@dataclass
class Items:
    """Item texts, by item id: `rows[item_id]` holds the non-empty attributes."""

    file: str
    unit: str = "line"
    rows: dict[str, dict[str, str]] = field(default_factory=dict)
    lines: dict[str, int] = field(default_factory=dict)
    names: dict[str, None] = field(default_factory=dict)
    unused: int = 0
    repeated: int = 0

    def add(self, item: str, attributes: dict[str, str], line: int, wanted: Container[str] | None) -> None:
        """Keep the first row of each item that is `wanted`; count the others."""
        self.names.update(dict.fromkeys(attributes))
        if wanted is not None and item not in wanted:
            self.unused += 1
        elif item in self.rows:
            self.repeated += 1
        else:
            self.rows[item] = {name: text for name, text in attributes.items() if text}
            self.lines[item] = line

    def place(self, item: str) -> Place:
        """Where the row of `item` was read."""
        return Place(self.file, self.lines[item], unit=self.unit)


@dataclass(frozen=True)
class Records:
    """One source, read: `presplit` means that each user's last two interactions already are its split.

    `unsplit_users` are codes of users in a presplit source who lack a validation or a test item.
    """

    format: str
    interactions: Interactions
    items: Items
    files: tuple[Path, ...]
    presplit: bool = False
    unsplit_users: tuple[int, ...] = ()


def clean_text(value: object) -> str:
    """One line of plain text: entities decoded, tags and page scripts removed, at most 1,000 characters.

    Lists are joined by ", "; None, NaN and anything that is not text or a number become "".
    """
    if isinstance(value, list | tuple):
        return _shorten(", ".join(filter(None, map(clean_text, value))))
    if isinstance(value, bool) or value is None or value != value:
        return ""
    if not isinstance(value, str | int | float):
        return ""
    text = html.unescape(html.unescape(str(value)))
    if "<" in text or "{" in text or "aPageStart" in text:
        text = _TAG.sub(" ", text)
        if _MARKUP.search(text):  # an unfinished tag or a script: scraped page, not a text
            return ""
    return _shorten(" ".join(UNPRINTABLE.sub(" ", text).split()))


def _shorten(text: str) -> str:
    if len(text) <= MAX_TEXT_CHARS:
        return text
    return text[:MAX_TEXT_CHARS].rsplit(" ", 1)[0]


def parse_id(value: object) -> str | None:
    """A user or item id as text, or None when it is absent, too long or not printable."""
    if isinstance(value, bool) or not isinstance(value, str | int):
        return None
    text = str(value).strip()
    return text if text and len(text) <= MAX_ID_CHARS and not UNPRINTABLE.search(text) else None


def parse_time(value: object) -> float | None:
    """A timestamp as a finite, non-negative number; ISO 8601 text counts as UTC seconds; None when bad."""
    if isinstance(value, bool):
        return None
    if isinstance(value, datetime):
        return value.replace(tzinfo=value.tzinfo or UTC).timestamp()
    if not isinstance(value, str | int | float):
        return None
    try:
        number = float(value)
    except OverflowError:
        return None
    except ValueError:
        try:
            moment = datetime.fromisoformat(str(value).strip())
        except ValueError:
            return None
        number = moment.replace(tzinfo=moment.tzinfo or UTC).timestamp()
    return number if 0 <= number < float("inf") else None
