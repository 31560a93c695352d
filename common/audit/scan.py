"""Looking for canaries in captured traffic: values planted in private data that must never cross.

A capture is a folder of files; each holds one direction of one connection as it was before TLS. Every part
of it (`common.audit.deframe`) is searched for each canary, and so is whatever comes out of it when each
encoding and compression (`common.audit.encodings`) is undone wherever it may begin, and again on what came
out, up to `DEPTH` times. A canary is a text, or a sequence of item ids, which is looked for in every usual
form of numbers (`needles`).

Finding nothing proves little by itself: `MISSES` names what no such search finds. Run it beside a leak.
"""

from __future__ import annotations

import hashlib
import re
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from common.audit.deframe import deframe
from common.audit.encodings import MAX_VIEW_BYTES, TECHNIQUES
from common.errors import ConfigError

MISSES = (
    "a value in a stream without a header (raw deflate, brotli), under a cipher or XOR, in the low bits of "
    "numbers, as rescaled numbers, as a hash, or split over several places"
)
DEPTH = 4
MIN_BYTES = 8  # what is shorter is found by chance
MIN_IDS = 4
_NUMBERS = ("<i2", "<i4", "<i8", "<f2", "<f4", "<f8", ">i2", ">i4", ">i8", ">f2", ">f4", ">f8", "u1")


# Canaries and the forms that they are looked for in


def read_canaries(path: Path) -> list[str | list[int]]:
    """One a line: a text, or item ids with commas between them. Raises ConfigError naming the line."""
    found: list[str | list[int]] = []
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError):
        raise ConfigError(f"{path}: not a text file", next_step="one canary a line") from None
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        is_ids = re.fullmatch(r"\s*\d{1,18}(\s*,\s*\d{1,18})+\s*", line) is not None
        canary = [int(part) for part in line.split(",")] if is_ids else line.strip()
        if not needles(canary):
            raise ConfigError(
                f"{path}:{number}: too short, it would be found by chance",
                next_step=f"a text of {MIN_BYTES} bytes or more, or {MIN_IDS} ids or more",
            )
        found.append(canary)
    if not found:
        raise ConfigError(f"{path}: no canary in it", next_step="one canary a line")
    return found


def needles(canary: str | Sequence[int]) -> dict[bytes, str]:
    """The byte strings of `MIN_BYTES` or more that are this canary, with the name of the form of each."""
    if isinstance(canary, str):
        texts = (canary, canary.lower(), canary.upper())
        forms = [(text.encode(code), code) for text in texts for code in ("utf-8", "utf-16-le", "utf-16-be")]
    else:
        forms = list(_id_forms(canary)) if len(canary) >= MIN_IDS else []
    return {needle: name for needle, name in reversed(forms) if len(needle) >= MIN_BYTES}


def _id_forms(ids: Sequence[int]) -> Iterator[tuple[bytes, str]]:
    for between in (",", ", ", " ", ";", "\t", "\n"):
        yield between.join(map(str, ids)).encode(), "csv"
        yield between.join(f"{number}.0" for number in ids).encode(), "csv of floats"
    exact = np.array(ids, dtype=np.int64)
    for code in _NUMBERS:
        with np.errstate(over="ignore"):
            cast = exact.astype(code)
        if np.array_equal(cast.astype(np.float64), exact.astype(np.float64)):
            yield cast.tobytes(), np.dtype(code).str
    half = exact.astype("<f4").view("<u4")
    if np.array_equal(exact.astype("<f4"), exact) and not (half & 0xFFFF).any():
        yield (half >> 16).astype("<u2").tobytes(), "bfloat16"
    yield b"".join(map(_varint, ids)), "varint"
    yield b"".join(_varint(2 * number) for number in ids), "zigzag varint"


def _varint(number: int) -> bytes:
    out = bytearray()
    while number > 0x7F:
        out.append(number & 0x7F | 0x80)
        number >>= 7
    return bytes([*out, number])


