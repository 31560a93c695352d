"""The owner's side of the data channel: send what the gate released, fetch what was published.

Both directions resume where a broken link or a killed process left them, and both are idempotent: a
parcel whose receipt is in the journal is not sent again, a parcel that was fetched is not fetched again.
A receipt and a published parcel count only when they verify under the server's pinned key. Connections
go straight to the server; proxies from the environment are not used.
"""

from __future__ import annotations

import hashlib
import os
import queue
import re
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import grpc

from clients.egress import EgressGate
from common.errors import GateError, ParcelError, SignatureError, TransportError
from common.files import CHUNK_BYTES, fsync_folder, sha256_bytes, sha256_file, storage_errors, write_atomic
from common.ledger import Crossing
from common.parcels import EVERYONE, SERVER, SKEW_S, Header, Parcel, Receipt
from common.signing import PublicKey, SigningKey
from common.statements import DIGEST_PATTERN
from common.tls import TlsFiles
from common.wire import exchange_pb2 as pb
from common.wire import exchange_pb2_grpc as rpc
from common.wire.enrolment import EnrolmentFacts
from common.wire.link import CALL_S, connect, raise_refused, retried, translated

OnBytes = Callable[[int], None]
"""Called with how many payload bytes of this parcel are across so far."""

T = TypeVar("T")


@dataclass(frozen=True)
class ServerStatus:
    """What the Exchange says about itself."""

    version: str
    server_key: str
    ledger_size: int
    ledger_head: str
    time_s: int


