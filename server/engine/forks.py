"""Work that is shared among processes forked from this one: nothing is imported or copied for it.

Not by `multiprocessing`, whose imports take 20 ms, a seventh of a merge of eight models of 90 MB.
"""

from __future__ import annotations

import os
import pickle
import signal
import sys
import warnings
from collections.abc import Callable, Sequence
from typing import Any, NoReturn, TypeVar

from common.errors import IsthmusError
from common.lifetime import die_with_parent

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
    workers: list[_Worker] = []
    try:
        for work in works[1:]:
            workers.append(_Worker(work))
        return [works[0](), *(worker.answer() for worker in workers)]
    finally:
        for worker in workers:
            worker.end()


class _Worker:
    """A forked process that does one work and sends back, pickled, what it returned or raised."""

    def __init__(self, work: Callable[[], Any]) -> None:
        die_too = die_with_parent(os.getpid())
        reading, writing = os.pipe()
        with warnings.catch_warnings():  # of the threads that hash inputs and draw the progress bar
            warnings.simplefilter("ignore", DeprecationWarning)
            self._pid = os.fork()
        if self._pid == 0:
            _do(work, writing, die_too)
        os.close(writing)
        self._answer = os.fdopen(reading, "rb")
        self._ended = False

    def answer(self) -> Any:
        """What the work returned. Raises what it raised, or IsthmusError where the process was killed."""
        try:
            found = pickle.load(self._answer)  # noqa: S301 - from our own fork
        except (EOFError, pickle.UnpicklingError):
            raise IsthmusError(
                f"a worker of the merge ended with exit code {self._wait()}",
                next_step="it may have run out of memory: merge with fewer workers",
            ) from None
        if isinstance(found, Exception):
            raise found
        return found

    def end(self) -> None:
        """End the process, if it has not ended itself, and wait until it is gone."""
        if not self._ended:
            os.kill(self._pid, signal.SIGTERM)
            self._wait()
        self._answer.close()

    def _wait(self) -> int:
        _, status = os.waitpid(self._pid, 0)
        self._ended = True
        return os.waitstatus_to_exitcode(status)


def _do(work: Callable[[], Any], writing: int, die_too: Callable[[], None]) -> NoReturn:
    """The life of a worker. Ctrl-C is for the parent, which then ends its workers.

    Nothing that the parent would do at its end is done here, too, whatever happens.
    """
    try:
        die_too()
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        found: Any
        try:
            found = work()
        except Exception as err:  # noqa: BLE001 - the parent raises it again
            found = err
        with os.fdopen(writing, "wb") as pipe:
            pickle.dump(found, pipe)
        os._exit(0)
    finally:
        os._exit(1)
