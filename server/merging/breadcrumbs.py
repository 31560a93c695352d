"""Model Breadcrumbs: leave out the outliers and the small changes of each layer, add up the rest.

Davari and Belilovsky, "Model Breadcrumbs", ECCV 2024: `tau = lambda sum_d m_d tau_d`, where `m_d` is 0 in
each layer for the `gamma` share of entries with the largest magnitudes and the `beta` share with the
smallest, else 1.

A layer is a tensor here. Counts are rounded, and at least one entry of each tensor is kept. Entries that
equal the smallest or the largest kept magnitude are all kept, so that nothing depends on an arbitrary choice
among equals; a tensor whose magnitudes are all equal is kept whole.

Other tools: mergekit says `density = 1 - beta - gamma`, cuts its counts off, and drops a whole tensor where
`gamma` times its size is below 1. The authors' own code ranks within rows, the last axis of a tensor.
"""

from __future__ import annotations

import math

import numpy as np

from common.errors import ConfigError
from server.merging import Block, Floats, Kernel, Probability, Vectors, Weight, merge_method
from server.merging._passes import in_each


@merge_method(
    "breadcrumbs",
    paper="Davari and Belilovsky, ECCV 2024",
    equation="tau = lambda sum_d m_d tau_d, m_d = 1 from the beta to the 1 - gamma quantile of abs(tau_d) "
    "in each tensor",
    splits=True,
)
def breadcrumbs(
    vectors: Vectors, *, beta: Probability = 0.85, gamma: Probability = 0.01, lambda_: Weight = 0.3
) -> Kernel:
    """Drop the largest `gamma` and the smallest `beta` of each tensor's changes, add the vectors up.

    Needs nothing else. Two passes over the files: the first finds the borders, and each process holds one
    tensor of one vector at a time.
    Raises ConfigError where `beta + gamma` leaves nothing.
    """
    if beta + gamma >= 1:
        raise ConfigError(
            f"merge method 'breadcrumbs': beta {beta} and gamma {gamma} leave nothing",
            next_step="choose them so that their sum is below 1",
        )
    borders = in_each(vectors, lambda vector: _borders(vectors, vector, beta, gamma))

    def kernel(block: Block) -> Floats:
        borders_N2 = np.array([of[block.name] for of in borders], np.float32)
        tau_NX = block.tau_NX
        magnitude_NX = np.abs(tau_NX)
        tau_NX *= (magnitude_NX >= borders_N2[:, :1]) & (magnitude_NX <= borders_N2[:, 1:])
        tau_NX *= np.float32(lambda_)
        return tau_NX

    return kernel


def _borders(vectors: Vectors, vector: int, beta: float, gamma: float) -> dict[str, tuple[float, float]]:
    """The smallest and the largest kept magnitude of each tensor of one vector."""
    sizes = {name: math.prod(shape) for name, shape in vectors.shapes.items()}
    magnitude_X, filled = np.empty(max(sizes.values()), np.float32), 0
    borders: dict[str, tuple[float, float]] = {}
    for name, values_X in vectors.values(vector):
        np.abs(values_X, out=magnitude_X[filled : filled + len(values_X)])
        filled += len(values_X)
        if filled == sizes[name]:
            borders[name] = _cut(magnitude_X[:filled], beta, gamma)
            filled = 0
    return borders


def _cut(magnitude_X: Floats, beta: float, gamma: float) -> tuple[float, float]:
    """The smallest and the largest kept of one tensor's magnitudes, which it sorts in part."""
    size = len(magnitude_X)
    top = min(round(gamma * size), size - 1)
    bottom = min(round(beta * size), size - 1 - top)
    low, high = bottom, size - 1 - top
    magnitude_X.partition(low)  # one border after the other: numpy is far slower when asked for both at once
    above_X = magnitude_X[low:]
    above_X.partition(high - low)
    return float(magnitude_X[low]), float(magnitude_X[high])
