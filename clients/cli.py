"""`isthmus client`: what a domain's owner types."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any, Literal

import typer
from rich.console import Console
from rich.table import Table

from clients.data.domain import Domain
from clients.home import ClientHome
from clients.policy import POLICY, write_policy
from common.console import progress_bars
from common.errors import ConfigError, SignatureError
from common.kit import read_kit
from common.progress import read_status
from common.signing import PublicKey

DEFAULT_HOME = Path("~/.isthmus/client")
Which = Literal["universal", "own", "personal"]
HomeOption = Annotated[
    Path, typer.Option("--home", envvar="ISTHMUS_CLIENT_HOME", help="the owner's home directory")
]

HomeArgument = Annotated[Path, typer.Argument(envvar="ISTHMUS_CLIENT_HOME", help="the owner's home")]

app = typer.Typer(help="An owner's side: join a federation, serve it, recommend.", no_args_is_help=True)
policy_app = typer.Typer(help="What may leave this domain: policy.toml.", no_args_is_help=True)
app.add_typer(policy_app, name="policy")


@app.command()
def join(
    kit: Annotated[Path, typer.Argument(help="the join kit that the operator gave you")],
    data: Annotated[Path, typer.Option(help="your prepared domain folder (isthmus data prepare)")],
    home: HomeOption = DEFAULT_HOME,
    base: Annotated[str, typer.Option(help="the base model: embedded, or a folder")] = "embedded",
    port: Annotated[int, typer.Option(help="loopback port of the SuperNode")] = 19094,
    fingerprint: Annotated[
        str, typer.Option(help="the server's, as the operator told you; a terminal asks for it if missing")
    ] = "",
) -> None:
    """Make this owner's home and keys, and enrol at the server, once its fingerprint is compared."""
    from clients.join import join as do_join

    read = read_kit(kit)
    typer.echo(f"joining {read.server} as {read.domain}")
    typer.echo(f"run policy: {read.run_policy}")
    _compare_fingerprint(read.fingerprint, fingerprint)
    opened = do_join(read, home.expanduser(), data=data, base=base, supernode_port=port)
    typer.echo(f"joined as {opened.config.pseudonym}; what may leave is in {opened.path / POLICY}")
    typer.echo(f"next: isthmus client up --home {home}")


def _compare_fingerprint(of_the_kit: str, told: str) -> None:
    """Hold the kit's fingerprint against what the operator said by another way. Raises SignatureError."""
    if told:
        if "".join(told.lower().split()) != "".join(of_the_kit.split()):
            raise SignatureError(
                f"the kit's fingerprint is {of_the_kit}, not the one that you were told",
                next_step="do not join: ask the operator for a new kit by another way",
            )
        return
    typer.echo(f"server's fingerprint, to compare with the operator: {of_the_kit}")
    if sys.stdin.isatty():
        typer.confirm("does the operator read out the same one?", abort=True)
    else:
        typer.echo("nobody compared it here; --fingerprint does")


@app.command()
def up(home: HomeOption = DEFAULT_HOME) -> None:
    """Start this owner's processes and keep them running until Ctrl-C."""
    from clients.up import up as serve

    opened = _open(home)
    typer.echo(f"{opened.config.domain}: serving {opened.config.server.name}; Ctrl-C ends it")
    serve(opened)


@app.command()
def status(home: HomeOption = DEFAULT_HOME, as_json: Annotated[bool, typer.Option("--json")] = False) -> None:
    """What this owner is doing, and which model is installed."""
    from clients.privacy import spent
    from clients.serving import comparison, current

    opened = _open(home)
    privacy = spent(opened.journal)
    installed = current(opened.path)
    compared = None if installed is None else comparison(installed)
    record = {
        "domain": opened.config.domain,
        "server": opened.config.server.name,
        "now": read_status(opened.status_path),
        "model": None if installed is None else str(installed),
        "withdrawn": installed is not None and opened.is_withdrawn(installed.name),
        "comparison": compared,
        "privacy": asdict(privacy),
    }
    if as_json:
        typer.echo(json.dumps(record, indent=1))
        return
    now = read_status(opened.status_path)
    typer.echo(
        f"{opened.config.domain}: {now.get('phase', 'idle')} {now.get('step', '')}/{now.get('total', '')}"
    )
    typer.echo(f"model: {record['model'] or 'none installed'}")
    if record["withdrawn"]:
        typer.echo("a vector in this model was withdrawn; the next universal model takes its place")
    if compared is not None:
        typer.echo(_compared(compared))
    typer.echo(f"privacy spent: {privacy}")


