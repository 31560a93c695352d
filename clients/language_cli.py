"""`isthmus language`: how well a causal language model ranks an owner's data, on the owner's host.

Nothing leaves: what is printed are averages and counts.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any, Literal, cast

import typer

from common.console import errors_as_exit, progress_bars
from common.errors import ConfigError
from common.models.device import default_device

app = typer.Typer(help="Measure causal language models on your own data.", no_args_is_help=True)

ModelArgument = Annotated[Path, typer.Argument(help="a causal model's folder in Hugging Face layout")]
AdapterOption = Annotated[Path | None, typer.Option("--adapter", help="a PEFT LoRA adapter's folder")]
TemplateOption = Annotated[str, typer.Option("--template", help="ranking, next, or a TOML file of your own")]
TitleWordsOption = Annotated[
    int, typer.Option("--title-words", min=0, help="cut titles to so many words; 0: whole")
]
BatchOption = Annotated[int, typer.Option("--batch-size", min=1, help="prompts at a time")]
PrecisionOption = Annotated[str, typer.Option("--precision", help="auto, fp32 or bf16")]
DeviceOption = Annotated[str, typer.Option("--device", help="cpu, cuda, cuda:1, ...; auto: cuda where it is")]
FormatOption = Annotated[str, typer.Option("--format", help="text or json")]


@app.command("evaluate")
@errors_as_exit()
def evaluate_command(
    model: ModelArgument,
    domain: Annotated[Path, typer.Option("--domain", help="a domain folder of `isthmus data prepare`")],
    adapter: AdapterOption = None,
    template: TemplateOption = "ranking",
    protocol: Annotated[str, typer.Option(help="warm (leave-one-out), or cold (unseen targets)")] = "warm",
    scoring: Annotated[
        str, typer.Option(help="likelihood of each candidate, calibrated, or generation")
    ] = "likelihood",
    split: Annotated[str, typer.Option(help="valid or test")] = "test",
    candidates: Annotated[int, typer.Option(min=2)] = 30,
    history_items: Annotated[int, typer.Option(min=1, help="newest items of a history")] = 10,
    title_words: TitleWordsOption = 20,
    max_prompt_tokens: Annotated[int, typer.Option(min=16)] = 1024,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="of a generated answer")] = 128,
    max_users: Annotated[int | None, typer.Option(min=1, help="a seeded draw of the users")] = None,
    seed: Annotated[int, typer.Option(min=0, help="of the candidates")] = 0,
    batch_size: BatchOption = 8,
    precision: PrecisionOption = "auto",
    device: DeviceOption = "auto",
    format_name: FormatOption = "text",
) -> None:
    """Rank each user's next item among candidates: NDCG@1, NDCG@3, Recall."""
    _one_of("--protocol", protocol, ("warm", "cold"))
    _one_of("--scoring", scoring, ("likelihood", "calibrated", "generation"))
    _one_of("--split", split, ("valid", "test"))
    _one_of("--format", format_name, ("text", "json"))
    from clients.data.domain import Domain
    from clients.data.instructions import ranking_set
    from common.language.evaluation import Scoring, evaluate_rankings
    from common.language.prompts import Template

    loaded = Template.load(template)
    made = ranking_set(
        Domain.load(domain), cast(Literal["valid", "test"], split), seed, candidates,
        cast(Literal["warm", "cold"], protocol), history_items=history_items, max_users=max_users,
        title_words=title_words,
    )  # fmt: skip
    lm = _load(model, adapter, precision, device)
    with progress_bars() as report:
        found = evaluate_rankings(
            lm, loaded, made.rankings, cast(Scoring, scoring), batch_size=batch_size,
            max_prompt_tokens=max_prompt_tokens, max_new_tokens=max_new_tokens, report=report,
        )  # fmt: skip
    _print(
        format_name,
        {
            "metrics": found.metrics, "users": len(made.rankings), "left_out": made.left_out,
            "counts": found.counts, "protocol": protocol, "scoring": scoring, "split": split,
            "candidates": candidates, "seed": seed,
        },
    )  # fmt: skip


@app.command("questions")
@errors_as_exit()
def questions_command(
    model: ModelArgument,
    file: Annotated[Path, typer.Argument(help="a TALLRec file: a JSON list of Yes/No questions")],
    adapter: AdapterOption = None,
    template: TemplateOption = "ranking",
    max_questions: Annotated[int | None, typer.Option(min=1, help="the first so many")] = None,
    batch_size: BatchOption = 8,
    precision: PrecisionOption = "auto",
    device: DeviceOption = "auto",
    format_name: FormatOption = "text",
) -> None:
    """Answer Yes/No questions by the likelihood of the two words: AUC."""
    _one_of("--format", format_name, ("text", "json"))
    from clients.data.instructions import read_tallrec
    from common.language.evaluation import evaluate_questions
    from common.language.prompts import Template

    loaded = Template.load(template)
    records = read_tallrec(file)[:max_questions]
    lm = _load(model, adapter, precision, device)
    with progress_bars() as report:
        found = evaluate_questions(lm, loaded, records, batch_size=batch_size, report=report)
    _print(format_name, {"metrics": found.metrics, "questions": len(records)})


