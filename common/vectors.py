"""Task vectors: what fine-tuning changed, `tau_d = theta_d - theta_0`, tensor by tensor.

Rules: a vector holds exactly the base's trainable tensors (`common.models.base.trainable_tensors`),
never an embedding table; every value is finite; a vector of zeros says nothing and is refused; the
file is plain safetensors without metadata, so nothing rides along. Arithmetic is in float32 on the CPU.

    >>> tau = subtract({"w": torch.ones(2)}, {"w": torch.zeros(2)})
    >>> apply({"w": torch.zeros(2), "frozen": torch.ones(1)}, tau)["w"]
    tensor([1., 1.])
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Literal

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from common.errors import StorageError, VectorError
from common.models.weights import tensor_table
from common.tensorfile import read_index

__all__ = [
    "Codec",
    "TaskVector",
    "apply",
    "check_values",
    "read_vector",
    "save_tensors",
    "subtract",
    "tensor_table",
    "write_vector",
]

TaskVector = dict[str, torch.Tensor]
Codec = Literal["fp32", "bf16"]
_DTYPES: dict[Codec, torch.dtype] = {"fp32": torch.float32, "bf16": torch.bfloat16}
_STORED: dict[Codec, str] = {"fp32": "F32", "bf16": "BF16"}


def subtract(
    model_tensors: Mapping[str, torch.Tensor], base_tensors: Mapping[str, torch.Tensor]
) -> TaskVector:
    """`tau = theta_d - theta_0` for every name in `model_tensors` (float32, CPU).

    Raises VectorError where the base lacks a name or has another shape.
    """
    tau = {}
    for name, tensor in model_tensors.items():
        base = base_tensors.get(name)
        if base is None:
            raise VectorError(
                f"tensor {name!r} is not in the base model", next_step="use the run's base model"
            )
        if base.shape != tensor.shape:
            raise _misshapen(name, tuple(base.shape), tuple(tensor.shape))
        tau[name] = tensor.detach().to("cpu", torch.float32) - base.detach().to("cpu", torch.float32)
    return tau


def apply(
    base: Mapping[str, torch.Tensor], vector: Mapping[str, torch.Tensor], scale: float = 1.0
) -> dict[str, torch.Tensor]:
    """`theta_0 + scale * tau`: all tensors of `base`, those in `vector` replaced (float32, CPU).

    Raises VectorError where the vector has a name that the base lacks, or another shape.
    """
    out = dict(base)
    for name, delta in vector.items():
        if name not in base:
            raise VectorError(
                f"tensor {name!r} is not in the base model", next_step="use the run's base model"
            )
        if base[name].shape != delta.shape:
            raise _misshapen(name, tuple(base[name].shape), tuple(delta.shape))
        out[name] = base[name].to("cpu", torch.float32) + scale * delta.to("cpu", torch.float32)
    return out


def write_vector(path: Path, vector: Mapping[str, torch.Tensor], codec: Codec = "bf16") -> None:
    """Write `vector` to `path` atomically. Equal vectors give equal bytes.

    Raises VectorError where a value is not finite or all are zero, StorageError where the disk is full.
    """
    check_values(vector)
    tensors = {name: vector[name].detach().to("cpu", _DTYPES[codec]).contiguous() for name in sorted(vector)}
    check_values(tensors)
    temporary = path.with_name(f".{path.name}.tmp")
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        save_tensors(temporary, tensors)
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def save_tensors(
    path: Path, tensors: Mapping[str, torch.Tensor], metadata: dict[str, str] | None = None
) -> None:
    """Write a safetensors file durably (fsync). Raises StorageError where the disk cannot take it."""
    found = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    try:
        save_file(found, path, metadata=metadata)
        with path.open("rb") as file:
            os.fsync(file.fileno())
    except (OSError, SafetensorError) as err:  # the library hides a full disk in an exception of its own
        raise StorageError(
            f"{path}: cannot write: {err}", next_step="free disk space and start again"
        ) from err


def read_vector(
    path: Path, expected: Mapping[str, tuple[int, ...]], codec: Codec | None = None
) -> TaskVector:
    """Read a vector strictly: exactly the `expected` names and shapes, float32 or bfloat16, finite.

    With `codec` given the stored dtype must be that one. Returns float32 on the CPU. Raises VectorError
    naming the first tensor that is missing, extra, misshapen, of another dtype or not finite.
    """
    if not path.is_file():
        raise VectorError(f"{path}: no such file", next_step="check the path")
    found = {entry.name: entry for entry in read_index(path)}
    for name in sorted(expected):
        if name not in found:
            raise VectorError(f"tensor {name!r} is missing", next_step="use the run's base model")
    allowed = {_STORED[codec]} if codec else set(_STORED.values())
    for name in sorted(found):
        if name not in expected:
            raise VectorError(f"tensor {name!r} is not one that a vector may hold", next_step="remove it")
        if found[name].shape != tuple(expected[name]):
            raise _misshapen(name, tuple(expected[name]), found[name].shape)
        if found[name].dtype not in allowed:
            raise VectorError(
                f"tensor {name!r} has dtype {found[name].dtype}, expected {' or '.join(sorted(allowed))}",
                next_step="write the vector with the run's codec",
            )
    vector = {name: tensor.to(torch.float32) for name, tensor in load_file(path).items()}
    check_values(vector)
    return vector


def check_values(vector: Mapping[str, torch.Tensor]) -> None:
    """Raise VectorError where a value is NaN or infinite (naming the tensor), or where all are zero."""
    if not vector:
        raise VectorError("the vector is empty", next_step="check that the model has trainable tensors")
    some = False
    for name in sorted(vector):
        tensor = vector[name]
        if not bool(torch.isfinite(tensor).all()):
            kind = "NaN" if bool(torch.isnan(tensor).any()) else "an infinite value"
            raise VectorError(
                f"tensor {name!r} holds {kind}", next_step="lower the learning rate and fine-tune again"
            )
        some = some or bool(tensor.any())
    if not some:
        raise VectorError("every value of the vector is zero", next_step="check that fine-tuning took a step")


def _misshapen(name: str, expected: tuple[int, ...], got: tuple[int, ...]) -> VectorError:
    return VectorError(
        f"tensor {name!r} has shape {got}, expected {expected}", next_step="use the run's base model"
    )
