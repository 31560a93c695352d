"""The Exchange and Enrolment services: gRPC around `Intake`, `ParcelStore` and `Enroller`.

Exchange wants mutual TLS, and every call is checked against the membership: the certificate itself must
be the member's, not just its name. Enrolment has a port of its own, because its callers have no
certificate yet. Nothing here decides; nothing here sends before the ledger has it. An error that was not
foreseen ends the call with no text.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import grpc

from common.checkpoints import LedgerHome, sign_checkpoint
from common.errors import FederationError, ParcelError, ProofError, RefusedError, StorageError
from common.errors import TransportError as LinkError
from common.files import CHUNK_BYTES, sha256_bytes, write_atomic
from common.ledger import Crossing, Ledger
from common.merkle import HASH_BYTES
from common.notes import Checkpoint, Note, Verifier
from common.parcels import EVERYONE, Parcel, Receipt, code_version
from common.signing import PublicKey
from common.tls import TlsFiles, certificate_fingerprint
from common.wire import exchange_pb2 as pb
from common.wire import exchange_pb2_grpc as rpc
from common.wire.enrolment import EnrolmentFacts
from common.wire.serving import Adder, Serving, no_text, start
from common.witness.service import add_checkpoint
from server.enrolment import Enroller
from server.intake import Intake, SignedRefusalError
from server.members import Member
from server.rotation import rotate


class ExchangeService:
    """The five calls of `Exchange`."""

    def __init__(self, intake: Intake, home: LedgerHome, server_key: PublicKey) -> None:
        self._intake, self._home = intake, home
        self._server_key = server_key
        self.payload_bytes_received = 0
        self._count = threading.Lock()

    def Upload(self, requests: Iterator[Any], context: Any) -> Iterator[Any]:  # noqa: N802
        """Envelope, verdict or offset, chunks, verdict. See `proto/README.md`."""
        with no_text(context):
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
        with no_text(context):
            try:
                parcel = self._published(request.digest, request.offset, _member(self._intake, context))
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
        if store.is_withdrawn(digest):
            raise RefusedError("a vector in this model was withdrawn", reason="withdrawn")
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
        with no_text(context):
            try:
                self._acknowledge(request.receipt, _member(self._intake, context))
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

    def Rotate(self, request: Any, context: Any) -> Any:  # noqa: N802
        """The caller goes over to new keys."""
        with no_text(context):
            try:
                size = rotate(
                    self._home, self._intake.members, _member(self._intake, context), request.rotation
                )
            except (ParcelError, StorageError) as err:
                reason = err.reason if isinstance(err, RefusedError) else err.code
                return pb.RotateReply(refused=pb.Refused(reason=reason, text=err.message))
            return pb.RotateReply(ledger_size=size)

    def Status(self, request: Any, context: Any) -> Any:  # noqa: N802
        """Version, key, ledger head and clock."""
        with no_text(context):
            _member(self._intake, context)
            self._intake.ledger.refresh()
            head = self._intake.ledger.tree_head()
            return pb.StatusReply(
                version=code_version(),
                server_key=self._server_key.hex,
                ledger_size=head.size,
                ledger_head=head.root,
                time_s=int(time.time()),
            )


class LogService:
    """`Log`, and of `Witness` the call that members may make: the two shores watch each other's ledgers."""

    def __init__(self, intake: Intake, home: LedgerHome) -> None:
        self._intake, self._home = intake, home

    def GetCheckpoint(self, request: Any, context: Any) -> Any:  # noqa: N802
        """The ledger as it is now, and that it has grown from `since`."""
        with no_text(context):
            member = _member(self._intake, context)
            ledger = self._home.ledger
            with ledger.locked():
                note = str(sign_checkpoint(ledger, self._home.log_signer))
                size = len(ledger)
                proof = ledger.consistency(request.since, size) if request.since <= size else []
                sent = len(note.encode()) + HASH_BYTES * len(proof)
                ledger.record(Crossing.of_checkpoint("out", member.domain, note, sent))
            return pb.GetCheckpointReply(note=note, proof=proof)

    def Inclusion(self, request: Any, context: Any) -> Any:  # noqa: N802
        """That an entry is among the first `size`."""
        return self._proof(context, lambda ledger: ledger.inclusion(request.index, request.size))

    def Consistency(self, request: Any, context: Any) -> Any:  # noqa: N802
        """That the ledger of `size` began as the one of `old_size`."""
        return self._proof(context, lambda ledger: ledger.consistency(request.old_size, request.size))

    def _proof(self, context: Any, prove: Callable[[Ledger], list[bytes]]) -> Any:
        with no_text(context):
            _member(self._intake, context)
            self._home.ledger.refresh()
            try:
                return pb.ProofReply(proof=prove(self._home.ledger))
            except ProofError as err:
                context.abort(grpc.StatusCode.INVALID_ARGUMENT, err.message)

    def AddCheckpoint(self, request: Any, context: Any) -> Any:  # noqa: N802
        """Cosign a member's ledger; keep its cosignature of ours, if it brings one."""
        with no_text(context):
            member = _member(self._intake, context)
            size = len(request.note.encode()) + len(request.cosigned.encode())
            size += sum(len(node) for node in request.proof)
            self._home.ledger.record(Crossing.of_checkpoint("in", member.domain, request.note, size))
            try:
                self._keep_cosigned(member, request.cosigned)
            except (ParcelError, ProofError) as err:
                return pb.AddCheckpointReply(refused=pb.Refused(reason=err.code, text=err.message))
            reply = add_checkpoint(self._home.cosigner, lambda _: (member.domain, member.logs()), request)
            if reply.cosigned:
                note = reply.cosigned
                self._home.ledger.record(
                    Crossing.of_checkpoint("out", member.domain, note, len(note.encode()))
                )
            return reply

    def _keep_cosigned(self, member: Member, cosigned: str) -> None:
        if not cosigned:
            return
        signer = self._home.log_signer
        own = Verifier(signer.name, signer.key.public)
        note = Note.parse(cosigned)
        Checkpoint.open(cosigned, own)
        note.cosigned_by(member.logs()[0])
        write_atomic(self._home.cosigned_path(member.domain), cosigned.encode())

    def UpdateRoot(self, request: Any, context: Any) -> Any:  # noqa: N802
        """Not here: the server makes the root file, it does not follow one."""
        context.abort(grpc.StatusCode.UNIMPLEMENTED, "")


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
        with no_text(context):
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


