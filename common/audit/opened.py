"""Every parcel of an audit, opened to its signed header and its table of tensors.

A parcel is shown once, whatever number of ledgers and recipients it has. Without a verified header nothing
is said about a parcel, except that, and where, a ledger speaks of it.
"""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from dataclasses import dataclass, field

from common.audit.outcome import AuditReport
from common.audit.timeline import moment, named
from common.audit.words import KINDS
from common.ledger import Crossing
from common.pages import Html, columns, count, cut, facts, join, listed, row, size, table, tag
from common.parcels import EVERYONE, SERVER, Header, Privacy

MOST_PARCELS = 2000
MOST_NAMED = 12  # entries and recipients of one parcel
MOST_TENSORS = 40_000  # rows of tensor tables in the whole page


@dataclass(frozen=True)
class Place:
    """One entry: of which ledger, where, and what it says."""

    shore: str
    index: int
    crossing: Crossing

    @property
    def recipient(self) -> str:
        return self.shore if self.crossing.direction == "in" else self.crossing.peer


@dataclass
class Opened:
    """A parcel: the entries that speak of it, and its verified header if there is one."""

    digest: str
    sender: str
    header: Header | None
    places: list[Place] = field(default_factory=list)

    @property
    def time_s(self) -> int:
        return min(place.crossing.time_s for place in self.places)


def opened(report: AuditReport, found: Counter[tuple[str, int]]) -> Html:
    """All parcels by sender, each folded; `found` counts findings by ledger and entry."""
    parcels = _parcels(report)
    if not parcels:
        return tag("p", "No parcel is recorded.")
    receipts = report.evidence.receipts.values()
    answers = {receipt.parcel_digest: receipt.reason or receipt.verdict for receipt in receipts}
    left, groups = MOST_TENSORS, defaultdict(list)
    for parcel in parcels[:MOST_PARCELS]:
        left -= len(parcel.header.tensors) if parcel.header else 0
        wrong = any(found[place.shore, place.index] for place in parcel.places)
        became = _became(parcel, answers.get(parcel.digest, ""), wrong=wrong)
        groups[parcel.sender].append(_parcel(parcel, became, report, with_tensors=left >= 0))
    blocks = [
        join(tag("h3", "From ", "the server" if sender == SERVER else cut(sender)), *group)
        for sender, group in groups.items()
    ]
    note = "Open one to see what its header says under its sender's signature."
    rest = len(parcels) - MOST_PARCELS
    more = tag("p", f"{rest:,} more are not shown: isthmus audit show lists them.") if rest > 0 else ""
    return join(tag("p", note, class_="soft"), *blocks, more)


def _parcels(report: AuditReport) -> list[Opened]:
    """Every parcel that a ledger speaks of, once; by sender and time, the server's last."""
    found: dict[tuple[str, str], Opened] = {}
    for shore, crossings in report.evidence.crossings.items():
        for index, crossing in enumerate(crossings):
            if crossing.type == "parcel":
                sender = shore if crossing.direction == "out" else crossing.peer
                header = report.evidence.headers.get(crossing.digest)
                new = Opened(crossing.digest, sender, header)
                places = found.setdefault((sender, crossing.digest), new).places
                places.append(Place(shore, index, crossing))
    return sorted(found.values(), key=lambda parcel: (parcel.sender == SERVER, parcel.sender, parcel.time_s))


def _became(parcel: Opened, answer: str, *, wrong: bool) -> Html:
    """What became of a parcel, in a word or two; `answer` is what its receipt says."""
    if wrong:
        return tag("span", "finding", class_="lost")
    said = {place.crossing.verdict for place in parcel.places if place.crossing.direction == "in"} | {answer}
    if "accepted" in said:
        return tag("span", "accepted", class_="kept")
    refused = sorted(said - {""})
    return tag("span", f"refused: {cut(refused[0])}" if refused else "unacknowledged", class_="open")


