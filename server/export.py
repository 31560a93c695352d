"""The merge server's part of an audit bundle: its ledger, headers, receipts, and the root file."""

from __future__ import annotations

from pathlib import Path

from common.audit.bundle import Bundle
from common.parcels import SERVER, Kind
from server.home import ServerHome
from server.roots import current_root


def export(path: Path, bundle: Bundle, *, payloads: bool) -> None:
    """Add the server's home at `path` to `bundle`. `payloads`: also every payload in its store; those of
    revocations always, for they say what was withdrawn.

    Raises ConfigError (no home, no root key), LedgerError (damaged ledger), StorageError.
    """
    home = ServerHome(path)
    bundle.put_root(current_root(home).encode())
    bundle.put_ledger(SERVER, home.ledger, home.log_signer)
    bundle.put_notes(home.notes())
    bundle.put_rotations(home.rotations())
    store = home.store
    for stored in store.records():
        bundle.put_envelopes([store.read_bytes(stored.digest)])
        payload = store.object_path(stored.payload_digest)  # that of a withdrawn vector is gone
        if (payloads or stored.kind is Kind.REVOCATION) and payload.exists():
            bundle.put_payload(stored.payload_digest, payload)
    receipts = {entry.body["digest"] for entry in home.ledger if entry.body["type"] == "receipt"}
    bundle.put_receipts(store.read_bytes(digest) for digest in receipts if store.object_path(digest).exists())
