"""`isthmus evolve`: merge LoRA adapters by what scores well on labelled prompts; a table of other methods."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import click

from common.config import validate
from common.console import errors_as_exit, progress_bars
from common.errors import ConfigError
from common.models.device import default_device
from server.engine.cli import parse_options, split_label
from server.evolution.options import EvolutionOptions

if TYPE_CHECKING:
    from common.config import LoraSection
    from common.language.adapters import Adapter
    from common.language.model import CausalLM
    from server.evolution.compare import Row

ALL = "all"
PATH = click.Path(path_type=Path)


@click.command(context_settings={"help_option_names": ["-h", "--help"]})
@click.option("--base", type=PATH, required=True, help="The base model's folder.")
@click.option("--adapter", "named", multiple=True, metavar="[LABEL=]DIR", help="A PEFT adapter; repeatable.")
@click.option("--adapters", "folder", type=PATH, help="A folder of such folders.")
@click.option("--samples", type=PATH, required=True, help="JSON lines: prompt, answer and perhaps others.")
@click.option("--test", type=PATH, help="The same, to report the loss on; no search sees them.")
@click.option("--method", "methods", multiple=True, help='Of the table; "all" for every one. [evo-merging]')
@click.option("--option", "options", multiple=True, metavar="KEY=VALUE", help="An option of evo-merging.")
@click.option("--domain", help="The adapter whose domain the samples are of, for emr.")
@click.option("--seed", type=click.IntRange(min=0), default=0, show_default=True)
@click.option("--batch-size", type=click.IntRange(min=1), default=8, show_default=True)
@click.option("--device", default="auto", show_default=True, help="cpu, cuda, ...; auto: cuda where it is.")
@click.option("--workers", type=click.IntRange(min=1), default=1, show_default=True, help="Processes (CPU).")
@click.option("--out", type=PATH, required=True, help="Folder of results.")
@click.option("--format", "shown_as", type=click.Choice(["text", "json"]), default="text", show_default=True)
def evolve(
    base: Path,
    named: Sequence[str],
    folder: Path | None,
    samples: Path,
    test: Path | None,
    methods: Sequence[str],
    options: Sequence[str],
    domain: str | None,
    seed: int,
    batch_size: int,
    device: str,
    workers: int,
    out: Path,
    shown_as: str,
) -> None:
    """Merge adapters of one base by Evo-Merging. Interrupted, the same command goes on."""
    with errors_as_exit():
        search = validate(parse_options(options), EvolutionOptions, where="--option")

        from common.digests import json_digest
        from common.language.samples import read_samples
        from server.evolution.compare import METHODS, compare

        lora, adapters = _adapters(base, named, folder)
        held_out = read_samples(test) if test else []

        def measure(lm: CausalLM) -> dict[str, float]:
            from common.language.validation import Validation

            return {"test_loss": float(Validation(lm, held_out, batch_size).losses().mean())}

        with progress_bars() as report:
            rows = compare(
                base,
                lora,
                adapters,
                read_samples(samples),
                out,
                methods=METHODS if ALL in methods else methods or ("evo-merging",),
                options=search,
                measure=measure if held_out else None,
                measure_key=json_digest({"samples": held_out}),
                domain=domain,
                seed=seed,
                batch_size=batch_size,
                device=default_device(device),
                workers=workers,
                report=report,
            )
        _show(rows, shown_as)


def _adapters(
    base: Path, named: Sequence[str], folder: Path | None
) -> tuple[LoraSection, dict[str, Adapter]]:
    """The `[lora]` section that all share, and the adapters by label.

    Raises ConfigError; else as `load_adapter`.
    """
    from common.language.adapters import is_adapter, load_adapter

    found = [(label or Path(path).name, Path(path)) for label, path in map(split_label, named)]
    if folder is not None and folder.is_dir():
        found += [(path.name, path) for path in sorted(folder.iterdir()) if is_adapter(path)]
    if not found:
        raise ConfigError("no adapters to merge", next_step="name them: --adapter DIR, or --adapters DIR")
    sections, adapters = {}, {}
    for label, path in found:
        if label in adapters:
            raise ConfigError(f"two adapters are called {label!r}", next_step="write --adapter LABEL=DIR")
        sections[label], adapters[label] = load_adapter(path, base)
    first = found[0][0]
    for label, section in sections.items():
        if (section.rank, section.alpha) != (sections[first].rank, sections[first].alpha):
            raise ConfigError(
                f"adapter {label} has rank {section.rank} and alpha {section.alpha:g}, {first} "
                f"{sections[first].rank} and {sections[first].alpha:g}",
                next_step="factors of adapters mix only at the same rank and alpha",
            )
    return sections[first], adapters


def _show(rows: Sequence[Row], shown_as: str) -> None:
    from dataclasses import asdict

    if shown_as == "json":
        click.echo(json.dumps([asdict(row) for row in rows]))
        return
    measures = sorted({name for row in rows for name in row.measures})
    click.echo("| " + " | ".join(["method", "loss", *measures, "evaluations", "seconds"]) + " |")
    click.echo("|" + "---|" * (4 + len(measures)))
    for row in rows:
        cells = [row.method, f"{row.loss:.4f}", *(f"{row.measures[name]:.4f}" for name in measures)]
        click.echo("| " + " | ".join([*cells, str(row.evaluations), f"{row.seconds:.1f}"]) + " |")
    for row in rows:
        if "warning" in row.facts:
            click.echo(f"{row.method}: {row.facts['warning']}", err=True)
