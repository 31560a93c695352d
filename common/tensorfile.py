"""Strict, streaming reading of safetensors files that came from someone else, and one form to write them in.

The standard library and numpy only. The file must be exactly: 8-byte length, JSON header, tensors back
to back in the order of their offsets until the last byte. No metadata, no gap, no overlap, no unknown
dtype: no byte of the file is outside a tensor. Values are read in blocks of rows, so memory stays at a
few MiB whatever the size of a tensor. `rewrite` leaves no choice to whoever wrote the file: names sorted, one
spelling of the header, values rounded to the wanted dtype, no negative zero.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import numpy.typing as npt

from common.errors import VectorError
from common.files import storage_errors

ITEM_BYTES = {"F32": 4, "BF16": 2, "F16": 2}
MAX_HEADER_BYTES = 8 << 20
MAX_TENSORS = 20_000
BLOCK_VALUES = 1 << 18
TENSOR_NAME = re.compile(r"[A-Za-z0-9_.\-]{1,200}")
Floats = npt.NDArray[np.float32]


@dataclass(frozen=True)
class TensorEntry:
    """One row of a tensor file's index; `start` is the byte offset in the file."""

    name: str
    shape: tuple[int, ...]
    dtype: str
    start: int
    size_bytes: int


@dataclass(frozen=True)
class TensorReading:
    """What one pass over a tensor's bytes gave.

    `norm` is the L2 norm, `row_gap` how many times larger a row's norm is than the next smaller one at
    the widest gap that has at least 1% of the rows (and two) on either side: a table of which only some
    rows were touched has a wide gap. 1 for vectors.
    """

    name: str
    shape: tuple[int, ...]
    dtype: str
    digest: str
    finite: bool
    norm: float
    row_gap: float


def read_index(path: Path) -> list[TensorEntry]:
    """The tensors of `path` in file order. Raises VectorError when the file is not exactly as above."""
    total_bytes = path.stat().st_size
    with path.open("rb") as source:
        header_bytes = int.from_bytes(source.read(8), "little")
        if not 2 <= header_bytes <= min(MAX_HEADER_BYTES, total_bytes - 8):
            raise VectorError("tensor file: its header is missing or too long")
        header = _parse(source.read(header_bytes))
    base = 8 + header_bytes
    entries = sorted((_entry(name, fact, base) for name, fact in header.items()), key=lambda e: e.start)
    position = base
    for entry in entries:
        if entry.start != position:
            raise VectorError(f"tensor {entry.name}: gap or overlap in the file")
        position += entry.size_bytes
    if position != total_bytes:
        raise VectorError("tensor file: bytes behind the last tensor, or missing from it")
    return entries


def read_tensors(path: Path) -> Iterator[TensorReading]:
    """Read every tensor once, in file order, in constant memory. Raises VectorError as `read_index`."""
    entries = read_index(path)
    with path.open("rb") as source:
        for entry in entries:
            yield _read(source, entry)


def tensor_facts(path: Path) -> list[dict[str, Any]]:
    """`name`, `shape`, `dtype` and `digest` of every tensor, sorted by name: a header's tensor table."""
    with path.open("rb") as source:
        facts = []
        for entry in read_index(path):
            digest = hashlib.sha256()
            for block in tensor_blocks(source, entry):
                digest.update(block)
            facts.append(
                {
                    "name": entry.name,
                    "shape": list(entry.shape),
                    "dtype": entry.dtype,
                    "digest": digest.hexdigest(),
                }
            )
    return sorted(facts, key=lambda fact: str(fact["name"]))


def rewrite(source: Path, target: Path, dtype: str) -> None:
    """Write the tensors of `source` to `target` with `dtype` (F32 or BF16), durably, in the only form.

    Equal values give equal bytes, and as `safetensors` itself writes them. Raises VectorError when `source`
    is malformed or holds NaN or infinity, StorageError when the disk is full.
    """
    entries = sorted(read_index(source), key=lambda entry: entry.name)
    header: dict[str, Any] = {}
    position = 0
    for entry in entries:
        end = position + math.prod(entry.shape) * ITEM_BYTES[dtype]
        header[entry.name] = {"dtype": dtype, "shape": list(entry.shape), "data_offsets": [position, end]}
        position = end
    text = json.dumps(header, separators=(",", ":")).encode("ascii")
    text += b" " * (-len(text) % 8)
    with source.open("rb") as reader, storage_errors(target), target.open("wb") as writer:
        writer.write(len(text).to_bytes(8, "little") + text)
        for entry in entries:
            for block in tensor_blocks(reader, entry):
                values = as_float32(block, entry.dtype)
                if not np.isfinite(values).all():
                    raise VectorError(f"tensor {entry.name}: holds NaN or infinity")
                writer.write(_rounded(values, dtype))
        writer.flush()
        os.fsync(writer.fileno())


