"""The join kit's schema, which both shores read."""

from __future__ import annotations

import json
from pathlib import Path

from pydantic import Field

from common.config import Frozen, validate
from common.errors import ConfigError
from common.statements import Name
from common.witness.card import WitnessCard

SCHEMA_VERSION = 1
RUN_POLICY = (
    "A run asks for: a domain card (bucketed counts), the public item catalog, one task vector without any "
    "embedding table, and the metrics that you allow. It sends merged vectors back. It never asks for an "
    "interaction, a user id or a data path, and it runs no code on your machine but what you installed."
)


class JoinKit(Frozen):
    """What an owner needs to join: addresses (host:port), certificates, identities, one token."""

    schema_version: int
    domain: Name
    server: str
    fleet: str
    exchange: str
    enrol: str
    public_key: str = Field(description="the server's Ed25519 identity, hex")
    fingerprint: str = Field(description="of that key, to be compared out of band")
    ca_certificate: str = Field(description="PEM", pattern="^[\\x00-\\x7f]*$")
    keys: str = Field(
        description="the server's own word on its keys: a signed envelope", pattern="^[\\x00-\\x7f]*$"
    )
    witnesses: tuple[WitnessCard, ...] = Field((), description="who cosigns ledgers")
    fab_sha256: str = Field(description="the app bundle that the owner's runner will answer to")
    token: str = Field(description="one-time; worthless after the first join")
    run_policy: str = RUN_POLICY


def read_kit(path: Path) -> JoinKit:
    """Read a kit. Raises ConfigError naming the file."""
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
        json.dumps(data, ensure_ascii=False).encode()  # half a character, as JSON can escape it, is none
    except (OSError, ValueError, RecursionError):
        data = None
    if not isinstance(data, dict):
        raise ConfigError(
            f"{path}: not a join kit", next_step="ask the operator: isthmus server invite DOMAIN"
        )
    if data.get("schema_version", SCHEMA_VERSION) != SCHEMA_VERSION:
        raise ConfigError(
            f"{path}: kit of schema {data['schema_version']!r:.20}, this Isthmus reads {SCHEMA_VERSION}",
            next_step="install the operator's version of Isthmus",
        )
    return validate(data, JoinKit, where=str(path))
