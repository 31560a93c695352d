"""Parcels over real gRPC with real TLS on loopback."""

import errno
import os
import subprocess
import sys
import threading
import time
import tracemalloc
from pathlib import Path

import grpc
import numpy as np
import pytest
from crossing import BASE, NODE_KEY, RUN, TENSORS, Owner, Shore, make_vector
from safetensors.numpy import save_file

from clients.exchange_client import enrol
from common.errors import (
    FederationError,
    GateError,
    ParcelError,
    RefusedError,
    SignatureError,
    TransportError,
)
from common.parcels import Kind, Parcel, Receipt
from common.signing import SigningKey
from common.tls import make_csr
from common.wire import exchange_pb2 as pb
from common.wire import exchange_pb2_grpc as rpc
from server.exchange import Serving, serve_enrolment

BIG = {"layer.weight": (1536, 1024)}  # 6 MiB: above gRPC's default message size


@pytest.fixture
def shore(tmp_path: Path) -> Shore:
    return Shore(tmp_path / "server")


@pytest.fixture
def big(tmp_path: Path) -> Shore:
    return Shore(tmp_path / "server", BIG)


def address(serving: Serving) -> str:
    return f"127.0.0.1:{serving.port}"


def received_bytes(serving: Serving) -> int:
    return serving.service.payload_bytes_received


def test_there_and_back(big: Shore, tmp_path: Path) -> None:
    toys = Owner(tmp_path / "toys", big)
    parcel, seen = toys.vector(), []
    with big.serve() as serving:
        client = toys.client(address(serving))
        receipt = client.send(parcel, seen.append)
        assert seen[-1] == parcel.header.payload_bytes
        assert len(seen) == 7
        assert client.send(parcel) == receipt
        assert received_bytes(serving) == parcel.header.payload_bytes
        status = client.status()
        assert (status.ledger_size, status.server_key) == (2, big.key.public.hex)

        published = big.publish(make_vector(tmp_path / "model", 7, BIG))
        fetched = client.fetch(published.digest, tmp_path / "got", seen.append)
        assert fetched.payload.read_bytes() == published.payload.read_bytes()
        assert fetched.header == published.header
        assert big.store.acknowledged(published.digest) == ["toys"]
        assert client.fetch(published.digest, tmp_path / "got") == fetched
    both = [
        [(e.body["direction"], e.body["type"], e.body["digest"]) for e in side]
        for side in (toys.ledger, big.ledger)
    ]
    turned = [({"in": "out", "out": "in"}[way], kind, digest) for way, kind, digest in both[1]]
    assert sorted(both[0]) == sorted(turned)
    assert len(both[0]) == 4
    assert sorted(path.suffix for path in (tmp_path / "got").iterdir()) == [".dsse", ".payload"]


def test_refused_before_a_byte_of_payload(big: Shore, tmp_path: Path) -> None:
    toys = Owner(tmp_path / "toys", big)
    beauty = Owner(tmp_path / "beauty", big, "beauty")
    payload = make_vector(tmp_path / "v", 0, BIG)
    other_base = toys.ungated(payload, base_digest="1" * 64)
    as_beauty = toys.ungated(payload, sender="beauty")
    stolen = beauty.vector()
    toys.journal.put(f"released/{stolen.digest}", {})
    stranger = Parcel(stolen.header.seal(SigningKey(bytes(32))), stolen.header, stolen.payload)
    toys.journal.put(f"released/{stranger.digest}", {})
    cases = {"base-mismatch": other_base, "sender": as_beauty, "unknown-sender": stranger}
    with big.serve() as serving:
        client = toys.client(address(serving))
        for reason, parcel in cases.items():
            with pytest.raises(RefusedError) as caught:
                client.send(parcel)
            assert caught.value.reason == reason
        with pytest.raises(RefusedError) as caught:
            client.send(stolen)  # a whole parcel of another member, over our own link
        assert caught.value.reason == "sender"
        assert received_bytes(serving) == 0
    signed = [entry for entry in toys.ledger if entry.body["verdict"] == "base-mismatch"]
    assert len(signed) == 1


def test_refused_after_payload(shore: Shore, tmp_path: Path) -> None:
    toys = Owner(tmp_path / "toys", shore)
    values = {name: np.full(shape, np.nan, np.float32) for name, shape in TENSORS.items()}
    save_file(values, tmp_path / "nan")
    parcel = toys.ungated(tmp_path / "nan")
    with shore.serve() as serving:
        for _ in range(2):
            with pytest.raises(RefusedError, match=r"layer\.bias") as caught:
                toys.client(address(serving)).send(parcel)
            assert caught.value.reason == "not-finite"
        assert received_bytes(serving) == parcel.header.payload_bytes
    assert not shore.store.find(run=RUN)


