"""The methods that drop entries, each against a float64 version written for clarity, one entry at a time."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import pytest

from common.errors import ConfigError, VectorError
from server.merging import Block, InMemory, merge, process_vectors
from server.merging._draws import generator
from server.merging._vectors import BLOCK_VALUES

SHAPES: dict[str, tuple[int, ...]] = {"bias": (9,), "conv": (3, 2, 4), "matrix": (6, 8), "scale": ()}
Named = dict[str, dict[str, np.ndarray]]


def draw(count: int, seed: int = 0, shapes: Mapping[str, tuple[int, ...]] = SHAPES) -> Named:
    """`count` vectors of normal values, as float32; their labels say nothing about their order."""
    drawn = np.random.default_rng(seed)
    return {
        f"domain {(7 * index) % 11}": {
            name: (0.01 * drawn.normal(size=shape)).astype(np.float32) for name, shape in shapes.items()
        }
        for index in range(count)
    }


def merged(method: str, taus: Named, options: dict[str, Any] | None = None) -> dict[str, np.ndarray]:
    return merge(method, InMemory(taus), options)


def as_double(taus: Named) -> dict[str, dict[str, np.ndarray]]:
    return {label: {k: v.astype(np.float64) for k, v in tau.items()} for label, tau in taus.items()}


def assert_same(found: Mapping[str, np.ndarray], expected: Mapping[str, np.ndarray]) -> None:
    """Equal up to float32 rounding of the largest value of each tensor."""
    assert found.keys() == expected.keys()
    for name, values in expected.items():
        np.testing.assert_allclose(
            found[name], values, rtol=2e-6, atol=1e-6 * np.abs(values).max(), err_msg=name
        )


def uniform(taus: Named, label: str, name: str, seed: int) -> np.ndarray:
    """The numbers of DELLA that `label` draws for a tensor, which make a seed reproducible."""
    tau = taus[label][name]
    row = int(np.prod(tau.shape[1:])) if tau.ndim > 1 else tau.size
    step = row * (BLOCK_VALUES // row)
    parts = [
        Block(name, tau.shape, start, tau.reshape(1, -1)[:, start : start + step], [label])
        for start in range(0, tau.size, step)
    ]
    numbers = [part.random(seed, 0).random(part.stop - part.start, dtype=np.float32) for part in parts]
    return np.concatenate(numbers).reshape(tau.shape)


def by_position(parts: Mapping[str, Mapping[str, np.ndarray]], fuse: Any) -> dict[str, np.ndarray]:
    """`fuse(values of all vectors at one position)` at each position."""
    first = next(iter(parts.values()))
    return {
        name: np.array(
            [fuse(list(values)) for values in zip(*(p[name].ravel() for p in parts.values()), strict=True)]
        ).reshape(values.shape)
        for name, values in first.items()
    }


def agreeing(values: list[float]) -> float:
    """TIES, steps 2 and 3, at one position."""
    sign = np.sign(sum(values))
    same = [value for value in values if value != 0 and np.sign(value) == sign]
    return sum(same) / len(same) if same else 0.0


def kept_mask(taus: Named, label: str, name: str, keep: float, seed: int) -> np.ndarray:
    """Which entries of a tensor of one block are kept: a byte for each, below that place's threshold."""
    tau = taus[label][name]
    low, share = divmod(keep * 256, 1)
    threshold = np.full(2**16, int(low))
    threshold[: round(share * 2**16)] += 1
    threshold = threshold.astype(np.uint8)
    generator(seed, "thresholds").shuffle(threshold)
    bits = Block(name, tau.shape, 0, tau.reshape(1, -1), [label]).random(seed, 0).bit_generator
    begin = int(bits.random_raw()) % 2**16
    drawn = [byte for word in bits.random_raw(-(-tau.size // 8)) for byte in int(word).to_bytes(8, "little")]
    kept = [drawn[place] < threshold[(begin + place) % 2**16] for place in range(tau.size)]
    return np.array(kept).reshape(tau.shape)


def naive_dare(taus: Named, p: float, seed: int) -> dict[str, dict[str, np.ndarray]]:
    keep = float(np.float32(1 - p))
    return {
        label: {
            name: np.where(keep == 1 or kept_mask(taus, label, name, keep, seed), values / (1 - p), 0.0)
            for name, values in tau.items()
        }
        for label, tau in as_double(taus).items()
    }


@pytest.mark.parametrize("p", [0.0, 0.3, 0.9])
@pytest.mark.parametrize("count", [1, 4])
def test_dare_against_float64(p: float, count: int) -> None:
    taus = draw(count, seed=count)
    parts = naive_dare(taus, p, seed=5)
    assert_same(
        merged("dare", taus, {"p": p, "lambda": 0.7, "seed": 5}),
        by_position(parts, lambda values: 0.7 * sum(values)),
    )
    assert_same(
        merged("dare-ties", taus, {"p": p, "lambda": 0.7, "seed": 5}),
        by_position(parts, lambda values: 0.7 * agreeing(values)),
    )


def test_shares_between_two_bytes_have_two_thresholds() -> None:
    taus = draw(2, shapes={"w": (50, 60)})
    low, keep, high = 102 / 256, 0.4, 103 / 256
    counts = [
        sum(kept_mask(taus, label, "w", share, 1).sum() for label in taus) for share in (low, keep, high)
    ]
    assert counts[0] < counts[1] < counts[2]
    expected = by_position(naive_dare(taus, 1 - keep, seed=1), sum)
    assert_same(merged("dare", taus, {"p": 1 - keep, "lambda": 1.0, "seed": 1}), expected)


def test_dare_keeps_the_share_it_says_and_the_mean() -> None:
    tau = {"w": np.ones(4 * BLOCK_VALUES + 17, np.float32)}
    kept = merged("dare", {"a": tau}, {"p": 0.9, "lambda": 1.0})["w"]
    assert set(np.unique(kept)) == {np.float32(0), np.float32(1) / np.float32(1 - 0.9)}
    share = np.count_nonzero(kept) / kept.size
    assert abs(share - 0.1) < 5 * np.sqrt(0.09 / kept.size)
    borders = [
        np.flatnonzero(kept[start : start + 4000]).tolist() for start in range(0, kept.size, BLOCK_VALUES)
    ]
    assert len({tuple(places) for places in borders}) == len(borders)  # each block draws its own numbers

    two = process_vectors("dare", InMemory({"a": tau, "b": tau}), {"p": 0.9})
    both = np.count_nonzero(two[0]["w"].astype(bool) & two[1]["w"].astype(bool)) / kept.size
    assert abs(both - 0.01) < 5 * np.sqrt(0.01 / kept.size)  # each vector draws its own mask


@pytest.mark.parametrize("p", [0.998, 0.9, 0.6, 0.3, 0.001])  # of 256: below 1, between, above 255
def test_dropping_is_by_chance(p: float) -> None:
    """Shares and the agreement of neighbours, of places and of vectors, within 5 standard deviations."""
    taus = {label: {"w": np.ones(24 * BLOCK_VALUES, np.float32)} for label in "ab"}
    one, two = (merged("dare", {label: tau}, {"p": p})["w"] > 0 for label, tau in taus.items())
    keep = 1 - p
    for found, expected in [
        (one, keep),
        (two, keep),
        (one & two, keep**2),
        (one[1:] & one[:-1], keep**2),
        (one[BLOCK_VALUES:] & one[:-BLOCK_VALUES], keep**2),
        (one[::2], keep),
        (one[5::8], keep),
    ]:
        variance = keep * p if expected == keep else keep**2 * p * (1 + 3 * keep)  # of pairs that overlap
        assert abs(found.mean() - expected) < 5 * np.sqrt(variance / found.size)


def naive_della(taus: Named, p: float, epsilon: float, seed: int) -> dict[str, dict[str, np.ndarray]]:
    """MagPrune: row by row, entry by entry."""
    parts: dict[str, dict[str, np.ndarray]] = {}
    for label, tau in as_double(taus).items():
        parts[label] = {}
        for name, values in tau.items():
            rows = values.reshape(values.shape[0] if values.ndim > 1 else 1, -1)
            drawn = uniform(taus, label, name, seed).reshape(rows.shape)
            kept = np.zeros_like(rows)
            for r, row in enumerate(rows):
                for c, value in enumerate(row):
                    larger = sum(abs(other) > abs(value) for other in row)
                    rank = larger / (len(row) - 1) if len(row) > 1 else 0.5
                    keep = 1 - (p - epsilon / 2 + epsilon * rank)
                    kept[r, c] = value / keep if drawn[r, c] < keep else 0.0
            parts[label][name] = kept.reshape(values.shape)
    return parts


@pytest.mark.parametrize(("p", "epsilon"), [(0.7, 0.1), (0.5, 0.9), (0.0, 0.0), (0.05, 0.1)])
def test_della_against_float64(p: float, epsilon: float) -> None:
    taus = draw(3, seed=2)
    assert_same(
        merged("della", taus, {"p": p, "epsilon": epsilon, "lambda": 1.1, "seed": 3}),
        by_position(naive_della(taus, p, epsilon, seed=3), lambda values: 1.1 * agreeing(values)),
    )


def test_della_keeps_large_entries_more_often() -> None:
    row = np.linspace(1, 2, 50, dtype=np.float32) * np.float32(-1)
    kept = merged("della", {"a": {"w": np.tile(row, (8000, 1))}}, {"p": 0.6, "epsilon": 0.6})["w"]
    share_C = (kept != 0).mean(0)
    np.testing.assert_allclose(share_C, np.linspace(0.1, 0.7, 50), atol=5 * np.sqrt(0.25 / 8000))
    np.testing.assert_allclose(kept.mean(0), row, rtol=5 * np.sqrt(9 / 8000))  # rescaled by its own keep rate


def test_della_ranks_equal_entries_by_place() -> None:
    tau = {"w": np.ones((300, 300), np.float32)}  # more than a block: rows are taken in parts
    kept = merged("della", {"a": tau}, {"p": 0.5, "epsilon": 0.8, "seed": 1})["w"]
    keep_C = np.linspace(0.1, 0.9, 300)
    expected = np.where(uniform({"a": tau}, "a", "w", 1) < keep_C, 1 / keep_C, 0)
    np.testing.assert_allclose(kept, expected, rtol=1e-5)


def naive_breadcrumbs(taus: Named, beta: float, gamma: float) -> dict[str, dict[str, np.ndarray]]:
    parts: dict[str, dict[str, np.ndarray]] = {}
    for label, tau in as_double(taus).items():
        parts[label] = {}
        for name, values in tau.items():
            order = np.argsort(np.abs(values), axis=None)
            top = min(round(gamma * len(order)), len(order) - 1)
            bottom = min(round(beta * len(order)), len(order) - 1 - top)
            kept = np.zeros(values.size)
            for place in order[bottom : len(order) - top]:
                kept[place] = values.ravel()[place]
            parts[label][name] = kept.reshape(values.shape)
    return parts


@pytest.mark.parametrize(("beta", "gamma"), [(0.85, 0.01), (0.5, 0.2), (0.0, 0.0), (0.98, 0.0), (0.0, 0.98)])
def test_breadcrumbs_against_float64(beta: float, gamma: float) -> None:
    taus = draw(3, seed=4)
    assert_same(
        merged("breadcrumbs", taus, {"beta": beta, "gamma": gamma, "lambda": 0.4}),
        by_position(naive_breadcrumbs(taus, beta, gamma), lambda values: 0.4 * sum(values)),
    )


def test_breadcrumbs_of_a_tensor_of_several_blocks() -> None:
    taus = draw(1, shapes={"large": (3, BLOCK_VALUES // 2 + 5), "small": (2,)})
    found = process_vectors("breadcrumbs", InMemory(taus), {"lambda": 1.0})
    assert_same(found[0], next(iter(naive_breadcrumbs(taus, 0.85, 0.01).values())))


def test_breadcrumbs_counts_in_each_tensor_and_keeps_equals() -> None:
    tau = {
        "equal": np.full(6, -2, np.float32),
        "large": np.arange(10, 20, dtype=np.float32),
        "small": np.array([0.4, 0.1, 0.3, 0.2, 0.5], np.float32),
    }
    kept = merged("breadcrumbs", {"a": tau}, {"beta": 0.4, "gamma": 0.2, "lambda": 1.0})
    assert kept["equal"].tolist() == [-2] * 6
    assert kept["large"].tolist() == [0, 0, 0, 0, 14, 15, 16, 17, 0, 0]
    np.testing.assert_array_equal(kept["small"], np.array([0.4, 0, 0.3, 0, 0], np.float32))


def naive_unified(values: list[float]) -> float:
    sign = np.sign(sum(values))
    same = [abs(value) for value in values if np.sign(value) == sign]
    return float(sign * max(same)) if sign != 0 else 0.0


@pytest.mark.parametrize("count", [1, 2, 5])
def test_emr_against_float64(count: int) -> None:
    taus = draw(count, seed=count)
    one = by_position(as_double(taus), naive_unified)
    assert_same(merged("emr", taus), one)
    for label, tau in as_double(taus).items():
        masked = {
            name: np.where(np.sign(values) == np.sign(one[name]), one[name], 0)
            for name, values in tau.items()
        }
        own_sum = sum(np.abs(values).sum() for values in tau.values())
        scale = own_sum / sum(np.abs(values).sum() for values in masked.values())
        found = merge("emr", InMemory(taus), {"domain": label})
        assert_same(found, {name: scale * values for name, values in masked.items()})
        # what the rescaler is for: the mean magnitude of the domain's own vector is restored
        assert np.isclose(sum(np.abs(v).sum(dtype=float) for v in found.values()), own_sum, rtol=1e-6)


def test_emr_gives_vectors_that_do_not_meet_back_exactly() -> None:
    one, two = np.array([1, -2, 0, 0], np.float32), np.array([0, 0, 4, -3], np.float32)
    taus = {"a": {"w": one}, "b": {"w": two}}
    assert merged("emr", taus)["w"].tolist() == [1, -2, 4, -3]
    assert merge("emr", InMemory(taus), {"domain": "a"})["w"].tolist() == one.tolist()
    assert merge("emr", InMemory(taus), {"domain": "b"})["w"].tolist() == two.tolist()
    taus["c"] = {"w": np.zeros(4, np.float32)}
    assert not merge("emr", InMemory(taus), {"domain": "c"})["w"].any()
    with pytest.raises(ConfigError, match="unknown domain 'd'"):
        merge("emr", InMemory(taus), {"domain": "d"})


def flat(tau: Mapping[str, np.ndarray]) -> np.ndarray:
    return np.concatenate([tau[name].ravel() for name in sorted(tau)])


def naive_pcb(taus: Named, density: float) -> np.ndarray:
    """The paper's five equations on flat vectors, with every softmax in full."""
    rows = [flat(tau) for tau in as_double(taus).values()]
    count, size = len(rows), len(rows[0])

    def norm(x: np.ndarray) -> np.ndarray:
        return (x - x.min()) / (x.max() - x.min()) if x.max() > x.min() else np.zeros_like(x)

    def softmax(x: np.ndarray) -> np.ndarray:
        return np.exp(x - x.max()) / np.exp(x - x.max()).sum()

    weights = []
    for row in rows:
        beta = softmax(count * norm(row * row)) * sum(softmax(norm(row * other)) for other in rows)
        threshold = np.sort(beta)[-max(1, round(density * size))]
        weights.append(np.where(beta >= threshold, beta, 0.0))
    total = np.sum(weights, axis=0)
    weighted = np.sum([w * row for w, row in zip(weights, rows, strict=True)], axis=0)
    return np.divide(weighted, total, out=np.zeros(size), where=total > 0)


@pytest.mark.parametrize("density", [0.05, 0.3, 1.0])
@pytest.mark.parametrize("count", [1, 2, 6])
def test_pcb_against_float64(density: float, count: int) -> None:
    taus = draw(count, seed=count)
    found = flat(merged("pcb", taus, {"density": density, "lambda": 0.8}))
    np.testing.assert_allclose(found, 0.8 * naive_pcb(taus, density), rtol=1e-4, atol=1e-8)


def test_pcb_of_many_vectors_does_not_overflow() -> None:
    taus = {f"d{index}": tau for index in range(30) for tau in draw(4, seed=index).values()}
    many = {f"{label} {copy}": tau for label, tau in taus.items() for copy in range(4)}
    assert len(many) == 120  # exp(120) is above the largest float32
    found = flat(merged("pcb", many, {"density": 0.3}))
    np.testing.assert_allclose(found, naive_pcb(many, 0.3), rtol=1e-3, atol=1e-7)


@pytest.mark.parametrize("density", [0.05, 0.4, 1.0])
def test_localize_and_stitch_against_float64(density: float) -> None:
    taus = draw(4, seed=6)
    rows = [flat(tau) for tau in as_double(taus).values()]
    keep = max(1, round(density * len(rows[0])))
    masks = [np.abs(row) >= np.sort(np.abs(row))[-keep] for row in rows]
    expected = np.zeros(len(rows[0]))
    for place in range(len(expected)):
        kept = [row[place] for row, mask in zip(rows, masks, strict=True) if mask[place]]
        expected[place] = sum(kept) / len(kept) if kept else 0.0
    found = flat(merged("localize-and-stitch", taus, {"density": density}))
    np.testing.assert_allclose(found, expected, rtol=2e-6, atol=1e-9)


def test_localize_and_stitch_averages_where_masks_meet_whatever_the_sign() -> None:
    taus = {"a": {"w": np.array([3, -8, 1, 0], np.float32)}, "b": {"w": np.array([0, 4, -6, 1], np.float32)}}
    assert merged("localize-and-stitch", taus, {"density": 0.5})["w"].tolist() == [3, -2, -6, 0]


@pytest.mark.parametrize(
    ("method", "options", "message"),
    [
        ("dare", {"p": 1.0}, "p"),
        ("dare", {"p": -0.1}, "p"),
        ("dare", {"seed": -1}, "seed"),
        ("dare-ties", {"seed": 0.5}, "seed"),
        ("dare-ties", {"lambda": float("inf")}, "lambda"),
        ("della", {"epsilon": -0.1}, "epsilon"),
        ("della", {"p": 0.02, "epsilon": 0.1}, "drop probabilities from -0.03"),
        ("della", {"p": 0.95, "epsilon": 0.1}, "drop probabilities from 0.9 to 1"),
        ("breadcrumbs", {"beta": 1.0}, "beta"),
        ("breadcrumbs", {"beta": 0.6, "gamma": 0.4}, "leave nothing"),
        ("pcb", {"density": 0.0}, "density"),
        ("localize-and-stitch", {"density": 1.1}, "density"),
        ("emr", {"lambda": 1.0}, "unknown key"),
    ],
)
def test_options_out_of_range_are_refused(method: str, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        merged(method, draw(2), options)


@pytest.mark.parametrize("method", ["ties", "localize-and-stitch", "breadcrumbs", "pcb"])
@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_one_bad_value_is_refused_by_name_where_thresholds_are_taken(method: str, bad: float) -> None:
    taus = draw(2)
    taus["domain 7"]["matrix"][0, 0] = bad
    options: dict[str, Any] = {"beta": 0.0, "gamma": 0.0} if method == "breadcrumbs" else {"density": 1.0}
    with pytest.raises(VectorError, match="domain 7, tensor 'matrix': holds NaN"):
        merged(method, taus, options)
