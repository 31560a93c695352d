"""`isthmus merge`: merge local model folders by a recipe or by flags.

The result is told on stdout, everything else on stderr. torch is imported only where a method needs it.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import click

from common.console import errors_as_exit, progress_bars
from common.errors import ConfigError
from server.engine.forks import default_workers
from server.engine.recipe import (
    DEVICES,
    DTYPES,
    Recipe,
    absolute,
    free_label,
    make_recipe,
    read_recipe,
)
from server.engine.run import merge_folders

EPILOG = "Without a server and without a network. docs/merging.md has examples."


@click.command(epilog=EPILOG, no_args_is_help=True, context_settings={"help_option_names": ["-h", "--help"]})
@click.argument("recipe", required=False, type=click.Path(path_type=Path))
@click.option("--base", help='Base model: a folder, or "embedded".')
@click.option("--model", "models", multiple=True, metavar="[LABEL=]DIR", help="A model; once for each.")
@click.option("--catalog", "catalogs", multiple=True, metavar="LABEL=FILE", help="Items of a model's domain.")
@click.option("--weight", "weights", multiple=True, metavar="LABEL=NUMBER", help="Factor on a task vector.")
@click.option("--method", help="The merge method; --explain all lists them.")
@click.option("--option", "options", multiple=True, metavar="KEY=VALUE", help="An option of the method.")
@click.option("--out", type=click.Path(path_type=Path), help="Folder of the result.")
@click.option("--dtype", type=click.Choice(DTYPES), help="Of the result; base: as the base has it.")
@click.option("--seed", type=int, help="Of learned methods, and of methods that draw.")
@click.option("--device", type=click.Choice(DEVICES), help="For methods that need catalogs.")
@click.option(
    "--workers",
    type=click.IntRange(1),
    help="Processes at most, for methods that read blocks; default: one for each processor.",
)
@click.option("--force", is_flag=True, help="Replace a merged folder that exists.")
@click.option("--no-digests", is_flag=True, help="Do not compute the inputs' SHA-256 for the card.")
@click.option("--format", "shown_as", type=click.Choice(["text", "json"]), default="text", show_default=True)
@click.option("--explain", metavar="METHOD", help='What a method does, needs and costs; "all" for every one.')
def merge(
    recipe: Path | None,
    out: Path | None,
    force: bool,
    no_digests: bool,
    workers: int | None,
    shown_as: str,
    explain: str | None,
    **flags: Any,
) -> None:
    """Merge models of one base, or PEFT adapters, by RECIPE (a TOML file) or by flags."""
    with errors_as_exit():
        if explain is not None:
            _explain(explain, shown_as)
            return
        found = _recipe(recipe, out, flags)
        try:
            with progress_bars() as report:
                record = merge_folders(
                    found,
                    force=force,
                    digests=not no_digests,
                    workers=workers or default_workers(),
                    report=report,
                )
        except KeyboardInterrupt:
            click.echo("what is done is kept: the same command goes on from there", err=True)
            raise
        if shown_as == "json":
            click.echo(json.dumps({"out": str(found.out), **record}))
        else:
            for warning in record["warnings"]:
                click.echo(f"warning: {warning}", err=True)
            facts = record.get("facts", {})
            if "why" in facts:
                click.echo(f"chose {facts['chosen']}: {facts['why']}")
            click.echo(
                f"merged {len(found.models)} by {found.method} into {found.out} in {record['seconds']} s"
            )


def _recipe(path: Path | None, out: Path | None, flags: dict[str, Any]) -> Recipe:
    given = {key: value for key, value in flags.items() if value}
    if path is not None:
        if given:
            flag = next(iter(given)).removesuffix("s")
            raise ConfigError(
                f"--{flag} and a recipe file were given",
                next_step="write it in the recipe, or use flags alone",
            )
        return read_recipe(path, out)
    models: list[dict[str, Any]] = []
    for text in given.pop("models", ()):
        label, folder = split_label(text)
        label = label or free_label(absolute(Path.cwd(), folder), [model["label"] for model in models])
        models.append({"label": label, "path": folder})
    labels = {model["label"]: model for model in models}
    for flag, key in (("catalogs", "catalog"), ("weights", "weight")):
        for text in given.pop(flag, ()):
            label, value = _pair(text, f"--{key}")
            if label not in labels:
                raise ConfigError(
                    f"--{key} {text}: no model is called {label!r}",
                    next_step=f"there are {', '.join(labels)}",
                )
            labels[label][key] = value if key == "catalog" else _value(value)
    data = {**given, "model": models, "options": parse_options(given.pop("options", ()))}
    return make_recipe(data, where="command line", folder=Path.cwd(), out=out)


def parse_options(texts: Iterable[str]) -> dict[str, Any]:
    """`KEY=VALUE` texts as a table of a TOML file would have them. Raises ConfigError."""
    return {key: _value(value) for key, value in (_pair(text, "--option") for text in texts)}


def split_label(text: str) -> tuple[str, str]:
    """Label and folder of `[LABEL=]DIR`; the label is empty where none is given."""
    label, equals, path = text.partition("=")
    return (label, path) if label and equals and "/" not in label and not Path(text).exists() else ("", text)


def _pair(text: str, flag: str) -> tuple[str, str]:
    key, equals, value = text.partition("=")
    if not equals or not key:
        raise ConfigError(f"{flag} {text}: expected KEY=VALUE", next_step=f"write {flag} key=value")
    return key, value


def _value(text: str) -> float | int | str | bool:
    """A value as TOML has it; what is none is a text."""
    if text in ("true", "false"):
        return text == "true"
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            continue
    return text


def _explain(name: str, shown_as: str) -> None:
    from server.engine.explain import explain

    found = explain(name)
    if shown_as == "json":
        click.echo(json.dumps([one.as_dict() for one in found]))
    else:
        click.echo("\n\n".join(str(one) for one in found))


if __name__ == "__main__":
    from common.guard import check_imports

    check_imports()
    sys.exit(merge())
