"""Where the merge server keeps parcels: objects by content, a journal of what was accepted, a spool.

    objects/sha256/ab/abcd...   envelopes and payloads, named by their SHA-256, never changed
    spool/<parcel digest>.part  payloads on their way in; what is there is where an upload resumes
    store.jsonl                 the journal: `parcel/`, `pending/`, `refused/`, `ack/`, `run/`,
                                `withdrawn/`

A parcel exists when its journal record does. Objects are durable before the record, the record before
the receipt is sent, so kill -9 at any point loses nothing and doubles nothing. The Exchange process and
the ServerApp process share one store.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, Field

from common.errors import StorageError
from common.files import copy_hashed, fsync_folder, sha256_bytes, storage_errors, write_atomic
from common.ledger import Journal
from common.parcels import Header, Kind, Parcel


class OpenRun(BaseModel):
    """What the server admits for one run. Kept in the journal, so the Exchange process sees it."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    run: str
    base_digest: str
    domains: frozenset[str]
    tensors: dict[str, tuple[int, ...]] = Field(description="trainable tensors of the base: name to shape")
    kinds: frozenset[Kind] = frozenset({Kind.DOMAIN_CARD, Kind.CATALOG, Kind.TASK_VECTOR, Kind.METRICS})
    rounds: int = Field(1, ge=1, description="rounds 0 to rounds-1 are open")
    metrics: frozenset[str] = Field(frozenset(), description="metric names that may be sent")
    max_norm: float = Field(gt=0, description="L2 norm of a task vector, all tensors together")
    max_payload_bytes: int = Field(4 << 30, ge=1)
    quota_bytes: int = Field(16 << 30, ge=1, description="payload bytes of one domain in this run")
    quota_parcels: int = Field(64, ge=1, description="parcels of one domain in this run")
    closed: bool = False


@dataclass(frozen=True)
class StoredParcel:
    """A journal record of a parcel, in (accepted) or out (published)."""

    digest: str
    direction: str
    kind: Kind
    run: str
    round: int
    sender: str
    recipient: str
    payload_digest: str
    payload_bytes: int
    nonce: str
    receipt: str = ""  # SHA-256 of the receipt's envelope; empty for what we published