def test_only_what_the_gate_released_is_sent(shore: Shore, tmp_path: Path) -> None:
    toys = Owner(tmp_path / "toys", shore)
    parcel = toys.vector()
    toys.home = tmp_path / "other"
    toys.restart()
    with shore.serve() as serving, pytest.raises(GateError):
        toys.client(address(serving)).send(parcel)


class _CutError(Exception):
    """Stands for a link that breaks, or a process that dies."""


def test_cut_upload_resumes(big: Shore, tmp_path: Path) -> None:
    toys = Owner(tmp_path / "toys", big)
    parcel = toys.vector()
    offsets: list[int] = []
    with big.serve() as serving:
        first = toys.client(address(serving))
        spool = big.store.spool_path(parcel.digest)

        def cut(sent: int) -> None:
            if sent > 3 << 20:
                wait_for(lambda: spool.stat().st_size >= 1 << 20)
                raise _CutError

        with pytest.raises(TransportError):
            first.send(parcel, cut)
        port = serving.port
    big.restart()
    with big.serve(f"127.0.0.1:{port}") as serving:
        receipt = toys.client(address(serving)).send(parcel, offsets.append)
        assert 0 < received_bytes(serving) < parcel.header.payload_bytes
    assert receipt.verdict == "accepted"
    assert offsets[0] > 1 << 20
    assert len(big.store.find(run=RUN)) == 1


def test_server_comes_back_while_the_client_retries(big: Shore, tmp_path: Path) -> None:
    toys = Owner(tmp_path / "toys", big)
    parcel = toys.vector()
    first = big.serve()
    stopped = threading.Event()

    def stop_midway(sent: int) -> None:
        if sent >= 2 << 20 and not stopped.is_set():
            stopped.set()
            first.stop(0)

    result: list[Receipt] = []
    client = toys.client(address(first), retry_for_s=20)
    sending = threading.Thread(target=lambda: result.append(client.send(parcel, stop_midway)))
    sending.start()
    assert stopped.wait(10)
    time.sleep(0.3)
    big.restart()
    with big.serve(address(first)):
        sending.join(20)
    assert result[0].verdict == "accepted"
    assert len(big.store.find(run=RUN)) == 1


SERVER_PROCESS = """
import sys
from pathlib import Path
from crossing import Shore
shore = Shore(Path(sys.argv[1]), {"layer.weight": (1536, 1024)})
serving = shore.serve(sys.argv[2])
print(serving.port, flush=True)
serving.wait()
"""


def test_server_killed_in_the_middle(big: Shore, tmp_path: Path) -> None:
    toys = Owner(tmp_path / "toys", big)
    parcel = toys.vector()
    where = {"PYTHONPATH": os.pathsep.join(sys.path)}

    def start(at: str) -> subprocess.Popen[str]:
        command = [sys.executable, "-c", SERVER_PROCESS, str(big.home), at]
        return subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env={**os.environ, **where})

    with start("127.0.0.1:0") as one:
        assert one.stdout is not None
        at = f"127.0.0.1:{int(one.stdout.readline())}"
        spool = big.store.spool_path(parcel.digest)

        def kill(sent: int) -> None:
            if sent >= 3 << 20 and one.poll() is None:
                wait_for(lambda: spool.exists() and spool.stat().st_size > 0)
                one.kill()

        with pytest.raises(TransportError):
            toys.client(at).send(parcel, kill)
    seen: list[int] = []
    with start(at) as two:
        assert two.stdout is not None
        two.stdout.readline()
        receipt = toys.client(at, retry_for_s=20).send(parcel, seen.append)
        two.kill()
    assert seen[0] > 1 << 20
    assert receipt.verdict == "accepted"
    big.restart()
    assert len(big.store.find(run=RUN)) == 1


def test_replay_over_the_wire(shore: Shore, tmp_path: Path) -> None:
    toys = Owner(tmp_path / "toys", shore)
    parcel = toys.vector()
    with shore.serve() as serving:
        receipt = toys.client(address(serving)).send(parcel)
        toys.journal.put(f"sent/{parcel.digest}", {"receipt": ""})  # lost with a crash
        forgetful = Owner(tmp_path / "copy", shore, "beauty")
        assert forgetful.member.domain == "beauty"
        (toys.home / "journal.jsonl").unlink()
        toys.restart()
        toys.journal.put(f"released/{parcel.digest}", {})
        assert toys.client(address(serving)).send(parcel) == receipt
        assert received_bytes(serving) == parcel.header.payload_bytes
        reused = toys.ungated(make_vector(tmp_path / "v", 3))
        header = reused.header.model_copy(update={"nonce": parcel.header.nonce})
        forged = Parcel(header.seal(toys.key), header, reused.payload)
        toys.journal.put(f"released/{forged.digest}", {})
        with pytest.raises(RefusedError) as caught:
            toys.client(address(serving)).send(forged)
        assert caught.value.reason == "replay"


