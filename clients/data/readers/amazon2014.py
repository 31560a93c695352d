"""Amazon Reviews 2014 (McAuley): `reviews_X_5.json.gz` beside `meta_X.json.gz`.

Reviews hold `reviewerID`, `asin`, `unixReviewTime`; metadata lines are Python dicts rather than JSON, with
`asin`, `title`, `brand` and `categories`, a list of paths, of which the longest counts (the first of
equals).
"""

from __future__ import annotations

from pathlib import Path

from clients.data.readers._folder import amazon_stem, files_in, find_pair
from clients.data.readers._lines import bare_name, json_lines
from clients.data.readers._options import ReadOptions
from clients.data.readers._reviews import read_reviews
from clients.data.records import Issues, Items, Place, Records, clean_text, parse_id

NAME = "amazon2014"


def _is_reviews(name: str) -> bool:
    return name.startswith("reviews_") and name.endswith(".json")


def _is_meta(name: str) -> bool:
    return name.startswith("meta_") and name.endswith(".json")


def matches(path: Path) -> bool:
    """Whether `path` is a `reviews_*.json` file, or a folder with one."""
    names = [bare_name(p) for p in files_in(path)] if path.is_dir() else [bare_name(path)]
    return any(map(_is_reviews, names))


def read(path: Path, issues: Issues, options: ReadOptions) -> Records:
    """Read both files; metadata of items that nobody touched is skipped."""
    pair = find_pair(path, options.items, is_interactions=_is_reviews, is_items=_is_meta, stem=amazon_stem)
    builder = read_reviews(pair.interactions, issues, options, ("reviewerID", "asin", "unixReviewTime"))
    items = Items(pair.items.name)
    for number, row in json_lines(pair.items, issues, options.report, python_literals=True):
        item = parse_id(row.get("asin"))
        if item is None:
            issues.add("corrupt-lines", Place(pair.items.name, number), "asin is missing or no id")
            continue
        attributes = {
            "title": clean_text(row.get("title")),
            "brand": clean_text(row.get("brand")),
            "category": clean_text(longest_path(row.get("categories"))),
        }
        items.add(item, attributes, number, builder.items)
    return Records(NAME, builder.build(), items, (pair.interactions, pair.items))


def longest_path(value: object) -> object:
    """The longest of several category paths (the first of equals); a flat list is one path."""
    paths = [p for p in value if isinstance(p, list)] if isinstance(value, list) else []
    return max(paths, key=len) if paths else value