def _rounded(values: Floats, dtype: str) -> bytes:
    """Finite values as bytes of `dtype`, to nearest, ties to even; zero has no sign."""
    if dtype == "F32":
        return (values + np.float32(0.0)).astype("<f4").tobytes()
    bits = values.view(np.uint32)
    upper = ((bits + np.uint32(0x7FFF) + ((bits >> 16) & 1)) >> 16).astype("<u2")
    upper[(upper & 0x7FFF) == 0] = 0
    return upper.tobytes()


def _parse(data: bytes) -> dict[str, Any]:
    try:
        header = json.loads(data.decode("utf-8"), object_pairs_hook=_unique)
    except (ValueError, RecursionError):
        raise VectorError("tensor file: its header is not JSON with unique names") from None
    if not isinstance(header, dict) or not 1 <= len(header) <= MAX_TENSORS:
        raise VectorError(f"tensor file: needs 1 to {MAX_TENSORS} tensors")
    canonical = json.dumps(header, separators=(",", ":"), ensure_ascii=False)
    if data.decode("utf-8").rstrip(" ") != canonical or data != data.rstrip(b" ").ljust(len(data), b" "):
        raise VectorError("tensor file: its header is not compact JSON")
    return header


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        raise ValueError("a name occurs twice")
    return found


def _entry(name: str, fact: Any, base: int) -> TensorEntry:
    if not TENSOR_NAME.fullmatch(name) or name == "__metadata__":
        raise VectorError("tensor file: metadata or a tensor name that is not allowed")
    if not isinstance(fact, dict) or set(fact) != {"dtype", "shape", "data_offsets"}:
        raise VectorError(f"tensor {name}: unknown or missing fields in the file's header")
    dtype, shape, offsets = fact["dtype"], fact["shape"], fact["data_offsets"]
    if not isinstance(dtype, str) or dtype not in ITEM_BYTES:
        raise VectorError(f"tensor {name}: dtype must be one of {', '.join(ITEM_BYTES)}")
    if not _whole(shape) or not _whole(offsets) or len(offsets) != 2 or len(shape) > 8 or 0 in shape:
        raise VectorError(f"tensor {name}: shape or offsets are not valid")
    size_bytes = math.prod(shape) * ITEM_BYTES[dtype]
    if offsets[1] - offsets[0] != size_bytes:
        raise VectorError(f"tensor {name}: its shape and its bytes disagree")
    return TensorEntry(name, tuple(shape), dtype, base + offsets[0], size_bytes)


def _whole(values: Any) -> bool:
    return isinstance(values, list) and all(type(value) is int and 0 <= value < 2**48 for value in values)


def tensor_blocks(source: BinaryIO, entry: TensorEntry) -> Iterator[bytes]:
    """The tensor's bytes in blocks of about a MiB that never split a value."""
    source.seek(entry.start)
    left = entry.size_bytes
    while left:
        block = source.read(min(left, BLOCK_VALUES * ITEM_BYTES[entry.dtype]))
        if not block:
            raise VectorError(f"tensor {entry.name}: the file ends inside it")
        left -= len(block)
        yield block


def as_float32(block: bytes, dtype: str) -> Floats:
    """Values of one block; bf16 is the upper half of a float32."""
    if dtype == "BF16":
        return (np.frombuffer(block, "<u2").astype(np.uint32) << np.uint32(16)).view(np.float32)
    return np.frombuffer(block, {"F64": "<f8", "F32": "<f4", "F16": "<f2"}[dtype]).astype(np.float32)


def _read(source: BinaryIO, entry: TensorEntry) -> TensorReading:
    digest, finite, position = hashlib.sha256(), True, 0
    columns = math.prod(entry.shape[1:])
    squares_R = np.zeros(entry.shape[0] if len(entry.shape) > 1 else 1)  # R: rows
    for block in tensor_blocks(source, entry):
        digest.update(block)
        values = as_float32(block, entry.dtype)
        finite = finite and bool(np.isfinite(values).all())
        if finite:
            _add_squares(squares_R, values, position, columns if len(entry.shape) > 1 else 0)
        position += len(values)
    norm = float(np.sqrt(squares_R.sum())) if finite else math.inf
    gap = _row_gap(np.sqrt(squares_R)) if finite else 1.0
    return TensorReading(entry.name, entry.shape, entry.dtype, digest.hexdigest(), finite, norm, gap)


def _add_squares(squares_R: npt.NDArray[np.float64], values: Floats, position: int, columns: int) -> None:
    """Add the squares of `values`, which start at flat `position`, to their rows (columns 0: one row)."""
    squared = values.astype(np.float64) ** 2
    if not columns:
        squares_R[0] += squared.sum()
        return
    first = position // columns
    starts = np.arange(first * columns, position + len(values), columns) - position
    sums = np.add.reduceat(squared, np.maximum(starts, 0))
    squares_R[first : first + len(sums)] += sums


def _row_gap(norms_R: npt.NDArray[np.float64]) -> float:
    rows = len(norms_R)
    side = max(2, math.ceil(rows / 100))
    if rows < 2 * side or not norms_R.any():
        return 1.0
    ordered = np.sort(norms_R)
    below, above = ordered[side - 1 : rows - side], ordered[side : rows - side + 1]
    return float(np.max(above / np.maximum(below, ordered[-1] * 1e-12)))
