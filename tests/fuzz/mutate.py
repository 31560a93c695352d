"""Inputs for decoders: valid samples with bytes or JSON values changed, spliced samples, and any bytes.

All choices come from one `random.Random`: an input is known by its seed, or hypothesis makes the choices.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Callable, Sequence
from random import Random
from typing import Any

MAX_BYTES = 1 << 16
NUMBERS = (0, 1, -1, 127, 255, 2**31, 2**32 - 1, 2**48, 2**53, -(2**63), 2**64, 10**400)
WORDS = (
    b"\x00", b"\xff", b"\n", b"\r\n", b" ", b'"', b"\\ud800", b"\\u0000", b"{}", b"[]", b"null", b"true",
    b"NaN", b"1e999", b"-0", b"0.5", b"9" * 5000, b"[" * 1500, b'{"a":' * 1500, b"\xc3\xa4",
    b"\xed\xa0\x80", b"\xf0\x9f\x98\x80",
    b"\xef\xbb\xbf", b"\x1f\x8b", b"PAR1", b"..", b"/", b"\xe2\x80\x94 ", b"=", b",", b"\t",
)  # fmt: skip
VALUES: tuple[Any, ...] = (
    None, True, False, "", "a", "A" * 300, "\u00e4", "\ud800", "\x00", [], {}, [[]], [0] * 70,
    0.5, float("nan"), float("inf"), *NUMBERS,
)  # fmt: skip


def fuzzed(samples: Sequence[bytes], random: Random) -> bytes:
    """A changed sample; now and then any bytes, or a sample as it is."""
    sample = random.choice(samples)
    way = random.randrange(20)
    if way == 0:
        return random.randbytes(random.randrange(200))
    if way == 1:
        return sample
    if way < 10:
        changed = changed_json(sample, random)
        if changed is not None:
            return changed
    data = bytearray(sample)
    for _ in range(random.choice((1, 1, 1, 2, 4))):
        random.choice(EDITS)(data, samples, random)
    return bytes(data[:MAX_BYTES])


def _flip(data: bytearray, _: Sequence[bytes], random: Random) -> None:
    if data:
        data[random.randrange(len(data))] ^= 1 << random.randrange(8)


def _set(data: bytearray, _: Sequence[bytes], random: Random) -> None:
    if data:
        data[random.randrange(len(data))] = random.randrange(256)


def _cut(data: bytearray, _: Sequence[bytes], random: Random) -> None:
    start, end = _span(data, random)
    del data[start:end]


def _end(data: bytearray, _: Sequence[bytes], random: Random) -> None:
    del data[random.randrange(len(data) + 1) :]


def _repeat(data: bytearray, _: Sequence[bytes], random: Random) -> None:
    start, end = _span(data, random)
    data[start:start] = data[start:end] * random.choice((1, 1, 2, 50))
    del data[MAX_BYTES:]


def _splice(data: bytearray, samples: Sequence[bytes], random: Random) -> None:
    other = random.choice(samples)
    start, end = _span(other, random)
    place, until = _span(data, random)
    data[place:until] = other[start:end]


def _insert(data: bytearray, _: Sequence[bytes], random: Random) -> None:
    place = random.randrange(len(data) + 1)
    data[place:place] = random.choice(WORDS)


def _number(data: bytearray, _: Sequence[bytes], random: Random) -> None:
    """Overwrite with a whole number as a binary format holds it."""
    width = random.choice((1, 2, 4, 8))
    number = random.choice(NUMBERS) % 256**width
    place = random.randrange(len(data) + 1)
    data[place : place + width] = number.to_bytes(width, random.choice(("little", "big")))  # type: ignore[arg-type]


def _swap(data: bytearray, _: Sequence[bytes], random: Random) -> None:
    """Exchange two lines, as an attacker reorders entries."""
    lines = bytes(data).splitlines(keepends=True)
    if len(lines) > 1:
        one, two = random.randrange(len(lines)), random.randrange(len(lines))
        lines[one], lines[two] = lines[two], lines[one]
        data[:] = b"".join(lines)


EDITS: tuple[Callable[[bytearray, Sequence[bytes], Random], None], ...] = (
    _flip, _flip, _set, _cut, _end, _repeat, _splice, _insert, _number, _swap,
)  # fmt: skip


def _span(data: Sequence[int], random: Random) -> tuple[int, int]:
    start = random.randrange(len(data) + 1)
    return start, min(len(data), start + random.choice((1, 2, 4, 16, 64, 512)))


def changed_json(sample: bytes, random: Random) -> bytes | None:
    """`sample` with one to three JSON values replaced, moved, repeated or dropped; None if it is no JSON."""
    try:
        value = json.loads(sample)
    except ValueError:
        return None
    for _ in range(random.choice((1, 1, 2, 3))):
        value = _changed(value, random)
    data = json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=random.random() < 0.9)
    return data.encode("utf-8", "surrogatepass")[:MAX_BYTES]


def _changed(value: Any, random: Random) -> Any:
    if not isinstance(value, dict | list) or not value or random.random() < 0.1:
        return _other(value, random)
    place = random.choice(sorted(value)) if isinstance(value, dict) else random.randrange(len(value))
    way = random.randrange(8)
    if way == 0:
        del value[place]
    elif way == 1 and isinstance(value, dict):
        value[random.choice(("extra", "", "\u00e4", "__metadata__", place.upper()))] = copy.deepcopy(
            value[place]
        )
    elif way == 1:
        value.insert(random.randrange(len(value) + 1), copy.deepcopy(value[place]))
    elif way == 2 and isinstance(value, list):
        random.shuffle(value)
    else:
        value[place] = _changed(value[place], random)
    return value


def _other(value: Any, random: Random) -> Any:
    if isinstance(value, str) and random.random() < 0.5:
        data = bytearray(value.encode("utf-8", "surrogatepass"))
        random.choice((_flip, _cut, _insert, _repeat))(data, (b"",), random)
        return data.decode("utf-8", "replace")
    if isinstance(value, int) and random.random() < 0.5:
        return value + random.choice((-1, 1, 2**32, -(2**31)))
    if random.random() < 0.02:
        return _deep(random)
    return copy.deepcopy(random.choice(VALUES))


def _deep(random: Random) -> Any:
    value: Any = 0
    for _ in range(random.choice((13, 100, 300))):
        value = [value] if random.random() < 0.5 else {"a": value}
    return value
