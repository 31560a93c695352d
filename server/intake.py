"""Taking parcels in: the I/O around `server.admission`, without any network.

`Intake.begin` answers an envelope: a receipt that was given before, a refusal, or an `Upload` that takes
the payload from `offset` on. An upload survives cut links and kill -9, because the spool file is named
by the envelope's digest and hashed again when it resumes. What is accepted is durable in the store, in
the ledger and in the journal, in that order, before the receipt leaves; receipts are made from the
ledger entry alone, so the same parcel always gets the same receipt.
"""

from __future__ import annotations

import hashlib
import os
import threading
import time
from collections.abc import Callable
from pathlib import Path

from common.errors import IsthmusError, LedgerError, ParcelError, RefusedError, StorageError, TransportError
from common.files import CHUNK_BYTES, sha256_bytes, storage_errors, write_all
from common.ledger import Crossing, Entry, Ledger
from common.parcels import SERVER, Header, Kind, Receipt
from common.payloads import PayloadFacts, inspect
from common.signing import Sealed, SigningKey
from server.admission import KEY_REPLACED, Admission, Known
from server.members import Member, Members
from server.store import OpenRun, ParcelStore

SPARE_BYTES = 64 << 20


class SignedRefusalError(RefusedError):
    """A refusal as it is sent: reason, text, and a signed receipt if the sender is known."""

    def __init__(self, reason: str, text: str, receipt: bytes = b"") -> None:
        super().__init__(text, reason=reason)
        self.receipt = receipt


class Upload:
    """One payload on its way into the spool. Use `write` from `offset` on, then `finish`; `close` always."""

    def __init__(self, intake: Intake, envelope: bytes, header: Header, member: Member) -> None:
        self.envelope, self.header, self.member = envelope, header, member
        self.digest = sha256_bytes(envelope)
        self._intake = intake
        self._path = intake.store.spool_path(self.digest)
        self._lock = threading.Lock()
        self._hash = hashlib.sha256()
        with storage_errors(self._path):
            self._descriptor = os.open(self._path, os.O_RDWR | os.O_CREAT, 0o600)
        self.offset = self._hash_what_is_there()
        self.received_bytes = self.offset
        self.payload_digest = ""  # of what arrived, once it is complete

    def _hash_what_is_there(self) -> int:
        """Bytes that an earlier attempt left; they count only once the whole has been verified."""
        size_bytes = os.fstat(self._descriptor).st_size
        if size_bytes > self.header.payload_bytes:
            os.ftruncate(self._descriptor, 0)
            return 0
        while chunk := os.read(self._descriptor, CHUNK_BYTES):
            self._hash.update(chunk)
        return size_bytes

    def write(self, chunk: bytes) -> None:
        """Append to the spool.

        Raises StorageError, SignedRefusalError (too long), TransportError (taken over).
        """
        with self._lock:
            self._require_open()
            if self.received_bytes + len(chunk) > self.header.payload_bytes:
                self._discard()
                raise self._intake.refuse(
                    self.envelope, self.header, "payload-digest", "more payload than the header names"
                )
            try:
                with storage_errors(self._path):
                    write_all(self._descriptor, chunk)
            except StorageError:
                self._discard()
                raise
            self._hash.update(chunk)
            self.received_bytes += len(chunk)

    def finish(self) -> bytes:
        """The receipt of the complete payload.

        Raises SignedRefusalError, StorageError, TransportError (incomplete: resume later).
        """
        with self._lock:
            self._require_open()
            if self.received_bytes < self.header.payload_bytes:
                raise TransportError("the payload is not complete", next_step="resume from the offset")
            with storage_errors(self._path):
                os.fsync(self._descriptor)
            self.payload_digest = self._hash.hexdigest()
            if self.payload_digest != self.header.payload_digest and self.offset:
                self._discard()  # the older part may have been lost in a crash: not the sender's fault
                raise TransportError("the resumed payload does not match", next_step="send it from the start")
            self._close()
        return self._intake.settle(self)

    def close(self) -> None:
        """Let go of the spool file; what is in it stays for a resume."""
        with self._lock:
            self._close()

    def _require_open(self) -> None:
        if self._descriptor < 0:
            raise TransportError("another connection took this upload over")

    def _discard(self) -> None:
        self._close()
        self._intake.store.forget_spool(self.digest)

    def _close(self) -> None:
        if self._descriptor >= 0:
            os.close(self._descriptor)
            self._descriptor = -1


