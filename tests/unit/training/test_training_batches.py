"""Examples, their order, and the loss against a naive one."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from clients.training.dataset import Examples, TrainingBatches, data_digest
from clients.training.loss import TwoTower, in_batch_loss
from common.config import RunConfig
from common.errors import DataError
from common.models.base import trainable_tensors
from common.models.encoder import Encoder


@pytest.fixture
def encoder(pico_model: Path) -> Encoder:
    torch.set_num_threads(1)
    return Encoder.load(pico_model)


def test_examples_are_prefixes_of_the_training_sequence() -> None:
    train = [np.array([5, 6, 7]), np.array([1]), np.array([2, 3])]
    every = Examples(train, "all")
    assert list(zip(every.user_N.tolist(), every.position_N.tolist(), strict=True)) == [
        (0, 1),
        (0, 2),
        (2, 1),
    ]
    last = Examples(train, "last")
    assert list(zip(last.user_N.tolist(), last.position_N.tolist(), strict=True)) == [(0, 2), (2, 1)]


def test_an_epoch_sees_each_example_once_and_the_order_is_a_function_of_the_seed(
    encoder: Encoder, pico_domain: Any, pico_config: RunConfig
) -> None:
    batches = TrainingBatches(encoder, pico_domain, pico_config, 1000)
    per_epoch = batches.examples // 8
    epochs = [
        np.concatenate([batches.members(epoch * per_epoch + step) for step in range(per_epoch)])
        for epoch in range(2)
    ]
    for epoch in epochs:
        assert len(set(epoch.tolist())) == len(epoch) == per_epoch * 8
    assert epochs[0].tolist() != epochs[1].tolist()
    again = TrainingBatches(encoder, pico_domain, pico_config, 1000)
    assert again.members(per_epoch + 1).tolist() == batches.members(per_epoch + 1).tolist()
    other = pico_config.model_copy(update={"run": pico_config.run.model_copy(update={"seed": 1})})
    assert TrainingBatches(encoder, pico_domain, other, 9).members(0).tolist() != batches.members(0).tolist()


@pytest.mark.parametrize("history_negatives", [0, 1, 2])
def test_a_batch_holds_each_candidate_once_and_blocks_the_older_history(
    encoder: Encoder, pico_domain: Any, pico_config: RunConfig, history_negatives: int
) -> None:
    walks = [[1, 2], [3, 2], [2, 4], [5, 4, 5], [2, 6, 7, 4], [4, 6, 4, 2]]
    domain = replace(
        pico_domain,
        train=[np.array(walk, dtype=np.int32) for walk in walks] * 6,
        user_ids=pico_domain.user_ids[:36],
        valid=pico_domain.valid[:36],
        test=pico_domain.test[:36],
    )
    training = pico_config.training.model_copy(
        update={"batch_size": 36, "positions_per_user": "last", "history_negatives": history_negatives}
    )
    batches = TrainingBatches(encoder, domain, pico_config.model_copy(update={"training": training}), 1)
    batch, kinds = batches[0], [int(member) % 6 for member in batches.members(0)]
    newest = [walk[:-1][-history_negatives:] if history_negatives else [] for walk in walks]
    candidates = sorted({walk[-1] for walk in walks} | {item for seen in newest for item in seen})
    texts = [", ".join(strings) for strings in domain.catalog().texts(("title", "brand"))]
    for row, item in enumerate(candidates):
        ids = batch["item_ids_UT"][row, : int(batch["item_mask_UT"][row].sum())].tolist()
        assert ids == encoder.tokenizer(texts[item])["input_ids"]
    assert batch["item_ids_UT"].shape[0] == len(candidates)
    assert batch["target_B"].tolist() == [candidates.index(walks[kind][-1]) for kind in kinds]
    assert batch["blocked_BU"].tolist() == [
        [
            item in walks[kind][:-1] and item not in newest[kind] and item != walks[kind][-1]
            for item in candidates
        ]
        for kind in kinds
    ]


def test_the_history_is_most_recent_first(encoder: Encoder, pico_domain: Any, pico_config: RunConfig) -> None:
    batches = TrainingBatches(encoder, pico_domain, pico_config, 1)
    batch = batches[0]
    chosen = int(batches.members(0)[0])
    examples = Examples(pico_domain.train, "all")
    user, position = int(examples.user_N[chosen]), int(examples.position_N[chosen])
    history = pico_domain.train[user][:position][::-1]
    texts = [", ".join(strings) for strings in pico_domain.catalog().texts(("title", "brand"))]
    ids = encoder.tokenizer("; ".join(texts[i] for i in history), truncation=True, max_length=32)["input_ids"]
    length = int(batch["history_mask_BT"][0].sum())
    assert batch["history_ids_BT"][0, :length].tolist() == ids


def test_the_loss_is_that_of_masked_duplicates() -> None:
    """Naive: over all B targets with duplicates of the row's own target and history items left out."""
    torch.manual_seed(0)
    items_IE = torch.nn.functional.normalize(torch.randn(6, 8), dim=1)
    z_BE = torch.nn.functional.normalize(torch.randn(5, 8), dim=1)
    targets, histories, temperature = [0, 1, 0, 2, 1], [[2], [], [1], [], [0]], 0.05
    naive = 0.0
    for row, target in enumerate(targets):
        candidates = {target} | {
            other for other in targets if other != target and other not in histories[row]
        }
        scores = {item: float(z_BE[row] @ items_IE[item]) / temperature for item in candidates}
        naive -= scores[target] - math.log(sum(math.exp(score) for score in scores.values()))
    blocked_BU = torch.tensor([[item in history for item in (0, 1, 2)] for history in histories])
    loss = in_batch_loss(z_BE, items_IE[:3], torch.tensor(targets), blocked_BU, temperature)
    assert float(loss) == pytest.approx(naive / 5, rel=1e-5)


