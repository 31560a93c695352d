"""Append-only logs: the ledger of what crossed, and the journal of what was done.

One entry a line, canonical JSON with its index and the hash of the line before, so that an edit, a gap
or a swap shows at the next reading. An append holds a file lock (several processes share a log), is
fsynced before it returns, and either is there or is not: a line that a crash cut short is removed by
the next append, a line that the disk did not take is taken back at once. Damage anywhere else raises
LedgerError with the line's number; a log is never repaired by guessing.

`Ledger` and `Journal` are two views of such a log. Write to them before you send or start anything.
A ledger's lines are also the leaves of a Merkle tree (`common.merkle`): its root says in 32 bytes what
the whole ledger is, and anyone who has two roots can be proven that nothing between them was changed.

    >>> from tempfile import mkdtemp
    >>> journal = Journal(Path(mkdtemp()) / "journal.jsonl")
    >>> journal.put("trained/demo", {"steps": 3})
    >>> journal.get("trained/demo")
    {'steps': 3}
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import re
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, Literal

from common import canonical, merkle
from common.errors import LedgerError, ParcelError
from common.files import fsync_folder, sha256_bytes, storage_errors, write_all
from common.statements import DIGEST_PATTERN, TreeHead

NO_ENTRY = "0" * 64
LINE_BYTES = 2 * canonical.MAX_BYTES


@dataclass(frozen=True)
class Entry:
    """One entry; `digest` is the SHA-256 of its line, which the next line repeats as `prev`."""

    index: int
    prev: str
    body: dict[str, Any]
    digest: str


class AppendOnlyLog:
    """A chain of entries in one file, shared between threads and processes."""

    def __init__(self, path: Path) -> None:
        """Open `path`, made if missing. Raises LedgerError when an entry does not follow from the last."""
        self.path = path
        self._entries: list[Entry] = []
        self._read_bytes = 0
        self._guard = threading.RLock()
        self._held = 0
        with storage_errors(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o600)
            os.close(descriptor)
            fsync_folder(path.parent)
        with self.locked():
            pass

    def __len__(self) -> int:
        return len(self._entries)

    def __getitem__(self, index: int) -> Entry:
        return self._entries[index]

    def __iter__(self) -> Iterator[Entry]:
        return iter(self._entries[:])

    @property
    def last_digest(self) -> str:
        """The digest that the next entry will repeat as `prev`."""
        return self._entries[-1].digest if self._entries else NO_ENTRY

    @contextlib.contextmanager
    def locked(self) -> Iterator[None]:
        """Hold this log against all other threads and processes; what they wrote has been read."""
        with self._guard:
            if self._held:
                self._held += 1
                try:
                    yield
                finally:
                    self._held -= 1
                return
            descriptor = os.open(self.path, os.O_RDWR)
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX)
                self._held = 1
                self._descriptor = descriptor
                if os.fstat(descriptor).st_size != self._read_bytes:
                    self.refresh()
                if os.fstat(descriptor).st_size > self._read_bytes:
                    os.ftruncate(descriptor, self._read_bytes)  # the line that a crash cut short
                    os.fsync(descriptor)
                yield
            finally:
                self._held = 0
                os.close(descriptor)

    def append(self, body: dict[str, Any]) -> Entry:
        """Add `body` durably. Raises StorageError when the disk is full (then nothing was added)."""
        with self.locked():
            index, prev = len(self._entries), self.last_digest
            line = entry_line(index, prev, body)
            try:
                with storage_errors(self.path):
                    os.lseek(self._descriptor, self._read_bytes, os.SEEK_SET)
                    write_all(self._descriptor, line + b"\n")
                    os.fsync(self._descriptor)
            except BaseException:
                os.ftruncate(self._descriptor, self._read_bytes)
                raise
            entry = Entry(index, prev, body, sha256_bytes(line))
            self._accept(entry, line)
            return entry

    def refresh(self) -> None:
        """Read what other processes appended. Raises LedgerError at the first damaged line."""
        with self._guard, self.path.open("rb") as source:
            if os.fstat(source.fileno()).st_size < self._read_bytes:
                raise LedgerError(
                    f"{self.path}: shorter than it was: entries below index {len(self)} are gone",
                    next_step="restore the file; a log must never shrink",
                )
            source.seek(self._read_bytes)
            while (line := source.readline(LINE_BYTES + 1)).endswith(b"\n"):
                self._accept(self._check(line[:-1]), line[:-1])

    def _accept(self, entry: Entry, line: bytes) -> None:
        self._entries.append(entry)
        self._read_bytes += len(line) + 1

    def _check(self, line: bytes) -> Entry:
        index = len(self._entries)
        try:
            return read_entry(line, index, self.last_digest)
        except LedgerError as err:
            raise LedgerError(
                f"{self.path}: line {index + 1} (index {index}): {err.message}",
                next_step="restore the file from a copy; it was edited or damaged",
            ) from None


def entry_line(index: int, prev: str, body: dict[str, Any]) -> bytes:
    """The bytes of an entry as they stand in the file, without the newline: what is hashed."""
    try:
        return canonical.encode({"body": body, "index": index, "prev": prev}, max_bytes=LINE_BYTES)
    except ParcelError as err:
        raise LedgerError(f"this entry cannot be recorded: {err.message}") from None


def read_entry(line: bytes, index: int, prev: str) -> Entry:
    """The entry in `line`, without its newline, at `index` after the entry with digest `prev`.

    Raises LedgerError saying what is wrong with it.
    """
    try:
        record = canonical.decode(line, max_bytes=LINE_BYTES)
    except ParcelError as err:
        raise LedgerError(err.message) from None
    if not isinstance(record, dict) or set(record) != {"body", "index", "prev"}:
        raise LedgerError("not an entry")
    if record["index"] != index or record["prev"] != prev:
        raise LedgerError("does not follow from the entry before it")
    return Entry(index, prev, record["body"], sha256_bytes(line))


def lines(path: Path) -> Iterator[bytes]:
    """The lines of a log's file, newlines included; one that is too long to be an entry comes in pieces."""
    with path.open("rb") as source:
        while line := source.readline(LINE_BYTES + 1):
            yield line


