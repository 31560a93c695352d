"""Scoring with the shared prompt gives what the plain computation gives, for prompts of any mixture."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from common.config import LoraSection
from common.errors import DataError
from common.language.evaluation import evaluate_rankings
from common.language.model import load_causal
from common.language.prompts import Template
from common.language.records import Ranking, YesNo
from common.language.scoring import (
    answer_losses,
    calibrated_scores,
    candidate_scores,
    first_token_entropies,
    generate,
    yes_no_scores,
)
from tests.unit.language.conftest import build_causal

TEMPLATE = Template.load("next")
LISTING = Template.load("ranking")


def naive_mean(lm: Any, prompt: list[int], answer: list[int]) -> float:
    """One unpadded row, no cache, no mask."""
    with torch.no_grad():
        logits_TV = lm.model(input_ids=torch.tensor([prompt + answer]), use_cache=False).logits[0]
    logs_TV = logits_TV.double().log_softmax(dim=1)
    steps = range(len(prompt) - 1, len(prompt) + len(answer) - 1)
    return sum(float(logs_TV[t, token]) for t, token in zip(steps, answer, strict=True)) / len(answer)


def test_groups_of_answers_change_nothing(
    lm: Any, rankings: list[Ranking], monkeypatch: pytest.MonkeyPatch
) -> None:
    every = candidate_scores(lm, TEMPLATE, rankings)
    monkeypatch.setattr("common.language.scoring.PACKED_TOKENS", 1)
    for own, one_by_one in zip(every, candidate_scores(lm, TEMPLATE, rankings), strict=True):
        torch.testing.assert_close(own, one_by_one)


def test_a_sliding_window_bounds_the_prompt(tmp_path: Path) -> None:
    lm = load_causal(build_causal(tmp_path, "mistral", sliding_window=120), precision="fp32")
    assert lm.max_tokens == 120
    rankings = [Ranking("u", ("tea",), ("cup", "oak bed"), 0), Ranking("v", (), ("red tea pot", "lamp"), 1)]
    template = TEMPLATE.model_copy(
        update={"ranking": TEMPLATE.ranking.model_copy(update={"prompt": "{history}\n{candidates}\n:\n"})}
    )
    for ranking, own in zip(rankings, candidate_scores(lm, template, rankings), strict=True):
        prompt = template.ranking_prompt(ranking)
        for title, score in zip(ranking.candidates, own.tolist(), strict=True):
            (answer,) = lm.encode_answers(prompt, [title])
            assert score == pytest.approx(naive_mean(lm, lm.encode(prompt), answer), abs=1e-4)
    with pytest.raises(DataError, match="120 positions"):
        candidate_scores(lm, TEMPLATE, rankings)


@pytest.mark.parametrize("name", ["ranking", "next"])
def test_prompt_and_answer_have_the_tokens_of_the_whole_text(
    lm: Any, rankings: list[Ranking], name: str
) -> None:
    template = Template.load(name)
    for ranking in rankings[:2]:
        prompt, answer = template.ranking_prompt(ranking), template.ranking_answer(ranking)
        (ids,) = lm.encode_answers(prompt, [answer])
        assert lm.encode(prompt) + ids == [*lm.encode(prompt + answer), lm.eos_ids[0]]
        (begun,) = lm.encode_answers(prompt, [answer.splitlines()[0]], end=False)
        assert ids[: len(begun)] == begun


def test_a_title_is_text(lm: Any) -> None:
    ids = lm.encode("tea <end> cup")
    assert not set(ids) & set(lm.eos_ids)
    assert lm.decode(ids) == "tea <end> cup"


def test_entropies_have_the_gradient_of_the_adapter(lm: Any, rankings: list[Ranking]) -> None:
    torch.manual_seed(0)
    lm.attach(LoraSection(rank=2, modules=("v_proj",)))
    parameters = lm.lora_parameters()
    with torch.no_grad():
        for parameter in parameters.values():
            parameter.normal_(std=0.2)
    prompts = [TEMPLATE.ranking_prompt(ranking) for ranking in rankings]
    entropy = first_token_entropies(lm, prompts, 3).sum()
    gradients = torch.autograd.grad(entropy, list(parameters.values()))
    along = sum(float((gradient**2).sum()) for gradient in gradients)
    step, values = 1e-3 / along**0.5, []
    with torch.no_grad():
        for sign in (1, -2):
            for parameter, gradient in zip(parameters.values(), gradients, strict=True):
                parameter.add_(gradient, alpha=sign * step)
            values.append(float(first_token_entropies(lm, prompts, 3).double().sum()))
    assert (values[0] - values[1]) / (2 * step) == pytest.approx(along, rel=0.05)


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


def test_calibrated_scores_take_off_what_a_title_has_anywhere(lm: Any, rankings: list[Ranking]) -> None:
    plain = candidate_scores(lm, TEMPLATE, rankings)
    nothing = TEMPLATE.nothing_prompt()
    assert not any(title in nothing for title in rankings[0].history)
    for ranking, own, calibrated in zip(
        rankings, plain, calibrated_scores(lm, TEMPLATE, rankings, 2), strict=True
    ):
        for place, title in enumerate(ranking.candidates):
            answer = [*lm.tokenizer(title)["input_ids"], lm.eos_ids[0]]
            anywhere = naive_mean(lm, lm.encode(nothing), answer)
            assert float(own[place] - calibrated[place]) == pytest.approx(anywhere, abs=1e-4)
    metrics = evaluate_rankings(lm, TEMPLATE, rankings[:2], "calibrated").metrics
    assert set(metrics) == set(evaluate_rankings(lm, TEMPLATE, rankings[:2]).metrics)


def test_half_precision_is_near(tiny_causal: Path, lm: Any, rankings: list[Ranking]) -> None:
    half = load_causal(tiny_causal, precision="bf16")
    assert next(half.model.parameters()).dtype == torch.bfloat16
    for own, near in zip(
        candidate_scores(lm, TEMPLATE, rankings), candidate_scores(half, TEMPLATE, rankings), strict=True
    ):
        assert near.dtype == torch.float32
        torch.testing.assert_close(near, own, atol=0.1, rtol=0.05)


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