def test_a_corrected_loss_takes_the_frequency_of_candidates_out() -> None:
    """When scores are `log(weight) + log(frequency)`, the corrected loss is that of the weights alone."""
    weight_U, q_U = torch.tensor([0.5, 0.3, 0.2]), torch.tensor([0.9, 0.05, 0.4])
    z_BE, item_UE = 0.05 * (weight_U * q_U).log()[None], torch.eye(3)
    target_B, blocked_BU = torch.tensor([1]), torch.zeros(1, 3, dtype=torch.bool)
    loss = in_batch_loss(z_BE, item_UE, target_B, blocked_BU, 0.05)
    corrected = in_batch_loss(z_BE, item_UE, target_B, blocked_BU, 0.05, q_U.log())
    assert float(corrected) == pytest.approx(-math.log(0.3), rel=1e-5)
    assert float(loss) == pytest.approx(-math.log(0.015 / 0.545), rel=1e-5)


def test_the_frequency_of_candidates_is_that_of_the_batches(
    encoder: Encoder, make_domain: Callable[..., Any], pico_config: RunConfig
) -> None:
    training = pico_config.training.model_copy(update={"logq_correction": True})
    config = pico_config.model_copy(update={"training": training})
    steps = 600
    domain = make_domain(users=60, items=12)
    skewed = replace(domain, train=[np.where(walk < 6, 0, walk).astype(np.int32) for walk in domain.train])
    batches = TrainingBatches(encoder, skewed, config, steps)
    examples = Examples(skewed.train, "all")
    times_I = np.zeros(12)
    for step in range(steps):
        chosen = batches.members(step)
        targets = {
            int(skewed.train[int(examples.user_N[n])][int(examples.position_N[n])]) for n in chosen.tolist()
        }
        times_I[list(targets)] += 1
    batch = batches[0]
    assert batch["log_q_U"].shape == (batch["item_ids_UT"].shape[0],)
    expected_I = np.exp(batches._log_q_I)
    assert expected_I[0] > 2 * expected_I[11]
    np.testing.assert_allclose(times_I[times_I > 0] / steps, expected_I[times_I > 0], atol=0.06)
    assert "log_q_U" not in TrainingBatches(encoder, skewed, pico_config, 1)[0]


def test_only_what_may_train_gets_gradients(
    encoder: Encoder, pico_model: Path, pico_domain: Any, pico_config: RunConfig
) -> None:
    tower = TwoTower(encoder, set(trainable_tensors(pico_model)), 0.05)
    tower(**TrainingBatches(encoder, pico_domain, pico_config, 1)[0])["loss"].backward()
    with_gradient = {name for name, p in encoder.model.named_parameters() if p.grad is not None}
    assert with_gradient == set(trainable_tensors(pico_model)) == set(tower.trained_tensors())


def test_too_few_examples_are_refused(
    encoder: Encoder, make_domain: Callable[..., Any], pico_config: RunConfig
) -> None:
    domain = make_domain(users=2)
    lonely = replace(domain, train=[walk[:1] for walk in domain.train])
    with pytest.raises(DataError, match="0 training examples"):
        TrainingBatches(encoder, lonely, pico_config, 1)


def test_the_data_digest_sees_data_but_no_user_ids(pico_domain: Any, pico_config: RunConfig) -> None:
    digest = data_digest(pico_domain, pico_config.text)
    renamed = replace(pico_domain, user_ids=[f"x{user}" for user in pico_domain.user_ids])
    assert data_digest(renamed, pico_config.text) == digest
    moved = replace(pico_domain, valid=(pico_domain.valid + 1) % 30)
    assert data_digest(moved, pico_config.text) != digest
