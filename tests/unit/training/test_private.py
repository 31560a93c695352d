"""DP-SGD: one user's part is bounded and nobody else is in it; the randomness is nobody's but the owner's."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from clients.privacy import PrivacyLimits, read_claim
from clients.training.accounting import NOISE_KEY, PrivacyPlan
from clients.training.evaluate import evaluate
from clients.training.fit import fine_tune, fit_folder, load_encoder
from clients.training.loss import TwoTower
from clients.training.private import PrivateBatches, PrivateTrainer, SecretRandom, public_negatives
from clients.training.trainer import Plan
from common.config import RunConfig
from common.errors import GateError
from common.models.base import trainable_tensors
from common.models.encoder import Encoder
from common.progress import NO_REPORT

CLIP, ALL = 0.5, 1.0


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture(scope="module")
def domain(make_domain: Callable[..., Any]) -> Any:
    return make_domain(users=60)


@pytest.fixture
def config(pico_config: RunConfig) -> RunConfig:
    document = pico_config.model_dump()
    document["privacy"] |= {
        "mechanism": "dp-sgd",
        "noise_multiplier": 1.0,
        "clip_norm": CLIP,
        "negatives": 12,
    }
    return RunConfig.model_validate(document)


def plan_of(rate: float = ALL) -> PrivacyPlan:
    return PrivacyPlan(rate=rate, noise=1.0, clip=CLIP, delta=1e-5, steps=12, users_per_step=8)


@pytest.fixture
def trainer(domain: Any, pico_model: Path, config: RunConfig, tmp_path: Path) -> Iterator[PrivateTrainer]:
    encoder = load_encoder(pico_model, config, device="cpu")
    batches = PrivateBatches(encoder, domain, config, plan_of(), SecretRandom(tmp_path / NOISE_KEY))
    tower = TwoTower(encoder, set(trainable_tensors(pico_model)), 0.05)
    numbers = Plan(1e-3, 0.0, 2, 12, 12, 3, 5, None, 0, "ndcg@10")
    made = PrivateTrainer(tower, batches, dict, numbers, tmp_path, NO_REPORT)
    made.tower.train()
    yield made
    made.close()


def test_negatives_are_of_the_catalog_whoever_the_users_are(
    trainer: PrivateTrainer, domain: Any, config: RunConfig, tmp_path: Path
) -> None:
    turned = [history[::-1].copy() for history in domain.train]
    others = dataclasses.replace(
        domain,
        train=turned[:20],
        user_ids=domain.user_ids[:20],
        valid=domain.valid[:20],
        test=domain.test[:20],
    )
    secret = SecretRandom(tmp_path / "other.key")
    encoder = trainer.tower.encoder
    again = PrivateBatches(encoder, others, config, plan_of(), secret)
    for step in (0, 7):
        assert again.negatives(step).tolist() == trainer.train_dataset.negatives(step).tolist()
        assert len(set(again.negatives(step).tolist())) == 12
    assert again.negatives(0).tolist() != again.negatives(1).tolist()
    assert public_negatives(30, 12, 0, 0).tolist() != public_negatives(30, 12, 1, 0).tolist()


def test_a_users_own_items_are_not_its_negatives(trainer: PrivateTrainer, domain: Any) -> None:
    negatives = public_negatives(30, 12, 0, 0)
    members, batch = trainer.train_dataset.members(0), trainer.train_dataset[0]
    assert len(members) == 60
    for row, (user, position) in enumerate(members):
        own = set(domain.train[user][: position + 1].tolist())
        assert batch["blocked_UI"][row].tolist() == [False, *(int(item) in own for item in negatives)]


def test_users_take_part_once_at_the_rate_at_any_of_their_positions(
    trainer: PrivateTrainer, domain: Any, config: RunConfig, tmp_path: Path
) -> None:
    path = tmp_path / "fixed.key"
    path.write_bytes(bytes(range(32)))
    batches = PrivateBatches(trainer.tower.encoder, domain, config, plan_of(0.25), SecretRandom(path))
    drawn = [batches.members(step) for step in range(400)]
    for members in drawn:
        users = [user for user, _ in members]
        assert len(users) == len(set(users))
    assert sum(map(len, drawn)) / (400 * 60) == pytest.approx(0.25, abs=0.01)
    longest = max(range(60), key=lambda user: len(domain.train[user]))
    positions = {position for members in drawn for user, position in members if user == longest}
    assert positions == set(range(1, len(domain.train[longest])))


def test_a_step_without_users_is_noise_of_the_declared_size(
    trainer: PrivateTrainer, domain: Any, config: RunConfig, tmp_path: Path
) -> None:
    path = tmp_path / "fixed.key"
    path.write_bytes(bytes(range(32)))
    empty = PrivateBatches(trainer.tower.encoder, domain, config, plan_of(1e-12), SecretRandom(path))
    batch = empty[0]
    assert batch["blocked_UI"].shape == (0, 13)
    trainer._batches = empty
    trainer.training_step(trainer.tower, batch)
    noise = torch.cat([p.grad.flatten() for p in trainer.tower.parameters() if p.grad is not None])
    assert len(noise) == sum(math.prod(p.shape) for p in trainer.tower.parameters() if p.requires_grad)
    assert float(noise.std()) == pytest.approx(1.0 * CLIP / 8, rel=0.02)
    assert abs(float(noise.mean())) < 0.01 * CLIP
    assert all(p.grad is None for p in trainer.tower.parameters() if not p.requires_grad)


def test_streams_are_independent_and_normal(tmp_path: Path) -> None:
    (tmp_path / "key").write_bytes(bytes(range(32)))
    secret = SecretRandom(tmp_path / "key")
    shape = torch.Size([200, 101])
    first, again, second = (
        secret.noise(3).normal(shape),
        secret.noise(3).normal(shape),
        secret.noise(4).normal(shape),
    )
    assert torch.equal(first, again)
    assert not np.array_equal(secret.sampling(3).uniform(9), secret.noise(3).uniform(9))
    assert abs(float((first * second).mean())) < 0.03
    assert float((first.abs() < 1).float().mean()) == pytest.approx(0.6827, abs=0.01)
    assert float((first.abs() < 2).float().mean()) == pytest.approx(0.9545, abs=0.005)
    other = SecretRandom(tmp_path / "new")
    assert not torch.equal(other.noise(3).normal(shape), first)
    assert (tmp_path / "new").stat().st_mode & 0o777 == 0o600


class KilledError(Exception):
    """Stands for a kill."""


def test_a_killed_fine_tuning_ends_the_same_and_another_one_does_not(
    domain: Any, pico_model: Path, config: RunConfig, tmp_path: Path
) -> None:
    phases: list[str] = []

    def watch(*, phase: str, **_: Any) -> None:
        phases.append(phase)

    def kill(*, phase: str, step: int = 0, **_: Any) -> None:
        if (phase, step) == ("train", 7):
            raise KilledError

    with pytest.raises(KilledError):
        fine_tune(domain, pico_model, config, tmp_path / "killed", kill)
    folder = fit_folder(domain, pico_model, config, tmp_path / "killed")
    key = (folder / NOISE_KEY).read_bytes()
    resumed = fine_tune(domain, pico_model, config, tmp_path / "killed")
    assert resumed.resumed and not (folder / NOISE_KEY).exists()
    same = fit_folder(domain, pico_model, config, tmp_path / "same")
    same.mkdir(parents=True)
    (same / NOISE_KEY).write_bytes(key)
    straight = fine_tune(domain, pico_model, config, tmp_path / "same", watch)
    other = fine_tune(domain, pico_model, config, tmp_path / "other")

    assert straight.vector_sha256 == resumed.vector_sha256
    assert other.vector_sha256 != straight.vector_sha256  # the same seed, another noise
    assert {r.best_step for r in (resumed, straight, other)} == {12}  # the last weights, not the best
    claims = {read_claim(r.vector_path) for r in (resumed, straight, other)}
    assert len(claims) == 1 and claims.pop().mechanism == "dp-sgd"
    assert "validate" not in phases[: phases.index("train") + 11]
    lines = [json.loads(line) for line in (same / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines if "validation_ndcg@10" in line] == [12]


def test_an_owners_limit_refuses_before_the_first_step(
    domain: Any, pico_model: Path, config: RunConfig, pico_config: RunConfig, tmp_path: Path
) -> None:
    limits = PrivacyLimits(max_epsilon=1.0)
    for run, what in ((config, "max_epsilon = 1 "), (pico_config, "demands")):
        with pytest.raises(GateError, match=what):
            fine_tune(domain, pico_model, run, tmp_path, limits=limits)
    loose = PrivacyLimits(max_total_epsilon=1000.0)
    with pytest.raises(GateError, match="max_total_epsilon"):
        fine_tune(domain, pico_model, config, tmp_path, limits=loose, epsilon_spent=999.5)
    assert not list(tmp_path.iterdir())


def test_without_privacy_nothing_is_different(
    domain: Any, pico_model: Path, pico_config: RunConfig, tmp_path: Path
) -> None:
    document = pico_config.model_dump()
    document["privacy"]["negatives"] = 3
    other = RunConfig.model_validate(document)
    folder = fit_folder(domain, pico_model, pico_config, tmp_path)
    assert fit_folder(domain, pico_model, other, tmp_path) == folder


def test_private_training_learns(domain: Any, pico_model: Path, config: RunConfig, tmp_path: Path) -> None:
    document = config.model_dump()
    document["training"] |= {"batch_size": 25, "max_steps": 20, "learning_rate": 4e-3}
    document["privacy"] |= {"noise_multiplier": 0.1, "clip_norm": 1.0}
    run = RunConfig.model_validate(document)
    folder = fit_folder(domain, pico_model, run, tmp_path)
    folder.mkdir(parents=True)
    (folder / NOISE_KEY).write_bytes(bytes(range(32)))
    result = fine_tune(domain, pico_model, run, tmp_path)
    zero_shot = evaluate(Encoder.load(pico_model), domain, run, "valid").metrics["ndcg@10"]
    assert result.validation_ndcg > 1.5 * zero_shot  # with little noise: the loss and the gradients are right
