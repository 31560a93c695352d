"""`python -m clients.training JOB.json FD`: the trainer's own process. See `clients.training.job`."""

from __future__ import annotations

import json
import os
import sys
import threading
import time
import traceback
from pathlib import Path

from clients.training.isolation import IMPOSSIBLE, IMPOSSIBLE_STEP, isolate
from clients.training.job import (
    DONE,
    INTERRUPTED,
    ISOLATED,
    NOT_ISOLATED,
    ORPHANED,
    REFUSED,
    UNEXPECTED,
    Job,
    read_job,
)
from clients.training.slots import shared_folder, turn
from common.errors import IsthmusError, PolicyError
from common.files import write_atomic
from common.guard import check_imports
from common.progress import NO_REPORT, Report, StatusFile

PARENT_CHECK_S = 1.0


def main(arguments: list[str]) -> int:
    """Carry out the job; returns the exit code."""
    if len(arguments) != 2:
        sys.stderr.write("usage: python -m clients.training JOB.json FD\n")
        return REFUSED
    job = None
    try:
        check_imports()
        job = read_job(Path(arguments[0]))
        _isolate(job, int(arguments[1]))
        _end_with_parent()
        os.environ.setdefault("CUDA_VISIBLE_DEVICES", "0")  # one device a domain, never torch's DataParallel
        report: Report = (
            StatusFile(Path(job.status), domain=Path(job.domain).name) if job.status else NO_REPORT
        )
        report(phase="start")
        with turn(report):
            from clients.training.perform import perform  # torch only from here on

            perform(job, report)
    except KeyboardInterrupt:
        return INTERRUPTED
    except IsthmusError as err:
        _write_error(job, err.code, err.message, err.next_step)
        return REFUSED
    except Exception as err:  # noqa: BLE001 - whatever it is, the caller must hear of it
        traceback.print_exc()
        _write_error(job, "unexpected", f"the trainer failed: {type(err).__name__}", "see trainer.log")
        return UNEXPECTED
    return DONE


def _isolate(job: Job, tell: int) -> None:
    """Isolate this process and tell the one that started it.

    Raises PolicyError where it must be isolated and cannot.
    """
    readable = [Path(path) for path in (job.domain, job.base, job.model) if path]
    readable += [Path(candidate.vector).parent for candidate in job.candidates]
    readable += [Path(job.numbers).parent] if job.numbers else []
    slots = shared_folder()
    writable = [
        *(Path(job.work), Path(job.fits or job.work), Path(job.status or job.work).parent),
        *([slots] if slots else []),
    ]
    for path in writable:
        path.mkdir(parents=True, exist_ok=True)
    isolated = bool(job.home) and isolate(Path(job.home), readable, writable)
    os.write(tell, ISOLATED if isolated else NOT_ISOLATED)
    os.close(tell)
    if isolated:
        os.environ["TMPDIR"] = job.work  # the only kind of folder that it can still write
    elif job.require_isolation:
        raise PolicyError(IMPOSSIBLE, next_step=IMPOSSIBLE_STEP)


def _write_error(job: Job | None, code: str, message: str, next_step: str) -> None:
    sys.stderr.write(f"{code}: {message}\n  next: {next_step}\n")
    if job is not None:
        record = {"code": code, "message": message, "next_step": next_step}
        write_atomic(job.file("error"), json.dumps(record).encode())


def _end_with_parent() -> None:
    """End this process when the one that started it is gone, so that none is left behind."""
    parent = os.getppid()

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(PARENT_CHECK_S)
        os._exit(ORPHANED)

    threading.Thread(target=watch, name="parent-watch", daemon=True).start()


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
