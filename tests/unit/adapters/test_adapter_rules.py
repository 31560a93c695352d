"""The rules against naive dense float64 versions, and what must hold whatever the numbers are."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from common.errors import VectorError
from common.language.peft_folder import read_adapter
from common.low_rank import LowRank, distance, stack, truncate
from server.adapters import adapter_methods, merge_adapters
from server.adapters._knots import align

Dense = dict[str, np.ndarray]
Make = Callable[..., Path]
Build = Callable[[Path, int, int], dict[str, Path]]
SMALL = {"encoder.layer.0.query": (6, 5), "encoder.layer.0.value": (4, 5), "encoder.layer.1.query": (6, 5)}


def dense(folder: Path) -> Dense:
    """Every layer's update, scaling included, in float64."""
    adapter = read_adapter("x", folder)
    return {
        path: module.scaling * LowRank.of(*adapter.factors(path)).dense()
        for path, module in adapter.modules.items()
    }


def merged(adapters: dict[str, Path], out: Path, **arguments: Any) -> Dense:
    merge_adapters(adapters, out=out, **arguments)
    return dense(out)


def assert_close(got: Dense, expected: Dense, rtol: float = 1e-5) -> None:
    assert got.keys() == expected.keys()
    for path, values in expected.items():
        np.testing.assert_allclose(got[path], values, rtol=0, atol=rtol * max(1e-30, np.abs(values).max()))


def weighted(parts: list[Dense], weights: list[float]) -> Dense:
    return {path: sum(w * part[path] for w, part in zip(weights, parts, strict=True)) for path in parts[0]}


def naive_truncate(matrix: np.ndarray, rank: int) -> np.ndarray:
    U, sigma, Vt = np.linalg.svd(matrix, full_matrices=False)
    return U[:, :rank] @ np.diag(sigma[:rank]) @ Vt[:rank]


def naive_ties(vectors: list[np.ndarray], density: float) -> np.ndarray:
    keep = max(1, round(density * len(vectors[0])))
    trimmed = np.array([np.where(np.abs(v) >= np.sort(np.abs(v))[-keep], v, 0.0) for v in vectors])
    agreeing = np.where(np.sign(trimmed) == np.sign(trimmed.sum(0)), trimmed, 0.0)
    return agreeing.sum(0) / np.maximum(1, (agreeing != 0).sum(0))


def naive_knots(
    parts: list[Dense], rule: Callable[[list[np.ndarray]], np.ndarray], sigma_before: bool
) -> Dense:
    """KnOTS on dense matrices: SVD of the concatenation, the parts of all layers in one vector."""
    bases, vectors = {}, [[] for _ in parts]
    for path in parts[0]:
        U, sigma, Vt = np.linalg.svd(
            np.concatenate([part[path] for part in parts], axis=1), full_matrices=False
        )
        keep = int((sigma > 1e-6 * sigma[0]).sum())
        left = U[:, :keep] if sigma_before else U[:, :keep] * sigma[:keep]
        right = Vt[:keep] * sigma[:keep, None] if sigma_before else Vt[:keep]
        bases[path] = left
        for vector, block in zip(vectors, np.split(right, len(parts), axis=1), strict=True):
            vector.append(block)
    flat = rule([np.concatenate([block.ravel() for block in vector]) for vector in vectors])
    found, start = {}, 0
    for path, block in zip(parts[0], vectors[0], strict=True):
        found[path] = bases[path] @ flat[start : start + block.size].reshape(block.shape)
        start += block.size
    return found


def test_product_is_the_weighted_sum_of_the_updates(make_adapter: Make, tmp_path: Path) -> None:
    """Ranks and scalings differ between adapters, and between layers of one."""
    folders = {
        "a": make_adapter("a", seed=1, rank=2, lora_alpha=4),
        "b": make_adapter("b", seed=2, rank=3, lora_alpha=5, use_rslora=True),
        "c": make_adapter("c", seed=3, rank=1, lora_alpha=2, alpha_pattern={"layer.1.query": 16}),
    }
    weights = {"a": 0.7, "b": -0.4, "c": 1.3}
    expected = weighted([dense(folder) for folder in folders.values()], list(weights.values()))
    record = merge_adapters(folders, method="product", weights=weights, out=tmp_path / "out")
    assert_close(dense(tmp_path / "out"), expected)
    assert {facts["rank"] for facts in record["modules"].values()} == {6}
    assert {facts["residual"] for facts in record["modules"].values()} == {0.0}
    default = merged(folders, tmp_path / "mean", method="product")
    assert_close(default, weighted([dense(folder) for folder in folders.values()], [1 / 3] * 3))


