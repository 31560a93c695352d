"""From ranks of single users to a table: normalised averages, their spread over seeds, a paired bootstrap.

100 is what each domain's own fine-tuned model reaches on all of its users' data. An average is over domains
of that ratio, as in MergeRec (table 2). Two rows are compared on the same users: users are drawn with
replacement within each seed and domain, the same ones for both rows and for the model that is 100, and the
interval holds the middle 95% of the differences.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from common.metrics import ndcg_gains
from server.results import FINE_TUNED
from simulations.study.lab import Ranks

Doubles = npt.NDArray[np.float64]
Rows = Mapping[str, Mapping[str, Ranks]]  # row -> column (a domain, or a slice of users) -> [U]
Gains = Mapping[str, Mapping[str, Doubles]]  # row -> column -> what each user adds
DRAWS, DRAWS_AT_ONCE = 2000, 100
SLICES = 3


@dataclass(frozen=True)
class Row:
    """One row over all seeds. `columns`: NDCG@k normalised, a mean over seeds.

    `ndcg` and `recall` are the averages over columns, `seeds` that of NDCG in each seed. `above` is how far
    NDCG is above the row `other`, `low` and `high` the borders of its 95% interval. `seconds` is the mean of
    its merges, as they were timed when they were made.
    """

    columns: dict[str, float]
    ndcg: float
    recall: float
    seeds: list[float]
    other: str = ""
    above: float | None = None
    low: float | None = None
    high: float | None = None
    seconds: float | None = None


def score(seeds: Sequence[Rows], k: int, compared_with: Callable[[str], str]) -> dict[str, Row]:
    """Every row of `seeds` (one `Rows` a seed), compared with the row `compared_with(row)` if there is one.

    Columns in which the fine-tuned model finds nothing count nowhere.
    """
    gained = [_each(seed, lambda rank_U: ndcg_gains(torch.from_numpy(rank_U), k).numpy()) for seed in seeds]
    hit = [_each(seed, lambda rank_U: (rank_U <= k).astype(np.float64)) for seed in seeds]
    drawn = [_draw(rows, number) for number, rows in enumerate(gained)]
    table: dict[str, Row] = {}
    for row in gained[0]:
        of_seed = [_normalised(rows, row) for rows in gained]
        averages = [float(np.mean(list(values.values()))) for values in of_seed]
        table[row] = Row(
            columns={
                column: float(np.mean([values[column] for values in of_seed]))
                for column in of_seed[0]
                if all(column in values for values in of_seed)
            },
            ndcg=float(np.mean(averages)),
            recall=float(np.mean([np.mean(list(_normalised(rows, row).values())) for rows in hit])),
            seeds=averages,
            **_difference(gained, drawn, row, compared_with(row)),
        )
    return table


def slices(
    seeds: Sequence[Rows], lengths: Sequence[Mapping[str, Ranks]], popularity: Sequence[Mapping[str, Ranks]]
) -> list[Rows]:
    """The same rows with thirds of the users in the place of domains, all domains together.

    lengths, popularity: for each seed and domain, of every test user the length of the history and how often
    the sought item occurs in training histories: [U]. Thirds are by the domain's own quantiles.
    """
    found: list[Rows] = []
    for rows, length, popular in zip(seeds, lengths, popularity, strict=True):
        part = {
            **_thirds(length, ("short history", "middle history", "long history")),
            **_thirds(popular, ("rare item", "middle item", "popular item")),
        }
        found.append(
            {
                row: {name: np.concatenate([cells[d][mask[d]] for d in cells]) for name, mask in part.items()}
                for row, cells in rows.items()
            }
        )
    return found


def markdown(table: Mapping[str, Row], k: int) -> str:
    """The table as Markdown."""
    columns = list(dict.fromkeys(column for row in table.values() for column in row.columns))
    head = ["", *columns, f"NDCG@{k} of 100", "seeds", f"Recall@{k} of 100", "difference (95%)", "merge, s"]
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    for name, row in table.items():
        cells = [_text(row.columns.get(column)) for column in columns]
        cells += [f"{row.ndcg:.1f}", f"{min(row.seeds):.1f} to {max(row.seeds):.1f}", f"{row.recall:.1f}"]
        above = (
            "" if row.above is None else f"{row.above:+.1f} ({row.low:+.1f} to {row.high:+.1f}), {row.other}"
        )
        seconds = "" if row.seconds is None else f"{row.seconds:.1f}"
        lines.append(f"| {' | '.join([name, *cells, above, seconds])} |")
    return "\n".join(lines) + "\n"


def as_json(table: Mapping[str, Row]) -> dict[str, Any]:
    """The table as JSON values."""
    return {name: asdict(row) for name, row in table.items()}


def _each(rows: Rows, function: Callable[[Ranks], Doubles]) -> Gains:
    return {
        row: {column: function(rank_U) for column, rank_U in cells.items()} for row, cells in rows.items()
    }


def _normalised(rows: Gains, row: str) -> dict[str, float]:
    own = {column: float(gain_U.mean()) for column, gain_U in rows[FINE_TUNED].items()}
    return {c: 100 * float(gain_U.mean()) / own[c] for c, gain_U in rows[row].items() if own[c] > 0}


def _draw(rows: Gains, seed: int) -> Gains:
    """The mean gain of each row and column in each of `DRAWS` draws of the column's users: [DRAWS]."""
    generator = np.random.default_rng(seed)
    drawn: dict[str, dict[str, Doubles]] = {row: {} for row in rows}
    for column, own_U in rows[FINE_TUNED].items():
        names = [row for row in rows if column in rows[row]]
        gain_UR = np.stack([rows[row][column] for row in names], 1)
        users = len(own_U)
        mean_NR = np.empty((DRAWS, len(names)))
        for start in range(0, DRAWS, DRAWS_AT_ONCE):
            times_NU = generator.multinomial(users, np.full(users, 1 / users), DRAWS_AT_ONCE)
            mean_NR[start : start + DRAWS_AT_ONCE] = times_NU @ gain_UR / users
        for number, row in enumerate(names):
            drawn[row][column] = mean_NR[:, number]
    return drawn


def _difference(seeds: Sequence[Gains], drawn: Sequence[Gains], row: str, other: str) -> dict[str, Any]:
    """How far `row` is above `other`, over the columns that both have, with the interval."""
    if row == other or other not in seeds[0]:
        return {}
    found, draws = [], []
    for rows, draw in zip(seeds, drawn, strict=True):
        here, there = _normalised(rows, row), _normalised(rows, other)
        columns = [column for column in here if column in there]
        if not columns:
            return {}
        found.append(np.mean([here[column] - there[column] for column in columns]))
        own = {column: np.maximum(draw[FINE_TUNED][column], 1e-12) for column in columns}
        draws.append(np.mean([100 * (draw[row][c] - draw[other][c]) / own[c] for c in columns], 0))
    low, high = np.quantile(np.mean(draws, 0), [0.025, 0.975])
    return {"other": other, "above": float(np.mean(found)), "low": float(low), "high": float(high)}


def _thirds(values: Mapping[str, Ranks], names: Sequence[str]) -> dict[str, dict[str, npt.NDArray[np.bool_]]]:
    parts: dict[str, dict[str, npt.NDArray[np.bool_]]] = {name: {} for name in names}
    for domain, value_U in values.items():
        borders = np.quantile(value_U, [1 / SLICES, 2 / SLICES])
        third_U = np.searchsorted(borders, value_U, side="left")  # equal values are in the same part
        for number, name in enumerate(names):
            parts[name][domain] = third_U == number
    return parts


def _text(value: float | None) -> str:
    return "" if value is None else f"{value:.1f}"
