"""A witness's part of an audit bundle: the newest checkpoint of each ledger that it cosigned."""

from __future__ import annotations

from pathlib import Path

from common.audit.bundle import Bundle
from common.witness.home import WitnessHome


def export(path: Path, bundle: Bundle, *, payloads: bool) -> None:
    """Add the witness's home at `path` to `bundle`; it has no payloads. Raises ConfigError, StorageError."""
    bundle.put_notes(str(note) for note in WitnessHome(path).notes().values())