@pytest.mark.parametrize("rank", [1, 2, 3, 4, 5, 100])
def test_truncation_is_the_dense_svd(make_adapter: Make, tmp_path: Path, rank: int) -> None:
    folders = {name: make_adapter(name, seed=seed, rank=2) for seed, name in enumerate("abc")}
    exact = weighted([dense(folder) for folder in folders.values()], [1 / 3] * 3)
    best = {path: naive_truncate(update, rank) for path, update in exact.items()}
    record = merge_adapters(folders, method="product", options={"rank": rank}, out=tmp_path / "out")
    assert_close(dense(tmp_path / "out"), best)
    for path, facts in record["modules"].items():
        error = np.linalg.norm(exact[path] - best[path]) / np.linalg.norm(exact[path])
        assert facts["residual"] == pytest.approx(error, abs=1e-7)
        assert facts["rank"] == min(rank, *SMALL[path])


def test_layers_of_different_rank_are_read_back(make_adapter: Make, tmp_path: Path) -> None:
    """Ranks that differ between layers go into patterns, which reading (and PEFT) must understand."""
    folders = {name: make_adapter(name, seed=seed, rank=3) for seed, name in enumerate("ab")}
    merge_adapters(folders, method="product", options={"rank": 5}, out=tmp_path / "out")
    ranks = {path: module.rank for path, module in read_adapter("out", tmp_path / "out").modules.items()}
    assert ranks == {path: min(shape) for path, shape in SMALL.items()}
    again = merged({"one": tmp_path / "out"}, tmp_path / "again", method="product")
    assert_close(again, dense(tmp_path / "out"))


@pytest.mark.parametrize("shape", [(40, 30), (3, 30), (30, 3)])
def test_low_rank_algebra_against_dense(shape: tuple[int, int]) -> None:
    """Also where the ranks' sum is above the number of rows or columns."""
    generator = np.random.default_rng(0)
    parts = [
        LowRank(generator.standard_normal((shape[0], k)), generator.standard_normal((k, shape[1])))
        for k in (2, 4, 1)
    ]
    weights = [1.0, -0.5, 2.0]
    total = stack(parts, weights)
    expected = sum(w * part.dense() for w, part in zip(weights, parts, strict=True))
    np.testing.assert_allclose(total.dense(), expected, atol=1e-12)
    assert total.norm() == pytest.approx(np.linalg.norm(expected))
    best, residual = truncate(total, 2)
    np.testing.assert_allclose(best.dense(), naive_truncate(expected, 2), atol=1e-10)
    assert residual == pytest.approx(np.linalg.norm(best.dense() - expected) / np.linalg.norm(expected))
    assert distance(best, total) == pytest.approx(residual)
    aligned = align(parts)
    for n, part in enumerate(parts):
        rebuilt = aligned.restore(aligned.part(n, scaled=True), scaled=True).dense()
        np.testing.assert_allclose(rebuilt, part.dense(), atol=1e-5)


def test_factors_is_the_papers_rule_and_says_how_far_it_is_off(make_adapter: Make, tmp_path: Path) -> None:
    folders = {name: make_adapter(name, seed=seed, rank=2) for seed, name in enumerate("ab")}
    pairs = [read_adapter(name, folder) for name, folder in folders.items()]
    record = merge_adapters(folders, method="factors", weights=[0.3, 0.7], out=tmp_path / "out")
    got, exact = dense(tmp_path / "out"), weighted([dense(f) for f in folders.values()], [0.3, 0.7])
    for path in SMALL:
        B, A = ([pair.factors(path)[i].astype(float) for pair in pairs] for i in (0, 1))
        rule = 2.0 * (0.3 * B[0] + 0.7 * B[1]) @ (0.3 * A[0] + 0.7 * A[1])
        np.testing.assert_allclose(got[path], rule, atol=1e-7)
        off = np.linalg.norm(rule - exact[path]) / np.linalg.norm(exact[path])
        assert record["modules"][path]["distance_from_product"] == pytest.approx(off, rel=1e-5)
        assert off > 0.3


def test_factors_with_different_scalings_share_them_between_a_and_b(
    make_adapter: Make, tmp_path: Path
) -> None:
    """One adapter alone comes back as its own update, whatever its scaling."""
    folder = make_adapter("a", rank=2, lora_alpha=9)
    assert_close(merged({"a": folder}, tmp_path / "out", method="factors"), dense(folder))


