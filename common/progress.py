"""Progress of long work: one small status file a process, and one line an event in a metrics log.

Everything long takes a `report` callable; `NO_REPORT` ignores what it is told. A `StatusFile` keeps
the newest state in `status.json` (replaced atomically, at most a few times a second) for whoever
draws it, and estimates the seconds left from the pace of the current phase.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol

MIN_INTERVAL_S = 0.25


class Report(Protocol):
    """`report(phase="train", step=3, total=100, loss=1.2)`; bytes are counted since the run began."""

    def __call__(
        self,
        *,
        phase: str,
        step: int = 0,
        total: int = 0,
        loss: float | None = None,
        bytes_sent: int | None = None,
    ) -> None: ...


def NO_REPORT(  # noqa: N802 - a constant that happens to be callable
    *, phase: str, step: int = 0, total: int = 0, loss: float | None = None, bytes_sent: int | None = None
) -> None:
    """Ignore what is reported."""


def prefixed(report: Report, prefix: str, main: str = "learn") -> Report:
    """The same report with `prefix` before the name of each phase, and in the place of phase `main`."""

    def with_prefix(
        *,
        phase: str,
        step: int = 0,
        total: int = 0,
        loss: float | None = None,
        bytes_sent: int | None = None,
    ) -> None:
        name = prefix if phase == main else f"{prefix}: {phase}"
        report(phase=name, step=step, total=total, loss=loss, bytes_sent=bytes_sent)

    return with_prefix


class StatusFile:
    """A `Report` that keeps `path` up to date; `extra` fields (domain, run) are written along."""

    def __init__(self, path: Path, clock: Callable[[], float] = time.time, **extra: str) -> None:
        self._path = path
        self._clock = clock
        self._extra = extra
        self._state: dict[str, Any] = {}
        self._phase_started_s = clock()
        self._phase_first_step = 0
        self._written_s = 0.0
        path.parent.mkdir(parents=True, exist_ok=True)

    def __call__(
        self,
        *,
        phase: str,
        step: int = 0,
        total: int = 0,
        loss: float | None = None,
        bytes_sent: int | None = None,
    ) -> None:
        now_s = self._clock()
        changed = phase != self._state.get("phase")
        if changed:
            self._phase_started_s, self._phase_first_step = now_s, step
            self._state.pop("loss", None)
        self._state.update(phase=phase, step=step, total=total, eta_s=self._eta_s(now_s, step, total))
        if loss is not None:
            self._state["loss"] = round(loss, 4)
        if bytes_sent is not None:
            self._state["bytes_sent"] = bytes_sent
        if changed or now_s - self._written_s >= MIN_INTERVAL_S or step == total:
            self._write(now_s)

    def _eta_s(self, now_s: float, step: int, total: int) -> float | None:
        done = step - self._phase_first_step
        if done <= 0 or total <= step:
            return None
        return round((now_s - self._phase_started_s) / done * (total - step), 1)

    def _write(self, now_s: float) -> None:
        self._written_s = now_s
        record = {**self._extra, **self._state, "updated_s": round(now_s, 2)}
        temporary = self._path.with_suffix(".tmp")
        temporary.write_text(json.dumps(record), encoding="utf-8")
        temporary.replace(self._path)


def read_status(path: Path) -> dict[str, Any]:
    """The newest status, or an empty dict while there is none."""
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return data if isinstance(data, dict) else {}
