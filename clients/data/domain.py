"""The canonical domain folder: what every other part of the client reads, whatever the source was.

    domain.json        schema, name, counts, public attributes, synthetic or not, where it came from
    items.parquet      `item_id` and one string column an attribute; row order = item index
    sequences.parquet  `user_id`, `train` list<int32> in time order, `valid` and `test` int32 item indices

The folder never leaves its owner; only `Domain.catalog()` does, with the public attributes alone. Item
indices are ordered by item id, never by first appearance: that order would tell who bought what next.
"""

from __future__ import annotations

import errno
import itertools
import json
import os
import shutil
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq

from common.catalog import Catalog, check_items, check_name
from common.errors import DataError, StorageError
from common.files import replace_folder

SCHEMA_VERSION = 1
_FILES = ("domain.json", "items.parquet", "sequences.parquet")
_SEQUENCES = pa.schema(
    [("user_id", pa.string()), ("train", pa.list_(pa.int32())), ("valid", pa.int32()), ("test", pa.int32())]
)
IntArray = npt.NDArray[np.int32]


@dataclass(frozen=True)
class Domain:
    """One domain, split: I items with texts, U users with `train` histories, `valid` and `test` items.

    `provenance` is free JSON about the source (format, settings, digests of the files). Raises DataError
    when indices, lengths or names do not fit together.
    """

    name: str
    item_ids: list[str]
    attributes: dict[str, list[str]]
    user_ids: list[str]
    train: list[IntArray]
    valid: IntArray
    test: IntArray
    public_attributes: tuple[str, ...]
    synthetic: bool = False
    provenance: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        check_name(self.name)
        check_items(self.item_ids, self.attributes)
        missing = [name for name in self.public_attributes if name not in self.attributes]
        if missing or not self.public_attributes:
            raise DataError(
                f"public attribute {missing[0]!r} is no attribute" if missing else "no public attribute",
                next_step=f"choose among {', '.join(self.attributes)}",
            )
        users = len(self.user_ids)
        if not users or not (users == len(self.train) == len(self.valid) == len(self.test)):
            raise DataError(f"domain {self.name!r}: no users, or histories and users differ in number")
        if len(set(self.user_ids)) != users:
            raise DataError(f"domain {self.name!r}: a user id occurs twice")
        if not min(len(history) for history in self.train):
            raise DataError(f"domain {self.name!r}: a user has an empty training history")
        flat = np.concatenate([*self.train, self.valid, self.test])
        if int(flat.min()) < 0 or int(flat.max()) >= len(self.item_ids):
            raise DataError(f"domain {self.name!r}: an item index is outside 0..{len(self.item_ids) - 1}")

    @property
    def interactions(self) -> int:
        """Number of interactions, validation and test included."""
        return sum(len(history) for history in self.train) + 2 * len(self.user_ids)

    def counts(self) -> dict[str, int]:
        """Users, items and interactions."""
        return {
            "users": len(self.user_ids),
            "items": len(self.item_ids),
            "interactions": self.interactions,
        }

    def catalog(self) -> Catalog:
        """The public catalog: public attributes only. Raises DataError if an item then has no text."""
        return Catalog(
            self.name, list(self.item_ids), {name: self.attributes[name] for name in self.public_attributes}
        )

    def subsample(self, users: int, seed: int) -> Domain:
        """`users` users drawn without replacement (seeded), and only the items that they touch, reindexed.

        The order of users and items is kept. With at least as many users as there are, the domain itself.
        """
        if users < 1:
            raise DataError("a subsample needs at least one user", next_step="pass --users 1 or more")
        if users >= len(self.user_ids):
            return self
        rows = np.sort(np.random.default_rng(seed).choice(len(self.user_ids), size=users, replace=False))
        train = [self.train[row] for row in rows]
        kept = np.unique(np.concatenate([*train, self.valid[rows], self.test[rows]]))
        index_I = np.full(len(self.item_ids), -1, dtype=np.int32)
        index_I[kept] = np.arange(len(kept), dtype=np.int32)
        return replace(
            self,
            item_ids=[self.item_ids[i] for i in kept],
            attributes={name: [column[i] for i in kept] for name, column in self.attributes.items()},
            user_ids=[self.user_ids[row] for row in rows],
            train=[index_I[history] for history in train],
            valid=index_I[self.valid[rows]],
            test=index_I[self.test[rows]],
            provenance={**self.provenance, "subsample": {"users": users, "seed": seed}},
        )

    def save(self, folder: Path, *, private_ids: Mapping[str, str] | None = None) -> None:
        """Write the folder atomically: it appears complete, or nothing changes.

        An existing domain folder is replaced; any other non-empty folder is refused. `private_ids` (public
        item id -> the owner's own) is kept in `item_ids.parquet` when public ids are opaque. Raises
        DataError or StorageError.
        """
        folder = folder.absolute()
        _refuse_foreign(folder)
        temporary = folder.with_name(f".{folder.name}.{os.getpid()}.tmp")
        try:
            folder.parent.mkdir(parents=True, exist_ok=True)
            shutil.rmtree(temporary, ignore_errors=True)
            temporary.mkdir()
            self._write(temporary, private_ids)
            replace_folder(temporary, folder)
        except StorageError:
            raise
        except OSError as err:
            full = err.errno == errno.ENOSPC
            raise StorageError(
                f"{folder}: cannot write: {'the disk is full' if full else err.strerror or 'I/O error'}",
                next_step="free space or choose another folder; nothing was changed",
            ) from None
        finally:
            shutil.rmtree(temporary, ignore_errors=True)

    def _write(self, folder: Path, private_ids: Mapping[str, str] | None) -> None:
        record = {
            "schema": SCHEMA_VERSION,
            "name": self.name,
            "synthetic": self.synthetic,
            "public_attributes": list(self.public_attributes),
            "counts": self.counts(),
            "provenance": dict(self.provenance),
        }
        text = json.dumps(record, indent=2, sort_keys=True) + "\n"
        (folder / "domain.json").write_text(text, encoding="utf-8")
        columns = {"item_id": self.item_ids, **self.attributes}
        schema = pa.schema([(name, pa.string()) for name in columns])
        _write_table(pa.table(columns, schema=schema), folder / "items.parquet")
        values = {"user_id": self.user_ids, "train": self.train, "valid": self.valid, "test": self.test}
        _write_table(pa.table(values, schema=_SEQUENCES), folder / "sequences.parquet")
        if private_ids is not None:
            ids = {"item_id": list(private_ids), "source_id": list(private_ids.values())}
            _write_table(pa.table(ids), folder / "item_ids.parquet")
        for path in folder.iterdir():
            _fsync(path)

    @classmethod
    def load(cls, folder: Path) -> Domain:
        """Read a domain folder. Raises DataError naming the file that is missing or wrong."""
        for name in _FILES:
            if not (folder / name).is_file():
                raise DataError(
                    f"{folder}: not a domain folder, {name} is missing",
                    next_step="make one with `isthmus data prepare`",
                )
        record = _read_record(folder / "domain.json")
        items = _read_table(folder / "items.parquet", None)
        sequences = _read_table(folder / "sequences.parquet", _SEQUENCES)
        try:
            attributes = {name: items.column(name).to_pylist() for name in items.column_names}
            user_ids = sequences.column("user_id").to_pylist()
        except UnicodeDecodeError:
            raise DataError(f"{folder}: a cell is not valid UTF-8", next_step="prepare it again") from None
        lists = sequences.column("train").combine_chunks()
        if lists.values.null_count:
            raise DataError(f"{folder}: a training history holds an empty cell", next_step="prepare it again")
        flat, offsets = np.array(lists.values.to_numpy()), lists.offsets.to_numpy()
        try:
            return cls(
                name=record["name"],
                item_ids=attributes.pop("item_id", []),
                attributes=attributes,
                user_ids=user_ids,
                train=[flat[a:b] for a, b in itertools.pairwise(offsets)],
                valid=np.array(sequences.column("valid").to_numpy()),
                test=np.array(sequences.column("test").to_numpy()),
                public_attributes=tuple(record["public_attributes"]),
                synthetic=record["synthetic"],
                provenance=record["provenance"],
            )
        except DataError as err:
            raise DataError(f"{folder}: {err.message}", next_step="prepare this domain again") from None


