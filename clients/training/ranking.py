"""Evaluation of a language model by instruction ranking: where the user's next item lands among candidates.

Scores are length-normalised log-likelihoods of the titles (`common.language.scoring`); ties count against us.
Candidates and users are drawn by the run's seed, the same for every model, so models are compared on equal
prompts. What leaves this module are averages.
"""

from __future__ import annotations

import time
from collections.abc import Sequence

import numpy as np
import torch

from clients.data.domain import Domain
from clients.data.instructions import rankings_of
from clients.training.evaluate import Evaluation, Split
from common.config import InstructionSection, RunConfig
from common.language.model import CausalLM
from common.language.prompts import Template
from common.language.records import Ranking
from common.language.scoring import candidate_scores, generate_rankings
from common.metrics import VALID_ANSWERS, ndcg_at_k, ranks, recall_at_k
from common.progress import NO_REPORT, Report

ANSWER_TOKENS = 128


def fitted(
    lm: CausalLM, template: Template, rankings: Sequence[Ranking], max_prompt_tokens: int
) -> list[Ranking]:
    """The rankings with as much history as the prompt may hold. Raises DataError where none would help."""
    limit = max(min(max_prompt_tokens, lm.max_tokens - ANSWER_TOKENS), 1)
    return [template.fit(ranking, lm.encode, limit) for ranking in rankings]


def evaluate_rankings(
    lm: CausalLM,
    domain: Domain,
    config: RunConfig,
    split: Split = "test",
    report: Report = NO_REPORT,
    *,
    max_users: int | None = None,
    phase: str = "evaluate",
) -> Evaluation:
    """Rank each user's held-out item among candidates that the user never had.

    Metrics: `ndcg@1`, `ndcg@k` and `recall@k`, and on test users `valid-answers` where the configuration asks
    for generated answers. Raises DataError where no user is left or a prompt is too long.
    """
    section = config.instruction or InstructionSection()
    template, started_s = Template.load(section.template), time.monotonic()
    rankings = list(
        rankings_of(
            domain,
            split,
            config.run.seed,
            candidates=section.candidates,
            protocol=section.protocol if split == "test" else "warm",
            max_history=section.history_items,
        )
    )
    rankings = _drawn(rankings, max_users or config.evaluation.max_users, config.run.seed)
    was_training = lm.model.training
    lm.model.eval()
    try:
        rank_U = _ranks(lm, template, rankings, section, config.evaluation.batch_size, report, phase)
        k = config.evaluation.k
        metrics = {"ndcg@1": ndcg_at_k(rank_U, 1), f"ndcg@{k}": ndcg_at_k(rank_U, k)}
        metrics[f"recall@{k}"] = recall_at_k(rank_U, k)
        if split == "test" and section.generated_users:
            asked = fitted(lm, template, rankings[: section.generated_users], section.max_prompt_tokens)
            answers = generate_rankings(lm, template, asked, batch_size=config.evaluation.batch_size)
            metrics[VALID_ANSWERS] = float(np.mean([answer.parsed.valid for answer in answers]))
    finally:
        lm.model.train(was_training)
    row_of = {user: row for row, user in enumerate(domain.user_ids)}
    user_U = np.array([row_of[ranking.user] for ranking in rankings], dtype=np.int64)
    targets = domain.valid if split == "valid" else domain.test
    return Evaluation(
        metrics=metrics,
        users=len(rankings),
        seconds=time.monotonic() - started_s,
        user_U=user_U,
        rank_U=rank_U.numpy(),
        target_U=np.asarray(targets)[user_U].astype(np.int64),
    )


def _ranks(
    lm: CausalLM,
    template: Template,
    rankings: Sequence[Ranking],
    section: InstructionSection,
    batch_size: int,
    report: Report,
    phase: str,
) -> torch.Tensor:
    """The rank (1 = best) of each target, `batch_size` prompts at a time, so that progress shows."""
    found = []
    for start in range(0, max(len(rankings), 1), batch_size):
        chosen = fitted(lm, template, rankings[start : start + batch_size], section.max_prompt_tokens)
        for scores_I, ranking in zip(candidate_scores(lm, template, chosen, batch_size), chosen, strict=True):
            found.append(ranks(scores_I[None], torch.tensor([ranking.target])))
        report(phase=phase, step=min(start + batch_size, len(rankings)), total=len(rankings))
    return torch.cat(found)


def _drawn(rankings: list[Ranking], limit: int | None, seed: int) -> list[Ranking]:
    """At most `limit` of them, by a seeded draw, in their order."""
    if limit is None or limit >= len(rankings):
        return rankings
    chosen = np.random.default_rng([seed, len(rankings)]).choice(len(rankings), size=limit, replace=False)
    return [rankings[int(n)] for n in np.sort(chosen)]
