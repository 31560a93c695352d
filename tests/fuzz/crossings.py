"""Decoders that need a federation around them: an audit bundle, and the Exchange behind its real TLS port."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import grpc
from crossing import Owner, Shore, make_bundle, make_catalog, make_metrics, make_vector

from common.audit.verify import verify
from common.checkpoints import sign_checkpoint
from common.errors import ParcelError
from common.notes import Checkpoint, Signer
from common.parcels import SERVER, Kind
from common.roots import log_origin, log_verifiers
from common.rotation import Rotation
from common.signing import SigningKey
from common.tls import make_csr
from common.wire import exchange_pb2 as pb
from common.wire.enrolment import EnrolmentFacts
from common.wire.link import connect
from fuzz.decoders import DECODERS, Decoder, Make
from server.exchange import serve_enrolment

SERVICE = "/isthmus.exchange.v1"
CALL_S = 20.0
NAMED = {  # statuses that the Exchange gives on purpose; INTERNAL is for what nobody foresaw
    grpc.StatusCode.INVALID_ARGUMENT,
    grpc.StatusCode.ABORTED,
    grpc.StatusCode.PERMISSION_DENIED,
    grpc.StatusCode.RESOURCE_EXHAUSTED,  # gRPC's own, for a frame above its limit
    grpc.StatusCode.UNIMPLEMENTED,  # gRPC's own, for another number of messages than a call has
}
UNREADABLE = "Exception deserializing request!"  # gRPC's own, for bytes that are no protobuf message


def _world(folder: Path) -> tuple[Shore, Owner]:
    """One domain and a server after a catalog, a vector, metrics and a model went across."""
    shore = Shore(folder / "server")
    toys = Owner(folder / "toys", shore)
    with shore.serve() as serving:
        client = toys.client(f"127.0.0.1:{serving.port}")
        for kind, path in (
            (Kind.CATALOG, make_catalog(folder / "catalog", "toys")),
            (Kind.METRICS, make_metrics(folder / "metrics", **{"zero-shot/recall@10": 0.5})),
        ):
            client.send(toys.gate.release(toys.draft(path, kind), path))
        client.send(toys.vector())
        client.fetch(shore.publish(make_vector(folder / "model", 7)).digest, folder / "got")
    return shore, toys


class _NotCleanError(ParcelError):
    """The auditor's refusal: a report with findings."""


def _part(glob: str) -> Make:
    def make(folder: Path) -> Decoder:
        shore, toys = _world(folder)
        bundle, root = make_bundle(folder / "bundle", shore, [toys])
        kept = {path: path.read_bytes() for path in sorted(bundle.path.glob(glob))}
        target, sample = next(iter(kept.items()))

        def read(data: bytes) -> None:
            target.write_bytes(data)
            report = verify(bundle, root)  # never raises, whatever is in the bundle
            if not report.clean:
                raise _NotCleanError(report.all_findings[0].code)
            if target.name == "checkpoint":  # signatures of others may stand beside
                verifier = log_verifiers(SERVER, root.server)[0]
                assert Checkpoint.open(data.decode(), verifier) == Checkpoint.open(sample.decode(), verifier)
            else:
                assert data == sample

        return Decoder((sample,), read)

    return make


DECODERS |= {
    "bundle-ledger": _part("shores/server/ledger.jsonl"),
    "bundle-checkpoint": _part("shores/server/checkpoint"),
    "bundle-envelope": _part("parcels/*"),
    "bundle-receipt": _part("receipts/*"),
    "bundle-payload": _part("payloads/*"),
}


# The wire: frames of any bytes, over mutual TLS


def _framed(*messages: bytes) -> bytes:
    return b"".join(len(message).to_bytes(4, "big") + message for message in messages)


def _frames(data: bytes) -> list[bytes]:
    """Split as gRPC splits; a length that is too large takes the rest."""
    found = []
    while len(data) >= 4 and len(found) < 32:
        size = int.from_bytes(data[:4], "big")
        found.append(data[4 : 4 + size])
        data = data[4 + size :]
    return found


@contextlib.contextmanager
def _named_statuses() -> Iterator[None]:
    try:
        yield
    except grpc.RpcError as err:
        if err.code() in NAMED or (err.code() == grpc.StatusCode.INTERNAL and err.details() == UNREADABLE):
            raise ParcelError(err.code().name) from None
        raise


REFUSING: dict[str, Any] = {
    "Upload": pb.UploadReply,
    "Download": pb.DownloadReply,
    "Enrol": pb.EnrolReply,
    "Rotate": pb.RotateReply,
    "AddCheckpoint": pb.AddCheckpointReply,
}