def _parcel(parcel: Opened, became: Html, report: AuditReport, *, with_tensors: bool) -> Html:
    kind, header = parcel.places[0].crossing.kind, parcel.header
    recipients = sorted({place.recipient for place in parcel.places})
    title = tag(
        "summary",
        tag("span", named(kind), class_="kind"),
        tag("span", "to ", cut(listed(recipients[:MOST_NAMED])), class_="soft"),
        tag("span", moment(parcel.time_s), class_="soft"),
        tag("span", size(max(place.crossing.size_bytes for place in parcel.places)), class_="soft"),
        became,
    )
    entries = [f"{place.shore} entry {place.index}" for place in parcel.places[:MOST_NAMED]]
    known: dict[str, object] = {
        "What it is": KINDS.get(kind, "not a kind that may cross"),
        "In the ledgers": cut(listed(entries), 400),
        "Digest of the header": tag("code", parcel.digest),
    }
    if header is None:
        why = "Not opened: it was refused, or its signed header is not in the bundle or does not verify."
        return tag("details", title, facts(known), tag("p", why))
    problem = report.evidence.payloads.get(header.payload_digest, "absent")
    checked: object = "yes; digest, size and content are what the header says"
    if problem:
        checked = tag("span", cut(problem, 400), class_="lost")
    if problem == "absent":
        checked = "no; the payload is not in the bundle"
    known |= {**_header(header), "Payload compared": checked}
    return tag("details", title, facts(known), _tensors(header, with_rows=with_tensors))


def _header(header: Header) -> dict[str, object]:
    """The header, field by field, in words."""
    training = (f"{name.replace('_', ' ')} {value:,}" for name, value in header.training.items())
    recipient = "everybody" if header.recipient == EVERYONE else header.recipient
    return {
        "Run and round": f"{header.run}, round {header.round}",
        "From and to": f"{header.sender} to {recipient}",
        "Training facts": ", ".join(training) or "none",
        "Differential privacy": _privacy(header.privacy),
        "Payload": join(
            f"{header.payload_bytes:,} bytes, {header.codec} ", tag("code", header.payload_digest)
        ),
        "Base model": tag("code", header.base_digest),
        "Code": join(f"version {header.code_version}, ", _code(header.code_digest)),
        "Signed": f"{moment(header.created_s)}; valid until {moment(header.expires_s)}",
        "Nonce": tag("code", header.nonce),
        "Sender's ledger": join(
            f"{count(header.checkpoint.size, 'entry', 'entries')} then ", tag("code", header.checkpoint.root)
        ),
    }


def _code(digest: str) -> Html:
    return tag("code", digest) if digest.strip("0") else tag("span", "without a digest")


def _privacy(privacy: Privacy) -> str:
    if privacy == Privacy():
        return "none claimed"
    epsilon, delta = privacy.epsilon_e6 / 1e6, privacy.delta_e12 / 1e12
    clip, noise = privacy.clip_e6 / 1e6, privacy.noise_e6 / 1e6
    return f"{privacy.mechanism}: epsilon {epsilon:g}, delta {delta:g}, clip {clip:g}, noise {noise:g}"


def _tensors(header: Header, *, with_rows: bool) -> Html:
    if not header.tensors:
        return tag("p", "This kind holds no tensors.", class_="soft")
    numbers = sum(math.prod(fact.shape) for fact in header.tensors)
    said = f"{count(len(header.tensors), 'tensor')}, {numbers:,} numbers"
    if not with_rows:
        return tag("p", f"{said}. The table is left out: the page would be too long.")
    rows = (
        row(
            (
                fact.name,
                " \N{MULTIPLICATION SIGN} ".join(map(str, fact.shape)),
                fact.dtype,
                tag("code", fact.digest),
            )
        )
        for fact in header.tensors
    )
    return table(columns(("name", "shape", "type", "digest")), rows, "tensors text", said)
