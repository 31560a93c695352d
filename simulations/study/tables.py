"""What each table compares, as cells: a row's model, evaluated on the test users of one domain."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from common.config import MergeMethod
from common.errors import ConfigError
from server.results import FINE_TUNED, ZERO_SHOT
from simulations.config import SimulationConfig

SHARES = (0.01, 0.05, 0.1)


@dataclass(frozen=True)
class Member:
    """A domain's task vector, fine-tuned on a `share` of its users."""

    domain: str
    share: float = 1.0


@dataclass(frozen=True)
class Cell:
    """Row `row` of domain `domain`. Without members it is the base; with one and no method, that vector."""

    row: str
    domain: str
    members: tuple[Member, ...] = ()
    method: MergeMethod | None = None


def methods(config: SimulationConfig) -> list[Cell]:
    """Every `[[merge]]` of the configuration, all domains merged; beside zero-shot and fine-tuned."""
    names = _names(config)
    everyone = tuple(Member(name) for name in names)
    return _references(names) + [
        Cell(method.label, name, everyone, method) for method in config.merge for name in names
    ]


def unseen(config: SimulationConfig) -> list[Cell]:
    """Each domain under a merge of the others, which never saw it."""
    names = _names(config)
    return _references(names) + [
        Cell(method.label, name, tuple(Member(other) for other in names if other != name), method)
        for name in names
        for method in config.merge
    ]


def scarce(config: SimulationConfig) -> list[Cell]:
    """Each domain when it has a share of its users alone: its own model, and its merge with the others."""
    names = _names(config)
    cells = _references(names)
    for name in names:
        for share in SHARES:
            own = Member(name, share)
            merged = tuple(own if other == name else Member(other) for other in names)
            cells.append(Cell(f"{FINE_TUNED}, {share:.0%} of users", name, (own,)))
            cells += [
                Cell(f"{method.label}, {share:.0%} of users", name, merged, method) for method in config.merge
            ]
    return cells


def count(config: SimulationConfig) -> list[Cell]:
    """The first domain of the configuration under merges of the first 2, 3, ... domains."""
    names = _names(config)
    cells = _references(names[:1])
    for number in range(2, len(names) + 1):
        members = tuple(Member(name) for name in names[:number])
        cells += [
            Cell(f"{method.label}, {number} domains", names[0], members, method) for method in config.merge
        ]
    return cells


def compared_with(table: str, row: str) -> str:
    """The row that `row` of a table is compared with; none ("") where columns share users."""
    if table == "slices":
        return ""
    if table == "scarce" and ", " in row:
        return f"{FINE_TUNED}, {row.partition(', ')[2]}"
    return ZERO_SHOT if table in ("unseen", "count", "scarce") else "weight-averaging"


TABLES: Mapping[str, Callable[[SimulationConfig], Sequence[Cell]]] = {
    "methods": methods,
    "slices": methods,  # the same models, by history length and by popularity of the item
    "unseen": unseen,
    "scarce": scarce,
    "count": count,
}


def _names(config: SimulationConfig) -> list[str]:
    names = [source.name for source in config.domain]
    if not config.merge:
        raise ConfigError("no [[merge]] to study", next_step="name at least one method")
    return names


def _references(names: Sequence[str]) -> list[Cell]:
    return [Cell(ZERO_SHOT, name) for name in names] + [
        Cell(FINE_TUNED, name, (Member(name),)) for name in names
    ]
