"""Withdrawn vectors, as revocations and ledgers show them (`isthmus run withdraw`).

A ledger shows that a vector was revoked, who was told, and that it was not accepted again. What the models
since were merged from is in no ledger.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from common.audit.bundle import Bundle
from common.errors import ParcelError
from common.files import sha256_bytes
from common.ledger import Crossing
from common.parcels import Header, Kind
from common.revocation import Revocation

NOT_MERGED = "that the models since were merged without the withdrawn vectors: no ledger says what was merged"


@dataclass(frozen=True)
class Withdrawn:
    """One revocation that is in the ledgers: its parcel, the run of the vector, and what it says.

    The server's takes a vector out of the models; its owner's own asks for that.
    """

    parcel: str
    run: str
    sender: str
    said: Revocation


def withdrawals(bundle: Bundle, headers: Mapping[str, Header]) -> list[Withdrawn]:
    """What the revocations among the verified `headers` (parcel to header) say; those without payload say
    nothing."""
    found = []
    for parcel, header in headers.items():
        path = bundle.payload(header.payload_digest) if header.kind is Kind.REVOCATION else None
        data = path.read_bytes() if path else b""
        if sha256_bytes(data) != header.payload_digest:
            continue
        try:
            found.append(Withdrawn(parcel, header.run, header.sender, Revocation.decode(data)))
        except ParcelError:
            continue
    return sorted(found, key=lambda withdrawn: withdrawn.parcel)


def accepted_after(
    crossings: Sequence[Crossing], headers: Mapping[str, Header], found: Iterable[Withdrawn]
) -> list[int]:
    """Entries of the server's ledger that accept a vector after the first entry that gives out its
    revocation, or takes its owner's."""
    told: dict[str, int] = {}
    for withdrawn in found:
        sent = [
            i
            for i, c in enumerate(crossings)
            if c.digest == withdrawn.parcel and c.verdict in ("", "accepted")
        ]
        if sent:
            told[withdrawn.said.payload] = min(sent[0], told.get(withdrawn.said.payload, sent[0]))
    late = []
    for index, crossing in enumerate(crossings):
        header = headers.get(crossing.digest)
        accepted = (crossing.direction, crossing.type, crossing.verdict) == ("in", "parcel", "accepted")
        if accepted and header is not None and index > told.get(header.payload_digest, index):
            late.append(index)
    return late
