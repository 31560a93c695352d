"""Every decoder that reads bytes of somebody else: valid samples, and what must hold of what it accepts.

A decoder's `read` either raises an `IsthmusError`, or returns after it has checked that what it read is
exactly what was given. `wrap` makes the bytes that are read of the bytes that are fuzzed: it signs a changed
statement, chains changed entries, or puts a changed index before tensors, so that what lies behind a
signature is reached, too.

`DECODERS` maps names to functions that make a decoder in a folder of its own.
"""

from __future__ import annotations

import base64
import hashlib
import io
import json
import math
import random
import shutil
import subprocess
import tarfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import safetensors
from crossing import BASE, RUN, make_vector
from safetensors.numpy import save

from clients.data import readers
from clients.data.domain import Domain
from clients.data.records import KINDS, Issues
from common import canonical, merkle
from common.catalog import Catalog
from common.config import RunConfig
from common.errors import IsthmusError, LedgerError, ParcelError
from common.kit import JoinKit, read_kit
from common.ledger import Crossing, Ledger, walk
from common.notes import Checkpoint, Note, Signer, Verifier
from common.orders import CONTRIBUTE, PAYLOAD_TYPE, Candidate, Order
from common.parcels import SERVER, Codec, Header, Kind, Receipt, draft
from common.payloads import decode_values, encode_values
from common.revocation import Revocation
from common.roots import PAYLOAD_TYPE as ROOT_TYPE
from common.roots import Party, Root, RootMember, SignedRoot
from common.rotation import Rotation, ShoreKeys
from common.signing import STATEMENT_TYPE, PublicKey, Sealed, SigningKey, pae, seal
from common.tensorfile import read_tensors, tensor_facts
from common.tls import certificate_fingerprint, create_ca, issue_server_certificate, make_csr, sign_csr
from common.witness.card import WitnessCard, read_card
from fuzz.mutate import fuzzed

KEY, OTHER = SigningKey(bytes([1]) * 32), SigningKey(bytes([2]) * 32)
LOG = Signer("isthmus/toys/log", KEY)
LOG_KEY = Verifier(LOG.name, KEY.public)
WITNESS = Signer("w1.witness.example", OTHER)


def _as_it_is(data: bytes) -> bytes:
    return data


@dataclass(frozen=True, repr=False)
class Decoder:
    """One decoder: fuzz `samples`, `wrap` them, `read` the outcome; `outer` samples are not wrapped."""

    samples: tuple[bytes, ...]
    read: Callable[[bytes], Any]
    wrap: Callable[[bytes], bytes] = _as_it_is
    outer: tuple[bytes, ...] = ()
    close: Callable[[], None] = lambda: None

    def given(self, choices: random.Random) -> bytes:
        """An input. Raises IsthmusError when what was fuzzed cannot even be wrapped."""
        if self.outer and choices.random() < 0.3:
            return fuzzed(self.outer, choices)
        return self.wrap(fuzzed(self.samples, choices))

    def check(self) -> None:
        """Every sample must be accepted: a decoder that refuses everything passes any fuzzing."""
        for sample in self.samples:
            self.read(self.wrap(sample))
        for sample in self.outer:
            self.read(sample)


Make = Callable[[Path], Decoder]
DECODERS: dict[str, Make] = {}


def decoder(make: Make) -> Make:
    """Register under the function's name."""
    DECODERS[make.__name__.replace("_", "-")] = make
    return make


def _json(value: Any) -> bytes:
    return json.dumps(value, sort_keys=True, separators=(",", ":")).encode()


def _text(data: bytes) -> str:
    """As a file is read as text; what is no UTF-8 stays recognisable."""
    return data.decode("utf-8", "surrogateescape")


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
    return _json(outer)


# Signed statements


@decoder
def canonical_json(_: Path) -> Decoder:
    def read(data: bytes) -> None:
        assert canonical.encode(canonical.decode(data)) == data

    return Decoder((b'{"a":[1,-2,{"b":"x"}],"c":"~ "}', b"[]", b"9007199254740991", b'"a\\"b"'), read)


