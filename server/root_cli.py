"""`isthmus root`: root.json under several keys. With one key, `isthmus server root` does it all."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Annotated

import typer

from common.roots import Root, SignedRoot
from common.signing import PublicKey, SigningKey
from server.cli import DEFAULT_HOME, HomeOption
from server.home import ServerHome
from server.roots import draft_root, install_root

app = typer.Typer(
    help="The root file under several keys: draft, sign (each holder where his key is), install.",
    no_args_is_help=True,
)
FileArgument = Annotated[Path, typer.Argument(help="the root file, or the draft of one")]


@app.command()
def key(path: Annotated[Path, typer.Argument(help="where the private key is to be; it stays there")]) -> None:
    """Make a root key for one holder."""
    made = SigningKey.generate(path)
    typer.echo(f"{path}: {made.public.fingerprint}")
    typer.echo(f"next: isthmus root draft --root-key {made.public.hex} ...")


@app.command()
def draft(
    out: Annotated[Path, typer.Option(help="where to write it")],
    home: HomeOption = DEFAULT_HOME,
    root_key: Annotated[
        list[str] | None,
        typer.Option(help="public key, hex; all that count from now on (as before)"),
    ] = None,
    threshold: Annotated[int | None, typer.Option(min=1, help="how many of them must sign")] = None,
) -> None:
    """The next version as it must be now, without signatures."""
    drafted = draft_root(ServerHome(home.expanduser()), root_key, threshold)
    drafted.save(out)
    _print(drafted.root)
    typer.echo(f"next: isthmus root sign {out} --key FILE, by a threshold of the old and of the new keys")


@app.command()
def sign(
    path: FileArgument, key: Annotated[Path, typer.Option(help="this holder's private root key")]
) -> None:
    """Add a signature. Read what is signed first: whose keys count, and who was revoked."""
    drafted, signer = SignedRoot.parse(path.read_bytes()), SigningKey.load(key)
    _print(drafted.root)
    signed = drafted.with_signatures([signer])
    signed.save(path)
    if signer.public.hex not in drafted.root.root_keys:
        typer.echo("this key is not among the new root keys: it counts as one of the version before")
    typer.echo(f"{path}: {len(signed.signatures)} signatures, {signed.root.threshold} by its own keys needed")


@app.command()
def install(path: FileArgument, home: HomeOption = DEFAULT_HOME) -> None:
    """Make it the server's root file, if it follows the one before and enough holders signed."""
    opened = ServerHome(home.expanduser())
    signed = install_root(opened, SignedRoot.parse(path.read_bytes()))
    typer.echo(f"{opened.path / 'root.json'}: version {signed.root.version}")


@app.command()
def show(path: FileArgument) -> None:
    """Whose keys count, who was revoked, until when."""
    signed = SignedRoot.parse(path.read_bytes())
    _print(signed.root)
    names = {PublicKey.from_hex(key).key_id: key for key in signed.root.root_keys}
    typer.echo(f"signed by {sum(key_id in names for key_id in signed.signatures)} of its own keys")


def _print(root: Root) -> None:
    typer.echo(f"version {root.version}, until {time.strftime('%Y-%m-%d', time.gmtime(root.expires_s))}")
    for number, root_key in enumerate(root.root_keys, 1):
        typer.echo(f"root key {number}: {PublicKey.from_hex(root_key).fingerprint}")
    typer.echo(f"{root.threshold} of {len(root.root_keys)} must sign")
    for shore, party in root.parties().items():
        earlier = len(party.generations()) - 1
        typer.echo(
            f"{shore}: identity {party.identity.fingerprint}" + (f", {earlier} earlier" if earlier else "")
        )
    for member in root.members:
        if member.revoked_s:
            typer.echo(f"{member.domain}: revoked from entry {member.revoked_size} of the server's ledger on")
    for witness in root.witnesses:
        typer.echo(f"witness {witness.name}: {PublicKey.from_hex(witness.key).fingerprint}")
