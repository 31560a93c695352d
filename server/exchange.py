"""The Exchange and Enrolment services: gRPC around `Intake`, `ParcelStore` and `Enroller`.

Exchange wants mutual TLS, and every call is checked against the membership: the certificate itself must
be the member's, not just its name. Enrolment has a port of its own, because its callers have no
certificate yet. Nothing here decides; nothing here sends before the ledger has it. An error that was not
foreseen ends the call with no text.
"""

from __future__ import annotations

import contextlib
import logging
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import grpc

from common.errors import FederationError, ParcelError, ProofError, RefusedError, StorageError
from common.errors import TransportError as LinkError
from common.files import CHUNK_BYTES, sha256_bytes
from common.ledger import Crossing
from common.parcels import EVERYONE, Parcel, Receipt, code_version
from common.signing import PublicKey
from common.tls import TlsFiles, certificate_fingerprint
from common.wire import exchange_pb2 as pb
from common.wire import exchange_pb2_grpc as rpc
from common.wire.enrolment import EnrolmentFacts
from server.enrolment import Enroller
from server.intake import Intake, SignedRefusalError
from server.members import Member

log = logging.getLogger(__name__)
WORKERS = 32
OPTIONS = [
    ("grpc.so_reuseport", 0),
    ("grpc.max_receive_message_length", 4 << 20),
    ("grpc.keepalive_time_ms", 30_000),
    ("grpc.keepalive_timeout_ms", 10_000),
    ("grpc.http2.min_recv_ping_interval_without_data_ms", 5_000),
    ("grpc.keepalive_permit_without_calls", 1),
]


class ExchangeService:
    """The four calls of `Exchange`."""

    def __init__(self, intake: Intake, server_key: PublicKey) -> None:
        self._intake = intake
        self._server_key = server_key
        self.payload_bytes_received = 0
        self._count = threading.Lock()

    def Upload(self, requests: Iterator[Any], context: Any) -> Iterator[Any]:  # noqa: N802
        """Envelope, verdict or offset, chunks, verdict. See `proto/README.md`."""
        with _no_text(context):
            try:
                yield from self._upload(requests, _fingerprint(context))
            except RefusedError as err:
                yield pb.UploadReply(refused=_refused(err))
            except StorageError:
                yield pb.UploadReply(refused=_storage())
            except LinkError as err:
                context.abort(grpc.StatusCode.ABORTED, err.message)

    def _upload(self, requests: Iterator[Any], fingerprint: str) -> Iterator[Any]:
        first = next(requests, None)
        if first is None or first.WhichOneof("part") != "envelope":
            raise RefusedError("the first message must be the envelope", reason="protocol")
        begun = self._intake.begin(first.envelope, fingerprint)
        if isinstance(begun, bytes):
            yield pb.UploadReply(already=begun)
            return
        try:
            yield pb.UploadReply(resume=pb.Resume(offset=begun.offset))
            for request in requests:
                if request.WhichOneof("part") != "chunk":
                    raise RefusedError("only chunks may follow the envelope", reason="protocol")
                with self._count:
                    self.payload_bytes_received += len(request.chunk)
                begun.write(request.chunk)
            yield pb.UploadReply(accepted=begun.finish())
        finally:
            begun.close()

    def Download(self, request: Any, context: Any) -> Iterator[Any]:  # noqa: N802
        """A published parcel, from `offset` on."""
        with _no_text(context):
            try:
                parcel = self._published(request.digest, request.offset, self._member(context))
            except RefusedError as err:
                yield pb.DownloadReply(refused=_refused(err))
                return
            except StorageError:
                yield pb.DownloadReply(refused=_storage())
                return
            yield pb.DownloadReply(envelope=parcel.envelope)
            with parcel.payload.open("rb") as source:
                source.seek(request.offset)
                while chunk := source.read(CHUNK_BYTES):
                    yield pb.DownloadReply(chunk=chunk)

    def _published(self, digest: str, offset: int, member: Member) -> Parcel:
        store = self._intake.store
        known = {stored.digest: stored for stored in store.find(direction="out")}
        stored, parcel = known.get(digest), None
        if stored is not None and stored.recipient in (member.domain, EVERYONE):
            parcel = store.get(digest)
        if parcel is None:
            raise RefusedError("no such parcel for this domain", reason="unknown-parcel")
        if offset > parcel.header.payload_bytes:
            raise RefusedError("the payload is shorter than that offset", reason="protocol")
        self._intake.ledger.record_once(
            Crossing(
                direction="out",
                channel="data",
                type="parcel",
                digest=digest,
                size_bytes=len(parcel.envelope) + parcel.header.payload_bytes,
                peer=member.domain,
                kind=parcel.header.kind.value,
                run=parcel.header.run,
            )
        )
        return parcel

    def Acknowledge(self, request: Any, context: Any) -> Any:  # noqa: N802
        """Keep a client's receipt for what it downloaded."""
        with _no_text(context):
            try:
                self._acknowledge(request.receipt, self._member(context))
            except (ParcelError, ProofError) as err:
                context.abort(grpc.StatusCode.INVALID_ARGUMENT, err.message)
            return pb.AcknowledgeReply()

    def _acknowledge(self, envelope: bytes, member: Member) -> None:
        receipt = Receipt.open(envelope, member.key)
        parcel = self._intake.store.get(receipt.parcel_digest)
        if parcel is None or receipt.receiver != member.domain:
            raise ParcelError("this receipt is for no parcel of ours, or by another domain")
        receipt.check_matches(parcel.digest, parcel.header)
        receipt.check_entry(len(parcel.envelope), parcel.header.payload_bytes)
        self._intake.ledger.record_once(
            Crossing(
                direction="in",
                channel="data",
                type="receipt",
                digest=sha256_bytes(envelope),
                size_bytes=len(envelope),
                peer=member.domain,
                kind=receipt.kind.value,
                run=receipt.run,
                verdict=receipt.verdict,
            )
        )
        self._intake.store.record_acknowledged(parcel.digest, member.domain, envelope)

    def Status(self, request: Any, context: Any) -> Any:  # noqa: N802
        """Version, key, ledger head and clock."""
        with _no_text(context):
            self._member(context)
            self._intake.ledger.refresh()
            head = self._intake.ledger.tree_head()
            return pb.StatusReply(
                version=code_version(),
                server_key=self._server_key.hex,
                ledger_size=head.size,
                ledger_head=head.root,
                time_s=int(time.time()),
            )

    def _member(self, context: Any) -> Member:
        """Who calls. Ends the call unless the certificate is that of a member in good standing."""
        name = context.auth_context().get("x509_common_name", [b""])[0].decode("utf-8", "replace")
        member = self._intake.members.get(name)
        if member is None or member.is_revoked or member.certificate_fingerprint != _fingerprint(context):
            context.abort(grpc.StatusCode.PERMISSION_DENIED, "not a member, or revoked")
            raise FederationError("not reached: abort raises")
        return member