@decoder
def standard_base64(_: Path) -> Decoder:
    def read(data: bytes) -> None:
        assert base64.b64encode(canonical.decode_base64(_text(data))) == data

    return Decoder((b"", b"QQ==", b"QUI=", b"QUJD" * 20, b"+/+/"), read)


@decoder
def envelope(_: Path) -> Decoder:
    statements = ({"a": 1}, {"b": ["x", {"c": 2**53 - 1}]})
    known = {seal(statement, KEY): statement for statement in statements}

    def read(data: bytes) -> None:
        statement = Sealed.parse(data).open(KEY.public)
        assert seal(statement, KEY) == data

    return Decoder(tuple(map(_json, statements)), read, _sealed, tuple(known))


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
        return _sealed(_json(statement), PAYLOAD_TYPE)

    def read(data: bytes) -> None:
        found = Order.open(data, KEY.public, "toys")
        assert Order.open(found.sign(KEY), KEY.public, "toys") == found

    return Decoder(tuple(map(_json, statements)), read, wrap, envelopes)


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
        return _json(envelopes)

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


# Notes, trees and ledgers


@decoder
def note(_: Path) -> Decoder:
    plain = LOG.sign("one\ntwo\n")

    def read(data: bytes) -> None:
        assert str(Note.parse(_text(data))).encode() == data

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
        found = Checkpoint.open(_text(data), LOG_KEY)
        assert data.startswith(found.text().encode() + b"\n")

    return Decoder((text.encode(),), read, wrap, (str(LOG.sign(text)).encode(),))


@decoder
def cosignature(_: Path) -> Decoder:
    signed = LOG.sign(Checkpoint(LOG.name, 5, b"r" * 32).text())
    sample = signed.with_cosignature(WITNESS, time_s=1_700_000_000)

    def read(data: bytes) -> None:
        found = Note.parse(_text(data))
        assert found.cosigned_by(Verifier(WITNESS.name, OTHER.public)) == 1_700_000_000
        assert found.text == signed.text

    return Decoder((str(sample).encode(),), read)


@decoder
def verifier_key(_: Path) -> Decoder:
    def read(data: bytes) -> None:
        assert Verifier.from_vkey(_text(data)).vkey().encode() == data

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
    return _json(fields)


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
        lines.append(_json({"body": body, "index": index, "prev": prev}))
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

    bodies = _json([json.loads(line)["body"] for line in sample.splitlines()])
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


# Payloads


@decoder
def tensor_file(folder: Path) -> Decoder:
    path = folder / "tensors"
    tensors = {"a.weight": np.ones((4, 3), np.float32), "b": np.arange(5, dtype=np.float16)}
    sample = save(tensors)
    header_bytes = int.from_bytes(sample[:8], "little")
    index, values = sample[8 : 8 + header_bytes].rstrip(b" "), sample[8 + header_bytes :]
    brain = b'{"x":{"dtype":"BF16","shape":[2,2],"data_offsets":[0,8]}}'

    def wrap(data: bytes) -> bytes:
        return len(data).to_bytes(8, "little") + data + (values if b"a.weight" in data else b"\x80\x3f" * 4)

    def read(data: bytes) -> None:
        path.write_bytes(data)
        readings = list(read_tensors(path))
        by_others = dict(safetensors.deserialize(data))
        assert {found.name: (list(found.shape), found.dtype) for found in readings} == {
            name: (fact["shape"], fact["dtype"]) for name, fact in by_others.items()
        }
        for found in readings:
            content = bytes(by_others[found.name]["data"])
            assert found.digest == hashlib.sha256(content).hexdigest()
            if found.dtype == "F32":
                with np.errstate(all="ignore"):
                    floats = np.frombuffer(content, "<f4").astype(np.float64)
                    assert found.finite == bool(np.isfinite(floats).all())
                    if found.finite:
                        assert math.isclose(
                            found.norm, float(np.linalg.norm(floats)), rel_tol=1e-9, abs_tol=1e-40
                        )
        assert {fact["name"] for fact in tensor_facts(path)} == {found.name for found in readings}

    return Decoder((index, brain), read, wrap, (sample, wrap(brain)))


