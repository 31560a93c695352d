"""Decoders of canonical JSON and of what is signed: envelopes, headers, receipts, orders, root files."""

from __future__ import annotations

import base64
import json
from pathlib import Path

from crossing import BASE, RUN, make_vector

from common import canonical
from common.config import RunConfig
from common.ledger import Crossing, Ledger
from common.orders import CONTRIBUTE, PAYLOAD_TYPE, Candidate, Order
from common.parcels import SERVER, Codec, Header, Kind, Receipt, draft
from common.roots import PAYLOAD_TYPE as ROOT_TYPE
from common.roots import Party, Root, RootMember, SignedRoot
from common.rotation import Rotation
from common.signing import STATEMENT_TYPE, PublicKey, Sealed, SigningKey, pae, seal
from common.tls import create_ca
from common.witness.card import WitnessCard, read_card
from fuzz.decoders import KEY, OTHER, Decoder, as_text, decoder, encoded


def _sealed(payload: bytes, payload_type: str = STATEMENT_TYPE, key: SigningKey = KEY) -> bytes:
    """Any bytes, correctly signed: `common.signing.seal` would refuse most of them."""
    signature = {
        "keyid": key.public.key_id,
        "sig": base64.b64encode(key.sign(pae(payload_type, payload))).decode(),
    }
    outer = {
        "payload": base64.b64encode(payload).decode(),
        "payloadType": payload_type,
        "signatures": [signature],
    }
    return encoded(outer)


@decoder
def canonical_json(_: Path) -> Decoder:
    def read(data: bytes) -> None:
        assert canonical.encode(canonical.decode(data)) == data

    return Decoder((b'{"a":[1,-2,{"b":"x"}],"c":"~ "}', b"[]", b"9007199254740991", b'"a\\"b"'), read)


@decoder
def standard_base64(_: Path) -> Decoder:
    def read(data: bytes) -> None:
        assert base64.b64encode(canonical.decode_base64(as_text(data))) == data

    return Decoder((b"", b"QQ==", b"QUI=", b"QUJD" * 20, b"+/+/"), read)


@decoder
def envelope(_: Path) -> Decoder:
    statements = ({"a": 1}, {"b": ["x", {"c": 2**53 - 1}]})
    known = {seal(statement, KEY): statement for statement in statements}

    def read(data: bytes) -> None:
        statement = Sealed.parse(data).open(KEY.public)
        assert seal(statement, KEY) == data

    return Decoder(tuple(map(encoded, statements)), read, _sealed, tuple(known))


def _header(folder: Path) -> Header:
    return draft(
        make_vector(folder / "vector"),
        kind=Kind.TASK_VECTOR,
        run=RUN,
        sender="toys",
        recipient=SERVER,
        base_digest=BASE,
        codec=Codec.FP32,
        training={"steps": 5, "users_bucket": 200},
        created_s=1_700_000_000,
    )


@decoder
def parcel_header(folder: Path) -> Decoder:
    header = _header(folder)

    def read(data: bytes) -> None:
        assert Header.open(data, KEY.public).seal(KEY) == data

    return Decoder((canonical.encode(header.statement()),), read, _sealed, (header.seal(KEY),))


def _receipt(header: Header, ledger: Ledger) -> Receipt:
    digest = "ab" * 32
    for other in ("cd", "ef", "ab"):
        entry = ledger.record(
            Crossing(
                "in",
                "data",
                "parcel",
                other * 32,
                1000 + header.payload_bytes,
                "toys",
                header.kind.value,
                RUN,
                "accepted",
                5,
            )
        )
    return Receipt(
        kind=header.kind, run=RUN, sender="toys", receiver=SERVER, parcel_digest=digest,
        payload_digest=header.payload_digest, verdict="accepted", reason="", time_s=5,
        **ledger.place(entry.index),
    )  # fmt: skip


