"""Verifying a bundle offline: from the root file and nothing else, derive again what crossed.

For each ledger: its lines (form, order, chain), its Merkle root against the signed checkpoint, and every
entry against the signed bytes that it speaks of. Between the ledgers: what one shore says it sent, the
other must say it received, and the reverse; every receipt must prove its entry and agree with the tree of
the shore that gave it, so that a shore which shows two histories is found.

A *finding* is something that must not be. An *unacknowledged* send is legal: a crash or a cut link between
the entry and the receipt. What a bundle cannot prove is said beside each domain. Clocks decide nothing
here: expiry was enforced when a parcel came in.
"""

from __future__ import annotations

import contextlib
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from itertools import islice, pairwise
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

from common import canonical, merkle
from common.audit.bundle import Bundle
from common.audit.outcome import (
    LIMITS,
    AuditReport,
    Cosigned,
    DomainReport,
    Evidence,
    Finding,
    ShoreReport,
    Tally,
)
from common.audit.withdrawals import NOT_MERGED, Withdrawn, accepted_after, withdrawals
from common.errors import IsthmusError, LedgerError, ParcelError, SignatureError
from common.files import sha256_bytes
from common.ledger import LINE_BYTES, Crossing, lines, walk
from common.notes import Checkpoint, Note
from common.parcels import EVERYONE, SERVER, Header, Kind, Privacy, Receipt
from common.payloads import check_tensors, inspect
from common.roots import Keys, Party, RetiredKeys, Root, RootMember, log_verifiers
from common.rotation import Rotation
from common.signing import Sealed
from common.statements import Statement, TreeHead

FROM_A_DOMAIN = frozenset(
    {Kind.DOMAIN_CARD, Kind.CATALOG, Kind.TASK_VECTOR, Kind.METRICS, Kind.FITNESS, Kind.REVOCATION}
)
FROM_THE_SERVER = frozenset({Kind.CANDIDATE, Kind.UNIVERSAL_MODEL, Kind.REVOCATION})
S = TypeVar("S", bound=Statement)
Progress = Callable[[str, int, int], None]


class _Parcel(NamedTuple):
    """A verified header, the size of its envelope, and the keys of its sender that signed it."""

    header: Header
    envelope_bytes: int
    keys: Keys


@dataclass
class _Log:
    """A ledger as it was read: entries up to the first damaged one, and the tree over them."""

    shore: str
    party: Party
    crossings: list[Crossing]
    tree: merkle.Tree
    covered: int = 0
    cosigned: dict[str, Cosigned] = field(default_factory=dict)

    def at(self, type_: str, direction: str, peer: str) -> Iterator[tuple[int, Crossing]]:
        """Entries of this type and direction, with `peer`."""
        for index, crossing in enumerate(self.crossings):
            if (crossing.type, crossing.direction, crossing.peer) == (type_, direction, peer):
                yield index, crossing

    def agrees(self, head: TreeHead) -> bool:
        """Whether this ledger had that root at that size."""
        return head.size <= len(self.tree) and self.tree.root(head.size).hex() == head.root


def verify(bundle: Bundle, root: Root, on_step: Progress = lambda *_: None) -> AuditReport:
    """Derive everything again. Never raises for what is in the bundle: that becomes a finding."""
    return _Audit(bundle, root, on_step).report()


