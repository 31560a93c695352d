"""Joint training on pooled data: same parts, batches of one domain, resumable; for simulations alone."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from clients.training.dataset import TrainingBatches
from common.config import RunConfig
from common.models.base import load_tensors, trainable_tensors
from common.models.encoder import Encoder
from simulations.pooled import PooledBatches, joint_reference, train_pooled


@pytest.fixture
def domains(make_domain: Callable[..., Any]) -> list[Any]:
    torch.set_num_threads(1)
    return [make_domain("one"), make_domain("two", users=20, items=15, seed=1)]


def test_batches_are_of_one_domain_in_proportion(
    domains: list[Any], pico_model: Path, pico_config: RunConfig
) -> None:
    encoder = Encoder.load(pico_model)
    parts = [TrainingBatches(encoder, domain, pico_config, 200) for domain in domains]
    pooled = PooledBatches(parts, 200, seed=0)
    share = parts[0].examples / sum(part.examples for part in parts)
    turns = pooled._order_S.tolist()
    assert turns.count(0) / 200 == pytest.approx(share, abs=0.1)
    for domain in (0, 1):  # every turn of a domain takes its next batch
        assert [pooled._turn_S[s] for s in range(200) if turns[s] == domain] == list(
            range(turns.count(domain))
        )
    first = next(step for step in range(200) if turns[step] == 1)
    assert torch.equal(pooled[first]["item_ids_UT"], parts[1][0]["item_ids_UT"])


def test_joint_training_resumes_and_finishes_once(
    domains: list[Any], pico_model: Path, pico_config: RunConfig, tmp_path: Path
) -> None:
    whole = train_pooled(domains, pico_model, pico_config, tmp_path / "whole")
    assert whole.steps == 24

    def kill(*, phase: str, step: int = 0, **_: Any) -> None:
        if phase == "train" and step == 11:
            raise InterruptedError

    with pytest.raises(InterruptedError):
        train_pooled(domains, pico_model, pico_config, tmp_path / "cut", report=kill)
    resumed = train_pooled(domains, pico_model, pico_config, tmp_path / "cut")
    left, right = load_tensors(whole.model_folder), load_tensors(resumed.model_folder)
    assert all(torch.equal(left[name], right[name]) for name in left)
    base = load_tensors(pico_model)
    moved = {name for name in base if not torch.equal(base[name], left[name])}
    assert moved <= set(trainable_tensors(pico_model)) and len(moved) > 20
    assert train_pooled(domains, pico_model, pico_config, tmp_path / "cut", report=kill) == resumed


def test_joint_reference_evaluates_each_domain(
    domains: list[Any], pico_model: Path, pico_config: RunConfig, tmp_path: Path
) -> None:
    base = pico_config.base.model_copy(update={"model": str(pico_model)})
    config = pico_config.model_copy(update={"base": base})
    found = joint_reference({domain.name: domain for domain in domains}, config, tmp_path)
    assert set(found) == {"one", "two"}
    assert all(set(metrics) == {"recall@10", "ndcg@10"} for metrics in found.values())
    assert (tmp_path / "status.json").is_file()


def test_the_light_parts_import_neither_it_nor_torch() -> None:
    code = (
        "import sys, clients.serving, clients.training.job;"
        "print([name for name in ('torch', 'simulations') if name in sys.modules])"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], check=True, timeout=60, capture_output=True, text=True
    )
    assert done.stdout.strip() == "[]"
