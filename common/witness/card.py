"""A witness's card: what those who ask it need to know. Both shores keep cards in `witnesses/NAME.json`."""

from __future__ import annotations

import json
from pathlib import Path

from pydantic import Field

from common.config import Frozen, validate
from common.errors import ConfigError
from common.files import write_atomic
from common.roots import Witness
from common.signing import PublicKey
from common.statements import WITNESS_PATTERN


class WitnessCard(Frozen):
    """Who cosigns, and where."""

    name: str = Field(pattern=WITNESS_PATTERN)
    key: str = Field(pattern=r"^[0-9a-f]{64}$", description="Ed25519 public key, hex")
    address: str = Field(description="host:port")
    ca_certificate: str = Field(description="PEM; of its TLS certificate's authority")

    @property
    def in_root(self) -> Witness:
        """What of it stands in root.json."""
        return Witness(name=self.name, key=self.key)

    def save(self, path: Path) -> None:
        """Write the card. Raises StorageError."""
        write_atomic(path, json.dumps(self.model_dump(), indent=1).encode() + b"\n")

    def add_to(self, home: Path) -> None:
        """From now on the shore at `home` has its ledger cosigned by this witness. Raises StorageError."""
        self.save(home / "witnesses" / f"{self.name}.json")


def read_card(path: Path) -> WitnessCard:
    """Raises ConfigError naming the file."""
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        data = None
    if not isinstance(data, dict):
        raise ConfigError(f"{path}: not a witness's card", next_step="ask for it: isthmus witness card")
    card = validate(data, WitnessCard, where=str(path))
    PublicKey.from_hex(card.key)
    return card


def witnesses_of(home: Path) -> list[WitnessCard]:
    """The witnesses of the shore at `home`, by name. Raises ConfigError."""
    return [read_card(path) for path in sorted((home / "witnesses").glob("*.json"))]
