"""Training-free merges of model folders: `isthmus merge` against mergekit, whole process.

What is measured: seconds, by the clock and of the processor, and peak resident memory of the whole command,
from the start of Python to its end, for 8 models of MiniLM's size (the embedded base plus seeded noise),
input files in the page cache, one thread pinned to one processor. Baselines, in the same run and taking
turns:

| baseline | what |
|---|---|
| mergekit | `mergekit-yaml` 0.1.4 on the same folders, in an environment of its own (`--peers`) |
| copy | one pinned thread reads every input once and writes as many bytes as one model, in 1 MiB pieces |

`copy / it` is the share of the machine's copy bandwidth that a command reaches; the same without the start
of Python and the imports (`start`: our command on two models of a few KB) stands beside it, and `bandwidth`
counts what the command read and wrote itself, which is more for methods that need a threshold. The last
three are of the processor's seconds: others' work on the machine slows processes more than it slows a short
copy. Ours takes the SHA-256 of every input for the card; `--no-digests` leaves that out, as mergekit does.
Task Arithmetic, ours and mergekit's, is checked against float64 on every tensor before anything is timed,
and every merge of mergekit must have written every tensor (its 0.1.5 ended well and wrote none).

`--counts 2,4,8,16,32` merges that many models (4 distinct ones, linked), with `--base roberta` of random
weights of that size: seconds and peak memory against N. `--large` merges two fine-tuned copies of a model of
3 GB in shards of 512 MB and reports the peak memory.

    python -m venv .venv-peers && .venv-peers/bin/pip install torch==2.13.0 mergekit==0.1.4 'transformers<5'
    python -m benchmarks.merge_command --size small
    python -m benchmarks.merge_command --size full --peers .venv-peers/bin/python --out runs/merge.json
    python -m benchmarks.merge_command --size full --counts 2,4,8,16,32 --out runs/merge_n.json
    python -m benchmarks.merge_command --large --out runs/merge_large.json    # 18 GB of disk

All of these are of one process. `--workers 2` (with `--large`, too) compares merges by so many with merges
by one, with the copy by one process, and with as many copies at once, each of a share of every file: seconds
by the clock, on as many processors as the machine has.
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import shutil
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import load_file

from benchmarks.measure import (
    Process,
    launch,
    line,
    machine,
    medians,
    progress,
    ratio,
    show,
    take_turns_by,
    write_record,
)
from benchmarks.model_folders import link_copy, make_base, make_bert, make_copy, weight_files
from common.models.base import resolve_base
from server.engine.forks import in_processes

LAMBDA = 0.3
PIECE_BYTES = 1 << 20
DISTINCT = 4  # models of a sweep over N that differ
CLOCKS = (time.perf_counter, time.process_time)
# our method -> mergekit's, with the same parameters as our defaults
METHODS: dict[str, tuple[str, dict[str, Any]]] = {
    "task-arithmetic": ("task_arithmetic", {"weight": LAMBDA}),
    "ties": ("ties", {"weight": 1.0, "density": 0.2}),
    "dare": ("dare_linear", {"weight": LAMBDA, "density": 0.1}),
}


@dataclass(frozen=True)
class Folders:
    """A base, the models made of it, and where results and records go."""

    base: Path
    models: list[Path]
    work: Path
    pinned: bool = True

    @property
    def log(self) -> Path:
        return self.work / "process.log"

    @property
    def inputs(self) -> list[Path]:
        return [path for folder in (self.base, *self.models) for path in weight_files(folder)]


def our_command() -> list[str]:
    """`isthmus merge`, as it is installed, or its module where it is not."""
    script = Path(sys.executable).with_name("isthmus")
    return [str(script), "merge"] if script.exists() else [sys.executable, "-m", "server.engine.cli"]


def ours(command: Sequence[str], folders: Folders, method: str, workers: int = 1) -> list[str]:
    """The command line of our merge, by so many processes."""
    models = [word for model in folders.models for word in ("--model", str(model))]
    where = ["--base", str(folders.base), *models, "--out", str(folders.work / "ours")]
    return [*command, *where, "--method", method, "--workers", str(workers)]


def mergekit(python: Path, folders: Folders, method: str) -> list[str]:
    """The command line of mergekit's merge; writes its configuration."""
    name, parameters = METHODS[method]
    config = {
        "models": [{"model": str(model), "parameters": parameters} for model in folders.models],
        "merge_method": name,
        "base_model": str(folders.base),
        "dtype": "float32",
    }
    path = folders.work / f"{name}.yaml"
    path.write_text(json.dumps(config))  # JSON is YAML
    command = [str(python.with_name("mergekit-yaml")), str(path), str(folders.work / "mergekit")]
    return [*command, "--num-threads", "1", "--quiet"]