class ParcelStore:
    """All parcels of one merge server, under `home`."""

    def __init__(self, home: Path) -> None:
        self.home = home
        self.spool_folder = home / "spool"
        with storage_errors(home):
            self.spool_folder.mkdir(parents=True, exist_ok=True)
        self.journal = Journal(home / "store.jsonl")

    # Objects

    def object_path(self, digest: str) -> Path:
        """Where the object with this SHA-256 is, or would be."""
        return self.home / "objects" / "sha256" / digest[:2] / digest

    def put_bytes(self, data: bytes) -> str:
        """Store `data`; returns its SHA-256. Raises StorageError when the disk is full."""
        digest = sha256_bytes(data)
        if not self.object_path(digest).exists():
            write_atomic(self.object_path(digest), data)
        return digest

    def read_bytes(self, digest: str) -> bytes:
        """A small object. Raises StorageError when it is missing or not what its name says."""
        try:
            data = self.object_path(digest).read_bytes()
        except FileNotFoundError:
            data = b""
        if sha256_bytes(data) != digest:
            raise StorageError(
                f"{self.object_path(digest)}: missing or damaged", next_step="restore the store from a copy"
            )
        return data

    # Coming in

    def spool_path(self, digest: str) -> Path:
        """The partial payload of the parcel with this digest."""
        return self.spool_folder / f"{digest}.part"

    def keep_payload(self, digest: str, payload_digest: str) -> None:
        """Give the complete, verified spool file of parcel `digest` its place among the objects.

        The spool's name stays until `forget_spool`, so that a crash in between can resume at the end.
        """
        target = self.object_path(payload_digest)
        if target.exists():
            return
        with storage_errors(target):
            target.parent.mkdir(parents=True, exist_ok=True)
            target.hardlink_to(self.spool_path(digest))
            fsync_folder(target.parent)

    def reserve(self, digest: str, header: Header) -> None:
        """Count a payload that is on its way against its sender's quota."""
        facts = {"run": header.run, "sender": header.sender, "payload_bytes": header.payload_bytes}
        self.journal.put(f"pending/{digest}", {**facts, "expires_s": header.expires_s})

    def forget_spool(self, digest: str) -> None:
        """Remove the partial payload, if any, and give its quota back."""
        self.spool_path(digest).unlink(missing_ok=True)
        if self.journal.get(f"pending/{digest}"):
            self.journal.put(f"pending/{digest}", {})

    def usage(self, run: str, sender: str, *, but_not: str, now_s: int) -> tuple[int, int]:
        """(parcels, payload bytes) that `sender` has accepted or under way in `run`, one digest aside."""
        sizes = {
            stored.digest: stored.payload_bytes
            for stored in self.find(run=run, sender=sender)
            if stored.digest != but_not
        }
        for key, record in self.journal.items("pending/"):
            mine = record and (record["run"], record["sender"]) == (run, sender)
            if mine and record["expires_s"] > now_s and not key.endswith(but_not):
                sizes[key.removeprefix("pending/")] = record["payload_bytes"]
        return len(sizes), sum(sizes.values())

    def record_accepted(self, envelope: bytes, header: Header, receipt: bytes) -> StoredParcel:
        """Journal an accepted parcel together with the receipt that it gets. Raises StorageError."""
        stored = _stored("in", self.put_bytes(envelope), header, self.put_bytes(receipt))
        self.journal.put(f"parcel/{stored.digest}", asdict(stored))
        return stored

    def record_refused(self, digest: str, reason: str, text: str, receipt: bytes) -> None:
        """Journal a final refusal, so that the same bytes get the same answer."""
        record = {"reason": reason, "text": text, "receipt": self.put_bytes(receipt)}
        self.journal.put(f"refused/{digest}", record)

    def refusal(self, digest: str) -> tuple[str, str, bytes] | None:
        """Reason, text and receipt of a final refusal, or None."""
        record = self.journal.get(f"refused/{digest}")
        return (record["reason"], record["text"], self.read_bytes(record["receipt"])) if record else None

    def receipt(self, digest: str) -> bytes | None:
        """The receipt that was given for an accepted parcel, or None."""
        record = self.journal.get(f"parcel/{digest}")
        return self.read_bytes(record["receipt"]) if record and record["receipt"] else None

    # Going out

    def publish(self, parcel: Parcel) -> StoredParcel:
        """Take a sealed parcel of ours for download by its recipient ("*": every member); idempotent.

        Raises StorageError when the disk is full or the payload is not what the header says.
        """
        target = self.object_path(parcel.header.payload_digest)
        if not target.exists():
            found, _ = copy_hashed(parcel.payload, target)
            if found != parcel.header.payload_digest:
                target.unlink()
                raise StorageError(
                    f"{parcel.payload}: changed since its header was made", next_step="build the parcel again"
                )
        stored = _stored("out", self.put_bytes(parcel.envelope), parcel.header, "")
        self.journal.put(f"parcel/{stored.digest}", asdict(stored))
        return stored

    def record_acknowledged(self, digest: str, domain: str, receipt: bytes) -> None:
        """Keep the receipt that `domain` gave for a published parcel."""
        self.journal.put(f"ack/{digest}/{domain}", {"receipt": self.put_bytes(receipt)})

    def acknowledged(self, digest: str) -> list[str]:
        """Domains that have returned a receipt for this parcel."""
        return [key.rpartition("/")[2] for key, _ in self.journal.items(f"ack/{digest}/")]

    # Looking up

    def records(self) -> Iterator[StoredParcel]:
        """Every parcel's record, in and out."""
        for _, record in self.journal.items("parcel/"):
            yield StoredParcel(**{**record, "kind": Kind(record["kind"])})

    def find(self, *, direction: str = "in", **wanted: Any) -> list[StoredParcel]:
        """Parcels whose fields equal `wanted` (run=, kind=, sender=, round=, recipient=)."""
        wanted["direction"] = direction
        return [
            stored
            for stored in self.records()
            if all(getattr(stored, field) == value for field, value in wanted.items())
        ]

    def get(self, digest: str) -> Parcel | None:
        """The parcel with this digest, or None."""
        if self.journal.get(f"parcel/{digest}") is None:
            return None
        envelope = self.read_bytes(digest)
        header = Header.stored(envelope)
        return Parcel(envelope, header, self.object_path(header.payload_digest))

    # Withdrawn

    def withdraw(self, digest: str) -> None:
        """From now on admit no vector with this payload digest, and give out no parcel with this digest."""
        self.journal.put(f"withdrawn/{digest}", {})

    def is_withdrawn(self, digest: str) -> bool:
        """Whether a vector's payload, or a published parcel, was withdrawn."""
        return self.journal.get(f"withdrawn/{digest}") is not None

    def forget_object(self, digest: str) -> None:
        """Remove an object's file; parcels and ledger entries that name it stay."""
        self.object_path(digest).unlink(missing_ok=True)

    # Runs

    def open_run(self, run: OpenRun) -> None:
        """Admit parcels for this run from now on, in every process that shares the store."""
        self.journal.put(f"run/{run.run}", run.model_dump(mode="json"))

    def close_run(self, name: str) -> None:
        """Admit nothing more for this run; what was accepted stays."""
        run = self.run(name)
        if run is not None:
            self.open_run(run.model_copy(update={"closed": True}))

    def run(self, name: str) -> OpenRun | None:
        """The run of this name, or None."""
        record = self.journal.get(f"run/{name}")
        return OpenRun.model_validate(record) if record else None

    def free_bytes(self) -> int:
        """Bytes that the store's disk can still take."""
        found = os.statvfs(self.home)
        return found.f_bavail * found.f_frsize


def _stored(direction: str, digest: str, header: Header, receipt: str) -> StoredParcel:
    return StoredParcel(
        digest=digest,
        direction=direction,
        kind=header.kind,
        run=header.run,
        round=header.round,
        sender=header.sender,
        recipient=header.recipient,
        payload_digest=header.payload_digest,
        payload_bytes=header.payload_bytes,
        nonce=header.nonce,
        receipt=receipt,
    )