@app.command("mix")
@errors_as_exit()
def mix_command(
    model: ModelArgument,
    spirit: Annotated[Path, typer.Option(help="the base spirit: a PEFT folder, e.g. the universal adapter")],
    ingredient: Annotated[Path, typer.Option(help="your own adapter: a PEFT folder")],
    domain: Annotated[Path, typer.Option("--domain", help="a domain folder of `isthmus data prepare`")],
    out: Annotated[Path, typer.Option(help="where the cocktail goes, as a PEFT folder")],
    rule: Annotated[str, typer.Option(help="factors (A and B mixed), or product (B A mixed)")] = "factors",
    granularity: Annotated[str, typer.Option(help="domain (two weights), or layer (two a layer)")] = "domain",
    prompts: Annotated[int, typer.Option(min=2, help="unlabelled prompts")] = 50,
    tokens: Annotated[int, typer.Option(min=1, max=64, help="first answer tokens whose entropy counts")] = 3,
    steps: Annotated[int, typer.Option(min=0)] = 40,
    protocol: Annotated[str, typer.Option(help="warm, or cold: users whose next item is new")] = "warm",
    split: Annotated[str, typer.Option(help="users by their held-out item: valid or test")] = "valid",
    template: TemplateOption = "ranking",
    candidates: Annotated[int, typer.Option(min=2)] = 30,
    history_items: Annotated[int, typer.Option(min=1, help="newest items of a history")] = 10,
    title_words: TitleWordsOption = 20,
    max_prompt_tokens: Annotated[int, typer.Option(min=16)] = 1024,
    seed: Annotated[int, typer.Option(min=0)] = 0,
    batch_size: BatchOption = 8,
    precision: PrecisionOption = "auto",
    device: DeviceOption = "auto",
    format_name: FormatOption = "text",
) -> None:
    """Mix a base spirit with your own adapter by entropy on your own unlabelled prompts; nothing leaves."""
    _one_of("--rule", rule, ("factors", "product"))
    _one_of("--granularity", granularity, ("domain", "layer"))
    _one_of("--protocol", protocol, ("warm", "cold"))
    _one_of("--split", split, ("valid", "test"))
    _one_of("--format", format_name, ("text", "json"))
    from clients.data.domain import Domain
    from clients.training.cocktail import mix_in_domain
    from common.config import InstructionSection, validate
    from common.language.options import CocktailOptions
    from common.language.prompts import Template

    options = {
        "rule": rule, "granularity": granularity, "prompts": prompts, "tokens": tokens, "steps": steps,
        "batch_size": batch_size, "seed": seed,
    }  # fmt: skip
    instruction = {
        "candidates": candidates, "protocol": protocol, "history_items": history_items,
        "title_words": title_words, "max_prompt_tokens": max_prompt_tokens,
    }  # fmt: skip
    precision_, device_ = _where(precision, device)
    with progress_bars() as report:
        made = mix_in_domain(
            model, spirit, ingredient, Domain.load(domain), out,
            options=validate(options, CocktailOptions, where="mix"),
            instruction=validate(instruction, InstructionSection, where="mix"),
            template=Template.load(template),
            split=cast(Literal["valid", "test"], split), precision=precision_, device=device_, report=report,
        )  # fmt: skip
    if format_name == "json":
        typer.echo(json.dumps({"weights": made.weights, "facts": made.facts}, indent=2))
        return
    for group, weights in made.weights.items():
        typer.echo(f"{group}: " + ", ".join(f"{label} {weight:.3f}" for label, weight in weights.items()))
    held_back = made.facts["held_back_loss"]
    typer.echo(
        f"entropy of held-back prompts: {held_back['equal']:.4f} at equal weights, "
        f"{held_back['learned']:.4f} learned"
    )
    typer.echo(f"written: {out}")


def _where(precision: str, device: str) -> tuple[Literal["auto", "fp32", "bf16"], str]:
    _one_of("--precision", precision, ("auto", "fp32", "bf16"))
    return cast(Literal["auto", "fp32", "bf16"], precision), default_device(device)


def _load(folder: Path, adapter: Path | None, precision: str, device: str) -> Any:
    from common.language.adapters import load_adapter
    from common.language.model import load_causal

    known, where = _where(precision, device)
    worn = load_adapter(adapter, folder) if adapter is not None else None
    lm = load_causal(folder, precision=known, device=where)
    if worn is not None:
        lm.attach(*worn)
    return lm


def _one_of(option: str, value: str, known: tuple[str, ...]) -> None:
    if value not in known:
        raise ConfigError(f"{option} {value!r} is not known", next_step=f"use {' or '.join(known)}")


def _print(format_name: str, record: dict[str, Any]) -> None:
    if format_name == "json":
        typer.echo(json.dumps(record, indent=2))
        return
    for name, value in record.pop("metrics").items():
        typer.echo(f"{name:14} {value:.4f}")
    for name, value in record.items():
        if isinstance(value, dict):
            value = ", ".join(f"{count} {reason}" for reason, count in value.items()) or "none"
        typer.echo(f"{name.replace('_', ' '):14} {value}")
