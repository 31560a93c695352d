"""`isthmus data check`: everything an owner wants to know before preparing a source; writes nothing.

All problems are counted with their first places, instead of stopping at the first; what would be dropped
and why comes from the same code that `prepare` runs. No id and no row content is in the report.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np

from clients.data.assemble import Settings, Stage, assemble, public_columns, text_columns
from clients.data.readers import ReadOptions, read
from clients.data.records import KINDS, Interactions, Issues, Records
from clients.data.split import time_order
from common.errors import DataError

_QUANTILES = {"min": 0.0, "p25": 0.25, "median": 0.5, "p75": 0.75, "p90": 0.9, "max": 1.0}


@dataclass(frozen=True)
class Problem:
    """One kind of problem: how often, where first, and whether `prepare` would refuse because of it."""

    kind: str
    count: int
    places: tuple[str, ...]
    fatal: bool
    next_step: str


@dataclass(frozen=True)
class Report:
    """What is in a source. `text_coverage` and `sparsity` are shares from 0 to 1."""

    format: str
    presplit: bool
    users: int
    items: int
    interactions: int
    sparsity: float
    items_unused: int
    item_rows_repeated: int
    text_coverage: dict[str, float]
    public: tuple[str, ...]
    items_with_equal_text: int
    duplicates_exact: int
    repeated_pairs: int
    repeated_in_a_row: int
    first_time: str
    last_time: str
    file_in_time_order: bool
    ties_in_time: int
    history_length: dict[str, float]
    problems: tuple[Problem, ...]
    notes: tuple[str, ...]
    stages: tuple[Stage, ...]
    refusal: str

    @property
    def ready(self) -> bool:
        """Whether `prepare` with the same settings would succeed."""
        return not self.refusal and not any(problem.fatal for problem in self.problems)

    def to_json(self) -> dict[str, Any]:
        """The report as JSON values, with `ready`."""
        return {**asdict(self), "ready": self.ready}


def check(
    path: Path,
    settings: Settings | None = None,
    *,
    format_name: str | None = None,
    options: ReadOptions | None = None,
    drop: Iterable[str] = (),
) -> Report:
    """Read `path` and report. Raises DataError only where reading cannot go on (a cut file, no columns)."""
    settings, options = settings or Settings(), options or ReadOptions()
    tolerated = Issues(drop).tolerated
    issues = Issues(KINDS)
    records = read(path, issues, options, format_name)
    refusal, stages = "", tuple[Stage, ...]()
    public = tuple[str, ...]()
    try:
        public = public_columns(records, settings.public)
        stages = assemble("check", records, settings, issues).stages
    except DataError as err:
        refusal = str(err)
    problems = tuple(
        Problem(kind, issues.counts[kind], tuple(issues.places[kind]), kind not in tolerated, KINDS[kind])
        for kind in KINDS
        if kind in issues.counts
    )
    if records.unsplit_users:
        issues.note(f"{len(records.unsplit_users)} users lack a validation or test item and are left out")
    table = records.interactions
    return Report(
        format=records.format,
        presplit=records.presplit,
        users=len(table.user_ids),
        items=len(table.item_ids),
        interactions=len(table),
        sparsity=1 - len(table) / (len(table.user_ids) * len(table.item_ids)),
        items_unused=records.items.unused,
        item_rows_repeated=records.items.repeated,
        text_coverage=_coverage(records),
        public=public,
        items_with_equal_text=_equal_texts(records, public),
        **_behaviour(table, numbered=records.presplit),
        problems=problems,
        notes=tuple(issues.notes),
        stages=stages,
        refusal=refusal,
    )


def _coverage(records: Records) -> dict[str, float]:
    rows = [records.items.rows.get(item, {}) for item in records.interactions.item_ids]
    return {name: sum(name in row for row in rows) / len(rows) for name in text_columns(records)}


def _equal_texts(records: Records, public: tuple[str, ...]) -> int:
    """Items whose public text another item has too: a text model cannot tell them apart."""
    rows = [records.items.rows.get(item, {}) for item in records.interactions.item_ids]
    texts = [tuple(row.get(name, "") for name in public) for row in rows]
    texts = [text for text in texts if any(text)]
    return len(texts) - len(set(texts))


def _behaviour(table: Interactions, *, numbered: bool) -> dict[str, Any]:
    """Duplicates, time order and history lengths; `numbered`: times are positions, not moments."""
    order = time_order(table.user_N, table.time_N)
    user_N, item_N, time_N = table.user_N[order], table.item_N[order], table.time_N[order]
    same_user = np.diff(user_N) == 0
    by_pair = np.lexsort((time_N, item_N, user_N))
    same_pair = (np.diff(user_N[by_pair]) == 0) & (np.diff(item_N[by_pair]) == 0)
    lengths = np.bincount(user_N)
    lengths = lengths[lengths > 0]
    return {
        "duplicates_exact": int((same_pair & (np.diff(time_N[by_pair]) == 0)).sum()),
        "repeated_pairs": int(same_pair.sum()),
        "repeated_in_a_row": int((same_user & (np.diff(item_N) == 0)).sum()),
        "first_time": "" if numbered else _moment(float(table.time_N.min())),
        "last_time": "" if numbered else _moment(float(table.time_N.max())),
        "file_in_time_order": numbered or bool((np.diff(table.time_N) >= 0).all()),
        "ties_in_time": int((same_user & (np.diff(time_N) == 0)).sum()),
        "history_length": {name: float(np.quantile(lengths, q)) for name, q in _QUANTILES.items()},
    }


def _moment(value: float) -> str:
    """A date where the number looks like seconds, milli-, micro- or nanoseconds since 1990; else itself."""
    for scale in (1.0, 1e3, 1e6, 1e9):
        if 631_152_000 <= value / scale <= 4_102_444_800:
            return datetime.fromtimestamp(value / scale, tz=UTC).strftime("%Y-%m-%d %H:%M:%S UTC")
    return f"{value:g}"
