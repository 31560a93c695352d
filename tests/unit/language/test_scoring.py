"""Scoring with the shared prompt gives what the plain computation gives, for prompts of any mixture."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from common.errors import DataError
from common.language.prompts import Template
from common.language.records import Ranking, YesNo
from common.language.scoring import (
    answer_losses,
    candidate_scores,
    first_token_entropies,
    generate,
    yes_no_scores,
)

TEMPLATE = Template.load("next")
LISTING = Template.load("ranking")


def naive_mean(lm: Any, prompt: list[int], answer: list[int]) -> float:
    """One unpadded row, no cache, no mask."""
    with torch.no_grad():
        logits_TV = lm.model(input_ids=torch.tensor([prompt + answer]), use_cache=False).logits[0]
    logs_TV = logits_TV.double().log_softmax(dim=1)
    steps = range(len(prompt) - 1, len(prompt) + len(answer) - 1)
    return sum(float(logs_TV[t, token]) for t, token in zip(steps, answer, strict=True)) / len(answer)


@pytest.mark.parametrize(("batch_size", "template"), [(1, TEMPLATE), (2, LISTING), (8, TEMPLATE)])
def test_candidate_scores_are_exact(
    lm: Any, rankings: list[Ranking], batch_size: int, template: Template
) -> None:
    scores = candidate_scores(lm, template, rankings, batch_size)
    assert [len(own) for own in scores] == [4, 3, 2]
    for ranking, own in zip(rankings, scores, strict=True):
        prompt = template.ranking_prompt(ranking)
        for title, score in zip(ranking.candidates, own.tolist(), strict=True):
            answer = lm.tokenizer(title)["input_ids"] + lm.tokenizer("\n")["input_ids"]
            if template is TEMPLATE:
                answer[-1] = lm.eos_ids[0]
            assert score == pytest.approx(naive_mean(lm, lm.encode(prompt), answer), abs=1e-4)


def test_answer_losses(lm: Any, rankings: list[Ranking]) -> None:
    pairs = [(TEMPLATE.ranking_prompt(ranking), ranking.candidates[0]) for ranking in rankings]
    losses_N = answer_losses(lm, pairs, 2)
    for (prompt, answer), loss in zip(pairs, losses_N.tolist(), strict=True):
        (ids,) = lm.encode_answers(prompt, [answer])
        assert loss == pytest.approx(-naive_mean(lm, lm.encode(prompt), ids), abs=1e-4)


def test_entropies(lm: Any, rankings: list[Ranking]) -> None:
    prompts = [TEMPLATE.ranking_prompt(ranking) for ranking in rankings]
    with torch.no_grad():
        found_N = first_token_entropies(lm, prompts, 3, batch_size=2)
    for prompt, found in zip(prompts, found_N.tolist(), strict=True):
        ids, entropies = lm.encode(prompt), []
        for _ in range(3):
            with torch.no_grad():
                p_V = lm.model(input_ids=torch.tensor([ids])).logits[0, -1].double().softmax(dim=0)
            entropies.append(float(-(p_V * p_V.log()).sum()))
            ids.append(int(p_V.argmax()))
            if ids[-1] in lm.eos_ids:
                break
        assert found == pytest.approx(sum(entropies) / len(entropies), abs=1e-4)


def test_yes_no(lm: Any) -> None:
    records = [YesNo("u", "Does it fit?", True), YesNo("v", "And does this small red cup fit, too?", False)]
    for record, score in zip(records, yes_no_scores(lm, TEMPLATE, records).tolist(), strict=True):
        prompt = TEMPLATE.yes_no_prompt(record)
        (yes, *_), (no, *_) = lm.encode_answers(prompt, ["Yes", "No"])
        with torch.no_grad():
            logits_V = lm.model(input_ids=torch.tensor([lm.encode(prompt)])).logits[0, -1]
        assert score == pytest.approx(float(torch.sigmoid(logits_V[yes] - logits_V[no])), abs=1e-5)


def test_generation_is_the_models_own(lm: Any, rankings: list[Ranking]) -> None:
    prompts = [TEMPLATE.ranking_prompt(ranking) for ranking in rankings]
    for prompt, text in zip(prompts, generate(lm, prompts, 12), strict=True):
        ids = torch.tensor([lm.encode(prompt)])
        whole = lm.model.generate(
            ids, attention_mask=torch.ones_like(ids), max_new_tokens=12, do_sample=False, pad_token_id=0
        )
        assert text == lm.decode(whole[0, ids.shape[1] :].tolist())


def test_nothing_to_score_is_refused(lm: Any) -> None:
    for call in (
        lambda: candidate_scores(lm, TEMPLATE, []),
        lambda: answer_losses(lm, []),
        lambda: first_token_entropies(lm, [], 3),
        lambda: yes_no_scores(lm, TEMPLATE, []),
    ):
        with pytest.raises(DataError, match="no prompts"):
            call()
