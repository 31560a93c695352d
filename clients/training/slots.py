"""Take turns on a shared host: at most so many trainers compute at once, the others wait.

Where several domains share one machine (a simulation, or an owner of several domains), more trainers than
processors only slow each other down and multiply the memory. `ISTHMUS_TRAINER_SLOTS="FOLDER:N"` gives N
lock files in FOLDER; a trainer holds one for as long as it lives, so a killed one frees its slot.
"""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import IO

from common.errors import ConfigError
from common.progress import Report

VARIABLE = "ISTHMUS_TRAINER_SLOTS"
POLL_S = 1.0


def environment(folder: Path, slots: int) -> dict[str, str]:
    """What a parent sets so that its trainers share `slots` turns."""
    return {VARIABLE: f"{folder}:{slots}"}


@contextlib.contextmanager
def turn(report: Report) -> Iterator[None]:
    """Wait for a free slot and hold it; without the variable there is nothing to wait for."""
    shared = _setting()
    if shared is None:
        yield
        return
    folder, count = shared
    folder.mkdir(parents=True, exist_ok=True)
    held = _take(folder, count)
    while held is None:
        report(phase="wait for a processor")
        time.sleep(POLL_S)
        held = _take(folder, count)
    with held:
        yield


def shared_folder() -> Path | None:
    """Where the lock files are, if turns are taken. Raises ConfigError."""
    shared = _setting()
    return None if shared is None else shared[0]


def _setting() -> tuple[Path, int] | None:
    setting = os.environ.get(VARIABLE, "")
    if not setting:
        return None
    folder, _, count = setting.rpartition(":")
    if not folder or not count.isdigit() or int(count) < 1:
        raise ConfigError(f"{VARIABLE} is {setting!r}", next_step="write FOLDER:N, N at least 1")
    return Path(folder), int(count)


def _take(folder: Path, count: int) -> IO[str] | None:
    import fcntl

    for number in range(count):
        file = (folder / f"slot-{number}").open("w")
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.close()
            continue
        return file
    return None