class _Audit:
    def __init__(self, bundle: Bundle, root: Root, on_step: Progress) -> None:
        self._bundle, self._root, self._on_step = bundle, root, on_step
        self._parties = root.parties()
        self._logs = {
            log.name: (shore, log)
            for shore, party in self._parties.items()
            for log in log_verifiers(shore, party)
        }
        self._witnesses = {witness.peer for witness in root.witnesses}
        self._findings: list[Finding] = []
        self._parcels: dict[str, _Parcel] = {}  # verified
        self._receipts: dict[str, Receipt] = {}
        self._heads: dict[str, list[TreeHead]] = defaultdict(list)  # signed by each shore about itself
        self._payloads: dict[str, str] = {}
        self._nonces: dict[tuple[str, str], str] = {}
        self._without_payload: Counter[str] = Counter()
        self._withdrawals: list[Withdrawn] = []

    def report(self) -> AuditReport:
        logs: dict[str, _Log] = {}
        for shore in self._bundle.shores():
            if shore in self._parties:
                logs[shore] = self._read(shore, self._parties[shore])
            else:
                self._find(shore, -1, "unknown-shore", "no such shore in the root file")
        if not logs:
            self._find("bundle", -1, "no-ledger", "it holds no ledger of anybody in the root file")
        for log in logs.values():
            for index, crossing in enumerate(log.crossings):
                self._on_step(log.shore, index + 1, len(log.crossings))
                self._check_entry(log, index, crossing)
        self._withdrawals = withdrawals(self._bundle, self._headers())
        for log in logs.values():
            self._repeats(log)
            self._check_withdrawals(log)
            self._check_histories(log)
            self._check_checkpoint(log)
        self._check_notes(logs)
        for log in logs.values():
            self._check_witnessed(log)
        domains = [self._domain(member, logs) for member in self._root.members]
        names = {report.domain for report in domains}
        for report in domains:
            report.findings = [found for found in self._findings if found.shore == report.domain]
        shores = [
            ShoreReport(
                log.shore,
                len(log.crossings),
                log.tree.root().hex(),
                log.covered,
                log_verifiers(log.shore, log.party)[0].name,
                log.cosigned,
            )
            for log in logs.values()
        ]
        others = [found for found in self._findings if found.shore not in names]
        evidence = Evidence(
            {log.shore: log.crossings for log in logs.values()},
            self._headers(),
            self._receipts,
            self._payloads,
        )
        return AuditReport(self._root.version, shores, domains, others, evidence)

    def _find(self, shore: str, index: int, code: str, reason: str) -> None:
        self._findings.append(Finding(shore, index, code, reason))

    # One ledger

    def _read(self, shore: str, party: Party) -> _Log:
        log = _Log(shore, party, [], merkle.Tree())
        try:
            for entry, line in walk(self._bundle.ledger(shore)):
                log.crossings.append(Crossing.read(entry.body))
                log.tree.append(merkle.leaf_hash(line))
        except LedgerError as err:
            index = _first_changed(self._bundle.ledger(shore), len(log.crossings))
            at = "" if index == len(log.crossings) else f"entry {len(log.crossings)} "
            self._find(shore, index, "damaged", f"{at}{err.message}; nothing after it was read")
        return log

    def _check_checkpoint(self, log: _Log) -> None:
        note = self._bundle.checkpoint(log.shore)
        if note is None:
            self._find(log.shore, -1, "no-checkpoint", "the ledger has no signed checkpoint")
            return
        try:
            shore, checkpoint = self._opened_checkpoint(note)
            if shore != log.shore:
                raise LedgerError(f"the checkpoint is of the ledger of {shore}")
        except IsthmusError as err:
            self._find(log.shore, -1, "checkpoint", err.message)
            return
        if self._is_of(log, checkpoint):
            log.covered = checkpoint.size

    def _opened_checkpoint(self, note: str) -> tuple[str, Checkpoint]:
        """Whose ledger it is of, by today's log key or an earlier one. Raises LedgerError, SignatureError."""
        origin = Checkpoint.read(Note.parse(note).text).origin
        if origin not in self._logs:
            raise LedgerError("a checkpoint of a log that is not in the root file")
        shore, verifier = self._logs[origin]
        return shore, Checkpoint.open(note, verifier)

    def _is_of(self, log: _Log, checkpoint: Checkpoint) -> bool:
        """Whether `log` is, or has grown from, what its owner signed; if not, that is a finding."""
        head = TreeHead(size=checkpoint.size, root=checkpoint.root.hex())
        if log.agrees(head):
            return True
        if head.size > len(log.tree):
            reason = f"the signed checkpoint has {head.size} entries, the ledger {len(log.tree)}"
            self._find(log.shore, len(log.tree), "truncated", reason)
        else:
            reason = f"the ledger is not the one of the signed checkpoint of size {head.size}"
            self._find(log.shore, self._last_agreement(log), "rewritten", reason)
        return False

    def _check_notes(self, logs: dict[str, _Log]) -> None:
        """Cosigned checkpoints, whoever kept them, must be of the ledgers in the bundle."""
        cosigners = [*self._logs.values(), *((one.peer, one.verifier) for one in self._root.witnesses)]
        for text in self._bundle.notes():
            try:
                shore, checkpoint = self._opened_checkpoint(text)
            except IsthmusError as err:
                self._find("bundle", -1, "checkpoint", err.message)
                continue
            log = logs.get(shore)
            if log is None or not self._is_of(log, checkpoint):
                continue
            note = Note.parse(text)
            for name, verifier in cosigners:
                with contextlib.suppress(SignatureError):
                    seen = Cosigned(checkpoint.size, note.cosigned_by(verifier))
                    log.cosigned[name] = max(log.cosigned.get(name, seen), seen, key=lambda one: one.size)

    def _check_witnessed(self, log: _Log) -> None:
        if self._witnesses and log.crossings and not self._witnesses & set(log.cosigned):
            reason = "the root file names witnesses, and none of them cosigned this ledger"
            self._find(log.shore, -1, "unwitnessed", reason)

    def _check_histories(self, log: _Log) -> None:
        """Every tree head that this shore signed in a header or a receipt must be of this ledger."""
        wrong = [head for head in self._heads[log.shore] if not log.agrees(head)]
        if wrong:
            smallest = min(wrong, key=lambda head: head.size)
            reason = (
                f"{log.shore} signed another history in a header or a receipt: {len(wrong)} of "
                f"{len(self._heads[log.shore])} tree heads, the first of size {smallest.size}"
            )
            self._find(log.shore, self._last_agreement(log), "other-history", reason)

    def _last_agreement(self, log: _Log) -> int:
        """The size up to which signed tree heads agree: what was changed is at or after this index."""
        return max((head.size for head in self._heads[log.shore] if log.agrees(head)), default=0)

    # One entry

    def _check_entry(self, log: _Log, index: int, crossing: Crossing) -> None:
        if crossing.type == "checkpoint" and crossing.peer in self._witnesses:
            return
        if (crossing.type, crossing.direction, crossing.peer) == ("keys", "out", EVERYONE):
            self._check_rotation(log, index, crossing)
            return
        across = (crossing.peer == SERVER) != (log.shore == SERVER)
        if crossing.peer not in self._parties or not across:
            if crossing.type != "parcel" or crossing.verdict in ("", "accepted"):
                self._find(
                    log.shore,
                    index,
                    "unknown-peer",
                    "the other side is not one that the root file has for it",
                )
        elif crossing.type == "parcel":
            self._check_parcel(log, index, crossing)
        elif crossing.type == "keys":
            self._check_rotation(log, index, crossing)
        elif crossing.type == "receipt":
            self._check_receipt(log, index, crossing)

    def _check_parcel(self, log: _Log, index: int, crossing: Crossing) -> None:
        outgoing = crossing.direction == "out"
        if not outgoing and crossing.verdict != "accepted":
            return  # refused: nothing of it was taken, and what was offered need not be a parcel at all
        sender, receiver = (log.shore, crossing.peer) if outgoing else (crossing.peer, log.shore)
        try:
            header, envelope_bytes, keys = self._parcel(crossing.digest, sender)
        except IsthmusError as err:
            self._find(log.shore, index, "header", err.message)
            return
        total_bytes = envelope_bytes + header.payload_bytes
        nonce_of = self._nonces.setdefault((header.sender, header.nonce), crossing.digest)
        allowed = FROM_THE_SERVER if sender == SERVER else FROM_A_DOMAIN
        for fine, code, reason in (
            (header.sender == sender, "sender", f"the header is by {header.sender}"),
            (header.recipient in (receiver, EVERYONE), "recipient", "the header is for somebody else"),
            (header.kind in allowed, "kind", f"{sender} may not send a {header.kind}"),
            (header.kind == crossing.kind, "kind", f"the header is of a {header.kind}"),
            (header.run == crossing.run, "run", f"the header is of run {header.run}"),
            (
                crossing.size_bytes == total_bytes,
                "size",
                f"{crossing.size_bytes} bytes recorded, header and payload have {total_bytes}",
            ),
            (nonce_of == crossing.digest, "nonce", "its nonce was used for another parcel"),
            (
                not any(fact.is_table for fact in header.tensors),
                "embedding-table",
                "an embedding table crossed: its rows name the words of the data",
            ),
        ):
            if not fine:
                self._find(log.shore, index, code, reason)
        if outgoing and header.checkpoint.size > index:
            self._find(log.shore, index, "order", "the header speaks of entries that come after it")
        party = self._parties[sender]
        if not outgoing and isinstance(party, RootMember) and party.revoked_s and index >= party.revoked_size:
            self._find(log.shore, index, "revoked", f"accepted from {sender} after it was revoked")
        if not outgoing and isinstance(keys, RetiredKeys) and index >= keys.size:
            self._find(log.shore, index, "rotated", f"accepted under a key that {sender} had replaced")
        self._check_payload(log.shore, index, header)

    def _parcel(self, digest: str, sender: str) -> _Parcel:
        """The verified header and what goes with it; its tree head is taken note of, once.

        Raises LedgerError (it is not in the bundle), SignatureError or ParcelError.
        """
        if digest not in self._parcels:
            envelope = self._bundle.envelope(digest)
            if envelope is None:
                raise LedgerError("its signed header is not in the bundle")
            header, keys = self._opened(Header, envelope, sender)
            self._parcels[digest] = _Parcel(header, len(envelope), keys)
            self._heads[sender].append(header.checkpoint)
        return self._parcels[digest]

    def _opened(self, what: type[S], envelope: bytes, signer: str) -> tuple[S, Keys]:
        """A statement by `signer`, and those of its keys, today's or earlier ones, that signed it."""
        sealed = Sealed.parse(envelope)
        keys = self._parties[signer].keys_of(sealed.key_id)
        return what.open(sealed, keys.identity), keys

    def _check_rotation(self, log: _Log, index: int, crossing: Crossing) -> None:
        """The new keys and the replaced ones follow each other in the root file."""
        domain = log.shore if crossing.direction == "out" else crossing.peer
        party = self._parties[domain]
        try:
            data = self._bundle.rotation(crossing.digest)
            if data is None:
                raise LedgerError("it is not in the bundle")
            keys = Rotation.open(data).keys
            known = [(one.identity_key, one.log_key) for one in party.generations()]
            followed = [(new, old[0]) for new, old in pairwise(known)]
            if keys.shore != domain or ((keys.identity_key, keys.log_key), keys.replaces) not in followed:
                raise LedgerError("in the root file these keys do not follow the ones that they replace")
        except IsthmusError as err:
            self._find(log.shore, index, "keys", err.message)

    def _check_payload(self, shore: str, index: int, header: Header) -> None:
        if header.payload_digest not in self._payloads:
            self._payloads[header.payload_digest] = self._payload_problem(header)
        problem = self._payloads[header.payload_digest]
        if problem == "absent":
            self._without_payload[shore] += 1
        elif problem:
            self._find(shore, index, "payload", problem)

    def _payload_problem(self, header: Header) -> str:
        path = self._bundle.payload(header.payload_digest)
        if path is None:
            return "absent"
        try:
            facts = inspect(path, header)
            if (facts.digest, facts.size_bytes) != (header.payload_digest, header.payload_bytes):
                return "the payload in the bundle is not the one that the header names"
            if header.kind.holds_tensors:
                check_tensors(header, facts, max_norm=float("inf"))
        except IsthmusError as err:
            return err.message.replace(str(path), "payload")
        return ""

    def _check_receipt(self, log: _Log, index: int, crossing: Crossing) -> None:
        giver = log.shore if crossing.direction == "out" else crossing.peer
        taker = crossing.peer if crossing.direction == "out" else log.shore
        envelope = self._bundle.receipt(crossing.digest)
        if envelope is None:
            self._find(log.shore, index, "receipt", "it is not in the bundle")
            return
        try:
            receipt, _ = self._opened(Receipt, envelope, giver)
            if (receipt.sender, receipt.receiver) != (taker, giver):
                raise LedgerError(f"the receipt is by {receipt.receiver} for {receipt.sender}")
            if crossing.size_bytes != len(envelope):
                raise LedgerError(f"{crossing.size_bytes} bytes recorded, the receipt has {len(envelope)}")
            self._check_receipt_against_parcel(receipt)
        except IsthmusError as err:
            self._find(log.shore, index, "receipt", err.message)
            return
        self._receipts[crossing.digest] = receipt
        self._heads[giver].append(receipt.checkpoint)

    def _check_receipt_against_parcel(self, receipt: Receipt) -> None:
        if receipt.verdict == "refused" and self._bundle.envelope(receipt.parcel_digest) is None:
            return  # the server keeps no header of what it refused; the domain's outbox has it
        header, envelope_bytes, _ = self._parcel(receipt.parcel_digest, receipt.sender)
        receipt.check_matches(receipt.parcel_digest, header)
        receipt.check_entry(envelope_bytes, header.payload_bytes)

    # Both ledgers of one domain

    def _domain(self, member: RootMember, logs: dict[str, _Log]) -> DomainReport:
        report = DomainReport(member.domain, member.pseudonym, member.identity.key_id)
        own, server = logs.get(member.domain), logs.get(SERVER)
        seen_from = own or server
        if seen_from is not None:
            self._tally(report, seen_from, is_own=own is not None)
            report.withdrawn = self._withdrawn(seen_from, member.domain, own, server)
        if own is not None and server is not None:
            self._reconcile(own, server)
            report.unacknowledged = [
                *self._unacknowledged(own, SERVER),
                *self._unacknowledged(server, member.domain),
            ]
        for name, log in ((member.domain, own), (SERVER, server)):
            if log is None:
                report.not_proven.append(f"what the ledger of {name} would say: it is not in the bundle")
            elif log.covered < len(log.crossings):
                report.not_proven.append(
                    f"entries {log.covered} to {len(log.crossings) - 1} of the ledger of {name}: "
                    "no signed checkpoint covers them"
                )
        missing = self._without_payload[member.domain]
        if missing:
            report.not_proven.append(
                f"the content of {missing} parcels: their payloads are not in the bundle"
            )
        report.not_proven.extend(self._not_isolated(member.domain))
        report.not_proven.extend((*LIMITS, *([NOT_MERGED] if self._withdrawals else [])))
        report.not_proven.append(self._collusion(member.domain, own, server))
        return report

    def _collusion(self, domain: str, own: _Log | None, server: _Log | None) -> str:
        """What only an independent witness could tell."""
        books = f"that {domain} and the server did not agree to keep the same false books"
        seen = [
            max((log.cosigned[name].size for name in self._witnesses if name in log.cosigned), default=0)
            for log in (own, server)
            if log is not None
        ]
        if len(seen) < 2 or not all(seen):
            return books
        return (
            f"{books} after entries {seen[0] - 1} and {seen[1] - 1}, the last that a witness saw; "
            f"before them, that {', '.join(sorted(self._witnesses))} did not help them"
        )

    def _not_isolated(self, domain: str) -> Iterator[str]:
        """What its headers say of the trainer: with 1, that it had no network and no keys."""
        headers = [parcel.header for parcel in self._parcels.values()]
        vectors = [header for header in headers if header.kind is Kind.TASK_VECTOR]
        said = Counter(header.training.get("isolated") for header in vectors if header.sender == domain)
        for word, what in ((0, "it had"), (None, "their headers do not say")):
            if said[word]:
                yield f"that the trainer of {said[word]} task vectors had no network and no keys: {what}"

    def _tally(self, report: DomainReport, log: _Log, *, is_own: bool) -> None:
        for crossing in log.crossings:
            if not is_own and crossing.peer != report.domain:
                continue
            sent = (crossing.direction == "out") == is_own
            tallies = report.sent if sent else report.received
            name = crossing.kind if crossing.type == "parcel" else crossing.type
            tally = tallies.setdefault(name, Tally())
            tally.count += 1
            tally.bytes += crossing.size_bytes
            parcel = self._parcels.get(crossing.digest)
            if sent and parcel is not None and parcel.header.privacy != Privacy():
                header = parcel.header
                report.add_spend(
                    {"run": header.run, "kind": header.kind.value, **header.privacy.model_dump()}
                )

    def _headers(self) -> dict[str, Header]:
        return {digest: parcel.header for digest, parcel in self._parcels.items()}

    def _check_withdrawals(self, log: _Log) -> None:
        """The server must accept no vector after it told of its revocation."""
        if log.shore == SERVER:
            for index in accepted_after(log.crossings, self._headers(), self._withdrawals):
                self._find(log.shore, index, "withdrawn", "a vector was accepted after it was withdrawn")

    def _withdrawn(
        self, log: _Log, domain: str, own: _Log | None, server: _Log | None
    ) -> list[dict[str, int | str]]:
        """The domain's vectors that were withdrawn, or that it asked to be: run, entry of the vector, the
        server's revocation (empty: none is in the ledgers), whether the domain was told, whether it asked."""
        heard = {crossing.digest for _, crossing in own.at("parcel", "in", SERVER)} if own else set()
        if server:
            receipts = (
                self._receipts.get(crossing.digest) for _, crossing in server.at("receipt", "in", domain)
            )
            heard |= {receipt.parcel_digest for receipt in receipts if receipt is not None}
        vectors = [
            (index, crossing)
            for index, crossing in enumerate(log.crossings)
            if crossing.type == "parcel" and domain in (log.shore, crossing.peer)
        ]
        found: list[dict[str, int | str]] = []
        for index, crossing in vectors:
            about = [known for known in self._withdrawals if known.said.vector == crossing.digest]
            revoked = [known.parcel for known in about if known.sender == SERVER]
            if about:
                found.append(
                    {
                        "run": about[0].run,
                        "shore": log.shore,
                        "index": index,
                        "vector": crossing.digest,
                        "revocation": revoked[0] if revoked else "",
                        "told": any(parcel in heard for parcel in revoked),
                        "asked": any(known.sender == domain for known in about),
                    }
                )
        return found

    def _repeats(self, log: _Log) -> None:
        """What is logged once must be there once (control messages may repeat)."""
        first: dict[tuple[str, ...], int] = {}
        for index, crossing in enumerate(log.crossings):
            key = (crossing.direction, crossing.type, crossing.digest, crossing.peer, crossing.verdict)
            if crossing.type != "message" and first.setdefault(key, index) != index:
                self._find(log.shore, index, "repeated", f"the same as entry {first[key]}")

    def _reconcile(self, own: _Log, server: _Log) -> None:
        for giver, taker in ((own, server), (server, own)):
            given = {crossing.digest for _, crossing in giver.at("parcel", "out", taker.shore)}
            for index, crossing in taker.at("parcel", "in", giver.shore):
                if crossing.verdict == "accepted" and crossing.digest not in given:
                    reason = f"{giver.shore}'s ledger never sent this parcel"
                    self._find(taker.shore, index, "never-sent", reason)
            receipts = {crossing.digest for _, crossing in giver.at("receipt", "out", taker.shore)}
            for index, crossing in taker.at("receipt", "in", giver.shore):
                if crossing.digest not in receipts:
                    self._find(
                        taker.shore, index, "never-sent", f"{giver.shore}'s ledger never gave this receipt"
                    )
            for type_ in ("message", "checkpoint", "keys"):
                spoken = Counter(crossing.digest for _, crossing in giver.at(type_, "out", taker.shore))
                spoken.update(crossing.digest for _, crossing in giver.at(type_, "out", EVERYONE))
                for index, crossing in taker.at(type_, "in", giver.shore):
                    spoken[crossing.digest] -= 1
                    if spoken[crossing.digest] < 0:
                        reason = f"{giver.shore}'s ledger never sent this {type_}"
                        self._find(taker.shore, index, "never-sent", reason)

    def _unacknowledged(self, log: _Log, peer: str) -> list[dict[str, int | str]]:
        answered = {
            self._receipts[crossing.digest].parcel_digest
            for _, crossing in log.at("receipt", "in", peer)
            if crossing.digest in self._receipts
        }
        return [
            {"shore": log.shore, "index": index, "kind": crossing.kind, "digest": crossing.digest}
            for index, crossing in log.at("parcel", "out", peer)
            if crossing.digest not in answered
        ]


def _first_changed(path: Path, broken: int) -> int:
    """Which line was changed where line `broken` does not follow: it, or the one before it.

    If only its `prev` is wrong and the line after repeats its digest, it is as it was written: the one
    before it was changed.
    """
    line, after = [*islice(lines(path), broken, broken + 2), b"", b""][:2]
    entry, following = _entry(line), _entry(after)
    intact = entry.get("index") == broken and following.get("prev") == sha256_bytes(line[:-1])
    return broken - 1 if intact and broken else broken


def _entry(line: bytes) -> dict[str, Any]:
    try:
        record = canonical.decode(line[:-1], max_bytes=LINE_BYTES)
    except ParcelError:
        return {}
    return record if isinstance(record, dict) else {}
