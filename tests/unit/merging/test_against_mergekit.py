"""Our methods against mergekit's on the same tensors, with each difference in convention spelled out.

The golden file was made by `tests/golden/mergekit/generate.py`. Where mergekit draws by chance, its mask is
given to our method in place of our own draws, so that the rule is compared, not the luck. Differences:

- mergekit takes thresholds per tensor, we over the whole vector (TIES): compared on vectors of one tensor;
- it cuts counts off to whole numbers, we round: compared where both are the same, or with shares set so;
- it elects plus where the sum of a position is zero, we elect nothing;
- it rescales what is left of a tensor to the L1 norm it had, we by `1 / (1 - p)` (DELLA: each entry's own);
- its `dare_ties` adds what agrees unless `normalize` is set, we average;
- its weights are per model: all 1 here;
- its DELLA `epsilon` is half of ours;
- its Breadcrumbs drops a whole tensor where `gamma` times the size is below 1, we drop none for being large.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors import safe_open

from server.merging import Block, Floats, InMemory, Unit, merge

GOLDEN = Path(__file__).parents[2] / "golden" / "mergekit" / "merges.safetensors"
MODELS, TENSORS = ["a", "b", "c"], ["bias", "matrix", "tiny"]
ZERO_SUM = slice(0, 2)  # the first places of each tensor: a and b opposite, c zero

with safe_open(GOLDEN, framework="numpy") as opened:
    CASES: dict[str, dict[str, Any]] = json.loads(opened.metadata()["cases"])
    VALUES: dict[str, np.ndarray] = {key: opened.get_tensor(key) for key in opened.keys()}  # noqa: SIM118
TAUS = {model: {name: VALUES[f"vector/{model}/{name}"] for name in TENSORS} for model in MODELS}


def only(name: str) -> InMemory:
    return InMemory({model: {name: tau[name]} for model, tau in TAUS.items()})


@dataclass(frozen=True)
class Given(Block):
    """A block whose draws come from a mask: 0 (always below the share to keep) or 1 (never)."""

    masks_NX: np.ndarray

    def random(self, seed: int, vector: int) -> Any:
        return Draws(self.masks_NX[vector])


class Draws:
    def __init__(self, mask_X: np.ndarray) -> None:
        self.left = 1 - mask_X.astype(np.float32)

    def random(
        self, shape: tuple[int, ...] = (), dtype: Any = np.float32, out: Floats | None = None
    ) -> Floats:
        shape = shape if out is None else out.shape
        taken, self.left = np.split(self.left, [int(np.prod(shape))])
        out = np.empty(shape, dtype) if out is None else out
        out[...] = taken.reshape(shape)
        return out

    @property
    def bit_generator(self) -> Draws:
        return self

    def random_raw(self, count: int | None = None) -> Any:
        """The same draws as words of eight bytes each: 0 or 255, below and above every threshold."""
        if count is None:
            return 0
        words = np.zeros(8 * count, np.uint8)
        left = self.left[: words.size]
        words[: left.size] = 255 * (left > 0)
        return words.view("<u8")


class WithMasks(InMemory):
    """The vectors, with the masks that mergekit drew in `case`."""

    def __init__(self, case: str) -> None:
        super().__init__(TAUS)
        self.case = case

    def mask(self, model: str, name: str) -> np.ndarray:
        return VALUES[f"{self.case}/mask/{model}/{name}"]

    def blocks(self, unit: Unit = "block") -> Iterator[Block]:
        for block in super().blocks("tensor"):
            masks_NX = np.stack([self.mask(model, block.name).ravel() for model in MODELS])
            yield Given(block.name, block.shape, block.start, block.tau_NX, block.labels, masks_NX)

    def merge(self, method: str, **options: Any) -> dict[str, np.ndarray]:
        return merge(method, self, {k.rstrip("_"): v for k, v in options.items()})


def close(ours: np.ndarray, theirs: np.ndarray, *, but: slice | None = None) -> None:
    """Equal up to float32 rounding, but for the places `but` of the flattened tensor."""
    kept = np.ones(ours.size, bool)
    if but is not None:
        kept[but] = False
    np.testing.assert_allclose(ours.ravel()[kept], theirs.ravel()[kept], rtol=2e-6, atol=1e-8)


def l1_ratio(model: str, name: str, mask: np.ndarray) -> float:
    """What mergekit multiplies the survivors of a tensor by."""
    tau = TAUS[model][name].astype(np.float64)
    return float(np.abs(tau).sum() / np.abs(tau * mask).sum())


@pytest.mark.parametrize("name", TENSORS)
def test_linear_and_task_arithmetic(name: str) -> None:
    close(merge("weight-averaging", InMemory(TAUS))[name], VALUES[f"linear/{name}"])
    close(merge("task-arithmetic", InMemory(TAUS), {"lambda": 0.3})[name], VALUES[f"task-arithmetic/{name}"])


@pytest.mark.parametrize("case", ["ties", "ties-half"])
@pytest.mark.parametrize("name", TENSORS)
def test_ties_on_one_tensor(case: str, name: str) -> None:
    settings, theirs = CASES[case], VALUES[f"{case}/{name}"]
    options = {"density": settings["density"], "lambda": settings.get("lambda", 1.0)}
    ours = merge("ties", only(name), options)[name]
    close(ours, theirs, but=ZERO_SUM)
    if (
        case == "ties-half" and name == "matrix"
    ):  # both opposite values survive: plus for them, nothing for us
        one = np.abs(TAUS["a"][name].ravel()[0])
        assert ours.ravel()[0] == 0
        assert np.isclose(theirs.ravel()[0], 0.7 * one)


def test_ties_on_several_tensors_differs_by_the_global_threshold() -> None:
    tau = {"large": np.array([10, 20, 30, 40], np.float32), "small": np.array([1, 2, 3, 4], np.float32)}
    ours = merge("ties", InMemory({"a": tau}), {"density": 0.5})
    per_tensor = {k: merge("ties", InMemory({"a": {k: v}}), {"density": 0.5})[k] for k, v in tau.items()}
    assert ours["small"].tolist() == [0, 0, 0, 0]
    assert per_tensor["small"].tolist() == [0, 0, 3, 4]


@pytest.mark.parametrize("name", TENSORS)
def test_dare_on_the_same_masks(name: str) -> None:
    ours = WithMasks("dare-not-rescaled").merge("dare", p=0.7, lambda_=1.0)[name]
    close(ours * np.float32(0.3), VALUES[f"dare-not-rescaled/{name}"])

    given = WithMasks("dare")
    left = {model: given.mask(model, name) * TAUS[model][name] for model in MODELS}
    theirs = sum(l1_ratio(model, name, given.mask(model, name)) * left[model] for model in MODELS)
    close(
        np.float32(0.3) * np.asarray(theirs), VALUES[f"dare/{name}"]
    )  # that is their rule, and this is ours:
    close(given.merge("dare", p=0.7, lambda_=0.6)[name], np.sum(list(left.values()), axis=0) * np.float32(2))


def test_the_l1_ratio_is_one_over_the_share_kept_on_average() -> None:
    """Their rescaling and ours have the same expectation; theirs follows the mask that was drawn."""
    ratios = [l1_ratio(m, "matrix", WithMasks("dare").mask(m, "matrix")) for m in MODELS]
    assert np.mean(ratios) == pytest.approx(1 / 0.3, rel=0.15)
    assert np.std(ratios) > 0


@pytest.mark.parametrize("name", TENSORS)
def test_dare_ties_on_the_same_masks(name: str) -> None:
    mean = WithMasks("dare-ties-mean").merge("dare-ties", p=0.5)[name] * np.float32(0.5)
    close(mean, VALUES[f"dare-ties-mean/{name}"], but=ZERO_SUM)

    given = WithMasks("dare-ties-sum")  # what agrees added, not averaged
    assert all((given.mask(m, name) == WithMasks("dare-ties-mean").mask(m, name)).all() for m in MODELS)
    agree = [given.mask(m, name) & (np.sign(TAUS[m][name]) == np.sign(mean)) & (mean != 0) for m in MODELS]
    close(mean * np.sum(agree, axis=0), VALUES[f"dare-ties-sum/{name}"], but=ZERO_SUM)


@pytest.mark.parametrize("name", TENSORS)
def test_dare_ties_with_their_rescaling_given(name: str) -> None:
    mask = WithMasks("dare-ties").mask
    rescaled = {
        m: {name: (np.float32(l1_ratio(m, name, mask(m, name))) * mask(m, name) * TAUS[m][name])}
        for m in MODELS
    }
    ours = merge("dare-ties", InMemory(rescaled), {"p": 0.0})[name]
    close(ours, VALUES[f"dare-ties/{name}"], but=ZERO_SUM)


@pytest.mark.parametrize("name", TENSORS)
def test_della_on_the_same_masks(name: str) -> None:
    """Without a window each entry's own rescaling is `1 / (1 - p)`; mergekit's rescaling is off here."""
    ours = WithMasks("della-flat").merge("della", p=0.7, epsilon=0.0)[name]
    close(ours * np.float32(0.3), VALUES[f"della-flat/{name}"], but=ZERO_SUM)


@pytest.mark.parametrize("name", TENSORS)
def test_della_with_their_rescaling_given(name: str) -> None:
    mask = WithMasks("della").mask
    rescaled = {
        m: {name: (np.float32(l1_ratio(m, name, mask(m, name))) * mask(m, name) * TAUS[m][name])}
        for m in MODELS
    }
    ours = merge("della", InMemory(rescaled), {"p": 0.0, "epsilon": 0.0})[name]
    close(ours, VALUES[f"della/{name}"], but=ZERO_SUM)


def test_della_rescales_each_entry_by_its_own_share() -> None:
    """Ours on mergekit's mask, one model alone: survivors divided by density +- their epsilon, by rank."""
    given = WithMasks("della")
    kept, tau = given.mask("a", "matrix"), TAUS["a"]["matrix"]
    alone = np.where(given.mask("b", "matrix") | given.mask("c", "matrix"), 0, kept).astype(bool)
    ranks = np.argsort(np.argsort(np.abs(tau), axis=1), axis=1)
    share = 0.25 + 0.1 * ranks / (tau.shape[1] - 1)
    ours = given.merge("della", p=0.7, epsilon=0.1)["matrix"]
    assert alone.sum() > 20
    np.testing.assert_allclose(ours[alone], (tau / share)[alone], rtol=1e-5)


