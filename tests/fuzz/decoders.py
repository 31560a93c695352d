"""Every decoder that reads bytes of somebody else: valid samples, and what must hold of what it accepts.

A decoder's `read` either raises an `IsthmusError`, or returns after it has checked that what it read is
exactly what was given. `wrap` makes the bytes that are read of the bytes that are fuzzed: it signs a changed
statement, chains changed entries, or puts a changed index before tensors, so that what lies behind a
signature is reached, too.

`DECODERS` maps names to functions that make a decoder in a folder of its own.
"""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from common.signing import SigningKey
from fuzz.mutate import fuzzed

KEY, OTHER = SigningKey(bytes([1]) * 32), SigningKey(bytes([2]) * 32)


def _as_it_is(data: bytes) -> bytes:
    return data


@dataclass(frozen=True, repr=False)
class Decoder:
    """One decoder: fuzz `samples`, `wrap` them, `read` the outcome; `outer` samples are not wrapped."""

    samples: tuple[bytes, ...]
    read: Callable[[bytes], Any]
    wrap: Callable[[bytes], bytes] = _as_it_is
    outer: tuple[bytes, ...] = ()
    close: Callable[[], None] = lambda: None

    def given(self, choices: random.Random) -> bytes:
        """An input. Raises IsthmusError when what was fuzzed cannot even be wrapped."""
        if self.outer and choices.random() < 0.3:
            return fuzzed(self.outer, choices)
        return self.wrap(fuzzed(self.samples, choices))

    def check(self) -> None:
        """Every sample must be accepted: a decoder that refuses everything passes any fuzzing."""
        for sample in self.samples:
            self.read(self.wrap(sample))
        for sample in self.outer:
            self.read(sample)


Make = Callable[[Path], Decoder]
DECODERS: dict[str, Make] = {}


def decoder(make: Make) -> Make:
    """Register under the function's name."""
    DECODERS[make.__name__.replace("_", "-")] = make
    return make


def encoded(value: Any) -> bytes:
    """Compact JSON with sorted keys."""
    return json.dumps(value, sort_keys=True, separators=(",", ":")).encode()


def as_text(data: bytes) -> str:
    """As a file is read as text; what is no UTF-8 stays recognisable."""
    return data.decode("utf-8", "surrogateescape")


def names() -> Iterator[str]:
    """All decoders."""
    yield from _all()


def made(name: str, folder: Path) -> Decoder:
    """The decoder `name`, with `folder` for its files."""
    folder.mkdir(parents=True, exist_ok=True)
    return _all()[name](folder)


def _all() -> dict[str, Make]:
    from fuzz import crossings, files, language, logs, models, sources, statements  # noqa: F401 - they register theirs

    return DECODERS
