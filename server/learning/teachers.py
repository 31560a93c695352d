"""The domains' fine-tuned models as teachers: item embeddings and embeddings of pseudo-users.

A teacher is the base plus one task vector, held in memory only while it encodes. What stays is an
embedding matrix `[I, E]` a domain; logits are made for a batch when they are needed, never `[I, I]`.
Embeddings are kept in a cache folder under a digest of all that went into them, so that the learned
methods of one run, and a restarted server, encode each catalog once.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from safetensors import SafetensorError
from torch import Tensor

from common.catalog import Catalog
from common.config import TextSection
from common.errors import VectorError
from common.files import write_atomic
from common.models.encoder import Encoder, ItemTokens
from common.vectors import TaskVector
from server.digests import json_digest

CPU_BATCH_SIZE = 64
CUDA_BATCH_SIZE = 512


@dataclass(frozen=True)
class DomainTexts:
    """One domain's catalog as token ids: `items[i]` is item i as it is ranked, `history` several items."""

    name: str
    tokens: ItemTokens
    items: list[list[int]]
    max_seq_len: int

    def __len__(self) -> int:
        return len(self.items)

    def history(self, items: Sequence[int]) -> list[int]:
        """Token ids of a history (item indices, most recent first), cut to `max_seq_len`."""
        return self.tokens.history(list(items), self.max_seq_len)


def tokenize(encoder: Encoder, catalog: Catalog, text: TextSection) -> DomainTexts:
    """Token ids of every item of the catalog. Raises DataError for an item without text."""
    tokens = encoder.tokenize_items(catalog.texts(text.attributes), text.max_attribute_tokens)
    return DomainTexts(catalog.domain, tokens, tokens.items(), text.max_seq_len)


def with_vector(base: Mapping[str, Tensor], tau: TaskVector) -> dict[str, Tensor]:
    """The tensors of `base + tau` by name, on the base's device. Raises VectorError for an unknown name."""
    result: dict[str, Tensor] = {}
    for name, change in tau.items():
        if name not in base or base[name].shape != change.shape:
            raise VectorError(
                f"tensor {name!r} of the vector does not fit the base model",
                next_step="merge onto the base model that the vectors were trained from",
            )
        result[name] = base[name].detach() + change.to(base[name].device, base[name].dtype)
    return result


def encode(encoder: Encoder, ids: Sequence[list[int]], params: Mapping[str, Tensor] | None) -> Tensor:
    """Unit-norm embeddings [n, E] fp32 on the encoder's device, in the order given."""
    size = CUDA_BATCH_SIZE if encoder.device.type == "cuda" else CPU_BATCH_SIZE
    return encoder.encode(ids, size, params)


class EmbeddingCache:
    """A folder of safetensors files, each under the digest of what it was computed from."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def get(
        self, key: Mapping[str, Any], compute: Callable[[], Mapping[str, Tensor]], device: torch.device
    ) -> dict[str, Tensor]:
        """What is stored under `key`, or what `compute` gives (stored whole or not at all)."""
        path = self._folder / f"{json_digest(key)}.safetensors"
        try:
            found: dict[str, Tensor] = safetensors.torch.load_file(path)
        except (FileNotFoundError, SafetensorError):  # absent, or damaged by a failing disk: compute again
            found = {name: tensor.cpu().contiguous() for name, tensor in compute().items()}
            write_atomic(path, safetensors.torch.save(found))
        return {name: tensor.to(device) for name, tensor in found.items()}
