"""The tables on a small language model: a cocktail against its ablations, and Evo-Merging over pools.

    cocktail    no adapter, G, S, WA, entropy-guided (both rules), second round; by domain and protocol
    evolution   the methods of `server.evolution.compare`; by pool, on users that no adapter saw

Each cell is a JSON line of `out/cells/`, made once; the table is their mean over seeds, with the spread.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any, cast

import numpy as np

from clients.data.instructions import Protocol
from common.digests import json_digest
from common.errors import ConfigError, suggest
from common.files import write_atomic
from common.language.ablation import ablation
from common.language.adapters import Adapter
from common.language.cocktail import unlabelled
from common.progress import NO_REPORT, Report
from server.evolution.compare import compare
from server.evolution.tuning import Tuning, tune_lora
from server.language.plots import weights_page
from server.language.registry import AdapterInputs
from server.language.spirit import spirit
from simulations.language.config import LanguageConfig
from simulations.language.lab import TARGET, LanguageLab

PHASE = "study"
PROTOCOLS: tuple[Protocol, ...] = ("warm", "cold")


@dataclass(frozen=True)
class Cell:
    """One figure: `column` is a domain and protocol, or a pool."""

    seed: int
    column: str
    row: str
    metrics: dict[str, float]
    facts: dict[str, Any]


Make = Callable[[LanguageLab, str, Report], list[Cell]]  # a seed, the column's name


def run_language_study(
    table: str,
    config: LanguageConfig,
    base: Path,
    out: Path,
    seeds: Sequence[int],
    report: Report = NO_REPORT,
) -> Path:
    """Make a table in `out`; returns the Markdown's path. Raises ConfigError, and what training raises."""
    if table not in TABLES:
        raise ConfigError(f"unknown table {table!r}", next_step=suggest(table, TABLES))
    if not seeds:
        raise ConfigError("no seeds", next_step="name at least one")
    cells: list[Cell] = []
    labs = [
        LanguageLab(
            config.model_copy(update={"run": config.run.model_copy(update={"seed": seed})}), base, out, report
        )
        for seed in seeds
    ]
    columns = [(lab, name, make) for lab in labs for name, make in TABLES[table](lab)]
    for number, (lab, name, make) in enumerate(columns):
        report(phase=PHASE, step=number, total=len(columns))
        settings = config.model_dump(
            mode="json", exclude={"pretraining": True, "merge": True, "publish": True, "policy": True}
        )
        key = json_digest(
            {"base": lab.digest, "settings": settings, "column": name, "seed": lab.config.run.seed}
        )
        cells += _kept(
            out / "cells" / table / f"{name.replace(' ', '-')}-{key[:16]}.json",
            partial(make, lab, name, report),
        )
    report(phase=PHASE, step=len(columns), total=len(columns))
    path = out / f"{table}.md"
    write_atomic(
        out / f"{table}.json", (json.dumps([asdict(cell) for cell in cells], indent=1) + "\n").encode()
    )
    write_atomic(path, f"{markdown(cells)}\n{gains(cells)}".encode())
    return path


def cocktail(lab: LanguageLab) -> Iterator[tuple[str, Make]]:
    """A column for each domain and protocol."""
    for name in lab.names:
        for protocol in PROTOCOLS:
            yield f"{name} {protocol}", _cocktail_column(name, protocol)


def evolution(lab: LanguageLab) -> Iterator[tuple[str, Make]]:
    """A column for each pool: related adapters, these and distractors, and a growing pool of all domains."""
    tables, names = lab.config.tables, lab.names
    related = _members(names[:-1], tables.related, tables.parts)
    yield f"{tables.related} related", _evolution_column(related)
    if tables.distractors:
        noise = _members(names[-1:], tables.distractors, tables.parts)
        yield f"{tables.related} + {tables.distractors}", _evolution_column([*related, *noise])
    for size in tables.pools:
        yield f"{size} of all", _evolution_column(_members(names, size, tables.parts))


TABLES: dict[str, Callable[[LanguageLab], Iterator[tuple[str, Make]]]] = {
    "cocktail": cocktail,
    "evolution": evolution,
}


def markdown(cells: Sequence[Cell]) -> str:
    """NDCG@1 / NDCG@3 x 100: the mean over seeds, and from which to which NDCG@1 went."""
    columns = list(dict.fromkeys(cell.column for cell in cells))
    lines = ["| | " + " | ".join(columns) + " |", "|" + "---|" * (len(columns) + 1)]
    for row in dict.fromkeys(cell.row for cell in cells):
        shown = []
        for column in columns:
            own = [cell.metrics for cell in cells if (cell.row, cell.column) == (row, column)]
            shown.append(_spread(own) if own else "")
        lines.append(f"| {row} | " + " | ".join(shown) + " |")
    return "\n".join(lines) + "\n"


