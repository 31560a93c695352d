"""The inputs of one learned merging step, made from a seed: an encoder, task vectors, one batch.

Vectors are small normal noise on every tensor that fine-tuning may change (embedding tables stay), rounded to
bfloat16, as they cross in a federation. Only `DISTINCT` of them are drawn and come again in turn: far more
than a cache holds, and a large N fits into memory. Texts are random tokens, 24 to 48 of them: one-item
histories of the real catalogs (title, brand, category) have 25 to 45 in four cases of five.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import AutoModel, BertConfig, PreTrainedModel, RobertaConfig

from common.models.base import WEIGHTS, resolve_base, trainable_tensors
from common.models.encoder import Encoder, Precision, use_bf16
from common.models.packed import NAME as PACKED
from common.models.packed import can_pack

ModelName = Literal["tiny", "minilm", "roberta"]

TEMPERATURE = 0.05
ALPHA = 1000.0
DISTINCT = 4
SHORTEST, LONGEST = 24, 48


@dataclass(frozen=True)
class Model:
    """An encoder in evaluation mode, all its parameters by name, and which of them a vector holds.

    `encoder` is what the engine uses; `padded` is the same model for the baselines, over padded batches and
    with plain attention (which is the faster one of transformers' in a training step in bf16).
    """

    encoder: Encoder
    padded: Encoder
    base: dict[str, Tensor]
    trainable: list[str]

    @property
    def values(self) -> int:
        """Parameters in all."""
        return sum(tensor.numel() for tensor in self.base.values())

    @property
    def trainable_values(self) -> int:
        """Parameters that a vector holds."""
        return sum(self.base[name].numel() for name in self.trainable)


@dataclass(frozen=True)
class Vectors:
    """N task vectors: `flats[i]` [P] has all values of vector i, `taus[i]` its tensors as views of that."""

    flats: list[Tensor]
    taus: list[dict[str, Tensor]]


@dataclass(frozen=True)
class Batch:
    """B pseudo-users, those of one domain side by side, and what they are scored against.

    `teacher_scores[b]` [I] is row b of `teacher_users_BE @ teacher_items[domain_B[b]].T`, for a loop that
    holds teacher scores in memory.
    """

    input_ids_BT: Tensor
    mask_BT: Tensor
    domain_B: list[int]
    student_items: list[Tensor]  # [I, E] a domain
    teacher_items: list[Tensor]  # [I, E] a domain
    teacher_users_BE: Tensor
    teacher_scores: list[Tensor]

    def slices(self) -> list[tuple[int, slice]]:
        """(domain, its rows of the batch) of every domain that has any."""
        found = sorted(set(self.domain_B))
        starts = [self.domain_B.index(domain) for domain in found]
        stops = [*starts[1:], len(self.domain_B)]
        return [(d, slice(i, j)) for d, i, j in zip(found, starts, stops, strict=True)]


def make_model(name: ModelName, folder: Path, device: str, precision: Precision) -> Model:
    """The embedded MiniLM, or random weights in `folder`: a RoBERTa of base size, or two layers of 32."""
    if name == "minilm":
        folder = resolve_base("embedded")
        encoder, padded = (
            Encoder.load(folder, device=device, precision=precision, for_training=True, packed=packed)
            for packed in (True, False)
        )
    else:
        torch.manual_seed(0)
        config = _roberta_base() if name == "roberta" else _tiny()
        packed = {"attn_implementation": PACKED} if can_pack(config, device) else {}
        model = AutoModel.from_config(config, **packed)
        model.pooler = None
        _save(model, folder)
        plain = AutoModel.from_config(copy.deepcopy(config), attn_implementation="eager")
        plain.pooler = None
        plain.load_state_dict(model.to(device).state_dict(), assign=True)  # one memory for both
        plain.to(device)
        bf16 = use_bf16(precision, device)
        encoder, padded = (
            Encoder(each.eval(), None, "mean", bf16=bf16, limit=128) for each in (model, plain)
        )
    for each in (encoder, padded):
        each.model.requires_grad_(False)
    base = {key: parameter.detach() for key, parameter in encoder.model.named_parameters()}
    return Model(encoder, padded, base, [key for key in trainable_tensors(folder) if key in base])


def make_vectors(model: Model, count: int, dtype: torch.dtype, distinct: int = DISTINCT) -> Vectors:
    """`count` vectors of which `distinct` differ, on the CPU."""
    shapes = [model.base[name].shape for name in model.trainable]
    flats, taus = [], []
    for seed in range(min(count, distinct)):
        generator = np.random.Generator(np.random.SFC64(seed))
        values_P = generator.standard_normal(model.trainable_values, dtype=np.float32)
        flat_P = torch.from_numpy(values_P).mul_(0.002).to(torch.bfloat16).to(dtype)
        parts = flat_P.split([shape.numel() for shape in shapes])
        flats.append(flat_P)
        taus.append({n: p.view(s) for n, p, s in zip(model.trainable, parts, shapes, strict=True)})
    turns = [index % len(flats) for index in range(count)]
    return Vectors([flats[turn] for turn in turns], [taus[turn] for turn in turns])


def make_batch(model: Model, domains: int, items: int, users: int, seed: int = 0) -> Batch:
    """`users` one-item pseudo-users spread evenly over `domains` domains of `items` items each."""
    device, dim = model.encoder.device, model.encoder.dim
    rng = np.random.default_rng(seed)
    config: Any = model.encoder.model.config
    lengths_B = rng.integers(SHORTEST, LONGEST + 1, users)
    ids_BT = rng.integers(10, config.vocab_size, (users, int(lengths_B.max())))
    mask_BT = (np.arange(ids_BT.shape[1])[None, :] < lengths_B[:, None]).astype(np.int64)
    ids_BT = np.where(mask_BT == 1, ids_BT, config.pad_token_id)
    domain_B = sorted(user % domains for user in range(users))
    torch.manual_seed(seed)
    student = [_unit(items, dim, device) for _ in range(domains)]
    teacher = [
        nn.functional.normalize(items_IE + 0.02 * _unit(items, dim, device), dim=-1) for items_IE in student
    ]
    picked = rng.integers(0, items, users).tolist()
    users_BE = torch.stack([teacher[d][item] for d, item in zip(domain_B, picked, strict=True)])
    return Batch(
        torch.from_numpy(ids_BT).to(device),
        torch.from_numpy(mask_BT).to(device),
        domain_B,
        student,
        teacher,
        users_BE,
        [teacher[d] @ user_E for d, user_E in zip(domain_B, users_BE, strict=True)],
    )


def _unit(rows: int, dim: int, device: torch.device) -> Tensor:
    return nn.functional.normalize(torch.randn(rows, dim), dim=-1).to(device)


def _save(model: PreTrainedModel, folder: Path) -> None:
    """The files of `save_pretrained` that are read here."""
    folder.mkdir(parents=True)
    model.config.save_pretrained(folder)
    save_file({name: tensor.contiguous() for name, tensor in model.named_parameters()}, folder / WEIGHTS)


def _roberta_base() -> RobertaConfig:
    return RobertaConfig(vocab_size=50265, max_position_embeddings=514, type_vocab_size=1)


def _tiny() -> BertConfig:
    return BertConfig(
        vocab_size=100,
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=64,
        max_position_embeddings=64,
        initializer_range=0.2,
    )
