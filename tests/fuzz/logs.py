"""Decoders of notes, Merkle proofs and ledgers."""

from __future__ import annotations

import base64
import hashlib
import json
from pathlib import Path
from typing import Any

from crossing import RUN

from common import merkle
from common.errors import LedgerError, ParcelError
from common.ledger import Crossing, Ledger, walk
from common.notes import Checkpoint, Note, Signer, Verifier
from common.parcels import SERVER
from fuzz.decoders import KEY, OTHER, Decoder, as_text, decoder, encoded

LOG = Signer("isthmus/toys/log", KEY)
LOG_KEY = Verifier(LOG.name, KEY.public)
WITNESS = Signer("w1.witness.example", OTHER)


@decoder
def note(_: Path) -> Decoder:
    plain = LOG.sign("one\ntwo\n")

    def read(data: bytes) -> None:
        assert str(Note.parse(as_text(data))).encode() == data

    cosigned = plain.with_cosignature(WITNESS, time_s=1_700_000_000)
    return Decoder((str(plain).encode(), str(cosigned).encode()), read)


@decoder
def checkpoint(_: Path) -> Decoder:
    text = Checkpoint(LOG.name, 5, b"r" * 32).text()

    def wrap(data: bytes) -> bytes:
        signature = hashlib.sha256(LOG.name.encode() + b"\n\x01" + KEY.public.raw).digest()[:4] + KEY.sign(
            data
        )
        return data + b"\n\xe2\x80\x94 %s %s\n" % (LOG.name.encode(), base64.b64encode(signature))

    def read(data: bytes) -> None:
        found = Checkpoint.open(as_text(data), LOG_KEY)
        assert data.startswith(found.text().encode() + b"\n")

    return Decoder((text.encode(),), read, wrap, (str(LOG.sign(text)).encode(),))


@decoder
def cosignature(_: Path) -> Decoder:
    signed = LOG.sign(Checkpoint(LOG.name, 5, b"r" * 32).text())
    sample = signed.with_cosignature(WITNESS, time_s=1_700_000_000)

    def read(data: bytes) -> None:
        found = Note.parse(as_text(data))
        assert found.cosigned_by(Verifier(WITNESS.name, OTHER.public)) == 1_700_000_000
        assert found.text == signed.text

    return Decoder((str(sample).encode(),), read)


@decoder
def verifier_key(_: Path) -> Decoder:
    def read(data: bytes) -> None:
        assert Verifier.from_vkey(as_text(data)).vkey().encode() == data

    published = b"PeterNeumann+c74f20a3+ARpc2QcUPDhMQegwxbzhKqiBfsVkmqq/LDE4izWy10TW"
    return Decoder((published, LOG_KEY.vkey().encode()), read)


LEAVES = [merkle.leaf_hash(bytes([n])) for n in range(13)]


def _tree() -> merkle.Tree:
    tree = merkle.Tree()
    for leaf in LEAVES:
        tree.append(leaf)
    return tree


def _proof(data: bytes) -> dict[str, Any]:
    """A proof in JSON, for fuzzing only: where it is none there is nothing to verify."""
    try:
        found = json.loads(data)
        found["proof"] = [bytes.fromhex(node) for node in found["proof"]]
        found["of"], found["root"] = bytes.fromhex(found["of"]), bytes.fromhex(found["root"])
        if type(found["at"]) is not int or type(found["size"]) is not int:
            raise ParcelError("not a proof")
    except (ValueError, TypeError, KeyError, RecursionError):
        raise ParcelError("not a proof") from None
    return found


def _proof_sample(at: int, size: int, of: bytes, proof: list[bytes], root: bytes) -> bytes:
    fields = {
        "at": at,
        "size": size,
        "of": of.hex(),
        "proof": [node.hex() for node in proof],
        "root": root.hex(),
    }
    return encoded(fields)


@decoder
def inclusion_proof(_: Path) -> Decoder:
    tree = _tree()

    def read(data: bytes) -> None:
        given = _proof(data)
        merkle.verify_inclusion(given["at"], given["size"], given["of"], given["proof"], given["root"])
        if given["size"] <= len(tree) and given["root"] == tree.root(given["size"]):
            assert given["of"] == LEAVES[given["at"]]

    places = ((0, 1), (2, 3), (6, 7), (3, 8), (12, 13))
    samples = [_proof_sample(i, n, LEAVES[i], tree.inclusion(i, n), tree.root(n)) for i, n in places]
    return Decoder(tuple(samples), read)


@decoder
def consistency_proof(_: Path) -> Decoder:
    tree = _tree()

    def read(data: bytes) -> None:
        given = _proof(data)
        merkle.verify_consistency(given["at"], given["size"], given["proof"], given["of"], given["root"])
        if given["size"] <= len(tree) and given["root"] == tree.root(given["size"]):
            assert given["of"] == tree.root(given["at"])

    sizes = ((0, 4), (1, 8), (4, 8), (6, 13), (13, 13))
    samples = [_proof_sample(m, n, tree.root(m), tree.consistency(m, n), tree.root(n)) for m, n in sizes]
    return Decoder(tuple(samples), read)


def _ledger_bytes(folder: Path, entries: int = 4) -> bytes:
    ledger = Ledger(folder / "sample.jsonl")
    for n in range(entries):
        ledger.record(Crossing("out", "data", "parcel", f"{n:064x}", 10, SERVER, "catalog", RUN, "", 1))
    return ledger.path.read_bytes()


def _chained(data: bytes) -> bytes:
    """A ledger of these bodies (a JSON list), with hashes that fit."""
    bodies = json.loads(data)
    prev, lines = "0" * 64, []
    for index, body in enumerate(bodies if isinstance(bodies, list) else [bodies]):
        lines.append(encoded({"body": body, "index": index, "prev": prev}))
        prev = hashlib.sha256(lines[-1]).hexdigest()
    return b"".join(line + b"\n" for line in lines)


def _chained_or_raw(data: bytes) -> bytes:
    try:
        return _chained(data)
    except (ValueError, RecursionError):
        return data


@decoder
def ledger_lines(folder: Path) -> Decoder:
    sample, path = _ledger_bytes(folder), folder / "ledger.jsonl"

    def read(data: bytes) -> None:
        path.write_bytes(data)
        again = b""
        for entry, line in walk(path):
            Crossing.read(entry.body)
            again += line + b"\n"
        assert again == data

    bodies = encoded([json.loads(line)["body"] for line in sample.splitlines()])
    return Decoder((bodies,), read, _chained_or_raw, (sample,))


@decoder
def ledger_at_start(folder: Path) -> Decoder:
    """Opening for writing: a last line that a crash cut short goes, nothing else changes."""
    sample, path = _ledger_bytes(folder), folder / "ledger.jsonl"

    def read(data: bytes) -> None:
        path.write_bytes(data)
        try:
            kept = len(Ledger(path))
        except LedgerError:
            assert path.read_bytes() == data
            raise
        assert path.read_bytes() == data[: data.rfind(b"\n") + 1]
        assert kept == data.count(b"\n")

    return Decoder((sample[:-30], sample), read)
