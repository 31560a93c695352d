"""What each table compares, as cells: a row's model, evaluated on the test users of one domain.

A table is about some of the configuration's domains (`about`); the others take part in its merges.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from common.config import MergeMethod
from common.errors import ConfigError, suggest
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


def methods(config: SimulationConfig, about: Sequence[str]) -> list[Cell]:
    """Every `[[merge]]` of the configuration, all domains merged; beside zero-shot and fine-tuned."""
    everyone = tuple(map(Member, _names(config)))
    return _references(about) + [
        Cell(method.label, name, everyone, method) for method in config.merge for name in about
    ]


def unseen(config: SimulationConfig, about: Sequence[str]) -> list[Cell]:
    """Each domain under a merge of the others, which never saw it."""
    names = _names(config)
    return _references(about) + [
        Cell(method.label, name, tuple(Member(other) for other in names if other != name), method)
        for name in about
        for method in config.merge
    ]


def scarce(config: SimulationConfig, about: Sequence[str]) -> list[Cell]:
    """Each domain when it has a share of its users alone: its own model, and its merge with the others."""
    names = _names(config)
    cells = _references(about)
    for name in about:
        for share in SHARES:
            own = Member(name, share)
            merged = tuple(own if other == name else Member(other) for other in names)
            cells.append(Cell(f"{FINE_TUNED}, {share:.0%} of users", name, (own,)))
            cells += [
                Cell(f"{method.label}, {share:.0%} of users", name, merged, method) for method in config.merge
            ]
    return cells


def count(config: SimulationConfig, about: Sequence[str]) -> list[Cell]:
    """Each domain under merges of it and the next 1, 2, ... domains of the configuration, round about."""
    names = _names(config)
    cells = _references(about)
    for number in range(2, len(names) + 1):
        for name in about:
            first = names.index(name)
            merged = {names[(first + place) % len(names)] for place in range(number)}
            members = tuple(Member(other) for other in names if other in merged)
            cells += [Cell(f"{m.label}, {number} domains", name, members, m) for m in config.merge]
    return cells


def compared_with(table: str, row: str) -> str:
    """The row that `row` of a table is compared with; none ("") where columns share users."""
    if table == "slices":
        return ""
    if table == "scarce" and ", " in row:
        return f"{FINE_TUNED}, {row.partition(', ')[2]}"
    return ZERO_SHOT if table in ("unseen", "count", "scarce") else "weight-averaging"


TABLES: Mapping[str, Callable[[SimulationConfig, Sequence[str]], Sequence[Cell]]] = {
    "methods": methods,
    "slices": methods,  # the same models, by history length and by popularity of the item
    "unseen": unseen,
    "scarce": scarce,
    "count": count,
}


def narrowed(
    config: SimulationConfig, merges: Sequence[str], domains: Sequence[str]
) -> tuple[SimulationConfig, list[str]]:
    """The configuration with the `[[merge]]` labels that are named, and the domains a table is about.

    None named means all. Raises ConfigError with the nearest known name.
    """
    labels, names = [method.label for method in config.merge], _names(config)
    for what, chosen, known in (("merge", merges, labels), ("domain", domains, names)):
        for name in chosen:
            if name not in known:
                raise ConfigError(f"no {what} {name!r} in the configuration", next_step=suggest(name, known))
    kept = tuple(method for method in config.merge if not merges or method.label in merges)
    narrow = config.model_copy(update={"merge": kept, "publish": kept[0].label})  # a study publishes nothing
    return narrow, [name for name in names if not domains or name in domains]


def _names(config: SimulationConfig) -> list[str]:
    if not config.merge:
        raise ConfigError("no [[merge]] to study", next_step="name at least one method")
    return [source.name for source in config.domain]


def _references(names: Sequence[str]) -> list[Cell]:
    return [Cell(ZERO_SHOT, name) for name in names] + [
        Cell(FINE_TUNED, name, (Member(name),)) for name in names
    ]
