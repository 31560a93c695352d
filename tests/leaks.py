"""How a leaking owner could write a private value: every encoding that the scanner must find, and misses.

Each is made with other code than the scanner's. `TEXTS` take the bytes of a text, `IDS` a list of whole
numbers; `MISSED_TEXTS` and `MISSED_IDS` are what no scan finds (`common.audit.scan.MISSES`).
"""

from __future__ import annotations

import base64
import bz2
import gzip
import hashlib
import io
import json
import lzma
import struct
import urllib.parse
import zlib
from collections.abc import Callable

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import zstandard
from safetensors.numpy import save

Text = Callable[[bytes], bytes]
Ids = Callable[[list[int]], bytes]


def _after(shift: int, encode: Text) -> Text:
    """The value comes `shift` bytes after the start of what is encoded: another alignment."""
    return lambda value: encode(b"\x9c" * shift + value + b"\x01\x02")


def _parquet(column: pa.Array, compression: str) -> bytes:
    out = io.BytesIO()
    pq.write_table(pa.table({"note": column}), out, compression=compression)
    return out.getvalue()


def _zlib(level: int, window: int = 15) -> Text:
    def encode(value: bytes) -> bytes:
        packer = zlib.compressobj(level, zlib.DEFLATED, window)
        return packer.compress(value) + packer.flush()

    return encode


def _escaped(form: str) -> Text:
    return lambda value: "".join(form.format(ord(letter)) for letter in value.decode()).encode()


def _utf_16_le(value: bytes) -> bytes:
    return value.decode().encode("utf-16-le")


def _tensor_bytes(value: bytes) -> bytes:
    padded = value + bytes(-len(value) % 4)
    return save({"layer.weight": np.frombuffer(padded, dtype="<u4").copy()})


TEXTS: dict[str, Text] = {
    "raw": bytes,
    "upper case": bytes.upper,
    "json": lambda value: json.dumps({"user": value.decode()}).encode(),
    "json escapes": _escaped("\\u{:04x}"),
    "json capital escapes": _escaped("\\u{:04X}"),
    "python escapes": _escaped("\\x{:02x}"),
    "hex": lambda value: value.hex().encode(),
    "capital hex": lambda value: value.hex().upper().encode(),
    "hex after half a byte": lambda value: b"f" + value.hex().encode(),
    "utf-16 little": _utf_16_le,
    "utf-16 big": lambda value: value.decode().encode("utf-16-be"),
    "url": lambda value: urllib.parse.quote_from_bytes(value, safe="").encode(),
    "url, every letter": _escaped("%{:02X}"),
    **{f"base64 after {shift}": _after(shift, base64.b64encode) for shift in range(3)},
    **{f"base64url after {shift}": _after(shift, base64.urlsafe_b64encode) for shift in range(3)},
    "base64 glued to a word": lambda value: b"key" + base64.b64encode(value),
    "base64 in lines": lambda value: base64.encodebytes(b"." * 50 + value),
    **{f"base32 after {shift}": _after(shift, base64.b32encode) for shift in range(5)},
    "small base32": lambda value: base64.b32encode(value).lower(),
    "gzip": gzip.compress,
    "zlib": _zlib(6),
    "zlib, fastest": _zlib(1),
    "zlib, stored": _zlib(0),
    "zlib, small window": _zlib(9, 9),
    "zstd": zstandard.ZstdCompressor().compress,
    "bz2": bz2.compress,
    "xz": lzma.compress,
    "base64 of gzip": lambda value: base64.b64encode(gzip.compress(value)),
    "gzip of base64 of zlib": lambda value: gzip.compress(base64.b64encode(zlib.compress(value))),
    "hex of xz of utf-16": lambda value: lzma.compress(_utf_16_le(value)).hex().encode(),
    "zstd of json of bz2": lambda value: zstandard.ZstdCompressor().compress(
        json.dumps([bz2.compress(value).hex()]).encode()
    ),
    "gzip of gzip of gzip": lambda value: gzip.compress(gzip.compress(gzip.compress(value))),
    **{
        f"parquet, {codec}": lambda value, codec=codec: _parquet(pa.array([value.decode()] * 3), codec)
        for codec in ("none", "snappy", "gzip", "zstd", "brotli", "lz4")
    },
    "base32 of parquet": lambda value: base64.b32encode(_parquet(pa.array([value]), "zstd")),
    "tensor bytes": _tensor_bytes,
    "tensor metadata": lambda value: save({"a": np.ones(2)}, metadata={"note": value.decode()}),
}


