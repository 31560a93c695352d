"""From vectors and catalogs to what the learning loop reads: pseudo-users and teachers of each domain."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from common.catalog import Catalog
from common.config import LearningSection, TextSection
from common.digests import catalog_digest, vector_digest
from common.errors import DataError
from common.models.base import Pooling, model_digest
from common.models.device import default_device
from common.models.encoder import Encoder
from common.progress import NO_REPORT, Report
from common.vectors import TaskVector
from server.learning.pseudo_users import (
    Draws,
    History,
    Seeds,
    TeacherModel,
    draw,
    embed_histories,
    held_users,
    hold_back,
    source_of,
)
from server.learning.teachers import DomainTexts, EmbeddingCache, Teacher, encode, tokenize, with_vector

Target = Literal["none", "own", "ensemble"]


@dataclass(frozen=True)
class Inputs:
    """What is being learned from, with the digests that name it."""

    encoder: Encoder
    base: dict[str, Tensor]
    taus: dict[str, TaskVector]
    catalogs: dict[str, Catalog]
    text: TextSection
    learning: LearningSection
    seed: int
    common_key: dict[str, Any]  # digest of the base, text settings, precision: whatever changes an embedding

    @property
    def domains(self) -> list[str]:
        return sorted(self.taus)

    @property
    def device(self) -> torch.device:
        return next(iter(self.base.values())).device

    @cached_property
    def _vectors(self) -> dict[str, str]:
        return {name: vector_digest(self.taus[name]) for name in self.domains}

    @cached_property
    def _catalogs(self) -> dict[str, str]:
        return {name: catalog_digest(self.catalogs[name], self.text.attributes) for name in self.domains}

    def key(self, domain: str, teacher: str) -> dict[str, Any]:
        """Names the embeddings that `teacher`'s model gives to the catalog of `domain`."""
        return {**self.common_key, "vector": self._vectors[teacher], "catalog": self._catalogs[domain]}

    def model(self, teacher: str) -> dict[str, Tensor]:
        """The tensors of the domain's fine-tuned model."""
        return with_vector(self.base, self.taus[teacher])


def check_catalogs(taus: Mapping[str, object], catalogs: Mapping[str, Catalog]) -> None:
    """Raises DataError when a domain that sent a vector sent no catalog."""
    for domain in sorted(taus):
        if domain not in catalogs:
            raise DataError(
                f"domain {domain!r} has a task vector but no catalog",
                next_step="this merge method needs the catalog of every domain; or use one that needs none",
            )


def load_inputs(
    base: Path,
    taus: Mapping[str, TaskVector],
    catalogs: Mapping[str, Catalog],
    learning: LearningSection,
    text: TextSection,
    *,
    seed: int,
    pooling: Pooling | Literal["auto"],
) -> Inputs:
    """The base model in folder `base` with its vectors and catalogs; on CUDA when there is one.

    Raises as `check_catalogs`.
    """
    check_catalogs(taus, catalogs)
    device = default_device()
    encoder = Encoder.load(base, pooling=pooling, device=device, precision=learning.precision, packed=True)
    encoder.model.eval().requires_grad_(False)
    common_key = {
        "base": model_digest(base),
        "pooling": pooling,
        "precision": learning.precision,
        "device": device,
        "packed": encoder.is_packed,
        "attributes": list(text.attributes),
        "max_attribute_tokens": text.max_attribute_tokens,
        "max_seq_len": text.max_seq_len,
    }
    tensors = {name: param.detach() for name, param in encoder.model.named_parameters()}
    return Inputs(encoder, tensors, dict(taus), dict(catalogs), text, learning, seed, common_key)


@dataclass(frozen=True)
class PseudoDomain:
    """One domain as the loop sees it. Without need of a teacher there is none; the domain's own is the first.

    `rows` maps a draw to its history: draw n of the schedule, of this domain, has `histories[rows[n]]`.
    `held` are the places in `histories` of the held-back pseudo-users, `sample_C` the items they rank.
    """

    texts: DomainTexts
    histories: list[History]
    rows: dict[int, int]
    held: list[int]
    sample_C: Tensor
    teachers: list[Teacher]

    def seen(self, rows: Sequence[int], mask_seen: bool) -> Tensor | None:
        """Which items are in these histories [B, I], or None where seen items are not masked."""
        return seen_items([self.histories[row] for row in rows], len(self.texts)) if mask_seen else None


def seen_items(histories: Sequence[History], size: int) -> Tensor:
    """True at the items of each history: [B, I]."""
    seen_BI = torch.zeros((len(histories), size), dtype=torch.bool)
    for row_I, history in zip(seen_BI, histories, strict=True):
        row_I[list(history)] = True
    return seen_BI


def sample_items(size: int, histories: Sequence[History], learning: LearningSection, seed: int) -> Tensor:
    """Which items of a catalog held-back pseudo-users rank: `learning.holdout_items` of them, sorted [C].

    More where the longest history would leave none of them to rank.
    """
    longest = max((len(history) for history in histories), default=0)
    count = min(size, max(learning.holdout_items, longest + 1))
    return torch.from_numpy(np.sort(np.random.default_rng([seed, 5]).permutation(size)[:count]))


def tokenized(inputs: Inputs) -> list[DomainTexts]:
    """Every domain's catalog as token ids, in the order of the domains' names."""
    return [tokenize(inputs.encoder, name, inputs.catalogs[name], inputs.text) for name in inputs.domains]


