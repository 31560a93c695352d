"""Canonical JSON: one byte string for one value, so that what is signed is what is read.

A subset of RFC 8785: objects, arrays, printable ASCII strings and whole numbers below 2^53. No floats,
nulls or booleans (a flag is 0 or 1). Decoding is strict: bounded size and depth, no duplicate key, and
the value encoded again must give the very bytes that came in.

    >>> encode({"b": 1, "a": ["x"]})
    b'{"a":["x"],"b":1}'
    >>> decode(b'{"a":["x"],"b":1}')
    {'a': ['x'], 'b': 1}
"""

from __future__ import annotations

import base64
import binascii
import json
from typing import Any

from common.errors import ParcelError

MAX_BYTES = 1 << 20
MAX_DEPTH = 12
MAX_INTEGER = 2**53 - 1
_ENCODER = json.JSONEncoder(sort_keys=True, separators=(",", ":"), ensure_ascii=True)


def encode(value: Any, *, max_bytes: int = MAX_BYTES) -> bytes:
    """The canonical bytes of `value`. Raises ParcelError when it is outside the subset."""
    _check(value, depth=0)
    data = _ENCODER.encode(value).encode("ascii")
    if len(data) > max_bytes:
        raise ParcelError(f"canonical JSON: {len(data)} bytes, at most {max_bytes} are allowed")
    return data


def decode(data: bytes, *, max_bytes: int = MAX_BYTES) -> Any:
    """The value of canonical bytes. Raises ParcelError when they are not exactly canonical."""
    if len(data) > max_bytes:
        raise ParcelError(f"canonical JSON: {len(data)} bytes, at most {max_bytes} are allowed")
    try:
        value = _DECODER.decode(data.decode("ascii"))
    except ParcelError:
        raise
    except (ValueError, RecursionError):
        raise ParcelError("canonical JSON: not JSON within the allowed subset") from None
    if encode(value, max_bytes=max_bytes) != data:
        raise ParcelError("canonical JSON: the bytes are not in canonical form")
    return value


def decode_base64(text: Any) -> bytes:
    """The bytes of standard base64 in its only form. Raises ParcelError."""
    try:
        data = base64.b64decode(text, validate=True)
    except (TypeError, ValueError, binascii.Error):
        raise ParcelError("not standard base64") from None
    if base64.b64encode(data).decode() != text:
        raise ParcelError("base64 is not in canonical form")
    return data


def _check(value: Any, depth: int) -> None:
    if depth > MAX_DEPTH:
        raise ParcelError(f"canonical JSON: nested deeper than {MAX_DEPTH}")
    if type(value) is str:
        _check_string(value)
    elif type(value) is dict:
        for key, inner in value.items():
            _check_string(key)
            _check(inner, depth + 1)
    elif type(value) is list:
        for inner in value:
            _check(inner, depth + 1)
    elif type(value) is int:
        if abs(value) > MAX_INTEGER:
            raise ParcelError("canonical JSON: a whole number is 2^53 or more")
    else:
        _check_string(value)


def _check_string(value: Any) -> None:
    if type(value) is not str:
        raise ParcelError(f"canonical JSON: {type(value).__name__} is not allowed")
    if not (value.isascii() and value.isprintable()):
        raise ParcelError("canonical JSON: a string is not printable ASCII")


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        raise ParcelError("canonical JSON: a key occurs twice")
    return found


def _refuse(_: str) -> Any:
    raise ParcelError("canonical JSON: only whole numbers are allowed")


_DECODER = json.JSONDecoder(object_pairs_hook=_unique, parse_float=_refuse, parse_constant=_refuse)
