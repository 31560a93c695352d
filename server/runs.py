"""Runs: what the operator asked for, how far it is, and the folder of its results.

A run is a directory `runs/<id>/` in the server's home. `isthmus run start` creates it; the ServerApp
works through it; the Exchange reads from it what may be admitted. States only move forward:
pending -> running -> done | failed | stopped. Everything is on disk, so that any process can be killed
and another one goes on.

    run.json          resolved configuration, base-model digest, expected tensors, members, created
    state.json        state, phase, reason (replaced atomically)
    journal.jsonl     what was asked, answered, merged (append-only)
    merges/<label>/   one folder a merge: vector, coefficients, trajectory
    model/            the published universal model
    summary.json, metrics.jsonl, report.html
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import logging
import secrets
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from common.config import RunConfig, validate
from common.errors import FederationError
from common.files import write_atomic
from common.ledger import Journal

log = logging.getLogger(__name__)

PENDING, RUNNING, DONE, FAILED, STOPPED = "pending", "running", "done", "failed", "stopped"
FINAL = frozenset({DONE, FAILED, STOPPED})


@dataclass(frozen=True)
class Withdrawal:
    """What a run is that takes a domain's vector out of another run's model (`server.withdrawal`)."""

    run: str  # the finished run that merged the vector
    domain: str
    parcel: str  # the task vector's parcel and payload
    payload: str
    remerge: bool = True  # whether a model without it is merged and published


@dataclass(frozen=True)
class RunSpec:
    """What a run is; never changes after its creation."""

    run_id: str
    config: RunConfig
    base_digest: str
    tensors: dict[str, list[int]]  # name -> shape of every tensor that a task vector must hold
    members: tuple[str, ...]
    created_s: int
    withdrawal: Withdrawal | None = None

    @property
    def deadline_s(self) -> float:
        """Unix seconds after which the run goes on with the quorum."""
        return self.created_s + 60.0 * self.config.run.deadline_minutes

    @property
    def quorum(self) -> int:
        """How many domains must deliver; 0 in the configuration means all."""
        return min(self.config.run.quorum or len(self.members), len(self.members))


class Run:
    """One run's directory."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._spec: RunSpec | None = None

    @property
    def spec(self) -> RunSpec:
        """The run's fixed facts. Raises FederationError when the file cannot be read."""
        if self._spec is None:
            self._spec = _read_spec(self.folder / "run.json")
        return self._spec

    @property
    def state(self) -> dict[str, Any]:
        """`{"state": ..., "phase": ..., "reason": ..., "updated_s": ...}`."""
        try:
            data = json.loads((self.folder / "state.json").read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return {"state": PENDING, "phase": "", "reason": ""}
        return dict(data)

    @property
    def is_final(self) -> bool:
        """Whether nothing more will happen."""
        return self.state["state"] in FINAL

    def set_state(self, state: str, *, phase: str = "", reason: str = "") -> None:
        """Record a state; a final one is never left again."""
        if self.is_final:
            return
        record = {"state": state, "phase": phase, "reason": reason, "updated_s": round(time.time(), 2)}
        write_atomic(self.folder / "state.json", json.dumps(record).encode())

    @property
    def merged_domains(self) -> list[str]:
        """Whose vectors this run has taken for its merges; empty before it did."""
        fact = Journal(self.folder / "journal.jsonl").get("contributed") or {}
        return [str(domain) for domain in fact.get("delivered", [])]

    def stop(self) -> None:
        """Ask whoever works on the run to end it."""
        (self.folder / "stop").touch()

    @property
    def stop_asked(self) -> bool:
        """Whether the operator asked for an end."""
        return (self.folder / "stop").exists()

    @contextmanager
    def working(self) -> Iterator[bool]:
        """Hold the run's lock while working on it; yields False when another process holds it."""
        with (self.folder / "lock").open("w") as lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                yield False
                return
            yield True

    @property
    def is_worked_on(self) -> bool:
        """Whether a live process holds the lock."""
        with self.working() as free:
            return not free


class Runs:
    """All runs of a server's home."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        folder.mkdir(parents=True, exist_ok=True)

    def create(
        self,
        config: RunConfig,
        *,
        base_digest: str,
        tensors: dict[str, list[int]],
        members: tuple[str, ...],
        withdrawal: Withdrawal | None = None,
    ) -> Run:
        """A new pending run. Raises FederationError without members or with too few for the quorum."""
        if not members and withdrawal is None:
            raise FederationError("no domain has joined", next_step="isthmus server invite DOMAIN, then join")
        if config.run.quorum > len(members):
            raise FederationError(
                f"run.quorum is {config.run.quorum}, but {len(members)} domains have joined",
                next_step="lower the quorum or wait for more domains to join",
            )
        resolved = config.model_dump_json()
        mark = hashlib.sha256(f"{resolved}{base_digest}{secrets.token_hex(8)}".encode()).hexdigest()[:8]
        run_id, now_s = f"{config.run.name}-{mark}", int(time.time())
        spec = RunSpec(run_id, config, base_digest, tensors, members, now_s, withdrawal)
        folder = self._folder / spec.run_id
        folder.mkdir()
        record = {**asdict(spec), "config": json.loads(resolved)}
        write_atomic(folder / "run.json", json.dumps(record, indent=1).encode())
        run = Run(folder)
        run.set_state(PENDING)
        return run

    def get(self, run_id: str) -> Run:
        """The run of that id, or of the only id that starts so. Raises FederationError."""
        exact = self._folder / run_id
        if run_id and exact.is_dir() and exact.parent == self._folder:
            return Run(exact)
        near = [run for run in self.all() if run.folder.name.startswith(run_id)]
        if len(near) == 1:
            return near[0]
        raise FederationError(
            f"no run is called {run_id!r}" if not near else f"several runs start with {run_id!r}",
            next_step="isthmus run list",
        )

    def all(self) -> list[Run]:
        """Every run that can be read, oldest first."""
        found = []
        for path in self._folder.glob("*/run.json"):
            try:
                found.append((Run(path.parent).spec.created_s, path.stat().st_mtime_ns, path.parent))
            except FederationError as err:
                log.warning("%s", err)
        return [Run(folder) for _, _, folder in sorted(found)]

    def source(self, run: Run) -> Run:
        """The run whose vectors `run` merges: itself, unless it is a withdrawal."""
        return self.get(run.spec.withdrawal.run) if run.spec.withdrawal else run

    def open(self) -> list[Run]:
        """Runs that are not over."""
        return [run for run in self.all() if not run.is_final]


def _read_spec(path: Path) -> RunSpec:
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
        withdrawal = record.get("withdrawal")
        return RunSpec(
            run_id=record["run_id"],
            config=validate(record["config"], RunConfig, where=str(path)),
            base_digest=record["base_digest"],
            tensors=record["tensors"],
            members=tuple(record["members"]),
            created_s=record["created_s"],
            withdrawal=Withdrawal(**withdrawal) if withdrawal else None,
        )
    except (OSError, ValueError, KeyError, TypeError) as err:
        raise FederationError(f"{path}: not a run: {err}", next_step="isthmus run list") from None
