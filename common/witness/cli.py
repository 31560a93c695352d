"""`isthmus witness`: what whoever runs an independent witness types."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Annotated

import typer

from common.notes import Checkpoint, Verifier
from common.roots import SignedRoot
from common.signing import PublicKey
from common.witness.home import WitnessConfig, WitnessHome

DEFAULT_HOME = Path("~/.isthmus/witness")
HomeOption = Annotated[
    Path, typer.Option("--home", envvar="ISTHMUS_WITNESS_HOME", help="the witness's home directory")
]
app = typer.Typer(
    help="An independent witness: it holds keys and tree heads, and cosigns ledgers that only grow.",
    no_args_is_help=True,
)


@app.command()
def init(
    name: Annotated[str, typer.Option(help="as it will stand in root.json and under checkpoints")],
    root: Annotated[Path, typer.Option(help="root.json, got from the operator")],
    home: HomeOption = DEFAULT_HOME,
    host: Annotated[str, typer.Option(help="the name or address by which it is reached")] = "127.0.0.1",
    bind: Annotated[str, typer.Option(help="address to listen on; 0.0.0.0 for all")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=1, max=65535)] = 9105,
) -> None:
    """Make the witness's home and keys, and trust a root file from now on."""
    signed = SignedRoot.load(root)
    config = WitnessConfig(name=name, host=host, bind=bind, port=port)
    made = WitnessHome.create(home.expanduser(), config, signed)
    for key in signed.root.root_keys:
        fingerprint = PublicKey.from_hex(key).fingerprint
        typer.echo(f"root key's fingerprint, to compare with the operator: {fingerprint}")
    typer.echo(
        f"next: isthmus witness card --out {name}.json; the operator: isthmus server witness {name}.json"
    )
    typer.echo(f"then: isthmus witness up --home {made.path}")


@app.command()
def card(
    out: Annotated[Path, typer.Option(help="where to write it")], home: HomeOption = DEFAULT_HOME
) -> None:
    """Write the card that the operator and owners add: name, key, address, certificate."""
    opened = WitnessHome(home.expanduser())
    opened.card.save(out)
    typer.echo(f"{out}: {opened.config.name}, key {opened.cosigner.signer.key.public.fingerprint}")


@app.command()
def up(home: HomeOption = DEFAULT_HOME) -> None:
    """Cosign until Ctrl-C."""
    from common.witness.up import up as serve

    opened = WitnessHome(home.expanduser())
    typer.echo(f"{opened.config.name} listens on {opened.config.bind}:{opened.config.port}; Ctrl-C ends it")
    serve(opened)


@app.command()
def trust(root: Path, home: HomeOption = DEFAULT_HOME) -> None:
    """Trust the next version of root.json, got from the operator."""
    version = WitnessHome(home.expanduser()).update_root(root.read_bytes())
    typer.echo(f"version {version} is trusted")


@app.command()
def status(home: HomeOption = DEFAULT_HOME, as_json: Annotated[bool, typer.Option("--json")] = False) -> None:
    """Which logs it has seen, up to which entry, and when."""
    opened = WitnessHome(home.expanduser())
    own = Verifier(opened.config.name, opened.cosigner.signer.key.public)
    record = {
        shore: {"size": Checkpoint.read(note.text).size, "time_s": note.cosigned_by(own)}
        for shore, note in opened.notes().items()
    }
    if as_json:
        typer.echo(json.dumps({"root_version": opened.root.root.version, "logs": record}, indent=1))
        return
    typer.echo(f"root.json: version {opened.root.root.version}")
    for shore, known in record.items():
        when = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(known["time_s"]))
        typer.echo(f"{shore}: {known['size']} entries, cosigned {when}")


if __name__ == "__main__":
    from common.guard import check_imports

    check_imports()
    app()