def _on_the_wire(
    method: str, samples: Callable[[Shore, Owner], list[bytes]], *, service: str = "Exchange"
) -> Make:
    def make(folder: Path) -> Decoder:
        shore = Shore(folder / "server")
        toys = Owner(folder / "toys", shore)
        at, enrolment = "127.0.0.1:0", service == "Enrolment"
        serving = serve_enrolment(shore.enroller, at, shore.tls) if enrolment else shore.serve(at)
        channel = connect(f"127.0.0.1:{serving.port}", toys.tls.ca, None if enrolment else toys.tls)
        call = channel.stream_stream(f"{SERVICE}.{service}/{method}")
        refusal = REFUSING.get(method)

        def read(data: bytes) -> None:
            with _named_statuses():
                for reply in call(iter(_frames(data)), timeout=CALL_S):
                    if refusal is not None and refusal.FromString(reply).HasField("refused"):
                        raise ParcelError(refusal.FromString(reply).refused.reason)

        def close() -> None:
            channel.close()
            serving.stop(0)

        return Decoder(tuple(samples(shore, toys)), read, close=close)

    return make


def _uploads(shore: Shore, toys: Owner) -> list[bytes]:
    found = []
    for seed in range(3):
        parcel = toys.vector(seed)
        payload = parcel.payload.read_bytes()
        chunks = [
            pb.UploadRequest(chunk=payload[start : start + 200]) for start in range(0, len(payload), 200)
        ]
        messages = [pb.UploadRequest(envelope=parcel.envelope), *chunks]
        found.append(_framed(*(message.SerializeToString() for message in messages)))
    return found


def _downloads(shore: Shore, toys: Owner) -> list[bytes]:
    digest = shore.publish(make_vector(shore.home / "model", 7)).digest
    requests = (pb.DownloadRequest(digest=digest), pb.DownloadRequest(digest=digest, offset=64))
    return [_framed(request.SerializeToString()) for request in requests]


def _acknowledgements(shore: Shore, toys: Owner) -> list[bytes]:
    with shore.serve() as serving:
        digest = shore.publish(make_vector(shore.home / "model", 7)).digest
        toys.client(f"127.0.0.1:{serving.port}").fetch(digest, toys.home / "got")
    entry = next(e for e in toys.ledger if e.body["type"] == "receipt")
    receipt = (toys.home / "outbox" / f"{entry.body['digest']}.receipt").read_bytes()
    return [_framed(pb.AcknowledgeRequest(receipt=receipt).SerializeToString())]


def _enrolments(shore: Shore, toys: Owner) -> list[bytes]:
    token = shore.invitations.invite("beauty")
    identity, log_key = SigningKey(b"i" * 32), SigningKey(b"l" * 32)
    csr = make_csr("beauty", shore.home / "beauty.key")
    facts = EnrolmentFacts(
        "beauty", token, identity.public.hex, log_key.public.hex, csr, b"ecdsa-sha2-nistp384 AAAA n"
    )
    request = pb.EnrolRequest(
        domain=facts.domain, token=token, identity_key=facts.identity_key, log_key=facts.log_key, tls_csr=csr,
        node_key=facts.node_key, proof=identity.sign(facts.signed_bytes()),
    )  # fmt: skip
    return [_framed(request.SerializeToString())]


def _checkpoints(shore: Shore, toys: Owner) -> list[bytes]:
    toys.vector()
    signer = Signer(log_origin("toys", toys.log_key.public), toys.log_key)
    note = str(sign_checkpoint(toys.ledger, signer))
    return [_framed(pb.AddCheckpointRequest(note=note).SerializeToString())]


def _rotations(shore: Shore, toys: Owner) -> list[bytes]:
    new, log = SigningKey(b"n" * 32), SigningKey(b"m" * 32)
    data = Rotation.make("toys", toys.key, new, log.public).data
    return [_framed(pb.RotateRequest(rotation=data).SerializeToString())]


def _proofs(request: Any) -> Callable[[Shore, Owner], list[bytes]]:
    def make(shore: Shore, toys: Owner) -> list[bytes]:
        for word in (b"a", b"b", b"c"):
            shore.ledger.append({"word": word.hex()})
        return [_framed(request.SerializeToString())]

    return make


DECODERS |= {
    "wire-checkpoint": _on_the_wire(
        "GetCheckpoint", _proofs(pb.GetCheckpointRequest(since=2)), service="Log"
    ),
    "wire-inclusion": _on_the_wire("Inclusion", _proofs(pb.InclusionRequest(index=1, size=3)), service="Log"),
    "wire-consistency": _on_the_wire(
        "Consistency", _proofs(pb.ConsistencyRequest(old_size=2, size=3)), service="Log"
    ),
    "wire-cosign": _on_the_wire("AddCheckpoint", _checkpoints, service="Witness"),
    "wire-rotate": _on_the_wire("Rotate", _rotations),
    "wire-upload": _on_the_wire("Upload", _uploads),
    "wire-download": _on_the_wire("Download", _downloads),
    "wire-acknowledge": _on_the_wire("Acknowledge", _acknowledgements),
    "wire-status": _on_the_wire("Status", lambda *_: [_framed(pb.StatusRequest().SerializeToString())]),
    "wire-enrol": _on_the_wire("Enrol", _enrolments, service="Enrolment"),
}