@policy_app.command()
def explain(
    home: HomeArgument = DEFAULT_HOME,
    format: Annotated[Literal["text", "json"], typer.Option(help="for people or for machines")] = "text",
) -> None:
    """Check policy.toml, and say in plain words what may leave and what a run could get at most."""
    from clients.explain import explanation, in_words

    opened = _open(home)
    found = explanation(opened)
    if format == "json":
        typer.echo(json.dumps(found, indent=1))
        return
    for line in in_words(found, opened.path / POLICY):
        typer.echo(line)


@policy_app.command()
def write(home: HomeArgument = DEFAULT_HOME) -> None:
    """Write the default policy.toml, with a comment for each key, into a home that has none."""
    typer.echo(f"written: {write_policy(home.expanduser())}")


@app.command()
def rotate(home: HomeOption = DEFAULT_HOME) -> None:
    """Replace this owner's identity and log key by new ones, signed by both; its processes must not run."""
    from clients.rotation import rotate as do_rotate

    renewed = do_rotate(home.expanduser())
    typer.echo(f"{renewed.config.domain}: new identity key {renewed.gate.public_key.fingerprint}")
    typer.echo("the old one counts no more; the operator: isthmus server root")


@app.command("server-keys")
def server_keys(
    rotation: Annotated[Path, typer.Argument(help="what isthmus server rotate wrote")],
    home: HomeOption = DEFAULT_HOME,
) -> None:
    """Go over to the server's new keys, which its old one signed; then start isthmus client up again."""
    from clients.rotation import accept_server_keys

    renewed = accept_server_keys(home.expanduser(), rotation.read_bytes())
    typer.echo(f"the server's identity key is now {renewed.server_key.fingerprint}")


@app.command()
def witness(
    card: Annotated[Path, typer.Argument(help="the witness's card (isthmus witness card)")],
    home: HomeOption = DEFAULT_HOME,
) -> None:
    """Have this owner's ledger cosigned by an independent witness, too."""
    from common.witness.card import read_card

    read = read_card(card)
    read.add_to(_open(home).path)
    typer.echo(f"{read.name}: key {PublicKey.from_hex(read.key).fingerprint}")


@app.command()
def withdraw(
    run: Annotated[str, typer.Argument(help="run id, or how it begins; default: the newest one")] = "",
    home: HomeOption = DEFAULT_HOME,
) -> None:
    """Tell the server that it may merge your task vector no more. You send it to nobody again, either."""
    from clients.withdrawal import ask

    opened = _open(home)
    run_id, receipt = ask(opened, run)
    typer.echo(f"{run_id}: your vector is withdrawn; entry {receipt.index} of the server's ledger says so")
    typer.echo(
        "its operator can now publish a model without it: isthmus run withdraw; what others have, stays"
    )


@app.command()
def rollback(home: HomeOption = DEFAULT_HOME) -> None:
    """Go back to the universal model that was installed before."""
    from clients.serving import previous
    from clients.serving import rollback as do_rollback

    opened = _open(home)
    before = previous(opened.path)
    if before is not None and opened.is_withdrawn(before.name):
        raise ConfigError(
            "the previous universal model holds a vector that its owner withdrew",
            next_step="keep the present one: isthmus client status",
        )
    typer.echo(f"installed again: {do_rollback(opened.path)}")


@app.command()
def interpolate(home: HomeOption = DEFAULT_HOME) -> None:
    """Make a personal model between the universal one and your own; it stays here."""
    from clients.personal import interpolate as do_interpolate

    opened = _open(home)
    with progress_bars() as report:
        found = do_interpolate(opened.path, Domain.load(opened.data_folder), report)
    table = Table("share of own", *next(iter(found.metrics.values())), "", box=None)
    for share, metrics in found.metrics.items():
        mark = "chosen" if float(share) == found.own_share else ""
        table.add_row(share, *(f"{value:.4f}" for value in metrics.values()), mark)
    Console().print(table)
    typer.echo("on validation users; next: isthmus client recommend --model personal --history ITEM,ITEM")


