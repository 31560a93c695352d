"""The egress gate: the one place where bytes leave an owner, and the only holder of its identity key.

It fails closed: what the policy does not name does not pass, and what cannot be read does not pass.

- Parcels (`release`): kind, run, base model, header fields, size and count budgets; the payload is first
  copied into the gate's outbox, and that copy is what is checked, signed and sent. A task vector is written
  anew there (`common.tensorfile.rewrite`), rounded to the declared codec: the header speaks of that file. It
  has exactly the base's trainable tensors, no embedding table, finite values, a bounded norm, and no tensor
  of which only some rows were touched (they would name what the data touched).
  A catalog is byte for byte what our writer makes of its rows. JSON holds allowed names and rounded
  numbers only; metrics need enough users behind them.
- Replies on the control channel (`release_reply`): allowed fields; codes, digests and numbers. Whatever
  is not a code where a code belongs becomes the code `error`, so no exception text leaves.
- Receipts (`release_receipt`), and checkpoints of the own ledger (`release_checkpoint`).

All of it is in the ledger before it is returned. What passes still says something about the data: a
vector is not anonymous, and the low bits of what the codec keeps are not inspected.
"""

from __future__ import annotations

import json
import re
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from clients.policy import EgressPolicy
from clients.privacy import check_claim, privacy_of
from common.catalog import Catalog
from common.errors import GateError, IsthmusError, ParcelError, RefusedError, SignatureError, StorageError
from common.files import copy_hashed, fsync_folder, sha256_bytes, sha256_file, write_atomic
from common.ledger import Crossing, Journal, Ledger
from common.notes import Checkpoint, Note
from common.parcels import SERVER, Header, Kind, Parcel, Receipt, bucket, seal_parcel
from common.payloads import (
    METRIC_DECIMALS,
    THOUSANDTHS,
    PayloadFacts,
    check_fitness,
    check_table,
    check_tensors,
    check_value,
    inspect,
)
from common.revocation import Revocation
from common.rotation import Rotation
from common.signing import PublicKey, SigningKey
from common.statements import CODE_PATTERN
from common.tensorfile import rewrite, tensor_facts

_CODE = re.compile(CODE_PATTERN)
_ANOTHER = "the payload is not the one that the header names"
ReplyValue = str | int | float


@dataclass(frozen=True)
class Agreement:
    """What the owner checked on its own about a run before anything may leave for it."""

    run: str
    base_digest: str
    tensors: Mapping[str, tuple[int, ...]]  # trainable tensors of the owner's own copy of the base
    labels: frozenset[str]  # models that metrics may speak of: "LABEL/METRIC"


