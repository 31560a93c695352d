"""Plain tables with named columns: CSV, TSV, JSONL or Parquet; one file of interactions, one of items.

In a folder the two are `interactions.*` and `items.*`. Columns are found under their usual names, or named
by the owner. Without a time column the file's own order can be declared to be the time order. Every text
column of the item file is an attribute unless the owner maps them (`title=product_name`).
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from clients.data.readers._csv import csv_rows, header
from clients.data.readers._folder import files_in, find_pair
from clients.data.readers._lines import bare_name, json_lines
from clients.data.readers._options import ReadOptions
from clients.data.readers._reviews import add_row
from clients.data.records import InteractionsBuilder, Issues, Items, Place, Records, clean_text, parse_id
from common.catalog import ATTRIBUTE
from common.errors import DataError

NAME = "columns"
_SUFFIXES = (".csv", ".tsv", ".jsonl", ".parquet")
_USER = ("user_id", "user", "userid", "customer_id", "reviewerid")
_ITEM = ("item_id", "item", "itemid", "product_id", "parent_asin", "asin", "movieid")
_TIME = ("timestamp", "time", "unixreviewtime", "datetime", "date", "created_at")


def _is(name: str, stem: str) -> bool:
    return name.endswith(_SUFFIXES) and name.split(".")[0] == stem


def matches(path: Path) -> bool:
    """Whether `path` is a folder with `interactions.*` and `items.*`, or that interactions file."""
    names = [bare_name(p) for p in files_in(path)]
    here = path.is_dir() or _is(bare_name(path), "interactions")
    return here and any(_is(n, "interactions") for n in names) and any(_is(n, "items") for n in names)


def read(path: Path, issues: Issues, options: ReadOptions) -> Records:
    """Read both files; items that nobody touched are skipped."""
    pair = find_pair(
        path,
        options.items,
        is_interactions=lambda name: _is(name, "interactions"),
        is_items=lambda name: _is(name, "items"),
        stem=lambda name: "",
    )
    builder = _read_interactions(pair.interactions, issues, options)
    items = _read_items(pair.items, issues, options, builder)
    return Records(NAME, builder.build(), items, (pair.interactions, pair.items))


def _read_interactions(path: Path, issues: Issues, options: ReadOptions) -> InteractionsBuilder:
    names = _columns(path)
    user = _pick(path, names, options.user_column, _USER, "--user-column")
    item = _pick(path, names, options.item_column, _ITEM, "--item-column")
    time = None
    if not options.file_order:
        step = "--time-column, or --file-order if the rows already are in time order"
        time = _pick(path, names, options.time_column, _TIME, step)
    unit = _unit(path)
    builder = InteractionsBuilder(path.name, unit)
    label = ", ".join(filter(None, (user, item, time)))
    kinds = set()
    for number, row in _rows(path, issues, options, [user, item, *([time] if time else [])]):
        moment: object = number if time is None else row.get(time)
        if time is not None:
            kinds.add(_is_number(moment))
        raw = (row.get(user), row.get(item), moment)
        add_row(builder, issues, Place(path.name, number, unit=unit), raw, label)
    if len(kinds) > 1 and "bad-times" not in issues.tolerated:
        raise DataError(
            f"{path.name}: column {time!r} mixes numbers and dates, so it has no order",
            next_step="write all of them in one way",
        )
    return builder


def _read_items(path: Path, issues: Issues, options: ReadOptions, builder: InteractionsBuilder) -> Items:
    names = _columns(path)
    chosen = options.item_column if options.item_column in names else None
    item_column = _pick(path, names, chosen, _ITEM, "--item-column")
    attributes = dict(options.attributes) or {
        plain: name for name in names if name != item_column and (plain := _plain(name))
    }
    for name, column in attributes.items():
        if column not in names or not ATTRIBUTE.fullmatch(name):
            raise DataError(
                f"{path.name}: no column {column!r} for attribute {name!r}; there are {', '.join(names)}",
                next_step="write --attribute name=column, the name in lower case",
            )
    items = Items(path.name, unit=_unit(path))
    for number, row in _rows(path, issues, options, [item_column, *attributes.values()]):
        item = parse_id(row.get(item_column))
        if item is None:
            place = Place(path.name, number, unit=_unit(path))
            issues.add("corrupt-lines", place, f"{item_column} is missing or no id")
            continue
        texts = {name: clean_text(row.get(column)) for name, column in attributes.items()}
        items.add(item, texts, number, builder.items)
    return items


def _plain(name: str) -> str:
    return re.sub(r"[^a-z0-9_]+", "_", name.strip().lower()).lstrip("_0123456789")[:40]


def _pick(path: Path, names: Sequence[str], chosen: str | None, usual: Sequence[str], flag: str) -> str:
    """The chosen column, else the first usual name that is there (whatever its case)."""
    if chosen is not None and chosen in names:
        return chosen
    lower = {name.lower(): name for name in reversed(names)}
    found = next((lower[name] for name in usual if name in lower), None)
    if chosen is not None or found is None:
        what = f"no column {chosen!r}" if chosen is not None else f"none of the columns {', '.join(usual)}"
        raise DataError(
            f"{path.name}: {what}; there are {', '.join(names)}", next_step=f"name it with {flag}"
        )
    return found


def _is_number(value: object) -> bool:
    try:
        float(value)  # type: ignore[arg-type]
    except (TypeError, ValueError):
        return False
    return True


def _unit(path: Path) -> str:
    return "row" if path.name.endswith(".parquet") else "line"


def _columns(path: Path) -> list[str]:
    name = bare_name(path)
    if not path.is_file():
        raise DataError(f"{path}: no such file", next_step="check the path")
    if name.endswith((".csv", ".tsv")):
        return header(path)
    if name.endswith(".parquet"):
        with _parquet(path) as file:
            return [str(column) for column in file.schema_arrow.names]
    if name.endswith(".jsonl"):
        # Objects may leave absent keys out: the columns are those of the first thousand rows.
        seen: dict[str, None] = {}
        for count, (_, row) in enumerate(json_lines(path, Issues(("corrupt-lines",)))):
            seen.update(dict.fromkeys(row))
            if count >= 1000:
                break
        return list(seen)
    raise DataError(f"{path.name}: not a table", next_step=f"use a file that ends in {', '.join(_SUFFIXES)}")


def _rows(
    path: Path, issues: Issues, options: ReadOptions, columns: list[str]
) -> Iterator[tuple[int, dict[str, Any]]]:
    name = bare_name(path)
    if name.endswith((".csv", ".tsv")):
        yield from csv_rows(path, issues, options.report)
    elif name.endswith(".jsonl"):
        yield from json_lines(path, issues, options.report)
    else:
        yield from _parquet_rows(path, options, columns)


def _parquet(path: Path) -> pq.ParquetFile:
    try:
        return pq.ParquetFile(path)
    except (pa.ArrowException, OSError, UnicodeDecodeError):
        raise DataError(f"{path.name}: not readable Parquet", next_step="write or copy it again") from None


def _parquet_rows(
    path: Path, options: ReadOptions, columns: list[str]
) -> Iterator[tuple[int, dict[str, Any]]]:
    number = 0
    with _parquet(path) as file:
        total = file.metadata.num_rows
        try:
            for batch in file.iter_batches(columns=list(dict.fromkeys(columns))):
                for row in _plain_times(batch).to_pylist():
                    number += 1
                    yield number, row
                options.report(phase=f"read {path.name}", step=number, total=total)
        except (pa.ArrowException, OSError, UnicodeDecodeError):
            raise DataError(
                f"{path.name}: damaged after row {number}", next_step="write or copy it again"
            ) from None


def _plain_times(batch: pa.RecordBatch) -> pa.RecordBatch:
    """Timestamps and dates as the integers they are stored as: only their order matters."""
    for at, column in enumerate(batch.schema):
        if pa.types.is_timestamp(column.type) or pa.types.is_date64(column.type):
            batch = batch.set_column(at, column.name, batch.column(at).cast(pa.int64()))
        elif pa.types.is_date32(column.type):
            batch = batch.set_column(at, column.name, batch.column(at).cast(pa.int32()))
    return batch