@pytest.mark.parametrize("sigma", ["before", "after"])
@pytest.mark.parametrize("density", [0.3, 1.0])
def test_knots_against_dense_float64(make_adapter: Make, tmp_path: Path, sigma: str, density: float) -> None:
    folders = {name: make_adapter(name, seed=seed, rank=rank) for seed, (name, rank) in enumerate(
        {"a": 1, "b": 2, "c": 1}.items()
    )}  # fmt: skip
    options = {"method": "ties", "density": density, "sigma": sigma}
    got = merged(folders, tmp_path / "out", method="knots", options=options)
    parts = [dense(folder) for folder in folders.values()]
    expected = naive_knots(parts, lambda vectors: naive_ties(vectors, density), sigma == "before")
    assert_close(got, expected, rtol=1e-4)
    plain = {path: np.mean([part[path] for part in parts], axis=0) for path in parts[0]}
    assert any(not np.allclose(got[path], plain[path], rtol=1e-2) for path in plain)


@pytest.mark.parametrize("sigma", ["before", "after"])
def test_knots_with_task_arithmetic_is_the_product(make_adapter: Make, tmp_path: Path, sigma: str) -> None:
    """A linear rule commutes with the rotation; the rank is that of the updates together."""
    folders = {name: make_adapter(name, seed=seed, rank=1) for seed, name in enumerate("abc")}
    options = {"method": "task-arithmetic", "lambda": 0.5, "sigma": sigma}
    record = merge_adapters(
        folders, method="knots", options=options, weights=[1, -2, 3], out=tmp_path / "out"
    )
    assert_close(dense(tmp_path / "out"), weighted([dense(f) for f in folders.values()], [0.5, -1.0, 1.5]))
    assert {facts["rank"] for facts in record["modules"].values()} == {3}
    options["rank"] = 1
    record = merge_adapters(
        folders, method="knots", options=options, weights=[1, -2, 3], out=tmp_path / "one"
    )
    exact = dense(tmp_path / "out")
    assert_close(dense(tmp_path / "one"), {path: naive_truncate(exact[path], 1) for path in exact}, rtol=1e-4)
    assert min(facts["residual"] for facts in record["modules"].values()) > 0.01


def test_knots_leaves_out_directions_that_are_rounding(make_adapter: Make, tmp_path: Path) -> None:
    """The same adapter twice spans its own rank, not twice that."""
    folder = make_adapter("a", rank=2)
    record = merge_adapters(
        {"a": folder, "b": folder}, method="knots", options={"density": 1.0}, out=tmp_path / "o"
    )
    assert {facts["rank"] for facts in record["modules"].values()} == {2}
    assert_close(dense(tmp_path / "o"), dense(folder))


def test_elementwise_is_the_method_on_the_factors(make_adapter: Make, tmp_path: Path) -> None:
    """TIES over all entries of all A and B at once, each adapter's scaling shared between its factors."""
    folders = {name: make_adapter(name, seed=seed, rank=2) for seed, name in enumerate("abc")}
    adapters = [read_adapter(name, folder) for name, folder in folders.items()]
    vectors = [
        np.sqrt(2.0)
        * np.concatenate([x.ravel().astype(float) for path in SMALL for x in adapter.factors(path)])
        for adapter in adapters
    ]
    flat, expected, start = naive_ties(vectors, 0.4), {}, 0
    for path, (rows, columns) in SMALL.items():
        B, A = flat[start : start + 2 * rows], flat[start + 2 * rows : start + 2 * (rows + columns)]
        expected[path] = B.reshape(rows, 2) @ A.reshape(2, columns)
        start += 2 * (rows + columns)
    got = merged(folders, tmp_path / "out", method="elementwise", options={"method": "ties", "density": 0.4})
    assert_close(got, expected)


RULES: list[dict[str, Any]] = [
    {"method": "product"},
    {"method": "product", "options": {"rank": 2}},
    {"method": "factors"},
    {"method": "factors", "options": {"weighting": "sqrt"}},
    {"method": "elementwise", "options": {"method": "task-arithmetic"}},
    {"method": "knots", "options": {"method": "ties", "density": 0.5}},
    {"method": "knots", "options": {"method": "dare-ties", "p": 0.5, "seed": 3}},
    {"method": "knots", "options": {"method": "weight-averaging", "rank": 2}},
]


def test_every_rule_is_among_those_tested_here() -> None:
    assert {rule["method"] for rule in RULES} == set(adapter_methods())


