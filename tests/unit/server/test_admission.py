"""Admission, rule by rule, through `Intake` and without a network."""

import base64
import errno
import os
import time
from pathlib import Path

import numpy as np
import pytest
from crossing import RUN, TENSORS, Owner, Shore, make_catalog, make_metrics, make_vector
from safetensors.numpy import save_file

from common.errors import RefusedError, StorageError, TransportError
from common.files import sha256_bytes
from common.parcels import SERVER, Codec, Header, Kind, Parcel, Receipt, seal_parcel
from common.revocation import Revocation
from common.rotation import Rotation
from common.signing import Sealed, SigningKey
from server.intake import SignedRefusalError, Upload
from server.store import OpenRun


@pytest.fixture
def shore(tmp_path: Path) -> Shore:
    return Shore(tmp_path / "server")


@pytest.fixture
def toys(tmp_path: Path, shore: Shore) -> Owner:
    return Owner(tmp_path / "toys", shore)


def deliver(shore: Shore, parcel: Parcel, owner: Owner) -> bytes:
    """What `Exchange` does with a whole upload."""
    begun = shore.intake.begin(parcel.envelope, owner.member.certificate_fingerprint)
    if isinstance(begun, bytes):
        return begun
    try:
        begun.write(parcel.payload.read_bytes()[begun.offset :])
        return begun.finish()
    finally:
        begun.close()


def refused_before_payload(shore: Shore, parcel: Parcel, owner: Owner) -> str:
    with pytest.raises(RefusedError) as caught:
        shore.intake.begin(parcel.envelope, owner.member.certificate_fingerprint)
    assert not list(shore.store.spool_folder.iterdir())
    assert shore.ledger[len(shore.ledger) - 1].body["verdict"] in (caught.value.reason, "")
    return caught.value.reason


def refused_after_payload(shore: Shore, parcel: Parcel, owner: Owner) -> SignedRefusalError:
    with pytest.raises(SignedRefusalError) as caught:
        deliver(shore, parcel, owner)
    assert not list(shore.store.spool_folder.iterdir())
    assert not shore.store.find(run=RUN)
    with pytest.raises(SignedRefusalError) as again:
        shore.intake.begin(parcel.envelope, owner.member.certificate_fingerprint)
    assert again.value.receipt == caught.value.receipt
    return caught.value


def test_accepted_once_with_one_receipt(shore: Shore, toys: Owner) -> None:
    parcel = toys.vector()
    envelope = deliver(shore, parcel, toys)
    receipt = Receipt.open(envelope, shore.key.public)
    receipt.check_matches(parcel.digest, parcel.header)
    assert (receipt.verdict, receipt.receiver) == ("accepted", SERVER)
    assert shore.ledger.tree_head(receipt.index + 1) == receipt.checkpoint
    receipt.check_entry(len(parcel.envelope), parcel.header.payload_bytes)
    assert [entry.body["verdict"] for entry in shore.ledger] == ["accepted", ""]
    shore.restart()
    assert deliver(shore, parcel, toys) == envelope
    assert len(shore.ledger) == 2
    stored = shore.store.find(run=RUN, kind=Kind.TASK_VECTOR, sender="toys", round=0)
    assert [found.digest for found in stored] == [parcel.digest]
    kept = shore.store.get(parcel.digest)
    assert kept is not None
    assert kept.payload.read_bytes() == parcel.payload.read_bytes()


def test_catalog_and_metrics(shore: Shore, toys: Owner, tmp_path: Path) -> None:
    for kind, payload in (
        (Kind.CATALOG, make_catalog(tmp_path / "c", "toys")),
        (Kind.METRICS, make_metrics(tmp_path / "m", **{"zero-shot/recall@10": 0.5})),
    ):
        deliver(shore, toys.ungated(payload, kind), toys)
    assert len(shore.store.find(run=RUN)) == 2


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"run": "other"}, "wrong-run"),
        ({"round": 3}, "wrong-run"),
        ({"recipient": "beauty"}, "recipient"),
        ({"sender": "beauty"}, "sender"),
        ({"base_digest": "1" * 64}, "base-mismatch"),
        ({"created_s": 1_000_000_000}, "expired"),
        ({"created_s": 4_000_000_000}, "expired"),
        ({"kind": Kind.CANDIDATE}, "kind"),
    ],
)
def test_header_rules(shore: Shore, toys: Owner, tmp_path: Path, changes: dict, reason: str) -> None:
    parcel = toys.ungated(make_vector(tmp_path / "v"), **{"codec": Codec.FP32, **changes})
    assert refused_before_payload(shore, parcel, toys) == reason


