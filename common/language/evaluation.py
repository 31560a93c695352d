"""How well a language model ranks: every candidate scored, or an answer generated and read.

The relevant title's rank is counted as everywhere here: ties count against us, and a title that an answer
does not name is last. Prompts that are too long lose their oldest history items, and are counted.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from common.errors import DataError
from common.language.model import CausalLM
from common.language.prompts import Template
from common.language.records import Ranking, YesNo
from common.language.scoring import calibrated_scores, candidate_scores, generate_rankings, yes_no_scores
from common.metrics import VALID_ANSWERS, auc, gauc, ndcg_at_k, ranks, recall_at_k
from common.progress import NO_REPORT, Report

Scoring = Literal["likelihood", "calibrated", "generation"]
CUTS = (1, 3, 10)
_PHASE = "rank"


@dataclass(frozen=True)
class RankingEvaluation:
    """`metrics`: `ndcg@1`, `ndcg@3`, `recall@k`, and of generation `valid-answers`, a share of answers.

    `rank_N` (1 = best, int64) are the ranks of the relevant titles. `counts`: `shortened` prompts and, of
    generation, entries of answers `made-up` and `repeated`.
    """

    metrics: dict[str, float]
    rank_N: Tensor
    counts: dict[str, int]


def evaluate_rankings(
    lm: CausalLM,
    template: Template,
    rankings: Sequence[Ranking],
    scoring: Scoring = "likelihood",
    *,
    batch_size: int = 8,
    max_prompt_tokens: int = 1024,
    max_new_tokens: int = 128,
    report: Report = NO_REPORT,
) -> RankingEvaluation:
    """Rank the candidates of labelled rankings. Raises DataError without rankings or without a label."""
    targets = [ranking.target for ranking in rankings if ranking.target is not None]
    if not rankings or len(targets) < len(rankings):
        raise DataError(
            f"{len(rankings)} rankings, {len(targets)} of them labelled: nothing to measure",
            next_step="use labelled rankings of this split and protocol",
        )
    fitted = fit(lm, template, rankings, max_prompt_tokens, max_new_tokens if scoring == "generation" else 0)
    counts = {"shortened": sum(old is not new for old, new in zip(rankings, fitted, strict=True))}
    rank_list: list[int] = []
    valid = 0
    for start in range(0, len(fitted), batch_size):
        chosen = fitted[start : start + batch_size]
        own = targets[start : start + batch_size]
        if scoring != "generation":
            score = calibrated_scores if scoring == "calibrated" else candidate_scores
            scores = score(lm, template, chosen, batch_size)
            rank_list += [
                int(ranks(score_I[None], torch.tensor([target]))[0])
                for score_I, target in zip(scores, own, strict=True)
            ]
        else:
            for ranking, target, answer in zip(
                chosen,
                own,
                generate_rankings(lm, template, chosen, max_new_tokens=max_new_tokens, batch_size=batch_size),
                strict=True,
            ):
                rank_list.append(answer.parsed.rank(target, len(ranking.candidates)))
                valid += answer.parsed.valid
                counts["made-up"] = counts.get("made-up", 0) + answer.parsed.made_up
                counts["repeated"] = counts.get("repeated", 0) + answer.parsed.repeated
        report(phase=_PHASE, step=start + len(chosen), total=len(fitted))
    rank_N = torch.tensor(rank_list)
    metrics = {f"ndcg@{k}": ndcg_at_k(rank_N, k) for k in CUTS[:2]}
    metrics |= {f"recall@{k}": recall_at_k(rank_N, k) for k in CUTS}
    if scoring == "generation":
        metrics[VALID_ANSWERS] = valid / len(fitted)
    return RankingEvaluation(metrics, rank_N, counts)


def fit(
    lm: CausalLM,
    template: Template,
    rankings: Sequence[Ranking],
    max_prompt_tokens: int,
    answer_tokens: int = 0,
) -> list[Ranking]:
    """Each ranking itself, or with fewer of its oldest history items so that its prompt fits.

    The answer gets `answer_tokens` of the model's positions, or as many as its longest candidate takes.
    Raises DataError where a prompt does not fit without any history.
    """
    fitted = []
    for ranking in rankings:
        answers = lm.encode_answers(template.ranking_prompt(ranking), template.candidate_answers(ranking))
        left = lm.max_tokens - max(answer_tokens, *map(len, answers))
        fitted.append(template.fit(ranking, lm.encode, min(max_prompt_tokens, left)))
    return fitted


@dataclass(frozen=True)
class YesNoEvaluation:
    """`metrics`: `auc`, and `gauc` where users repeat. `gauc_users`: those with both answers."""

    metrics: dict[str, float]
    score_N: Tensor
    gauc_users: int


def evaluate_questions(
    lm: CausalLM,
    template: Template,
    records: Sequence[YesNo],
    *,
    batch_size: int = 8,
    report: Report = NO_REPORT,
) -> YesNoEvaluation:
    """AUC of P(yes) over answered questions. Raises DataError without records, or with one answer alone."""
    answers = [record.answer for record in records if record.answer is not None]
    if not records or len(answers) < len(records):
        raise DataError(
            f"{len(records)} questions, {len(answers)} of them answered: nothing to measure",
            next_step="use questions with answers",
        )
    found = []
    for start in range(0, len(records), batch_size):
        found.append(yes_no_scores(lm, template, records[start : start + batch_size], batch_size))
        report(phase=_PHASE, step=min(start + batch_size, len(records)), total=len(records))
    score_N, label_N = torch.cat(found), torch.tensor(answers)
    metrics, users = {"auc": auc(score_N, label_N)}, [record.user for record in records]
    gauc_users = 0
    if len(set(users)) < len(users):
        metrics["gauc"], gauc_users = gauc(score_N, label_N, users)
    return YesNoEvaluation(metrics, score_N, gauc_users)
