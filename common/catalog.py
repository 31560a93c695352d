"""The public item catalog: the only rows about items that ever leave an owner.

A catalog is one Parquet file: `item_id` and one string column for each public attribute, one row an
item, row order = item index. Reading is strict, because the file may come from another party:

- the columns are plain strings without nulls; no other type, no nesting, no stray metadata;
- item ids are non-empty and unique; every item has at least one non-empty attribute;
- names, lengths, row count and uncompressed size are bounded before anything is decoded.

    >>> catalog = Catalog("kitchen", ["a"], {"title": ["oak spoon"], "brand": [""]})
    >>> catalog.texts(("title", "brand"))
    [['title: oak spoon']]
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from common.errors import DataError, StorageError

SCHEMA_VERSION = "1"
MAX_ITEMS = 5_000_000
MAX_ATTRIBUTES = 64
MAX_TEXT_CHARS = 1000
MAX_ITEM_ID_CHARS = 256
MAX_UNCOMPRESSED_BYTES = 4 * 2**30
MAX_EXPANSION, FREE_BYTES = 100, 64 << 20  # texts may be that many times the file, and always so much
CELL_BYTES = 64  # of a text in memory, beside its letters
BATCH_ROWS = 1 << 14

NAME = re.compile(r"[a-z][a-z0-9_-]{0,39}")
ATTRIBUTE = re.compile(r"[a-z][a-z0-9_]{0,39}")
# Control characters, invisible and direction-changing ones, lone surrogates: never part of a text here.
UNPRINTABLE = re.compile("[\x00-\x1f\x7f-\x9f\u200b-\u200f\u2028-\u202e\u2060-\u206f\ufeff\ud800-\udfff]")
_VERSION_KEY, _DOMAIN_KEY = b"isthmus.catalog", b"isthmus.domain"


@dataclass(frozen=True)
class Catalog:
    """Items of one domain: `item_ids` (I) and `attributes`, each a column of I strings ("" = absent).

    Raises DataError when a rule of the module docstring is broken.
    """

    domain: str
    item_ids: list[str]
    attributes: dict[str, list[str]]

    def __post_init__(self) -> None:
        check_name(self.domain)
        check_items(self.item_ids, self.attributes)

    def __len__(self) -> int:
        return len(self.item_ids)

    def texts(self, attributes: Sequence[str]) -> list[list[str]]:
        """For each item its non-empty `"key: value"` strings, in the order of `attributes`.

        Attributes that this catalog lacks are left out (MergeRec sec. 2: key-value flattening). Raises
        DataError when an item has no text in any of them: it could not be embedded.
        """
        names = [name for name in attributes if name in self.attributes]
        columns = [self.attributes[name] for name in names]
        rows = [
            [f"{name}: {column[i]}" for name, column in zip(names, columns, strict=True) if column[i]]
            for i in range(len(self.item_ids))
        ]
        empty = next((i for i, row in enumerate(rows) if not row), None)
        if empty is not None:
            raise DataError(
                f"catalog of {self.domain!r}: item in row {empty} has no text in {', '.join(attributes)}",
                next_step=f"use attributes that the catalog has: {', '.join(self.attributes)}",
            )
        return rows

    def write(self, path: Path) -> None:
        """Write the catalog as Parquet (zstd; the same rows give the same bytes)."""
        columns = {"item_id": self.item_ids, **self.attributes}
        schema = pa.schema(
            [pa.field(name, pa.string(), nullable=False) for name in columns],
            metadata={_VERSION_KEY: SCHEMA_VERSION, _DOMAIN_KEY: self.domain},
        )
        try:
            pq.write_table(pa.table(columns, schema=schema), path, compression="zstd")
        except OSError as err:
            raise StorageError(
                f"{path}: cannot write the catalog: {err.strerror or 'input/output error'}",
                next_step="free space or choose another folder",
            ) from None

    @classmethod
    def read(cls, path: Path) -> Catalog:
        """Read and verify `path`. Raises DataError naming the file and the first broken rule."""
        try:
            with pq.ParquetFile(path) as file:
                _check_size(file.metadata, path)
                domain = _check_schema(file.schema_arrow, path)
                names = list(file.schema_arrow.names)
            columns = _read_columns(path, names)
        except FileNotFoundError:
            raise DataError(f"{path}: no such catalog", next_step="check the path") from None
        except (pa.ArrowException, OSError, UnicodeDecodeError):
            raise _refusal(path, "not a readable Parquet file") from None
        try:
            return cls(domain, columns.pop("item_id"), columns)
        except DataError as err:
            raise _refusal(path, err.message) from None


def check_name(name: str) -> None:
    """Raises DataError unless `name` is a lower-case word of letters, digits, `-` and `_`."""
    if not NAME.fullmatch(name):
        raise DataError(
            "a domain's name must be 1 to 40 lower-case letters, digits, '-' or '_', a letter first",
            next_step="choose a name such as 'kitchen' or 'toys-2018'",
        )


def check_items(item_ids: Sequence[str], attributes: Mapping[str, Sequence[str]]) -> None:
    """Raises DataError (naming the row, never its content) unless ids and attributes are well-formed."""
    if not item_ids:
        raise DataError("no items")
    if len(item_ids) > MAX_ITEMS or len(attributes) > MAX_ATTRIBUTES:
        raise DataError(f"more than {MAX_ITEMS} items or {MAX_ATTRIBUTES} attributes")
    if not attributes:
        raise DataError("no attribute columns", next_step="publish at least one attribute, e.g. title")
    for name, column in attributes.items():
        if not ATTRIBUTE.fullmatch(name) or name == "item_id":
            raise DataError(f"attribute name {name[:40]!r} is not a lower-case word")
        if len(column) != len(item_ids):
            raise DataError(f"attribute {name!r} has {len(column)} rows, expected {len(item_ids)}")
        _check_strings(column, MAX_TEXT_CHARS, f"attribute {name!r}")
    _check_strings(item_ids, MAX_ITEM_ID_CHARS, "item_id")
    seen: set[str] = set()
    for row, item_id in enumerate(item_ids):
        if not item_id or item_id in seen:
            raise DataError(f"item_id in row {row} is {'repeated' if item_id else 'empty'}")
        seen.add(item_id)
    for row, values in enumerate(zip(*attributes.values(), strict=True)):
        if not any(values):
            raise DataError(
                f"the item in row {row} has no text: {', '.join(attributes)} are all empty",
                next_step="give it a text, or leave the item out",
            )


def _check_strings(column: Sequence[str], max_chars: int, what: str) -> None:
    for row, value in enumerate(column):
        if not isinstance(value, str):
            raise DataError(f"{what} in row {row} is not a string")
        if len(value) > max_chars:
            raise DataError(f"{what} in row {row} is longer than {max_chars} characters")
        if UNPRINTABLE.search(value):
            raise DataError(f"{what} in row {row} holds a control or invisible character")


def _check_size(metadata: pq.FileMetaData, path: Path) -> None:
    groups = [metadata.row_group(i) for i in range(metadata.num_row_groups)]
    if metadata.num_rows > MAX_ITEMS or sum(g.total_byte_size for g in groups) > MAX_UNCOMPRESSED_BYTES:
        raise _refusal(path, f"larger than {MAX_ITEMS} rows or {MAX_UNCOMPRESSED_BYTES} bytes unpacked")


def _read_columns(path: Path, names: list[str]) -> dict[str, list[str]]:
    """Every column, batch by batch: the size of each is known before its texts are made.

    Repeated texts take next to nothing in the file, so a small one could otherwise fill the memory.
    """
    columns: dict[str, list[str]] = {name: [] for name in names}
    left_bytes = max(FREE_BYTES, MAX_EXPANSION * path.stat().st_size)
    with pq.ParquetFile(path, read_dictionary=names) as file:
        for batch in file.iter_batches(BATCH_ROWS):
            if any(column.null_count or column.dictionary.null_count for column in batch.columns):
                raise _refusal(path, "a cell is null; an absent value is an empty string")
            try:
                batch.validate(full=True)
                for name, column in zip(names, batch.columns, strict=True):
                    lengths_B = pc.binary_length(column.dictionary).take(column.indices)
                    left_bytes -= CELL_BYTES * len(column) + (pc.sum(lengths_B).as_py() or 0)
                    if left_bytes < 0:
                        raise _refusal(path, f"unpacks to more than {MAX_EXPANSION} times its size")
                    columns[name] += column.dictionary_decode().to_pylist()
            except (pa.ArrowInvalid, UnicodeDecodeError):
                raise _refusal(path, "a cell is not valid UTF-8") from None
    return columns


def _check_schema(schema: pa.Schema, path: Path) -> str:
    """Verify names, types and metadata; returns the domain's name."""
    names = list(schema.names)
    if not names or names[0] != "item_id" or len(set(names)) != len(names):
        raise _refusal(path, "the first column must be item_id and no name may occur twice")
    for field in schema:
        if field.type != pa.string() or field.metadata or not ATTRIBUTE.fullmatch(field.name):
            raise _refusal(
                path, f"column {field.name[:40]!r} is not a plain string column of a lower-case name"
            )
    metadata = dict(schema.metadata or {})
    domain: str = metadata.pop(_DOMAIN_KEY, b"").decode("ascii", errors="replace")
    if metadata.pop(_VERSION_KEY, b"").decode("ascii", errors="replace") != SCHEMA_VERSION or metadata:
        raise _refusal(path, f"not a catalog of schema version {SCHEMA_VERSION}, or with stray metadata")
    return domain


def _refusal(path: Path, what: str) -> DataError:
    return DataError(f"{path}: {what}", next_step="ask its owner to write the catalog anew")
