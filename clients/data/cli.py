"""`isthmus data`: look at a source (`check`), and make a domain folder of it (`prepare`).

`check` exits with 1 when `prepare` would refuse, and either command with 2 on an error.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Literal, cast

import typer
from rich.console import Console
from rich.table import Table

from clients.data.assemble import Settings, Stage
from clients.data.check import Report, check
from clients.data.prepare import prepare
from clients.data.readers import FORMATS, ReadOptions
from clients.data.records import KINDS
from clients.data.split import Duplicates
from common.console import errors_as_exit, progress_bars
from common.errors import DataError

app = typer.Typer(help="Check and prepare a domain's data.", no_args_is_help=True)

PathArgument = Annotated[Path, typer.Argument(help="a file, folder or archive with the interactions")]
FormatOption = Annotated[str | None, typer.Option("--format", help=f"one of {', '.join(FORMATS)}")]
ItemsOption = Annotated[Path | None, typer.Option("--items", help="the item file, if not beside")]
PublicOption = Annotated[
    str | None, typer.Option("--public", help="attributes that may leave, e.g. title,brand,category")
]
CoreOption = Annotated[
    int | None, typer.Option("--k-core", min=0, help="default 5; 0 for none (a source already split: none)")
]
ResplitOption = Annotated[
    bool, typer.Option("--resplit", help="filter and split anew a source already split")
]
DuplicatesOption = Annotated[
    str, typer.Option(help="keep, exact (same user, item, time), consecutive, or first (of each pair)")
]
DropOption = Annotated[
    list[str] | None, typer.Option("--drop", help=f"leave such out: {', '.join(KINDS)}, or all")
]
UserColumn = Annotated[str | None, typer.Option(help="format columns: the user's column")]
ItemColumn = Annotated[str | None, typer.Option(help="format columns: the item's column")]
TimeColumn = Annotated[str | None, typer.Option(help="format columns: the time's column")]
FileOrder = Annotated[bool, typer.Option("--file-order", help="format columns: rows are in time order")]
AttributeOption = Annotated[
    list[str] | None, typer.Option("--attribute", help="format columns: name=column, e.g. title=product")
]


@app.command("check")
@errors_as_exit()
def check_command(
    path: PathArgument,
    format_name: FormatOption = None,
    items: ItemsOption = None,
    public: PublicOption = None,
    k_core: CoreOption = None,
    resplit: ResplitOption = False,
    duplicates: DuplicatesOption = "exact",
    drop: DropOption = None,
    user_column: UserColumn = None,
    item_column: ItemColumn = None,
    time_column: TimeColumn = None,
    file_order: FileOrder = False,
    attribute: AttributeOption = None,
    as_json: Annotated[bool, typer.Option("--json", help="print the report as JSON")] = False,
) -> None:
    """Read a source and report; writes nothing. Exits with 1 when `prepare` would refuse."""
    settings = Settings(k_core, _names(public), _duplicates(duplicates), resplit)
    with progress_bars() as progress:
        options = ReadOptions(
            items, user_column, item_column, time_column, file_order, _mapping(attribute), progress
        )
        report = check(path, settings, format_name=format_name, options=options, drop=_kinds(drop))
    if as_json:
        typer.echo(json.dumps(report.to_json(), indent=2))
    else:
        _print_report(path, report)
    if not report.ready:
        raise typer.Exit(1)


@app.command("prepare")
@errors_as_exit()
def prepare_command(
    path: PathArgument,
    out: Annotated[Path, typer.Option("--out", help="the domain folder to make")],
    name: Annotated[str, typer.Option("--name", help="the domain's name, e.g. toys")],
    format_name: FormatOption = None,
    items: ItemsOption = None,
    public: PublicOption = None,
    k_core: CoreOption = None,
    resplit: ResplitOption = False,
    duplicates: DuplicatesOption = "exact",
    drop: DropOption = None,
    item_ids: Annotated[
        str, typer.Option(help="keep, opaque (invented public ids), or auto: opaque when ids are numbers")
    ] = "auto",
    users: Annotated[int | None, typer.Option(min=1, help="keep so many users, drawn by --seed")] = None,
    seed: Annotated[int, typer.Option(min=0)] = 0,
    replace: Annotated[bool, typer.Option("--replace", help="replace the domain folder at --out")] = False,
    user_column: UserColumn = None,
    item_column: ItemColumn = None,
    time_column: TimeColumn = None,
    file_order: FileOrder = False,
    attribute: AttributeOption = None,
) -> None:
    """Make a domain folder: k-core, leave-one-out, item texts. On any error nothing changes."""
    if item_ids not in ("auto", "keep", "opaque"):
        raise DataError(f"no policy {item_ids!r} for item ids", next_step="use auto, keep or opaque")
    ids = cast(Literal["auto", "keep", "opaque"], item_ids)
    settings = Settings(k_core, _names(public), _duplicates(duplicates), resplit, ids)
    with progress_bars() as progress:
        options = ReadOptions(
            items, user_column, item_column, time_column, file_order, _mapping(attribute), progress
        )
        made = prepare(
            path,
            out,
            name,
            settings,
            format_name=format_name,
            options=options,
            drop=_kinds(drop),
            users=users,
            seed=seed,
            replace_existing=replace,
        )
    console = Console()
    counts = made.domain.counts()
    _print_stages(console, made.stages)
    for kind, count in made.dropped.items():
        console.print(f"left out: {count:,} {kind}")
    for note in made.notes:
        console.print(f"note: {note}", markup=False)
    console.print(f"public: {', '.join(made.domain.public_attributes)}")
    summary = ", ".join(f"{value:,} {key}" for key, value in counts.items())
    console.print(f"{made.folder}: domain {name!r} ({made.format}), {summary}", markup=False, soft_wrap=True)


def _names(public: str | None) -> tuple[str, ...] | None:
    if public is None:
        return None
    return tuple(dict.fromkeys(name.strip() for name in public.split(",") if name.strip()))


def _duplicates(policy: str) -> Duplicates:
    if policy not in ("keep", "exact", "consecutive", "first"):
        raise DataError(
            f"no policy {policy!r} for duplicates", next_step="use keep, exact, consecutive or first"
        )
    return cast(Duplicates, policy)


def _kinds(drop: list[str] | None) -> tuple[str, ...]:
    return tuple(KINDS) if "all" in (drop or ()) else tuple(drop or ())


def _mapping(pairs: list[str] | None) -> dict[str, str]:
    mapping = {}
    for pair in pairs or ():
        name, equals, column = pair.partition("=")
        if not equals or not name or not column:
            raise DataError("--attribute must be name=column", next_step="for example title=product_name")
        mapping[name.strip()] = column.strip()
    return mapping


def _print_report(path: Path, report: Report) -> None:
    console = Console()
    table = Table(title=f"{path.name} ({report.format})", show_header=False, title_justify="left")
    coverage = ", ".join(f"{name} {share:.1%}" for name, share in report.text_coverage.items())
    lengths = ", ".join(f"{name} {value:g}" for name, value in report.history_length.items())
    rows = {
        "users": f"{report.users:,}",
        "items": f"{report.items:,}",
        "interactions": f"{report.interactions:,}",
        "sparsity": f"{report.sparsity:.4%}",
        "item rows": f"{report.items_unused:,} of untouched items, {report.item_rows_repeated:,} repeated",
        "text coverage": coverage or "none",
        "public": ", ".join(report.public) or "none",
        "items of equal text": f"{report.items_with_equal_text:,}",
        "duplicates": f"{report.duplicates_exact:,} exact, {report.repeated_pairs:,} repeats of a user and "
        f"item, {report.repeated_in_a_row:,} in a row",
        "time": f"{report.first_time} to {report.last_time}" if report.first_time else "positions only",
        "time order": f"file {'is' if report.file_in_time_order else 'is not'} in time order, "
        f"{report.ties_in_time:,} ties inside a history",
        "history length": lengths,
    }
    for key, value in rows.items():
        table.add_row(key, value)
    console.print(table)
    _print_stages(console, report.stages)
    for problem in report.problems:
        mark = "refused" if problem.fatal else "left out"
        console.print(f"{mark}: {problem.count:,} {problem.kind}, first at {', '.join(problem.places)}")
        if problem.fatal:
            console.print(f"  next: {problem.next_step}, or pass --drop {problem.kind}")
    for note in report.notes:
        console.print(f"note: {note}", markup=False)
    if report.refusal:
        console.print(f"refused: {report.refusal}", markup=False)
    console.print(
        "ready: prepare would accept this" if report.ready else "not ready: prepare would refuse this"
    )


def _print_stages(console: Console, stages: tuple[Stage, ...]) -> None:
    table = Table("step", "users", "items", "interactions", title="What stays", title_justify="left")
    for column in table.columns[1:]:
        column.justify = "right"
    for stage in stages:
        table.add_row(stage.name, f"{stage.users:,}", f"{stage.items:,}", f"{stage.interactions:,}")
    if stages:
        console.print(table)
