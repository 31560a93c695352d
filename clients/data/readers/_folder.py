"""Finding the two files of a source: the interactions, and the items beside them."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from clients.data.readers._lines import bare_name
from common.errors import DataError


@dataclass(frozen=True)
class Pair:
    """The file of interactions and the file of items."""

    interactions: Path
    items: Path


def files_in(path: Path) -> list[Path]:
    """The visible files of folder `path`, or of the folder that holds file `path`, sorted by name."""
    folder = path if path.is_dir() else path.parent
    return sorted(p for p in folder.iterdir() if p.is_file() and not p.name.startswith("."))


def one_of(candidates: list[Path], what: str, where: Path) -> Path:
    """The only candidate. Raises DataError when there is none, or more than one."""
    if len(candidates) == 1:
        return candidates[0]
    if not candidates:
        raise DataError(f"{where}: no {what} here", next_step="put both files in one folder, or pass --items")
    names = ", ".join(p.name for p in candidates[:4])
    raise DataError(
        f"{where}: {len(candidates)} files could be the {what}: {names}",
        next_step="name the interactions file itself, and the item file with --items",
    )


def find_pair(
    path: Path,
    items: Path | None,
    *,
    is_interactions: Callable[[str], bool],
    is_items: Callable[[str], bool],
    stem: Callable[[str], str],
) -> Pair:
    """Pair the interactions at `path` (file, or folder holding one) with the items of the same stem.

    The predicates and `stem` see names without `.gz`. `items`, when given, is taken as it is.
    """
    if path.is_dir():
        found = [p for p in files_in(path) if is_interactions(bare_name(p))]
        path = one_of(found, "interactions file", path)
    if items is None:
        candidates = [p for p in files_in(path) if is_items(bare_name(p)) and p != path]
        same = [p for p in candidates if stem(bare_name(p)) == stem(bare_name(path))]
        items = one_of(same or candidates, "item file", path.parent)
    return Pair(path, items)


def amazon_stem(name: str) -> str:
    """`reviews_Beauty_5.json`, `Beauty_5.json` and `meta_Beauty.json` all give `beauty`."""
    stem = re.sub(r"^(reviews|meta|ratings)_", "", name.split(".")[0])
    return re.sub(r"_\d+$", "", stem).lower()
