"""`method = "auto"`: which of several merges to take, told from held-back pseudo-users, and why.

A candidate is scored by how well its ranking agrees with that of the domains' teachers: NDCG@10 where the
relevant items are the teachers' best 10, graded by their rank, the seen item left out; pseudo-users and items
are the held-back ones of learned merging (`learning.holdout`), so that no candidate has learned from them.
The teachers' ranking is the average of all teachers ("ensemble") or the domain's own ("own").

This is a proxy. It never sees a user: it measures agreement with models that were trained on users, on
histories that nobody had. A merge that is better than all its teachers can only lose by it, and differences
below about 0.01 to 0.02 are within what so few pseudo-users can tell. Metrics that owners allow say more.

The best average wins among the candidates that are nowhere worse than the best candidate of that domain by
more than `margin`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from common.errors import ConfigError
from common.progress import NO_REPORT, Report
from common.vectors import TaskVector
from server.learning.prepare import (
    Inputs,
    histories_of,
    sample_items,
    seen_items,
    teacher_model,
    tokenized,
)
from server.learning.pseudo_users import History, held_users, hold_back, source_of
from server.learning.teachers import (
    DomainTexts,
    EmbeddingCache,
    Teacher,
    encode,
    target_scores,
    with_vector,
)

TOP = 10
PROXY = "NDCG@10 against the teachers' best 10, on held-back pseudo-users; no user data"


@dataclass(frozen=True)
class _Sheet:
    """One domain's questions and answers: B pseudo-users rank C items; `gain_BC` is what each is worth."""

    users: list[list[int]]  # token ids
    items: list[list[int]]
    seen_BC: Tensor | None
    gain_BC: Tensor


class Judge:
    """Scores merged vectors on the held-back pseudo-users. Prepared once: D passes of each of D teachers
    over at most `holdout_items` items and `holdout_users` pseudo-users (kept in `cache`).

    Raises ConfigError where nothing is held back.
    """

    def __init__(
        self,
        inputs: Inputs,
        target: Literal["ensemble", "own"],
        cache: Path,
        report: Report = NO_REPORT,
    ) -> None:
        self._inputs = inputs
        learning, seed = inputs.learning, inputs.seed
        texts = tokenized(inputs)
        held = hold_back({text.name: len(text) for text in texts}, learning, seed)
        store = EmbeddingCache(cache)
        self._sheets: dict[str, _Sheet] = {}
        for index, text in enumerate(texts):
            report(phase="judge", step=index, total=len(texts))
            if not len(held[text.name]):
                continue
            seeds = held_users(held[text.name], len(text), learning, seed)
            model = None
            if source_of(learning).teacher:
                model = teacher_model(inputs, text, text.name, inputs.model(text.name), store)
            histories = histories_of(inputs, text, seeds, model, store)
            sample_C = sample_items(len(text), histories, learning, seed)
            self._sheets[text.name] = self._sheet(text, histories, sample_C, target, store)
        report(phase="judge", step=len(texts), total=len(texts))
        if not self._sheets:
            raise ConfigError(
                "merge method 'auto' has no held-back pseudo-users to choose by",
                next_step="set learning.holdout above 0, and give every domain two items or more",
            )

    @property
    def probes(self) -> dict[str, int]:
        """How many pseudo-users there are in each domain."""
        return {domain: len(sheet.users) for domain, sheet in self._sheets.items()}

    def score(self, vector: TaskVector) -> dict[str, float]:
        """NDCG@10 in each domain, between 0 and 1, of the base plus this merged vector."""
        return self.grade(self.rank(vector))

    def rank(self, vector: TaskVector) -> dict[str, Tensor]:
        """What the base plus this merged vector gives the items in each domain: [B, C], -inf where seen."""
        params = with_vector(self._inputs.base, vector)
        found: dict[str, Tensor] = {}
        for domain, sheet in self._sheets.items():
            items_CE = encode(self._inputs.encoder, sheet.items, params)
            users_BE = encode(self._inputs.encoder, sheet.users, params)
            found[domain] = _masked(users_BE @ items_CE.T, sheet.seen_BC)
        return found

    def grade(self, ranked: Mapping[str, Tensor]) -> dict[str, float]:
        """NDCG@10 in each domain of what `rank` gave."""
        return {domain: mean(agreement(s, self._sheets[domain].gain_BC)) for domain, s in ranked.items()}

    def _sheet(
        self,
        texts: DomainTexts,
        histories: list[History],
        sample_C: Tensor,
        target: Literal["ensemble", "own"],
        store: EmbeddingCache,
    ) -> _Sheet:
        inputs = self._inputs
        items = [texts.items[item] for item in sample_C.tolist()]
        users = [texts.history(history) for history in histories]
        seen_BC = None
        if inputs.learning.mask_seen:
            seen_BC = seen_items(histories, len(texts))[:, sample_C].to(inputs.device)
        teachers: list[Teacher] = []
        for name in [texts.name, *(n for n in inputs.domains if target == "ensemble" and n != texts.name)]:

            def embed(teacher: str = name) -> dict[str, Tensor]:
                params = inputs.model(teacher)
                return {
                    "items": encode(inputs.encoder, items, params),
                    "users": encode(inputs.encoder, users, params),
                }

            key = {**inputs.key(texts.name, name), "what": "judge", "histories": histories}
            found = store.get({**key, "items": sample_C.tolist()}, embed, inputs.device)
            teachers.append(Teacher(found["items"], found["users"]))
        t_BC = target_scores(teachers, range(len(users)), None, seen_BC)
        return _Sheet(users, items, seen_BC, gains(_masked(t_BC, seen_BC)))


