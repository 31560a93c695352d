"""The configuration of the attacks: a simulation's, and an `[attacks]` section.

Of every domain half of the users are fine-tuned on (members), the other half never (others).
"""

from __future__ import annotations

from pathlib import Path

from pydantic import Field

from common.config import Frozen
from common.errors import ConfigError, suggest
from simulations.config import SimulationConfig, load_as


class AttackSection(Frozen):
    """How much is attacked. The first domain's vector is the one that shadow models are made for."""

    positions: int = Field(3, ge=1, description="newest positions of a history behind a user's loss")
    shadow_pairs: int = Field(2, ge=0, description="pairs of shadow models: a random half, and the other")
    other_steps: tuple[int, ...] = Field((), description="the first domain fine-tuned for so many steps, too")
    attacker: str = Field("", description="the domain that poisons; empty: the second")
    scales: tuple[float, ...] = Field((10.0, 100.0), description="factors of the attacker's vector")
    victims: int = Field(80, ge=2, description="users of each domain, not fine-tuned on, that feel it")
    vocabulary_steps: int = Field(15, ge=1, description="steps of the control with a trained embedding table")
    planted_words: int = Field(4, ge=1, description="rare words that only the private texts have")
    epsilons: tuple[float, ...] = Field((), description="what private fine-tunings of the first domain spend")
    private_batch_size: int = Field(
        256, ge=2, description="users in a step of them; `[privacy]` has the rest"
    )
    private_steps: int = Field(20, ge=1, description="steps of each of them")
    private_learning_rate: float = Field(1e-3, gt=0, description="of each of them")
    tested: int = Field(1000, ge=1, description="members that they are tested and attacked on, and others")


class AttackConfig(SimulationConfig):
    """A `SimulationConfig` with an `[attacks]` section."""

    attacks: AttackSection = AttackSection()

    @property
    def names(self) -> list[str]:
        """The domains, in the file's order."""
        return [source.name for source in self.domain]

    @property
    def attacker(self) -> str:
        """The domain that poisons."""
        return self.attacks.attacker or self.names[1]


def load_attacks(path: Path) -> AttackConfig:
    """Read the configuration. Raises ConfigError."""
    config = load_as(path, AttackConfig)
    if config.attacker not in config.names:
        raise ConfigError(
            f"{path}: attacks.attacker: no domain {config.attacker!r}",
            next_step=suggest(config.attacker, config.names),
        )
    return config
