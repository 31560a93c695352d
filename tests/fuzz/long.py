"""The long run: every decoder in turn, in a process of its own that may use little memory and little time.

    PYTHONPATH=tests python -m fuzz --minutes 10
    PYTHONPATH=tests python -m fuzz --decoder catalog --seed 7 --index 1234      # one input again

Prints for each decoder: inputs tried, accepted (and then exactly what they say), refused by a named error,
and crashes: another error, a process that died, an input that took longer than `LIMIT_S`. Exit code 1 if
there was one.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import logging
import multiprocessing
import multiprocessing.sharedctypes
import os
import resource
import sys
import tempfile
import time
import traceback
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from random import Random
from typing import Any

from common.errors import IsthmusError
from fuzz.decoders import Decoder, made, names

LIMIT_S = 20.0
MAX_BYTES = 6 << 30
SHARED = Path("/dev/shm")  # noqa: S108 - files there need no disk; only where it exists


@dataclass
class Figures:
    """What came of one decoder's inputs."""

    decoder: str
    tried: int = 0
    accepted: int = 0
    refused: int = 0
    crashes: int = 0
    seconds: float = 0.0
    peak_mb: int = 0
    refusals: Counter[str] = field(default_factory=Counter)
    crashed: list[str] = field(default_factory=list)


def attempt(decoder: Decoder, name: str, seed: int, index: int) -> str:
    """Read input `index`; "" when it was accepted, else the class of the refusal. Raises what is a crash."""
    try:
        decoder.read(decoder.given(Random(f"{seed}:{name}:{index}")))  # noqa: S311 - choices, no secret
    except IsthmusError as err:
        return type(err).__name__
    return ""


def worker(name: str, seed: int, first: int, until_s: float, current: Any, pipe: Any) -> None:
    """Try inputs from `first` on; `current` says which one is under way, should this process die."""
    resource.setrlimit(resource.RLIMIT_AS, (MAX_BYTES, MAX_BYTES))
    logging.disable(logging.CRITICAL)
    sys.stderr = open(os.devnull, "w")  # noqa: SIM115 - for the life of this process
    figures = Figures(name)
    place = SHARED if SHARED.is_dir() else None
    with tempfile.TemporaryDirectory(dir=place) as folder:
        decoder = made(name, Path(folder))
        decoder.check()
        index = first
        while time.monotonic() < until_s:
            current[0], current[1] = index, time.monotonic()
            try:
                refusal = attempt(decoder, name, seed, index)
            except BaseException as err:  # noqa: BLE001 - that is what we look for
                figures.crashes += 1
                where = traceback.extract_tb(err.__traceback__)[-1]
                figures.crashed.append(
                    f"index {index}: {type(err).__name__} at {where.filename}:{where.lineno}"
                )
            else:
                figures.accepted += not refusal
                figures.refused += bool(refusal)
                if refusal:
                    figures.refusals[refusal] += 1
            figures.tried += 1
            index += 1
        decoder.close()
        figures.peak_mb = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024
        pipe.send(figures)
        pipe.close()
        with contextlib.suppress(OSError):
            pipe.recv_bytes()  # until the parent has read it


def run(name: str, seed: int, seconds: float) -> Figures:
    """All figures of `name`; a process that dies or hangs counts, and the next goes on behind that input."""
    context = multiprocessing.get_context("fork")
    started_s, first, total = time.monotonic(), 0, Figures(name)
    while (left_s := started_s + seconds - time.monotonic()) > 0.5:
        current = context.Array("d", [first, time.monotonic() + 60.0], lock=False)
        mine, theirs = context.Pipe()
        until_s = time.monotonic() + left_s
        process = context.Process(
            target=worker, args=(name, seed, first, until_s, current, theirs), daemon=True
        )
        process.start()
        theirs.close()
        figures, why = None, ""
        while figures is None and not why:
            try:
                if mine.poll(0.5):
                    figures = mine.recv()
                elif time.monotonic() - current[1] > LIMIT_S:
                    why = f"took more than {LIMIT_S:g} s"
            except EOFError:
                process.join()
                why = f"the process ended ({process.exitcode})"
        mine.close()
        process.kill()
        process.join()
        tried = int(current[0]) + 1 - first
        if figures is None:
            figures = Figures(name, tried=tried, crashes=1, crashed=[f"index {int(current[0])}: {why}"])
        first += max(tried, 1)
        total.tried += figures.tried
        total.accepted += figures.accepted
        total.refused += figures.refused
        total.crashes += figures.crashes
        total.peak_mb = max(total.peak_mb, figures.peak_mb)
        total.refusals += figures.refusals
        total.crashed += figures.crashed
        if len(total.crashed) > 200:
            break
    total.seconds = time.monotonic() - started_s
    return total


def main() -> int:
    """Run, print a table, return the exit code."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--minutes", type=float, default=10.0, help="for all decoders together")
    parser.add_argument("--decoder", action="append", choices=sorted(names()), help="only these")
    parser.add_argument("--seed", type=int, default=int(time.time()))
    parser.add_argument("--index", type=int, help="read one input again and show what happens")
    parser.add_argument("--out", type=Path, help="write the figures as JSON")
    options = parser.parse_args()
    chosen = options.decoder or list(names())
    if options.index is not None:
        with tempfile.TemporaryDirectory() as folder:
            decoder = made(chosen[0], Path(folder))
            print(decoder.given(Random(f"{options.seed}:{chosen[0]}:{options.index}"))[:2000])  # noqa: S311
            print(attempt(decoder, chosen[0], options.seed, options.index) or "accepted")
            decoder.close()
        return 0
    print(f"seed {options.seed}, {options.minutes:g} minutes, {len(chosen)} decoders")
    print(
        f"{'decoder':28} {'tried':>9} {'accepted':>9} {'refused':>9} {'crashes':>8} {'a second':>9} {'MB':>6}"
    )
    total = []
    for name in chosen:
        found = run(name, options.seed, 60 * options.minutes / len(chosen))
        total.append(found)
        rate = found.tried / max(found.seconds, 1e-9)
        counts = f"{found.tried:9} {found.accepted:9} {found.refused:9} {found.crashes:8}"
        print(f"{name:28} {counts} {rate:9.0f} {found.peak_mb:6}", flush=True)
        for place in found.crashed[:5]:
            print(f"    --decoder {name} --seed {options.seed} {place}", flush=True)
    sums = [
        sum(getattr(found, what) for found in total) for what in ("tried", "accepted", "refused", "crashes")
    ]
    print(f"{'all':28} {sums[0]:9} {sums[1]:9} {sums[2]:9} {sums[3]:8}")
    if options.out:
        options.out.write_text(json.dumps([vars(found) for found in total], indent=1) + "\n")
    return 1 if sums[3] else 0