@decoder
def receipt(folder: Path) -> Decoder:
    header = _header(folder)
    given = _receipt(header, Ledger(folder / "ledger.jsonl"))
    facts = (
        "index",
        "prev",
        "checkpoint",
        "proof",
        "parcel_digest",
        "verdict",
        "kind",
        "run",
        "sender",
        "time_s",
    )

    def read(data: bytes) -> None:
        found = Receipt.open(data, KEY.public)
        assert found.seal(KEY) == data
        found.check_entry(1000, header.payload_bytes)
        if found.checkpoint == given.checkpoint:  # what it proves in this tree is what is in this tree
            assert all(getattr(found, fact) == getattr(given, fact) for fact in facts)

    return Decoder((canonical.encode(given.statement()),), read, _sealed, (given.seal(KEY),))


@decoder
def order(_: Path) -> Decoder:
    config = RunConfig.model_validate({"merge": [{"method": "ties"}], "publish": "ties"})
    orders = (
        Order(CONTRIBUTE, RUN, "toys", config, BASE),
        Order(CONTRIBUTE, RUN, "toys", config, BASE, (Candidate("ties", BASE, ""),)),
    )
    envelopes = tuple(order.sign(KEY) for order in orders)
    statements = [Sealed.parse(envelope).unverified() for envelope in envelopes]
    for statement in statements:
        statement["config"] = json.loads(statement["config"])  # so that its values are fuzzed, too

    def wrap(data: bytes) -> bytes:
        try:
            statement = json.loads(data)
            if isinstance(statement["config"], dict):
                statement["config"] = json.dumps(statement["config"])
        except (ValueError, KeyError, TypeError, RecursionError):
            return _sealed(data, PAYLOAD_TYPE)
        return _sealed(encoded(statement), PAYLOAD_TYPE)

    def read(data: bytes) -> None:
        found = Order.open(data, KEY.public, "toys")
        assert Order.open(found.sign(KEY), KEY.public, "toys") == found

    return Decoder(tuple(map(encoded, statements)), read, wrap, envelopes)


@decoder
def root_file(_: Path) -> Decoder:
    keys = sorted(SigningKey(bytes([n]) * 32).public.hex for n in range(3, 7))
    root = Root(
        version=3, created_s=1, expires_s=2, threshold=1, root_keys=(KEY.public.hex,),
        server=Party(identity_key=keys[0], log_key=keys[1]), witnesses=(),
        members=(
            RootMember(
                domain="toys", pseudonym="d-1", identity_key=keys[2], log_key=keys[3],
                certificate_fingerprint=BASE,
            ),
        ),
    )  # fmt: skip

    def wrap(data: bytes) -> bytes:
        signature = base64.b64encode(KEY.sign(pae(ROOT_TYPE, data))).decode()
        return b'{"root":%s,"signatures":[{"keyid":"%s","sig":"%s"}]}\n' % (
            data, KEY.public.key_id.encode(), signature.encode(),
        )  # fmt: skip

    def read(data: bytes) -> None:
        signed = SignedRoot.parse(data)
        signed.verify_self()
        assert signed.encode() == data.removesuffix(b"\n") + b"\n"

    whole = SignedRoot.sign(root, [KEY, OTHER]).encode()
    return Decoder((canonical.encode(root.model_dump(mode="json")),), read, wrap, (whole,))


@decoder
def change_of_keys(_: Path) -> Decoder:
    made = Rotation.make("toys", KEY, OTHER, SigningKey(bytes([3]) * 32).public)
    statement = canonical.encode(made.keys.statement())

    def wrap(data: bytes) -> bytes:
        """Any statement, correctly signed by both keys."""
        envelopes = {"by_new": _sealed(data, key=OTHER).decode(), "by_old": _sealed(data).decode()}
        return encoded(envelopes)

    def read(data: bytes) -> None:
        found = Rotation.open(data)
        assert found == Rotation.make(found.keys.shore, KEY, OTHER, PublicKey.from_hex(found.keys.log_key))

    return Decoder((statement,), read, wrap, (made.data,))


@decoder
def witness_card(folder: Path) -> Decoder:
    path = folder / "card.json"
    card = WitnessCard(
        name="w1.example", key=KEY.public.hex, address="w1.example:9105",
        ca_certificate=create_ca(folder / "card").certificate.read_text(),
    )  # fmt: skip

    def read(data: bytes) -> None:
        path.write_bytes(data)
        found = read_card(path)
        found.save(path)
        assert read_card(path) == found

    return Decoder((card.model_dump_json().encode(),), read)