class ExchangeClient:
    """One owner's connection to the Exchange at `address` (host:port)."""

    def __init__(
        self,
        address: str,
        tls: TlsFiles,
        gate: EgressGate,
        server_key: PublicKey,
        *,
        retry_for_s: float = 300.0,
        sleep: Callable[[float], None] = time.sleep,
    ) -> None:
        self._address, self._tls = address, tls
        self._gate, self._ledger, self._journal = gate, gate.ledger, gate.journal
        self._server_key = server_key
        self._retry_for_s, self._sleep = retry_for_s, sleep

    def send(self, parcel: Parcel, on_bytes: OnBytes | None = None) -> Receipt:
        """Send a released parcel, resuming as often as needed; the server's verified receipt.

        Raises GateError (not released), RefusedError (with the server's reason), SignatureError,
        ParcelError or ProofError (a receipt that is not the server's word on this parcel, or that does not
        prove that it is in its ledger), TransportError (gave up; calling again resumes).
        """
        if not self._gate.is_released(parcel.digest):
            raise GateError("this parcel did not pass the gate", next_step="release it first")
        known = self._journal.get(f"sent/{parcel.digest}")
        if known is not None:
            return self._verified(bytes.fromhex(known["receipt"]), parcel, "accepted")
        envelope = self._retried(lambda: self._send_once(parcel, on_bytes))
        receipt = self._verified(envelope, parcel, "accepted")
        self._gate.keep_receipt(envelope)
        self._log_in("receipt", envelope, 0, parcel.header, "accepted")
        self._journal.put(f"sent/{parcel.digest}", {"receipt": envelope.hex()})
        return receipt

    def _send_once(self, parcel: Parcel, on_bytes: OnBytes | None) -> bytes:
        offsets: queue.Queue[int | None] = queue.Queue()
        with self._channel() as channel:
            replies = rpc.ExchangeStub(channel).Upload(_requests(parcel, offsets, on_bytes))
            try:
                for reply in replies:
                    verdict = reply.WhichOneof("verdict")
                    if verdict == "resume":
                        offsets.put(reply.resume.offset)
                    elif verdict in ("accepted", "already"):
                        return bytes(getattr(reply, verdict))
                    else:
                        self._refused(reply.refused, parcel)
            finally:
                offsets.put(None)
                replies.cancel()
        raise TransportError("the server ended the call without a verdict", next_step="try again")

    def _refused(self, refused: Any, parcel: Parcel) -> None:
        if refused.receipt:
            self._verified(refused.receipt, parcel, "refused")
            self._gate.keep_receipt(refused.receipt)
            self._log_in("receipt", refused.receipt, 0, parcel.header, refused.reason[:40])
        raise_refused(refused)

    def fetch(self, digest: str, folder: Path, on_bytes: OnBytes | None = None) -> Parcel:
        """Download the published parcel `digest` into `folder` as `DIGEST.dsse` and `DIGEST.payload`.

        Verified: envelope (its digest, the server's key), recipient, expiry, payload digest. The receipt
        is sent back. Raises RefusedError, SignatureError, ParcelError, StorageError, TransportError.
        """
        if not re.fullmatch(DIGEST_PATTERN, digest):
            raise ParcelError("a parcel is named by 64 hexadecimal digits")
        with storage_errors(folder):
            folder.mkdir(parents=True, exist_ok=True)
        parcel = self._fetched_before(digest, folder)
        if parcel is None:
            parcel = self._retried(lambda: self._fetch_once(digest, folder, on_bytes))
        size_bytes = parcel.header.payload_bytes
        entry = self._log_in("parcel", parcel.envelope, size_bytes, parcel.header, "accepted")
        self._journal.put(f"fetched/{digest}", {})
        if self._journal.get(f"acknowledged/{digest}") is None:
            receipt = self._gate.release_receipt(digest, parcel.header, index=entry)
            self._retried(lambda: self._acknowledge(receipt))
            self._journal.put(f"acknowledged/{digest}", {})
        return parcel

    def _fetch_once(self, digest: str, folder: Path, on_bytes: OnBytes | None) -> Parcel:
        part, payload = folder / f"{digest}.part", folder / f"{digest}.payload"
        with storage_errors(part):
            descriptor = os.open(part, os.O_RDWR | os.O_CREAT, 0o600)
        with os.fdopen(descriptor, "r+b") as target, self._channel() as channel:
            found = hashlib.file_digest(target, "sha256")
            offset = done = target.seek(0, os.SEEK_END)
            request = pb.DownloadRequest(digest=digest, offset=offset)
            header, envelope = None, b""
            for reply in rpc.ExchangeStub(channel).Download(request):
                match reply.WhichOneof("part"):
                    case "envelope" if header is None:
                        envelope = reply.envelope
                        header = self._published_header(digest, envelope)
                    case "chunk" if header is not None and done + len(reply.chunk) <= header.payload_bytes:
                        with storage_errors(part):
                            target.write(reply.chunk)
                        found.update(reply.chunk)
                        done += len(reply.chunk)
                        if on_bytes:
                            on_bytes(done)
                    case "refused":
                        raise_refused(reply.refused)
                    case _:
                        raise ParcelError("the server does not keep to the protocol")
            if header is None or done < header.payload_bytes:
                raise TransportError("the download ended early", next_step="try again; it resumes")
            with storage_errors(part):
                target.flush()
                os.fsync(target.fileno())
        if found.hexdigest() != header.payload_digest:
            part.unlink()
            if offset:
                raise TransportError(
                    "the resumed download does not match", next_step="try again from the start"
                )
            raise ParcelError("the payload is not the one that the server signed")
        write_atomic(folder / f"{digest}.dsse", envelope)
        part.replace(payload)
        fsync_folder(folder)
        return Parcel(envelope, header, payload)

    def _published_header(self, digest: str, envelope: bytes) -> Header:
        if sha256_bytes(envelope) != digest:
            raise ParcelError("the server sent another parcel than the one asked for")
        header = Header.open(envelope, self._server_key)
        if header.sender != SERVER or header.recipient not in (self._gate.sender, EVERYONE):
            raise ParcelError("the parcel is not from the server to this domain")
        if header.expires_s < time.time() - SKEW_S:
            raise ParcelError("the parcel has expired")
        return header

    def _fetched_before(self, digest: str, folder: Path) -> Parcel | None:
        try:
            envelope = (folder / f"{digest}.dsse").read_bytes()
            header = self._published_header(digest, envelope)
            if sha256_file(folder / f"{digest}.payload") != header.payload_digest:
                return None
        except (FileNotFoundError, ParcelError):
            return None
        return Parcel(envelope, header, folder / f"{digest}.payload")

    def _acknowledge(self, receipt: bytes) -> None:
        with self._channel() as channel:
            request = pb.AcknowledgeRequest(receipt=receipt)
            rpc.ExchangeStub(channel).Acknowledge(request, timeout=CALL_S)

    def status(self) -> ServerStatus:
        """Ask the server who and how it is. Raises TransportError, SignatureError (another key)."""
        with self._channel() as channel:
            try:
                reply = rpc.ExchangeStub(channel).Status(pb.StatusRequest(), timeout=CALL_S)
            except grpc.RpcError as err:
                raise translated(err) from None
        if reply.server_key != self._server_key.hex:
            raise SignatureError("the server has another identity key", next_step="ask its operator")
        return ServerStatus(
            reply.version, reply.server_key, reply.ledger_size, reply.ledger_head, reply.time_s
        )

    def _verified(self, envelope: bytes, parcel: Parcel, verdict: str) -> Receipt:
        receipt = Receipt.open(envelope, self._server_key)
        receipt.check_matches(parcel.digest, parcel.header)
        receipt.check_entry(len(parcel.envelope), parcel.header.payload_bytes)
        if receipt.verdict != verdict or receipt.receiver != SERVER:
            raise ParcelError("the receipt has another verdict or receiver than the server's answer")
        return receipt

    def _log_in(self, type_: str, envelope: bytes, payload_bytes: int, header: Header, verdict: str) -> int:
        return self._ledger.record_once(
            Crossing(
                direction="in",
                channel="data",
                type="parcel" if type_ == "parcel" else "receipt",
                digest=sha256_bytes(envelope),
                size_bytes=len(envelope) + payload_bytes,
                peer=SERVER,
                kind=header.kind.value,
                run=header.run,
                verdict=verdict,
            )
        ).index

    def _retried(self, call: Callable[[], T]) -> T:
        return retried(call, for_s=self._retry_for_s, sleep=self._sleep)

    def _channel(self) -> Any:
        return connect(self._address, self._tls.ca, self._tls)


