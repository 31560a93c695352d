"""Headers and receipts: an exact schema in both directions."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
from crossing import BASE, RUN, make_vector
from securesystemslib.dsse import Envelope
from securesystemslib.exceptions import VerificationError
from securesystemslib.signer import Key

from common import canonical
from common.errors import ParcelError, ProofError, SignatureError
from common.ledger import Crossing, Ledger
from common.parcels import SERVER, Codec, Header, Kind, Receipt, bucket, draft, seal_parcel
from common.signing import SigningKey, seal
from common.statements import TreeHead

KEY = SigningKey(bytes(32))


@pytest.fixture
def header(tmp_path: Path) -> Header:
    return draft(
        make_vector(tmp_path / "v"),
        kind=Kind.TASK_VECTOR,
        run=RUN,
        sender="toys",
        recipient=SERVER,
        base_digest=BASE,
        codec=Codec.FP32,
        training={"steps": 3},
    )


def test_round_trip(header: Header, tmp_path: Path) -> None:
    parcel = seal_parcel(header, tmp_path / "v", KEY)
    assert Header.open(parcel.envelope, KEY.public) == header
    assert [fact.name for fact in header.tensors] == ["layer.bias", "layer.weight"]
    assert seal_parcel(header, tmp_path / "v", KEY).digest == parcel.digest
    with pytest.raises(SignatureError):
        Header.open(parcel.envelope, SigningKey(b"1" * 32).public)


def test_securesystemslib_verifies_a_parcel(header: Header, tmp_path: Path) -> None:
    parcel = seal_parcel(header, tmp_path / "v", KEY)
    scheme = {"keytype": "ed25519", "scheme": "ed25519", "keyval": {"public": KEY.public.hex}}
    key, other = Key.from_dict(KEY.public.key_id, dict(scheme)), SigningKey(b"1" * 32).public
    envelope = Envelope.from_dict(json.loads(parcel.envelope))
    assert envelope.payload_type == "application/vnd.in-toto+json"
    assert list(envelope.verify([key], 1)) == [KEY.public.key_id]
    assert json.loads(envelope.payload)["predicate"]["payload_digest"] == header.payload_digest
    with pytest.raises(VerificationError):
        envelope.verify([Key.from_dict(other.key_id, {**scheme, "keyval": {"public": other.hex}})], 1)


def test_every_field_is_required(header: Header) -> None:
    for name in header.statement()["predicate"]:
        statement = header.statement()
        del statement["predicate"][name]
        with pytest.raises(ParcelError, match=name if name != "schema" else "missing"):
            Header.open(seal(statement, KEY), KEY.public)


def test_no_field_may_be_added(header: Header) -> None:
    for path in ((), ("predicate",), ("predicate", "privacy"), ("predicate", "checkpoint")):
        statement = header.statement()
        place = statement
        for key in path:
            place = place[key]
        place["note"] = "x"
        with pytest.raises(ParcelError, match=r"note|unknown"):
            Header.open(seal(statement, KEY), KEY.public)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("run", "Run one"),
        ("sender", "toys and a sentence"),
        ("sender", "*"),
        ("recipient", ""),
        ("kind", "letter"),
        ("codec", "pickle"),
        ("codec", "json"),
        ("round", -1),
        ("round", "1"),
        ("nonce", "00"),
        ("base_digest", "A" * 64),
        ("payload_bytes", 0),
        ("payload_digest", "0" * 64),
        ("training", {"seed": 1}),
        ("training", {"steps": "three"}),
        ("expires_s", 1),
        ("tensors", []),
        ("code_version", "1.0 hello"),
        ("schema", 2),
    ],
)
def test_bad_values_are_refused_when_correctly_signed(header: Header, field: str, value: object) -> None:
    statement = header.statement()
    statement["predicate"][field] = value
    with pytest.raises(ParcelError):
        Header.open(seal(statement, KEY), KEY.public)


def test_error_never_repeats_the_value(header: Header) -> None:
    statement = header.statement()
    statement["predicate"]["sender"] = "customer mail"
    with pytest.raises(ParcelError, match="sender") as caught:
        Header.open(seal(statement, KEY), KEY.public)
    assert "customer" not in str(caught.value)


def test_receipt(header: Header) -> None:
    receipt = Receipt(
        kind=header.kind,
        run=RUN,
        sender="toys",
        receiver=SERVER,
        parcel_digest="a" * 64,
        payload_digest=header.payload_digest,
        verdict="accepted",
        reason="",
        index=4,
        prev="d" * 64,
        checkpoint=TreeHead(size=5, root="b" * 64),
        proof=("e" * 64,),
        time_s=1,
    )
    envelope = receipt.seal(KEY)
    assert Receipt.open(envelope, KEY.public) == receipt
    receipt.check_matches("a" * 64, header)
    with pytest.raises(ParcelError, match="parcel_digest"):
        receipt.check_matches("c" * 64, header)
    with pytest.raises(ParcelError, match="another type"):
        Header.open(envelope, KEY.public)


@pytest.mark.parametrize(("verdict", "reason"), [("accepted", ""), ("refused", "wrong-run")])
def test_a_receipt_proves_the_entry(header: Header, tmp_path: Path, verdict: str, reason: str) -> None:
    ledger = Ledger(tmp_path / "ledger.jsonl")
    crossing = Crossing("in", "data", "parcel", "a" * 64, 70, "toys", header.kind.value, RUN, time_s=9)
    for number in range(6):
        ledger.record(replace(crossing, digest=f"{number:064x}"))
    size_bytes = 70 + (500 if verdict == "accepted" else 0)
    entry = ledger.record(replace(crossing, size_bytes=size_bytes, verdict=reason or verdict))
    ledger.record(crossing)
    receipt = Receipt(
        kind=header.kind,
        run=RUN,
        sender="toys",
        receiver=SERVER,
        parcel_digest="a" * 64,
        payload_digest=header.payload_digest,
        verdict=verdict,
        reason=reason,
        time_s=9,
        **ledger.place(entry.index),
    )
    receipt.check_entry(70, 500)
    changes: list[dict[str, object]] = [
        {"index": entry.index - 1},
        {"prev": "0" * 64},
        {"time_s": 10},
        {"parcel_digest": "c" * 64},
        {"checkpoint": ledger.tree_head()},
        {"proof": receipt.proof[:-1]},
        {"proof": (*receipt.proof[:-1], "0" * 64)},
    ]
    for change in changes:
        with pytest.raises(ProofError):
            receipt.model_copy(update=change).check_entry(70, 500)
    with pytest.raises(ProofError):
        receipt.check_entry(71, 500)


def test_header_of_400_tensors_is_small_and_quick(tmp_path: Path) -> None:
    tensors = {f"encoder.layer.{n}.attention.weight": (2,) for n in range(400)}
    path = make_vector(tmp_path / "v", tensors=tensors)
    header = draft(
        path,
        kind=Kind.TASK_VECTOR,
        run=RUN,
        sender="toys",
        recipient=SERVER,
        base_digest=BASE,
        codec=Codec.FP32,
    )
    envelope = header.seal(KEY)
    assert len(envelope) < canonical.MAX_BYTES / 8
    assert len(json.loads(envelope)) == 3


def test_bucket() -> None:
    assert [bucket(n) for n in (0, 1, 7, 49, 50, 480, 22363)] == [0, 1, 5, 20, 50, 200, 20000]
