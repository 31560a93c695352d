"""The merged weights as safetensors files, with the base's file names, order of tensors and dtypes.

`theta = theta_0 + tau` is computed in float32 and rounded to the nearest value of the file's dtype (ties to
even). Where `tau` is zero the bytes are the base's own. Format: https://github.com/huggingface/safetensors
"""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
import numpy.typing as npt

from common.errors import VectorError
from common.files import storage_errors
from server.engine.stream import ITEM_BYTES, Reader
from server.folders import FLOATS, ModelFolder, Stored, WeightFile
from server.merging._vectors import BLOCK_VALUES, Floats, is_finite

DTYPES = {"fp32": "F32", "bf16": "BF16", "fp16": "F16"}
BFLOAT16_LIMIT = (2 - 2**-8) * 2.0**127  # from here on the nearest bfloat16 is infinite
WRITE_BACK_BYTES = 8 << 20
NEGATIVE_ZERO = -(1 << 31)  # the bits of -0.0, and the smallest of all as a signed integer


@dataclass(frozen=True)
class Place:
    """Where a tensor goes: its file, the byte offset in it, and its dtype there."""

    file: str
    start: int
    dtype: str


class WeightWriter:
    """Writes into `folder` what the base's weight files become. `dtype` is one of `recipe.DTYPES`.

    As a context manager it keeps the files open. Raises StorageError where the disk is full, VectorError
    where a merged value is beyond the dtype's range. `will_flush`: what was written is sent on its way to
    the disk at once, so that `flush` finds little left to wait for.
    """

    def __init__(self, base: ModelFolder, folder: Path, dtype: str) -> None:
        self._base, self._folder, self._dtype = base, folder, dtype
        self.places: dict[str, Place] = {}
        self.sizes: dict[str, int] = {}  # bytes of each file
        self.bytes_written = 0
        self.will_flush = False
        self._unsent = ("", 0, 0)  # file, from, to
        self._headers: dict[str, bytes] = {}
        for file in base.files:
            self._plan(file)
        self._files: dict[str, int] = {}
        self._merged: Floats = np.empty(BLOCK_VALUES, np.float32)
        self._half: npt.NDArray[np.uint32] = np.empty(0, np.uint32)

    def __enter__(self) -> WeightWriter:
        for name, header in self._headers.items():
            path = self._folder / name
            with storage_errors(path):
                path.parent.mkdir(parents=True, exist_ok=True)
                self._files[name] = os.open(path, os.O_WRONLY | os.O_CREAT, 0o644)
                self._write(name, header, 0)
                os.ftruncate(self._files[name], self.sizes[name])
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for descriptor in self._files.values():
            os.close(descriptor)

    def is_staged(self) -> bool:
        """Whether every file is there already, with its full size."""
        paths = {self._folder / name: size for name, size in self.sizes.items()}
        return all(path.is_file() and path.stat().st_size == size for path, size in paths.items())

    def add(self, name: str, start: int, base_X: Floats, tau_X: Floats) -> None:
        """Write `base_X + tau_X` as the values from flat position `start` of tensor `name`."""
        place = self.places[name]
        item_bytes = ITEM_BYTES[place.dtype]
        for first in range(0, tau_X.size, BLOCK_VALUES):
            part = slice(first, first + BLOCK_VALUES)
            merged_X = _sum(base_X[part], tau_X[part], self._merged)
            values_X = self._rounded(name, merged_X, place.dtype)
            self._write(place.file, values_X, place.start + (start + first) * item_bytes)

    def copy(self, tensor: Stored, reader: Reader) -> None:
        """Copy a tensor's bytes as they are (integer tensors)."""
        place = self.places[tensor.name]
        data = np.empty(tensor.size * item_size(tensor.dtype), np.uint8)
        reader.read_bytes(tensor, tensor.start, data)
        self._write(place.file, data, place.start)

    def flush(self) -> None:
        """What was written is on the disk afterwards."""
        for name, descriptor in self._files.items():
            with storage_errors(self._folder / name):
                os.fsync(descriptor)

    def write_indexes(self) -> None:
        """The index file of every sharded module, as the base has it."""
        for index in sorted({file.index for file in self._base.files if file.index}):
            files = [file for file in self._base.files if file.index == index]
            weight_map = {t.key: Path(file.relative).name for file in files for t in file.tensors}
            total = sum(t.size * item_size(self.places[t.name].dtype) for file in files for t in file.tensors)
            data = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
            with storage_errors(self._folder / index):
                (self._folder / index).write_text(json.dumps(data, indent=2) + "\n", encoding="utf-8")

    def _plan(self, file: WeightFile) -> None:
        header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
        offset, starts = 0, {}
        for tensor in file.tensors:
            dtype = DTYPES.get(self._dtype, tensor.dtype) if tensor.dtype in FLOATS else tensor.dtype
            size_bytes = tensor.size * item_size(dtype)
            header[tensor.key] = {
                "dtype": dtype,
                "shape": list(tensor.shape),
                "data_offsets": [offset, offset + size_bytes],
            }
            starts[tensor.name] = (offset, dtype)
            offset += size_bytes
        text = json.dumps(header, separators=(",", ":")).encode("ascii")
        text += b" " * (-len(text) % 8)
        self._headers[file.relative] = len(text).to_bytes(8, "little") + text
        first = 8 + len(text)
        self.sizes[file.relative] = first + offset
        for name, (start, dtype) in starts.items():
            self.places[name] = Place(file.relative, first + start, dtype)

    def _rounded(self, name: str, merged_X: Floats, dtype: str) -> npt.NDArray[Any]:
        if dtype == "F16":
            with np.errstate(over="ignore"):
                half_X = merged_X.astype(np.float16)
            finite = bool(np.isfinite(half_X).all())
        else:
            finite = is_finite(merged_X) and (dtype != "BF16" or _fits_bfloat16(merged_X))
        if not finite:
            raise VectorError(
                f"tensor {name!r}: a merged value is beyond the range of {dtype}",
                next_step="use smaller weights, or dtype fp32",
            )
        return merged_X if dtype == "F32" else half_X if dtype == "F16" else self._to_bfloat16(merged_X)

    def _to_bfloat16(self, merged_X: Floats) -> npt.NDArray[np.uint16]:
        """The nearest bfloat16, ties to even. Reuses `merged_X`."""
        if not self._half.size:
            self._half = np.empty(BLOCK_VALUES, np.uint32)
        bits_X = merged_X.view(np.uint32)
        odd_X = self._half[: bits_X.size]
        np.right_shift(bits_X, 16, out=odd_X)
        odd_X &= 1
        bits_X += odd_X
        bits_X += 0x7FFF
        bits_X >>= 16
        return bits_X.astype(np.uint16)

    def _write(self, name: str, data: bytes | npt.NDArray[Any], position: int) -> None:
        view = memoryview(data) if isinstance(data, bytes) else data.view(np.uint8).data
        data_bytes = len(view)
        with storage_errors(self._folder / name):
            while view:
                done = os.pwrite(self._files[name], view, position)
                view, position = view[done:], position + done
                self.bytes_written += done
        if self.will_flush:
            self._write_back(name, position - data_bytes, position)

    def _write_back(self, name: str, start: int, end: int) -> None:
        file, first, last = self._unsent
        if (file, last) != (name, start):
            first = start
        self._unsent = (name, first, end)
        if end - first >= WRITE_BACK_BYTES:
            # Linux begins to write such pages to the disk; it frees those alone that are there already
            os.posix_fadvise(self._files[name], first, end - first, os.POSIX_FADV_DONTNEED)
            self._unsent = (name, end, end)


def item_size(dtype: str) -> int:
    """Bytes of one value of a safetensors dtype."""
    return 1 if dtype == "BOOL" else int(dtype.lstrip("BFIU")) // 8


def _sum(base_X: Floats, tau_X: Floats, buffer: Floats) -> Floats:
    """`base_X + tau_X` in the memory of `buffer`; exactly the base where tau is zero.

    In IEEE arithmetic `-0.0 + 0.0` is `0.0`, the one case in which adding zero changes a value.
    """
    merged_X = np.add(base_X, tau_X, out=buffer[: base_X.size])
    if base_X.size and int(base_X.view(np.int32).min()) == NEGATIVE_ZERO:
        np.copyto(merged_X, base_X, where=tau_X == 0)
    return merged_X


def _fits_bfloat16(values_X: Floats) -> bool:
    """Whether no (finite) value rounds to infinity: such lie beyond the largest bfloat16 by half a step."""
    return not values_X.size or max(float(values_X.max()), -float(values_X.min())) < BFLOAT16_LIMIT
