"""The domains' fine-tuned models as teachers: item embeddings and embeddings of pseudo-users.

A teacher is the base plus one task vector, held in memory only while it encodes. What stays is an
embedding matrix `[I, E]` a domain; logits are made for a batch when they are needed, never `[I, I]`.
Embeddings are kept in a cache folder under a digest of all that went into them, so that the learned
methods of one run, and a restarted server, encode each catalog once.

The target of distillation is the domain's own teacher, or the average of all domains' teachers ("ensemble"),
each of which then encodes every catalog.
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
from common.digests import json_digest
from common.errors import VectorError
from common.files import write_atomic
from common.models.encoder import Encoder, ItemTokens
from common.vectors import TaskVector

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


def tokenize(encoder: Encoder, name: str, catalog: Catalog, text: TextSection) -> DomainTexts:
    """Token ids of every item of the catalog of domain `name`. Raises DataError for an item without text.

    What the catalog calls its domain does not matter: models may share one, and be called otherwise.
    """
    tokens = encoder.tokenize_items(catalog.texts(text.attributes), text.max_attribute_tokens)
    return DomainTexts(name, tokens, tokens.items(), text.max_seq_len)


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


@dataclass(frozen=True)
class Teacher:
    """What one teacher says of one domain: its embeddings of items and of pseudo-users."""

    items_IE: Tensor
    users_UE: Tensor


def target_scores(
    teachers: Sequence[Teacher], users: Sequence[int], items: Tensor | None, seen_BI: Tensor | None
) -> Tensor:
    """The teachers' scores [B, I] of `users` (rows of `users_UE`) with `items` (their numbers; None: all).

    One teacher: cosines. Several: each teacher's cosines are standardised over the items of the row that are
    not seen, averaged, and brought to the mean and spread of the first teacher's, so that a temperature means
    the same. What is at seen items is arbitrary.
    """
    chosen = list(users)
    scores_TBI = (
        teacher.users_UE[chosen] @ (teacher.items_IE if items is None else teacher.items_IE[items]).T
        for teacher in teachers
    )
    own_BI = next(scores_TBI)
    if len(teachers) == 1:
        return own_BI
    mean_B1, spread_B1 = _moments(own_BI, seen_BI)
    total_BI = (own_BI - mean_B1) / spread_B1
    for other_BI in scores_TBI:
        other_B1, width_B1 = _moments(other_BI, seen_BI)
        total_BI += (other_BI - other_B1) / width_B1
    return mean_B1 + spread_B1 * total_BI / len(teachers)


def _moments(scores_BI: Tensor, seen_BI: Tensor | None) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation of each row over the items that are not seen: two of [B, 1]."""
    weight_BI = torch.ones_like(scores_BI) if seen_BI is None else (~seen_BI).to(scores_BI.dtype)
    count_B1 = weight_BI.sum(-1, keepdim=True)
    mean_B1 = (scores_BI * weight_BI).sum(-1, keepdim=True) / count_B1
    square_B1 = ((scores_BI - mean_B1).square() * weight_BI).sum(-1, keepdim=True) / count_B1
    return mean_B1, square_B1.sqrt().clamp(min=1e-6)


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
        # copied: products of tensors that lie in a file round otherwise, being less aligned in memory
        return {name: tensor.to(device, copy=True) for name, tensor in found.items()}