class EgressGate:
    """Lets parcels, receipts and replies of domain `sender` out, or raises GateError."""

    def __init__(
        self,
        policy: EgressPolicy,
        key: SigningKey,
        ledger: Ledger,
        journal: Journal,
        outbox: Path,
        *,
        sender: str,
        clock: Callable[[], float] = time.time,
    ) -> None:
        self.policy, self.ledger, self.journal, self.sender = policy, ledger, journal, sender
        self._key = key
        self._outbox = outbox
        self._clock = clock
        self._agreements: dict[str, Agreement] = {}
        outbox.mkdir(parents=True, exist_ok=True, mode=0o700)

    @property
    def public_key(self) -> PublicKey:
        """This domain's identity."""
        return self._key.public

    def agree(
        self, run: str, base_digest: str, tensors: Mapping[str, tuple[int, ...]], labels: Iterable[str] = ()
    ) -> None:
        """Allow parcels for `run`, about this base and its trainable tensors (name to shape)."""
        self._agreements[run] = Agreement(run, base_digest, dict(tensors), frozenset(labels))

    def release(self, header: Header, payload: Path) -> Parcel:
        """Check and sign; the same payload for the same run, round and kind gives the same parcel again.

        The header's ledger checkpoint is set here. Raises GateError, StorageError, and RefusedError
        (`withdrawn`) for a vector that was taken back.
        """
        key = f"release/{header.run}/{header.round}/{header.kind}/{header.payload_digest}"
        parcel = self._released_before(key)
        if parcel is None:
            with self._closed():
                self._check_header(header)
                if header.kind is Kind.TASK_VECTOR:
                    check_claim(header.privacy, payload, self.policy.privacy, self.journal)
                header, copy = self._own_copy(header, payload)
                self._check_header(header)
                self._check_payload(header, copy)
            sealed = header.model_copy(update={"checkpoint": self.ledger.tree_head()})
            parcel = seal_parcel(sealed, copy, self._key)
            with self.journal.locked():
                self._check_budget(header)
                write_atomic(self._envelope_path(parcel.digest), parcel.envelope)
                facts = {"digest": parcel.digest, "payload_bytes": header.payload_bytes}
                facts["privacy"] = header.privacy.model_dump()
                self.journal.put(key, facts)
        header = parcel.header
        if self.journal.get(f"withdrawn/{header.payload_digest}") is not None:
            raise RefusedError("this vector was withdrawn: it is not sent again", reason="withdrawn")
        self._log("parcel", parcel.envelope, header.payload_bytes, header.kind, header.run)
        self.journal.put(f"released/{parcel.digest}", {})  # on every call: a crash may have come before it
        return parcel

    def is_released(self, digest: str) -> bool:
        """Whether the parcel with this digest passed here."""
        return self.journal.get(f"released/{digest}") is not None

    def release_receipt(self, digest: str, header: Header, *, index: int) -> bytes:
        """A signed receipt for a parcel that came in and stands at `index` of the ledger."""
        envelope = Receipt(
            kind=header.kind,
            run=header.run,
            sender=header.sender,
            receiver=self.sender,
            parcel_digest=digest,
            payload_digest=header.payload_digest,
            verdict="accepted",
            reason="",
            time_s=self.ledger[index].body["time_s"],
            **self.ledger.place(index),
        ).seal(self._key)
        self.keep_receipt(envelope)
        self._log("receipt", envelope, 0, header.kind, header.run)
        return envelope

    def keep_receipt(self, envelope: bytes) -> None:
        """Keep a receipt, ours or the server's, for whoever audits. Raises StorageError."""
        write_atomic(self._outbox / f"{sha256_bytes(envelope)}.receipt", envelope)

    def release_checkpoint(self, note: str, peer: str, size: int) -> None:
        """Let a checkpoint of the own ledger go to the server or a witness; `size` bytes with its proof.

        Raises GateError when it is anything else, StorageError.
        """
        with self._closed():
            self._check_checkpoint(note)
        self.ledger.record(Crossing.of_checkpoint("out", peer, note, size))

    def release_rotation(self, rotation: Rotation) -> None:
        """Let new keys of this owner go to the server. Raises GateError (another's keys), StorageError."""
        if (rotation.keys.shore, rotation.keys.replaces) != (self.sender, self._key.public.hex):
            raise GateError("this rotation does not replace this owner's key")
        self.ledger.record_once(Crossing.of_keys("out", SERVER, rotation.data))

    def release_reply(self, fields: Mapping[str, ReplyValue]) -> dict[str, ReplyValue]:
        """What of `fields` may go into a control record. Raises GateError for a field off the list."""
        reply: dict[str, ReplyValue] = {}
        for name, value in sorted(fields.items()):
            if name not in self.policy.reply_fields:
                raise GateError(f"reply field {name[:40]!r} is not allowed", next_step="add it to the policy")
            reply[name] = round(value, METRIC_DECIMALS) if isinstance(value, float) else value
            try:
                check_value(name, reply[name])
            except ParcelError:
                reply[name] = "error"
        content = json.dumps(reply, sort_keys=True).encode()
        self._log("message", content, 0, "message", str(reply.get("run", "")))
        return reply

    # The rules

    def _check_header(self, header: Header) -> None:
        policy, agreement = self.policy, self._agreement(header)
        if header.kind not in policy.kinds or header.codec not in policy.codecs:
            raise GateError(f"{header.kind} in codec {header.codec} is not allowed by the policy")
        if (header.sender, header.recipient) != (self.sender, SERVER):
            raise GateError(f"a parcel goes from {self.sender!r} to {SERVER!r} only")
        if header.base_digest != agreement.base_digest:
            raise GateError(f"base model {header.base_digest[:12]} is not the one agreed for this run")
        if header.expires_s <= self._clock():
            raise GateError("the header has expired; make a new one")
        for name in header.training:
            if name not in policy.training_facts and not (name == "shared" and policy.share_adapter):
                raise GateError(f"training fact {name!r} is not allowed by the policy")
        _check_buckets(header.training)
        if header.payload_bytes > policy.max_payload_bytes:
            raise GateError(
                f"payload of {header.payload_bytes} bytes, {policy.max_payload_bytes} are allowed"
            )

    def _check_tensor_table(self, header: Header) -> None:
        for fact in header.tensors:
            if fact.is_table:
                raise GateError(f"tensor {fact.name}: an embedding table never leaves")
        check_table(header, self._agreement(header).tensors)
        self.policy.check_tensors({fact.name: fact.shape for fact in header.tensors})

    def _check_payload(self, header: Header, copy: Path) -> None:
        facts = inspect(copy, header)
        if (facts.digest, facts.size_bytes) != (header.payload_digest, header.payload_bytes):
            raise GateError(_ANOTHER)
        if header.kind.holds_tensors:
            self._check_tensor_table(header)
            check_tensors(header, facts, max_norm=self.policy.max_norm)
            for reading in facts.tensors:
                if reading.row_gap > self.policy.max_row_gap:
                    raise GateError(
                        f"tensor {reading.name}: some rows untouched, which tells what was touched"
                    )
        elif header.kind is Kind.CATALOG:
            self._check_catalog(header, facts, copy)
        elif header.kind is Kind.METRICS:
            self._check_metrics(header, facts)
        elif header.kind is Kind.FITNESS:
            self._check_fitness(header, facts)
        elif header.kind is Kind.REVOCATION:
            said = Revocation.decode(copy.read_bytes())
            if said.models or not self.is_released(said.vector):
                raise GateError("a revocation names a vector that passed here, and nothing else")
        else:
            for name in facts.values:
                if name not in self.policy.card_fields:
                    raise GateError(f"card field {name}: not allowed by the policy")
            _check_buckets(facts.values)

    def _check_catalog(self, header: Header, facts: PayloadFacts, copy: Path) -> None:
        if facts.catalog_domain != self.sender:
            raise GateError("the catalog is another domain's")
        again = copy.with_suffix(".again")
        try:
            Catalog.read(copy).write(again)
            if sha256_file(again) != header.payload_digest:
                raise GateError(
                    "the catalog file holds more than its rows", next_step="write it with Catalog.write"
                )
        finally:
            again.unlink(missing_ok=True)

    def _check_metrics(self, header: Header, facts: PayloadFacts) -> None:
        labels = self._agreement(header).labels
        for name, value in facts.values.items():
            label, _, metric = name.rpartition("/")
            if metric not in self.policy.metrics or (label and label not in labels):
                raise GateError(f"metric {name}: not allowed by the policy")
            if isinstance(value, str):
                raise GateError(f"metric {name}: not a number")
        if header.training.get("users_bucket", 0) < self.policy.min_users:
            raise GateError(
                f"metrics need `users_bucket` of at least {self.policy.min_users} in the header",
                next_step="evaluate on more users, or lower min_users in the policy",
            )

    def _check_fitness(self, header: Header, facts: PayloadFacts) -> None:
        check_fitness(facts.values)
        most = THOUSANDTHS * self.policy.answers.clip
        if any(value > most for value in facts.values.values() if isinstance(value, int)):
            raise GateError("a loss is above what `answers.clip` of the policy lets one be")
        if header.privacy != privacy_of(self.policy.answers):
            raise GateError("the header's privacy facts are not those of `answers` in the policy")

    def _check_budget(self, header: Header) -> None:
        spent = [facts["payload_bytes"] for _, facts in self.journal.items(f"release/{header.run}/")]
        if len(spent) + 1 > self.policy.max_run_parcels:
            raise GateError(f"run {header.run}: {len(spent)} parcels have left, no more are allowed")
        if sum(spent) + header.payload_bytes > self.policy.max_run_bytes:
            raise GateError(
                f"run {header.run}: {sum(spent)} bytes have left, too little is left of the budget"
            )

    def _check_checkpoint(self, note: str) -> None:
        parsed = Note.parse(note)
        checkpoint = Checkpoint.read(parsed.text)
        head = self.ledger.tree_head(checkpoint.size)
        if (head.root, len(parsed.signatures)) != (checkpoint.root.hex(), 1):
            raise GateError("this is not a checkpoint of the own ledger with one signature")
        if not checkpoint.origin.startswith(f"isthmus/{self.sender}/"):
            raise GateError("the checkpoint is of another log")

    def _agreement(self, header: Header) -> Agreement:
        agreement = self._agreements.get(header.run)
        if agreement is None:
            raise GateError(
                f"nothing was agreed for run {header.run!r}", next_step="check its base model first"
            )
        return agreement

    # The outbox and the ledger

    @contextmanager
    def _closed(self) -> Iterator[None]:
        """Whatever a check cannot read does not pass."""
        try:
            yield
        except (GateError, StorageError):
            raise
        except (RefusedError, IsthmusError) as err:
            raise GateError(err.message, next_step="nothing was sent") from err

    def _own_copy(self, header: Header, payload: Path) -> tuple[Header, Path]:
        """The payload as it will be sent, and the header that speaks of it."""
        if not header.kind.holds_tensors:
            return header, self._copy(header, payload)
        if sha256_file(payload) != header.payload_digest:
            raise GateError(_ANOTHER)
        written = self._outbox / f".{header.payload_digest}.tmp"
        try:
            rewrite(payload, written, header.codec.dtype)
            digest = sha256_file(written)
            of_the_copy = {
                "payload_digest": digest,
                "payload_bytes": written.stat().st_size,
                "tensors": tensor_facts(written),
            }
            written.replace(copy := self._outbox / f"{digest}.payload")
        finally:
            written.unlink(missing_ok=True)
        fsync_folder(self._outbox)
        return Header.checked({**header.model_dump(mode="json"), **of_the_copy}), copy

    def _copy(self, header: Header, payload: Path) -> Path:
        copy = self._outbox / f"{header.payload_digest}.payload"
        if not (copy.exists() and sha256_file(copy) == header.payload_digest):
            digest, _ = copy_hashed(payload, copy)
            if digest != header.payload_digest:
                copy.unlink()
                raise GateError(_ANOTHER)
        return copy

    def _envelope_path(self, digest: str) -> Path:
        return self._outbox / f"{digest}.dsse"

    def _released_before(self, key: str) -> Parcel | None:
        known = self.journal.get(key)
        if known is None:
            return None
        envelope = self._envelope_path(known["digest"]).read_bytes()
        try:
            header = Header.open(envelope, self._key.public)
        except SignatureError:
            return None  # signed with a key that was replaced since
        copy = self._outbox / f"{header.payload_digest}.payload"
        if header.expires_s <= self._clock() or not copy.exists():
            return None
        return Parcel(envelope, header, copy)

    def _log(
        self,
        type_: Literal["parcel", "receipt", "message"],
        content: bytes,
        payload_bytes: int,
        kind: str,
        run: str,
    ) -> None:
        crossing = Crossing(
            direction="out",
            channel="control" if type_ == "message" else "data",
            type=type_,
            digest=sha256_bytes(content),
            size_bytes=len(content) + payload_bytes,
            peer=SERVER,
            kind=str(kind),
            run=run,
            time_s=int(self._clock()),
        )
        record = self.ledger.record if type_ == "message" else self.ledger.record_once
        record(crossing)


def _check_buckets(facts: Mapping[str, ReplyValue]) -> None:
    for name, value in facts.items():
        if name.endswith("_bucket") and (not isinstance(value, int) or bucket(value) != value):
            raise GateError(f"{name}: counts leave in buckets only (common.parcels.bucket)")
