"""Undoing encodings and compressions wherever in some bytes they may begin.

Each technique of `TECHNIQUES` takes any bytes and returns all that it can bring out of them, one piece
after the other with a newline between, at most `MAX_VIEW_BYTES`; empty when there is nothing. None raises
for what is malformed: what can be read of it before that counts.
"""

from __future__ import annotations

import base64
import binascii
import bz2
import lzma
import re
import zlib
from collections.abc import Callable, Iterable, Iterator
from io import BytesIO
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import zstandard

MAX_VIEW_BYTES = 256 << 20
_JOINT = b"\n"


def _streams(starts: Callable[[bytes], Iterable[int]], make: Callable[[], Any]) -> Callable[[bytes], bytes]:
    def undo(data: bytes) -> bytes:
        return _joined(_expanded(data, start, make()) for start in starts(data))

    return undo


def _expanded(data: bytes, start: int, decompressor: Any) -> bytes:
    """What a compressed stream at `start` holds, as far as it can be read."""
    out, step = bytearray(), 64
    try:
        while start < len(data) and not decompressor.eof and len(out) < MAX_VIEW_BYTES:
            out += decompressor.decompress(data[start : start + step])
            start, step = start + step, min(8 * step, 1 << 16)
    except (zlib.error, lzma.LZMAError, zstandard.ZstdError, OSError, EOFError):
        pass
    return bytes(out)


def _at(magic: bytes) -> Callable[[bytes], Iterable[int]]:
    pattern = re.compile(magic, re.DOTALL)
    return lambda data: (match.start() for match in pattern.finditer(data))


def _zlib_starts(data: bytes) -> Iterable[int]:
    """Where the two bytes of a zlib header without a dictionary stand (RFC 1950)."""
    byte = np.frombuffer(data, dtype=np.uint8)
    first, second = byte[:-1].astype(np.uint16), byte[1:].astype(np.uint16)
    fits = (first & 0x8F == 8) & (second & 0x20 == 0) & ((first << 8 | second) % 31 == 0)
    return np.flatnonzero(fits).tolist() if len(data) > 1 else []


def _runs(pattern: bytes, decode: Callable[[bytes], Iterator[bytes]]) -> Callable[[bytes], bytes]:
    compiled = re.compile(pattern)
    return lambda data: _joined(out for run in compiled.finditer(data) for out in decode(run[0]))


def _hex(run: bytes) -> Iterator[bytes]:
    for shift in (0, 1):
        yield binascii.unhexlify(run[shift : shift + (len(run) - shift) // 2 * 2])


def _base64(run: bytes) -> Iterator[bytes]:
    run = run.translate(bytes.maketrans(b"-_", b"+/"), b"\r\n")
    for shift in range(4):
        yield binascii.a2b_base64(run[shift:] + b"A" * (-(len(run) - shift) % 4))


def _base32(run: bytes) -> Iterator[bytes]:
    run = run.translate(None, b"\r\n").upper()
    for shift in range(8):
        yield base64.b32decode(run[shift:] + b"A" * (-(len(run) - shift) % 8))


def _escapes(pattern: bytes) -> Callable[[bytes], bytes]:
    """Undo the escapes of `pattern` (one group: hexadecimal digits) with what stands around them."""
    compiled, near = re.compile(pattern), 128

    def character(match: re.Match[bytes]) -> bytes:
        digits = match[1]
        code = int(digits, 16)
        return bytes([code]) if len(digits) == 2 else chr(code).encode("utf-8", "surrogatepass")

    def undo(data: bytes) -> bytes:
        places: list[list[int]] = []
        for match in compiled.finditer(data):
            if places and match.start() <= places[-1][1] + near:
                places[-1][1] = match.end()
            else:
                places.append([match.start(), match.end()])
        around = (data[max(0, first - near) : last + near] for first, last in places)
        return _joined(compiled.sub(character, piece) for piece in around)

    return undo


def _utf_16(run: bytes) -> Iterator[bytes]:
    yield run.translate(None, b"\0")


def _parquet(data: bytes) -> bytes:
    marks = [match.start() for match in re.finditer(b"PAR1", data)]
    return _joined(
        out
        for index, first in enumerate(marks)
        for last in marks[index + 1 : index + 17]
        for out in _columns(data[first : last + 4])
    )


def _columns(file: bytes) -> Iterator[bytes]:
    """Each column as text and, of numbers, as 64-bit numbers; nothing when it is no Parquet file."""
    try:
        table = pq.read_table(BytesIO(file))
    except (pa.ArrowException, OSError):
        return
    for column in table.columns:
        values = column.combine_chunks()
        while pa.types.is_nested(values.type) and hasattr(values, "flatten"):
            flat = values.flatten()
            values = pa.concat_arrays(flat) if isinstance(flat, list) else flat
        if pa.types.is_integer(values.type) or pa.types.is_floating(values.type):
            wide = pa.int64() if pa.types.is_integer(values.type) else pa.float64()
            yield values.drop_null().cast(wide, safe=False).to_numpy().tobytes()
        content = [value for value in values.to_pylist() if value is not None]
        yield b",".join(value if isinstance(value, bytes) else str(value).encode() for value in content)


def _joined(pieces: Iterable[bytes]) -> bytes:
    out = bytearray()
    for piece in pieces:
        if piece:
            out += piece + _JOINT
        if len(out) >= MAX_VIEW_BYTES:
            break
    return bytes(out)


TECHNIQUES: dict[str, Callable[[bytes], bytes]] = {
    "gzip": _streams(_at(rb"\x1f\x8b\x08"), lambda: zlib.decompressobj(31)),
    "zlib": _streams(_zlib_starts, lambda: zlib.decompressobj(15)),
    "zstd": _streams(_at(rb"\x28\xb5\x2f\xfd"), lambda: zstandard.ZstdDecompressor().decompressobj()),
    "bz2": _streams(_at(rb"BZh[1-9]"), bz2.BZ2Decompressor),
    "xz": _streams(_at(rb"\xfd7zXZ\x00"), lambda: lzma.LZMADecompressor(memlimit=1 << 30)),
    "hex": _runs(rb"[0-9A-Fa-f]{16,}", _hex),
    "base64": _runs(rb"[A-Za-z0-9+/_-]{11,}(?:\r?\n[A-Za-z0-9+/_-]+)*", _base64),
    "base32": _runs(rb"[A-Z2-7]{13,}(?:\r?\n[A-Z2-7]+)*|[a-z2-7]{13,}", _base32),
    "url": _escapes(rb"%([0-9A-Fa-f]{2})"),
    "json": _escapes(rb"\\(?:u|x(?=[0-9A-Fa-f]{2}))((?<=u)[0-9A-Fa-f]{4}|(?<=x)[0-9A-Fa-f]{2})"),
    "utf-16": _runs(rb"(?:[\t\n\r -~]\x00){8,}|(?:\x00[\t\n\r -~]){8,}", _utf_16),
    "parquet": _parquet,
}
