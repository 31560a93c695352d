"""What fuzzing has found, each as the smallest input that did it."""

from __future__ import annotations

import base64
import json
import os
import resource
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from crossing import BASE, RUN, Owner, Shore, make_bundle, make_vector
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from safetensors.numpy import save

from clients.data import readers
from clients.data.domain import Domain
from clients.data.records import KINDS, Issues
from common.audit.verify import verify
from common.catalog import Catalog
from common.config import RunConfig, load_toml
from common.errors import ConfigError, DataError, ModelError, ParcelError, VectorError
from common.kit import read_kit
from common.language.adapters import load_adapter
from common.language.samples import Sample, read_samples
from common.models.base import weight_files
from common.orders import PAYLOAD_TYPE, Order
from common.signing import SigningKey, seal
from common.tensorfile import read_tensors
from common.tls import create_ca, sign_csr
from common.wire import exchange_pb2 as pb
from common.wire import exchange_pb2_grpc as rpc
from common.wire.link import connect
from fuzz.models import ADAPTER, adapter_files
from server.engine.recipe import read_recipe
from server.folders import open_folder

KEY = SigningKey(bytes(32))


def _read(folder: Path, files: dict[str, bytes]) -> object:
    for name, content in files.items():
        (folder / name).write_bytes(content)
    return readers.read(folder, Issues(KINDS), readers.ReadOptions())


def test_a_dtype_that_is_no_string(tmp_path: Path) -> None:
    header = b'{"a":{"dtype":[],"shape":[1],"data_offsets":[0,4]}}'
    (tmp_path / "x").write_bytes(len(header).to_bytes(8, "little") + header + bytes(4))
    with pytest.raises(VectorError, match="dtype"):
        list(read_tensors(tmp_path / "x"))


def test_a_small_catalog_that_unpacks_to_a_large_one(tmp_path: Path) -> None:
    rows = 200_000
    columns = {"item_id": [str(n) for n in range(rows)], "title": ["x" * 1000] * rows}
    table = pa.table(columns).replace_schema_metadata({"isthmus.catalog": "1", "isthmus.domain": "toys"})
    pq.write_table(table, tmp_path / "bomb", compression="zstd")
    assert (tmp_path / "bomb").stat().st_size < 1 << 20
    del table, columns
    before_kb = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(DataError, match="unpacks to more than"):
        Catalog.read(tmp_path / "bomb")
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before_kb < 200 << 10


@pytest.mark.parametrize("change", ["version", "algorithm"])
def test_certificate_requests_that_cryptography_does_not_know(tmp_path: Path, change: str) -> None:
    name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "toys")])
    request = x509.CertificateSigningRequestBuilder().subject_name(name)
    der = request.sign(ec.generate_private_key(ec.SECP256R1()), hashes.SHA256()).public_bytes(
        serialization.Encoding.DER
    )
    old, new = {
        "version": (b"\x02\x01\x00", b"\x02\x01\x07"),
        "algorithm": (bytes.fromhex("06072a8648ce3d0201"), bytes.fromhex("06072a8648ce3d027f")),
    }[change]
    assert old in der
    with pytest.raises(ParcelError, match="malformed"):
        sign_csr(create_ca(tmp_path), _pem(der.replace(old, new, 1)), "toys")


def _pem(der: bytes) -> bytes:
    return b"-----BEGIN CERTIFICATE REQUEST-----\n%s-----END CERTIFICATE REQUEST-----\n" % base64.encodebytes(
        der
    )


@pytest.mark.parametrize(
    "changes", [{"domain": "Toys/.."}, {"ca_certificate": "\u00e4"}, {"server": "\ud800"}]
)
def test_join_kits_that_cannot_be_used(tmp_path: Path, changes: dict[str, str]) -> None:
    kit = {
        "schema_version": 1, "domain": "toys", "server": "s", "fleet": "f", "exchange": "e", "enrol": "n",
        "public_key": "k", "fingerprint": "p", "ca_certificate": "c", "fab_sha256": "d", "token": "t",
        "keys": "e",
    }  # fmt: skip
    (tmp_path / "kit").write_text(json.dumps(kit))
    assert read_kit(tmp_path / "kit").domain == "toys"
    (tmp_path / "kit").write_text(json.dumps({**kit, **changes}))
    with pytest.raises(ConfigError):
        read_kit(tmp_path / "kit")


