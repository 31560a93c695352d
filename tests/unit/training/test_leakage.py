"""The owner's measure of what a vector tells about its users, and the limit on it."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from clients.training.fit import load_encoder
from clients.training.job import Job, ReleaseLimit
from clients.training.leakage import FPR, RECORD, assess, hold_out, sequence_losses
from clients.training.perform import perform
from common.config import RunConfig
from common.errors import ConfigError, LeakageError
from common.progress import NO_REPORT


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


def test_an_attack_is_assessed_as_worked_out_by_hand() -> None:
    found = assess(np.array([1.0, 3.0, 3.0, 5.0]), np.array([0.0, 1.0, 2.0, 4.0]))
    assert found.auc == (1.5 + 3 + 3 + 4) / 16
    assert found.tpr == 1 / 4  # of four others none may pass: only the member above 4
    assert (found.members, found.others) == (4, 4)


def test_one_in_a_hundred_others_may_pass() -> None:
    others = np.arange(200.0)
    assert assess(np.array([197.0, 197.5, 198.5]), others).tpr == 2 / 3  # two of 200 may: 198 and 199
    assert FPR == 0.01


@pytest.mark.parametrize("constant", [False, True])
def test_scores_that_say_nothing_are_at_chance(constant: bool) -> None:
    generator = np.random.default_rng(1)
    scores = np.zeros((2, 400)) if constant else generator.normal(size=(2, 400))
    found = assess(*scores)
    assert found.auc_low <= 0.5 <= found.auc_high
    assert found.tpr <= 0.04


def test_a_shift_is_found_and_its_interval_holds_the_truth() -> None:
    generator = np.random.default_rng(2)
    found = assess(generator.normal(1, 1, 500), generator.normal(0, 1, 500))
    assert found.auc_low < 0.7602 < found.auc_high  # Phi(1 / sqrt 2)


def test_losses_are_those_of_the_newest_positions(
    pico_domain: Any, pico_model: Path, pico_config: RunConfig
) -> None:
    encoder = load_encoder(pico_model, pico_config, training=False)
    last_U = sequence_losses(encoder, pico_domain, pico_config, 1)
    both_U = sequence_losses(encoder, pico_domain, pico_config, 2)
    cut = pico_domain.with_users(np.arange(len(pico_domain.user_ids)))
    cut.train[:] = [history[:-1] for history in cut.train]
    before_U = sequence_losses(encoder, cut, pico_config, 1)
    long_U = np.array([len(history) >= 3 for history in pico_domain.train])
    assert long_U.sum() > 10
    assert np.allclose(both_U[long_U], (last_U + before_U)[long_U] / 2, atol=1e-5)
    assert np.array_equal(both_U[~long_U], last_U[~long_U])


def test_held_out_users_are_no_members(pico_domain: Any) -> None:
    members, others = hold_out(pico_domain, 15, seed=3)
    assert sorted([*members, *others]) == list(range(40)) and len(others) == 15
    assert not np.array_equal(others, hold_out(pico_domain, 15, seed=4)[1])
    with pytest.raises(ConfigError, match="40 users are too few"):
        hold_out(pico_domain, 21, seed=3)


@pytest.fixture
def job(
    make_domain: Callable[..., Any],
    pico_model: Path,
    pico_config: RunConfig,
    by_heart: dict[str, Any],
    tmp_path: Path,
) -> Job:
    make_domain(users=16, random=True).save(tmp_path / "domain")
    training = pico_config.training.model_copy(update=by_heart)
    return Job(
        mode="fit", domain=str(tmp_path / "domain"), base=str(pico_model), work=str(tmp_path / "work"),
        config=pico_config.model_copy(update={"training": training}), evaluate_after_fit=False, threads=1,
        release=ReleaseLimit(max_tpr=0.05, held_out_users=8),
    )  # fmt: skip


def test_a_vector_that_tells_too_much_is_refused_and_the_figures_stay(job: Job) -> None:
    with pytest.raises(LeakageError, match=r"0\.05 are allowed"):
        perform(job, NO_REPORT)
    (path,) = Path(job.work).glob(f"*/{RECORD}")
    record = json.loads(path.read_text())
    assert record["tpr"] > 0.5 and record["auc"] > 0.8
    assert (record["members"], record["others"], record["max_tpr"]) == (8, 8, 0.05)
    assert not job.file("result").exists()

    higher = job.model_copy(update={"release": ReleaseLimit(max_tpr=1.0, held_out_users=8)})
    result = perform(higher, NO_REPORT)  # the same fine-tuning, which is not repeated
    assert result["users"] == 8
    assert result["vector_sha256"] == record["vector_sha256"]


def test_without_a_limit_nothing_is_held_out_or_measured(job: Job) -> None:
    few = job.config.training.model_copy(update={"max_steps": 2, "eval_every_steps": 2})
    free = {"release": ReleaseLimit(), "config": job.config.model_copy(update={"training": few})}
    assert perform(job.model_copy(update=free), NO_REPORT)["users"] == 16
    assert not list(Path(job.work).glob(f"*/{RECORD}"))