def walk(path: Path) -> Iterator[tuple[Entry, bytes]]:
    """The entries of a log's file and their lines, without opening it for writing or repairing it.

    Raises LedgerError at the first line that is not the next entry, also where it is only cut short.
    """
    prev = NO_ENTRY
    for index, line in enumerate(lines(path)):
        if not line.endswith(b"\n"):
            raise LedgerError("the line is cut short")
        entry = read_entry(line[:-1], index, prev)
        prev = entry.digest
        yield entry, line[:-1]


@dataclass(frozen=True)
class Crossing:
    """One thing that crossed, or was about to: the fields of a ledger entry."""

    direction: Literal["in", "out"]
    channel: Literal["control", "data"]
    type: Literal["parcel", "receipt", "message", "checkpoint", "keys"]
    digest: str  # SHA-256 of the bytes that crossed; a parcel's is its envelope's, a checkpoint's its note's
    size_bytes: int  # payload included
    peer: str
    kind: str
    run: str
    verdict: str = ""  # "accepted", or the reason code of a refusal; empty while it is not known
    time_s: int = 0

    def body(self) -> dict[str, Any]:
        """The entry's body."""
        return dict(vars(self))

    @classmethod
    def of_checkpoint(cls, direction: Literal["in", "out"], peer: str, note: str, size: int) -> Crossing:
        """A checkpoint that came in or is about to leave; `size` bytes with its proof."""
        return cls(
            direction=direction,
            channel="data",
            type="checkpoint",
            digest=sha256_bytes(note.encode()),
            size_bytes=size,
            peer=peer,
            kind="checkpoint",
            run="",
            verdict="accepted" if direction == "in" else "",
        )

    @classmethod
    def of_keys(cls, direction: Literal["in", "out"], peer: str, rotation: bytes) -> Crossing:
        """A change of keys (`common.rotation`)."""
        return cls(
            direction=direction,
            channel="data",
            type="keys",
            digest=sha256_bytes(rotation),
            size_bytes=len(rotation),
            peer=peer,
            kind="keys",
            run="",
            verdict="accepted" if direction == "in" else "",
        )

    @classmethod
    def read(cls, body: Any) -> Crossing:
        """From an entry's body. Raises LedgerError unless it has exactly these fields, well formed."""
        types = {field.name: int if field.type == "int" else str for field in fields(cls)}
        if not isinstance(body, dict) or set(body) != set(types):
            raise LedgerError("not a crossing: other fields than a ledger has")
        if any(type(body[name]) is not wanted for name, wanted in types.items()):
            raise LedgerError("not a crossing: a field of another type")
        found = cls(**body)
        known = (
            found.direction in ("in", "out"),
            found.channel == ("control" if found.type == "message" else "data"),
            found.type in ("parcel", "receipt", "message", "checkpoint", "keys"),
            re.fullmatch(DIGEST_PATTERN, found.digest),
            found.size_bytes >= 0,
            found.time_s >= 0,
        )
        if not all(known):
            raise LedgerError("not a crossing: a value that no crossing has")
        return found


