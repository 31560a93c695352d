"""`python -m clients.training JOB.json`: the trainer's own process. See `clients.training.job`."""

from __future__ import annotations

import json
import os
import sys
import threading
import time
import traceback
from pathlib import Path

from clients.training.job import DONE, INTERRUPTED, ORPHANED, REFUSED, UNEXPECTED, Job, read_job
from clients.training.slots import turn
from common.errors import IsthmusError
from common.files import write_atomic
from common.guard import check_imports
from common.progress import NO_REPORT, Report, StatusFile

PARENT_CHECK_S = 1.0


def main(arguments: list[str]) -> int:
    """Carry out the job; returns the exit code."""
    if len(arguments) != 1:
        sys.stderr.write("usage: python -m clients.training JOB.json\n")
        return REFUSED
    job = None
    try:
        check_imports()
        job = read_job(Path(arguments[0]))
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