def test_a_kit_and_an_order_nested_too_deep(tmp_path: Path) -> None:
    (tmp_path / "kit").write_text("[" * 100_000)
    with pytest.raises(ConfigError, match="not a join kit"):
        read_kit(tmp_path / "kit")
    body = {"action": "contribute", "run": RUN, "recipient": "toys", "base_digest": BASE, "candidates": []}
    envelope = seal({**body, "config": "[" * 100_000}, KEY, payload_type=PAYLOAD_TYPE)
    with pytest.raises(ParcelError, match="malformed"):
        Order.open(envelope, KEY.public, "toys")


def test_numbers_of_thousands_of_digits(tmp_path: Path) -> None:
    row = b'{"user_id":"u","item_id":"i","timestamp":1}\n'
    items = b'{"item_id":"i","title":%s}\n{"item_id":"i","title":"oak"}\n' % (b"9" * 5000)
    found = _read(tmp_path, {"interactions.jsonl": row, "items.jsonl": items})
    assert found.items.rows == {"i": {"title": "oak"}}  # type: ignore[attr-defined]


def test_a_user_number_of_thousands_of_digits(tmp_path: Path) -> None:
    files = {
        "meta_data.json": b'{"i":{"title":"oak"}}',
        "smap.json": b'{"i":0}',
        "umap.json": b'{"u":0}',
        "train.json": b'{"%s":[0]}' % (b"9" * 5000),
        "val.json": b"{}",
        "test.json": b"{}",
    }
    with pytest.raises(DataError, match="no user number"):
        _read(tmp_path, files)


@pytest.mark.parametrize(
    ("interactions", "what"),
    [
        (b"user_id,item_id,timestamp\n\xff,i,1\n", "utf-8"),
        (b'user_id,"item_id"x,timestamp\nu,i,1\n', "not valid CSV"),
        (b'user_id,item_id,"timestamp\nu,i,1\n', "not valid CSV"),
    ],
)
def test_tables_that_are_none(tmp_path: Path, interactions: bytes, what: str) -> None:
    with pytest.raises(DataError, match=what):
        _read(tmp_path, {"interactions.csv": interactions, "items.csv": b"item_id,title\ni,oak\n"})


def test_a_domain_folder_whose_public_attributes_are_no_names(tmp_path: Path, make_domain: object) -> None:
    make_domain().save(tmp_path / "pico")  # type: ignore[operator]
    path = tmp_path / "pico" / "domain.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "public_attributes": [["title"]]}))
    with pytest.raises(DataError, match="public_attributes"):
        Domain.load(tmp_path / "pico")
    path.write_text("[" * 100_000)
    with pytest.raises(DataError, match="not JSON"):
        Domain.load(tmp_path / "pico")


def test_a_domain_folder_with_text_that_is_no_text(tmp_path: Path, make_domain: object) -> None:
    make_domain().save(tmp_path / "pico")  # type: ignore[operator]
    path = tmp_path / "pico" / "items.parquet"
    table = pq.read_table(path)
    ids = [value.encode() for value in table.column("item_id").to_pylist()]
    broken = pa.array([b"\xff", *ids[1:]]).view(pa.string())
    pq.write_table(table.set_column(0, "item_id", broken), path)
    with pytest.raises(DataError, match="UTF-8"):
        Domain.load(tmp_path / "pico")


def test_a_download_from_behind_the_end(tmp_path: Path) -> None:
    shore = Shore(tmp_path / "server")
    toys = Owner(tmp_path / "toys", shore)
    digest = shore.publish(make_vector(tmp_path / "model", 7)).digest
    with shore.serve() as serving, connect(f"127.0.0.1:{serving.port}", toys.tls.ca, toys.tls) as channel:
        request = pb.DownloadRequest(digest=digest, offset=2**64 - 1)
        (reply,) = rpc.ExchangeStub(channel).Download(request, timeout=20)
    assert reply.refused.reason == "protocol"


