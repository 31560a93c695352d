"""TSV-Merge, Iso-C, WUDI, RegMean and RegMean++ on small matrices: against naive float64 versions,
against gradient descent on their own objectives, and at the edges (equal, zero, singular)."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from common.errors import ConfigError
from server.merging import Floats, InMemory, merge, methods, process_vectors
from server.merging._gram import shares
from server.merging._matrix import polar, thin_svd

Doubles = npt.NDArray[np.float64]
W = "layer.0.weight"
BIAS = "layer.0.bias"
CLOSED_FORM = ["tsv-merge", "iso-c", "wudi"]


class FixedGrams:
    """The same Gram matrices for the weight `W` in any order, and none for any other tensor."""

    def __init__(self, gram_NCC: Doubles) -> None:
        self.gram_NCC = gram_NCC

    def get(self, tensor: str) -> Doubles | None:
        return self.gram_NCC if tensor == W else None

    def merge_in_order(self, solve: Callable[[Doubles, Floats], Floats]) -> Mapping[str, Floats]:
        raise NotImplementedError


def matrices(count: int, rows: int = 6, columns: int = 5, seed: int = 0) -> Floats:
    return np.random.default_rng(seed).normal(size=(count, rows, columns)).astype(np.float32)


def gram(count: int, columns: int = 5, tokens: int = 40, seed: int = 9) -> Doubles:
    x_NTC = np.random.default_rng(seed).normal(size=(count, tokens, columns))
    return np.asarray(np.swapaxes(x_NTC, 1, 2) @ x_NTC / tokens)


def vectors(tau_NRC: Floats, extra: Mapping[str, Floats] | None = None) -> InMemory:
    extra = extra or {}
    return InMemory(
        {f"d{n}": {W: tau, **{k: v[n] for k, v in extra.items()}} for n, tau in enumerate(tau_NRC)}
    )


def merged(method: str, tau_NRC: Floats, grams: Doubles | None = None, **options: float) -> Floats:
    given_grams = None if grams is None else FixedGrams(grams)
    return merge(method, vectors(tau_NRC), options, given_grams)[W]


def close(found: npt.NDArray[np.floating], expected: npt.NDArray[np.floating], rtol: float = 1e-5) -> None:
    scale = float(np.abs(expected).max()) if expected.size else 0.0
    np.testing.assert_allclose(found, expected, rtol=rtol, atol=rtol * scale)


# TSV-Merge


def naive_tsv(tau_NRC: Floats) -> Doubles:
    """The paper's recipe with the whitening as it is written: U (U^T U)^(-1/2)."""
    count, rows, columns = tau_NRC.shape
    keep = min(rows, columns) // count
    parts = [np.linalg.svd(tau.astype(np.float64), full_matrices=False) for tau in tau_NRC]
    u = np.hstack([u[:, :keep] for u, _, _ in parts])
    v = np.hstack([vt[:keep].T for _, _, vt in parts])
    s = np.concatenate([s[:keep] for _, s, _ in parts])

    def whiten(m: Doubles) -> Doubles:
        value, vector = np.linalg.eigh(m.T @ m)
        return np.asarray(m @ vector @ np.diag(value**-0.5) @ vector.T)

    return np.asarray(whiten(u) @ np.diag(s) @ whiten(v).T)


@pytest.mark.parametrize(("count", "rows", "columns"), [(1, 6, 5), (2, 6, 5), (3, 7, 9), (4, 8, 8)])
def test_tsv_merge_against_the_papers_whitening(count: int, rows: int, columns: int) -> None:
    tau = matrices(count, rows, columns)
    close(merged("tsv-merge", tau), naive_tsv(tau))
    close(merged("tsv-merge", tau, **{"lambda": 0.5}), 0.5 * naive_tsv(tau))


def test_tsv_merge_of_one_vector_is_that_vector() -> None:
    tau = matrices(1)
    close(merged("tsv-merge", tau), tau[0])


def test_tsv_merge_of_orthogonal_low_rank_vectors_is_their_sum() -> None:
    left, right = np.eye(6, dtype=np.float32), np.eye(5, dtype=np.float32)
    one, two = 3 * np.outer(left[0], right[1]), 2 * np.outer(left[2], right[3])
    close(merged("tsv-merge", np.stack([one, two])), one + two)


def test_tsv_merge_of_equal_vectors_is_their_best_approximation_of_the_kept_rank() -> None:
    (tau,) = matrices(1, 6, 6)
    u, s, vt = np.linalg.svd(tau.astype(np.float64))
    close(merged("tsv-merge", np.stack([tau] * 3)), u[:, :2] * s[:2] @ vt[:2])


