"""A model's catalog for methods that look at items: Parquet as `isthmus data prepare` writes it, or CSV.

A CSV file is UTF-8 and has a header: `item_id`, and one or more attributes in lower case (`title`). An empty
cell is an attribute that the item lacks. The rules for ids and texts are those of `common.catalog`.
"""

from __future__ import annotations

import csv
import re
from pathlib import Path

from common.catalog import Catalog
from common.errors import DataError


def read_catalog(path: Path) -> Catalog:
    """The catalog in `path`. Raises DataError naming the file, and line or row."""
    if path.suffix.lower() != ".csv":
        return Catalog.read(path)
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            reader = csv.reader(file, strict=True)
            header, rows = next(reader, []), []
            for row in reader:
                if row and len(row) != len(header):
                    raise _refusal(path, f"line {reader.line_num} has {len(row)} cells, not {len(header)}")
                rows += [row] if row else []
    except FileNotFoundError:
        raise DataError(f"{path}: no such catalog", next_step="check the path") from None
    except (csv.Error, UnicodeDecodeError) as err:
        raise _refusal(path, f"is not CSV in UTF-8: {err}") from None
    if "item_id" not in header or len(set(header)) != len(header):
        raise _refusal(path, "its header has no item_id, or a name twice")
    columns = {name: [row[place] for row in rows] for place, name in enumerate(header)}
    name = re.sub(r"[^a-z0-9_-]", "-", path.stem.lower()).lstrip("0123456789_-")[:40] or "items"
    try:
        return Catalog(name, columns.pop("item_id"), columns)
    except DataError as err:
        raise _refusal(path, err.message) from None


def _refusal(path: Path, what: str) -> DataError:
    return DataError(
        f"{path}: {what}", next_step="give a header `item_id,title`, and one line with a text for each item"
    )
