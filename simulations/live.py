"""Live progress of a simulated federation: one row a domain, one for the server.

On a terminal a table that redraws itself; elsewhere a line whenever a party enters a phase, and one
every few seconds while it stays there. Read from the status files that every party keeps for itself.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.live import Live
from rich.table import Table

from common.progress import read_status

LINE_EVERY_S = 15.0


class Progress:
    """Draws the status files in `statuses` (name -> path)."""

    def __init__(self, statuses: Mapping[str, Path], console: Console | None = None) -> None:
        self._statuses = dict(statuses)
        self._console = console or Console(stderr=True)
        self._live: Live | None = None
        self._said: dict[str, tuple[str, float]] = {}

    @contextmanager
    def shown(self) -> Iterator[Progress]:
        """Draw while the block runs."""
        if not self._console.is_terminal:
            yield self
            return
        with Live(self._table(), console=self._console, refresh_per_second=4) as self._live:
            yield self
        self._live = None

    def watch(self, name: str, path: Path) -> None:
        """Follow one more status file."""
        self._statuses[name] = path

    def __call__(self) -> None:
        """Draw what is known now."""
        if self._live is not None:
            self._live.update(self._table())
            return
        for name, path in self._statuses.items():
            self._say(name, read_status(path))

    def _say(self, name: str, state: Mapping[str, Any]) -> None:
        phase = str(state.get("phase", ""))
        if not phase:
            return
        before, said_s = self._said.get(name, ("", 0.0))
        now_s = time.monotonic()
        if phase == before and now_s - said_s < LINE_EVERY_S:
            return
        self._said[name] = (phase, now_s)
        columns = _columns(state)
        text = "  ".join(f"{label} {value}" for label, value in zip(LABELS, columns, strict=True) if value)
        self._console.print(f"{name:12} {text}", highlight=False, soft_wrap=True)

    def _table(self) -> Table:
        table = Table(box=None, pad_edge=False)
        table.add_column("")
        for label in LABELS:
            table.add_column(label, justify="left" if label == "phase" else "right")
        for name, path in self._statuses.items():
            table.add_row(name, *_columns(read_status(path)))
        return table


LABELS = ("phase", "step", "loss", "sent", "left")


def _columns(state: Mapping[str, Any]) -> list[str]:
    total, step = state.get("total", 0), state.get("step", 0)
    loss, sent, left_s = state.get("loss"), state.get("bytes_sent"), state.get("eta_s")
    return [
        str(state.get("phase", "waiting")),
        f"{step}/{total}" if total else "",
        "" if loss is None else f"{loss:.3f}",
        "" if not sent else _bytes(sent),
        "" if left_s is None else _seconds(left_s),
    ]


def _bytes(count: float) -> str:
    for unit in ("B", "KB", "MB"):
        if count < 1000:
            return f"{count:.0f} {unit}"
        count /= 1000
    return f"{count:.1f} GB"


def _seconds(left_s: float) -> str:
    return f"{left_s:.0f} s" if left_s < 100 else f"{left_s / 60:.0f} min"
