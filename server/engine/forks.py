"""Work that is shared among processes forked from this one: nothing is imported or copied for it."""

from __future__ import annotations

import os
import signal
import sys
import warnings
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, TypeVar

from common.errors import IsthmusError

if TYPE_CHECKING:
    from multiprocessing.connection import Connection
    from multiprocessing.context import ForkProcess

MAX_WORKERS = 8
T = TypeVar("T")


def default_workers() -> int:
    """One for each processor that this process may use; one where a fork is not safe (macOS)."""
    return min(MAX_WORKERS, len(os.sched_getaffinity(0))) if sys.platform == "linux" else 1


def in_processes(works: Sequence[Callable[[], T]]) -> list[T]:
    """What each of `works` returns: the first is done here, each other in a process of its own.

    Raises what the first of them that fails raises; IsthmusError where a process was killed. When it
    returns or raises, no process is left. A work must not take locks that other threads may hold.
    """
    if len(works) == 1:
        return [works[0]()]
    from multiprocessing import get_context

    from common.processes import die_with_parent

    context, die_too = get_context("fork"), die_with_parent(os.getpid())
    started: list[tuple[ForkProcess, Connection]] = []
    try:
        for work in works[1:]:
            mine, theirs = context.Pipe(duplex=False)
            process = context.Process(target=_answer, args=(work, theirs, die_too), daemon=True)
            with warnings.catch_warnings():  # of the threads that hash inputs and draw the progress bar
                warnings.simplefilter("ignore", DeprecationWarning)
                process.start()
            theirs.close()
            started.append((process, mine))
        return [works[0](), *(_received(process, mine) for process, mine in started)]
    finally:
        for process, mine in started:
            process.terminate()
            process.join()
            mine.close()


def _answer(work: Callable[[], T], connection: Connection, die_too: Callable[[], None]) -> None:
    """Do the work, or send its error back. Ctrl-C is for the parent, which then ends its workers."""
    die_too()
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    try:
        connection.send(work())
    except Exception as err:  # noqa: BLE001 - the parent raises it again
        connection.send(err)


def _received(process: ForkProcess, connection: Connection) -> Any:
    try:
        found = connection.recv()
    except EOFError:
        process.join()
        raise IsthmusError(
            f"a worker of the merge ended with exit code {process.exitcode}",
            next_step="it may have run out of memory: merge with fewer workers",
        ) from None
    if isinstance(found, Exception):
        raise found
    return found
