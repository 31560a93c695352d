"""Merge methods on the task vectors of a federation: torch tensors in, torch tensors out, all in memory."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch

from common.vectors import TaskVector
from server import merging
from server.merging import Floats, Grams, InMemory


def check_vectors(taus: Mapping[str, TaskVector]) -> None:
    """Refuse vectors (domain -> vector) that cannot be merged. Raises VectorError with both names."""
    for _ in in_memory(taus).blocks():
        pass


def in_memory(taus: Mapping[str, TaskVector]) -> InMemory:
    """The vectors as merge methods read them; float32 tensors on the CPU are not copied."""
    return InMemory({domain: {name: _as_numpy(t) for name, t in tau.items()} for domain, tau in taus.items()})


def merge_tensors(
    name: str,
    taus: Mapping[str, TaskVector],
    options: Mapping[str, Any] | None = None,
    grams: Grams | None = None,
) -> TaskVector:
    """The merged task vector, fp32 on the CPU. Raises as `server.merging.prepare`."""
    merged = merging.merge(name, in_memory(taus), options, grams)
    return _as_tensors(merged)


def split_tensors(
    name: str,
    taus: Mapping[str, TaskVector],
    options: Mapping[str, Any] | None = None,
    grams: Grams | None = None,
) -> dict[str, TaskVector]:
    """Each domain's processed vector, fp32 on the CPU; the merge is their sum. Raises as above."""
    split = merging.process_vectors(name, in_memory(taus), options, grams)
    return {domain: _as_tensors(vector) for domain, vector in zip(taus, split, strict=True)}


def _as_numpy(tensor: torch.Tensor) -> np.ndarray[Any, np.dtype[Any]]:
    if not tensor.is_floating_point():
        return np.asarray(tensor.detach().cpu().numpy())
    return np.asarray(tensor.detach().to("cpu", torch.float32).numpy())


def _as_tensors(vector: Mapping[str, Floats]) -> TaskVector:
    return {name: torch.from_numpy(values) for name, values in vector.items()}