def test_a_receipt_of_someone_else_does_not_count(shore: Shore, tmp_path: Path) -> None:
    toys = Owner(tmp_path / "toys", shore)
    parcel = toys.vector()
    with shore.serve() as serving:
        client = toys.client(address(serving))
        client._server_key = SigningKey(bytes(32)).public
        with pytest.raises(SignatureError):
            client.send(parcel)
        assert toys.journal.get(f"sent/{parcel.digest}") is None


def test_cut_download_resumes(big: Shore, tmp_path: Path) -> None:
    toys = Owner(tmp_path / "toys", big)
    published = big.publish(make_vector(tmp_path / "model", 7, BIG))
    seen: list[int] = []

    def cut(done: int) -> None:
        if done >= 2 << 20:
            raise _CutError

    with big.serve() as serving:
        with pytest.raises(_CutError):
            toys.client(address(serving)).fetch(published.digest, tmp_path / "got", cut)
        parcel = toys.client(address(serving)).fetch(published.digest, tmp_path / "got", seen.append)
        assert seen[0] == 3 << 20
        assert parcel.payload.read_bytes() == published.payload.read_bytes()
        (tmp_path / "got" / f"{published.digest}.payload").unlink()
        (tmp_path / "got" / f"{published.digest}.part").write_bytes(bytes(100))
        client = toys.client(address(serving), retry_for_s=5)
        assert client.fetch(published.digest, tmp_path / "got") == parcel


def test_downloads_are_for_their_recipient_only(shore: Shore, tmp_path: Path) -> None:
    toys, beauty = Owner(tmp_path / "toys", shore), Owner(tmp_path / "beauty", shore, "beauty")
    private = shore.publish(make_vector(tmp_path / "m"), recipient="beauty", kind=Kind.CANDIDATE)
    upload = toys.vector()
    with shore.serve() as serving:
        toys.client(address(serving)).send(upload)
        with pytest.raises(ParcelError):
            toys.client(address(serving)).fetch("../../x", tmp_path / "got")
        for digest in (private.digest, upload.digest, "0" * 64):
            with pytest.raises(RefusedError) as caught:
                toys.client(address(serving)).fetch(digest, tmp_path / "got")
            assert caught.value.reason == "unknown-parcel"
        assert (
            beauty.client(address(serving)).fetch(private.digest, tmp_path / "got").header.recipient
            == "beauty"
        )


def test_forged_publication(shore: Shore, tmp_path: Path) -> None:
    toys = Owner(tmp_path / "toys", shore)
    honest = shore.publish(make_vector(tmp_path / "m", 1))
    shore.store.object_path(honest.header.payload_digest).write_bytes(bytes(honest.header.payload_bytes))
    forger = SigningKey(bytes(32))
    forged = Parcel(honest.header.seal(forger), honest.header, honest.payload)
    shore.store.publish(forged)
    with shore.serve() as serving:
        with pytest.raises(ParcelError, match="not the one that the server signed"):
            toys.client(address(serving)).fetch(honest.digest, tmp_path / "got")
        with pytest.raises(SignatureError):
            toys.client(address(serving)).fetch(forged.digest, tmp_path / "got")
    assert not list((tmp_path / "got").glob("*.payload"))


def test_revoked_member_is_out(shore: Shore, tmp_path: Path) -> None:
    toys = Owner(tmp_path / "toys", shore)
    published = shore.publish(make_vector(tmp_path / "m"))
    with shore.serve() as serving:
        client = toys.client(address(serving))
        client.status()
        shore.members.revoke("toys", ledger_size=0)
        for call in (client.status, lambda: client.fetch(published.digest, tmp_path / "got")):
            with pytest.raises(RefusedError) as caught:
                call()
            assert caught.value.reason == "permission-denied"
        with pytest.raises(RefusedError) as caught:
            client.send(toys.vector())
        assert caught.value.reason == "revoked"


