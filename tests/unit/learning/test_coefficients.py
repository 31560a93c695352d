"""Groups by layer, and coefficient gradients against autograd through the weighted sum of N vectors."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from common.coefficients import Granularity, as_table, group_tensors, layer_of
from common.errors import ModelError, VectorError
from common.models.encoder import Encoder
from common.vectors import TaskVector
from server.learning import merged as merged_module
from server.learning.losses import entropy
from server.learning.merged import MergedModel

CPU = torch.device("cpu")


@pytest.mark.parametrize(
    ("name", "layer"),
    [
        ("encoder.layer.11.attention.self.query.weight", 11),
        ("roberta.encoder.layer.0.output.dense.bias", 0),
        ("model.layers.3.mlp.up_proj.weight", 3),
        ("h.2.attn.weight", 2),
        ("embeddings.LayerNorm.weight", None),
        ("pooler.dense.weight", None),
        ("layernorm.7.weight", None),
    ],
)
def test_layers_are_told_by_name(name: str, layer: int | None) -> None:
    assert layer_of(name) == layer


def test_every_tensor_is_in_one_group(taus: dict[str, TaskVector]) -> None:
    names = list(taus["toys"])
    layers = group_tensors(names, "layer")
    assert list(layers) == ["layer-0", "layer-1", "rest"]
    assert sorted(name for group in layers.values() for name in group) == sorted(names)
    assert group_tensors(names, "domain") == {"all": sorted(names)}
    assert group_tensors(names, "tensor") == {name: [name] for name in sorted(names)}
    with pytest.raises(ModelError, match="layer-wise"):
        group_tensors(["dense.weight"], "layer")
    assert list(group_tensors(["a.layer.10.w", "a.layer.2.w"], "layer")) == ["layer-2", "layer-10"]


def test_table_of_coefficients() -> None:
    assert as_table(torch.tensor([[1.0, 2.0]]), ["all"], ["a", "b"]) == {"all": {"a": 1.0, "b": 2.0}}


def prepare(base: Path) -> tuple[Encoder, dict[str, Tensor]]:
    encoder = Encoder.load(base)
    encoder.model.requires_grad_(False)
    return encoder, {name: param.detach() for name, param in encoder.model.named_parameters()}


@pytest.mark.parametrize("granularity", ["domain", "layer", "tensor"])
def test_gradient_is_that_of_autograd_through_the_sum(
    base: Path, taus: dict[str, TaskVector], granularity: Granularity
) -> None:
    encoder, tensors = prepare(base)
    vectors = list(taus.values())
    groups = group_tensors(vectors[0], granularity)
    ids, mask = encoder.batch([[2, 10, 11, 3], [2, 12, 13, 14, 3]])
    items_IE = torch.nn.functional.normalize(torch.randn(6, encoder.dim), dim=-1)
    values_GD = torch.rand(len(groups), len(vectors)) * 0.4

    merged = MergedModel(tensors, vectors, groups, CPU)
    for _ in range(2):  # the buffers are refilled, not grown
        merged.set_coefficients(values_GD)
        ours = merged.gradient(entropy(encoder.forward(ids, mask, params=merged.params) @ items_IE.T).sum())

    values_GD = values_GD.clone().requires_grad_()
    params = {
        name: tensors[name] + sum(values_GD[g, d] * tau[name] for d, tau in enumerate(vectors))
        for g, names in enumerate(groups.values())
        for name in names
    }
    loss = entropy(encoder.forward(ids, mask, params=params) @ items_IE.T).sum()
    (theirs,) = torch.autograd.grad(loss, [values_GD])
    assert float(theirs.abs().max()) > 1e-3
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5 * float(theirs.abs().max()))
    for name, param in params.items():
        torch.testing.assert_close(merged.params[name], param.detach(), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("granularity", ["domain", "layer", "tensor"])
def test_bf16_vectors_are_widened_and_nothing_else_is_rounded(
    base: Path, taus: dict[str, TaskVector], monkeypatch: pytest.MonkeyPatch, granularity: Granularity
) -> None:
    """The same as fp32 on the rounded vectors, whatever the borders of the chunks."""
    monkeypatch.setattr(merged_module, "CPU_CHUNK", 1000)  # not a divisor of anything
    encoder, tensors = prepare(base)
    rounded = [{name: value.bfloat16().float() for name, value in tau.items()} for tau in taus.values()]
    groups = group_tensors(rounded[0], granularity)
    values_GD = torch.rand(len(groups), len(rounded)) * 0.4
    ids, mask = encoder.batch([[2, 10, 11, 3], [2, 12, 13, 14, 3]])
    items_IE = torch.nn.functional.normalize(torch.randn(6, encoder.dim), dim=-1)

    results = []
    for kept in ("fp32", "bf16"):
        merged = MergedModel(tensors, rounded if kept == "fp32" else list(taus.values()), groups, CPU, kept)
        merged.set_coefficients(values_GD)
        loss = entropy(encoder.forward(ids, mask, params=merged.params) @ items_IE.T).sum()
        results.append((merged.params, merged.gradient(loss), merged.vector(values_GD)))
    (params, gradient, vector), (params_16, gradient_16, vector_16) = results
    for name in vector:
        torch.testing.assert_close(params_16[name], params[name], rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(vector_16[name], vector[name], rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(gradient_16, gradient, rtol=1e-3, atol=1e-4 * float(gradient.abs().max()))


@settings(max_examples=10, deadline=None)
@given(st.integers(1, 4), st.integers(0, 1000))
def test_merged_vector_is_the_weighted_sum(count: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    shapes = {"x.layer.0.w": (3, 2), "x.layer.1.w": (4,), "norm.w": (2,)}
    base = {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}
    vectors = [
        {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}
        for _ in range(count)
    ]
    merged = MergedModel(base, vectors, group_tensors(base, "layer"), CPU)
    values_GD = torch.randn(3, count, generator=generator)
    vector = merged.vector(values_GD)
    for g, name in enumerate(shapes):
        expected = sum(values_GD[g, d].double() * vectors[d][name].double() for d in range(count))
        torch.testing.assert_close(vector[name].double(), expected, rtol=1e-5, atol=1e-6)
    merged.set_coefficients(torch.zeros(3, count))
    assert all(torch.equal(merged.params[name], base[name]) for name in shapes)


def test_vectors_of_another_base_are_refused(base: Path) -> None:
    _, tensors = prepare(base)
    with pytest.raises(VectorError, match="'other'"):
        MergedModel(tensors, [{"other": torch.ones(2)}], {"all": ["other"]}, CPU)