def test_a_withdrawn_vector_is_refused_in_whatever_parcel_and_even_under_way(
    shore: Shore, toys: Owner, tmp_path: Path
) -> None:
    payload = make_vector(tmp_path / "v")
    first, second = toys.ungated(payload), toys.ungated(payload)
    begun = shore.intake.begin(first.envelope, toys.member.certificate_fingerprint)
    assert isinstance(begun, Upload)
    begun.write(payload.read_bytes())
    shore.store.withdraw(first.header.payload_digest)
    with pytest.raises(SignedRefusalError, match="never merged again") as caught:
        begun.finish()
    assert caught.value.reason == "withdrawn"
    assert refused_before_payload(shore, second, toys) == "withdrawn"
    deliver(shore, toys.vector(7), toys)  # another one is welcome


def test_only_who_delivered_a_vector_takes_it_back_and_that_even_later(
    shore: Shore, toys: Owner, tmp_path: Path
) -> None:
    vector, beauty = toys.vector(), Owner(tmp_path / "beauty", shore, domain="beauty")
    deliver(shore, vector, toys)
    shore.store.close_run(RUN)
    payload = tmp_path / "revocation"
    for data in (
        Revocation(vector.digest, "c" * 64),
        Revocation("c" * 64, vector.header.payload_digest),
        Revocation(vector.digest, vector.header.payload_digest, ("c" * 64,)),
    ):
        payload.write_bytes(data.encode())
        with pytest.raises(SignedRefusalError, match="not a vector that this domain delivered"):
            deliver(shore, toys.ungated(payload, Kind.REVOCATION), toys)
    payload.write_bytes(Revocation(vector.digest, vector.header.payload_digest).encode())
    with pytest.raises(SignedRefusalError, match="not a vector that this domain delivered"):
        deliver(shore, beauty.ungated(payload, Kind.REVOCATION), beauty)
    assert not shore.store.is_withdrawn(vector.header.payload_digest)
    deliver(shore, toys.ungated(payload, Kind.REVOCATION), toys)
    assert shore.store.is_withdrawn(vector.header.payload_digest)


@pytest.mark.parametrize(
    "tensors",
    [
        {"layer.bias": (4,)},
        {**TENSORS, "embeddings.word_embeddings.weight": (9, 4)},
        {**TENSORS, "layer.weight": (4, 8)},
    ],
)
def test_tensor_table_is_the_bases(shore: Shore, toys: Owner, tmp_path: Path, tensors: dict) -> None:
    parcel = toys.ungated(make_vector(tmp_path / "v", tensors=tensors))
    assert refused_before_payload(shore, parcel, toys) == "tensor-table"


def test_identity(shore: Shore, toys: Owner, tmp_path: Path) -> None:
    beauty = Owner(tmp_path / "beauty", shore, "beauty")
    parcel = toys.vector()
    assert refused_before_payload(shore, parcel, beauty) == "sender"  # the header of one, the link of another
    stranger = Parcel(parcel.header.seal(SigningKey(bytes(32))), parcel.header, parcel.payload)
    assert refused_before_payload(shore, stranger, toys) == "unknown-sender"
    signature = base64.b64encode(Sealed.parse(parcel.envelope).signature)
    forged = parcel.envelope.replace(signature, base64.b64encode(bytes(64)))
    assert refused_before_payload(shore, Parcel(forged, parcel.header, parcel.payload), toys) == "signature"
    shore.members.revoke("toys", ledger_size=0)
    assert refused_before_payload(shore, parcel, toys) == "revoked"