@pytest.mark.parametrize("name", TENSORS)
def test_breadcrumbs(name: str) -> None:
    """Their density 0.7 and gamma 0.1 are our beta 0.2 and gamma 0.1; all counts are whole numbers."""
    ours = merge("breadcrumbs", InMemory(TAUS), {"beta": 0.2, "gamma": 0.1, "lambda": 0.3})
    close(ours[name], VALUES[f"breadcrumbs/{name}"])


@pytest.mark.parametrize(("name", "low", "top"), [("bias", 35, 1), ("matrix", 252, 12)])
def test_breadcrumbs_where_counts_are_cut_off(name: str, low: int, top: int) -> None:
    """density 0.12, gamma 0.04: mergekit keeps int(0.12 size) and drops int(0.04 size) large ones."""
    size = TAUS["a"][name].size
    ours = merge("breadcrumbs", only(name), {"beta": low / size, "gamma": top / size, "lambda": 1.0})
    close(ours[name], VALUES[f"breadcrumbs-top/{name}"])


def test_breadcrumbs_of_a_small_tensor_is_lost_in_mergekit() -> None:
    assert not VALUES["breadcrumbs-top/tiny"].any()  # 0.04 * 20 is below 1
    ours = merge("breadcrumbs", only("tiny"), {"beta": 0.84, "gamma": 0.04, "lambda": 1.0})["tiny"]
    assert np.count_nonzero(ours) > 0
