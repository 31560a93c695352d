"""`isthmus server` and `isthmus run`: what the operator of the merge server types."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from common.config import SERVER_FILES, MergeMethod, RunConfig, load_toml, validate
from common.console import progress_bars
from common.crossing import crossing_tensors
from common.errors import ConfigError, FederationError
from common.models.base import model_digest, resolve_base, trainable_norm
from common.processes import listens
from common.progress import read_status
from common.signing import PublicKey
from server.home import Ports, ServerConfig, ServerHome
from server.runs import FINAL, Run

DEFAULT_HOME = Path("~/.isthmus/server")
HomeOption = Annotated[
    Path, typer.Option("--home", envvar="ISTHMUS_SERVER_HOME", help="the server's home directory")
]

app = typer.Typer(help="The merge server: init, invite, up, status.", no_args_is_help=True)
run_app = typer.Typer(help="Runs on this merge server: start, watch, stop, withdraw.", no_args_is_help=True)


@app.command()
def init(
    home: HomeOption = DEFAULT_HOME,
    name: Annotated[str, typer.Option(help="how the server is called")] = "merge-server",
    host: Annotated[
        list[str] | None, typer.Option(help="name or address that domains use; may be repeated")
    ] = None,
    bind: Annotated[str, typer.Option(help="address to listen on; 0.0.0.0 for all")] = "127.0.0.1",
    port: Annotated[int, typer.Option(help="first of four ports: fleet, exchange, enrol, SuperLink")] = 9101,
) -> None:
    """Make the server's home: keys, certificates, server.toml."""
    data = {
        "name": name,
        "hosts": host or ["127.0.0.1"],
        "bind": bind,
        "ports": {"fleet": port, "exchange": port + 1, "enrol": port + 2, "superlink": port + 3},
    }
    created = create_home(home.expanduser(), data)
    typer.echo(f"server {name} in {created.path}")
    typer.echo(f"identity fingerprint: {created.identity.public.fingerprint}")
    typer.echo(f"next: isthmus server up --home {home}")


def create_home(path: Path, data: dict[str, Any]) -> ServerHome:
    """A new home from plain values. Raises ConfigError."""
    ports = validate(data["ports"], Ports, where="ports")
    return ServerHome.create(
        path, validate({**data, "ports": ports.model_dump()}, ServerConfig, where="server")
    )


@app.command()
def up(home: HomeOption = DEFAULT_HOME) -> None:
    """Start the server's processes and keep them running until Ctrl-C."""
    from server.up import up as serve

    opened = _open(home)
    typer.echo(
        f"server {opened.config.name}: fleet {opened.address('fleet')}, "
        f"exchange {opened.address('exchange')}, enrolment {opened.address('enrol')}; Ctrl-C ends it"
    )
    serve(opened)


@app.command()
def invite(
    domain: Annotated[str, typer.Argument(help="the domain's name: lower-case letters, digits, - and _")],
    home: HomeOption = DEFAULT_HOME,
    out: Annotated[Path | None, typer.Option(help="where to write the kit")] = None,
) -> None:
    """Write a join kit for a domain. Hand it over, and compare the fingerprint by another way."""
    from server.kit import write_kit

    path = out or Path(f"{domain}.kit.json")
    kit = write_kit(_open(home), domain, path)
    typer.echo(f"wrote {path}")
    typer.echo(f"fingerprint to compare with the owner: {kit.fingerprint}")


@app.command("root")
def root_command(
    home: HomeOption = DEFAULT_HOME,
    key: Annotated[Path | None, typer.Option(help="the root key's file, where it is not in the home")] = None,
    out: Annotated[Path | None, typer.Option(help="write root.json here, too")] = None,
) -> None:
    """Bring root.json up to date: whose keys count, for auditors. Its fingerprint is to be compared."""
    from server.roots import newest_root, root_path

    opened = _open(home)
    signed = newest_root(opened, key.expanduser() if key else None)
    if out is not None:
        signed.save(out)
    typer.echo(f"{root_path(opened)}: version {signed.root.version}, {len(signed.root.members)} members")
    for root_key in signed.root.root_keys:
        typer.echo(f"root key's fingerprint: {PublicKey.from_hex(root_key).fingerprint}")


