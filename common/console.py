"""What every command line of ours shares: how an error is shown, and how progress is drawn.

An `IsthmusError` is printed on stderr as `error: what` and `  next: what to do`, without a traceback,
and the process ends with code 2; Ctrl-C ends it with 130. Anything else is a bug and keeps its traceback.

    @app.command()
    @errors_as_exit()
    def check(path: Path) -> None: ...

rich is imported only where a bar is drawn, so that a small command starts fast.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

import click

from common.errors import IsthmusError
from common.progress import NO_REPORT, Report

if TYPE_CHECKING:
    from rich.progress import Progress, TaskID

ERROR_EXIT = 2
INTERRUPT_EXIT = 130


@contextmanager
def errors_as_exit() -> Iterator[None]:
    """Turn an IsthmusError into a printed diagnosis and exit code 2. Also works as a decorator."""
    try:
        yield
    except IsthmusError as err:
        show_error(err)
        raise click.exceptions.Exit(ERROR_EXIT) from None
    except KeyboardInterrupt:
        click.echo("interrupted", err=True)
        raise click.exceptions.Exit(INTERRUPT_EXIT) from None


def show_error(err: IsthmusError) -> None:
    """Print what went wrong and the next step on stderr."""
    click.echo(f"error: {err.message}", err=True)
    if err.next_step:
        click.echo(f"  next: {err.next_step}", err=True)


class _Bars:
    """One bar a phase; bars of finished phases stay until the block ends."""

    def __init__(self, progress: Progress) -> None:
        self._progress = progress
        self._tasks: dict[str, TaskID] = {}

    def __call__(
        self,
        *,
        phase: str,
        step: int = 0,
        total: int = 0,
        loss: float | None = None,
        bytes_sent: int | None = None,
    ) -> None:
        if phase not in self._tasks:
            self._tasks[phase] = self._progress.add_task(phase, total=total or None, note="")
        note = "" if loss is None else f"loss {loss:.3f}"
        self._progress.update(self._tasks[phase], completed=step, total=total or None, note=note)


@contextmanager
def progress_bars(*, enabled: bool | None = None) -> Iterator[Report]:
    """A `Report` that draws on stderr: on by default when stderr is a terminal; cleared at the end."""
    visible = sys.stderr.isatty() if enabled is None else enabled
    if not visible:
        yield NO_REPORT
        return
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

    console = Console(stderr=True)
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        TextColumn("{task.percentage:>3.0f}%"),
        TimeRemainingColumn(),
        TextColumn("{task.fields[note]}"),
    )
    with Progress(*columns, console=console, transient=True) as progress:
        yield _Bars(progress)
