"""Digests of what a merge read, so that its journal can tell whether a result is still the right one.

SHA-256 over canonical bytes: names sorted, JSON without spaces and with sorted keys, tensors as they lie
in memory (little-endian machines only, as safetensors).
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from common.catalog import Catalog
from common.vectors import TaskVector


def json_digest(value: Mapping[str, Any]) -> str:
    """SHA-256 (hex) of the canonical JSON of `value`."""
    text = json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=True, allow_nan=False)
    return hashlib.sha256(text.encode("ascii")).hexdigest()


def vector_digest(tau: TaskVector) -> str:
    """SHA-256 (hex) of a task vector's names, shapes, dtypes and bytes."""
    digest = hashlib.sha256()
    for name in sorted(tau):
        tensor = tau[name].detach().cpu().contiguous()
        digest.update(f"{name}\0{list(tensor.shape)}\0{tensor.dtype}\0".encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def catalog_digest(catalog: Catalog, attributes: Sequence[str]) -> str:
    """SHA-256 (hex) of the items and those of the `attributes` that the catalog has, in that order."""
    columns = [[name, catalog.attributes[name]] for name in attributes if name in catalog.attributes]
    return json_digest({"item_ids": catalog.item_ids, "columns": columns})