@app.command()
def rotate(
    out: Annotated[Path, typer.Option(help="where to write what the owners need")],
    home: HomeOption = DEFAULT_HOME,
) -> None:
    """Replace the server's identity and log key by new ones, signed by both; the server must be down."""
    from server.rotation import rotate_own

    renewed = rotate_own(home.expanduser(), out)
    typer.echo(f"new identity key {renewed.identity.public.fingerprint}")
    typer.echo(f"next: isthmus server root; hand {out} to every owner: isthmus client server-keys {out}")
    typer.echo("join kits that are out no longer work: invite again")


@app.command()
def witness(
    card: Annotated[Path, typer.Argument(help="the witness's card (isthmus witness card)")],
    home: HomeOption = DEFAULT_HOME,
) -> None:
    """Have the ledger cosigned by an independent witness; new join kits name it, too."""
    from common.witness.card import read_card

    opened, read = _open(home), read_card(card)
    read.add_to(opened.path)
    typer.echo(f"{read.name}: key {PublicKey.from_hex(read.key).fingerprint}")
    typer.echo("next: isthmus server root; owners who joined before: isthmus client witness CARD")


@app.command()
def revoke(
    domain: Annotated[str, typer.Argument(help="the member to shut out")], home: HomeOption = DEFAULT_HOME
) -> None:
    """Refuse everything from a member from now on. What was accepted before stays valid."""
    opened = _open(home)
    with opened.ledger.locked():  # whatever is accepted comes before it or not at all
        size = len(opened.ledger)
        opened.members.revoke(domain, ledger_size=size)
    typer.echo(f"{domain} is revoked from entry {size} of the ledger on")
    typer.echo("next: isthmus server root")


@app.command()
def status(home: HomeOption = DEFAULT_HOME, as_json: Annotated[bool, typer.Option("--json")] = False) -> None:
    """What runs, who joined, which runs are open, who asked for a withdrawal."""
    from server.withdrawal import asked

    opened = _open(home)
    ports = opened.config.ports
    services = {
        "superlink": listens("127.0.0.1", ports.superlink),
        **{name: listens(_here(opened), getattr(ports, name)) for name in ("fleet", "exchange", "enrol")},
    }
    members = [
        {"domain": m.domain, "pseudonym": m.pseudonym, "joined_s": m.joined_s, "revoked": m.is_revoked}
        for m in opened.members.all()
    ]
    runs, wishes = [_run_record(run) for run in opened.runs.all()], asked(opened)
    if as_json:
        record = {"services": services, "members": members, "runs": runs, "withdrawals_asked": wishes}
        typer.echo(json.dumps(record, indent=1))
        return
    for name, alive in services.items():
        typer.echo(f"{name:10} {'up' if alive else 'down'}")
    for member in members:
        gone = ", revoked" if member["revoked"] else ""
        typer.echo(f"member     {member['domain']} ({member['pseudonym']}{gone})")
    for record in runs:
        typer.echo(f"run        {record['run']} {record['state']} {record['phase']}")
    for wish in wishes:
        typer.echo(f"asked      isthmus run withdraw {wish['domain']} --run {wish['run']}")


@app.command("serve-fleet", hidden=True)
def serve_fleet(path: Path) -> None:
    """The Fleet proxy's process."""
    from server.fleet_proxy import serve

    home = ServerHome(path)
    keys = home.keys
    serve(
        home.config.bind,
        home.config.ports.fleet,
        f"https://127.0.0.1:{home.config.ports.superlink}",
        keys / "ca.crt",
        keys / "tls.crt",
        keys / "tls.key",
    )


@app.command("serve-exchange", hidden=True)
def serve_exchange(path: Path) -> None:
    """The Exchange's process."""
    from server.services import serve

    serve(ServerHome(path))


@run_app.command()
def start(
    config: Annotated[Path, typer.Argument(help="the run's configuration, TOML")],
    home: HomeOption = DEFAULT_HOME,
    wait: Annotated[bool, typer.Option(help="stay until the run is over")] = False,
) -> None:
    """Start a run with every domain that has joined."""
    opened = _open(home)
    run = create_run(opened, load_toml(config, RunConfig))
    typer.echo(run.spec.run_id)
    _see_to_its_end(opened, run, wait=wait)


