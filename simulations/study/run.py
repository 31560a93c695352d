"""Make one table of a study over several seeds: `out/TABLE.md` and `out/TABLE.json`."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from clients.training.evaluate import Split
from common.errors import ConfigError, suggest
from common.files import write_atomic
from common.progress import NO_REPORT, Report, StatusFile
from server.language.plots import weights_page
from server.merge import check_method
from simulations.config import SimulationConfig
from simulations.live import Progress
from simulations.study.lab import Lab, Ranks
from simulations.study.score import Rows, as_json, markdown, score, slices
from simulations.study.tables import TABLES, compared_with, narrowed

PHASE = "study"
WEIGHTS = "weights"


def run_study(
    table: str,
    config: SimulationConfig,
    out: Path,
    seeds: Sequence[int],
    report: Report = NO_REPORT,
    *,
    merges: Sequence[str] = (),
    domains: Sequence[str] = (),
    split: Split = "test",
) -> Path:
    """Make the table in the folder `out`, which keeps all that it is made of; returns the Markdown's path.

    A table of validation users, to choose by, has a name of its own (`methods-valid`). With the table
    `methods` comes `out/weights/MERGE.html` for every merge that learned or tried weights.

    merges, domains: rows by the labels of `[[merge]]`, and what the table is about; empty is all. Progress
    is told as one cell after another, in phase `PHASE`. Raises ConfigError, and what fine-tuning, merging
    and evaluation raise.
    """
    if table not in TABLES:
        raise ConfigError(f"unknown table {table!r}", next_step=suggest(table, TABLES))
    if not seeds:
        raise ConfigError("no seeds", next_step="name at least one")
    config, about = narrowed(config, merges, domains)
    for method in config.merge:
        check_method(method)
    started_s = time.monotonic()
    cells = TABLES[table](config, about)
    found: list[Rows] = []
    labs = []
    for seed in seeds:
        seeded = config.model_copy(update={"run": config.run.model_copy(update={"seed": seed})})
        lab = Lab(seeded, out, report, split)
        rows: dict[str, dict[str, Ranks]] = {}
        for number, cell in enumerate(cells):
            report(phase=PHASE, step=len(found) * len(cells) + number, total=len(seeds) * len(cells))
            rows.setdefault(cell.row, {})[cell.domain] = lab.ranks(cell)
        found.append(rows)
        labs.append(lab)
    report(phase=PHASE, step=len(seeds) * len(cells), total=len(seeds) * len(cells))
    if table == "slices":
        lengths, popularity = (
            [{name: lab.history_lengths(name) for name in about} for lab in labs],
            [_popularity(lab, about) for lab in labs],
        )
        found = slices(found, lengths, popularity)
    k = config.evaluation.k
    scored = {
        row: replace(scored, seconds=_seconds(labs, row))
        for row, scored in score(found, k, lambda row: compared_with(table, row)).items()
    }
    if table == "methods":
        _draw_weights(labs, seeds, out / WEIGHTS)
    record = {
        "schema": 1,
        "table": table,
        "split": split,
        "seeds": list(seeds),
        "domains": about,
        "config": config.model_dump(mode="json"),
        "seconds": round(time.monotonic() - started_s, 1),
        "rows": as_json(scored),
    }
    stem = table if split == "test" else f"{table}-{split}"
    write_atomic(out / f"{stem}.json", (json.dumps(record, indent=1) + "\n").encode())
    path = out / f"{stem}.md"
    write_atomic(path, markdown(scored, k).encode())
    return path


def _seconds(labs: Sequence[Lab], row: str) -> float | None:
    """The mean time of the row's merges."""
    times = [result.seconds for lab in labs for result in lab.merged.get(row, [])]
    return float(np.mean(times)) if times else None


def _draw_weights(labs: Sequence[Lab], seeds: Sequence[int], folder: Path) -> None:
    """A page of each merge with a trajectory: the weight of every domain by step, one line a seed."""
    paths: dict[str, dict[str, Path]] = {}
    for lab, seed in zip(labs, seeds, strict=True):
        for row, results in lab.merged.items():
            if (path := results[0].trajectory_path) is not None:
                paths.setdefault(row, {})[f"seed {seed}"] = path
    for row, of_seed in paths.items():
        write_atomic(folder / f"{row}.html", weights_page(of_seed, row).encode())


@contextmanager
def shown(out: Path, main: str = PHASE) -> Iterator[Report]:
    """A `Report` that draws two rows: phase `main`, and the work on the present part of it."""
    cells, work = StatusFile(out / "status.json"), StatusFile(out / "work.json")
    progress = Progress({main: out / "status.json", "now": out / "work.json"})

    def report(*, phase: str, **facts: Any) -> None:
        (cells if phase == main else work)(phase=phase, **facts)
        progress()

    with progress.shown():
        yield report


def _popularity(lab: Lab, names: Sequence[str]) -> dict[str, Ranks]:
    """How often the item that every user who is tested looks for is in the training histories."""
    found = {}
    for name in names:
        domain = lab.domain(name)
        counts_I = np.bincount(np.concatenate(domain.train), minlength=len(domain.item_ids))
        found[name] = counts_I[lab.sought(name)[lab.tested(name)]].astype(np.int64)
    return found
