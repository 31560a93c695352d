"""The data channel: one large parcel to the Exchange and back, over TLS with client certificates on loopback.

What is measured: seconds of `send` (upload, written with fsync, SHA-256 checked, admitted, receipt signed)
and of `fetch` (download, SHA-256 checked) of a task vector of 384 MiB, the server in a process of its own;
and its resident memory before and at its peak. The baseline, in the same run and taking turns: one thread
copies the same file in 1 MiB pieces, takes its SHA-256 and calls fsync, which either end has to do as well.

    python -m benchmarks.data_channel --mib 8
    python -m benchmarks.data_channel --mib 384 --out runs/data_channel.json
"""

from __future__ import annotations

import argparse
import hashlib
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

from benchmarks.measure import ROOT, machine, medians, progress, ratio, show, take_turns, write_record

sys.path.insert(0, str(ROOT / "tests"))  # keys, certificates and an open run, as the tests make them
from crossing import Owner, Shore, make_vector

PIECE_BYTES = 1 << 20
ROWS = 1024  # a row of the one tensor is 1 KiB


def tensors(mib: int) -> dict[str, tuple[int, ...]]:
    """One float32 tensor of `mib` MiB."""
    return {"layer.weight": (ROWS * mib, 256)}


def serve(home: Path, mib: int) -> None:
    """The server's process: prints its port, serves until its input ends."""
    serving = Shore(home, tensors(mib)).serve()
    print(serving.port, flush=True)
    sys.stdin.read()
    serving.stop(0)


@contextmanager
def server_process(home: Path, mib: int) -> Iterator[tuple[subprocess.Popen[str], str]]:
    """A server over `home` in a process of its own, and its address."""
    command = [sys.executable, "-m", "benchmarks.data_channel", "--serve", str(home), "--mib", str(mib)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment
    ) as process:
        assert process.stdout is not None
        try:
            yield process, f"127.0.0.1:{int(process.stdout.readline())}"
        finally:
            process.kill()


def copy_and_hash(source: Path, target: Path) -> str:
    """What either end must do at least: read, hash, write, fsync."""
    digest, buffer = hashlib.sha256(), memoryview(bytearray(PIECE_BYTES))
    with source.open("rb", buffering=0) as reader, target.open("wb", buffering=0) as writer:
        while size := reader.readinto(buffer):
            digest.update(buffer[:size])
            writer.write(buffer[:size])
        os.fsync(writer.fileno())
    return digest.hexdigest()


def resident_bytes(process: int, key: str) -> int:
    """`VmRSS` (now) or `VmHWM` (at its peak) of a process."""
    lines = Path(f"/proc/{process}/status").read_text(encoding="ascii").splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(f"{key}:")) * 1024


def measure(options: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """Send and fetch `repeats` different parcels, with the copy beside them."""
    shore = Shore(folder / "server", tensors(options.mib))
    owner = Owner(folder / "toys", shore)
    turns = options.repeats + 1  # the first warms up
    progress(f"making {2 * turns} vectors of {options.mib} MiB")
    outgoing = [owner.vector(seed) for seed in range(turns)]
    published = [
        shore.publish(make_vector(folder / f"model-{n}", 100 + n, shore.tensors)) for n in range(turns)
    ]
    sent, fetched = iter(outgoing), iter(published)
    with server_process(shore.home, options.mib) as (process, address):
        client = owner.client(address)
        client.status()
        before_bytes = resident_bytes(process.pid, "VmRSS")
        calls: dict[str, Callable[[], object]] = {
            "up": lambda: client.send(next(sent)),
            "down": lambda: client.fetch(next(fetched).digest, folder / "got"),
            "copy": partial(copy_and_hash, outgoing[0].payload, folder / "copy"),
        }
        seconds = take_turns(calls, options.repeats)
        peak_bytes = resident_bytes(process.pid, "VmHWM")
    middle = medians(seconds)
    rows = [
        [name, middle[name], options.mib / middle[name], ratio(middle[name], middle["copy"])]
        for name in ("up", "down", "copy")
    ]
    show(f"{options.mib} MiB over loopback", ["way", "s", "MiB/s", "it / copy"], rows)
    print(f"\nServer: {before_bytes / 1e6:.0f} MB resident before, {peak_bytes / 1e6:.0f} MB at its peak")
    return {
        "seconds": seconds,
        "medians": middle,
        "server_before_bytes": before_bytes,
        "server_peak_bytes": peak_bytes,
    }


def main(arguments: Sequence[str] | None = None) -> None:
    """Run from the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--mib", type=int, default=8, help="size of the parcel")
    parser.add_argument("--repeats", type=int, default=3, help="turns after the first, which warms up")
    parser.add_argument("--work", type=Path, help="where files are made (default: the temporary folder)")
    parser.add_argument("--serve", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--out", type=Path, help="where the record goes, as JSON")
    options = parser.parse_args(arguments)
    if options.serve:
        serve(options.serve, options.mib)
        return
    with tempfile.TemporaryDirectory(dir=options.work) as folder:
        found = measure(options, Path(folder))
    facts = {"mib": options.mib, "repeats": options.repeats}
    write_record(options.out, {"benchmark": "data_channel", "machine": machine(), "options": facts, **found})


if __name__ == "__main__":
    main()
