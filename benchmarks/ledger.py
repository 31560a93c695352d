"""The ledger: appending entries, opening it again, proving and verifying them, and its share of a run.

Appending is fsync-bound, so its baseline, taking turns, writes lines of the same length to a file and calls
fsync after each. The baselines of opening are reading the same file and parsing each line with `json.loads`,
and hashing the lines into a tree, all that the prototype did in 0.16 s for 100,000.

    python -m benchmarks.ledger
    python -m benchmarks.ledger --entries 100000 --folder /dev/shm --out runs/ledger.json
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from benchmarks.measure import machine, medians, nothing, progress, show, take_turns, write_record
from common.ledger import Crossing, Ledger, walk
from common.merkle import Tree, leaf_hash, verify_consistency, verify_inclusion

TURNS = 5
PROOFS = 1000
RUN_ENTRIES = {"a domain": 28, "the server": 100}  # of the demo, four domains
RUN_S = 480.0


def crossing(number: int) -> Crossing:
    """An entry as a run writes it; no two are alike."""
    return Crossing(
        "out", "data", "parcel", f"{number:064x}", 21_000_000, "server", "task-vector", "run", "", 1
    )


def timed(call: Callable[[], object]) -> float:
    """Seconds of one call."""
    started_s = time.perf_counter()
    call()
    return time.perf_counter() - started_s


def appending(folder: Path, entries: int) -> dict[str, list[float]]:
    """Seconds of each turn of `entries / TURNS` appends, ours and the baseline's."""
    ledger, batch = Ledger(folder / "ledger.jsonl"), entries // TURNS
    line = b"x" * 380 + b"\n"
    plain = os.open(folder / "plain", os.O_WRONLY | os.O_CREAT)

    def ours() -> None:
        for number in range(len(ledger), len(ledger) + batch):
            ledger.record(crossing(number))

    def baseline() -> None:
        for _ in range(batch):
            os.write(plain, line)
            os.fsync(plain)

    try:
        return take_turns({"ours": ours, "write and fsync": baseline}, TURNS, warm_ups=0, wait=nothing)
    finally:
        os.close(plain)


def reading(path: Path) -> dict[str, list[float]]:
    """Seconds of opening for writing, of walking as an auditor, and of the baseline."""

    def audit() -> None:
        tree = Tree()
        for entry, line in walk(path):
            Crossing.read(entry.body)
            tree.append(leaf_hash(line))
        tree.root()

    def baseline() -> None:
        for line in path.read_bytes().splitlines():
            json.loads(line)

    def hashing() -> None:
        tree = Tree()
        for line in content:
            tree.append(leaf_hash(line))
        tree.root()

    content = path.read_bytes().splitlines()
    contenders = {"open": lambda: Ledger(path), "audit": audit, "json.loads": baseline, "tree alone": hashing}
    return take_turns(contenders, 3, warm_ups=0, wait=nothing)


def proving(path: Path) -> dict[str, float]:
    """Microseconds of making and of verifying one proof, over `PROOFS` places."""
    ledger = Ledger(path)
    size, step = len(ledger), max(1, len(ledger) // PROOFS)
    root = bytes.fromhex(ledger.tree_head().root)
    lines = {entry.index: leaf_hash(line) for entry, line in walk(path) if entry.index % step == 0}
    proofs: dict[int, list[bytes]] = {}
    made_s = timed(lambda: proofs.update({index: ledger.inclusion(index, size) for index in lines}))
    checked_s = timed(lambda: [verify_inclusion(i, size, lines[i], proofs[i], root) for i in lines])
    old = [(index + 1, bytes.fromhex(ledger.tree_head(index + 1).root)) for index in lines]
    grown_s = timed(
        lambda: [verify_consistency(n, size, ledger.consistency(n, size), r, root) for n, r in old]
    )
    return {
        name: 1e6 * s / len(lines)
        for name, s in (("make", made_s), ("verify", checked_s), ("grown", grown_s))
    }


def main(arguments: Sequence[str] | None = None) -> dict[str, Any]:
    """Measure, print tables, return the record."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--entries", type=int, default=500)
    parser.add_argument("--folder", type=Path, help="where to write; default: a temporary folder")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args(arguments)
    with tempfile.TemporaryDirectory(dir=options.folder) as name:
        folder = Path(name)
        progress(f"appending {options.entries} entries")
        appended = appending(folder, options.entries)
        progress("reading")
        read = reading(folder / "ledger.jsonl")
        progress("proving")
        proofs = proving(folder / "ledger.jsonl")
        size_bytes = (folder / "ledger.jsonl").stat().st_size
    batch, append, opened = options.entries // TURNS, medians(appended), medians(read)
    rows = [
        ["append", 1e6 * append["ours"] / batch, append["ours"] / append["write and fsync"]],
        ["open", 1e6 * opened["open"] / options.entries, opened["open"] / opened["json.loads"]],
        ["audit", 1e6 * opened["audit"] / options.entries, opened["audit"] / opened["json.loads"]],
        [
            "tree alone",
            1e6 * opened["tree alone"] / options.entries,
            opened["tree alone"] / opened["json.loads"],
        ],
    ]
    show(
        f"Ledger of {options.entries} entries, {size_bytes / 1e6:.1f} MB",
        ["", "us an entry", "of the baseline"],
        rows,
    )
    show("Proofs", ["", "us"], [[name, us] for name, us in proofs.items()])
    share = {who: entries * append["ours"] / batch / RUN_S for who, entries in RUN_ENTRIES.items()}
    show(f"Share of a run of {RUN_S:.0f} s", ["", "%"], [[who, 100 * part] for who, part in share.items()])
    record = {
        "machine": machine(),
        "entries": options.entries,
        "bytes": size_bytes,
        "append_s": appended,
        "read_s": read,
        "proof_us": proofs,
        "run_share": share,
    }
    write_record(options.out, record)
    return record


if __name__ == "__main__":
    main()
