"""The pool of adapters against the rule as it is written, in float64."""

import math

import numpy as np
import pytest
import torch

from common.errors import ConfigError, VectorError
from common.language.pool import Candidate, Pool

SHAPES = {"a.lora_A.weight": (4, 33), "a.lora_B.weight": (9, 4), "b.lora_A.weight": (4, 5)}


def adapters(count: int, seed: int = 0) -> dict[str, dict[str, torch.Tensor]]:
    generator = torch.Generator().manual_seed(seed)
    return {
        f"d{n}": {name: torch.randn(shape, generator=generator) for name, shape in SHAPES.items()}
        for n in range(count)
    }


def sparse(A: torch.Tensor, ratio: float) -> np.ndarray:
    """`S_ratio(A)` by sorting, for entries that all differ in magnitude."""
    flat = A.double().numpy().ravel()
    out = np.zeros_like(flat)
    kept = np.argsort(-np.abs(flat), kind="stable")[: round(ratio * flat.size)]
    out[kept] = flat[kept]
    return out.reshape(A.shape)


def naive(pool: dict[str, dict[str, torch.Tensor]], candidate: Candidate) -> dict[str, np.ndarray]:
    merged = {name: np.zeros(shape) for name, shape in SHAPES.items()}
    for label, ratio, scale in zip(sorted(pool), candidate.ratios, candidate.scales, strict=True):
        for name, tensor in pool[label].items():
            merged[name] += scale * (sparse(tensor, ratio) if "lora_A" in name else tensor.double().numpy())
    return merged


@pytest.mark.parametrize("count", [1, 2, 7])
def test_candidates_are_the_rule_in_float64(count):
    pool, random = adapters(count), np.random.default_rng(1)
    candidates = [Candidate.of(random.random(count), random.uniform(-1.5, 1.5, count)) for _ in range(4)]
    candidates += [Candidate.of(candidates[0].ratios, random.uniform(-1.5, 1.5, count)) for _ in range(3)]
    candidates += [Candidate.of([0.0] * count, [1.0] * count), Candidate.of([1.0] * count, [1.0] * count)]
    mixed = Pool(pool).mix(candidates)
    for candidate, found in zip(candidates, mixed, strict=True):
        expected = naive(pool, candidate)
        for name in SHAPES:
            np.testing.assert_allclose(found[name].numpy(), expected[name], rtol=1e-5, atol=1e-6)
            assert found[name].dtype == torch.float32


@pytest.mark.parametrize("ratio", [0.0, 0.01, 0.5, 0.99, 1.0])
def test_exactly_the_largest_entries_stay(ratio):
    pool = adapters(1)
    (mixed,) = Pool(pool).mix([Candidate.of([ratio], [1.0])])
    for name in ("a.lora_A.weight", "b.lora_A.weight"):
        kept = mixed[name] != 0
        given = pool["d0"][name]
        assert int(kept.sum()) == round(ratio * given.numel())
        if 0 < int(kept.sum()) < given.numel():
            assert given[kept].abs().min() > given[~kept].abs().max()


def test_equal_magnitudes_at_the_border_all_stay():
    A = torch.tensor([[3.0, -1.0, 1.0, 0.5]])
    pool = Pool({"d": {"a.lora_A.weight": A, "a.lora_B.weight": torch.ones(2, 1)}})
    (mixed,) = pool.mix([Candidate.of([0.5], [1.0])])
    assert mixed["a.lora_A.weight"].tolist() == [[3.0, -1.0, 1.0, 0.0]]


def test_zeros_are_merged_too():
    A = torch.tensor([[0.0, -2.0, 0.0, 0.0]])
    pool = Pool({"d": {"a.lora_A.weight": A, "a.lora_B.weight": torch.zeros(2, 1)}})
    for ratio in (0.25, 0.75, 1.0):
        assert pool.mix([Candidate.of([ratio], [0.5])])[0]["a.lora_A.weight"].tolist() == [[0, -1, 0, 0]]


def test_the_order_in_which_adapters_come_means_nothing():
    pool = adapters(5)
    turned = Pool(dict(reversed(pool.items())))
    assert turned.labels == Pool(pool).labels
    candidate = Candidate.of([0.3, 0.5, 0.9, 1, 0], [1, -1, 0.5, 0.2, 0.1])
    one, other = Pool(pool).mix([candidate])[0], turned.mix([candidate])[0]
    assert all(torch.equal(one[name], other[name]) for name in SHAPES)


def test_an_adapter_comes_back_as_it_was():
    pool = adapters(3)
    for label, adapter in pool.items():
        found = Pool(pool).adapter(label)
        assert all(torch.equal(found[name], adapter[name]) for name in SHAPES)


def test_what_does_not_fit_is_refused_by_name():
    with pytest.raises(ConfigError, match="no adapters"):
        Pool({})
    pool = adapters(2)
    del pool["d1"]["b.lora_A.weight"]
    with pytest.raises(VectorError, match="d1 lacks tensor 'b"):
        Pool(pool)
    pool = adapters(2)
    pool["d1"]["extra"] = torch.ones(1)
    with pytest.raises(VectorError, match="d1 has an extra tensor 'extra'"):
        Pool(pool)
    pool = adapters(2)
    pool["d1"]["a.lora_B.weight"] = torch.ones(9, 5)
    with pytest.raises(VectorError, match=r"d1: tensor 'a.lora_B.weight' has shape \[9, 5\]"):
        Pool(pool)
    pool = adapters(2)
    pool["d0"]["a.lora_B.weight"][2, 1] = float("nan")
    with pytest.raises(VectorError, match=r"d0: tensor 'a.lora_B.weight'.*not finite"):
        Pool(pool)


@pytest.mark.parametrize("ratios, scales", [([1.1], [0]), ([-0.1], [0]), ([1], [math.nan]), ([1, 1], [1])])
def test_impossible_candidates_are_refused(ratios, scales):
    with pytest.raises(ConfigError):
        Candidate.of(ratios, scales)


def test_a_candidate_for_other_adapters_is_refused():
    with pytest.raises(ConfigError, match="a candidate for 2 adapters"):
        Pool(adapters(3)).mix([Candidate.of([1, 1], [1, 1])])