def _parquet(data: bytes) -> bytes:
    """A Parquet file of a JSON description; ParcelError where there is no such file."""
    try:
        given = json.loads(data)
        table = pa.Table.from_arrays(
            [pa.array(values) for _, values in given["columns"]], [n for n, _ in given["columns"]]
        )
        table = table.replace_schema_metadata({str(k): str(v) for k, v in given["metadata"].items()})
        sink = io.BytesIO()
        pq.write_table(
            table, sink, compression=given["compression"], use_dictionary=bool(given["dictionary"])
        )
    except (
        ValueError,
        TypeError,
        KeyError,
        AttributeError,
        RecursionError,
        OverflowError,
        OSError,
        pa.ArrowException,
    ):
        raise ParcelError("not a table") from None
    return sink.getvalue()


@decoder
def catalog(folder: Path) -> Decoder:
    path, again = folder / "catalog", folder / "again"
    made = Catalog("toys", ["a", "b", "c"], {"title": ["oak spoon", "red bowl", ""], "brand": ["x", "", "y"]})
    made.write(path)
    columns = [["item_id", made.item_ids], *([name, values] for name, values in made.attributes.items())]
    metadata = {"isthmus.catalog": "1", "isthmus.domain": "toys"}
    described = [
        _json(
            {"columns": columns, "metadata": metadata, "compression": compression, "dictionary": dictionary}
        )
        for compression, dictionary in (("zstd", 1), ("none", 0), ("snappy", 1))
    ]
    outer = (path.read_bytes(), *map(_parquet, described))

    def read(data: bytes) -> None:
        path.write_bytes(data)
        found = Catalog.read(path)
        found.write(again)
        assert Catalog.read(again) == found

    return Decoder(tuple(described), read, _parquet, outer)


@decoder
def json_payload(_: Path) -> Decoder:
    def read(data: bytes) -> None:
        assert encode_values(decode_values(data)) == data

    return Decoder((b'{"a":1,"recall@10":0.25}', b'{"code":"ok","digest":"%s"}' % (b"ab" * 32)), read)


@decoder
def revocation(_: Path) -> Decoder:
    def read(data: bytes) -> None:
        assert Revocation.decode(data).encode() == data

    said = Revocation("a" * 64, "b" * 64), Revocation("a" * 64, "b" * 64, ("c" * 64, "d" * 64))
    return Decoder(tuple(one.encode() for one in said), read)


# Joining


@decoder
def join_kit(folder: Path) -> Decoder:
    path = folder / "kit.json"
    ca = create_ca(folder / "ca")
    keys = ShoreKeys(shore="server", identity_key=KEY.public.hex, log_key=OTHER.public.hex)
    kit = JoinKit(
        schema_version=1, domain="toys", server="example", fleet="a.example:1", exchange="a.example:2",
        enrol="a.example:3", public_key=KEY.public.hex, fingerprint=KEY.public.fingerprint,
        ca_certificate=ca.certificate.read_text(), fab_sha256="ab" * 32, token="t" * 43,
        keys=keys.seal(KEY).decode(),
    )  # fmt: skip

    def read(data: bytes) -> None:
        path.write_bytes(data)
        found = read_kit(path)
        found.ca_certificate.encode("ascii")
        path.write_text(found.model_dump_json())
        assert read_kit(path) == found

    return Decoder((kit.model_dump_json().encode(),), read)


def _pem(kind: bytes) -> Callable[[bytes], bytes]:
    return lambda der: b"-----BEGIN %s-----\n%s-----END %s-----\n" % (kind, base64.encodebytes(der), kind)


def _der(pem: bytes) -> bytes:
    return base64.b64decode(b"".join(line for line in pem.splitlines() if not line.startswith(b"-")))


