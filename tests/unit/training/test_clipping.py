"""Ghost clipping: the sum is that of each user's own gradient, computed alone and cut."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from clients.training import clipping
from clients.training.clipping import GhostClipping
from clients.training.loss import TwoTower
from common.errors import ModelError
from common.models.base import trainable_tensors
from common.models.encoder import Encoder

CLIP, USERS, NEGATIVES, LONGEST = 0.5, 21, 5, 12
Batch = dict[str, Tensor]


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


def tower_of(model: Path) -> TwoTower:
    encoder = Encoder.load(model, dropout=0.0, for_training=True)
    tower = TwoTower(encoder, set(trainable_tensors(model)), 0.05)
    return tower.train()


@pytest.fixture
def tower(pico_model: Path) -> TwoTower:
    return tower_of(pico_model)


@pytest.fixture
def ghost(tower: TwoTower) -> Iterator[GhostClipping]:
    made = GhostClipping(tower)
    yield made
    made.close()


def texts(rows: int, longest: int, generator: np.random.Generator) -> tuple[Tensor, Tensor]:
    """Random ids, each row of its own length, padded."""
    length_N = generator.integers(2, longest + 1, rows)
    length_N[:1] = longest
    mask_NT = torch.from_numpy((np.arange(longest) < length_N[:, None]).astype(np.int64))
    return torch.from_numpy(generator.integers(5, 120, (rows, longest))) * mask_NT, mask_NT


def batch_of(users: int = USERS, longest: int = LONGEST, seed: int = 0) -> Batch:
    generator = np.random.default_rng(seed)
    batch = {}
    for name, rows, tokens in (
        ("history_{}_UT", users, longest),
        ("target_{}_UT", users, 6),
        ("negative_{}_IT", NEGATIVES, 5),
    ):
        batch[name.format("ids")], batch[name.format("mask")] = texts(rows, tokens, generator)
    blocked = generator.random((users, 1 + NEGATIVES)) < 0.2
    blocked[:, 0] = False
    return {**batch, "blocked_UI": torch.from_numpy(blocked)}


def rows(batch: Batch, keep: list[int]) -> Batch:
    return {name: tensor[keep] if "_U" in name else tensor for name, tensor in batch.items()}


def alone(tower: TwoTower, batch: Batch, user: int) -> tuple[float, Tensor]:
    """The loss and the gradient of one user, its texts without padding, as plain autograd has them."""
    one = rows(batch, [user])
    width = int(one["history_mask_UT"].sum())
    z_UE = tower.embed(one["history_ids_UT"][:, :width], one["history_mask_UT"][:, :width])
    target_UE = tower.embed(one["target_ids_UT"], one["target_mask_UT"])
    negative_IE = tower.embed(one["negative_ids_IT"], one["negative_mask_IT"])
    loss = tower.own_losses(z_UE, target_UE, negative_IE[None], one["blocked_UI"]).sum()
    trained = [parameter for parameter in tower.parameters() if parameter.requires_grad]
    found = torch.autograd.grad(loss, trained)
    return float(loss.detach()), torch.cat([part.flatten() for part in found])


def flat(tower: TwoTower, summed: dict[nn.Parameter, Tensor]) -> Tensor:
    trained = [parameter for parameter in tower.parameters() if parameter.requires_grad]
    assert set(summed) == set(trained)
    return torch.cat([summed[parameter].flatten() for parameter in trained])


@pytest.mark.parametrize("gram", [True, False])
@pytest.mark.parametrize("share", [0.0, 0.5, 1.0])
def test_the_sum_is_that_of_each_users_own_clipped_gradient(
    tower: TwoTower, ghost: GhostClipping, share: float, gram: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(clipping, "_gram_is_cheaper", lambda *_: gram)
    batch = batch_of()
    users = [alone(tower, batch, user) for user in range(USERS)]
    norm_U = torch.stack([gradient.norm() for _, gradient in users])
    clip = float(norm_U.quantile(1 - share)) * (0.9 if share == 1 else 1.1 if share == 0 else 1)
    summed, loss_U = ghost.summed(batch, clip)
    torch.testing.assert_close(loss_U, torch.tensor([loss for loss, _ in users]), rtol=1e-3, atol=1e-4)
    expected = torch.stack([gradient for _, gradient in users])
    expected = (expected * (clip / norm_U).clamp(max=1)[:, None]).sum(0)
    assert float((norm_U > clip).float().mean()) == pytest.approx(share, abs=0.05)
    assert float((flat(tower, summed) - expected).norm() / expected.norm()) < 1e-4
    assert all(parameter.grad is None for parameter in tower.parameters())


@pytest.mark.parametrize(("own", "tokens", "cheaper"), [(42, 80, True), (160, 480, False)])
def test_the_cheaper_way_to_a_norm_is_taken(own: int, tokens: int, cheaper: bool) -> None:
    own_TC, a_TC = torch.zeros(own, 384), torch.zeros(tokens, 384)
    assert clipping._gram_is_cheaper(own_TC, a_TC, a_TC) is cheaper


def test_one_user_more_or_less_moves_the_sum_by_the_clip_at_most(
    tower: TwoTower, ghost: GhostClipping
) -> None:
    batch = batch_of()
    whole = flat(tower, ghost.summed(batch, CLIP)[0])
    moved = []
    for user in range(USERS):
        others = rows(batch, [row for row in range(USERS) if row != user])
        moved.append(float((whole - flat(tower, ghost.summed(others, CLIP)[0])).norm()))
    assert max(moved) <= CLIP * (1 + 1e-4)
    assert max(moved) > 0.99 * CLIP  # the bound is reached: it is this clip that bounds


def test_a_step_without_users_sums_to_nothing(tower: TwoTower, ghost: GhostClipping) -> None:
    summed, loss_U = ghost.summed(rows(batch_of(), []), CLIP)
    assert len(loss_U) == 0
    assert not flat(tower, summed).any()


def test_a_gradient_that_is_not_finite_is_refused(tower: TwoTower, ghost: GhostClipping) -> None:
    with torch.no_grad():
        next(layer for layer in tower.modules() if isinstance(layer, nn.Linear)).weight[0, 0] = torch.nan
    with pytest.raises(ModelError, match="not finite"):
        ghost.summed(batch_of(), CLIP)


def test_a_layer_that_cannot_be_bounded_is_refused(pico_model: Path) -> None:
    tower = tower_of(pico_model)
    tower.backbone.get_input_embeddings().weight.requires_grad_()
    with pytest.raises(ModelError, match="word_embeddings' is no linear"):
        GhostClipping(tower)
    tower = tower_of(pico_model)
    layers = [layer for layer in tower.modules() if isinstance(layer, nn.LayerNorm)]
    layers[1].weight = layers[0].weight
    with pytest.raises(ModelError, match="share a tensor"):
        GhostClipping(tower)


def test_a_layer_that_takes_tokens_first_is_refused(
    pico_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tower = tower_of(pico_model)
    first = next(layer for layer in tower.modules() if isinstance(layer, nn.Linear))
    plain = first.forward
    monkeypatch.setattr(first, "forward", plain)
    first.register_forward_pre_hook(lambda _, inputs: (inputs[0].transpose(0, 1),))
    first.register_forward_hook(lambda _, __, output: output.transpose(0, 1))
    with pytest.raises(ModelError, match="cannot tell users apart"):
        GhostClipping(tower)


def test_nothing_is_watched_after_the_end(tower: TwoTower) -> None:
    ghost = GhostClipping(tower)
    ghost.close()
    with pytest.raises(AttributeError):
        ghost.summed(batch_of(), CLIP)
