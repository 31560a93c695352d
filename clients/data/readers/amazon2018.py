"""Amazon Reviews 2018 (Ni et al.): `X_5.json.gz` (or `X.json.gz`) beside `meta_X.json.gz`.

Reviews hold `reviewerID`, `asin`, `unixReviewTime`; metadata holds `asin`, `title`, `brand` and `category`,
a list. Scraped page source in a title counts as no title; a brand loses its leading "by". Metadata repeats
some items: the first row counts.
"""

from __future__ import annotations

import re
from pathlib import Path

from clients.data.readers._folder import amazon_stem, files_in, find_pair
from clients.data.readers._lines import bare_name, json_lines
from clients.data.readers._options import ReadOptions
from clients.data.readers._reviews import read_reviews
from clients.data.records import Issues, Items, Place, Records, clean_text, parse_id

NAME = "amazon2018"
_BY = re.compile(r"^by\s+", re.IGNORECASE)


def _is_reviews(name: str) -> bool:
    return name.endswith(".json") and not name.startswith(("meta_", "reviews_"))


def _is_meta(name: str) -> bool:
    return name.startswith("meta_") and name.endswith(".json")


def matches(path: Path) -> bool:
    """Whether `path` is an `X.json` with `meta_X.json` beside it, or a folder with such a pair."""
    names = [bare_name(p) for p in files_in(path)]
    stems = {amazon_stem(name) for name in names if _is_meta(name)}
    candidates = names if path.is_dir() else [bare_name(path)]
    return any(_is_reviews(name) and amazon_stem(name) in stems for name in candidates)


def read(path: Path, issues: Issues, options: ReadOptions) -> Records:
    """Read both files; metadata of items that nobody touched is skipped."""
    pair = find_pair(path, options.items, is_interactions=_is_reviews, is_items=_is_meta, stem=amazon_stem)
    builder = read_reviews(pair.interactions, issues, options, ("reviewerID", "asin", "unixReviewTime"))
    items = Items(pair.items.name)
    for number, row in json_lines(pair.items, issues, options.report):
        item = parse_id(row.get("asin"))
        if item is None:
            issues.add("corrupt-lines", Place(pair.items.name, number), "asin is missing or no id")
            continue
        attributes = {
            "title": clean_text(row.get("title")),
            "brand": _BY.sub("", clean_text(row.get("brand"))),
            "category": clean_text(row.get("category")),
        }
        items.add(item, attributes, number, builder.items)
    return Records(NAME, builder.build(), items, (pair.interactions, pair.items))