def test_tsv_merge_of_more_vectors_than_rows_and_of_zeros() -> None:
    tau = matrices(7, 3, 4)
    found = merged("tsv-merge", tau)
    assert np.isfinite(found).all()
    assert found.any()
    assert not merged("tsv-merge", np.zeros((3, 3, 4), np.float32)).any()
    with_zero = np.concatenate([tau[:1], np.zeros((1, 3, 4), np.float32)])
    u, s, vt = np.linalg.svd(tau[0].astype(np.float64), full_matrices=False)
    close(merged("tsv-merge", with_zero), u[:, :1] * s[:1] @ vt[:1])


# Iso-C


def test_iso_c_makes_all_singular_values_equal_to_their_mean() -> None:
    tau = matrices(3)
    u, s, vt = np.linalg.svd(tau.sum(0, dtype=np.float64), full_matrices=False)
    found = merged("iso-c", tau, **{"lambda": 1.3})
    close(found, 1.3 * s.mean() * u @ vt)
    close(np.linalg.svd(found.astype(np.float64), compute_uv=False), np.full(5, 1.3 * s.mean()))


def test_iso_c_keeps_to_the_directions_of_a_low_rank_sum() -> None:
    generator = np.random.default_rng(3)
    low = (generator.normal(size=(6, 2)) @ generator.normal(size=(2, 5))).astype(np.float32)
    _, s, vt = np.linalg.svd(low.astype(np.float64), full_matrices=False)
    found = merged("iso-c", np.stack([low, low]))
    close(np.linalg.svd(found.astype(np.float64), compute_uv=False)[:2], np.full(2, 2 * s[:2].mean()))
    assert np.abs(found @ vt[2:].T).max() < 1e-5
    assert not merged("iso-c", np.stack([low, -low])).any()


# WUDI


def wudi_gradient(tau_RC: Doubles, tau_NRC: Doubles) -> Doubles:
    """Of sum_d ||(tau - tau_d) tau_d^T||^2 / ||tau_d||^2 with respect to tau."""
    result = np.zeros_like(tau_RC)
    for one in tau_NRC:
        result += 2 * (tau_RC - one) @ one.T @ one / np.sum(one * one)
    return result


@pytest.mark.parametrize(("count", "rows", "columns"), [(2, 6, 5), (3, 4, 6), (2, 3, 9)])
def test_wudi_is_where_gradient_descent_from_the_sum_ends(count: int, rows: int, columns: int) -> None:
    """The last case has more columns than all rows together: many minima, one reached from the sum."""
    tau_NRC = matrices(count, rows, columns, seed=2).astype(np.float64)
    curvature = sum(np.linalg.norm(one, 2) ** 2 / np.sum(one * one) for one in tau_NRC)
    tau_RC = tau_NRC.sum(0)
    for _ in range(200_000):
        step = wudi_gradient(tau_RC, tau_NRC) / (2 * curvature)
        tau_RC -= step
        if np.abs(step).max() < 1e-12:
            break
    else:
        pytest.fail("gradient descent did not converge")
    close(merged("wudi", matrices(count, rows, columns, seed=2), ridge=0.0), tau_RC, rtol=1e-4)


def test_wudi_by_default_does_not_fit_noise() -> None:
    """As many rows as columns in all: the exact minimum is 0 and far away."""
    tau = matrices(3, 8, 24, seed=1)

    def objective(tau_RC: Floats) -> float:
        return float(sum(np.sum(((tau_RC - one) @ one.T) ** 2) / np.sum(one * one) for one in tau))

    exact, default, total = merged("wudi", tau, ridge=0.0), merged("wudi", tau), tau.sum(0)
    assert objective(exact) < 1e-6 * objective(total)
    assert objective(default) < 0.1 * objective(total)
    assert np.linalg.norm(exact) > 2 * np.linalg.norm(total)
    assert np.linalg.norm(default) < 2 * np.linalg.norm(total)


def test_wudi_of_vectors_that_share_no_direction_is_their_sum() -> None:
    tau = np.zeros((2, 4, 6), np.float32)
    tau[0, :, :3], tau[1, :, 3:] = matrices(2, 4, 3)
    for ridge in (0.0, 1e-9):
        close(merged("wudi", tau, ridge=ridge), tau.sum(0))


def test_wudi_of_equal_vectors_and_with_a_zero_vector() -> None:
    (tau,) = matrices(1, 4, 7)
    for ridge in (0.0, 1e-6, 0.1):
        close(merged("wudi", np.stack([tau] * 3), ridge=ridge), tau)
    close(merged("wudi", np.stack([tau, np.zeros_like(tau)]), ridge=0.0), tau)
    assert not merged("wudi", np.zeros((2, 4, 7), np.float32)).any()


# RegMean