class _Search:
    """Finds many needles at once: by the hash of any 8 bytes first, then exactly."""

    _BITS = 20
    _BLOCK = 1 << 24  # bytes looked at together
    _FACTOR = np.uint64(0x9E3779B97F4A7C15)

    def __init__(self, canaries: Sequence[str | Sequence[int]]) -> None:
        self._by_start: dict[bytes, list[tuple[bytes, int, str]]] = defaultdict(list)
        for index, canary in enumerate(canaries):
            for needle, form in needles(canary).items():
                self._by_start[needle[:8]].append((needle, index, form))
        starts = np.frombuffer(b"".join(self._by_start), dtype="<u8")
        self._known = np.zeros(1 << self._BITS, dtype=bool)
        self._known[self._hash(starts)] = True

    def _hash(self, windows: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
        return (windows * self._FACTOR) >> np.uint64(64 - self._BITS)

    def find(self, data: bytes) -> Iterator[tuple[int, str]]:
        """(canary, form) of every needle in `data`, once for each place."""
        for start in (block + shift for block in range(0, len(data), self._BLOCK) for shift in range(8)):
            rows = min(self._BLOCK // 8, (len(data) - start) // 8)
            if rows <= 0:
                continue
            windows = np.frombuffer(data, dtype="<u8", offset=start, count=rows)
            for row in np.flatnonzero(self._known[self._hash(windows)]).tolist():
                at = 8 * row + start
                for needle, canary, form in self._by_start.get(data[at : at + 8], ()):
                    if data.startswith(needle, at):
                        yield canary, form


# The scan


@dataclass(frozen=True)
class Hit:
    """Canary number `canary` (from 0) in `form`, after undoing `undone`, at `place`."""

    canary: int
    form: str
    undone: tuple[str, ...]
    place: str


@dataclass
class Scan:
    """What was searched and found. `unframed`: parts that were searched as they are; `cut`: not wholly."""

    files: int = 0
    bytes: int = 0
    parts: int = 0
    searched_bytes: int = 0
    hits: list[Hit] = field(default_factory=list)
    unframed: list[str] = field(default_factory=list)
    cut: list[str] = field(default_factory=list)

    @property
    def found(self) -> set[int]:
        """The canaries that crossed."""
        return {hit.canary for hit in self.hits}


class Scanner:
    """Searches for `canaries`, each a text or a sequence of ids (`needles` of it are not empty)."""

    def __init__(self, canaries: Sequence[str | Sequence[int]]) -> None:
        self._search = _Search(canaries)

    def scan(self, capture: Path, on_file: Callable[[str, int, int], None] = lambda *_: None) -> Scan:
        """Every file under `capture`. Raises ConfigError when there is none."""
        files = sorted(path for path in capture.rglob("*") if path.is_file()) if capture.is_dir() else []
        if not files:
            raise ConfigError(
                f"{capture}: no captured stream in it",
                next_step="one file for each direction of each connection, as it was before TLS",
            )
        found = Scan()
        for number, path in enumerate(files):
            on_file(path.name, number, len(files))
            self.add(found, str(path.relative_to(capture)), path.read_bytes())
        return found

    def add(self, found: Scan, name: str, stream: bytes) -> None:
        """Search one direction of one connection, and add to `found` what is in it."""
        found.files += 1
        found.bytes += len(stream)
        self._look(found, name, stream, ())
        for part in deframe(stream):
            place = f"{name}, exchange {part.stream}, {part.name}"
            found.parts += 1
            if not part.framed:
                found.unframed.append(place)
            self._undo(found, place, part.data, (), set())

    def _undo(self, found: Scan, place: str, data: bytes, undone: tuple[str, ...], seen: set[bytes]) -> None:
        digest = hashlib.sha256(data).digest()
        if digest in seen:
            return
        seen.add(digest)
        self._look(found, place, data, undone)
        if len(undone) == DEPTH:
            return
        for name, technique in TECHNIQUES.items():
            view = technique(data)
            if len(view) >= MAX_VIEW_BYTES:
                found.cut.append(f"{place}: {name}: more than {MAX_VIEW_BYTES} bytes came out")
            if len(view) >= MIN_BYTES:
                self._undo(found, place, view, (*undone, name), seen)

    def _look(self, found: Scan, place: str, data: bytes, undone: tuple[str, ...]) -> None:
        found.searched_bytes += len(data)
        found.hits += sorted(
            {Hit(canary, form, undone, place) for canary, form in self._search.find(data)},
            key=lambda hit: (hit.canary, hit.form),
        )