@pytest.mark.parametrize("glob", ["shores/server/checkpoint", "parcels/*", "receipts/*"])
@pytest.mark.parametrize("put", ["folder", "pipe", "huge"])
def test_a_bundle_with_something_else_under_a_name(tmp_path: Path, glob: str, put: str) -> None:
    shore = Shore(tmp_path / "server")
    toys = Owner(tmp_path / "toys", shore)
    with shore.serve() as serving:
        toys.client(f"127.0.0.1:{serving.port}").send(toys.vector())
    bundle, root = make_bundle(tmp_path / "bundle", shore, [toys])
    assert verify(bundle, root).clean
    target = next(bundle.path.glob(glob))
    target.unlink()
    if put == "folder":
        target.mkdir()
    elif put == "pipe":
        os.mkfifo(target)
    else:
        with target.open("wb") as sparse:
            sparse.truncate(1 << 40)
    assert not verify(bundle, root).clean


@pytest.mark.parametrize("text", ["a = " + "[" * 5000, "a = 2024-13-40T00:00:00", "a = 1\rb = 2"])
def test_toml_that_breaks_its_parser(tmp_path: Path, text: str) -> None:
    (tmp_path / "x.toml").write_text(text, newline="")
    for read in (read_recipe, lambda path: load_toml(path, RunConfig)):
        with pytest.raises(ConfigError, match="not valid TOML"):
            read(tmp_path / "x.toml")


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("config.json", b"[]"),
        ("modules.json", b'[{"path":"a\\u0000b"}]'),
        ("model.safetensors.index.json", b'{"weight_map":{"a":"%s.safetensors"}}' % (b"a" * 999)),
        ("model.safetensors.index.json", b'{"weight_map":{"a":"a\\u0000.safetensors"}}'),
    ],
)
def test_a_model_folder_with_strange_names(tmp_path: Path, name: str, content: bytes) -> None:
    (tmp_path / "config.json").write_bytes(b"{}")
    (tmp_path / "model.safetensors").write_bytes(save({"a": np.zeros(2, np.float32)}))
    open_folder(tmp_path)
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ModelError):
        open_folder(tmp_path)


@pytest.mark.parametrize(
    "shard", ['["a"]', '{"a":1}', '"a\\u0000.safetensors"', '"../x.safetensors"', "null"]
)
def test_an_index_of_shards_with_strange_names(tmp_path: Path, shard: str) -> None:
    (tmp_path / "config.json").write_bytes(b"{}")
    (tmp_path / "model.safetensors.index.json").write_text(f'{{"weight_map":{{"a":{shard}}}}}')
    with pytest.raises(ModelError, match="tensor 'a' is not in a safetensors file"):
        weight_files(tmp_path)


def test_an_adapter_folder_that_is_no_safetensors(tmp_path: Path) -> None:
    for name, content in adapter_files(0).items():
        (tmp_path / name).write_bytes(content)
    load_adapter(tmp_path)
    (tmp_path / ADAPTER).write_bytes(b"\0" * 9)
    with pytest.raises(ModelError, match="not a well-formed safetensors file"):
        load_adapter(tmp_path)


def test_an_adapter_whose_alpha_no_float_can_hold(tmp_path: Path) -> None:
    for name, content in adapter_files(0).items():
        (tmp_path / name).write_bytes(content)
    path = tmp_path / "adapter_config.json"
    config = json.loads(path.read_text())
    for value in (10**400, float("nan"), float("inf")):
        path.write_text(json.dumps({**config, "lora_alpha": value}))
        with pytest.raises(ModelError, match="lora_alpha: expected a number above 0"):
            load_adapter(tmp_path)


def test_a_line_separator_within_a_sample(tmp_path: Path) -> None:
    (tmp_path / "x.jsonl").write_text('{"prompt":"a\u2028b","answer":"c"}\n', encoding="utf-8")
    assert read_samples(tmp_path / "x.jsonl") == [Sample("a\u2028b", "c")]