def _read_record(path: Path) -> dict[str, Any]:
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, OSError, RecursionError):
        record = None
    kinds = {"name": str, "synthetic": bool, "public_attributes": list, "provenance": dict}
    if not isinstance(record, dict) or record.get("schema") != SCHEMA_VERSION:
        raise DataError(f"{path}: not JSON of schema {SCHEMA_VERSION}", next_step="prepare this domain again")
    for key, kind in kinds.items():
        if not isinstance(record.get(key), kind):
            raise DataError(f"{path}: {key!r} must be a {kind.__name__}", next_step="prepare it again")
    if not all(isinstance(name, str) for name in record["public_attributes"]):
        raise DataError(f"{path}: 'public_attributes' must be names", next_step="prepare it again")
    return record


def _read_table(path: Path, schema: pa.Schema | None) -> pa.Table:
    """Read Parquet; with no `schema` every column must be a string. No nulls anywhere."""
    try:
        table = pq.read_table(path)
        names = table.column_names
    except (pa.ArrowException, OSError, UnicodeDecodeError):
        raise DataError(f"{path}: not readable Parquet", next_step="prepare this domain again") from None
    if schema is None:
        schema = pa.schema([(name, pa.string()) for name in names])
    if not table.schema.equals(schema):
        raise DataError(f"{path}: columns or types are not the expected", next_step="prepare it again")
    if any(column.null_count for column in table.columns):
        raise DataError(f"{path}: a cell is empty", next_step="prepare this domain again")
    return table


def _write_table(table: pa.Table, path: Path) -> None:
    pq.write_table(table, path, compression="zstd")


def _refuse_foreign(folder: Path) -> None:
    if folder.is_file() or (
        folder.is_dir() and any(folder.iterdir()) and not (folder / "domain.json").is_file()
    ):
        raise DataError(
            f"{folder}: exists and is not a domain folder", next_step="choose another --out folder"
        )


def _fsync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
