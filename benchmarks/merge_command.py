"""Training-free merges of model folders: `isthmus merge` against mergekit, whole process.

What is measured: seconds and peak resident memory of the whole command, from the start of Python to its end,
for 8 models of MiniLM's size (the embedded base plus seeded noise), input files in the page cache, one thread
pinned to one processor. Baselines, in the same run and taking turns:

| baseline | what |
|---|---|
| mergekit | `mergekit-yaml` 0.1.4 on the same folders, in an environment of its own (`--peers`) |
| copy | one thread reads every input file once and writes as many bytes as one model, in 1 MiB pieces |

`copy / it` is the share of the machine's copy bandwidth that a command reaches; the same without the start of
Python and the imports (`start`: our command on two models of a few KB) stands beside it. Ours takes the
SHA-256 of every input for the card; `--no-digests` leaves that out, as mergekit does. Task Arithmetic is
checked against float64 on every tensor before anything is timed.

`--large` merges two fine-tuned copies of a model of 3 GB in shards of 512 MB and reports the peak memory.

    python -m venv .venv-peers && .venv-peers/bin/pip install mergekit==0.1.4 'transformers<5'
    python -m benchmarks.merge_command --size small
    python -m benchmarks.merge_command --size full --peers .venv-peers/bin/python --out runs/merge.json
    python -m benchmarks.merge_command --large --out runs/merge_large.json    # 12 GB of disk
"""

from __future__ import annotations

import argparse
import json
import shlex
import shutil
import statistics
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import load_file

from benchmarks.measure import (
    Process,
    launch,
    machine,
    medians,
    progress,
    ratio,
    show,
    take_turns,
    write_record,
)
from benchmarks.model_folders import make_base, make_bert, make_copy, weight_files
from common.models.base import resolve_base

LAMBDA = 0.3
PIECE_BYTES = 1 << 20
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


def ours(command: Sequence[str], folders: Folders, method: str) -> list[str]:
    """The command line of our merge."""
    models = [word for model in folders.models for word in ("--model", str(model))]
    where = ["--base", str(folders.base), *models, "--out", str(folders.work / "ours")]
    return [*command, *where, "--method", method]


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


def copy_once(folders: Folders) -> None:
    """The copy that is the measure of bandwidth: read every input, write one model's bytes."""
    buffer = memoryview(bytearray(PIECE_BYTES))
    from_base = len(weight_files(folders.base))
    with (folders.work / "copy").open("wb", buffering=0) as target:
        for number, path in enumerate(folders.inputs):
            with path.open("rb", buffering=0) as source:
                while size := source.readinto(buffer):
                    if number < from_base:
                        target.write(buffer[:size])


def check_task_arithmetic(command: Sequence[str], folders: Folders) -> float:
    """Largest error of our merge against float64, on any tensor. Raises AssertionError above rounding."""
    merge_once(ours(command, folders, "task-arithmetic"), folders.work / "ours", folders.work)
    base, models = _load(folders.base), [_load(model) for model in folders.models]
    found, worst = _load(folders.work / "ours"), 0.0
    assert found.keys() == base.keys()
    for name, theta in base.items():
        if theta.dtype != np.float32:
            assert np.array_equal(found[name], theta), name
            continue
        expected = theta + LAMBDA * sum(model[name].astype(np.float64) - theta for model in models)
        worst = max(worst, float(np.abs(found[name] - expected).max()))
    assert worst < 1e-6, f"off by {worst}"
    return worst


def merge_once(command: Sequence[str], out: Path, work: Path) -> Process:
    """One merge into a folder that is not there yet."""
    shutil.rmtree(out, ignore_errors=True)
    return launch(command, work / "process.log")


def compare(options: argparse.Namespace, folders: Folders) -> dict[str, Any]:
    """Every method: ours, mergekit where it is given, and the copy, in turns."""
    error = check_task_arithmetic(options.ours, folders)
    progress(f"Task Arithmetic agrees with float64: largest error {error:.1e}")
    tiny_base = make_bert(folders.work / "tiny", layers=2, hidden=32)
    tiny_models = [make_copy(tiny_base, folders.work / f"tiny-{seed}", seed) for seed in range(2)]
    tiny = Folders(tiny_base, tiny_models, folders.work)
    model_bytes = sum(path.stat().st_size for path in weight_files(folders.base))
    moved_bytes = model_bytes + sum(path.stat().st_size for path in folders.inputs)
    rows = []
    for method in options.methods:
        progress(f"{method}: {options.repeats} turns")
        line = ours(options.ours, folders, method)
        lines = {"isthmus": line, "isthmus --no-digests": [*line, "--no-digests"]}
        lines["start"] = ours(options.ours, tiny, method)
        if options.peers:
            lines["mergekit"] = mergekit(options.peers, folders, method)
        kept: dict[str, list[Process]] = {name: [] for name in lines}
        calls: dict[str, Callable[[], object]] = {"copy": partial(copy_once, folders)}
        for name, command in lines.items():
            out = folders.work / ("mergekit" if name == "mergekit" else "ours")
            calls[name] = partial(_keep, kept[name], command, out, folders.work)
        copy_s = medians(take_turns(calls, options.repeats))["copy"]
        rows += _rows(method, {name: found[1:] for name, found in kept.items()}, copy_s)
        progress(f"copy: {copy_s:.3f} s, {moved_bytes / copy_s / 1e9:.2f} GB/s")
    _show(f"{len(folders.models)} models of {model_bytes / 1e6:.1f} MB", rows)
    return {"rows": rows, "moved_bytes": moved_bytes, "float64_error": error}


