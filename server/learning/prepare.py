"""From vectors and catalogs to what the learning loop reads: pseudo-users and teachers of each domain."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from common.catalog import Catalog
from common.config import LearningSection, TextSection
from common.errors import DataError
from common.models.encoder import Encoder
from common.progress import NO_REPORT, Report
from common.vectors import TaskVector
from server.digests import catalog_digest, vector_digest
from server.learning.pseudo_users import Draws, History, draw, embed_histories, roll_out
from server.learning.teachers import DomainTexts, EmbeddingCache, encode, tokenize, with_vector


@dataclass(frozen=True)
class PseudoDomain:
    """One domain as the loop sees it; the teacher's part is None where no teacher is needed.

    `rows` maps a draw to its history: draw n of the schedule, of this domain, has `histories[rows[n]]`.
    """

    texts: DomainTexts
    histories: list[History]
    rows: dict[int, int]
    teacher_items_IE: Tensor | None
    teacher_users_UE: Tensor | None


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

    def domain_key(self, domain: str) -> dict[str, Any]:
        """Names the embeddings that this domain's teacher gives to its own catalog."""
        catalog = catalog_digest(self.catalogs[domain], self.text.attributes)
        return {**self.common_key, "vector": vector_digest(self.taus[domain]), "catalog": catalog}


def check_catalogs(taus: Mapping[str, TaskVector], catalogs: Mapping[str, Catalog]) -> None:
    """Raises DataError when a domain that sent a vector sent no catalog."""
    for domain in sorted(taus):
        if domain not in catalogs:
            raise DataError(
                f"domain {domain!r} has a task vector but no catalog",
                next_step="learned merging needs the catalog of every domain; or use a training-free method",
            )


def pseudo_domains(
    inputs: Inputs,
    keys: Mapping[str, Mapping[str, Any]],
    *,
    teachers: bool,
    cache: Path,
    report: Report = NO_REPORT,
) -> tuple[list[PseudoDomain], Draws]:
    """Every domain's texts, pseudo-users and (if `teachers`) teacher embeddings, in the order of names.

    `keys` are the `domain_key`s. Time: one pass of each teacher over its catalog, once a run (cached).
    """
    texts = [tokenize(inputs.encoder, inputs.catalogs[name], inputs.text) for name in inputs.domains]
    sizes = {name: len(text) for name, text in zip(inputs.domains, texts, strict=True)}
    learning = inputs.learning
    draws = draw(sizes, learning.steps * learning.batch_size, learning, inputs.seed)
    domains: list[PseudoDomain] = []
    for index, text in enumerate(texts):
        report(phase="teachers", step=index, total=len(texts))
        mine_N = np.flatnonzero(draws.domain_N == index)
        if teachers or learning.history_length > 1:
            domains.append(_with_teacher(inputs, text, draws, mine_N, keys[inputs.domains[index]], cache))
        else:
            histories, rows = _unique([(int(item),) for item in draws.item_N[mine_N]], mine_N)
            domains.append(PseudoDomain(text, histories, rows, None, None))
    report(phase="teachers", step=len(texts), total=len(texts))
    return domains, draws


def _with_teacher(
    inputs: Inputs,
    texts: DomainTexts,
    draws: Draws,
    mine_N: NDArray[np.int64],
    key: Mapping[str, Any],
    cache: Path,
) -> PseudoDomain:
    """The domain with its teacher's item embeddings, rolled-out histories and their embeddings."""
    params = with_vector(inputs.base, inputs.taus[texts.name])
    store, device, learning = EmbeddingCache(cache), inputs.device, inputs.learning
    items_IE = store.get(
        {**key, "what": "items"},
        lambda: {"items": encode(inputs.encoder, texts.items, params)},
        device,
    )["items"]
    starts, lengths = draws.item_N[mine_N].tolist(), draws.length_N[mine_N].tolist()

    def users() -> dict[str, Tensor]:
        rolled = roll_out(inputs.encoder, params, texts, items_IE, starts, lengths, learning, inputs.seed)
        padded_NL = torch.full((len(rolled), learning.history_length), -1, dtype=torch.int32)
        for row_L, history in zip(padded_NL, rolled, strict=True):
            row_L[: len(history)] = torch.tensor(history, dtype=torch.int32)
        unique, _ = _unique(rolled, mine_N)
        return {
            "histories": padded_NL,
            "users": embed_histories(inputs.encoder, params, texts, items_IE, unique),
        }

    drawn = {
        "what": "pseudo-users",
        "seed": inputs.seed,
        "starts": starts,
        "lengths": lengths,
        "k": learning.rollout_top_k,
        "temperature": learning.rollout_temperature,
    }
    found = store.get({**key, **drawn}, users, device)
    rolled = [tuple(item for item in row if item >= 0) for row in found["histories"].tolist()]
    histories, rows = _unique(rolled, mine_N)
    return PseudoDomain(texts, histories, rows, items_IE, found["users"])


def _unique(histories: Sequence[History], mine_N: NDArray[np.int64]) -> tuple[list[History], dict[int, int]]:
    """The distinct histories in order of first use, and for each draw its place among them."""
    place: dict[History, int] = {}
    rows = {
        int(draw_index): place.setdefault(history, len(place))
        for draw_index, history in zip(mine_N, histories, strict=True)
    }
    return list(place), rows