@pytest.mark.parametrize("rule", [{"method": "product"}, {"method": "knots", "options": {"method": "ties"}}])
def test_a_layer_that_an_adapter_leaves_alone_is_an_update_of_zero(
    make_adapter: Make, tmp_path: Path, rule: dict[str, Any]
) -> None:
    """As if it had an adapter there whose B is zero."""
    read = read_adapter("x", make_adapter("read", seed=1))
    factors = {path: read.factors(path) for path in read.modules}
    zero = factors | {path: (0 * B, A) for path, (B, A) in factors.items() if "value" in path}
    part = {path: pair for path, pair in factors.items() if "value" not in path}
    first = make_adapter("first", seed=2, rank=3)
    full = {"first": first, "second": make_adapter("zero", factors=zero)}
    fewer = {"first": first, "second": make_adapter("part", factors=part, target_modules=["query"])}
    for order in (("first", "second"), ("second", "first")):
        weights = {"first": 0.5, "second": -2.0}
        expected = merged({k: full[k] for k in order}, tmp_path / "full", weights=weights, **rule)
        found = merged({k: fewer[k] for k in order}, tmp_path / "fewer", weights=weights, **rule)
        assert_close(found, expected)
    warnings = json.loads((tmp_path / "fewer" / "merge.json").read_text())["warnings"]
    (warning,) = warnings
    assert warning.startswith("second does not adapt 1 of 3 layers, for example encoder.layer.0.value: ")
    with pytest.raises(
        VectorError, match=r"second .* has no layer 'encoder.layer.0.value'.*\n  next: merge by"
    ):
        merged({k: fewer[k] for k in order}, tmp_path / "out", method="factors")


@settings(max_examples=12, deadline=None)
@given(count=st.integers(1, 4), seed=st.integers(0, 10_000), rule=st.sampled_from(RULES))
def test_the_order_of_adapters_does_not_matter(
    build_adapters: Build, count: int, seed: int, rule: dict[str, Any]
) -> None:
    with tempfile.TemporaryDirectory() as name:
        root = Path(name)
        folders = build_adapters(root, seed, count)
        order = np.random.default_rng(seed).permutation(count)
        turned = {f"d{n}": folders[f"d{n}"] for n in order}
        weights = {f"d{n}": 0.5 + n for n in range(count)}
        one = merged(folders, root / "one", weights=weights, **rule)
        two = merged(turned, root / "two", weights=weights, **rule)
        assert_close(one, two, rtol=1e-4)


@settings(max_examples=12, deadline=None)
@given(
    count=st.integers(1, 3),
    seed=st.integers(0, 10_000),
    scale=st.floats(0.01, 50),
    rule=st.sampled_from(RULES),
)
def test_scaling_all_weights_scales_the_update(
    build_adapters: Build, count: int, seed: int, scale: float, rule: dict[str, Any]
) -> None:
    """By the scale itself where weights act on updates or on the root of them, by its square on A and B."""
    squared = rule["method"] in ("factors", "elementwise") and "weighting" not in rule.get("options", {})
    factor = scale**2 if squared else scale
    with tempfile.TemporaryDirectory() as name:
        root = Path(name)
        folders = build_adapters(root, seed, count)
        plain = merged(folders, root / "one", weights=[1.0] * count, **rule)
        scaled = merged(folders, root / "two", weights=[scale] * count, **rule)
        assert_close(scaled, {path: factor * values for path, values in plain.items()}, rtol=1e-4)


@settings(max_examples=12, deadline=None)
@given(count=st.integers(1, 4), seed=st.integers(0, 10_000), rule=st.sampled_from(RULES))
def test_zero_weights_give_a_zero_update_exactly(
    build_adapters: Build, count: int, seed: int, rule: dict[str, Any]
) -> None:
    with tempfile.TemporaryDirectory() as name:
        root = Path(name)
        zero = merged(build_adapters(root, seed, count), root / "out", weights=[0.0] * count, **rule)
        assert not any(values.any() for values in zero.values())


@settings(max_examples=8, deadline=None)
@given(seed=st.integers(0, 10_000))
def test_an_adapter_of_weight_zero_is_not_in_the_product(build_adapters: Build, seed: int) -> None:
    with tempfile.TemporaryDirectory() as name:
        root = Path(name)
        folders = build_adapters(root, seed, 2)
        got = merged(folders, root / "out", method="product", weights=[1.0, 0.0])
        assert_close(got, dense(folders["d0"]), rtol=1e-6)
