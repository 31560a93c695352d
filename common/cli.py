"""The `isthmus` command: finds its subcommands by entry point and loads only the one that is asked for.

Entry points keep the layers apart (server and clients never import each other) and the start fast.
A package of somebody else can add a command by declaring one in the group `isthmus.commands`.
"""

from __future__ import annotations

import sys
from importlib.metadata import EntryPoint, entry_points, version
from typing import Any

import click
import typer

from common.console import ERROR_EXIT, show_error
from common.errors import IsthmusError
from common.guard import check_imports

GROUP = "isthmus.commands"
HELP = {
    "client": "an owner's side: join a federation, serve it, recommend",
    "data": "check and prepare a domain's data",
    "demo": "a whole federation on this machine, on synthetic data",
    "run": "start, watch and stop runs (on the merge server's host)",
    "server": "the merge server: init, invite, up, status",
    "simulate": "a whole federation on this machine, from a configuration",
}


class LazyGroup(click.Group):
    """A click group whose commands are entry points, imported when they are used."""

    def __init__(self, **attributes: Any) -> None:
        super().__init__(**attributes)
        self._points: dict[str, EntryPoint] = {point.name: point for point in entry_points(group=GROUP)}

    def list_commands(self, ctx: click.Context) -> list[str]:
        return sorted(self._points)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        point = self._points.get(cmd_name)
        if point is None:
            return None
        loaded = point.load()
        command = typer.main.get_command(loaded) if isinstance(loaded, typer.Typer) else loaded
        command.name = cmd_name
        return command

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        with formatter.section("Commands"):
            formatter.write_dl([(name, HELP.get(name, "")) for name in self.list_commands(ctx)])


@click.command(cls=LazyGroup, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(version("isthmus"), prog_name="isthmus")
def cli() -> None:
    """One universal recommender from many catalogs; no interaction ever leaves its owner."""


def main() -> None:
    """Entry point of the `isthmus` script."""
    try:
        check_imports()
        cli()
    except IsthmusError as err:
        show_error(err)
        sys.exit(ERROR_EXIT)