class EnrolmentService:
    """The one call of `Enrolment`."""

    def __init__(self, enroller: Enroller) -> None:
        self._enroller = enroller
        self._one_at_a_time = threading.Lock()

    def Enrol(self, request: Any, context: Any) -> Any:  # noqa: N802
        """Token and public keys in, certificate out."""
        facts = EnrolmentFacts(
            domain=request.domain,
            token=request.token,
            identity_key=request.identity_key,
            log_key=request.log_key,
            tls_csr=request.tls_csr,
            node_key=request.node_key,
        )
        with _no_text(context):
            try:
                with self._one_at_a_time:
                    member = self._enroller.enrol(facts, request.proof)
            except (RefusedError, ParcelError, FederationError) as err:
                reason = err.reason if isinstance(err, RefusedError) else err.code
                return pb.EnrolReply(refused=pb.Refused(reason=reason, text=err.message))
        return pb.EnrolReply(
            enrolled=pb.Enrolled(
                certificate=member.certificate.encode(),
                server_key=self._enroller.server_key.hex,
                pseudonym=member.pseudonym,
                node_id=member.node_id,
            )
        )


class Serving:
    """A running service; use as a context manager, or `stop` it."""

    def __init__(self, server: Any, port: int, service: Any) -> None:
        self._server = server
        self.port = port
        self.service = service

    def stop(self, grace_s: float = 2.0) -> None:
        """Refuse new calls, give running ones `grace_s`, and return when all threads are done."""
        self._server.stop(grace_s).wait()

    def wait(self) -> None:
        """Block until stopped."""
        self._server.wait_for_termination()

    def __enter__(self) -> Serving:
        return self

    def __exit__(self, *_: object) -> None:
        self.stop(0)


def serve(intake: Intake, server_key: PublicKey, address: str, tls: TlsFiles) -> Serving:
    """Start Exchange on `address` ("127.0.0.1:0" picks a port). Raises FederationError if it is in use."""
    service = ExchangeService(intake, server_key)
    credentials = grpc.ssl_server_credentials(
        [(tls.key.read_bytes(), tls.certificate.read_bytes())],
        root_certificates=tls.ca.read_bytes(),
        require_client_auth=True,
    )
    return _start(service, rpc.add_ExchangeServicer_to_server, address, credentials)


def serve_enrolment(enroller: Enroller, address: str, tls: TlsFiles) -> Serving:
    """Start Enrolment on `address`; clients verify the server, the server asks for no certificate."""
    service = EnrolmentService(enroller)
    credentials = grpc.ssl_server_credentials([(tls.key.read_bytes(), tls.certificate.read_bytes())])
    return _start(service, rpc.add_EnrolmentServicer_to_server, address, credentials)


def _start(service: Any, add: Callable[[Any, Any], None], address: str, credentials: Any) -> Serving:
    server = grpc.server(ThreadPoolExecutor(max_workers=WORKERS), options=OPTIONS)
    add(service, server)
    try:
        port = server.add_secure_port(address, credentials)
    except RuntimeError:
        port = 0
    if not port:
        raise FederationError(
            f"cannot listen on {address}: in use, or not an address of this machine",
            next_step="stop what uses it, or choose another port",
        )
    server.start()
    return Serving(server, port, service)


@contextlib.contextmanager
def _no_text(context: Any) -> Iterator[None]:
    """gRPC would send the text of an exception to the caller; this logs it here instead."""
    try:
        yield
    except Exception:
        if context.code() is None and context.is_active():
            log.exception("a call failed")
            context.abort(grpc.StatusCode.INTERNAL, "internal error")
        raise


def _fingerprint(context: Any) -> str:
    """SHA-256 of the caller's certificate. gRPC has verified it against our CA."""
    try:
        return certificate_fingerprint(context.auth_context()["x509_pem_cert"][0])
    except (KeyError, IndexError, ParcelError):
        return ""


def _refused(err: RefusedError) -> Any:
    receipt = err.receipt if isinstance(err, SignedRefusalError) else b""
    return pb.Refused(reason=err.reason, text=err.message, receipt=receipt)


def _storage() -> Any:
    return pb.Refused(reason="storage", text="the server cannot store it now; its operator must free space")
