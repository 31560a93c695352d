"""What the benchmarks share: medians of turns, whole processes, a line through points, tables, the record.

Contenders of one comparison take turns (`medians`), so that a machine that slows down for a while slows all
of them. The median counts; the fastest and slowest are kept in the record.
"""

from __future__ import annotations

import json
import os
import platform
import shlex
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
ONE_THREAD = {f"{name}_NUM_THREADS": "1" for name in ("OMP", "MKL", "OPENBLAS", "NUMEXPR", "RAYON")}

Seconds = dict[str, list[float]]


@dataclass(frozen=True)
class Process:
    """What one whole process took."""

    seconds: float
    cpu_seconds: float
    peak_bytes: int


def progress(text: str) -> None:
    """A line for whoever watches; results alone go to standard output."""
    print(f"[{time.strftime('%H:%M:%S')}] {text}", file=sys.stderr, flush=True)


def nothing() -> None:
    """Wait for nothing: the CPU has done its work when the call returns."""


def take_turns(
    contenders: Mapping[str, Callable[[], object]],
    repeats: int,
    *,
    warm_ups: int = 1,
    wait: Callable[[], None] = nothing,
    clock: Callable[[], float] = time.perf_counter,
) -> Seconds:
    """Seconds of `repeats` calls of each contender, in turns; `wait` ends work that a call only began.

    `clock` is the wall's; `time.process_time` counts the processor's own time, whoever else uses it.
    """
    return take_turns_by([clock], contenders, repeats, warm_ups=warm_ups, wait=wait)[0]


def take_turns_by(
    clocks: Sequence[Callable[[], float]],
    contenders: Mapping[str, Callable[[], object]],
    repeats: int,
    *,
    warm_ups: int = 1,
    wait: Callable[[], None] = nothing,
    ready: Callable[[], object] = nothing,
) -> list[Seconds]:
    """As `take_turns`, the same calls by each of the clocks; `ready` comes before each and is not timed."""
    seconds: list[Seconds] = [{name: [] for name in contenders} for _ in clocks]
    for turn in range(-warm_ups, repeats):
        for name, call in contenders.items():
            ready()
            wait()
            started_s = [clock() for clock in clocks]
            call()
            wait()
            stopped_s = [clock() for clock in clocks]
            if turn >= 0:
                for found, start_s, stop_s in zip(seconds, started_s, stopped_s, strict=True):
                    found[name].append(stop_s - start_s)
    return seconds


def launch(command: Sequence[str], log: Path, *, pinned: bool = True) -> Process:
    """Run the command with one thread, on one processor. Raises SystemExit with its output where it fails.

    `pinned=False` leaves the choice of processor to the system: for machines on which others work too.
    """
    launcher = [sys.executable, "-I", "-S", str(ROOT / "benchmarks" / "launch.py")]
    cpu = str(max(os.sched_getaffinity(0))) if pinned else "any"
    line = [*launcher, str(log), cpu, *command]
    environment = {**os.environ, **ONE_THREAD, "HF_HUB_OFFLINE": "1", "PYTHONPATH": str(ROOT)}
    environment.pop("PYTHONDONTWRITEBYTECODE", None)  # an installed command is not compiled at every start
    found = json.loads(subprocess.run(line, check=True, env=environment, stdout=subprocess.PIPE).stdout)
    if found["code"] != 0:
        tail = log.read_text(errors="replace")[-3000:]
        raise SystemExit(f"{shlex.join(command)}\nended with {found['code']}:\n{tail}")
    return Process(found["seconds"], found["cpu_seconds"], found["peak_bytes"])


def medians(seconds: Seconds) -> dict[str, float]:
    """The median of each contender."""
    return {name: statistics.median(values) for name, values in seconds.items()}


def line(x: Sequence[float], y: Sequence[float]) -> tuple[float, float]:
    """Slope and intercept of the least-squares line through the points (at least two different x)."""
    slope, intercept = statistics.linear_regression(x, y)
    return slope, intercept


def machine(**more: Any) -> dict[str, Any]:
    """The machine in words, for the record."""
    model = platform.machine()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        lines = cpuinfo.read_text(encoding="ascii", errors="replace").splitlines()
        model = next(
            (text.split(":", 1)[1].strip() for text in lines if text.startswith("model name")), model
        )
    facts = {"cpu": model, "cpus": os.cpu_count(), "load_1min": round(os.getloadavg()[0], 1)}
    return {**facts, "python": platform.python_version(), **more}


def show(title: str, headers: Sequence[str], rows: Sequence[Sequence[object]]) -> None:
    """Print a Markdown table; floats to three significant digits, None as a dash."""
    print(f"\n## {title}\n")
    print("| " + " | ".join(headers) + " |")
    print("|" + "---|" * len(headers))
    for row in rows:
        print("| " + " | ".join(_cell(value) for value in row) + " |")
    sys.stdout.flush()


def write_record(path: Path | None, record: Mapping[str, Any]) -> None:
    """Write the whole result as JSON to `path`; nothing where it is None."""
    if path is None:
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(record, indent=1, sort_keys=True) + "\n", encoding="utf-8")
    progress(f"wrote {path}")


def ratio(of: float | None, baseline: float | None) -> float | None:
    """`of / baseline`, or None where one of them was not measured."""
    return None if of is None or baseline is None else of / baseline


def _cell(value: object) -> str:
    if value is None:
        return "-"
    if isinstance(value, float):
        return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}"
    return str(value)
