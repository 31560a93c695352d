"""Decoders of payloads, join kits and certificates."""

from __future__ import annotations

import base64
import hashlib
import io
import json
import math
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import safetensors
from safetensors.numpy import save

from common.catalog import Catalog
from common.errors import IsthmusError, ParcelError
from common.kit import JoinKit, read_kit
from common.payloads import decode_values, encode_values
from common.revocation import Revocation
from common.rotation import ShoreKeys
from common.tensorfile import read_tensors, tensor_facts
from common.tls import certificate_fingerprint, create_ca, issue_server_certificate, make_csr, sign_csr
from fuzz.decoders import KEY, OTHER, Decoder, decoder, encoded


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
        encoded(
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