class Intake:
    """Takes parcels from members into `store`; thread-safe, and safe beside other processes."""

    def __init__(
        self,
        store: ParcelStore,
        ledger: Ledger,
        members: Members,
        key: SigningKey,
        *,
        clock: Callable[[], float] = time.time,
    ) -> None:
        self.store, self.ledger, self.members = store, ledger, members
        self._key = key
        self._clock = clock
        self._admission = Admission()
        self._uploads: dict[str, Upload] = {}
        self._guard = threading.Lock()

    def begin(self, envelope: bytes, peer_fingerprint: str) -> bytes | Upload:
        """The receipt given before, or an upload to fill. Raises SignedRefusalError, StorageError."""
        digest = sha256_bytes(envelope)
        header: Header | None = None
        try:
            header, member = self._identify(envelope, peer_fingerprint)
            given = self._given_before(digest, header)
            if given is not None:
                return given
            self._admission.check_header(header, digest, self._known(header, digest))
        except SignedRefusalError:
            raise
        except RefusedError as err:
            raise self.refuse(envelope, header, err.reason, err.message) from None
        missing_bytes = header.payload_bytes - self._spooled_bytes(digest)
        if self.store.free_bytes() < missing_bytes + SPARE_BYTES:
            raise StorageError("the server's disk is full", next_step="ask its operator to free space")
        self.store.reserve(digest, header)
        return self._take_over(envelope, header, member)

    def _identify(self, envelope: bytes, peer_fingerprint: str) -> tuple[Header, Member]:
        try:
            key_id = Sealed.parse(envelope).key_id
        except ParcelError:
            key_id = ""
        signer = self.members.by_key_id(key_id)
        if signer is None and self.members.has_retired(key_id):
            raise RefusedError(KEY_REPLACED, reason="rotated")
        header, member = self._admission.read_header(envelope, signer)
        self._admission.check_sender(header, member, peer_fingerprint)
        return header, member

    def _given_before(self, digest: str, header: Header) -> bytes | None:
        """The receipt of an accepted parcel, or None. Raises SignedRefusalError if it was refused.

        It is put into the ledger here, too: a crash may have come between the journal and that.
        """
        refusal = self.store.refusal(digest)
        receipt = self.store.receipt(digest) if refusal is None else refusal[2]
        if receipt is not None:
            self.record_receipt_out(header, receipt)
        if refusal is not None:
            raise SignedRefusalError(*refusal)
        return receipt

    def _known(self, header: Header, digest: str) -> Known:
        now_s = int(self._clock())
        parcels, size_bytes = self.store.usage(header.run, header.sender, but_not=digest, now_s=now_s)
        return Known(
            run=self.store.run(header.run),
            nonces={stored.nonce: stored.digest for stored in self.store.find(sender=header.sender)},
            used_parcels=parcels,
            used_bytes=size_bytes,
            now_s=now_s,
            withdrawn=self.store.is_withdrawn(header.payload_digest),
        )

    def _spooled_bytes(self, digest: str) -> int:
        path = self.store.spool_path(digest)
        return path.stat().st_size if path.exists() else 0

    def _take_over(self, envelope: bytes, header: Header, member: Member) -> Upload:
        """The newest connection wins: an older one that hangs must not keep its sender out."""
        digest = sha256_bytes(envelope)
        with self._guard:
            older = self._uploads.pop(digest, None)
            if older is not None:
                older.close()
            upload = self._uploads[digest] = Upload(self, envelope, header, member)
            return upload

    def settle(self, upload: Upload) -> bytes:
        """Decide about a complete payload in the spool; the receipt, or SignedRefusalError."""
        header, digest = upload.header, upload.digest
        spool = self.store.spool_path(digest)
        try:
            self._admission.check_digest(header, upload.payload_digest, upload.received_bytes)
            facts = self._inspect(spool, header)
            self._admission.check_payload(header, facts, self._run(header), self._vectors(header))
        except RefusedError as err:
            self.store.forget_spool(digest)
            raise self.refuse(upload.envelope, header, err.reason, err.message, final=True) from None
        self.store.keep_payload(digest, header.payload_digest)
        key_id = Sealed.parse(upload.envelope).key_id
        with self.store.journal.locked(), self.ledger.locked():  # no key changes between check and entry
            try:
                self._admission.check_standing(self.members.get(header.sender), key_id)
                self._admission.check_header(header, digest, self._known(header, digest))
            except RefusedError as err:
                self.store.forget_spool(digest)
                raise self.refuse(upload.envelope, header, err.reason, err.message) from None
            if header.kind is Kind.REVOCATION:  # its owner's word is enough: it is merged no more
                self.store.withdraw(str(facts.values["payload"]))
            entry = self._record(upload.envelope, header, header.sender, "accepted")
            receipt = self._receipt(digest, header, entry, "")
            self.store.record_accepted(upload.envelope, header, receipt)
        self.store.forget_spool(digest)
        with self._guard:
            self._uploads.pop(digest, None)
        self.record_receipt_out(header, receipt)
        return receipt

    def _run(self, header: Header) -> OpenRun:
        run = self.store.run(header.run)
        if run is None:
            raise RefusedError("the run is gone", reason="wrong-run")
        return run

    def _vectors(self, header: Header) -> dict[str, str]:
        """The sender's task vectors in this run: parcel to payload."""
        found = self.store.find(run=header.run, sender=header.sender, kind=Kind.TASK_VECTOR)
        return {stored.digest: stored.payload_digest for stored in found}

    def _inspect(self, spool: Path, header: Header) -> PayloadFacts:
        try:
            return inspect(spool, header)
        except (StorageError, LedgerError, RefusedError):
            raise
        except IsthmusError as err:
            text = err.message.replace(str(spool), "payload")
            raise RefusedError(text, reason="payload") from None

    def refuse(
        self, envelope: bytes, header: Header | None, reason: str, text: str, *, final: bool = False
    ) -> SignedRefusalError:
        """Record a refusal and make what is sent of it; `final` ones are answered alike for ever."""
        digest = sha256_bytes(envelope)
        entry = self._record(envelope, header, header.sender if header else "unknown", reason)
        if header is None:
            return SignedRefusalError(reason, text)
        receipt = self._receipt(digest, header, entry, reason)
        if final:
            self.store.record_refused(digest, reason, text, receipt)
        self.record_receipt_out(header, receipt)
        return SignedRefusalError(reason, text, receipt)

    def _record(self, envelope: bytes, header: Header | None, peer: str, verdict: str) -> Entry:
        payload_bytes = header.payload_bytes if header and verdict == "accepted" else 0
        return self.ledger.record_once(
            Crossing(
                direction="in",
                channel="data",
                type="parcel",
                digest=sha256_bytes(envelope),
                size_bytes=len(envelope) + payload_bytes,
                peer=peer,
                kind=header.kind.value if header else "",
                run=header.run if header else "",
                verdict=verdict,
                time_s=int(self._clock()),
            )
        )

    def _receipt(self, digest: str, header: Header, entry: Entry, reason: str) -> bytes:
        return Receipt(
            kind=header.kind,
            run=header.run,
            sender=header.sender,
            receiver=SERVER,
            parcel_digest=digest,
            payload_digest=header.payload_digest,
            verdict="refused" if reason else "accepted",
            reason=reason,
            time_s=entry.body["time_s"],
            **self.ledger.place(entry.index),
        ).seal(self._key)

    def record_receipt_out(self, header: Header, receipt: bytes) -> None:
        """Keep and ledger a receipt of ours before it is sent."""
        self.store.put_bytes(receipt)
        self.ledger.record_once(
            Crossing(
                direction="out",
                channel="data",
                type="receipt",
                digest=sha256_bytes(receipt),
                size_bytes=len(receipt),
                peer=header.sender,
                kind=header.kind.value,
                run=header.run,
                time_s=int(self._clock()),
            )
        )
