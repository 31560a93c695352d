"""Task vectors: arithmetic, strict reading, named refusals."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from common.errors import VectorError
from common.vectors import apply, read_vector, subtract, tensor_table, write_vector

EXPECTED = {"a": (2, 3), "b": (4,)}


def vector() -> dict[str, torch.Tensor]:
    return {"a": torch.arange(6.0).reshape(2, 3), "b": torch.tensor([1.0, -2.0, 0.5, 0.0])}


def test_subtract_and_apply_are_inverse() -> None:
    base = {"a": torch.ones(2, 3), "b": torch.zeros(4), "table": torch.ones(5)}
    model = {"a": torch.full((2, 3), 1.5), "b": torch.ones(4)}
    tau = subtract(model, base)
    assert set(tau) == {"a", "b"}
    whole = apply(base, tau)
    assert torch.equal(whole["a"], model["a"]) and torch.equal(whole["table"], base["table"])
    assert torch.equal(apply(base, tau, scale=0.5)["b"], torch.full((4,), 0.5))


def test_names_and_shapes_must_be_the_bases() -> None:
    with pytest.raises(VectorError, match="'x'"):
        subtract({"x": torch.ones(1)}, {})
    with pytest.raises(VectorError, match=r"'x' has shape \(2,\), expected \(1,\)"):
        subtract({"x": torch.ones(2)}, {"x": torch.ones(1)})
    with pytest.raises(VectorError, match="'x'"):
        apply({}, {"x": torch.ones(1)})
    with pytest.raises(VectorError, match="shape"):
        apply({"x": torch.ones(1)}, {"x": torch.ones(2)})


@pytest.mark.parametrize("codec", ["fp32", "bf16"])
def test_written_vectors_read_back_and_bytes_are_stable(tmp_path: Path, codec: str) -> None:
    write_vector(tmp_path / "v", vector(), codec)  # type: ignore[arg-type]
    write_vector(tmp_path / "w", dict(reversed(vector().items())), codec)  # type: ignore[arg-type]
    assert (tmp_path / "v").read_bytes() == (tmp_path / "w").read_bytes()
    read = read_vector(tmp_path / "v", EXPECTED, codec)  # type: ignore[arg-type]
    assert all(torch.equal(read[name], tensor) for name, tensor in vector().items())
    assert all(tensor.dtype == torch.float32 for tensor in read.values())
    assert sorted(path.name for path in tmp_path.iterdir()) == ["v", "w"]


def test_the_table_is_what_was_written(tmp_path: Path) -> None:
    import hashlib

    write_vector(tmp_path / "v", vector(), "fp32")
    table = tensor_table(tmp_path / "v")
    assert [(row["name"], row["shape"], row["dtype"]) for row in table] == [
        ("a", [2, 3], "F32"),
        ("b", [4], "F32"),
    ]
    assert table[1]["sha256"] == hashlib.sha256(vector()["b"].numpy().tobytes()).hexdigest()


def refused(tmp_path: Path, tensors: dict[str, torch.Tensor], match: str, codec: str | None = None) -> None:
    save_file(tensors, tmp_path / "bad")
    with pytest.raises(VectorError, match=match):
        read_vector(tmp_path / "bad", EXPECTED, codec)  # type: ignore[arg-type]


def test_bad_vectors_are_refused_by_name(tmp_path: Path) -> None:
    good = vector()
    refused(tmp_path, {"a": good["a"]}, "'b' is missing")
    refused(
        tmp_path, {**good, "embeddings.word_embeddings.weight": torch.ones(3)}, "'embeddings.word_embeddings"
    )
    refused(tmp_path, {**good, "b": torch.ones(5)}, r"'b' has shape \(5,\), expected \(4,\)")
    refused(tmp_path, {**good, "b": torch.ones(4, dtype=torch.float16)}, "'b' has dtype F16")
    refused(tmp_path, good, "dtype F32, expected BF16", "bf16")
    refused(tmp_path, {**good, "b": torch.tensor([1.0, torch.nan, 0, 0])}, "'b' holds NaN")
    refused(tmp_path, {**good, "a": torch.full((2, 3), torch.inf)}, "'a' holds an infinite")
    refused(tmp_path, {name: torch.zeros_like(tensor) for name, tensor in good.items()}, "zero")


def test_metadata_and_rubbish_are_refused(tmp_path: Path) -> None:
    save_file(vector(), tmp_path / "m", metadata={"note": "hello"})
    (tmp_path / "r").write_bytes(b"rubbish")
    for name in ("m", "r", "absent"):
        with pytest.raises(VectorError):
            read_vector(tmp_path / name, EXPECTED)


def test_writing_refuses_what_reading_would(tmp_path: Path) -> None:
    with pytest.raises(VectorError, match="NaN"):
        write_vector(tmp_path / "v", {"a": torch.tensor([torch.nan])})
    with pytest.raises(VectorError, match="zero"):
        write_vector(tmp_path / "v", {"a": torch.zeros(2)})
    with pytest.raises(VectorError, match="empty"):
        write_vector(tmp_path / "v", {})
    with pytest.raises(VectorError, match="infinite"):
        write_vector(tmp_path / "v", {"a": torch.tensor([3.4e38])}, "bf16")  # rounds up to infinity
    assert not list(tmp_path.iterdir())
