"""Mixing rules against float64 and against PEFT, their gradients against autograd, and what they refuse."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from common.config import LoraSection
from common.errors import ConfigError, IsthmusError, VectorError
from common.language.adapters import Adapter
from common.language.mixing import (
    A_SUFFIX,
    B_SUFFIX,
    Mixture,
    cut,
    layers,
    mix,
    rescaled,
    section_of_rank,
)

SHAPES = {"m.layers.0.q": (6, 5), "m.layers.0.v": (4, 5), "m.layers.1.q": (6, 5)}
LABELS = ("g", "s", "t")
Weights = list[float]


def random_adapter(seed: int, rank: int = 2) -> Adapter:
    """A and B of standard normal values for `SHAPES`."""
    generator = torch.Generator().manual_seed(seed)
    adapter: Adapter = {}
    for path, (rows, columns) in SHAPES.items():
        adapter[path + A_SUFFIX] = torch.randn(rank, columns, generator=generator)
        adapter[path + B_SUFFIX] = torch.randn(rows, rank, generator=generator)
    return adapter


def dense(adapter: Adapter) -> dict[str, torch.Tensor]:
    """`B A` of each layer in float64."""
    return {
        path: adapter[path + B_SUFFIX].double() @ adapter[path + A_SUFFIX].double()
        for path in layers(adapter)
    }


def assert_close(got: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert got.keys() == expected.keys()
    for path, matrix in expected.items():
        torch.testing.assert_close(got[path].double(), matrix.double(), rtol=1e-5, atol=1e-5)


weights_of_three = st.lists(st.floats(-2, 2, width=32), min_size=3, max_size=3)


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 2**31), weights=weights_of_three)
def test_the_rules_are_what_they_say_in_float64(seed: int, weights: Weights) -> None:
    adapters = {label: random_adapter(seed + n) for n, label in enumerate(LABELS)}
    by_factors = mix(adapters, weights)
    for name in by_factors:
        terms = [w * adapter[name].double() for w, adapter in zip(weights, adapters.values(), strict=True)]
        torch.testing.assert_close(by_factors[name].double(), sum(terms), rtol=1e-5, atol=1e-5)
    updates = [dense(adapter) for adapter in adapters.values()]
    exact = {
        path: sum(w * update[path] for w, update in zip(weights, updates, strict=True)) for path in SHAPES
    }
    by_product = mix(adapters, weights, "product")
    assert by_product["m.layers.0.q" + A_SUFFIX].shape == (6, 5)
    assert_close(dense(by_product), exact)


@settings(max_examples=15, deadline=None)
@given(seed=st.integers(0, 2**31), rank=st.integers(1, 7))
def test_a_cut_is_the_best_update_of_its_rank(seed: int, rank: int) -> None:
    adapters = {label: random_adapter(seed + n) for n, label in enumerate(LABELS)}
    whole = mix(adapters, [0.5, 0.3, 0.2], "product")
    short, residuals = cut(whole, rank)
    for path, matrix in dense(whole).items():
        U, sigma, Vt = torch.linalg.svd(matrix, full_matrices=False)
        best = (U[:, :rank] * sigma[:rank]) @ Vt[:rank]
        torch.testing.assert_close(dense(short)[path], best, rtol=1e-4, atol=1e-4)
        assert short[path + A_SUFFIX].shape[0] == short[path + B_SUFFIX].shape[1] == rank
        assert residuals[path] == pytest.approx(float(sigma[rank:].norm() / sigma.norm()), abs=1e-6)


@pytest.mark.parametrize("rule", ["factors", "product"])
@settings(max_examples=15, deadline=None)
@given(share=st.floats(0, 1, width=32))
def test_mixing_an_adapter_with_itself_gives_it_back(rule: Any, share: float) -> None:
    same = random_adapter(1)
    mixed = mix({"g": same, "s": dict(same)}, [share, 1 - share], rule)
    assert_close(dense(mixed), dense(same))


@pytest.mark.parametrize("rule", ["factors", "product"])
@settings(max_examples=15, deadline=None)
@given(weights=weights_of_three)
def test_the_order_of_the_adapters_does_not_matter(rule: Any, weights: Weights) -> None:
    adapters = {label: random_adapter(n) for n, label in enumerate(LABELS)}
    backwards = dict(reversed(adapters.items()))
    assert_close(dense(mix(adapters, weights, rule)), dense(mix(backwards, weights[::-1], rule)))


def test_the_scaling_stays_right_when_the_rank_changes() -> None:
    lora = LoraSection(rank=2, alpha=6.0)
    assert section_of_rank(lora, 4).scaling == lora.scaling == 3.0
    other = LoraSection(rank=2, alpha=1.0)
    adapter = random_adapter(3)
    moved = rescaled(adapter, lora, other)
    expected = {path: lora.scaling * update for path, update in dense(adapter).items()}
    assert_close({path: other.scaling * update for path, update in dense(moved).items()}, expected)


@pytest.mark.parametrize("granularity", ["domain", "layer"])
@pytest.mark.parametrize("rule", ["factors", "product"])
def test_the_gradient_of_the_weights_is_autograds(rule: Any, granularity: Any) -> None:
    mixture = Mixture({label: random_adapter(n) for n, label in enumerate(LABELS)}, rule, granularity)
    generator = torch.Generator().manual_seed(9)
    weights_GD = torch.randn(len(mixture.groups), 3, generator=generator)
    targets = {path: torch.randn(shape, generator=generator) for path, shape in SHAPES.items()}

    def loss(mixed: Adapter) -> torch.Tensor:
        terms = [(mixed[p + B_SUFFIX] @ mixed[p + A_SUFFIX] - t).square().sum() for p, t in targets.items()]
        return torch.stack(terms).sum()

    leaves = {name: tensor.requires_grad_() for name, tensor in mixture.at(weights_GD).items()}
    grads = torch.autograd.grad(loss(leaves), list(leaves.values()), allow_unused=True)
    got_GD = mixture.gradient(dict(zip(leaves, grads, strict=True)))

    weights_GD = weights_GD.double().requires_grad_()
    total = torch.zeros((), dtype=torch.float64)
    for path, target in targets.items():
        w_D = weights_GD[mixture.groups.index(f"layer-{path[9]}") if granularity == "layer" else 0]
        A_DKC, B_DRK = (
            torch.stack([random_adapter(n)[path + suffix].double() for n in range(len(LABELS))])
            for suffix in (A_SUFFIX, B_SUFFIX)
        )
        if rule == "factors":
            update = torch.einsum("d,drk->rk", w_D, B_DRK) @ torch.einsum("d,dkc->kc", w_D, A_DKC)
        else:
            update = torch.einsum("d,drk,dkc->rc", w_D, B_DRK, A_DKC)
        total = total + (update - target).square().sum()
    (expected_GD,) = torch.autograd.grad(total, weights_GD)
    torch.testing.assert_close(got_GD, expected_GD, rtol=1e-4, atol=1e-3)


def test_peft_agrees_where_its_conventions_do(tmp_path: Path) -> None:
    """PEFT puts `sqrt(w s)` on A and on B, so its `linear` at `w^2` is ours at `w`; the rest agree."""
    peft = pytest.importorskip("peft")

    class Net(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.q = torch.nn.Linear(5, 6, bias=False)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.q(x)

    config = peft.LoraConfig(r=2, lora_alpha=2, target_modules=["q"])
    model = peft.get_peft_model(Net(), config, adapter_name="g")
    model.add_adapter("s", config)
    layer = model.base_model.model.q
    parts = {}
    for seed, label in enumerate(("g", "s")):
        random = random_adapter(seed)
        a, b = random["m.layers.0.q" + A_SUFFIX], random["m.layers.0.q" + B_SUFFIX]
        layer.lora_A[label].weight.data.copy_(a)
        layer.lora_B[label].weight.data.copy_(b)
        parts[label] = {"q" + A_SUFFIX: a, "q" + B_SUFFIX: b}
    weights = [0.7, 0.3]

    def theirs(kind: str, given: Weights, **options: Any) -> torch.Tensor:
        name = f"merge{len(layer.lora_A)}"
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            model.add_weighted_adapter(["g", "s"], given, name, combination_type=kind, **options)
        return layer.scaling[name] * layer.lora_B[name].weight.data @ layer.lora_A[name].weight.data

    def ours(*arguments: Any) -> torch.Tensor:
        return dense(mix(parts, weights, *arguments))["q"].float()

    torch.testing.assert_close(theirs("linear", [w * w for w in weights]), ours("factors"))
    torch.testing.assert_close(theirs("cat", weights), ours("product"))
    torch.testing.assert_close(theirs("svd", weights, svd_rank=2), ours("product", 2), rtol=1e-4, atol=1e-5)
    assert not torch.allclose(theirs("linear", weights), ours("factors"), atol=0.05)


def broken(what: str) -> Adapter:
    adapter, name = random_adapter(1), "m.layers.0.v" + B_SUFFIX
    if what == "nan":
        adapter[name][1, 1] = float("nan")
    elif what == "rank":
        adapter = random_adapter(1, rank=3)
    elif what == "missing":
        del adapter[name]
    elif what == "extra":
        adapter["m.layers.9.v" + B_SUFFIX] = torch.ones(1, 1)
    elif what == "base":
        adapter[name] = torch.ones(9, 2)
    return adapter


@pytest.mark.parametrize(
    ("what", "said"),
    [
        ("nan", r"adapter s.*m\.layers\.0\.v\.lora_B\.weight.*NaN"),
        ("rank", r"adapter s.*rank 3, expected 2"),
        ("missing", r"adapter s.*m\.layers\.0\.v\.lora_B\.weight' is missing"),
        ("extra", r"adapter s.*extra tensor 'm\.layers\.9"),
        ("base", r"adapter s.*m\.layers\.0\.v\.lora_B\.weight' has shape \[9, 2\]"),
    ],
)
def test_adapters_that_do_not_go_together_are_named(what: str, said: str) -> None:
    with pytest.raises(VectorError, match=said):
        mix({"g": random_adapter(0), "s": broken(what)}, [0.5, 0.5])


def test_the_first_adapter_is_checked_too() -> None:
    for what in ("nan", "missing", "extra"):
        with pytest.raises(VectorError, match="adapter g"):
            mix({"g": broken(what), "s": random_adapter(0)}, [0.5, 0.5])


def test_ranks_may_differ_in_a_product() -> None:
    mixed = mix({"g": random_adapter(0), "s": random_adapter(1, rank=3)}, [0.5, 0.5], "product")
    assert mixed["m.layers.0.q" + A_SUFFIX].shape[0] == 5


@pytest.mark.parametrize("weights", [[0.5], [0.5, float("nan")], [0.5, 0.2, 0.3]])
def test_weights_that_cannot_be_are_refused(weights: Weights) -> None:
    with pytest.raises(ConfigError, match="weights of shape"):
        mix({"g": random_adapter(0), "s": random_adapter(1)}, weights)


def test_no_adapters_and_no_such_rule() -> None:
    with pytest.raises(IsthmusError, match="no adapters"):
        mix({}, [])
    with pytest.raises(ConfigError, match="product"):
        mix({"g": random_adapter(0)}, [1.0], "produkt")  # type: ignore[arg-type]
