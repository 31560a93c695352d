"""Our methods against `peft.utils.merge_utils` on the same tensors, with each difference in convention.

peft works on lists of tensors; each is one vector of one tensor here. It draws DARE's mask from torch's
global generator: the pruned vectors are made by its own function with the same seed, and given to ours. peft
cuts counts off to whole numbers, and elects plus where the sum of a position is zero; we round, and elect
nothing. Its weights are per model; all are `lambda` here. (For LoRA it applies these rules to A and B apart,
which is not the same as merging the products.)
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

from server.merging import InMemory, merge

peft = pytest.importorskip("peft.utils.merge_utils", reason="peft is a development dependency")

COUNT, SHAPE = 4, (10, 20)
SCALE = 0.3


def draw(seed: int = 0) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [0.01 * torch.randn(SHAPE, generator=generator) for _ in range(COUNT)]


def ours(method: str, tensors: list[torch.Tensor], **options: Any) -> np.ndarray:
    taus = {f"d{index}": {"w": tensor.numpy()} for index, tensor in enumerate(tensors)}
    return merge(method, InMemory(taus), {key.rstrip("_"): value for key, value in options.items()})["w"]


def close(found: np.ndarray, expected: torch.Tensor) -> None:
    np.testing.assert_allclose(found, expected.numpy(), rtol=2e-6, atol=1e-8)


def test_task_arithmetic() -> None:
    tensors = draw()
    close(
        ours("task-arithmetic", tensors, lambda_=SCALE),
        peft.task_arithmetic(tensors, torch.full((COUNT,), SCALE)),
    )


@pytest.mark.parametrize("density", [0.2, 0.5, 0.95])
def test_ties(density: float) -> None:
    tensors, weights = draw(1), torch.full((COUNT,), SCALE)
    close(ours("ties", tensors, density=density, lambda_=SCALE), peft.ties(tensors, weights, density))


def test_magnitude_prune() -> None:
    """peft adds the largest entries up; ours with that rule is Breadcrumbs that drops no outliers."""
    tensors, weights = draw(2), torch.full((COUNT,), SCALE)
    found = ours("breadcrumbs", tensors, beta=0.75, gamma=0.0, lambda_=SCALE)
    close(found, peft.magnitude_prune(tensors, weights, 0.25))


@pytest.mark.parametrize(("method", "rule"), [("dare", peft.dare_linear), ("dare-ties", peft.dare_ties)])
def test_dare(method: str, rule: Callable[..., torch.Tensor]) -> None:
    tensors, weights, density = draw(3), torch.full((COUNT,), SCALE), 0.4
    torch.manual_seed(7)
    pruned = [peft.prune(tensor, density, method="random", rescale=True) for tensor in tensors]
    torch.manual_seed(7)
    theirs = rule(tensors, weights, density)
    close(ours(method, pruned, p=0.0, lambda_=SCALE), theirs)
    for tensor, kept in zip(tensors, pruned, strict=True):  # their rescaling is ours: 1 / (1 - p)
        np.testing.assert_allclose(kept[kept != 0], tensor[kept != 0] / density, rtol=1e-6)


def test_a_sum_of_zero_elects_plus_in_peft_and_nothing_here() -> None:
    tensors = [torch.tensor([[2.0, 1.0]]), torch.tensor([[-2.0, 1.0]])]
    mask = peft.calculate_majority_sign_mask(torch.stack(tensors))
    assert peft.disjoint_merge(torch.stack(tensors), mask).tolist() == [[2.0, 1.0]]
    assert ours("ties", tensors, density=1.0).tolist() == [[0.0, 1.0]]
