"""Training-free methods: against naive float64 versions, and what must hold whatever the numbers are."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import server.merging
from common.errors import ConfigError, VectorError
from common.vectors import TaskVector
from server.merging import PROCESS_INITIAL, Kernel, Vectors, methods, processes
from server.tensors import merge_tensors, split_tensors

SHAPES = {"encoder.layer.0.weight": (5, 3), "encoder.layer.1.weight": (4,), "norm.weight": (2, 2)}


DATA_FREE = [name for name, method in methods().items() if not method.needs]


def vectors(count: int, seed: int = 0, scale: float = 0.01) -> list[TaskVector]:
    generator = torch.Generator().manual_seed(seed)
    return [
        {name: torch.randn(shape, generator=generator) * scale for name, shape in SHAPES.items()}
        for _ in range(count)
    ]


def named(taus: list[TaskVector]) -> dict[str, TaskVector]:
    return {f"d{index}": tau for index, tau in enumerate(taus)}


def merge(name: str, taus: list[TaskVector], options: dict[str, object] | None = None) -> TaskVector:
    return merge_tensors(name, named(taus), options)


def weight_averaging(taus: list[TaskVector]) -> TaskVector:
    return merge("weight-averaging", taus)


def task_arithmetic(taus: list[TaskVector], *, lambda_: float = 0.3) -> TaskVector:
    return merge("task-arithmetic", taus, {"lambda": lambda_})


def ties(taus: list[TaskVector], *, density: float = 0.2, lambda_: float = 1.0) -> TaskVector:
    return merge("ties", taus, {"density": density, "lambda": lambda_})


def flat(tau: TaskVector) -> np.ndarray:
    return np.concatenate([tau[name].double().numpy().ravel() for name in SHAPES])


def naive_ties(taus: list[TaskVector], density: float, scale: float) -> np.ndarray:
    """Algorithm 1 of the paper, in float64, one position at a time."""
    rows = [flat(tau) for tau in taus]
    trimmed = []
    for row in rows:
        keep = max(1, round(density * len(row)))
        threshold = np.sort(np.abs(row))[-keep]
        trimmed.append([value if abs(value) >= threshold else 0.0 for value in row])
    merged = []
    for position in zip(*trimmed, strict=True):
        sign = np.sign(sum(position))
        agreeing = [value for value in position if value != 0 and np.sign(value) == sign]
        merged.append(scale * sum(agreeing) / len(agreeing) if agreeing else 0.0)
    return np.array(merged)


def assert_close(tau: TaskVector, expected: np.ndarray) -> None:
    np.testing.assert_allclose(flat(tau), expected, rtol=1e-6, atol=1e-9)


def test_weight_averaging_and_task_arithmetic_against_float64() -> None:
    taus = vectors(4)
    assert_close(weight_averaging(taus), np.mean([flat(tau) for tau in taus], axis=0))
    assert_close(task_arithmetic(taus), 0.3 * np.sum([flat(tau) for tau in taus], axis=0))
    assert_close(
        merge("task-arithmetic", taus, {"lambda": -0.5}), -0.5 * np.sum([flat(t) for t in taus], axis=0)
    )


@pytest.mark.parametrize("density", [0.01, 0.2, 0.5, 1.0])
@pytest.mark.parametrize("count", [1, 2, 3, 5])
def test_ties_against_float64(density: float, count: int) -> None:
    taus = vectors(count, seed=count)
    assert_close(merge("ties", taus, {"density": density, "lambda": 0.7}), naive_ties(taus, density, 0.7))


def test_ties_density_counts_over_the_whole_vector() -> None:
    """A tensor whose changes are all small loses everything: the threshold is global, not per tensor."""
    tau = {"small": torch.full((4,), 0.001), "large": torch.tensor([1.0, 2.0, 3.0, 4.0])}
    merged = ties([tau], density=0.5)
    assert not merged["small"].any()
    assert torch.equal(merged["large"], tau["large"])


def test_ties_conflict_of_equal_weight_elects_nothing() -> None:
    merged = ties([{"w": torch.tensor([1.0, 2.0])}, {"w": torch.tensor([-1.0, 2.0])}], density=1.0)
    assert merged["w"].tolist() == [0.0, 2.0]


def test_ties_process_sums_to_the_ties_merge_and_keeps_its_inputs() -> None:
    taus = vectors(3)
    before = [flat(tau).copy() for tau in taus]
    shares = list(split_tensors("ties", named(taus), {"density": 0.4}).values())
    assert_close(task_arithmetic(shares, lambda_=PROCESS_INITIAL), flat(ties(taus, density=0.4)))
    assert "ties" in processes()
    for tau, old in zip(taus, before, strict=True):
        assert np.array_equal(flat(tau), old)


def test_bf16_vectors_merge_in_fp32() -> None:
    taus = vectors(3)
    short = [{name: tensor.bfloat16() for name, tensor in tau.items()} for tau in taus]
    merged = weight_averaging(short)
    assert all(tensor.dtype == torch.float32 for tensor in merged.values())
    assert_close(merged, np.mean([flat(tau) for tau in short], axis=0))


@pytest.mark.parametrize("method", DATA_FREE)
@settings(max_examples=10, deadline=None)
@given(st.integers(1, 6), st.integers(0, 10_000))
def test_order_of_domains_does_not_matter(method: str, count: int, seed: int) -> None:
    """Up to float32 rounding of the largest entry: sums are taken in another order, and may cancel."""
    taus = named(vectors(count, seed))
    again = {label: taus[label] for label in np.random.default_rng(seed).permutation(list(taus))}
    expected = flat(merge_tensors(method, taus))
    rounding = 1e-6 * np.abs(expected).max()
    np.testing.assert_allclose(flat(merge_tensors(method, again)), expected, rtol=1e-6, atol=rounding)


@settings(max_examples=25, deadline=None)
@given(st.integers(1, 6), st.integers(0, 10_000))
def test_identical_vectors(count: int, seed: int) -> None:
    (tau,) = vectors(1, seed)
    same = [tau] * count
    assert_close(weight_averaging(same), flat(tau))
    assert_close(task_arithmetic(same, lambda_=0.3), 0.3 * count * flat(tau))
    assert_close(ties(same, density=1.0), flat(tau))


@settings(max_examples=20, deadline=None)
@given(st.integers(1, 4), st.integers(0, 10_000), st.sampled_from([2.0**-6, 0.5, 4.0, 64.0]))
def test_scaling_all_vectors_scales_the_merge(count: int, seed: int, scale: float) -> None:
    """By powers of two, so that float32 does not round: matrices may be ill-conditioned."""
    taus = vectors(count, seed)
    scaled = [{name: tensor * scale for name, tensor in tau.items()} for tau in taus]
    for method in DATA_FREE:
        np.testing.assert_allclose(
            flat(merge(method, scaled)), scale * flat(merge(method, taus)), rtol=1e-4, atol=1e-7 * scale
        )


def test_zero_vectors_and_zero_coefficients_change_nothing() -> None:
    zero = [{name: torch.zeros(shape) for name, shape in SHAPES.items()}] * 3
    for method in DATA_FREE:
        assert not flat(merge(method, zero)).any()
    assert not flat(task_arithmetic(vectors(3), lambda_=0.0)).any()
    assert not flat(ties(vectors(3), lambda_=0.0)).any()
    taus = vectors(2)
    assert_close(task_arithmetic([*taus, zero[0]]), flat(task_arithmetic(taus)))


def test_bad_options_are_refused_with_the_nearest_name() -> None:
    taus = vectors(2)
    with pytest.raises(ConfigError, match=r"unknown key 'desnity'\n  next: did you mean 'density'"):
        merge("ties", taus, {"desnity": 0.2})
    with pytest.raises(ConfigError, match="did you mean 'task-arithmetic'"):
        merge("task-arithmetics", taus)
    with pytest.raises(ConfigError, match="unknown key 'lambda_'"):
        merge("task-arithmetic", taus, {"lambda_": 5.0})
    for options in ({"density": 0.0}, {"density": 1.5}, {"density": "0.2"}, {"lambda": float("nan")}):
        with pytest.raises(ConfigError, match=next(iter(options))):
            merge("ties", taus, options)
    with pytest.raises(ConfigError, match="density"):
        ties(taus, density=2.0)
    with pytest.raises(ConfigError, match="unknown key"):
        merge("weight-averaging", taus, {"lambda": 1.0})
    with pytest.raises(ConfigError, match="did you mean 'ties'"):
        split_tensors("tie", named(taus))


def test_bad_vectors_are_refused_by_name() -> None:
    good, other = vectors(2)
    bad: list[tuple[list[TaskVector], str]] = [
        ([], "no task vectors"),
        ([{}], "has no tensors"),
        ([good, {**other, "extra": torch.ones(1)}], "d1 has an extra tensor 'extra'"),
        ([good, {"norm.weight": torch.ones(2, 2)}], "d1 has no tensor 'encoder.layer.0.weight'"),
        (
            [good, {**other, "norm.weight": torch.ones(4)}],
            r"'norm.weight': expected shape \[2, 2\], got \[4\]",
        ),
        ([good, {**other, "norm.weight": torch.ones(2, 2, dtype=torch.int64)}], "expected floating point"),
        ([good, {**other, "norm.weight": torch.full((2, 2), float("nan"))}], "NaN or infinite"),
    ]
    for taus, message in bad:
        for method in DATA_FREE:
            with pytest.raises(VectorError, match=message):
                merge(method, taus)


def test_adding_a_file_adds_a_method(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "largest_change.py").write_text(
        "from server.merging import Kernel, Vectors, Weight, merge_method\n\n"
        "@merge_method('largest-change', paper='none', equation='tau = lambda max_d tau_d')\n"
        "def largest(vectors: Vectors, *, lambda_: Weight = 1.0) -> Kernel:\n"
        "    return lambda block: lambda_ * block.tau_NX.max(0)\n"
    )
    monkeypatch.setattr(server.merging, "_METHODS", dict(methods()))
    monkeypatch.setattr(server.merging, "__path__", [*server.merging.__path__, str(tmp_path)])
    assert "largest-change" in methods()
    taus = [{"w": torch.tensor([1.0])}, {"w": torch.tensor([3.0])}]
    assert merge("largest-change", taus, {"lambda": 2.0})["w"].tolist() == [6.0]
    with pytest.raises(ConfigError, match="did you mean 'lambda'"):
        merge("largest-change", taus, {"lamda": 2.0})


def test_two_files_cannot_take_one_name() -> None:
    def other(vectors: Vectors) -> Kernel:
        return lambda block: block.tau_NX[0]

    with pytest.raises(ConfigError, match="two files register 'ties'"):
        server.merging.merge_method("ties", paper="", equation="")(other)


def test_every_method_says_its_source() -> None:
    for method in methods().values():
        assert method.paper
        assert "tau" in method.equation