def test_who_is_revoked_during_an_upload_is_not_heard_to_the_end(shore: Shore, toys: Owner) -> None:
    parcel = toys.vector()
    begun = shore.intake.begin(parcel.envelope, toys.member.certificate_fingerprint)
    assert not isinstance(begun, bytes)
    begun.write(parcel.payload.read_bytes())
    shore.members.revoke("toys", ledger_size=len(shore.ledger))
    with pytest.raises(SignedRefusalError) as caught:
        begun.finish()
    begun.close()
    assert caught.value.reason == "revoked"
    assert shore.store.find(sender="toys") == []
    assert [entry.body["verdict"] for entry in shore.ledger if entry.body["type"] == "parcel"] == ["revoked"]


def test_a_key_that_is_replaced_during_an_upload_signs_nothing_more(shore: Shore, toys: Owner) -> None:
    parcel = toys.vector()
    begun = shore.intake.begin(parcel.envelope, toys.member.certificate_fingerprint)
    assert not isinstance(begun, bytes)
    begun.write(parcel.payload.read_bytes())
    rotation = Rotation.make("toys", toys.key, SigningKey(b"n" * 32), SigningKey(b"l" * 32).public)
    shore.members.rotate(rotation.keys, ledger_size=len(shore.ledger))
    with pytest.raises(SignedRefusalError) as caught:
        begun.finish()
    begun.close()
    assert caught.value.reason == "rotated"
    assert shore.store.find(sender="toys") == []
    assert [entry.body["verdict"] for entry in shore.ledger if entry.body["type"] == "parcel"] == ["rotated"]


def test_garbage_is_refused_by_name(shore: Shore, toys: Owner) -> None:
    for garbage in (b"", b"{}", b"\0" * 100):
        with pytest.raises(RefusedError) as caught:
            shore.intake.begin(garbage, toys.member.certificate_fingerprint)
        assert caught.value.reason == "malformed"


def test_a_used_nonce_is_refused(shore: Shore, toys: Owner, tmp_path: Path) -> None:
    first = toys.vector()
    deliver(shore, first, toys)
    header = toys.draft(make_vector(tmp_path / "v", 1)).model_copy(update={"nonce": first.header.nonce})
    assert refused_before_payload(shore, seal_parcel(header, tmp_path / "v", toys.key), toys) == "replay"


def test_quota_counts_what_is_under_way(shore: Shore, toys: Owner) -> None:
    run = shore.store.run(RUN)
    assert run is not None
    first, second = toys.vector(0), toys.vector(1)
    shore.store.open_run(run.model_copy(update={"quota_parcels": 1}))
    begun = shore.intake.begin(first.envelope, toys.member.certificate_fingerprint)
    assert isinstance(begun, Upload)
    begun.close()
    with pytest.raises(RefusedError, match="parcels in this run"):
        shore.intake.begin(second.envelope, toys.member.certificate_fingerprint)
    shore.store.open_run(run.model_copy(update={"max_payload_bytes": 10}))
    with pytest.raises(RefusedError, match="bytes in one payload"):
        shore.intake.begin(second.envelope, toys.member.certificate_fingerprint)
    shore.store.close_run(RUN)
    with pytest.raises(RefusedError, match="not open"):
        shore.intake.begin(second.envelope, toys.member.certificate_fingerprint)


def _vector(path: Path, **values: np.ndarray) -> Path:
    good = {name: np.full(shape, 0.01, np.float32) for name, shape in TENSORS.items()}
    save_file({**good, **{name.replace("_", "."): value for name, value in values.items()}}, path)
    return path