def gains(cells: Sequence[Cell]) -> str:
    """NDCG@1 x 100 over the first row's, paired by column and seed: mean and standard error of the pairs.

    Columns whose names end in the same word, such as `warm`, are taken together.
    """
    value = {(cell.row, cell.column, cell.seed): 100 * cell.metrics["ndcg@1"] for cell in cells}
    first, *rows = dict.fromkeys(cell.row for cell in cells)
    groups = list(dict.fromkeys(map(_group, cells)))
    lines = [f"| over {first} | " + " | ".join(groups) + " |", "|" + "---|" * (len(groups) + 1)]
    for row in rows:
        shown = []
        for group in groups:
            own = [
                value[row, cell.column, cell.seed] - value[first, cell.column, cell.seed]
                for cell in cells
                if cell.row == row and _group(cell) == group
            ]
            error = f" +- {np.std(own, ddof=1) / len(own) ** 0.5:.1f}" if len(own) > 1 else ""
            shown.append(f"{np.mean(own):+.1f}{error} ({len(own)})" if own else "")
        lines.append(f"| {row} | " + " | ".join(shown) + " |")
    return "\n".join(lines) + "\n"


def _group(cell: Cell) -> str:
    last = cell.column.rsplit(" ", 1)[-1]
    return last if last in PROTOCOLS else cell.column


def _spread(metrics: Sequence[dict[str, float]]) -> str:
    first, third = ([100 * each[name] for each in metrics] for name in ("ndcg@1", "ndcg@3"))
    spread = f" ({min(first):.1f} to {max(first):.1f})" if len(first) > 1 else ""
    return f"{np.mean(first):.1f} / {np.mean(third):.1f}{spread}"


def _cocktail_column(name: str, protocol: Protocol) -> Make:
    def make(lab: LanguageLab, column: str, report: Report) -> list[Cell]:
        tables, domain = lab.config.tables, lab.domain(name)
        work = lab.folder / "cocktails" / f"{name}-{protocol}"
        adapters = {other: lab.adapter(lab.domain(other)) for other in lab.names}
        catalogs = {other: lab.domain(other).catalog() for other in lab.names}
        inputs = AdapterInputs(lab.base, lab.lora, adapters, catalogs, lab.run, work, report)
        general = spirit(inputs, tables.spirit, without=name).adapter
        tested = lab.tested(name, protocol)
        rules = {
            f"cocktail {rule}": tables.cocktail.model_copy(update={"rule": rule, "seed": lab.config.run.seed})
            for rule in tables.rules
        }

        def second(start: Adapter) -> Adapter:
            if name not in lab.second_rounds:  # the same for both protocols
                samples = lab.samples(domain, "train", tables.second_round_samples)
                tuning = Tuning(epochs=1, seed=lab.config.run.seed)
                lab.second_rounds[name] = tune_lora(lab.lm, lab.lora, start, samples, tuning, report)[0]
            return lab.second_rounds[name]

        measure = lab.measure(tested)
        lab.lm.detach()
        found = [
            Cell(lab.config.run.seed, column, "no adapter", dict(measure(lab.lm)), {"users": len(tested)})
        ]
        rows = ablation(
            lab.lm, lab.digest, lab.lora, general, adapters[name], lab.template, unlabelled(tested), measure,
            work, cocktails=rules, tune=second, most_tokens=lab.instruction.max_prompt_tokens, report=report,
        )  # fmt: skip
        paths = {row.name: row.trajectory_path for row in rows if row.trajectory_path is not None}
        write_atomic(work / "weights.html", weights_page(paths, f"{name}, {protocol}").encode())
        return found + [
            Cell(lab.config.run.seed, column, row.name, row.metrics, {"weights": row.weights}) for row in rows
        ]

    return make


def _evolution_column(members: Sequence[tuple[str, int]]) -> Make:
    def make(lab: LanguageLab, column: str, report: Report) -> list[Cell]:
        tables, target = lab.config.tables, lab.part(lab.names[0], TARGET)
        adapters = {f"{name}-{part}": lab.adapter(lab.part(name, part)) for name, part in members}
        samples = lab.samples(target, "valid", tables.samples, lab.instruction.objective)
        tested = lab.rankings(target, "test", tables.test_users)
        work = lab.folder / "evolved" / json_digest({"members": list(members)})[:16]
        rows = compare(
            lab.base, lab.lora, adapters, samples, work, methods=tables.methods, options=tables.evolution,
            measure=lab.measure(tested),
            measure_key=json_digest({"users": len(tested), "test": tables.test_users}),
            seed=lab.config.run.seed, batch_size=lab.config.evaluation.batch_size, report=report,
        )  # fmt: skip
        return [
            Cell(
                lab.config.run.seed, column, row.method, row.measures,
                {
                    "loss": row.loss, "evaluations": row.evaluations, "seconds": row.seconds,
                    "users": len(tested),
                },
            )
            for row in rows
        ]  # fmt: skip

    return make


def _members(names: Sequence[str], count: int, parts: int) -> list[tuple[str, int]]:
    """`count` adapters of `names`, in turn; the last part of each domain is nobody's. Raises ConfigError."""
    most = len(names) * (parts - 1)
    if count > most:
        raise ConfigError(f"{count} adapters of {most} parts of users", next_step="raise tables.parts")
    return [(names[number % len(names)], number // len(names)) for number in range(count)]


def _kept(path: Path, make: Callable[[], list[Cell]]) -> list[Cell]:
    if not path.is_file():
        write_atomic(path, (json.dumps([asdict(cell) for cell in make()], indent=1) + "\n").encode())
    return [
        Cell(**record) for record in cast(list[dict[str, Any]], json.loads(path.read_text(encoding="utf-8")))
    ]