def serve(intake: Intake, home: LedgerHome, server_key: PublicKey, address: str, tls: TlsFiles) -> Serving:
    """Start Exchange, Log and Witness on `address` ("127.0.0.1:0" picks a port).

    Raises FederationError if it is in use.
    """
    service = ExchangeService(intake, home, server_key)
    credentials = grpc.ssl_server_credentials(
        [(tls.key.read_bytes(), tls.certificate.read_bytes())],
        root_certificates=tls.ca.read_bytes(),
        require_client_auth=True,
    )
    log_service = LogService(intake, home)
    services: list[tuple[Any, Adder]] = [
        (service, rpc.add_ExchangeServicer_to_server),
        (log_service, rpc.add_LogServicer_to_server),
        (log_service, rpc.add_WitnessServicer_to_server),
    ]
    return start(services, address, credentials)


def serve_enrolment(enroller: Enroller, address: str, tls: TlsFiles) -> Serving:
    """Start Enrolment on `address`; clients verify the server, the server asks for no certificate."""
    service = EnrolmentService(enroller)
    credentials = grpc.ssl_server_credentials([(tls.key.read_bytes(), tls.certificate.read_bytes())])
    return start([(service, rpc.add_EnrolmentServicer_to_server)], address, credentials)


def _member(intake: Intake, context: Any) -> Member:
    """Who calls. Ends the call unless the certificate is that of a member in good standing."""
    name = context.auth_context().get("x509_common_name", [b""])[0].decode("utf-8", "replace")
    member = intake.members.get(name)
    if member is None or member.is_revoked or member.certificate_fingerprint != _fingerprint(context):
        context.abort(grpc.StatusCode.PERMISSION_DENIED, "not a member, or revoked")
        raise FederationError("not reached: abort raises")
    return member


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