def test_payload_rules(shore: Shore, toys: Owner, tmp_path: Path) -> None:
    nan = np.full((4,), np.nan, np.float32)
    huge = np.full((4,), 1e6, np.float32)
    cases = {
        "not-finite": toys.ungated(_vector(tmp_path / "nan", layer_bias=nan)),
        "norm": toys.ungated(_vector(tmp_path / "huge", layer_bias=huge)),
        "metrics": toys.ungated(make_metrics(tmp_path / "m", revenue=1.0), Kind.METRICS),
        "sender": toys.ungated(make_catalog(tmp_path / "c", "beauty"), Kind.CATALOG),
    }
    for reason, parcel in cases.items():
        refusal = refused_after_payload(shore, parcel, toys)
        assert refusal.reason == reason
        receipt = Receipt.open(refusal.receipt, shore.key.public)
        assert (receipt.verdict, receipt.reason) == ("refused", reason)
    zeros = {name: np.zeros(shape, np.float32) for name, shape in TENSORS.items()}
    save_file(zeros, tmp_path / "zero")
    assert refused_after_payload(shore, toys.ungated(tmp_path / "zero"), toys).reason == "norm"


def test_payload_that_lies_about_its_table(shore: Shore, toys: Owner, tmp_path: Path) -> None:
    path = make_vector(tmp_path / "v", tensors={**TENSORS, "extra": (2,)})
    honest = toys.draft(make_vector(tmp_path / "h"))
    lie = honest.model_copy(
        update={"payload_digest": toys.draft(path).payload_digest, "payload_bytes": path.stat().st_size}
    )
    refusal = refused_after_payload(shore, seal_parcel(lie, path, toys.key), toys)
    assert (refusal.reason, "extra" in refusal.message) == ("tensor-table", True)


def test_malformed_payload(shore: Shore, toys: Owner, tmp_path: Path) -> None:
    (tmp_path / "c").write_bytes(b"no parquet")
    refusal = refused_after_payload(shore, toys.ungated(tmp_path / "c", Kind.CATALOG), toys)
    assert refusal.reason == "payload"
    assert str(tmp_path) not in refusal.message


def test_other_bytes_than_promised(shore: Shore, toys: Owner) -> None:
    parcel = toys.vector()
    begun = shore.intake.begin(parcel.envelope, toys.member.certificate_fingerprint)
    assert isinstance(begun, Upload)
    begun.write(bytes(parcel.header.payload_bytes))
    with pytest.raises(SignedRefusalError) as caught:
        begun.finish()
    assert caught.value.reason == "payload-digest"
    other = toys.vector(1)
    begun = shore.intake.begin(other.envelope, toys.member.certificate_fingerprint)
    assert isinstance(begun, Upload)
    with pytest.raises(SignedRefusalError, match="more payload"):
        begun.write(bytes(other.header.payload_bytes + 1))


def test_resume_after_a_restart_and_take_over(shore: Shore, toys: Owner) -> None:
    parcel = toys.vector()
    data = parcel.payload.read_bytes()
    begun = shore.intake.begin(parcel.envelope, toys.member.certificate_fingerprint)
    assert isinstance(begun, Upload)
    begun.write(data[:50])
    with pytest.raises(TransportError, match="not complete"):
        begun.finish()
    newer = shore.intake.begin(parcel.envelope, toys.member.certificate_fingerprint)
    assert isinstance(newer, Upload)
    assert newer.offset == 50
    with pytest.raises(TransportError, match="took this upload over"):
        begun.write(data[50:])
    newer.write(data[50:70])
    newer.close()
    shore.restart()
    last = shore.intake.begin(parcel.envelope, toys.member.certificate_fingerprint)
    assert isinstance(last, Upload)
    assert last.offset == 70
    last.write(data[70:])
    assert Receipt.open(last.finish(), shore.key.public).verdict == "accepted"
    assert not list(shore.store.spool_folder.iterdir())


def test_spool_damaged_by_a_crash_starts_again(shore: Shore, toys: Owner) -> None:
    parcel = toys.vector()
    shore.store.spool_path(parcel.digest).write_bytes(bytes(60))
    begun = shore.intake.begin(parcel.envelope, toys.member.certificate_fingerprint)
    assert isinstance(begun, Upload)
    begun.write(parcel.payload.read_bytes()[60:])
    with pytest.raises(TransportError, match="does not match"):
        begun.finish()
    assert Receipt.open(deliver(shore, parcel, toys), shore.key.public).verdict == "accepted"


