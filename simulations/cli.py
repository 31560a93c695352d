"""`isthmus simulate`, `isthmus demo`, `isthmus study` and `isthmus attacks`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from simulations.seeds import seed_numbers

simulate = typer.Typer(add_completion=False)
demo = typer.Typer(add_completion=False)
study = typer.Typer(add_completion=False)
attacks = typer.Typer(add_completion=False)


@simulate.command()
def simulate_command(
    config: Annotated[Path, typer.Argument(help="the simulation's configuration, TOML")],
    out: Annotated[Path, typer.Option(help="folder of the results; an interrupted one is resumed")],
    fresh: Annotated[
        bool, typer.Option("--fresh", help="remove what is in the folder and begin anew")
    ] = False,
    seed: Annotated[int | None, typer.Option(help="instead of run.seed")] = None,
) -> None:
    """Run a whole federation of real processes on this machine."""
    from simulations.config import load_simulation
    from simulations.simulate import run_simulation

    loaded = load_simulation(config)
    if seed is not None:
        loaded = loaded.model_copy(update={"run": loaded.run.model_copy(update={"seed": seed})})
    run_simulation(loaded, out, fresh=fresh)


@demo.command()
def demo_command(
    out: Annotated[Path, typer.Option(help="folder of the results")] = Path("runs/demo"),
    seed: Annotated[int, typer.Option(help="seed of data and training")] = 0,
    fresh: Annotated[bool, typer.Option("--fresh", help="begin anew, also over an interrupted one")] = False,
) -> None:
    """A federation of four synthetic domains on this machine, from data to recommendations."""
    from simulations.demo import run_demo

    run_demo(out, seed, fresh=fresh)


@study.command()
def study_command(
    table: Annotated[str, typer.Argument(help="methods, slices, unseen, scarce or count")],
    config: Annotated[Path, typer.Argument(help="a simulation's configuration, TOML")],
    out: Annotated[Path, typer.Option(help="folder of the results; what is there already is not made again")],
    seeds: Annotated[str, typer.Option(help="instead of run.seed; each draws its own users")] = "0,1,2",
    merges: Annotated[str, typer.Option(help="labels of the merges to compare; empty: all")] = "",
    domains: Annotated[str, typer.Option(help="domains that the table is about; empty: all")] = "",
    validation: Annotated[
        bool, typer.Option("--validation", help="rank validation items, to choose by, instead of test items")
    ] = False,
) -> None:
    """Fine-tune, merge and evaluate in this process, and print one table with its uncertainty."""
    from simulations.config import load_simulation
    from simulations.study.run import run_study, shown

    numbers = seed_numbers(seeds)
    with shown(out) as report:
        path = run_study(
            table,
            load_simulation(config),
            out,
            numbers,
            report,
            merges=_words(merges),
            domains=_words(domains),
            split="valid" if validation else "test",
        )
    typer.echo(path.read_text(encoding="utf-8"))
    typer.echo(f"table: {path}")


@attacks.command()
def attacks_command(
    config: Annotated[Path, typer.Argument(help="a simulation's configuration with [attacks], TOML")],
    out: Annotated[Path, typer.Option(help="folder of the results; what is there already is not made again")],
    only: Annotated[str, typer.Option(help="membership, vocabulary, poisoning, privacy; empty: all")] = "",
    seed: Annotated[int | None, typer.Option(help="instead of run.seed")] = None,
) -> None:
    """Attack task vectors: who and which words were in the data, and what a poisoned one does."""
    from simulations.attacks.config import load_attacks
    from simulations.attacks.run import run_attacks
    from simulations.study.run import shown

    loaded = load_attacks(config)
    if seed is not None:
        loaded = loaded.model_copy(update={"run": loaded.run.model_copy(update={"seed": seed})})
    with shown(out, "attacks") as report:
        paths = run_attacks(loaded, out, _words(only), report)
    for path in paths:
        typer.echo(path.read_text(encoding="utf-8"))
        typer.echo(f"table: {path}")


def _words(listed: str) -> list[str]:
    """What stands between the commas."""
    return [word.strip() for word in listed.split(",") if word.strip()]