@decoder
def certificate_request(folder: Path) -> Decoder:
    ca = create_ca(folder / "ca")
    request = make_csr("toys", folder / "key")

    def read(data: bytes) -> None:
        assert len(certificate_fingerprint(sign_csr(ca, data, "toys"))) == 64

    foreign = []
    for algorithm in (
        ["rsa", "-pkeyopt", "rsa_keygen_bits:1024"],
        ["ed25519"],
        ["EC", "-pkeyopt", "ec_paramgen_curve:secp256k1"],
    ):
        command = [
            "openssl",
            "req",
            "-new",
            "-subj",
            "/CN=toys",
            "-nodes",
            "-keyout",
            "/dev/null",
            "-newkey",
            *algorithm,
        ]
        if shutil.which("openssl"):
            foreign.append(subprocess.run(command, capture_output=True, check=False).stdout)
    for pem in filter(None, foreign):
        _refused(lambda pem=pem: read(pem))
    return Decoder((_der(request),), read, _pem(b"CERTIFICATE REQUEST"), (request,))


def _refused(call: Callable[[], object]) -> None:
    try:
        call()
    except IsthmusError:
        return
    raise AssertionError("this must be refused")


@decoder
def certificate(folder: Path) -> Decoder:
    ca = create_ca(folder / "ca")
    pem = issue_server_certificate(ca, folder, ["a.example", "127.0.0.1"]).certificate.read_bytes()

    def read(data: bytes) -> None:
        assert len(certificate_fingerprint(data)) == 64

    return Decoder((_der(pem),), read, _pem(b"CERTIFICATE"), (pem,))


# An owner's data, as it was fetched from somewhere


def _rows(separator: str, *rows: tuple[str, ...]) -> bytes:
    return "".join(separator.join(row) + "\n" for row in rows).encode()


_TRIPLES = [(f"u{user}", f"i{item}", str(1000 + 10 * user + item)) for user in range(3) for item in range(4)]
_REVIEWS = b"".join(
    _json({"reviewerID": u, "asin": i, "unixReviewTime": int(t)}) + b"\n" for u, i, t in _TRIPLES
)
_METADATA = b"".join(
    _json({"asin": f"i{n}", "title": f"<b>oak</b> spoon {n}", "brand": "by x", "category": ["a", "b"]})
    + b"\n"
    for n in range(4)
)
_NEW = b"".join(_json({"user_id": u, "parent_asin": i, "timestamp": int(t)}) + b"\n" for u, i, t in _TRIPLES)
_NEW_ITEMS = b"".join(
    _json(
        {"parent_asin": f"i{n}", "title": "oak", "store": "x", "categories": ["a"], "details": {"Brand": "y"}}
    )
    + b"\n"
    for n in range(4)
)
_NUMBERED = {
    "meta_data.json": {f"i{n}": {"title": "oak", "brand": "x", "category": "a"} for n in range(4)},
    "smap.json": {f"i{n}": n for n in range(4)},
    "umap.json": {f"u{n}": n for n in range(3)},
    "train.json": {str(n): [0, 1] for n in range(3)},
    "val.json": {str(n): [2] for n in range(3)},
    "test.json": {str(n): [3] for n in range(3)},
}


def _table(**columns: list[Any]) -> bytes:
    sink = io.BytesIO()
    pq.write_table(pa.table(columns), sink)
    return sink.getvalue()


def _archive() -> bytes:
    sink = io.BytesIO()
    with tarfile.open(fileobj=sink, mode="w:gz") as archive:
        for name, content in _NUMBERED.items():
            member = tarfile.TarInfo(f"x/{name}")
            member.size = len(_json(content))
            archive.addfile(member, io.BytesIO(_json(content)))
    return sink.getvalue()


