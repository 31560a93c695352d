"""SHA-256 of the weight files that a merge reads, for its card.

Hashing takes longer than merging. So the files are hashed in a thread beside the merge, and what was hashed
once is remembered by path, size, times and inode in the user's cache folder (`$XDG_CACHE_HOME/isthmus`, by
default `~/.cache/isthmus`). A file that changed in the last moments is not remembered.
"""

from __future__ import annotations

import contextlib
import json
import os
import threading
import time
from collections.abc import Iterable
from pathlib import Path

from common.errors import ModelError
from common.files import sha256_file, write_atomic

SETTLED_S = 2.0
MAX_REMEMBERED = 10_000

Stamp = list[int]


def stamp(path: Path) -> Stamp:
    """What changes when a file does: size, inode, times in nanoseconds."""
    found = path.stat()
    return [found.st_size, found.st_ino, found.st_mtime_ns, found.st_ctime_ns]


class Digests:
    """Starts hashing what is not remembered; `wait` gives every file's SHA-256."""

    def __init__(self, files: Iterable[Path], *, enabled: bool = True) -> None:
        self._stamps = {path: stamp(path) for path in files}
        self._store = _cache_folder() / "digests.json"
        self._known = _remembered(self._store) if enabled else {}
        self._found: dict[Path, str] = {}
        for path, now in self._stamps.items():
            entry = self._known.get(str(path.resolve()))
            if isinstance(entry, dict) and entry.get("stamp") == now:
                self._found[path] = str(entry.get("sha256"))
        self._left = [path for path in self._stamps if path not in self._found] if enabled else []
        self._thread = threading.Thread(target=self._hash, daemon=True) if self._left else None
        if self._thread:
            self._thread.start()

    def check_unchanged(self) -> None:
        """Raises ModelError where a file is no longer what it was at the start."""
        for path, before in self._stamps.items():
            if not path.exists() or stamp(path) != before:
                raise ModelError(
                    f"{path}: changed while it was read", next_step="merge again when it is whole"
                )

    def wait(self) -> dict[Path, str]:
        """SHA-256 (hex) by file; empty when not enabled. Call `check_unchanged` after it."""
        if self._thread:
            self._thread.join()
            self._remember()
        return self._found

    def _hash(self) -> None:
        for path in self._left:
            with contextlib.suppress(OSError):  # a file that is gone: `check_unchanged` says so
                self._found[path] = sha256_file(path)

    def _remember(self) -> None:
        settled_ns = int((time.time() - SETTLED_S) * 1e9)
        for path in self._left:
            before = self._stamps[path]
            if path in self._found and max(before[2:]) < settled_ns:
                self._known[str(path.resolve())] = {"stamp": before, "sha256": self._found[path]}
        newest = dict(list(self._known.items())[-MAX_REMEMBERED:])
        with contextlib.suppress(OSError):  # the cache is a convenience
            write_atomic(self._store, json.dumps(newest).encode("ascii"), mode=0o600)


def _cache_folder() -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "isthmus"


def _remembered(store: Path) -> dict[str, object]:
    try:
        data = json.loads(store.read_text(encoding="ascii"))
    except (OSError, ValueError):
        return {}
    return data if isinstance(data, dict) else {}
