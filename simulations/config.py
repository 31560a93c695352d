"""The configuration of a simulation: a run's, plus where each domain's data come from.

[[domain]]
name = "beauty"
path = "../data/beauty"      # relative to this file; anything that `isthmus data prepare` reads
users = 2500                 # optional seeded subsample
"""

from __future__ import annotations

from pathlib import Path
from typing import TypeVar

from pydantic import Field

from clients.policy import EgressPolicy
from common.config import Frozen, RunConfig, load_toml
from common.errors import ConfigError

MIN_DOMAINS = 2


class DomainSource(Frozen):
    """One domain of the simulation."""

    name: str = Field(pattern=r"^[a-z][a-z0-9_-]{0,39}$")
    path: str
    format: str = Field("", description="empty: detected")
    users: int | None = Field(None, ge=1, description="subsample of so many users, seeded by run.seed")
    k_core: int | None = Field(None, ge=0, description="None: 5, or none for a source that is split already")
    public: tuple[str, ...] | None = Field(
        None, description="None: those of title, brand, category with text"
    )


class SimulationSection(Frozen):
    """What only a simulation may do."""

    joint: bool = Field(
        True,
        description="also train one model on the pooled data: not private, a reference; not with [lora]",
    )
    joint_steps: int | None = Field(None, ge=1, description="None: as many as all domains together")
    trainers_at_once: int | None = Field(None, ge=1, description="None: as many as there are processors")
    threads_per_domain: int = Field(1, ge=1, description="processor threads of each domain's processes")


class SimulationConfig(RunConfig):
    """A `RunConfig` with `[[domain]]` entries, a `[simulation]` section and every owner's `[policy]`."""

    simulation: SimulationSection = SimulationSection()
    policy: EgressPolicy = EgressPolicy()
    domain: tuple[DomainSource, ...] = ()

    def run_config(self) -> RunConfig:
        """What a deployment would be given."""
        return RunConfig.model_validate(self.model_dump(include=set(RunConfig.model_fields)))


ConfigT = TypeVar("ConfigT", bound=SimulationConfig)


def load_simulation(path: Path) -> SimulationConfig:
    """Read a simulation. Paths become absolute. Raises ConfigError."""
    return load_as(path, SimulationConfig)


def load_as(path: Path, model: type[ConfigT]) -> ConfigT:
    """Read a simulation with more in it than `SimulationConfig` has. Raises ConfigError."""
    config = load_toml(path, model)
    names = [source.name for source in config.domain]
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise ConfigError(f"{path}: two domains are called {twice[0]!r}", next_step="rename one")
    if len(names) < MIN_DOMAINS:
        raise ConfigError(f"{path}: {len(names)} [[domain]] entries", next_step="name at least two domains")
    here = path.resolve().parent
    sources = tuple(
        source.model_copy(update={"path": str((here / Path(source.path).expanduser()).resolve())})
        for source in config.domain
    )
    return config.model_copy(update={"domain": sources})