def _packed(code: str) -> Ids:
    return lambda ids: struct.pack(f"{code[0]}{len(ids)}{code[1]}", *ids)


def _varints(ids: list[int]) -> bytes:
    out = b""
    for number in ids:
        while number >= 128:
            out += bytes([number % 128 + 128])
            number //= 128
        out += bytes([number])
    return out


def _bfloat(ids: list[int]) -> bytes:
    return b"".join(struct.pack(">f", number)[:2][::-1] for number in ids)


def _csv(between: str) -> Ids:
    return lambda ids: between.join(str(number) for number in ids).encode()


IDS: dict[str, Ids] = {
    **{
        f"{name} {'little' if order == '<' else 'big'}": _packed(order + code)
        for order in "<>"
        for name, code in (
            *(("int16", "h"), ("int32", "i"), ("int64", "q")),
            *(("float16", "e"), ("float32", "f"), ("float64", "d")),
        )
    },
    "bfloat16": _bfloat,
    "varint": _varints,
    "zigzag varint": lambda ids: _varints([2 * number for number in ids]),
    **{f"csv with {between!r}": _csv(between) for between in (",", ", ", " ", ";", "\t", "\n")},
    "json": lambda ids: json.dumps(ids).encode(),
    "json floats": lambda ids: json.dumps([float(number) for number in ids]).encode(),
    "base64 of int32": lambda ids: base64.b64encode(_packed("<i")(ids)),
    "gzip of varint": lambda ids: gzip.compress(_varints(ids)),
    "hex of zstd of csv": lambda ids: zstandard.ZstdCompressor().compress(_csv(",")(ids)).hex().encode(),
    "parquet list": lambda ids: _parquet(pa.array([ids], type=pa.list_(pa.int32())), "zstd"),
    "parquet column": lambda ids: _parquet(pa.array(ids, type=pa.int16()), "snappy"),
    "tensor": lambda ids: save({"layer.weight": np.array(ids, dtype=np.float32)}),
}


def _raw_deflate(value: bytes) -> bytes:
    packer = zlib.compressobj(9, zlib.DEFLATED, -15)
    return packer.compress(value) + packer.flush()


def _low_bits(value: bytes) -> bytes:
    """One bit of the text in the lowest mantissa bit of each float32."""
    bits = np.unpackbits(np.frombuffer(value, dtype=np.uint8)).astype(np.uint32)
    weights = np.random.default_rng(0).normal(0, 0.02, bits.size).astype(np.float32).view(np.uint32)
    return ((weights & np.uint32(0xFFFFFFFE)) | bits).tobytes()


MISSED_TEXTS: dict[str, Text] = {
    "raw deflate": _raw_deflate,
    "xor": lambda value: bytes(byte ^ 0x5A for byte in value),
    "low mantissa bits": _low_bits,
    "hash": lambda value: hashlib.sha256(value).hexdigest().encode(),
    "split in two": lambda value: value[:7] + bytes(9) + value[7:],
}
MISSED_IDS: dict[str, Ids] = {
    "rescaled float16": lambda ids: (np.array(ids, dtype=np.float32) / 7).astype(np.float16).tobytes(),
    "one in every row": lambda ids: b"".join(struct.pack("<f", number) + bytes(60) for number in ids),
}
