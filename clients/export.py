"""An owner's part of an audit bundle: its ledger, and the headers and receipts that it speaks of."""

from __future__ import annotations

from pathlib import Path

from clients.home import ClientHome
from common.audit.bundle import Bundle
from common.parcels import Header, Kind


def export(path: Path, bundle: Bundle, *, payloads: bool) -> None:
    """Add the owner's home at `path` to `bundle`. `payloads`: also what it sent, as it was sent.

    Raises ConfigError (no home), LedgerError (damaged ledger), StorageError.
    """
    home = ClientHome(path)
    bundle.put_ledger(home.config.domain, home.ledger, home.log_signer)
    bundle.put_notes(home.notes())
    bundle.put_rotations(home.rotations())
    outbox = home.path / "outbox"
    sent = [file.read_bytes() for file in sorted(outbox.glob("*.dsse"))]
    fetched = [file.read_bytes() for file in sorted((home.path / "work").glob("*/candidates/*.dsse"))]
    bundle.put_envelopes([*sent, *fetched])
    bundle.put_receipts(file.read_bytes() for file in sorted(outbox.glob("*.receipt")))
    for file in sorted((home.path / "work").glob("*/candidates/*.dsse")):
        header = Header.stored(file.read_bytes())
        if header.kind is Kind.REVOCATION:  # small, and it says what was withdrawn
            bundle.put_payload(header.payload_digest, file.with_suffix(".payload"))
    for envelope in sent if payloads else ():
        digest = Header.stored(envelope).payload_digest
        payload = outbox / f"{digest}.payload"
        if payload.is_file():
            bundle.put_payload(digest, payload)