def naive_regmean(tau_NRC: Floats, gram_NCC: Doubles, alpha: float) -> Doubles:
    """Equation 1 as it is written, for W^T, with an inverse."""
    left, right = np.zeros_like(gram_NCC[0]), np.zeros((tau_NRC.shape[2], tau_NRC.shape[1]))
    for tau, gram_CC in zip(tau_NRC.astype(np.float64), gram_NCC, strict=True):
        shrunk = alpha * gram_CC + (1 - alpha) * np.diag(np.diag(gram_CC))
        left += shrunk
        right += shrunk @ tau.T
    return np.asarray((np.linalg.inv(left) @ right).T)


@pytest.mark.parametrize("alpha", [0.0, 0.9, 1.0])
@pytest.mark.parametrize("count", [1, 2, 4])
def test_regmean_against_the_papers_equation(alpha: float, count: int) -> None:
    tau, grams = matrices(count), gram(count)
    close(merged("regmean", tau, grams, alpha=alpha, ridge=0.0), naive_regmean(tau, grams, alpha))
    close(merged("regmean", tau, grams, alpha=alpha), naive_regmean(tau, grams, alpha), rtol=1e-4)


def test_regmean_on_whole_weights_is_the_base_plus_regmean_on_task_vectors() -> None:
    tau, grams = matrices(3), gram(3)
    (base,) = matrices(1, seed=5)
    close(naive_regmean(base + tau, grams, 0.9), base + merged("regmean", tau, grams, ridge=0.0))


def test_regmean_fits_the_outputs_best() -> None:
    """The merged layer's squared error over all inputs grows whichever way the weights are moved."""
    generator = np.random.default_rng(4)
    x_NTC = generator.normal(size=(3, 50, 5)) @ generator.normal(size=(3, 5, 5))
    tau = matrices(3)

    def error(merged_RC: npt.NDArray[np.floating]) -> float:
        differences = [x @ (merged_RC - one).T for x, one in zip(x_NTC, tau, strict=True)]
        return float(sum(np.sum(difference**2) for difference in differences))

    grams = np.swapaxes(x_NTC, 1, 2) @ x_NTC / 50
    best = merged("regmean", tau, grams, alpha=1.0, ridge=0.0).astype(np.float64)
    for _ in range(20):
        assert error(best) < error(best + 1e-3 * generator.normal(size=best.shape))


def test_regmean_of_equal_vectors_is_that_vector_whatever_the_grams_are() -> None:
    (tau,) = matrices(1)
    same = np.stack([tau] * 3)
    for grams in (gram(3), np.zeros((3, 5, 5)), gram(3, tokens=2)):
        for ridge in (0.0, 1e-6, 1.0):
            close(merged("regmean", same, grams, alpha=1.0, ridge=ridge), tau)


def test_regmean_takes_the_mean_where_no_input_was_seen() -> None:
    tau = matrices(2)
    close(merged("regmean", tau, np.zeros((2, 5, 5))), tau.mean(0))
    seen = np.zeros((2, 5, 5))
    seen[0, 0, 0], seen[1, 1, 1] = 1.0, 2.0  # the first model knows input 0 alone, the second input 1
    expected = tau.mean(0)
    expected[:, 0], expected[:, 1] = tau[0][:, 0], tau[1][:, 1]
    for ridge in (0.0, 1e-9):
        close(merged("regmean", tau, seen, alpha=1.0, ridge=ridge), expected)


def test_regmean_without_a_gram_is_the_mean_and_needs_catalogs() -> None:
    tau, bias = matrices(2), matrices(2, 1, 6)[:, 0]
    found = merge("regmean", vectors(tau, {BIAS: bias}), grams=FixedGrams(gram(2)))
    close(found[BIAS], bias.mean(0))
    with pytest.raises(ConfigError, match="needs the catalogs"):
        merge("regmean", vectors(tau))


def test_regmean_plus_plus_takes_what_was_solved_in_order() -> None:
    tau, bias, grams = matrices(2), matrices(2, 1, 6)[:, 0], gram(2)

    class InOrder(FixedGrams):
        def merge_in_order(self, solve: Callable[[Doubles, Floats], Floats]) -> Mapping[str, Floats]:
            return {W: solve(self.gram_NCC, tau)}

    found = merge("regmean-plus-plus", vectors(tau, {BIAS: bias}), {"alpha": 0.5}, InOrder(grams))
    close(found[W], naive_regmean(tau, grams, 0.5), rtol=1e-4)
    close(found[BIAS], bias.mean(0))


# the solver