def _see_to_its_end(home: ServerHome, run: Run, *, wait: bool) -> None:
    """Say so where nobody works on the run; with `wait` stay, and exit with 1 unless it is done."""
    if not run.is_final and not listens("127.0.0.1", home.config.ports.superlink):
        typer.echo("the server is not up: the run begins with `isthmus server up`", err=True)
    while wait and not run.is_final:
        time.sleep(1.0)
    if wait:
        _print_run(run)
        if run.state["state"] != "done":
            raise typer.Exit(1)


def resolved(config: RunConfig) -> RunConfig:
    """`config` as a run keeps it: with a bound on norms, by default that of the base's own tensors, and the
    server's files by absolute path and digest. Raises ConfigError for a merge that cannot be."""
    config = config.model_copy(update={"merge": tuple(_fixed(method, config) for method in config.merge)})
    if config.run.max_norm is not None:
        return config
    norm = trainable_norm(resolve_base(config.base.model))
    return config.model_copy(update={"run": config.run.model_copy(update={"max_norm": norm})})


def _fixed(method: MergeMethod, config: RunConfig) -> MergeMethod:
    """The method with its files fixed; its options are checked."""
    from server.merge import check_method

    options = check_method(method, config)
    files = [name for name in SERVER_FILES if method.options.get(name)]
    fixed = {name: options[name] for file in files for name in (file, f"{file}_sha256")}
    return method.model_copy(update={"options": {**method.options, **fixed}})


def create_run(home: ServerHome, config: RunConfig) -> Run:
    """A pending run of `config`, checked as far as it can be before anybody trains."""
    config, base = resolved(config), resolve_base(config.base.model)
    members = tuple(m.domain for m in home.members.all() if not m.is_revoked)
    return home.runs.create(
        config,
        base_digest=model_digest(base),
        tensors={name: list(shape) for name, shape in crossing_tensors(base, config).items()},
        members=members,
    )


@run_app.command("status")
def run_status(
    run: Annotated[str, typer.Argument(help="run id, or how it begins; default: the newest")] = "",
    home: HomeOption = DEFAULT_HOME,
) -> None:
    """How far a run is."""
    _print_run(_run_or_newest(_open(home), run))


def _run_or_newest(home: ServerHome, run: str) -> Run:
    """The run of that id, or the newest. Raises FederationError."""
    if run:
        return home.runs.get(run)
    runs = home.runs.all()
    if not runs:
        raise FederationError("there is no run", next_step="isthmus run start CONFIG")
    return runs[-1]


@run_app.command("list")
def run_list(home: HomeOption = DEFAULT_HOME) -> None:
    """Every run of this server."""
    table = Table("run", "state", "phase", "started", box=None)
    for run in _open(home).runs.all():
        record = _run_record(run)
        started = time.strftime("%Y-%m-%d %H:%M", time.localtime(run.spec.created_s))
        table.add_row(record["run"], record["state"], record["phase"], started)
    Console().print(table)


@run_app.command()
def vectors(
    run: Annotated[str, typer.Argument(help="run id, or how it begins; default: the newest")] = "",
    home: HomeOption = DEFAULT_HOME,
    as_json: Annotated[bool, typer.Option("--json", help="all of it, by layer")] = False,
) -> None:
    """Norm and direction of each domain's vector, and which of them stand out."""
    from server.rounds import survey_of

    opened = _open(home)
    found = survey_of(opened, _run_or_newest(opened, run))
    if as_json:
        typer.echo(json.dumps(found, indent=1))
        return
    names = list(found["vectors"])
    table = Table("domain", "norm", "score", "cosine to the others", "score", "stands out", *names, box=None)
    for name, facts in found["vectors"].items():
        cells = (
            f"{facts['norm']:.4g}",
            f"{facts['norm_score']:.1f}",
            _maybe(facts["cosine_to_others"], ".3f"),
            _maybe(facts["cosine_score"], ".1f"),
            ", ".join(facts["stands_out"]),
            *(f"{found['cosines'][name][other]:.3f}" for other in names),
        )
        table.add_row(name, *cells)
    Console().print(table)
    typer.echo(found["note"])