@app.command()
def recommend(
    history: Annotated[str, typer.Option(help="item ids, oldest first, separated by commas")],
    k: Annotated[int, typer.Option("-k", min=1, help="how many items")] = 10,
    compare: Annotated[
        bool, typer.Option("--compare", help="beside the domain's own fine-tuned model")
    ] = False,
    model: Annotated[Which, typer.Option(help="universal; own; or personal, see interpolate")] = "universal",
    candidates: Annotated[str, typer.Option(help="rank these item ids alone, separated by commas")] = "",
    explain: Annotated[
        bool, typer.Option("--explain", help="let a language model say why it puts the first one first")
    ] = False,
    home: HomeOption = DEFAULT_HOME,
    as_json: Annotated[bool, typer.Option("--json")] = False,
) -> None:
    """Items that the installed universal model (or another of yours) recommends after a history."""
    from clients.serving import left_out, why
    from clients.serving import recommend as do_recommend

    opened = _open(home)
    names = list(dict.fromkeys([model, "own"] if compare else [model]))
    models = {name: _model(opened, name) for name in names}
    domain = Domain.load(opened.data_folder)
    items, only = (
        [item.strip() for item in text.split(",") if item.strip()] for text in (history, candidates)
    )
    found = {
        name: do_recommend(folder, domain, items, k, candidates=only or None)
        for name, folder in models.items()
    }
    for name, ranked in found.items():
        if len(ranked) < k:
            typer.echo(f"the {name} model: {len(ranked)} of {k} items, there are no others", err=True)
        if not only and (counts := left_out(models[name], domain)):
            reasons = ", ".join(f"{count} {reason}" for reason, count in sorted(counts.items()))
            typer.echo(f"the {name} model ranks titles; items left out: {reasons}", err=True)
    said = {name: why(models[name], domain, items, ranked[0][0]) for name, ranked in found.items() if explain}
    if as_json:
        rows: dict[str, Any] = {
            name: [{"item": item, "title": title, "score": round(score, 6)} for item, title, score in ranked]
            for name, ranked in found.items()
        }
        if explain:
            rows["explanations"] = said
        typer.echo(json.dumps(rows, indent=1))
        return
    for name, ranked in found.items():
        table = Table("", "item", "title", "score", title=f"{name} model", title_justify="left", box=None)
        for place, (item, title, score) in enumerate(ranked, 1):
            table.add_row(str(place), item, title, f"{score:.4f}")
        Console().print(table)
        if name in said:
            typer.echo(f"the {name} model's own words about the first: {said[name] or '(none)'}")


def _model(home: ClientHome, name: str) -> Path:
    """The folder of one of the owner's models. Raises ConfigError or ModelError where it has none."""
    from clients.personal import personal_model
    from clients.serving import current, own_model

    installed = current(home.path)
    if name == "own":
        return own_model(home.path)
    if installed is None:
        raise ConfigError(
            "no universal model is installed", next_step="take part in a run: isthmus client up"
        )
    if name == "universal":
        return installed
    folder, personal = personal_model(home.path)
    if personal.universal_digest != installed.name:
        typer.echo("the personal model is of an older universal model: isthmus client interpolate", err=True)
    return folder


def _compared(record: Mapping[str, Mapping[str, float]]) -> str:
    """The universal model beside the domain's own, on test users; worse is said plainly."""
    universal, own = record["universal"], record["own"]
    pairs = ", ".join(f"{name} {universal[name]:.4f}, own model {own[name]:.4f}" for name in universal)
    ndcg = next(name for name in universal if name.startswith("ndcg"))
    if universal[ndcg] >= own[ndcg]:
        return f"universal model here: {pairs}"
    return (
        f"universal model here: {pairs}\n"
        "it ranks worse than your own; next: isthmus client interpolate, or rollback"
    )


def _open(home: Path) -> ClientHome:
    return ClientHome(home.expanduser())


if __name__ == "__main__":
    from common.guard import check_imports

    check_imports()
    app()