@pytest.mark.parametrize("columns", [1, 5, 128, 129, 300])
def test_solver_satisfies_the_normal_equations_over_several_blocks(columns: int) -> None:
    tau, grams = matrices(3, 4, columns), gram(3, columns, tokens=columns + 20)
    found = shares(grams, tau, ridge=0.0).sum(0)
    right = sum(one.astype(np.float64) @ gram_CC for one, gram_CC in zip(tau, grams, strict=True))
    close(found @ grams.sum(0), np.asarray(right), rtol=1e-9)


def test_solver_parts_are_each_vectors_own() -> None:
    tau, grams = matrices(3), gram(3)
    inverse = np.linalg.inv(grams.sum(0))
    for part, one, gram_CC in zip(shares(grams, tau, ridge=0.0), tau, grams, strict=True):
        close(part, one.astype(np.float64) @ gram_CC @ inverse, rtol=1e-9)


def test_solver_ridge_is_relative_and_pulls_to_the_mean() -> None:
    tau, grams = matrices(2), gram(2)
    weight = 0.3 * np.trace(grams.sum(0)) / 10
    ridged = grams + weight * np.eye(5)
    right = sum(one.astype(np.float64) @ gram_CC for one, gram_CC in zip(tau, ridged, strict=True))
    expected = np.asarray(right) @ np.linalg.inv(ridged.sum(0))
    close(shares(grams, tau, ridge=0.3).sum(0), expected, rtol=1e-9)
    close(shares(1e4 * grams, tau, ridge=0.3).sum(0), expected, rtol=1e-9)


def test_singular_grams_are_the_limit_of_a_vanishing_ridge() -> None:
    tau, grams = matrices(3, 4, 8), gram(3, 8, tokens=2)  # rank 6 of 8
    close(shares(grams, tau, ridge=0.0).sum(0), shares(grams, tau, ridge=1e-9).sum(0), rtol=1e-5)


def test_numerical_rank_and_polar_factor() -> None:
    u, s, vt = thin_svd(np.outer([1.0, 2.0, 2.0], [3.0, 4.0]))
    assert (u.shape, s.shape, vt.shape) == ((3, 1), (1,), (1, 2))
    close(s, np.array([15.0]))
    square = matrices(1, 4, 4)[0].astype(np.float64)
    close(polar(square) @ polar(square).T, np.eye(4), rtol=1e-9)


# all of them


@settings(max_examples=15, deadline=None)
@given(st.integers(1, 4), st.integers(0, 1000), st.sampled_from([*CLOSED_FORM, "regmean"]))
def test_order_and_scale_of_the_vectors(count: int, seed: int, method: str) -> None:
    """Scales are powers of two, which float32 takes exactly."""
    tau = matrices(count, seed=seed)
    grams = gram(count, seed=seed) if method == "regmean" else None
    found = merged(method, tau, grams)
    order = np.random.default_rng(seed).permutation(count)
    close(merged(method, tau[order], None if grams is None else grams[order]), found, rtol=1e-4)
    for scale in (0.5, 4.0, -2.0):
        close(merged(method, np.float32(scale) * tau, grams), scale * found, rtol=1e-4)


@pytest.mark.parametrize("method", CLOSED_FORM)
def test_what_is_no_linear_layer_takes_the_mean(method: str) -> None:
    tau = matrices(2)
    extra = {
        BIAS: matrices(2, 1, 6, seed=1)[:, 0],
        "embeddings.word_embeddings.weight": matrices(2, 9, 4, seed=2),
        "embeddings.row": matrices(2, 1, 4, seed=3),
        "scale": matrices(2, 1, 1, seed=4)[:, 0, 0],
    }
    found = merge(method, vectors(tau, extra))
    for name, values in extra.items():
        close(found[name], values.mean(0))
    close(found[W], merged(method, tau))


@pytest.mark.parametrize("method", ["tsv-merge", "wudi"])
def test_processed_vectors_sum_to_the_merge(method: str) -> None:
    source = vectors(matrices(3), {BIAS: matrices(3, 1, 6)[:, 0]})
    parts, whole = process_vectors(method, source), merge(method, source)
    for name in whole:
        close(np.sum([part[name] for part in parts], axis=0), whole[name])
    assert np.abs(parts[0][W] - parts[1][W]).max() > 1e-3


def test_inputs_are_not_written_to_and_options_have_bounds() -> None:
    tau = matrices(2)
    before = tau.copy()
    for method in CLOSED_FORM:
        merged(method, tau)
        assert np.array_equal(tau, before)
    for method, option, value in (
        ("wudi", "ridge", -0.1),
        ("regmean", "alpha", 1.5),
        ("iso-c", "lambda", np.nan),
    ):
        with pytest.raises(ConfigError, match=option):
            merged(method, tau, gram(2), **{option: value})
    assert {"regmean", "regmean-plus-plus"} <= {name for name, m in methods().items() if m.needs == "grams"}
