"""A training job as a file, and the process that carries it out. Imports no torch.

    job = Job(mode="fit", domain="data/toys", base="/models/minilm", work="work/r1", config=RunConfig())
    result = run_job(job)   # waits; raises what the trainer raised

The job runs as `python -m clients.training JOB.json` and gives torch's memory back by ending. It
writes `status.json` (progress), `<name>.result.json` on success, `<name>.error.json` ({code, message,
next_step}) on failure, and `trainer.log` for whatever libraries print; all in the owner's work folder.
Where the job names the owner's `home`, the process is isolated first (`clients.training.isolation`). It says
so through a pipe before it imports what it trains with: no library answers for it.
Exit codes: 0 done, 1 unexpected, 2 a named error, 75 its parent went away, 130 interrupted.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

from pydantic import Field, model_validator

from clients.privacy import AnswerLimits, PrivacyLimits
from common.config import Frozen, RunConfig, validate
from common.errors import FederationError, IsthmusError
from common.files import write_atomic

DONE, UNEXPECTED, REFUSED, ORPHANED, INTERRUPTED = 0, 1, 2, 75, 130
ISOLATED, NOT_ISOLATED = b"1", b"0"


class Candidate(Frozen):
    """A merged vector to evaluate: base + vector, called `label`. `model_digest` "" is not checked.

    `keep`: leave the composed model in `<work>/candidates/<label>` for whoever installs it.
    """

    label: str
    vector: str
    codec: Literal["fp32", "bf16"]
    model_digest: str = ""
    keep: bool = False


class ReleaseLimit(Frozen):
    """What a vector may at most tell about its training data, or it does not leave."""

    max_tpr: float | None = Field(
        None,
        ge=0,
        le=1,
        description="share of training users that an attack on the vector may find at 1% false positives; "
        "above it nothing is sent. None: not measured",
    )
    held_out_users: int = Field(
        200, ge=1, description="users that are left out of fine-tuning to measure it; only with max_tpr"
    )


class Job(Frozen):
    """What the trainer is to do. Paths are absolute or relative to where `run_job` is called.

    "fit": fine-tune, then evaluate the base ("zero-shot") and the fine-tuned model on the test set.
    "evaluate": evaluate the model folder `model` and call the result `label`.
    With `release.max_tpr` some users are left out, and a vector that tells too much is a LeakageError.
    `fits` is where fine-tunings are kept, shared between runs; empty: in `work`.
    "candidates": evaluate base + vector for each of `candidates`.
    "answers": losses on validation users of the mixtures that the file `numbers` names, of the adapters
    `candidates` in the order of their labels, within `answers`. What was answered is kept in `fits`.
    `limits` is what the owner demands of a fine-tuning's privacy, after `epsilon_spent` in earlier ones.
    `home`: what the trainer must not see, the folders above excepted; empty: it is not isolated.
    """

    mode: Literal["fit", "evaluate", "candidates", "answers"]
    domain: str
    base: str
    work: str
    config: RunConfig
    status: str = ""
    model: str = ""
    label: str = ""
    candidates: tuple[Candidate, ...] = ()
    numbers: str = ""
    answers: AnswerLimits = AnswerLimits()
    fits: str = ""
    evaluate_after_fit: bool = True
    release: ReleaseLimit = ReleaseLimit()
    limits: PrivacyLimits = PrivacyLimits()
    epsilon_spent: float = 0.0
    threads: int = 0
    home: str = ""
    require_isolation: bool = False

    @model_validator(mode="after")
    def _check(self) -> Job:
        if self.mode == "evaluate" and not (self.model and self.label):
            raise ValueError("an evaluation needs `model` and `label`")
        if self.mode == "answers" and not (self.numbers and self.candidates and self.config.lora):
            raise ValueError("answers need `numbers`, adapters and a run of adapters")
        return self

    @property
    def name(self) -> str:
        """What its files are called."""
        return self.label or self.mode

    def file(self, kind: str) -> Path:
        """`<work>/<name>.<kind>.json`."""
        return Path(self.work) / f"{self.name}.{kind}.json"


def read_job(path: Path) -> Job:
    """Read a job. Raises ConfigError."""
    return validate(json.loads(path.read_text(encoding="utf-8")), Job, where=str(path))


def run_job(job: Job, on_start: Callable[[subprocess.Popen[bytes]], None] | None = None) -> dict[str, Any]:
    """Run `job` in a process of its own and wait for its result.

    The result has `isolated`: whether this process was, and for a fine-tuning every one before it in `fits`.
    `on_start` is given the process, for a supervisor that must be able to end it. Whatever interrupts
    the wait ends the process too. Raises the IsthmusError that the trainer named, or FederationError.
    """
    folders = {key: str(Path(value).resolve()) for key in _PATHS if (value := getattr(job, key))}
    job = job.model_copy(update=folders)
    path = job.file("job")
    write_atomic(path, job.model_dump_json(indent=1).encode())
    for kind in ("result", "error"):
        job.file(kind).unlink(missing_ok=True)
    # one malloc arena: autograd's thread frees what the main thread took, which fragments several
    environment = {"MALLOC_ARENA_MAX": "1", **os.environ}
    if job.threads:
        environment |= {"OMP_NUM_THREADS": str(job.threads), "TOKENIZERS_PARALLELISM": "false"}
    told, tell = os.pipe()
    with (Path(job.work) / "trainer.log").open("ab") as log, os.fdopen(told, "rb") as word:
        try:
            process = subprocess.Popen(
                [sys.executable, "-P", "-m", "clients.training", str(path), str(tell)],
                cwd=job.work,
                env=environment,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                pass_fds=(tell,),
            )
        finally:
            os.close(tell)
        try:
            if on_start is not None:
                on_start(process)
            isolated = noted(job, isolated=word.read(1) == ISOLATED)
            status = process.wait()
        except BaseException:
            process.kill()
            process.wait()
            raise
    if status == DONE and job.file("result").is_file():
        result: dict[str, Any] = json.loads(job.file("result").read_text(encoding="utf-8"))
        return {**result, "isolated": isolated}
    raise _named_error(job, status)


_PATHS = ("domain", "base", "work", "status", "model", "numbers", "fits", "home")


def noted(job: Job, *, isolated: bool) -> bool:
    """Whether all that trained in `fits` was isolated; one that was not leaves a mark there."""
    mark = Path(job.fits or job.work) / "not-isolated"
    if job.mode == "fit" and not isolated:
        mark.parent.mkdir(parents=True, exist_ok=True)
        mark.touch()
    return isolated and not (job.mode == "fit" and mark.exists())


def _named_error(job: Job, status: int) -> IsthmusError:
    """The error that the trainer wrote, as the class that it was."""
    log = Path(job.work) / "trainer.log"
    try:
        record = json.loads(job.file("error").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        how = f"was killed by signal {-status}" if status < 0 else f"ended with exit code {status}"
        return FederationError(f"the trainer {how}", next_step=f"start again to go on; its log is {log}")
    kinds = {kind.code: kind for kind in _subclasses(IsthmusError)}
    kind = kinds.get(record["code"], FederationError)
    try:
        return kind(record["message"], next_step=record["next_step"])
    except TypeError:  # an error that needs more than a message
        return FederationError(record["message"], next_step=record["next_step"])


def _subclasses(kind: type[IsthmusError]) -> list[type[IsthmusError]]:
    return [found for child in kind.__subclasses__() for found in (child, *_subclasses(child))]
