"""What must hold of the methods that drop entries, whatever the numbers are."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from server.merging import InMemory, merge, methods, process_vectors, processes

SPARSE = ["breadcrumbs", "dare", "dare-ties", "della", "emr", "localize-and-stitch", "pcb"]
KEEP_MORE: dict[str, dict[str, Any]] = {  # so that little is dropped from small tensors
    "breadcrumbs": {"beta": 0.3, "gamma": 0.1},
    "dare": {"p": 0.4},
    "dare-ties": {"p": 0.4},
    "della": {"p": 0.4, "epsilon": 0.3},
    "emr": {},
    "localize-and-stitch": {"density": 0.5},
    "pcb": {"density": 0.5},
}
SHAPES: dict[str, tuple[int, ...]] = {"bias": (4,), "matrix": (5, 3)}
Named = dict[str, dict[str, np.ndarray]]

counts, seeds, names = st.integers(1, 6), st.integers(0, 10_000), st.sampled_from(SPARSE)


def draw(count: int, seed: int) -> Named:
    """Few different values, so that equal magnitudes and sums of zero occur; scaled by a power of two."""
    generator = np.random.default_rng(seed)
    return {
        f"domain {label}": {
            name: (generator.integers(-3, 4, size=shape) / 64).astype(np.float32)
            for name, shape in SHAPES.items()
        }
        for label in generator.permutation(count)
    }


def times(taus: Named, factor: float) -> Named:
    return {
        label: {name: values * np.float32(factor) for name, values in tau.items()}
        for label, tau in taus.items()
    }


def merged(method: str, taus: Named, **options: Any) -> np.ndarray:
    found = merge(method, InMemory(taus), {**KEEP_MORE[method], **options})
    return np.concatenate([found[name].ravel() for name in SHAPES])


def flat(tau: dict[str, np.ndarray]) -> np.ndarray:
    return np.concatenate([tau[name].ravel() for name in SHAPES])


@settings(max_examples=60, deadline=None)
@given(counts, seeds, names)
def test_order_does_not_matter(count: int, seed: int, method: str) -> None:
    taus = draw(count, seed)
    again = {label: taus[label] for label in np.random.default_rng(seed).permutation(list(taus))}
    np.testing.assert_allclose(merged(method, again), merged(method, taus), rtol=1e-5, atol=1e-8)


@settings(max_examples=60, deadline=None)
@given(counts, seeds, names, st.sampled_from([-1.0, 0.125, -4.0, 2.0**20]))
def test_scaling_by_a_power_of_two_is_exact(count: int, seed: int, method: str, factor: float) -> None:
    taus = draw(count, seed)
    np.testing.assert_array_equal(
        merged(method, times(taus, factor)), np.float32(factor) * merged(method, taus)
    )
    if method == "emr":
        for label in taus:
            one, other = (merged("emr", given, domain=label) for given in (taus, times(taus, factor)))
            np.testing.assert_array_equal(other, np.float32(factor) * one)


@settings(max_examples=30, deadline=None)
@given(counts, seeds)
def test_identical_vectors(count: int, seed: int) -> None:
    (tau,) = draw(1, seed).values()
    same, one = {f"copy {index}": tau for index in range(count)}, {"one": tau}
    for method in ("emr", "localize-and-stitch", "pcb"):
        np.testing.assert_allclose(merged(method, same), merged(method, one), rtol=1e-6)
    np.testing.assert_allclose(merged("breadcrumbs", same), count * merged("breadcrumbs", one), rtol=1e-6)
    for method, nothing_dropped in (("dare-ties", {"p": 0.0}), ("della", {"p": 0.0, "epsilon": 0.0})):
        np.testing.assert_allclose(merged(method, same, **nothing_dropped), flat(tau), rtol=1e-6)
    found = merged("dare", same, **{"p": 0.0, "lambda": 0.5})
    np.testing.assert_allclose(found, 0.5 * count * flat(tau), rtol=1e-6)


@settings(max_examples=30, deadline=None)
@given(seeds, names)
def test_one_vector_keeps_or_loses_each_entry(seed: int, method: str) -> None:
    taus = draw(1, seed)
    (tau,) = taus.values()
    scale = {"lambda": 1.0} if "lambda" in methods()[method].resolve({}) else {}
    found = merged(method, taus, **scale)
    kept = found != 0
    if method in ("dare", "dare-ties"):
        np.testing.assert_allclose(found[kept], flat(tau)[kept] / 0.6, rtol=1e-6)
    elif method == "della":
        assert (np.abs(found[kept]) >= np.abs(flat(tau)[kept]) / 0.75 * (1 - 1e-6)).all()
        assert (np.abs(found[kept]) <= np.abs(flat(tau)[kept]) / 0.45 * (1 + 1e-6)).all()
    else:
        np.testing.assert_allclose(found[kept], flat(tau)[kept], rtol=1e-6)


@pytest.mark.parametrize("method", SPARSE)
def test_zeros(method: str) -> None:
    taus = draw(3, 1)
    zero = {
        label: {name: np.zeros_like(values) for name, values in tau.items()} for label, tau in taus.items()
    }
    assert not merged(method, zero).any()
    if "lambda" in methods()[method].resolve({}):
        assert not merged(method, taus, **{"lambda": 0.0}).any()
    else:
        assert method in ("emr", "localize-and-stitch")


@settings(max_examples=30, deadline=None)
@given(counts, seeds, st.sampled_from([name for name in SPARSE if name != "emr"]))
def test_processed_vectors_sum_to_the_merge(count: int, seed: int, method: str) -> None:
    assert method in processes()
    taus = draw(count, seed)
    before = {label: flat(tau).copy() for label, tau in taus.items()}
    parts = process_vectors(method, InMemory(taus), KEEP_MORE[method])
    total = np.sum([flat(part) for part in parts], axis=0, dtype=np.float64)
    np.testing.assert_allclose(total, merged(method, taus), rtol=1e-5, atol=1e-8)
    for label, tau in taus.items():
        np.testing.assert_array_equal(flat(tau), before[label])


@pytest.mark.parametrize("method", ["dare", "dare-ties", "della"])
def test_draws_follow_seed_and_label_alone(method: str) -> None:
    taus = {label: {"w": np.ones((6, 50), np.float32)} for label in ("a", "b", "c")}

    def kept(labels: list[str], seed: int) -> dict[str, np.ndarray]:
        parts = process_vectors(method, InMemory({k: taus[k] for k in labels}), {"p": 0.5, "seed": seed})
        return {label: part["w"] != 0 for label, part in zip(labels, parts, strict=True)}

    first, second = kept(["a", "b", "c"], 1), kept(["c", "a"], 1)
    for label in second:
        np.testing.assert_array_equal(first[label], second[label])
    assert (first["a"] != first["b"]).any()
    assert (first["a"] != kept(["a"], 2)["a"]).any()
