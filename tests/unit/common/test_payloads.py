"""Strict, streaming payload reading: nothing rides along, and memory does not follow the size."""

import json
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
from crossing import make_vector
from safetensors.numpy import save_file

from common.errors import ParcelError, VectorError
from common.payloads import check_value, decode_values, encode_values
from common.tensorfile import read_index, read_tensors, tensor_facts


def _raw(path: Path, header: object, data: bytes = b"") -> Path:
    text = header if isinstance(header, bytes) else json.dumps(header, separators=(",", ":")).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + data)
    return path


def _fact(start: int, end: int, shape: list[int], dtype: str = "F32") -> dict[str, object]:
    return {"dtype": dtype, "shape": shape, "data_offsets": [start, end]}


def test_reads_what_safetensors_writes(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    values = {"a.w": rng.normal(size=(300, 1000)).astype(np.float32), "b": np.ones(3, np.float32)}
    save_file(values, tmp_path / "v")
    readings = {reading.name: reading for reading in read_tensors(tmp_path / "v")}
    assert set(readings) == {"a.w", "b"}
    assert readings["a.w"].norm == pytest.approx(np.linalg.norm(values["a.w"].astype(float)))
    assert readings["a.w"].row_gap < 1.1
    assert all(reading.finite for reading in readings.values())
    facts = {fact["name"]: fact["digest"] for fact in tensor_facts(tmp_path / "v")}
    assert facts == {name: reading.digest for name, reading in readings.items()}


def test_bf16_and_half(tmp_path: Path) -> None:
    one_bf16, inf_bf16 = (0x3F80).to_bytes(2, "little"), (0x7F80).to_bytes(2, "little")
    path = _raw(tmp_path / "v", {"x": _fact(0, 4, [2], "BF16")}, one_bf16 * 2)
    assert next(read_tensors(path)).norm == pytest.approx(2**0.5)
    path = _raw(tmp_path / "v", {"x": _fact(0, 4, [2], "BF16")}, one_bf16 + inf_bf16)
    assert not next(read_tensors(path)).finite


def test_untouched_rows_show(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    table = rng.normal(size=(500, 8)).astype(np.float32)
    dense = table.copy()
    table[rng.permutation(500)[:400]] *= 1e-3
    save_file({"dense": dense, "table": table}, tmp_path / "v")
    gaps = {reading.name: reading.row_gap for reading in read_tensors(tmp_path / "v")}
    assert gaps["dense"] < 2
    assert gaps["table"] > 50


@pytest.mark.parametrize(
    "make",
    [
        lambda p: p.write_bytes(b""),
        lambda p: p.write_bytes(b"\xff" * 100),
        lambda p: _raw(p, {}),
        lambda p: _raw(p, b"[" * 10_000),
        lambda p: _raw(p, {"x": _fact(0, 4, [1])}, b"\0" * 5),
        lambda p: _raw(p, {"x": _fact(0, 4, [1])}, b"\0" * 3),
        lambda p: _raw(p, {"x": _fact(4, 8, [1])}, b"\0" * 8),
        lambda p: _raw(p, {"x": _fact(0, 4, [1]), "y": _fact(0, 4, [1])}, b"\0" * 4),
        lambda p: _raw(p, {"x": _fact(0, 8, [1])}, b"\0" * 8),
        lambda p: _raw(p, {"x": _fact(0, 4, [1], "I32")}, b"\0" * 4),
        lambda p: _raw(p, {"x": _fact(0, 0, [0])}),
        lambda p: _raw(p, {"x y": _fact(0, 4, [1])}, b"\0" * 4),
        lambda p: _raw(p, {"__metadata__": {"note": "hi"}, "x": _fact(0, 4, [1])}, b"\0" * 4),
        lambda p: _raw(p, {"x": {**_fact(0, 4, [1]), "note": 1}}, b"\0" * 4),
        lambda p: _raw(p, {"x": _fact(0, 4, [True])}, b"\0" * 4),
        lambda p: _raw(p, b' {"x":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}}', b"\0" * 4),
        lambda p: _raw(p, b'{"x":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}}\t', b"\0" * 4),
    ],
)
def test_malformed_files(tmp_path: Path, make: object) -> None:
    make(tmp_path / "v")
    with pytest.raises(VectorError):
        read_index(tmp_path / "v")


def test_constant_memory(tmp_path: Path) -> None:
    path = make_vector(tmp_path / "v", tensors={"big": (4096, 1024)})  # 16 MiB in one tensor
    tracemalloc.start()
    list(read_tensors(path))
    peak_bytes = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak_bytes < 12 << 20


def test_values() -> None:
    data = encode_values({"recall@10": 0.123456789, "items": 3, "code": "ok"})
    assert data == b'{"code":"ok","items":3,"recall@10":0.123457}'
    assert decode_values(data)["recall@10"] == 0.123457


@pytest.mark.parametrize(
    "data",
    [
        b"[]",
        b"{}",
        b'{"a":NaN}',
        b'{"a":Infinity}',
        b'{"a":1e999}',
        b'{"a":0.12345678}',
        b'{"a":null}',
        b'{"a":true}',
        b'{"a":"free text"}',
        b'{"a":{"b":1}}',
        b'{"a":1,"a":1}',
        b'{"b":1,"a":1}',
        b'{"a": 1}',
        b'{"A name":1}',
        b'{"a":1}\n',
        '{"a":"é"}'.encode(),
    ],
)
def test_bad_values(data: bytes) -> None:
    with pytest.raises(ParcelError):
        decode_values(data)


def test_error_does_not_repeat_a_value() -> None:
    with pytest.raises(ParcelError) as caught:
        check_value("name", "customer@example")
    assert "customer" not in str(caught.value)