def _requests(parcel: Parcel, offsets: queue.Queue[int | None], on_bytes: OnBytes | None) -> Iterator[Any]:
    """The envelope; then, once the server said from where, the payload in chunks."""
    yield pb.UploadRequest(envelope=parcel.envelope)
    offset = offsets.get()
    if offset is None:
        return
    with parcel.payload.open("rb") as source:
        source.seek(offset)
        while chunk := source.read(CHUNK_BYTES):
            yield pb.UploadRequest(chunk=chunk)
            offset += len(chunk)
            if on_bytes:
                on_bytes(offset)


@dataclass(frozen=True)
class Enrolled:
    """What a domain gets for its token."""

    certificate: bytes  # PEM
    server_key: PublicKey
    pseudonym: str
    node_id: str


def enrol(
    address: str,
    *,
    ca_certificate: Path,
    domain: str,
    token: str,
    identity: SigningKey,
    log_key: PublicKey,
    tls_csr: bytes,
    node_key: bytes,
    server_key: PublicKey,
) -> Enrolled:
    """Turn an invitation into a certificate. Safe to repeat with the same keys after a broken link.

    Raises RefusedError (`token`, `already-member`), SignatureError when the server is not the one of the
    invitation, TransportError.
    """
    facts = EnrolmentFacts(domain, token, identity.public.hex, log_key.hex, tls_csr, node_key)
    request = pb.EnrolRequest(
        domain=domain,
        token=token,
        identity_key=facts.identity_key,
        log_key=facts.log_key,
        tls_csr=tls_csr,
        node_key=node_key,
        proof=identity.sign(facts.signed_bytes()),
    )
    with connect(address, ca_certificate) as channel:
        try:
            reply = rpc.EnrolmentStub(channel).Enrol(request, timeout=CALL_S)
        except grpc.RpcError as err:
            raise translated(err) from None
    if reply.WhichOneof("outcome") != "enrolled":
        raise_refused(reply.refused)
    if reply.enrolled.server_key != server_key.hex:
        raise SignatureError("the server has another identity key than the invitation says")
    return Enrolled(reply.enrolled.certificate, server_key, reply.enrolled.pseudonym, reply.enrolled.node_id)