@pytest.mark.parametrize("step", ["keep_payload", "record_accepted", "record_receipt_out"])
def test_crash_at_any_step_of_acceptance(
    shore: Shore, toys: Owner, monkeypatch: pytest.MonkeyPatch, step: str
) -> None:
    parcel = toys.vector()
    owner = shore.intake if step == "record_receipt_out" else shore.store

    def crash(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(owner, step, crash)
        with pytest.raises(KeyboardInterrupt):
            deliver(shore, parcel, toys)
    shore.restart()
    envelope = deliver(shore, parcel, toys)
    receipt = Receipt.open(envelope, shore.key.public)
    accepted = [entry for entry in shore.ledger if entry.body["verdict"] == "accepted"]
    assert [entry.index for entry in accepted] == [receipt.index]
    assert len(shore.store.find(run=RUN)) == 1
    assert _receipts_out(shore) == [sha256_bytes(envelope)]


def _receipts_out(shore: Shore) -> list[str]:
    bodies = [entry.body for entry in shore.ledger]
    return [body["digest"] for body in bodies if (body["type"], body["direction"]) == ("receipt", "out")]


def test_crash_before_the_receipt_of_a_refusal_is_in_the_ledger(
    shore: Shore, toys: Owner, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    payload = make_vector(tmp_path / "zero", 1)
    payload.write_bytes(payload.read_bytes()[:-8] + b"\xff" * 8)  # NaN
    parcel = toys.ungated(payload)

    def crash(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(shore.intake, "record_receipt_out", crash)
        with pytest.raises(KeyboardInterrupt):
            deliver(shore, parcel, toys)
    shore.restart()
    for _ in range(2):
        with pytest.raises(SignedRefusalError) as caught:
            deliver(shore, parcel, toys)
    assert _receipts_out(shore) == [sha256_bytes(caught.value.receipt)]


@pytest.mark.parametrize("call", ["write", "fsync", "link"])
def test_full_disk(shore: Shore, toys: Owner, monkeypatch: pytest.MonkeyPatch, call: str) -> None:
    parcel = toys.vector()
    begun = shore.intake.begin(parcel.envelope, toys.member.certificate_fingerprint)
    assert isinstance(begun, Upload)
    if call != "write":
        begun.write(parcel.payload.read_bytes())

    def full(*_: object, **__: object) -> None:
        raise OSError(errno.ENOSPC, "full")

    with monkeypatch.context() as patch:
        patch.setattr(os, call, full)
        with pytest.raises(StorageError):
            begun.write(parcel.payload.read_bytes()) if call == "write" else begun.finish()
    begun.close()
    assert not shore.store.find(run=RUN)
    assert Receipt.open(deliver(shore, parcel, toys), shore.key.public).verdict == "accepted"


def test_no_room_is_refused_before_payload(
    shore: Shore, toys: Owner, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shore.store, "free_bytes", lambda: 1000)
    with pytest.raises(StorageError, match="disk is full"):
        shore.intake.begin(toys.vector().envelope, toys.member.certificate_fingerprint)


def test_every_changed_byte_of_an_envelope_is_refused(shore: Shore, toys: Owner) -> None:
    parcel = toys.vector()
    for position in range(0, len(parcel.envelope), 7):
        changed = bytearray(parcel.envelope)
        changed[position] ^= 0x01
        with pytest.raises(RefusedError):
            shore.intake._identify(bytes(changed), toys.member.certificate_fingerprint)


def test_open_run_in_another_process_is_seen(shore: Shore, toys: Owner) -> None:
    before = shore.store.run("later")
    shore.restart()
    shore.store.open_run(
        OpenRun(run="later", base_digest="0" * 64, domains=frozenset(), tensors={}, max_norm=9.0)
    )
    assert before is None
    assert toys.shore.store.run("later") is not None
    assert Header.stored(toys.vector().envelope).created_s <= time.time()
