"""The test vectors of the audit formats: what they say holds for a reader that has none of our code."""

from __future__ import annotations

import base64
import hashlib
import json
import runpy
from pathlib import Path
from typing import Any

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey

from common.notes import Checkpoint, Verifier
from common.parcels import Receipt
from common.roots import SignedRoot
from common.signing import PublicKey

DOCS = Path(__file__).resolve().parents[2] / "docs"


@pytest.fixture(scope="module")
def vectors() -> dict[str, Any]:
    found: dict[str, Any] = json.loads((DOCS / "vectors" / "audit.json").read_text(encoding="utf-8"))
    return found


def _sha256(data: bytes) -> bytes:
    return hashlib.sha256(data).digest()


def _root(leaves: list[bytes]) -> bytes:
    """RFC 9162, 2.1.1."""
    if len(leaves) < 2:
        return leaves[0] if leaves else _sha256(b"")
    half = 1
    while 2 * half < len(leaves):
        half *= 2
    return _sha256(b"\x01" + _root(leaves[:half]) + _root(leaves[half:]))


def _public(vectors: dict[str, Any], name: str) -> Ed25519PublicKey:
    return Ed25519PublicKey.from_public_bytes(bytes.fromhex(vectors["keys"][name]["public"]))


def _open(vectors: dict[str, Any], envelope: str, name: str) -> dict[str, Any]:
    """A DSSE envelope read by hand."""
    outer = json.loads(envelope)
    payload = base64.b64decode(outer["payload"])
    kind = outer["payloadType"]
    signed = b"DSSEv1 %d %s %d %s" % (len(kind), kind.encode(), len(payload), payload)
    _public(vectors, name).verify(base64.b64decode(outer["signatures"][0]["sig"]), signed)
    statement: dict[str, Any] = json.loads(payload)
    return statement


def test_they_are_what_the_code_makes_today(vectors: dict[str, Any]) -> None:
    made = runpy.run_path(str(DOCS / "generate_vectors.py"))["vectors"]()
    assert made == vectors, "run: python docs/generate_vectors.py"


def test_keys(vectors: dict[str, Any]) -> None:
    for key in vectors["keys"].values():
        public = Ed25519PrivateKey.from_private_bytes(bytes.fromhex(key["seed"])).public_key()
        assert public.public_bytes_raw().hex() == key["public"]
        assert _sha256(bytes.fromhex(key["public"])).hex() == key["keyid"]


def test_canonical_json_and_envelope(vectors: dict[str, Any]) -> None:
    value = vectors["canonical"]["value"]
    assert json.dumps(value, sort_keys=True, separators=(",", ":")) == vectors["canonical"]["bytes"]
    assert vectors["pae"]["bytes"] == "DSSEv1 3 a/b 2 {}"
    envelope = vectors["envelope"]
    assert _open(vectors, envelope["bytes"], envelope["signer"]) == envelope["statement"]


def test_ledger(vectors: dict[str, Any]) -> None:
    ledger, previous = vectors["ledger"], "0" * 64
    leaves = [_sha256(b"\x00" + line.encode()) for line in ledger["lines"]]
    assert [leaf.hex() for leaf in leaves] == ledger["leaf_hashes"]
    assert [_root(leaves[:size]).hex() for size in range(6)] == ledger["roots"]
    for index, line in enumerate(ledger["lines"]):
        assert (json.loads(line)["index"], json.loads(line)["prev"]) == (index, previous)
        previous = _sha256(line.encode()).hex()
    three, zero_one, four = map(bytes.fromhex, ledger["inclusion_of_2_in_5"])
    assert (three, zero_one, four) == (leaves[3], _root(leaves[:2]), leaves[4])
    two, three, zero_one, four = map(bytes.fromhex, ledger["consistency_of_3_with_5"])
    assert (two, three, zero_one, four) == (leaves[2], leaves[3], _root(leaves[:2]), leaves[4])


def test_checkpoint_and_cosignature(vectors: dict[str, Any]) -> None:
    checkpoint = vectors["checkpoint"]
    body, lines = checkpoint["cosigned"].split("\n\n")
    origin, size, root = body.split("\n")
    assert (origin, size, base64.b64decode(root).hex()) == (
        checkpoint["origin"],
        "5",
        vectors["ledger"]["roots"][5],
    )
    assert origin == f"isthmus/server/{vectors['keys']['server log']['keyid'][:16]}"
    signed, cosigned = (base64.b64decode(line.split(" ")[2]) for line in lines.strip().split("\n"))
    log = bytes.fromhex(vectors["keys"]["server log"]["public"])
    assert signed[:4] == _sha256(origin.encode() + b"\n\x01" + log)[:4]
    _public(vectors, "server log").verify(signed[4:], f"{body}\n".encode())
    witness = bytes.fromhex(vectors["keys"]["witness"]["public"])
    assert cosigned[:4] == _sha256(b"w1.witness.example\n\x04" + witness)[:4]
    time_s = int.from_bytes(cosigned[4:12], "big")
    _public(vectors, "witness").verify(cosigned[12:], f"cosignature/v1\ntime {time_s}\n{body}\n".encode())
    key = PublicKey.from_hex(log.hex())
    assert Checkpoint.open(checkpoint["note"], Verifier(origin, key)).size == 5


def test_receipt(vectors: dict[str, Any]) -> None:
    predicate = _open(vectors, vectors["receipt"]["bytes"], vectors["receipt"]["signer"])["predicate"]
    ledger = vectors["ledger"]
    assert predicate["checkpoint"] == {"size": 4, "root": ledger["roots"][4]}
    assert predicate["prev"] == json.loads(ledger["lines"][3])["prev"]
    leaves = list(map(bytes.fromhex, ledger["leaf_hashes"]))
    assert predicate["proof"] == [leaves[2].hex(), _root(leaves[:2]).hex()]
    signer = PublicKey.from_hex(vectors["keys"]["server identity"]["public"])
    Receipt.open(vectors["receipt"]["bytes"].encode(), signer).check_entry(1003, 0)


def test_root(vectors: dict[str, Any]) -> None:
    content = vectors["root"]["bytes"]
    outer = json.loads(content)
    signed = json.dumps(outer["root"], sort_keys=True, separators=(",", ":")).encode()
    kind = b"application/vnd.isthmus.root.v1+json"
    message = b"DSSEv1 %d %s %d %s" % (len(kind), kind, len(signed), signed)
    (signature,) = outer["signatures"]
    assert signature["keyid"] == vectors["keys"]["root"]["keyid"]
    _public(vectors, "root").verify(base64.b64decode(signature["sig"]), message)
    SignedRoot.parse(content.encode()).verify_self()
