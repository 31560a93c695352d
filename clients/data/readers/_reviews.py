"""The part that the three Amazon releases share: reviews as JSON lines, one object each."""

from __future__ import annotations

from pathlib import Path

from clients.data.readers._lines import json_lines
from clients.data.readers._options import ReadOptions
from clients.data.records import InteractionsBuilder, Issues, Place, parse_id, parse_time


def add_row(
    builder: InteractionsBuilder, issues: Issues, place: Place, raw: tuple[object, object, object], names: str
) -> None:
    """Check user, item and time of one row and add it; `names` says how the fields are called."""
    user, item, time = parse_id(raw[0]), parse_id(raw[1]), parse_time(raw[2])
    if user is None or item is None:
        issues.add("corrupt-lines", place, f"user or item is missing or no id (fields {names})")
    elif time is None:
        issues.add("bad-times", place, f"bad timestamp (fields {names})")
    else:
        builder.add(user, item, time, place.line)


def read_reviews(
    path: Path, issues: Issues, options: ReadOptions, fields: tuple[str, str, str]
) -> InteractionsBuilder:
    """Interactions of a JSON-lines file whose objects hold `fields` (user, item, time)."""
    builder = InteractionsBuilder(path.name)
    names = ", ".join(fields)
    for number, row in json_lines(path, issues, options.report):
        place = Place(path.name, number)
        add_row(builder, issues, place, (row.get(fields[0]), row.get(fields[1]), row.get(fields[2])), names)
    return builder
