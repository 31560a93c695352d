"""Amazon Reviews 2023 (Hou et al.): `X.jsonl` or ratings `X.csv`, beside `meta_X.jsonl`, plain or gzip.

Interactions hold `user_id`, `parent_asin`, `timestamp` (milliseconds); metadata holds `parent_asin`,
`title`, `store`, `categories`, `main_category` and `details`, whose `Brand` wins over `store`.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from clients.data.readers._csv import csv_rows
from clients.data.readers._folder import amazon_stem, files_in, find_pair
from clients.data.readers._lines import bare_name, json_lines
from clients.data.readers._options import ReadOptions
from clients.data.readers._reviews import add_row, read_reviews
from clients.data.records import (
    InteractionsBuilder,
    Issues,
    Items,
    Place,
    Records,
    clean_text,
    parse_id,
)

NAME = "amazon2023"
_FIELDS = ("user_id", "parent_asin", "timestamp")


def _is_reviews(name: str) -> bool:
    return name.endswith((".jsonl", ".csv")) and not name.startswith("meta_")


def _is_meta(name: str) -> bool:
    return name.startswith("meta_") and name.endswith(".jsonl")


def matches(path: Path) -> bool:
    """Whether `path` is an `X.jsonl` or `X.csv` with `meta_X.jsonl` beside it, or a folder with such."""
    names = [bare_name(p) for p in files_in(path)]
    stems = {amazon_stem(name) for name in names if _is_meta(name)}
    candidates = names if path.is_dir() else [bare_name(path)]
    return any(_is_reviews(name) and amazon_stem(name) in stems for name in candidates)


def read(path: Path, issues: Issues, options: ReadOptions) -> Records:
    """Read both files; metadata of items that nobody touched is skipped."""
    pair = find_pair(path, options.items, is_interactions=_is_reviews, is_items=_is_meta, stem=amazon_stem)
    if bare_name(pair.interactions).endswith(".csv"):
        builder = _read_ratings(pair.interactions, issues, options)
    else:
        builder = read_reviews(pair.interactions, issues, options, _FIELDS)
    items = Items(pair.items.name)
    for number, row in json_lines(pair.items, issues, options.report):
        item = parse_id(row.get("parent_asin"))
        if item is None:
            issues.add("corrupt-lines", Place(pair.items.name, number), "parent_asin is missing or no id")
            continue
        items.add(item, _attributes(row), number, builder.items)
    return Records(NAME, builder.build(), items, (pair.interactions, pair.items))


def _attributes(row: dict[str, Any]) -> dict[str, str]:
    details = row.get("details")
    brand = clean_text(details.get("Brand")) if isinstance(details, dict) else ""
    main = clean_text(row.get("main_category"))
    return {
        "title": clean_text(row.get("title")),
        "brand": brand or clean_text(row.get("store")),
        "category": clean_text(row.get("categories")) or main,
        "main_category": main,
    }


def _read_ratings(path: Path, issues: Issues, options: ReadOptions) -> InteractionsBuilder:
    builder = InteractionsBuilder(path.name)
    names = ", ".join(_FIELDS)
    for number, row in csv_rows(path, issues, options.report, required=_FIELDS):
        raw = (row[_FIELDS[0]], row[_FIELDS[1]], row[_FIELDS[2]])
        add_row(builder, issues, Place(path.name, number), raw, names)
    return builder
