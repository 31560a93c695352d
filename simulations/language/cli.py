"""`isthmus language`: the owner's commands, and what needs no owner: `pretrain`, `plan`, `study`."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from clients.language_cli import app as owners
from common.console import errors_as_exit
from common.errors import ConfigError
from simulations.seeds import seed_numbers

app = typer.Typer(
    help="Causal language models: train a small one, measure one, plan a large one.", no_args_is_help=True
)
app.add_typer(owners)

OutOption = Annotated[
    Path, typer.Option("--out", help="folder of the results; an interrupted one is resumed")
]


@app.command("pretrain")
@errors_as_exit()
def pretrain_command(
    config: Annotated[Path, typer.Argument(help="a simulation's configuration with [pretraining], TOML")],
    out: OutOption,
) -> None:
    """Train a small causal model from scratch on the domains' public catalogs."""
    from simulations.language.config import load_language
    from simulations.language.pretrain import PHASE, pretrain
    from simulations.study.run import shown

    loaded = load_language(config)
    with shown(out, PHASE) as report:
        folder = pretrain(loaded, out, report)
    typer.echo(f"model: {folder}")


@app.command("plan")
@errors_as_exit()
def plan_command(
    config: Annotated[Path, typer.Argument(help="a run's configuration with [lora], TOML")],
    gpus: Annotated[int, typer.Option(min=1, help="GPUs that share the model, block by block")] = 1,
    gpu_memory_gib: Annotated[float, typer.Option(min=1, help="memory of each")] = 80.0,
    tokens: Annotated[int, typer.Option(min=2, help="of an example, answer included")] = 1024,
    answer_tokens: Annotated[int, typer.Option(min=1, help="of them the answer")] = 64,
    tflops: Annotated[float, typer.Option(min=0.001, help="sustained by one GPU, in 10^12 a second")] = 300.0,
    format_name: Annotated[str, typer.Option("--format", help="text or json")] = "text",
) -> None:
    """What LoRA fine-tuning of a published model needs, without its weights; exit 1 where it does not fit."""
    from common.config import InstructionSection, RunConfig, load_toml
    from simulations.language.plan import GIB, Batch, make_plan, most_at_once

    if answer_tokens >= tokens:
        raise ConfigError("--answer-tokens is no part of --tokens", next_step="give fewer")
    loaded = load_toml(config, RunConfig)
    section = loaded.instruction or InstructionSection()
    plan = make_plan(loaded, Batch(section.prompts_at_once, tokens, answer_tokens), gpus, tflops)
    memory_bytes = gpu_memory_gib * GIB
    fits = max(size for _, size in plan.shards) <= memory_bytes
    most = most_at_once(loaded, tokens, answer_tokens, gpus, memory_bytes)
    if format_name == "json":
        typer.echo(json.dumps({**asdict(plan), "fits": fits, "most_at_once": most}, indent=2))
    else:
        for line in plan.lines(fits=fits, gpu_memory_gib=gpu_memory_gib, most=most):
            typer.echo(line)
    if not fits:
        raise typer.Exit(1)


@app.command("study")
@errors_as_exit()
def study_command(
    table: Annotated[str, typer.Argument(help="cocktail or evolution")],
    config: Annotated[
        Path, typer.Argument(help="a simulation's configuration with [lora] and [instruction], TOML")
    ],
    model: Annotated[
        Path, typer.Option("--model", help="the folder that `pretrain` made, or another causal model")
    ],
    out: OutOption,
    seeds: Annotated[str, typer.Option(help="each draws its own users")] = "0,1,2",
) -> None:
    """Fine-tune adapters, merge and evaluate in this process, and print one table with its spread."""
    from simulations.language.config import load_language
    from simulations.language.study import run_language_study
    from simulations.study.run import shown

    numbers = seed_numbers(seeds)
    with shown(out) as report:
        path = run_language_study(table, load_language(config), model, out, numbers, report)
    typer.echo(path.read_text(encoding="utf-8"))
    typer.echo(f"table: {path}")