class Ledger(AppendOnlyLog):
    """What crossed. An entry is written before the bytes move, so it may claim too much, never too little."""

    def __init__(self, path: Path) -> None:
        self._first: dict[tuple[str, str, str, str], int] = {}
        self._tree = merkle.Tree()
        super().__init__(path)

    def tree_head(self, size: int | None = None) -> TreeHead:
        """Size and root of the first `size` entries (None: of all). Raises ProofError beyond the end."""
        with self._guard:
            size = len(self._tree) if size is None else size
            return TreeHead(size=size, root=self._tree.root(size).hex())

    def inclusion(self, index: int, size: int) -> list[bytes]:
        """The proof that entry `index` is among the first `size` (`common.merkle`)."""
        with self._guard:
            return self._tree.inclusion(index, size)

    def consistency(self, old: int, size: int) -> list[bytes]:
        """The proof that the first `size` entries begin with the first `old`."""
        with self._guard:
            return self._tree.consistency(old, size)

    def snapshot(self) -> bytes:
        """The file as it is now."""
        with self.locked():
            return self.path.read_bytes()

    def place(self, index: int) -> dict[str, Any]:
        """Where entry `index` is, as the fields of a receipt: `index`, `prev`, `checkpoint`, `proof`."""
        size = index + 1
        return {
            "index": index,
            "prev": self[index].prev,
            "checkpoint": self.tree_head(size),
            "proof": tuple(node.hex() for node in self.inclusion(index, size)),
        }

    def record(self, crossing: Crossing) -> Entry:
        """Append `crossing`; `time_s` 0 means now. Raises StorageError when the disk is full."""
        body = crossing.body()
        body["time_s"] = crossing.time_s or int(time.time())
        return self.append(body)

    def record_once(self, crossing: Crossing) -> Entry:
        """As `record`, but the same bytes in the same direction to or from the same peer count once."""
        with self.locked():
            index = self._first.get(_identity(crossing.body()))
            return self[index] if index is not None else self.record(crossing)

    def _accept(self, entry: Entry, line: bytes) -> None:
        if isinstance(entry.body, dict):
            self._first.setdefault(_identity(entry.body), entry.index)
        self._tree.append(merkle.leaf_hash(line))
        super()._accept(entry, line)


def _identity(body: dict[str, Any]) -> tuple[str, str, str, str]:
    return (
        str(body.get("direction")),
        str(body.get("digest")),
        str(body.get("peer")),
        str(body.get("verdict")),
    )


class Journal:
    """Facts by key, on an append-only log: what a process needs to know after kill -9.

    A record is any JSON object (floats and nulls too). The newest record of a key counts. Keys are
    printable ASCII; `a/b/c` is the habit.
    """

    def __init__(self, path: Path) -> None:
        self._log = AppendOnlyLog(path)
        self._records: dict[str, dict[str, Any]] = {}
        self._applied = 0

    @contextlib.contextmanager
    def locked(self) -> Iterator[None]:
        """Check and put as one step, against all other threads and processes."""
        with self._log.locked():
            yield

    def put(self, key: str, record: dict[str, Any]) -> None:
        """Record a fact durably; the same fact again writes nothing. Raises StorageError, LedgerError."""
        with self._log.locked():
            if self.get(key) != record:
                self._log.append({"key": key, "record": _dump(record)})

    def get(self, key: str) -> dict[str, Any] | None:
        """The newest record of `key`, other processes' included."""
        self.refresh()
        return self._records.get(key)

    def items(self, prefix: str = "") -> list[tuple[str, dict[str, Any]]]:
        """Keys that start with `prefix` and their records, sorted by key."""
        self.refresh()
        return sorted(
            ((key, record) for key, record in list(self._records.items()) if key.startswith(prefix)),
            key=lambda item: item[0],
        )

    def refresh(self) -> None:
        """Take in what other processes recorded."""
        with self._log._guard:
            self._log.refresh()
            while self._applied < len(self._log):
                body = self._log[self._applied].body
                try:
                    self._records[body["key"]] = json.loads(body["record"])
                except (KeyError, TypeError, ValueError):
                    raise LedgerError(
                        f"{self._log.path}: line {self._applied + 1}: not a journal record",
                        next_step="restore the file from a copy; it was edited or damaged",
                    ) from None
                self._applied += 1


def _dump(record: dict[str, Any]) -> str:
    try:
        return json.dumps(record, sort_keys=True, separators=(",", ":"), allow_nan=False)
    except (TypeError, ValueError):
        raise LedgerError("this record is not plain JSON with finite numbers") from None
