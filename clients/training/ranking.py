"""Evaluation of a language model on a domain: where the user's next item lands among candidates.

Candidates and users are drawn by the run's seed, the same for every model, so models are compared on equal
prompts (`clients.data.instructions`, `common.language.evaluation`). What leaves this module are averages.
"""

from __future__ import annotations

import logging
import time
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from clients.data.domain import Domain
from clients.data.instructions import ranking_set, rankings_of
from clients.training.evaluate import Evaluation, Split
from common.config import InstructionSection, RunConfig
from common.language.evaluation import evaluate_rankings, fit
from common.language.model import CausalLM
from common.language.prompts import Template
from common.language.scoring import answer_losses
from common.metrics import VALID_ANSWERS
from common.progress import NO_REPORT, Report, prefixed

log = logging.getLogger(__name__)


def evaluate_domain(
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

    Metrics are those of `RankingEvaluation`, and on test users `valid-answers` where the configuration asks
    for generated answers. Raises DataError where no user is left or a prompt is too long.
    """
    section = config.instruction or InstructionSection()
    template, started_s = Template.load(section.template), time.monotonic()
    drawn = ranking_set(
        domain,
        split,
        config.run.seed,
        section.candidates,
        section.protocol if split == "test" else "warm",
        history_items=section.history_items,
        max_users=max_users or config.evaluation.max_users,
        title_words=section.title_words,
    )
    if drawn.left_out:
        log.warning("%s: users without a ranking task: %s", split, drawn.left_out)
    settings: dict[str, Any] = {
        "batch_size": config.evaluation.batch_size,
        "max_prompt_tokens": section.max_prompt_tokens,
        "report": prefixed(report, phase, "rank"),
    }
    was_training = lm.model.training
    lm.model.eval()
    try:
        found = evaluate_rankings(lm, template, drawn.rankings, **settings)
        metrics = dict(found.metrics)
        if found.counts["shortened"]:
            log.warning("%s: %d prompts lost their oldest items", split, found.counts["shortened"])
        if split == "test" and section.generated_users:
            asked = drawn.rankings[: section.generated_users]
            answers = evaluate_rankings(lm, template, asked, "generation", **settings)
            log.info("%s: generated answers: %s", split, answers.counts)
            metrics[VALID_ANSWERS] = answers.metrics[VALID_ANSWERS]
    finally:
        lm.model.train(was_training)
    row_of = {user: row for row, user in enumerate(domain.user_ids)}
    user_U = np.array([row_of[ranking.user] for ranking in drawn.rankings], dtype=np.int64)
    targets = domain.valid if split == "valid" else domain.test
    return Evaluation(
        metrics=metrics,
        users=len(user_U),
        seconds=time.monotonic() - started_s,
        user_U=user_U,
        rank_U=found.rank_N.numpy(),
        target_U=np.asarray(targets)[user_U].astype(np.int64),
    )


def user_losses(
    lm: CausalLM, domain: Domain, config: RunConfig, report: Report = NO_REPORT
) -> npt.NDArray[np.float64]:
    """Each user's mean negative log-likelihood a token of the last training answer: [U].

    A user without a training task has no loss to tell anything: 0. Raises DataError where nobody has one.
    """
    section = config.instruction or InstructionSection()
    template, batch_size = Template.load(section.template), config.evaluation.batch_size
    rankings = rankings_of(
        domain, "train", config.run.seed, section.candidates, history_items=section.history_items,
        title_words=section.title_words,
    )  # fmt: skip
    row_of = {user: row for row, user in enumerate(domain.user_ids)}
    loss_U = np.zeros(len(domain.user_ids))
    for start in range(0, len(rankings), batch_size):
        report(phase="leakage: users", step=start, total=len(rankings))
        chosen = fit(lm, template, rankings[start : start + batch_size], section.max_prompt_tokens)
        pairs = [(template.ranking_prompt(ranking), template.ranking_answer(ranking)) for ranking in chosen]
        with torch.no_grad():
            loss_B = answer_losses(lm, pairs, batch_size).cpu().numpy()
        loss_U[[row_of[ranking.user] for ranking in chosen]] = loss_B
    return loss_U