@run_app.command("leave-one-out")
def leave_one_out(
    run: Annotated[str, typer.Argument(help="run id, or how it begins; default: the newest")] = "",
    home: HomeOption = DEFAULT_HOME,
    as_json: Annotated[bool, typer.Option("--json")] = False,
) -> None:
    """Merge a finished run without each vector, and say what changes on probes from the public catalogs.

    One merge a domain. Interrupted, the same command goes on.
    """
    from server.leave_one_out import estimate_s
    from server.leave_one_out import leave_one_out as evaluate

    opened = _open(home)
    found = _run_or_newest(opened, run)
    about_s = estimate_s(found)
    if about_s:
        typer.echo(f"{found.spec.run_id}: about {about_s / 60:.0f} minutes for the merges alone", err=True)
    with progress_bars() as report:
        result = evaluate(opened, found, report)
    if as_json:
        typer.echo(json.dumps(result, indent=1))
        return
    catalogs = list(result["probes"])
    table = Table("without", *(f"catalog of {name}" for name in catalogs), box=None)
    for name, row in result["without"].items():
        cells = (f"{row['change'][c]:+.4f} (same {row['agreement'][c]:.3f})" for c in catalogs)
        table.add_row(name, *cells)
    Console().print(table)
    typer.echo(result["note"])


def _maybe(value: float | None, form: str) -> str:
    return "" if value is None else format(value, form)


@run_app.command()
def withdraw(
    domain: Annotated[str, typer.Argument(help="the domain whose vector is withdrawn")],
    run: Annotated[
        str, typer.Option("--run", help="run id, or how it begins; default: the newest with its vector")
    ] = "",
    home: HomeOption = DEFAULT_HOME,
    no_model: Annotated[bool, typer.Option("--no-model", help="revoke only; publish no other model")] = False,
    wait: Annotated[bool, typer.Option(help="stay until the others have the model without it")] = False,
) -> None:
    """Revoke a domain's vector, and publish the universal model without it to the others."""
    from server.withdrawal import withdraw as do_withdraw

    opened = _open(home)
    found = do_withdraw(opened, domain, run, remerge=not no_model)
    typer.echo(f"{found.spec.run_id}: {found.state['state']}")
    typer.echo(f"the vector of {domain} is revoked, and is never merged again")
    _see_to_its_end(opened, found, wait=wait)


@run_app.command()
def stop(run: str, home: HomeOption = DEFAULT_HOME) -> None:
    """Ask a run to end. What was delivered is kept."""
    found = _open(home).runs.get(run)
    if found.is_final:
        raise ConfigError(f"{found.spec.run_id} is {found.state['state']} already")
    found.stop()
    typer.echo(f"{found.spec.run_id} will stop at its next step")


def _open(home: Path) -> ServerHome:
    return ServerHome(home.expanduser())


def _here(home: ServerHome) -> str:
    return "127.0.0.1" if home.config.bind == "0.0.0.0" else home.config.bind  # noqa: S104 - compared only


def _run_record(run: Run) -> dict[str, Any]:
    state = run.state
    return {
        "run": run.spec.run_id,
        "state": state["state"],
        "phase": state["phase"],
        "reason": state["reason"],
    }


def _print_run(run: Run) -> None:
    record = _run_record(run)
    typer.echo(f"{record['run']}: {record['state']} {record['phase']}".rstrip())
    if record["reason"]:
        typer.echo(f"  {record['reason']}")
    if record["state"] not in FINAL:
        live = read_status(run.folder / "status.json")
        if live:
            typer.echo(f"  {live.get('phase', '')} {live.get('step', 0)}/{live.get('total', 0)}")
    if record["state"] == "done":
        if (run.folder / "model").exists():  # a withdrawal may publish none
            typer.echo(f"  model {run.folder / 'model'}")
        typer.echo(f"  report {run.folder / 'report.html'}")


if __name__ == "__main__":
    from common.guard import check_imports

    check_imports()
    app()
