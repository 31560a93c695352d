"""`isthmus audit`: what an auditor types. Only `bundle` looks into homes; the rest needs a bundle alone."""

from __future__ import annotations

import json
import time
from dataclasses import asdict
from datetime import UTC, datetime
from importlib import import_module
from pathlib import Path
from typing import Annotated, Any, Literal

import typer
from rich.console import Console
from rich.table import Table

from common.audit.bundle import Bundle
from common.audit.outcome import AuditReport, DomainReport, Tally
from common.audit.scan import MISSES, Scan, Scanner, read_canaries
from common.audit.verify import verify
from common.audit.words import withdrawn
from common.console import progress_bars
from common.errors import ConfigError, LedgerError
from common.files import write_atomic
from common.ledger import Crossing, walk
from common.roots import SignedRoot
from common.signing import PublicKey

Format = Literal["text", "json"]
FormatOption = Annotated[Format, typer.Option("--format", help="text, or json for machines")]
BundleArgument = Annotated[Path, typer.Argument(help="the bundle's folder")]
RootOption = Annotated[Path, typer.Option(help="root.json, as the auditor got it from its signers")]
# Each shore knows its own home; naming the exporters here keeps `common` free of both.
EXPORTERS = {
    "server.toml": "server.export:export",
    "client.toml": "clients.export:export",
    "witness.toml": "common.witness.export:export",
}

app = typer.Typer(help="Prove offline what crossed.", no_args_is_help=True)


@app.command()
def bundle(
    run_dir: Annotated[Path, typer.Argument(help="anybody's home, or the folder of a simulation")],
    out: Annotated[Path, typer.Option(help="the bundle's folder; parts of other shores in it are kept")],
    payloads: Annotated[bool, typer.Option("--payloads", help="also what the headers speak of")] = False,
) -> None:
    """Collect what an auditor needs: ledgers, checkpoints, headers, receipts, root.json."""
    homes = [run_dir, run_dir / "server", run_dir / "witness", *sorted((run_dir / "domains").glob("*"))]
    found = [(home, EXPORTERS[name]) for home in homes for name in EXPORTERS if (home / name).is_file()]
    if not found:
        raise ConfigError(
            f"{run_dir} is neither a home nor the folder of a simulation",
            next_step=f"name the folder that holds {', '.join(EXPORTERS)}, or server/ and domains/",
        )
    target = Bundle(out, create=True)
    for home, exporter in found:
        module, _, function = exporter.partition(":")
        getattr(import_module(module), function)(home, target, payloads=payloads)
        typer.echo(f"{home}: added")
    typer.echo(f"next: isthmus audit verify {out} --root root.json (the auditor's own copy of it)")


@app.command("verify")
def verify_command(
    bundle: BundleArgument,
    root: RootOption,
    format: FormatOption = "text",
) -> None:
    """Derive everything again and say what crossed; exit code 1 unless everything is as it must be."""
    signed, found = _verified(bundle, root)
    if format == "json":
        typer.echo(json.dumps(as_json(found), indent=1))
    else:
        _print(found, signed)
    if not found.clean:
        raise typer.Exit(1)


@app.command("report")
def report_command(
    bundle: BundleArgument,
    root: RootOption,
    out: Annotated[Path, typer.Option(help="the page to write")] = Path("audit.html"),
) -> None:
    """Write what `verify` finds as one HTML page for people; exit code 1 unless all is as it must be."""
    from common.audit.report import render

    signed, found = _verified(bundle, root)
    page = render(found, signed.root, name=bundle.resolve().name, checked_s=int(time.time()))
    write_atomic(out, page.encode("utf-8"))
    typer.echo(f"{_verdict(found)}; {out}: written")
    if not found.clean:
        raise typer.Exit(1)


def _verified(bundle: Path, root: Path) -> tuple[SignedRoot, AuditReport]:
    """The root file and what `verify` finds under it, with a bar a ledger."""
    signed = SignedRoot.load(root)
    with progress_bars() as report:

        def on_step(shore: str, step: int, total: int) -> None:
            report(phase=f"verify {shore}", step=step, total=total)

        return signed, verify(Bundle(bundle), signed.root, on_step)


def _verdict(report: AuditReport) -> str:
    return "clean: no findings" if report.clean else f"NOT CLEAN: {len(report.all_findings)} findings"


@app.command()
def show(
    bundle: BundleArgument,
    shore: Annotated[str, typer.Option(help="only this ledger: server, or a domain")] = "",
    kind: Annotated[str, typer.Option(help="only this kind, such as task-vector or receipt")] = "",
    direction: Annotated[str, typer.Option(help="only in, or only out")] = "",
    run: Annotated[str, typer.Option(help="only runs whose id begins so")] = "",
    format: FormatOption = "text",
) -> None:
    """List the entries of the ledgers, as they stand there. Nothing is verified."""
    opened = Bundle(bundle)
    rows = [
        {"shore": name, "index": index, **asdict(crossing)}
        for name in ([shore] if shore else opened.shores())
        for index, crossing in _entries(opened, name)
        if kind in ("", crossing.kind, crossing.type)
        and direction in ("", crossing.direction)
        and crossing.run.startswith(run)
    ]
    if format == "json":
        typer.echo(json.dumps(rows, indent=1))
        return
    table = Table("ledger", "index", "", "peer", "what", "bytes", "verdict", "digest", box=None)
    for row in rows:
        what = row["kind"] if row["type"] == "parcel" else row["type"]
        size, digest = f"{row['size_bytes']:,}", str(row["digest"])[:12]
        cells = (
            row["shore"],
            row["index"],
            row["direction"],
            row["peer"],
            what,
            size,
            row["verdict"],
            digest,
        )
        table.add_row(*map(str, cells))
    Console().print(table)


