"""Evaluation of rankings and questions, and the command: figures that follow from scores and answers."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner
from sklearn.metrics import roc_auc_score

from common.cli import cli
from common.config import LoraSection
from common.errors import DataError
from common.language.adapters import adapter_tensors, save_adapter
from common.language.evaluation import evaluate_questions, evaluate_rankings
from common.language.prompts import Template
from common.language.records import Ranking, YesNo
from common.language.scoring import candidate_scores
from common.metrics import auc, gauc

TEMPLATE = Template.load("next")


def labelled(rankings: list[Ranking]) -> list[Ranking]:
    return rankings[:2]


def test_likelihood(lm: Any, rankings: list[Ranking]) -> None:
    chosen = labelled(rankings)
    found = evaluate_rankings(lm, TEMPLATE, chosen, batch_size=1)
    want = []
    for ranking, scores in zip(chosen, candidate_scores(lm, TEMPLATE, chosen), strict=True):
        order = sorted(range(len(scores)), key=lambda position: -float(scores[position]))
        want.append(order.index(ranking.target or 0) + 1)
    assert found.rank_N.tolist() == want
    assert found.metrics["ndcg@3"] == pytest.approx(
        sum(1 / math.log2(1 + rank) for rank in want if rank <= 3) / len(want)
    )
    assert found.metrics["recall@3"] == pytest.approx(sum(rank <= 3 for rank in want) / len(want))
    assert "valid-answers" not in found.metrics
    assert found.counts == {"shortened": 0}


def test_generation_counts_what_answers_name(
    lm: Any, rankings: list[Ranking], monkeypatch: pytest.MonkeyPatch
) -> None:
    texts = iter([["1. tea\n2. lamp"], ["a bicycle\ntrain\ntrain"], ["nothing of it"]])
    monkeypatch.setattr("common.language.scoring.generate", lambda *_: next(texts))
    chosen = [*labelled(rankings), labelled(rankings)[0]]
    found = evaluate_rankings(lm, TEMPLATE, chosen, "generation", batch_size=1)
    assert found.rank_N.tolist() == [1, 1, 4]
    assert found.metrics["valid-answers"] == pytest.approx(2 / 3)
    assert found.counts == {"shortened": 0, "made-up": 2, "repeated": 1}


def test_real_generation_is_counted(lm: Any, rankings: list[Ranking]) -> None:
    found = evaluate_rankings(lm, TEMPLATE, labelled(rankings), "generation", max_new_tokens=8)
    assert 0 <= found.metrics["valid-answers"] <= 1
    assert found.rank_N.shape == (2,)


def test_long_prompts_are_shortened_and_counted(lm: Any, rankings: list[Ranking]) -> None:
    chosen = labelled(rankings)
    tokens = [len(lm.encode(TEMPLATE.ranking_prompt(ranking))) for ranking in chosen]
    found = evaluate_rankings(lm, TEMPLATE, chosen, max_prompt_tokens=max(tokens) - 1)
    assert found.counts["shortened"] == 1
    with pytest.raises(DataError, match="without history"):
        evaluate_rankings(lm, TEMPLATE, chosen, max_prompt_tokens=16)


def test_unlabelled_rankings_are_refused(lm: Any, rankings: list[Ranking]) -> None:
    with pytest.raises(DataError, match="3 rankings, 2 of them labelled"):
        evaluate_rankings(lm, TEMPLATE, rankings)
    with pytest.raises(DataError, match="0 questions"):
        evaluate_questions(lm, TEMPLATE, [])


def test_auc_is_the_fields() -> None:
    generator = torch.Generator().manual_seed(0)
    score_N = torch.randint(0, 20, (200,), generator=generator).double()  # with ties
    label_N = torch.rand(200, generator=generator) < 0.3 + score_N / 40
    assert auc(score_N, label_N) == pytest.approx(roc_auc_score(label_N.numpy(), score_N.numpy()))
    assert auc(torch.ones(4), torch.tensor([1, 0, 1, 0])) == 0.5
    with pytest.raises(DataError, match="positives and negatives"):
        auc(torch.ones(2), torch.ones(2))


def test_gauc_is_the_mean_of_users_with_both_answers() -> None:
    users = ["a", "a", "a", "b", "b", "c", "d", "d"]
    label_N = torch.tensor([1, 0, 0, 0, 1, 1, 1, 1])
    score_N = torch.tensor([0.5, 0.4, 0.6, 0.9, 0.1, 0.2, 0.3, 0.4])
    assert gauc(score_N, label_N, users) == (pytest.approx((0.5 + 0) / 2), 2)
    with pytest.raises(DataError, match="no user"):
        gauc(score_N[5:], label_N[5:], users[5:])


def test_questions(lm: Any) -> None:
    records = [YesNo(f"u{n // 2}", f"Is {n} red?", n % 3 == 0) for n in range(6)]
    found = evaluate_questions(lm, TEMPLATE, records, batch_size=4)
    assert found.metrics["auc"] == pytest.approx(
        auc(found.score_N, torch.tensor([n % 3 == 0 for n in range(6)]))
    )
    assert found.gauc_users == 2
    assert set(evaluate_questions(lm, TEMPLATE, records[::2]).metrics) == {"auc"}


def run(*arguments: str) -> tuple[int, str]:
    done = CliRunner().invoke(cli, ["language", *arguments])
    return done.exit_code, done.output


def test_the_command(tiny_causal: Path, pico_domain: Any, tmp_path: Path) -> None:
    pico_domain.save(tmp_path / "domain")
    lora = LoraSection(rank=2, modules=("q_proj",))
    adapter = {name: torch.full(shape, 0.3) for name, shape in adapter_tensors(tiny_causal, lora).items()}
    save_adapter(tiny_causal, lora, adapter, tmp_path / "adapter", readme="a test")
    common = [
        str(tiny_causal), "--domain", str(tmp_path / "domain"), "--candidates", "8", "--max-users", "12",
        "--format", "json", "--precision", "fp32", "--device", "cpu",
    ]  # fmt: skip
    code, output = run("evaluate", *common)
    record = json.loads(output)
    assert (code, record["users"], record["left_out"]) == (0, 12, {})
    assert set(record["metrics"]) == {"ndcg@1", "ndcg@3", "recall@1", "recall@3", "recall@10"}
    assert record["metrics"]["recall@10"] == 1.0  # of eight
    adapted = json.loads(run("evaluate", *common, "--adapter", str(tmp_path / "adapter"))[1])
    assert adapted["metrics"] != record["metrics"]
    code, output = run("evaluate", *common, "--scoring", "generation", "--max-new-tokens", "4")
    assert "valid-answers" in json.loads(output)["metrics"]
    code, output = run("evaluate", *common, "--protocol", "frozen")
    assert code == 2
    assert "use warm or cold" in output


def test_the_command_on_questions(tiny_causal: Path, tmp_path: Path) -> None:
    file = tmp_path / "some.json"
    entries = [
        {"instruction": "Is it red?", "input": f"item {n}", "output": "Yes." if n % 2 else "No."}
        for n in range(4)
    ]
    file.write_text(json.dumps(entries))
    code, output = run("questions", str(tiny_causal), str(file), "--precision", "fp32", "--device", "cpu")
    assert code == 0
    assert output.startswith("auc ")
