"""The `isthmus` command: knows its subcommands by name and imports only the one that is asked for.

That keeps the layers apart (server and clients never import each other) and the start fast. Other packages
can add a command as an entry point in the group `isthmus.commands`. Ours are named here, because the entry
points of every installed package take longer to look through than a small merge.
"""

from __future__ import annotations

import atexit
import gc
import sys
from importlib import import_module
from typing import TYPE_CHECKING, Any

import click

from common.console import ERROR_EXIT, show_error
from common.errors import IsthmusError
from common.guard import check_imports

if TYPE_CHECKING:
    from importlib.metadata import EntryPoint

GROUP = "isthmus.commands"
HELP = {
    "attacks": "attack task vectors: what they leak, and what a poisoned one does",
    "audit": "prove offline what crossed: bundle, verify, report, show, scan",
    "client": "an owner's side: join a federation, serve it, recommend",
    "data": "check and prepare a domain's data",
    "demo": "a whole federation on this machine, on synthetic data",
    "evolve": "merge LoRA adapters by what scores well on labelled prompts",
    "language": "causal language models: train a small one, measure one, plan a large one",
    "merge": "merge local model folders or adapters, without a server",
    "root": "the root file under several keys: key, draft, sign, install",
    "run": "start, watch and stop runs, withdraw a vector (on the merge server's host)",
    "server": "the merge server: init, invite, up, status",
    "simulate": "a whole federation on this machine, from a configuration",
    "study": "tables of merge methods over domains and seeds, with their uncertainty",
    "witness": "an independent witness that cosigns ledgers: init, card, up, status",
}
OURS = {
    "attacks": "simulations.cli:attacks",
    "audit": "common.audit.cli:app",
    "client": "clients.cli:app",
    "data": "clients.data.cli:app",
    "demo": "simulations.cli:demo",
    "evolve": "server.evolution.cli:evolve",
    "language": "simulations.language.cli:app",
    "merge": "server.engine.cli:merge",
    "root": "server.root_cli:app",
    "run": "server.cli:run_app",
    "server": "server.cli:app",
    "simulate": "simulations.cli:simulate",
    "study": "simulations.cli:study",
    "witness": "common.witness.cli:app",
}


class LazyGroup(click.Group):
    """A click group whose commands are imported when they are used: `OURS`, then entry points."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return sorted({*OURS, *_others()})

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name in OURS:
            module, _, attribute = OURS[cmd_name].partition(":")
            loaded = getattr(import_module(module), attribute)
        elif (point := _others().get(cmd_name)) is not None:
            loaded = point.load()
        else:
            return None
        command = loaded if isinstance(loaded, click.Command) else _from_typer(loaded)
        command.name = cmd_name
        if not gc.isenabled():  # by `main`
            gc.freeze()
            gc.enable()
        return command

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        with formatter.section("Commands"):
            formatter.write_dl([(name, HELP.get(name, "")) for name in self.list_commands(ctx)])


def _others() -> dict[str, EntryPoint]:
    """The commands of every installed package."""
    from importlib.metadata import entry_points

    return {point.name: point for point in entry_points(group=GROUP)}


def _from_typer(app: Any) -> click.Command:
    import typer

    return typer.main.get_command(app)


@click.command(cls=LazyGroup, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(package_name="isthmus", prog_name="isthmus")
def cli() -> None:
    """One universal recommender from many catalogs; no interaction ever leaves its owner."""


def main() -> None:
    """Entry point of the `isthmus` script."""
    # imports make many objects, and all stay: to look for garbage among them, and again at the end of the
    # process, takes a seventh of a small merge's time
    gc.disable()
    atexit.register(gc.freeze)
    try:
        check_imports()
        cli()
    except IsthmusError as err:
        show_error(err)
        sys.exit(ERROR_EXIT)
    finally:
        gc.enable()