def test_no_certificate_no_conversation(shore: Shore, tmp_path: Path) -> None:
    with shore.serve() as serving:
        credentials = grpc.ssl_channel_credentials(shore.ca.certificate.read_bytes())
        with grpc.secure_channel(address(serving), credentials) as channel:
            with pytest.raises(grpc.RpcError) as caught:
                rpc.ExchangeStub(channel).Status(pb.StatusRequest(), timeout=5)
            assert caught.value.code() is grpc.StatusCode.UNAVAILABLE


def test_protocol_violations(shore: Shore, tmp_path: Path) -> None:
    toys = Owner(tmp_path / "toys", shore)
    parcel = toys.vector()
    with shore.serve() as serving, toys.client(address(serving))._channel() as channel:
        upload = rpc.ExchangeStub(channel).Upload
        envelope = pb.UploadRequest(envelope=parcel.envelope)
        for requests in ([], [pb.UploadRequest(chunk=b"x")], [envelope, envelope]):
            last = list(upload(iter(requests)))[-1]
            assert last.refused.reason == "protocol"


def test_unforeseen_errors_send_no_text(
    shore: Shore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    toys = Owner(tmp_path / "toys", shore)
    published = shore.publish(make_vector(tmp_path / "m"))

    def broken(*_: object, **__: object) -> None:
        raise ValueError("a secret in an exception")

    with shore.serve() as serving, toys.client(address(serving))._channel() as channel:
        stub = rpc.ExchangeStub(channel)
        monkeypatch.setattr(shore.store, "find", broken)
        monkeypatch.setattr(shore.ledger, "refresh", broken)
        calls = (
            lambda: list(stub.Upload(iter([pb.UploadRequest(envelope=toys.vector().envelope)]))),
            lambda: list(stub.Download(pb.DownloadRequest(digest=published.digest))),
            lambda: stub.Status(pb.StatusRequest()),
        )
        for call in calls:
            with pytest.raises(grpc.RpcError) as caught:
                call()
            assert caught.value.code() is grpc.StatusCode.INTERNAL
            assert "secret" not in caught.value.details()


def test_full_disk_at_the_server(shore: Shore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    toys = Owner(tmp_path / "toys", shore)
    parcel = toys.vector()

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "full")

    with shore.serve() as serving:
        client = toys.client(address(serving))
        with monkeypatch.context() as patch:
            patch.setattr(os, "fsync", full)
            with pytest.raises(RefusedError) as caught:
                client.send(parcel)
        assert caught.value.reason == "storage"
        assert not shore.store.find(run=RUN)
        assert client.send(parcel).verdict == "accepted"


def test_port_in_use_is_said(shore: Shore) -> None:
    with shore.serve() as serving, pytest.raises(FederationError, match="in use"):
        shore.serve(address(serving))


def test_enrolment_over_the_wire(shore: Shore, tmp_path: Path) -> None:
    key, token = SigningKey(bytes(32)), shore.invitations.invite("toys")

    def join(as_key: SigningKey, expected: SigningKey = shore.key) -> object:
        return enrol(
            address(serving),
            ca_certificate=shore.ca.certificate,
            domain="toys",
            token=token,
            identity=as_key,
            log_key=SigningKey(b"9" * 32).public,
            tls_csr=make_csr("toys", tmp_path / "tls.key"),
            node_key=NODE_KEY,
            server_key=expected.public,
        )

    with serve_enrolment(shore.enroller, "127.0.0.1:0", shore.tls) as serving:
        enrolled = join(key)
        assert join(key) == enrolled
        assert enrolled.certificate.startswith(b"-----BEGIN CERTIFICATE")
        assert enrolled.node_id == "node-toys"
        with pytest.raises(RefusedError) as caught:
            join(SigningKey(b"3" * 32))
        assert caught.value.reason == "token"
        with pytest.raises(SignatureError):
            join(key, SigningKey(bytes(32)))


def test_memory_stays_small(tmp_path: Path) -> None:
    """48 MiB across and back; Python's allocations stay at a few chunks."""
    tensors = {f"layer.{n}.weight": (1024, 1024) for n in range(12)}
    shore = Shore(tmp_path / "server", tensors)
    toys = Owner(tmp_path / "toys", shore)
    parcel = toys.vector()
    published = shore.publish(parcel.payload)
    with shore.serve() as serving:
        client = toys.client(address(serving))
        tracemalloc.start()
        client.send(parcel)
        client.fetch(published.digest, tmp_path / "got")
        peak_bytes = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
    assert peak_bytes < 24 << 20
    assert parcel.header.base_digest == BASE


def wait_for(condition: object, for_s: float = 10.0) -> None:
    until = time.monotonic() + for_s
    while not condition():
        assert time.monotonic() < until
        time.sleep(0.02)
