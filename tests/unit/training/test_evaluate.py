"""Leave-one-out evaluation against a naive one."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch

import clients.training.evaluate as module
from clients.training.evaluate import evaluate
from clients.training.perform import evaluate_once
from common.config import RunConfig
from common.models.encoder import Encoder
from common.progress import NO_REPORT


@pytest.fixture
def encoder(pico_model: Path) -> Encoder:
    torch.set_num_threads(1)
    return Encoder.load(pico_model)


def naive_ranks(encoder: Encoder, domain: Any, split: str, *, mask_seen: bool) -> list[int]:
    texts = [", ".join(strings) for strings in domain.catalog().texts(("title", "brand", "category"))]
    item_IE = encoder.encode([encoder.tokenizer(text)["input_ids"] for text in texts])
    found = []
    for user in range(len(domain.user_ids)):
        history = list(domain.train[user]) + ([domain.valid[user]] if split == "test" else [])
        target = int((domain.valid if split == "valid" else domain.test)[user])
        text = "; ".join(texts[i] for i in reversed(history))
        ids = encoder.tokenizer(text, truncation=True, max_length=32)["input_ids"]
        scores = (item_IE @ encoder.encode([ids])[0]).tolist()
        seen = set(history) if mask_seen else set()
        found.append(
            1 + sum(not s < scores[target] for i, s in enumerate(scores) if i != target and i not in seen)
        )
    return found


@pytest.mark.parametrize("split", ["valid", "test"])
@pytest.mark.parametrize("mask_seen", [False, True])
def test_against_a_naive_evaluation(
    encoder: Encoder, pico_domain: Any, pico_config: RunConfig, split: Any, mask_seen: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.setattr(module, "SCORES_AT_ONCE", 30 * 7)  # seven users at a time
    section = pico_config.evaluation.model_copy(update={"mask_seen": mask_seen, "batch_size": 4})
    config = pico_config.model_copy(update={"evaluation": section})
    found = evaluate(encoder, pico_domain, config, split)
    wanted = np.array(naive_ranks(encoder, pico_domain, split, mask_seen=mask_seen))
    assert np.mean(found.rank_U == wanted) > 0.95  # scores closer than rounding may swap
    assert np.abs(found.rank_U - wanted).max() <= 1
    assert found.metrics["recall@10"] == pytest.approx(float((found.rank_U <= 10).mean()))
    assert found.users == 40 and set(found.metrics) == {"recall@10", "ndcg@10"}


def test_items_with_the_same_text_tie_and_count_against_us(
    encoder: Encoder, make_domain: Callable[..., Any], pico_config: RunConfig
) -> None:
    domain = make_domain()
    same = replace(domain, attributes={"title": ["red spoon"] * 30, "brand": ["acme"] * 30})
    found = evaluate(encoder, same, pico_config)
    assert set(found.rank_U.tolist()) == {30} and found.metrics["recall@10"] == 0.0


def test_a_limit_draws_the_same_users_every_time(
    encoder: Encoder, pico_domain: Any, pico_config: RunConfig
) -> None:
    whole = evaluate(encoder, pico_domain, pico_config)
    first = evaluate(encoder, pico_domain, pico_config, max_users=11)
    second = evaluate(encoder, pico_domain, pico_config, max_users=11)
    assert first.user_U.tolist() == second.user_U.tolist() and first.users == 11
    assert first.rank_U.tolist() == whole.rank_U[first.user_U].tolist()


def test_ranks_of_single_users_are_written_to_parquet(
    encoder: Encoder, pico_domain: Any, pico_config: RunConfig, tmp_path: Path
) -> None:
    found = evaluate(encoder, pico_domain, pico_config)
    found.write_per_user(tmp_path / "deep" / "ranks.parquet", pico_domain)
    table = pq.read_table(tmp_path / "deep" / "ranks.parquet").to_pydict()
    assert table["user_id"] == pico_domain.user_ids
    assert table["rank"] == found.rank_U.tolist()
    assert table["target"] == [pico_domain.item_ids[int(item)] for item in pico_domain.test]


def test_an_evaluation_is_done_once(
    pico_model: Path, pico_sentence_model: Path, pico_domain: Any, pico_config: RunConfig, tmp_path: Path
) -> None:
    calls: list[str] = []

    def report(*, phase: str, **_: Any) -> None:
        calls.append(phase)

    first = evaluate_once(pico_model, "zero-shot", pico_domain, pico_config, tmp_path, report)
    assert calls and set(calls) == {"evaluate zero-shot"}
    calls.clear()
    assert evaluate_once(pico_model, "zero-shot", pico_domain, pico_config, tmp_path, report) == first
    assert not calls
    other = evaluate_once(pico_sentence_model, "zero-shot", pico_domain, pico_config, tmp_path, NO_REPORT)
    assert other["model_digest"] != first["model_digest"]


def test_progress_covers_items_and_users(encoder: Encoder, pico_domain: Any, pico_config: RunConfig) -> None:
    seen: list[tuple[int, int]] = []

    def report(*, step: int = 0, total: int = 0, **_: Any) -> None:
        seen.append((step, total))

    evaluate(encoder, pico_domain, pico_config, report=report)
    assert seen[-1] == (70, 70) and seen == sorted(seen)
