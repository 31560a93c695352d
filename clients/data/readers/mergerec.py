"""MergeRec release folders, or a `.tar`/`.tar.gz` of one: already numbered, already split.

`meta_data.json` (item key -> title, brand, category), `smap.json` (item key -> number), `umap.json` (user
key -> number), and `train.json`, `val.json`, `test.json` (user number -> item numbers). The split is kept:
each user's sequence is train, then the validation item, then the test item. Keys of `meta_data.json` beyond
`smap.json` are ignored. Users without a validation or test item cannot be evaluated and are left out.
An archive is read member by member and never unpacked.
"""

from __future__ import annotations

import gzip
import tarfile
import zlib
from pathlib import Path, PurePosixPath
from typing import Any

from clients.data.readers._lines import json_document
from clients.data.readers._options import ReadOptions
from clients.data.records import InteractionsBuilder, Issues, Items, Place, Records, clean_text, parse_id
from common.errors import DataError

NAME = "mergerec"
_PARTS = ("train.json", "val.json", "test.json")
_FILES = ("meta_data.json", "smap.json", "umap.json", *_PARTS)
_ATTRIBUTES = ("title", "brand", "category")
_MAX_MEMBER_BYTES = 8 * 2**30


def matches(path: Path) -> bool:
    """Whether `path` is a folder with `smap.json` and `meta_data.json`, or a tar archive."""
    if path.is_dir():
        return (path / "smap.json").is_file() and (path / "meta_data.json").is_file()
    return path.name.endswith((".tar.gz", ".tgz", ".tar"))


def read(path: Path, issues: Issues, options: ReadOptions) -> Records:
    """Read the six files; `time_N` is the position in the user's sequence."""
    data = _read_folder(path) if path.is_dir() else _read_archive(path)
    documents: dict[str, dict[str, Any]] = {}
    for step, name in enumerate(_FILES):
        options.report(phase=f"read {path.name}", step=step, total=len(_FILES))
        document = json_document(data.pop(name), name)
        if not isinstance(document, dict):
            raise DataError(f"{name}:1: not a JSON object", next_step="check that this is a MergeRec folder")
        documents[name] = document
    options.report(phase=f"read {path.name}", step=len(_FILES), total=len(_FILES))
    keys = _inverse(documents["smap.json"], "smap.json")
    users = _inverse(documents["umap.json"], "umap.json")
    builder = InteractionsBuilder("train.json", unit="entry")
    builder.items.update({key: number for number, key in enumerate(keys)})
    unsplit = _read_sequences(documents, users, keys, builder, issues)
    files = (path,) if not path.is_dir() else tuple(path / name for name in _FILES)
    items = _read_items(documents["meta_data.json"], documents["smap.json"])
    if items.unused:
        issues.note(f"meta_data.json: {items.unused} keys are not in smap.json and were ignored")
    return Records(NAME, builder.build(), items, files, presplit=True, unsplit_users=unsplit)


def _read_items(meta: dict[str, Any], smap: dict[str, Any]) -> Items:
    items = Items("meta_data.json", unit="entry")
    for entry, (key, value) in enumerate(meta.items(), start=1):
        if not isinstance(value, dict):
            raise DataError(
                f"meta_data.json: entry {entry} is not an object", next_step="check that it is MergeRec data"
            )
        attributes = {name: clean_text(value.get(name)) for name in _ATTRIBUTES}
        items.add(key.strip(), attributes, entry, smap)
    return items


def _read_sequences(
    documents: dict[str, dict[str, Any]],
    users: list[str],
    keys: list[str],
    builder: InteractionsBuilder,
    issues: Issues,
) -> tuple[int, ...]:
    """Add every interaction; returns the codes of users without a validation or test item."""
    train, valid, test = (documents[name] for name in _PARTS)
    unsplit: list[int] = []
    for entry, user in enumerate(train, start=1):
        number = _number(user, len(users))
        if number is None:
            raise DataError(
                f"train.json: the key of entry {entry} is no user number of umap.json",
                next_step="check that the files belong together",
            )
        parts = [(name, part.get(user, [])) for name, part in zip(_PARTS, (train, valid, test), strict=True)]
        if not parts[1][1] or not parts[2][1]:
            unsplit.append(builder.users.setdefault(users[number], len(builder.users)))
        position = 0
        for name, part in parts:
            _check_part(part, name, entry)
            for value in part:
                item = _number(value, len(keys))
                if item is None:
                    what = "an item number that is not in smap.json"
                    issues.add("unknown-items", Place(name, entry, unit="entry"), what)
                    continue
                builder.add(users[number], keys[item], float(position), entry)
                position += 1
    for name, part in zip(_PARTS[1:], (valid, test), strict=True):
        if not set(part) <= set(train):
            raise DataError(
                f"{name}: a user that train.json does not have",
                next_step="check that the files belong together",
            )
    return tuple(unsplit)


def _check_part(part: object, name: str, entry: int) -> None:
    if not isinstance(part, list) or (name != "train.json" and len(part) > 1):
        expected = "a list" if name == "train.json" else "a list of one item number"
        raise DataError(
            f"{name}: the value of train.json's entry {entry} is not {expected}",
            next_step="check that this is leave-one-out data as MergeRec publishes it",
        )


def _inverse(mapping: dict[str, Any], name: str) -> list[str]:
    """number -> key. Raises DataError unless the numbers are exactly 0..n-1 and the keys are ids."""
    keys = [""] * len(mapping)
    for entry, (key, number) in enumerate(mapping.items(), start=1):
        at, text = _number(number, len(keys)), parse_id(key)
        if at is None or text is None or keys[at]:
            raise DataError(
                f"{name}: entry {entry} has an empty key, or a number that is repeated or not in 0..n-1",
                next_step="write the mapping again",
            )
        keys[at] = text
    return keys


def _number(value: object, limit: int) -> int | None:
    if isinstance(value, str) and len(value) < 20 and value.isascii() and value.isdigit():
        value = int(value)
    if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value < limit:
        return None
    return value


def _read_folder(path: Path) -> dict[str, bytes]:
    data = {}
    for name in _FILES:
        try:
            data[name] = (path / name).read_bytes()
        except OSError as err:
            raise DataError(
                f"{path / name}: cannot read: {err.strerror}", next_step="copy it again"
            ) from None
    return data


def _read_archive(path: Path) -> dict[str, bytes]:
    """The six files by base name, from one folder of the archive; nothing is unpacked to disk."""
    data: dict[str, bytes] = {}
    parents = set()
    try:
        with tarfile.open(path, "r:*") as archive:
            for member in archive:
                name = PurePosixPath(member.name).name
                if not member.isfile() or name not in _FILES:
                    continue
                parents.add(PurePosixPath(member.name).parent)
                if name in data or len(parents) > 1 or member.size > _MAX_MEMBER_BYTES:
                    raise DataError(
                        f"{path.name}: {name} is there twice, in several folders, or too large",
                        next_step="make an archive of one domain's folder",
                    )
                file = archive.extractfile(member)
                data[name] = file.read() if file else b""
    except (tarfile.TarError, EOFError, OSError, gzip.BadGzipFile, zlib.error):
        raise DataError(f"{path}: cannot read as an archive", next_step="fetch or copy it again") from None
    missing = [name for name in _FILES if name not in data]
    if missing:
        raise DataError(f"{path.name}: {missing[0]} is not in it", next_step="see the MergeRec layout")
    return data
