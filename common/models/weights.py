"""The index of a model's safetensors file, without torch: names, shapes, dtypes, digests.

Model folders come from many hands, so any dtype and metadata are read here. What crosses between the
shores is held to stricter rules by `common.tensorfile`. One tensor's chunk in memory at a time.
Format: https://github.com/huggingface/safetensors#format
"""

from __future__ import annotations

import hashlib
import json
import math
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from common.errors import ModelError

MAX_HEADER_BYTES = 64 << 20
_CHUNK_BYTES = 1 << 20
_ITEM_BYTES = {
    "F64": 8, "F32": 4, "F16": 2, "BF16": 2,
    "I64": 8, "I32": 4, "I16": 2, "I8": 1, "U64": 8, "U32": 4, "U16": 2, "U8": 1, "BOOL": 1,
}  # fmt: skip
_SHARD = r"[\w.-]{1,80}\.safetensors"
FLOAT_DTYPES = frozenset({"F64", "F32", "F16", "BF16"})


@dataclass(frozen=True)
class WeightEntry:
    """Where one tensor lies: `start` and `end` are byte offsets from the beginning of the file."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    start: int
    end: int


def read_weights(path: Path) -> list[WeightEntry]:
    """The entries of `path` in file order. Raises ModelError where the file is not well-formed."""
    try:
        size_bytes = path.stat().st_size
        with path.open("rb") as file:
            prefix = file.read(8)
            header_bytes = int.from_bytes(prefix, "little")
            if len(prefix) < 8 or header_bytes > min(MAX_HEADER_BYTES, size_bytes - 8):
                raise _malformed(path, "its header length does not fit the file")
            raw = json.loads(file.read(header_bytes).decode("utf-8"))
    except FileNotFoundError:
        raise ModelError(f"{path}: no such file", next_step="check the path") from None
    except (UnicodeDecodeError, json.JSONDecodeError, RecursionError):
        raise _malformed(path, "its header is not JSON") from None
    if not isinstance(raw, dict):
        raise _malformed(path, "its header is not a JSON object")
    raw.pop("__metadata__", None)
    entries = [_entry(path, name, value, 8 + header_bytes) for name, value in raw.items()]
    entries.sort(key=lambda entry: (entry.start, entry.end, entry.name))
    position = 8 + header_bytes
    for entry in entries:
        if entry.start != position:
            raise _malformed(path, f"tensor {entry.name!r} leaves a hole or overlaps another")
        position = entry.end
    if position != size_bytes:
        raise _malformed(path, f"it has {size_bytes} bytes where its tensors end at {position}")
    return entries


def read_shards(index: Path) -> dict[str, str]:
    """Tensor to file of a sharded model's index; every file is a safetensors file beside it.

    Raises ModelError.
    """
    try:
        data = json.loads(index.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        raise ModelError(f"{index}: not readable as JSON", next_step="obtain the model again") from None
    shards = data.get("weight_map") if isinstance(data, dict) else None
    if not isinstance(shards, dict) or not shards:
        raise ModelError(f"{index}: has no weight_map", next_step="obtain the model again")
    for name, file in shards.items():
        if not isinstance(file, str) or not re.fullmatch(_SHARD, file):
            raise ModelError(
                f"{index}: tensor {name!r} is not in a safetensors file of this folder",
                next_step="save the model as safetensors (save_pretrained does)",
            )
    return shards


def tensor_table(path: Path) -> list[dict[str, Any]]:
    """`[{"name", "shape", "dtype", "sha256"}]`, sorted by name; the bytes are hashed in 1 MiB chunks.

    Raises ModelError where the file is not well-formed.
    """
    table = []
    entries = read_weights(path)
    with path.open("rb") as file:
        for entry in entries:
            file.seek(entry.start)
            digest, left = hashlib.sha256(), entry.end - entry.start
            while left:
                chunk = file.read(min(left, _CHUNK_BYTES))
                if not chunk:
                    raise _malformed(path, f"it ends inside tensor {entry.name!r}")
                digest.update(chunk)
                left -= len(chunk)
            table.append(
                {
                    "name": entry.name,
                    "shape": list(entry.shape),
                    "dtype": entry.dtype,
                    "sha256": digest.hexdigest(),
                }
            )
    return sorted(table, key=lambda row: str(row["name"]))


def _entry(path: Path, name: str, value: Any, base: int) -> WeightEntry:
    if not isinstance(value, dict) or set(value) != {"dtype", "shape", "data_offsets"}:
        raise _malformed(path, f"tensor {name!r} has unknown or missing fields")
    dtype, shape, offsets = value["dtype"], value["shape"], value["data_offsets"]
    if not isinstance(dtype, str) or dtype not in _ITEM_BYTES:
        raise _malformed(path, f"tensor {name!r} has an unknown dtype")
    if not _is_sizes(shape) or not _is_sizes(offsets) or len(offsets) != 2:
        raise _malformed(path, f"tensor {name!r} has no proper shape or offsets")
    start, end = offsets
    if end - start != math.prod(shape) * _ITEM_BYTES[dtype]:
        raise _malformed(path, f"tensor {name!r} has offsets that disagree with its shape")
    return WeightEntry(name, dtype, tuple(shape), base + start, base + end)


def _is_sizes(value: Any) -> bool:
    return isinstance(value, list) and all(type(size) is int and 0 <= size < 2**48 for size in value)


def _malformed(path: Path, why: str) -> ModelError:
    return ModelError(f"{path}: not a well-formed safetensors file: {why}", next_step="obtain the file again")