@app.command("scan")
def scan_command(
    capture: Annotated[Path, typer.Argument(help="a folder of streams as they were before TLS, one a file")],
    canaries: Annotated[Path, typer.Option(help="one a line: a text, or item ids with commas between")],
    format: FormatOption = "text",
) -> None:
    """Search captured traffic for planted private values, in every encoding; exit code 1 if one is found."""
    planted = read_canaries(canaries)
    with progress_bars() as report:

        def on_file(name: str, step: int, total: int) -> None:
            report(phase=f"scan {name}", step=step, total=total)

        found = Scanner(planted).scan(capture, on_file)
    if format == "json":
        typer.echo(json.dumps({"schema": 1, **asdict(found), "not_found_by_any_scan": MISSES}, indent=1))
    else:
        _print_scan(found, len(planted))
    if found.hits:
        raise typer.Exit(1)


def _print_scan(found: Scan, planted: int) -> None:
    """A canary is private, so it is named by its number in the file."""
    typer.echo(f"{found.files} streams, {found.bytes:,} bytes; {found.searched_bytes:,} bytes searched")
    for place in found.unframed:
        typer.echo(f"searched as it is, not HTTP or cut short: {place}")
    for place in found.cut:
        typer.echo(f"not wholly searched: {place}")
    for hit in found.hits:
        how = " of ".join([*hit.undone, hit.form])
        typer.echo(f"FOUND  canary {hit.canary + 1}, as {how}: {hit.place}")
    typer.echo(f"{len(found.found) or 'none'} of {planted} canaries found")
    typer.echo(f"no scan finds: {MISSES}")


def _entries(bundle: Bundle, shore: str) -> list[tuple[int, Crossing]]:
    """The entries of one ledger up to the first that is damaged. Raises ConfigError if there is none."""
    if shore not in bundle.shores():
        raise ConfigError(
            f"no ledger of {shore!r} in the bundle",
            next_step=f"it has {', '.join(bundle.shores()) or 'none'}",
        )
    found: list[tuple[int, Crossing]] = []
    try:
        for entry, _ in walk(bundle.ledger(shore)):
            found.append((entry.index, Crossing.read(entry.body)))
    except LedgerError as err:
        typer.echo(f"{shore}: entry {len(found)}: {err.message}; the rest is not shown", err=True)
    return found


def as_json(report: AuditReport) -> dict[str, Any]:
    """The report for machines: the fields of `AuditReport` and its parts."""
    return {
        "schema": 1,
        "clean": report.clean,
        "root_version": report.root_version,
        "shores": [asdict(shore) for shore in report.shores],
        "domains": [asdict(domain) for domain in report.domains],
        "findings": [asdict(finding) for finding in report.findings],
    }


def _print(report: AuditReport, signed: SignedRoot) -> None:
    keys = "; ".join(PublicKey.from_hex(key).fingerprint for key in signed.root.root_keys)
    typer.echo(f"root.json version {report.root_version}, signed by {keys}")
    for shore in report.shores:
        typer.echo(
            f"ledger of {shore.shore}: {shore.entries} entries, "
            f"{shore.checkpoint_size} under a signed checkpoint"
        )
        for name, seen in sorted(shore.cosigned.items()):
            when = datetime.fromtimestamp(seen.time_s, UTC)
            typer.echo(f"  {name} cosigned {seen.size} of them, {when:%Y-%m-%d %H:%M:%S} UTC by its clock")
    for domain in report.domains:
        _print_domain(domain)
    for finding in report.all_findings:
        at = f"entry {finding.index}" if finding.index >= 0 else "as a whole"
        typer.echo(f"FINDING  {finding.shore}, {at}: {finding.code}: {finding.reason}")
    typer.echo(_verdict(report))


def _print_domain(domain: DomainReport) -> None:
    verdict = "clean" if not domain.findings else f"{len(domain.findings)} findings"
    typer.echo(f"\n{domain.domain} ({domain.pseudonym}), signer {domain.signer[:16]}: {verdict}")
    for what, tallies in (("sent", domain.sent), ("received", domain.received)):
        typer.echo(f"  {what}: {_listed(tallies)}")
    spend = ", ".join(
        f"{p['kind']} epsilon {int(p['epsilon_e6']) / 1e6:g}, delta {int(p['delta_e12']) / 1e12:g}"
        for p in domain.privacy
    )
    typer.echo(f"  privacy spend: {spend or 'no differential privacy was claimed'}")
    for item in domain.withdrawn:
        typer.echo(f"  {withdrawn(item)}")
    for item in domain.unacknowledged:
        typer.echo(f"  unacknowledged: {item['kind']}, entry {item['index']} of {item['shore']}")
    for limit in domain.not_proven:
        typer.echo(f"  not proven: {limit}")


def _listed(tallies: dict[str, Tally]) -> str:
    largest_first = sorted(tallies.items(), key=lambda item: -item[1].bytes)
    parts = [f"{tally.count} {name} ({tally.bytes:,} bytes)" for name, tally in largest_first]
    return ", ".join(parts) or "nothing"