def _keep(kept: list[Process], command: Sequence[str], out: Path, work: Path) -> None:
    kept.append(merge_once(command, out, work))


def _rows(method: str, processes: dict[str, list[Process]], copy_s: float) -> list[dict[str, Any]]:
    """A row a contender: medians of the turns after the first, which warms up, and ratios of them."""
    seconds = {name: statistics.median(p.seconds for p in found) for name, found in processes.items()}
    peak_mb = {name: max(p.peak_bytes for p in found) / 1e6 for name, found in processes.items()}
    return [
        {
            "method": method,
            "contender": name,
            "s": seconds[name],
            "processor s": statistics.median(p.cpu_seconds for p in found),
            "peak MB": peak_mb[name],
            "mergekit / it": ratio(seconds.get("mergekit"), seconds[name]),
            "mergekit / it, memory": ratio(peak_mb.get("mergekit"), peak_mb[name]),
            "copy s": copy_s,
            "copy / it": copy_s / seconds[name],
            "copy / (it - start)": _beyond_start(copy_s, seconds, name),
        }
        for name, found in processes.items()
    ]


def _beyond_start(copy_s: float, seconds: dict[str, float], name: str) -> float | None:
    """The share without what any merge takes; None where that is not ours or the models are too small."""
    rest_s = seconds[name] - seconds["start"]
    return copy_s / rest_s if name.startswith("isthmus") and rest_s > 0 else None


def _show(title: str, rows: Sequence[dict[str, Any]]) -> None:
    show(title, list(rows[0]), [list(row.values()) for row in rows])


def large(options: argparse.Namespace, folders: Folders) -> dict[str, Any]:
    """One merge of each method; the peak memory is what counts."""
    model_bytes = sum(path.stat().st_size for path in weight_files(folders.base))
    shard_bytes = max(path.stat().st_size for path in weight_files(folders.base))
    rows = []
    for method in options.methods:
        progress(f"{method}: one merge")
        took = merge_once(ours(options.ours, folders, method), folders.work / "ours", folders.work)
        rows.append(
            {
                "method": method,
                "seconds": took.seconds,
                "peak_mb": took.peak_bytes / 1e6,
                "peak / model": took.peak_bytes / model_bytes,
                "peak / shard": took.peak_bytes / shard_bytes,
            }
        )
    sizes = f"{model_bytes / 1e9:.2f} GB, shards of {shard_bytes / 1e6:.0f} MB"
    _show(f"{len(folders.models)} models of {sizes}", rows)
    return {"rows": rows, "model_bytes": model_bytes, "shard_bytes": shard_bytes}


def make_folders(options: argparse.Namespace, work: Path) -> Folders:
    """The base and the models of this size."""
    if options.large:
        layers = max(1, round(options.large_gb * 1e9 / 4 / (12 * 1024**2)))
        base = make_bert(work / "base", layers=layers, hidden=1024, vocabulary=1024, shard_bytes=512 << 20)
    elif options.size == "full":
        base = make_base(resolve_base("embedded"), work / "base")
    else:
        base = make_bert(work / "base", layers=2, hidden=32)
    count = options.models or (2 if options.large else 8 if options.size == "full" else 3)
    models = []
    for number in range(count):
        progress(f"making model {number + 1} of {count}")
        models.append(make_copy(base, work / f"model-{number}", number))
    return Folders(base, models, work)


def _load(folder: Path) -> dict[str, Any]:
    return {name: tensor for path in weight_files(folder) for name, tensor in load_file(path).items()}


def run(options: argparse.Namespace) -> dict[str, Any]:
    """Make the folders, measure, return the record."""
    with tempfile.TemporaryDirectory(dir=options.work) as name:
        folders = make_folders(options, Path(name))
        found = large(options, folders) if options.large else compare(options, folders)
    words = {key: str(v) if isinstance(v, Path) else v for key, v in vars(options).items()}
    return {"benchmark": "merge_command", "machine": machine(numpy=np.__version__), "options": words, **found}


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--size", choices=["small", "full"], default="small")
    parser.add_argument("--models", type=int, help="how many are merged")
    parser.add_argument("--methods", type=lambda text: text.split(","), default=list(METHODS))
    parser.add_argument("--repeats", type=int, help="turns after the first, which warms up")
    parser.add_argument("--peers", type=Path, help="the python of an environment with mergekit")
    parser.add_argument(
        "--ours", type=shlex.split, default=our_command(), help="our command, up to its flags"
    )
    parser.add_argument("--large", action="store_true", help="peak memory of a large model in shards")
    parser.add_argument("--large-gb", type=float, default=3.0)
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