_USERS, _ITEMS, _TIMES = (list(column) for column in zip(*_TRIPLES, strict=True))
SOURCES: dict[str, tuple[str, dict[str, bytes]]] = {  # name: format, files; each file is fuzzed
    "csv": (
        "columns",
        {
            "interactions.csv": _rows(",", ("user_id", "item_id", "timestamp"), *_TRIPLES),
            "items.csv": _rows(",", ("item_id", "title"), *((f"i{n}", f'"oak, {n}"') for n in range(4))),
        },
    ),
    "jsonl": (
        "columns",
        {"interactions.jsonl": _NEW, "items.jsonl": _NEW_ITEMS},
    ),
    "parquet": (
        "columns",
        {
            "interactions.parquet": _table(
                user_id=_USERS, item_id=_ITEMS, timestamp=[int(t) for t in _TIMES]
            ),
            "items.parquet": _table(item_id=[f"i{n}" for n in range(4)], title=["oak"] * 4),
        },
    ),
    "recbole": (
        "recbole",
        {
            "x.inter": _rows("\t", ("user_id:token", "item_id:token", "timestamp:float"), *_TRIPLES),
            "x.item": _rows(
                "\t", ("item_id:token", "item_name:token_seq"), *((f"i{n}", "oak") for n in range(4))
            ),
        },
    ),
    "movielens": (
        "movielens",
        {
            "ratings.dat": _rows("::", *((u, i, "5", t) for u, i, t in _TRIPLES)),
            "movies.dat": _rows("::", *((f"i{n}", "Oak (1990)", "Drama|War") for n in range(4))),
        },
    ),
    "amazon2014": (
        "amazon2014",
        {
            "reviews_X_5.json": _REVIEWS,
            "meta_X.json": b"".join(
                b"{'asin': 'i%d', 'title': 'oak', 'categories': [['a', 'b'], ['c']]}\n" % n for n in range(4)
            ),
        },
    ),
    "amazon2018": ("amazon2018", {"X_5.json": _REVIEWS, "meta_X.json": _METADATA}),
    "amazon2023": ("amazon2023", {"X.jsonl": _NEW, "meta_X.jsonl": _NEW_ITEMS}),
    "mergerec": ("mergerec", {name: _json(content) for name, content in _NUMBERED.items()}),
    "mergerec-archive": ("mergerec", {"x.tar.gz": _archive()}),
}


def _reader(source: str, name: str) -> Make:
    format_name, files = SOURCES[source]

    def make(folder: Path) -> Decoder:
        for other, content in files.items():
            (folder / other).write_bytes(content)
        where = folder / name if name.endswith(".gz") else folder

        def read(data: bytes) -> None:
            (folder / name).write_bytes(data)
            options = readers.ReadOptions()
            found = readers.read(where, Issues(KINDS), options, format_name)
            rows = found.interactions
            assert len(rows.user_N) == len(rows.item_N) == len(rows.time_N) == len(rows.line_N) > 0
            assert np.isfinite(rows.time_N).all()
            assert all(len(text) <= 1000 for row in found.items.rows.values() for text in row.values())

        return Decoder((files[name],), read)

    return make


for _source, (_, _files) in SOURCES.items():
    for _name in _files:
        DECODERS[f"data-{_source}-{_name.split('.')[0].replace('_', '-')}"] = _reader(_source, _name)


def _domain_file(name: str) -> Make:
    def make(folder: Path) -> Decoder:
        one = np.array([0, 1], dtype=np.int32)
        domain = Domain(
            name="toys", item_ids=["a", "b"], attributes={"title": ["oak", "red"]}, user_ids=["u", "v"],
            train=[one, one], valid=one, test=one, public_attributes=("title",),
        )  # fmt: skip
        domain.save(folder / "toys")
        sample = (folder / "toys" / name).read_bytes()

        def read(data: bytes) -> None:
            (folder / "toys" / name).write_bytes(data)
            assert Domain.load(folder / "toys").interactions > 0

        return Decoder((sample,), read)

    return make


for _name in ("domain.json", "items.parquet", "sequences.parquet"):
    DECODERS[f"domain-folder-{_name.split('.')[0]}"] = _domain_file(_name)


def names() -> Iterator[str]:
    """All decoders, those of the wire and of bundles included."""
    from fuzz import crossings

    yield from {**DECODERS, **crossings.DECODERS}


def made(name: str, folder: Path) -> Decoder:
    """The decoder `name`, with `folder` for its files."""
    from fuzz import crossings

    folder.mkdir(parents=True, exist_ok=True)
    return {**DECODERS, **crossings.DECODERS}[name](folder)