def pseudo_domains(
    inputs: Inputs, target: Target, cache: Path, report: Report = NO_REPORT
) -> tuple[list[PseudoDomain], Draws]:
    """Every domain's texts, pseudo-users and teachers' embeddings, in the order of the domains' names.

    Time: one pass of each teacher over its own catalog, or over every catalog for the "ensemble" (cached).
    """
    texts = tokenized(inputs)
    sizes = {text.name: len(text) for text in texts}
    learning, store = inputs.learning, EmbeddingCache(cache)
    held = hold_back(sizes, learning, inputs.seed)
    draws = draw(sizes, learning.steps * learning.batch_size, learning, inputs.seed, held)
    total = len(texts) * (2 if target == "ensemble" else 1)
    domains: list[PseudoDomain] = []
    for index, text in enumerate(texts):
        report(phase="teachers", step=index, total=total)
        mine_N = np.flatnonzero(draws.domain_N == index)
        domains.append(_domain(inputs, text, draws, mine_N, held[text.name], target, store))
    if target == "ensemble":
        for index, teacher in enumerate(inputs.domains):
            report(phase="teachers", step=len(texts) + index, total=total)
            params = inputs.model(teacher)
            for domain in domains:
                if domain.texts.name != teacher:
                    model = teacher_model(inputs, domain.texts, teacher, params, store)
                    domain.teachers.append(teach(inputs, model, teacher, domain.histories, store))
    report(phase="teachers", step=total, total=total)
    return domains, draws


def _domain(
    inputs: Inputs,
    texts: DomainTexts,
    draws: Draws,
    mine_N: NDArray[np.int64],
    held: NDArray[np.int64],
    target: Target,
    store: EmbeddingCache,
) -> PseudoDomain:
    """The domain with its pseudo-users, and its own teacher if there is need of one."""
    learning, model = inputs.learning, None
    if target != "none" or source_of(learning).teacher:
        model = teacher_model(inputs, texts, texts.name, inputs.model(texts.name), store)
    starts, lengths = draws.item_N[mine_N].tolist(), draws.length_N[mine_N].tolist()
    drawn = histories_of(inputs, texts, Seeds(starts, lengths, held.tolist(), inputs.seed), model, store)
    seeds = held_users(held, len(texts), learning, inputs.seed)
    kept = histories_of(inputs, texts, seeds, model, store)
    place: dict[History, int] = {}
    rows = {int(n): place.setdefault(history, len(place)) for n, history in zip(mine_N, drawn, strict=True)}
    held_rows = [place.setdefault(history, len(place)) for history in kept]
    teachers = (
        [] if model is None or target == "none" else [teach(inputs, model, texts.name, list(place), store)]
    )
    sample_C = sample_items(len(texts), kept, learning, inputs.seed).to(inputs.device)
    return PseudoDomain(texts, list(place), rows, held_rows, sample_C, teachers)


def teacher_model(
    inputs: Inputs, texts: DomainTexts, teacher: str, params: Mapping[str, Tensor], store: EmbeddingCache
) -> TeacherModel:
    """`teacher`'s model (its tensors are `params`) with its embeddings of all items of a domain."""
    found = store.get(
        {**inputs.key(texts.name, teacher), "what": "items"},
        lambda: {"items": encode(inputs.encoder, texts.items, params)},
        inputs.device,
    )
    return TeacherModel(inputs.encoder, params, texts, found["items"])


def histories_of(
    inputs: Inputs, texts: DomainTexts, seeds: Seeds, model: TeacherModel | None, store: EmbeddingCache
) -> list[History]:
    """The histories that grow from `seeds`; those that a teacher rolls out are kept in the cache."""
    learning = inputs.learning
    source = source_of(learning)
    if not source.teacher or not seeds.starts:
        return source.histories(seeds, learning, model) if seeds.starts else []

    def grow() -> dict[str, Tensor]:
        grown = source.histories(seeds, learning, model)
        padded_NL = torch.full((len(grown), learning.history_length), -1, dtype=torch.int32)
        for row_L, history in zip(padded_NL, grown, strict=True):
            row_L[: len(history)] = torch.tensor(history, dtype=torch.int32)
        return {"histories": padded_NL}

    key = {
        **inputs.key(texts.name, texts.name),
        "what": source.name,
        "seed": seeds.seed,
        "starts": seeds.starts,
        "lengths": seeds.lengths,
        "barred": seeds.barred,
        "k": learning.rollout_top_k,
        "temperature": learning.rollout_temperature,
    }
    found = store.get(key, grow, torch.device("cpu"))["histories"].tolist()
    return [tuple(item for item in row if item >= 0) for row in found]


def teach(
    inputs: Inputs, model: TeacherModel, teacher: str, histories: list[History], store: EmbeddingCache
) -> Teacher:
    """What `teacher`'s model says of a domain's items and of these pseudo-users (kept in `store`)."""

    def users() -> dict[str, Tensor]:
        return {
            "users": embed_histories(inputs.encoder, model.params, model.texts, model.items_IE, histories)
        }

    key = {**inputs.key(model.texts.name, teacher), "what": "users", "histories": histories}
    return Teacher(model.items_IE, store.get(key, users, inputs.device)["users"])