def gains(t_BC: Tensor) -> Tensor:
    """`1 / log2(1 + rank)` at the best 10 of each row, 0 elsewhere and where the score is -inf: [B, C]."""
    best_BK, items_BK = t_BC.topk(min(TOP, t_BC.shape[1]), dim=1)
    gain_BK = _discounts(best_BK.shape[1], t_BC.device) * best_BK.isfinite()
    return torch.zeros_like(t_BC).scatter_(1, items_BK, gain_BK)


def agreement(s_BC: Tensor, gain_BC: Tensor) -> Tensor:
    """NDCG@10 of each row [B]: discounted gains of its best 10, over those of the best order there is."""
    top = min(TOP, s_BC.shape[1])
    discount_K = _discounts(top, s_BC.device)
    found_B = (gain_BC.gather(1, s_BC.topk(top, dim=1).indices) * discount_K).sum(1)
    return found_B / (gain_BC.topk(top, dim=1).values * discount_K).sum(1)


def mean(values_B: Tensor) -> float:
    """Their mean as a plain number."""
    return float(values_B.double().mean())


def _discounts(count: int, device: torch.device) -> Tensor:
    return 1 / torch.log2(torch.arange(count, device=device) + 2)


def _masked(scores_BC: Tensor, seen_BC: Tensor | None) -> Tensor:
    return scores_BC if seen_BC is None else scores_BC.masked_fill(seen_BC, float("-inf"))


def pick(scores: Mapping[str, Mapping[str, float]], margin: float) -> dict[str, Any]:
    """The choice for the journal: `chosen`, `why`, and the table (candidate -> domain -> score).

    Candidates that are in no domain more than `margin` below that domain's best candidate are allowed; of
    them the best average wins, the first among equals. If there is none, the one that falls short least.
    """
    domains = list(next(iter(scores.values())))
    best = {domain: max(row[domain] for row in scores.values()) for domain in domains}
    table: dict[str, dict[str, Any]] = {}
    for label, row in scores.items():
        shortfall = {domain: best[domain] - row[domain] for domain in domains}
        worst = max(domains, key=lambda domain: shortfall[domain])
        table[label] = {
            "average": sum(row.values()) / len(domains),
            "worst_domain": worst,
            "shortfall": shortfall[worst],
            "allowed": shortfall[worst] <= margin,
            "domains": dict(row),
        }
    allowed = [label for label in table if table[label]["allowed"]]
    if allowed:
        chosen = max(allowed, key=lambda label: table[label]["average"])
        why = (
            f"the best average ({table[chosen]['average']:.4f}) of {len(allowed)} of {len(table)} candidates "
            f"that are nowhere more than {margin:g} below the best of a domain"
        )
    else:
        chosen = min(table, key=lambda label: table[label]["shortfall"])
        why = (
            f"every candidate is more than {margin:g} below the best of some domain; this one falls short "
            f"least ({table[chosen]['shortfall']:.4f} in {table[chosen]['worst_domain']})"
        )
    return {"chosen": chosen, "why": why, "proxy": PROXY, "margin": margin, "scores": table}
