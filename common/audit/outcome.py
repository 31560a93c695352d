"""What an audit says: findings, and a report for each domain and each ledger."""

from __future__ import annotations

from dataclasses import dataclass, field

from common.audit.scan import MISSES
from common.ledger import Crossing
from common.parcels import Header, Kind, Receipt

LIMITS = (
    "that nothing left by another way: traffic that never passed the gate is in no ledger",
    "what a task vector or a metric says about the data behind it: neither is anonymous",
    "what control messages said: they are recorded by digest and size",
    f"that allowed bytes hide nothing: no scan of the traffic finds {MISSES}",
)


@dataclass(frozen=True)
class Finding:
    """Something that must not be, at entry `index` of the ledger of `shore` (-1: not at one entry)."""

    shore: str
    index: int
    code: str
    reason: str


@dataclass
class Tally:
    """How many messages of one kind, and their bytes, payloads included."""

    count: int = 0
    bytes: int = 0


@dataclass
class DomainReport:
    """The verdict on one domain. `sent` and `received` are seen from the domain."""

    domain: str
    pseudonym: str
    signer: str
    sent: dict[str, Tally] = field(default_factory=dict)
    received: dict[str, Tally] = field(default_factory=dict)
    privacy: list[dict[str, int | str]] = field(default_factory=list)
    unacknowledged: list[dict[str, int | str]] = field(default_factory=list)
    withdrawn: list[dict[str, int | str]] = field(default_factory=list)
    findings: list[Finding] = field(default_factory=list)
    not_proven: list[str] = field(default_factory=list)

    def add_spend(self, spend: dict[str, int | str]) -> None:
        """One parcel's claim of privacy.

        Equal ones of fitness are one: each claims the owner's whole budget of answers, over all runs.
        """
        told = any({**known, "run": ""} == {**spend, "run": ""} for known in self.privacy)
        if spend["kind"] != Kind.FITNESS or not told:
            self.privacy.append(spend)


@dataclass(frozen=True)
class Cosigned:
    """Up to which size a shore or `witness/NAME` saw a ledger grow, and when, by its own clock."""

    size: int
    time_s: int


@dataclass
class ShoreReport:
    """One ledger: how long it is, its root, how much of it a signed checkpoint covers, who cosigned it."""

    shore: str
    entries: int
    root: str
    checkpoint_size: int
    origin: str
    cosigned: dict[str, Cosigned] = field(default_factory=dict)


@dataclass
class Evidence:
    """What was read on the way: each ledger up to its first damaged entry, and what its entries speak of.

    Headers and receipts, by the digest of their envelopes, are those that verified. `payloads` says, by the
    digest in a verified header, what is wrong with the payload: nothing, or "absent" from the bundle.
    """

    crossings: dict[str, list[Crossing]] = field(default_factory=dict)
    headers: dict[str, Header] = field(default_factory=dict)
    receipts: dict[str, Receipt] = field(default_factory=dict)
    payloads: dict[str, str] = field(default_factory=dict)


@dataclass
class AuditReport:
    """What `verify` found. `findings` are those of no single domain."""

    root_version: int
    shores: list[ShoreReport]
    domains: list[DomainReport]
    findings: list[Finding]
    evidence: Evidence = field(default_factory=Evidence)

    @property
    def all_findings(self) -> list[Finding]:
        """Every finding, ledger by ledger, the first bad entry of each first."""
        found = [*self.findings, *(finding for domain in self.domains for finding in domain.findings)]
        return sorted(found, key=lambda finding: (finding.shore, finding.index))

    @property
    def clean(self) -> bool:
        """Whether there is no finding."""
        return not self.all_findings