def copy_once(folders: Folders, copies: ExitStack, share: int = 0, of: int = 1) -> None:
    """The copy that is the measure of bandwidth: read every input, write one model's bytes to a new file.

    Of every file share `share` of `of` alone. Closing `copies` frees the new file: to do so takes as long as
    half the copy, and no command has to.
    """
    buffer = memoryview(bytearray(PIECE_BYTES))
    from_base = len(weight_files(folders.base))
    allowed = os.sched_getaffinity(0)
    if folders.pinned:
        os.sched_setaffinity(0, {max(allowed)})  # where the commands run
    try:
        target = tempfile.TemporaryFile(dir=folders.work, buffering=0)  # noqa: SIM115 - `copies` closes it
        copies.callback(target.close)
        for number, path in enumerate(folders.inputs):
            size_bytes = path.stat().st_size
            left = size_bytes * (share + 1) // of - size_bytes * share // of
            with path.open("rb", buffering=0) as source:
                source.seek(size_bytes * share // of)
                while size := source.readinto(buffer[:left]):
                    left -= size
                    if number < from_base:
                        target.write(buffer[:size])
    finally:
        os.sched_setaffinity(0, allowed)


def copy_shares(folders: Folders, copies: ExitStack, count: int) -> None:
    """As many copies at once, each of its share."""
    in_processes([partial(copy_once, folders, copies, share, count) for share in range(count)])


def touch_memory(size_bytes: int) -> None:
    """Take so much memory and give it back.

    On a virtual machine, memory that was free for some seconds may belong to the host, and getting it back
    takes longer than writing a file into it: afterwards all contenders find memory that the machine has.
    """
    np.ones(size_bytes, np.uint8)


def check_task_arithmetic(command: Sequence[str], folders: Folders, out: Path) -> float:
    """Largest error of a merge, ours or theirs, against float64. Raises AssertionError above rounding."""
    merge_once(command, out, folders)
    base, models = _load(folders.base), [_load(model) for model in folders.models]
    found, worst = _load(out), 0.0
    assert found.keys() == base.keys(), f"{len(found)} tensors of {len(base)}"
    for name, theta in base.items():
        if theta.dtype != np.float32:
            assert np.array_equal(found[name], theta), name
            continue
        expected = theta + LAMBDA * sum(model[name].astype(np.float64) - theta for model in models)
        worst = max(worst, float(np.abs(found[name] - expected).max()))
    assert worst < 1e-6, f"off by {worst}"
    return worst


def merge_once(command: Sequence[str], out: Path, folders: Folders) -> Process:
    """One merge into a folder that is not there yet."""
    shutil.rmtree(out, ignore_errors=True)
    return launch(command, folders.log, pinned=folders.pinned)


def compare(options: argparse.Namespace, folders: Folders) -> dict[str, Any]:
    """Every method: ours, mergekit where it is given, and the copy, in turns."""
    ours_out, peer_out = folders.work / "ours", folders.work / "mergekit"
    error = check_task_arithmetic(ours(options.ours, folders, "task-arithmetic"), folders, ours_out)
    if options.peers:
        check_task_arithmetic(mergekit(options.peers, folders, "task-arithmetic"), folders, peer_out)
    progress(f"Task Arithmetic agrees with float64: largest error {error:.1e}")
    tiny = make_tiny(folders)
    model_bytes = sum(path.stat().st_size for path in weight_files(folders.base))
    copied_bytes = model_bytes + sum(path.stat().st_size for path in folders.inputs)
    rows = []
    for method in options.methods:
        progress(f"{method}: {options.repeats} turns")
        command = ours(options.ours, folders, method)
        lines = {"start": ours(options.ours, tiny, method), "isthmus": command}
        lines["isthmus --no-digests"] = [*command, "--no-digests"]
        if options.peers:
            lines["mergekit"] = mergekit(options.peers, folders, method)
        kept: dict[str, list[Process]] = {name: [] for name in lines}
        with ExitStack() as copies:
            calls: dict[str, Callable[[], object]] = {"copy": partial(copy_once, folders, copies)}
            for name, command in lines.items():
                out = peer_out if name == "mergekit" else ours_out
                calls[name] = partial(_keep, kept[name], command, out, folders)
            copy_s, copy_processor_s = (
                medians(found)["copy"] for found in take_turns_by(CLOCKS, calls, options.repeats)
            )
        if options.peers:
            assert _load(peer_out).keys() == _load(folders.base).keys(), "mergekit did not write every tensor"
        copied = Copied(copied_bytes, copy_s, copy_processor_s)
        processes = {name: found[1:] for name, found in kept.items()}  # the first warms up
        rows += _rows(method, processes, copied, _moved_bytes(ours_out))
        progress(f"copy: {copy_s:.3f} s, {copied_bytes / copy_processor_s / 1e9:.2f} GB/s of the processor")
    _show(f"{len(folders.models)} models of {model_bytes / 1e6:.1f} MB", rows)
    return {"rows": rows, "copied_bytes": copied_bytes, "float64_error": error}


@dataclass(frozen=True)
class Copied:
    """The copy: bytes read and written, seconds by the clock and of the processor."""

    moved_bytes: int
    seconds: float
    processor_s: float


def _keep(kept: list[Process], command: Sequence[str], out: Path, folders: Folders) -> None:
    kept.append(merge_once(command, out, folders))


def _moved_bytes(out: Path) -> int:
    """What our merge into `out` read and wrote of weights."""
    record = json.loads((out / "merge.json").read_text())
    return int(record["bytes_read"] + record["bytes_written"])


def _rows(
    method: str, processes: dict[str, list[Process]], copied: Copied, moved_bytes: int
) -> list[dict[str, Any]]:
    """A row a contender: medians of the turns, and ratios of them."""
    seconds = {name: statistics.median(p.seconds for p in found) for name, found in processes.items()}
    processor = {name: statistics.median(p.cpu_seconds for p in found) for name, found in processes.items()}
    peak_mb = {name: max(p.peak_bytes for p in found) / 1e6 for name, found in processes.items()}
    rows = []
    for name in processes:
        rest_s = processor[name] - processor["start"]
        beyond = copied.processor_s / rest_s if name.startswith("isthmus") and rest_s > 0 else None
        rows.append(
            {
                "method": method,
                "contender": name,
                "s": seconds[name],
                "processor s": processor[name],
                "peak MB": peak_mb[name],
                "mergekit / it": ratio(seconds.get("mergekit"), seconds[name]),
                "mergekit / it, processor": ratio(processor.get("mergekit"), processor[name]),
                "mergekit / it, memory": ratio(peak_mb.get("mergekit"), peak_mb[name]),
                "copy s": copied.seconds,
                "copy processor s": copied.processor_s,
                "copy / it": copied.processor_s / processor[name],
                "copy / (it - start)": beyond,
                "bandwidth": beyond and beyond * moved_bytes / copied.moved_bytes,
            }
        )
    return rows


def _show(title: str, rows: Sequence[dict[str, Any]]) -> None:
    show(title, list(rows[0]), [list(row.values()) for row in rows])


def sweep(options: argparse.Namespace, folders: Folders) -> dict[str, Any]:
    """Seconds and peak memory of our merge against the number of models."""
    rows = []
    for method in options.methods:
        for count in options.counts:
            progress(f"{method}, N = {count}")
            some = replace(folders, models=folders.models[:count])
            command = ours(options.ours, some, method)
            found = [merge_once(command, folders.work / "ours", folders) for _ in range(options.repeats + 1)]
            with ExitStack() as copies:
                calls: dict[str, Callable[[], object]] = {"copy": partial(copy_once, some, copies)}
                copies_s = take_turns_by(CLOCKS, calls, options.repeats)
            processor_s = statistics.median(p.cpu_seconds for p in found[1:])
            rows.append(
                {
                    "method": method,
                    "N": count,
                    "s": statistics.median(p.seconds for p in found[1:]),
                    "processor s": processor_s,
                    "copy / it": medians(copies_s[1])["copy"] / processor_s,
                    "peak MB": max(p.peak_bytes for p in found) / 1e6,
                }
            )
    model_bytes = sum(path.stat().st_size for path in weight_files(folders.base))
    _show(f"N models of {model_bytes / 1e6:.1f} MB", rows)
    lines = []
    for method in options.methods if len(options.counts) > 1 else []:
        mine = [row for row in rows if row["method"] == method]
        for what in ("processor s", "peak MB"):
            slope, start = line([row["N"] for row in mine], [row[what] for row in mine])
            lines.append({"method": method, "what": what, "a model": slope, "at none": start})
    if lines:
        _show("Cost against N", lines)
    return {"rows": rows, "slopes": lines, "model_bytes": model_bytes}


def spread(options: argparse.Namespace, folders: Folders) -> dict[str, Any]:
    """Merges by several workers against merges by one, and against copies."""
    folders, count = replace(folders, pinned=False), options.workers
    tiny = make_tiny(folders)
    out, rows = folders.work / "ours", []

    def ready() -> None:
        shutil.rmtree(out, ignore_errors=True)
        touch_memory(2 * sum(path.stat().st_size for path in weight_files(folders.base)))

    for method in options.methods:
        progress(f"{method}: {options.repeats} turns")

        def merge(workers: int, some: Folders = folders, method: str = method) -> None:
            merge_once(ours(options.ours, some, method, workers), out, some)

        with ExitStack() as copies:
            calls: dict[str, Callable[[], object]] = {
                "copy": partial(copy_once, folders, copies),
                "copies": partial(copy_shares, folders, copies, count),
                "start": partial(merge, 1, tiny),
                "one": partial(merge, 1),
                "several": partial(merge, count),
            }
            found = medians(take_turns_by(CLOCKS[:1], calls, options.repeats, ready=ready)[0])
        rest_s = found["several"] - found["start"]
        peak_bytes = json.loads((out / "merge.json").read_text())["peak_memory_bytes"]
        rows.append(
            {
                "method": method,
                **{f"{name}, s": seconds for name, seconds in found.items()},
                "one / several": found["one"] / found["several"],
                "copy / (one - start)": found["copy"] / (found["one"] - found["start"]),
                "copy / (several - start)": found["copy"] / rest_s,
                "copies / (several - start)": found["copies"] / rest_s,
                "peak MB": peak_bytes / 1e6,
            }
        )
    _show(f"{len(folders.models)} models by {count} workers", rows)
    return {"rows": rows}


def large(options: argparse.Namespace, folders: Folders) -> dict[str, Any]:
    """One merge of each method, and copies before and after; the peak memory is what counts."""
    model_bytes = sum(path.stat().st_size for path in weight_files(folders.base))
    shard_bytes = max(path.stat().st_size for path in weight_files(folders.base))
    copied_bytes = model_bytes + sum(path.stat().st_size for path in folders.inputs)
    rows = []
    for method in options.methods:
        progress(f"{method}: one merge")
        kept: list[Process] = []
        out = folders.work / "ours"
        command = ours(options.ours, folders, method)
        with ExitStack() as copies:
            calls: dict[str, Callable[[], object]] = {"copy": partial(copy_once, folders, copies)}
            calls["isthmus"] = partial(_keep, kept, command, out, folders)
            copy_s = medians(take_turns_by(CLOCKS, calls, 1, warm_ups=int(options.large))[1])["copy"]
        took = kept[-1]
        rows.append(
            {
                "method": method,
                "seconds": took.seconds,
                "processor s": took.cpu_seconds,
                "copy / it": copy_s / took.cpu_seconds,
                "bandwidth": copy_s / took.cpu_seconds * _moved_bytes(out) / copied_bytes,
                "peak_mb": max(process.peak_bytes for process in kept) / 1e6,
                "peak / model": took.peak_bytes / model_bytes,
                "peak / shard": took.peak_bytes / shard_bytes,
            }
        )
    sizes = f"{model_bytes / 1e9:.2f} GB, shards of {shard_bytes / 1e6:.0f} MB"
    _show(f"{len(folders.models)} models of {sizes}", rows)
    return {"rows": rows, "model_bytes": model_bytes, "shard_bytes": shard_bytes}


def make_tiny(folders: Folders) -> Folders:
    """Two models of a few KB: what is left of a merge's time is the start."""
    base = make_bert(folders.work / "tiny", layers=2, hidden=32)
    models = [make_copy(base, folders.work / f"tiny-{seed}", seed) for seed in range(2)]
    return Folders(base, models, folders.work, folders.pinned)


def make_folders(options: argparse.Namespace, work: Path) -> Folders:
    """The base and the models of this size."""
    if options.large:
        layers = max(1, round(options.large_gb * 1e9 / 4 / (12 * 1024**2)))
        base = make_bert(work / "base", layers=layers, hidden=1024, vocabulary=1024, shard_bytes=512 << 20)
    elif options.base == "roberta":
        base = make_bert(work / "base", layers=12, hidden=768, vocabulary=50265)
    elif options.size == "full":
        base = make_base(resolve_base("embedded"), work / "base")
    else:
        base = make_bert(work / "base", layers=2, hidden=32)
    count = options.models or (2 if options.large else 8 if options.size == "full" else 3)
    count = max(options.counts) if options.counts else count
    models: list[Path] = []
    for number in range(count):
        folder = work / f"model-{number}"
        if options.counts and number >= DISTINCT:
            models.append(link_copy(models[number % DISTINCT], folder))
            continue
        progress(f"making model {number + 1} of {count}")
        models.append(make_copy(base, folder, number))
    return Folders(base, models, work, not options.unpinned)


def _load(folder: Path) -> dict[str, Any]:
    return {name: tensor for path in weight_files(folder) for name, tensor in load_file(path).items()}


def run(options: argparse.Namespace) -> dict[str, Any]:
    """Make the folders, measure, return the record."""
    if options.work:
        options.work.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=options.work) as name:
        folders = make_folders(options, Path(name))
        measure = (
            spread if options.workers else large if options.large else sweep if options.counts else compare
        )
        found = measure(options, folders)
    words = {key: str(v) if isinstance(v, Path) else v for key, v in vars(options).items()}
    return {"benchmark": "merge_command", "machine": machine(numpy=np.__version__), "options": words, **found}


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--size", choices=["small", "full"], default="small")
    parser.add_argument("--models", type=int, help="how many are merged")
    parser.add_argument("--base", choices=["embedded", "roberta"], default="embedded", help="of a sweep")
    parser.add_argument(
        "--counts", type=lambda text: [int(n) for n in text.split(",")], help="sweep, as 2,4,8"
    )
    parser.add_argument("--methods", type=lambda text: text.split(","), default=list(METHODS))
    parser.add_argument("--repeats", type=int, help="turns after the first, which warms up")
    parser.add_argument("--peers", type=Path, help="the python of an environment with mergekit")
    parser.add_argument(
        "--ours", type=shlex.split, default=our_command(), help="our command, up to its flags"
    )
    parser.add_argument("--unpinned", action="store_true", help="on any processor, where others work too")
    parser.add_argument("--large", action="store_true", help="peak memory of a large model in shards")
    parser.add_argument("--large-gb", type=float, default=3.0)
    parser.add_argument("--workers", type=int, help="compare merges by so many processes with merges by one")
    parser.add_argument("--work", type=Path, help="where folders are made (default: the temporary folder)")
    parser.add_argument("--out", type=Path, help="where the record goes, as JSON")
    options = parser.parse_args(arguments)
    options.repeats = options.repeats or (5 if options.size == "full" else 1)
    return options


def main(arguments: Sequence[str] | None = None) -> None:
    """Run from the command line."""
    options = parse(arguments)
    write_record(options.out, run(options))


if __name__ == "__main__":
    main()
