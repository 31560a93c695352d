"""RecBole atomic files: `X.inter` and `X.item`, tab-separated, with a typed header (`user_id:token`).

Types are `token`, `token_seq`, `float` and `float_seq`. Text columns of `.item` become attributes; the
usual names are mapped (`item_name` or `movie_title` -> title, `categories`, `genre` or `class` ->
category). The order is the `timestamp` column. Files in the `item_id_list` benchmark form are refused.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

from clients.data.readers._folder import files_in, find_pair
from clients.data.readers._lines import bare_name, text_lines
from clients.data.readers._options import ReadOptions
from clients.data.readers._reviews import add_row
from clients.data.records import InteractionsBuilder, Issues, Items, Place, Records, clean_text, parse_id
from common.errors import DataError

NAME = "recbole"
_TYPES = ("token", "token_seq", "float", "float_seq")
_ALIASES = {
    "name": "title", "item_name": "title", "movie_title": "title", "product_title": "title",
    "store": "brand", "manufacturer": "brand", "categories": "category", "genre": "category",
    "genres": "category", "class": "category", "tags": "category",
}  # fmt: skip


def matches(path: Path) -> bool:
    """Whether `path` is an `.inter` file, or a folder with one."""
    names = [bare_name(p) for p in files_in(path)] if path.is_dir() else [bare_name(path)]
    return any(name.endswith(".inter") for name in names)


def read(path: Path, issues: Issues, options: ReadOptions) -> Records:
    """Read both files; items that nobody touched are skipped."""
    pair = find_pair(
        path,
        options.items,
        is_interactions=lambda name: name.endswith(".inter"),
        is_items=lambda name: name.endswith(".item"),
        stem=lambda name: name.split(".")[0],
    )
    builder = InteractionsBuilder(pair.interactions.name)
    wanted = ("user_id", "item_id", "timestamp")
    for number, row in _rows(pair.interactions, issues, options, wanted):
        place = Place(pair.interactions.name, number)
        add_row(builder, issues, place, (row[wanted[0]], row[wanted[1]], row[wanted[2]]), ", ".join(wanted))
    items = Items(pair.items.name)
    for number, row in _rows(pair.items, issues, options, ("item_id",)):
        item = parse_id(row.pop("item_id"))
        if item is None:
            issues.add("corrupt-lines", Place(pair.items.name, number), "item_id is empty or no id")
            continue
        items.add(item, {name: clean_text(text) for name, text in row.items()}, number, builder.items)
    return Records(NAME, builder.build(), items, (pair.interactions, pair.items))


def _rows(
    path: Path, issues: Issues, options: ReadOptions, required: tuple[str, ...]
) -> Iterator[tuple[int, dict[str, str]]]:
    """Rows with the required columns and, for items, every text column under its mapped name."""
    columns: dict[str, int] = {}
    width = 0
    for number, line in text_lines(path, issues, options.report):
        fields = line.split("\t")
        if not columns:
            columns, width = _header(path, number, fields, required), len(fields)
        elif len(fields) != width:
            what = f"{len(fields)} fields, the header has {width}"
            issues.add("corrupt-lines", Place(path.name, number), what)
        else:
            yield number, {name: fields[at] for name, at in columns.items()}
    if not columns:
        raise DataError(f"{path.name}: empty", next_step="fetch or copy the file again")


def _header(path: Path, number: int, fields: list[str], required: tuple[str, ...]) -> dict[str, int]:
    columns: dict[str, int] = {}
    for at, field in enumerate(fields):
        name, _, kind = field.strip().partition(":")
        if kind not in _TYPES:
            raise DataError(
                f"{path.name}:{number}: column {at + 1} of the header has no type",
                next_step="write each as name:type, with a type of " + ", ".join(_TYPES),
            )
        if name in required:
            columns[name] = at
        elif "item_id" in required and len(required) == 1 and kind.startswith("token"):
            plain = re.sub(r"[^a-z0-9_]", "_", name.lower()).lstrip("_0123456789")[:40] or f"column{at}"
            columns.setdefault(_ALIASES.get(plain, plain), at)
    missing = [name for name in required if name not in columns]
    if missing:
        raise DataError(
            f"{path.name}:{number}: no column {missing[0]!r}",
            next_step="atomic files need user_id, item_id and timestamp; use --format columns for others",
        )
    return columns
