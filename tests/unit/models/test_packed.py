"""Packed batches give what padded ones give: embeddings, and gradients of every tensor."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModel, BertConfig, LongformerConfig, RobertaConfig

from common.models import packed
from common.models.encoder import Encoder

SMALL = {
    "vocab_size": 50,
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 32,
    "max_position_embeddings": 40,
    "initializer_range": 0.3,
}
LENGTHS = ([5, 1, 12, 7], [9], [16, 16], [3, 3, 3])


def encoders(config: Any, pooling: Any = "mean") -> tuple[Encoder, Encoder]:
    """The same model twice: packed and padded."""
    torch.manual_seed(0)
    packing = AutoModel.from_config(copy.deepcopy(config), attn_implementation=packed.NAME)
    plain = AutoModel.from_config(copy.deepcopy(config), attn_implementation="eager")
    plain.load_state_dict(packing.state_dict())
    one, other = (Encoder(model.eval(), None, pooling, bf16=False, limit=32) for model in (packing, plain))
    assert one.is_packed and not other.is_packed
    return one, other


def batch(lengths: list[int], pad: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    mask_BT = (torch.arange(max(lengths))[None] < torch.tensor(lengths)[:, None]).long()
    ids_BT = torch.randint(3, 50, mask_BT.shape, generator=generator)
    return ids_BT.where(mask_BT == 1, pad), mask_BT


def gradients(encoder: Encoder, ids_BT: Tensor, mask_BT: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
    params = {name: p.detach().clone().requires_grad_() for name, p in encoder.model.named_parameters()}
    z_BE = encoder.forward(ids_BT, mask_BT, params)
    weight_BE = torch.randn(z_BE.shape, generator=torch.Generator().manual_seed(2))
    found = torch.autograd.grad((z_BE * weight_BE).sum(), list(params.values()), allow_unused=True)
    return z_BE.detach(), {name: g for name, g in zip(params, found, strict=True) if g is not None}


@pytest.mark.parametrize("config", [BertConfig(**SMALL), RobertaConfig(**SMALL)], ids=["bert", "roberta"])
@pytest.mark.parametrize("lengths", LENGTHS, ids=str)
@pytest.mark.parametrize("plain_tokens", [256, 1], ids=["plain", "fused"])
def test_embeddings_and_gradients_are_those_of_the_padded_batch(
    config: Any, lengths: list[int], plain_tokens: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(packed, "PLAIN_TOKENS", plain_tokens)
    one, other = encoders(config)
    ids_BT, mask_BT = batch(lengths, config.pad_token_id)
    (z_BE, found), (expected_BE, expected) = (gradients(each, ids_BT, mask_BT) for each in (one, other))
    torch.testing.assert_close(z_BE, expected_BE, rtol=1e-5, atol=1e-6)
    assert found.keys() == expected.keys()
    scale = max(float(grad.abs().max()) for grad in expected.values())
    for name, grad in expected.items():
        torch.testing.assert_close(found[name], grad, rtol=1e-4, atol=1e-5 * scale, msg=name)


def test_the_first_token_is_found_in_the_row() -> None:
    one, other = encoders(BertConfig(**SMALL), "cls")
    ids_BT, mask_BT = batch([4, 9, 2], 0)
    torch.testing.assert_close(one.forward(ids_BT, mask_BT), other.forward(ids_BT, mask_BT))


def test_a_history_does_not_depend_on_its_neighbours() -> None:
    one, _ = encoders(BertConfig(**SMALL))
    ids_BT, mask_BT = batch([6, 11], 0)
    alone_BE = one.forward(ids_BT[:1, :6], mask_BT[:1, :6])
    torch.testing.assert_close(one.forward(ids_BT, mask_BT)[:1], alone_BE, rtol=1e-5, atol=1e-6)


def test_the_row_is_a_multiple_and_what_fills_it_has_no_gradient() -> None:
    _, mask_BT = batch([5, 2], 0)
    packing = packed.Packing(mask_BT)
    assert (packing.tokens, len(packing.cells_X)) == (7, packed.MULTIPLE)
    values_XE = torch.ones(packed.MULTIPLE, 3, requires_grad=True)
    packing.pad(values_XE).sum().backward()
    assert values_XE.grad is not None
    assert values_XE.grad[:, 0].tolist() == [1] * 7 + [0] * (packed.MULTIPLE - 7)
    values_BTE = torch.ones(2, 5, 3, requires_grad=True)
    packing.gather(values_BTE).sum().backward()
    assert values_BTE.grad is not None
    assert values_BTE.grad[..., 0].tolist() == [[1] * 5, [1, 1, 0, 0, 0]]


def test_other_kinds_and_devices_stay_padded() -> None:
    assert not packed.can_pack(LongformerConfig(), "cpu")
    assert not packed.can_pack(BertConfig(), "cuda")
    assert packed.can_pack(RobertaConfig(), "cpu")
