"""PCB-Merging: weigh every entry by its own size and by how it fits the other vectors; drop the light ones.

Du et al., "Parameter Competition Balancing for Model Merging", NeurIPS 2024, for N vectors of P entries:
1. intra-balancing: `intra_d = Softmax(N * Norm(tau_d * tau_d))`, entry by entry, softmax over the P entries;
2. inter-balancing: `inter_d = sum_j Softmax(Norm(tau_d * tau_j))`, j from 1 to N, d itself among them;
3. `beta_d = intra_d * inter_d`;
4. drop: keep the top `density` of `beta_d` over the whole vector (the paper's mask ratio r), zero the rest;
5. rescale: `tau = lambda sum_d beta_d tau_d / sum_d beta_d`, entry by entry.

The paper leaves `Norm` open. Here it is min-max over the whole product vector, as in the authors' code; a
product that is the same everywhere (a zero vector's) gets 0. Entries that equal the threshold are all kept.
A zero vector is a vector like any other: it has weight, and pulls towards the base.

The authors' code differs from their equations: `exp` without its denominator on squared min-max magnitudes,
`tanh` of `tau_d * sum_j tau_j` for step 2, weights shifted so that the lightest kept entry has none, and the
outermost 0.01% of magnitudes clipped. Here the paper's equations are computed; unlike `tanh` of a product
they do not depend on the scale of the vectors. The default density is the code's.

`beta_d` is computed as its logarithm plus a constant of each vector (the softmax denominators), so that no N
overflows; the constants come back where vectors are weighed against each other.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TypeVar

import numpy as np

from server.merging import Block, Density, Floats, Kernel, Unit, Vectors, Weight, merge_method
from server.merging._passes import in_shares, sample
from server.merging._select import largest
from server.merging._vectors import Doubles

T = TypeVar("T")


@merge_method(
    "pcb",
    paper="Du et al., NeurIPS 2024",
    equation="tau = lambda sum_d beta_d tau_d / sum_d beta_d, beta_d = top density of "
    "Softmax(N Norm(tau_d tau_d)) sum_j Softmax(Norm(tau_d tau_j))",
    splits=True,
)
def pcb(vectors: Vectors, *, density: Density = 0.1, lambda_: Weight = 1.0) -> Kernel:
    """Weigh each entry by its size and by its agreement with the other vectors; drop light ones; average.

    Needs nothing else. The slowest of the sparse methods: four passes over the files, and N * N exponentials
    for each parameter in most of them.
    """
    balance = _measure(vectors)
    threshold_N1 = largest(_Scores(vectors, balance), density)[:, None]

    def kernel(block: Block) -> Floats:
        weight_NX = balance.scores(block.tau_NX)
        dropped_NX = weight_NX < threshold_N1
        weight_NX -= balance.log_mean_N[:, None]
        weight_NX[dropped_NX] = -np.inf
        largest_X = weight_NX.max(0)
        weight_NX -= np.where(np.isfinite(largest_X), largest_X, np.float32(0))
        np.exp(weight_NX, out=weight_NX)
        total_X = weight_NX.sum(0)
        weight_NX *= np.float32(lambda_) / np.where(total_X > 0, total_X, np.float32(1))
        weight_NX *= block.tau_NX
        return weight_NX

    return kernel


@dataclass(frozen=True)
class _Balance:
    """What the softmaxes need of the whole vectors: `Norm(x) = (x - low) * scale` for each pair."""

    low_NN: Floats
    scale_NN: Floats
    share_NN: Floats  # 1 / mean(exp(Norm(tau_i tau_j))): Softmax = exp * share / P
    log_mean_N: Floats  # log(mean(exp(N Norm(tau_i tau_i))))

    def norms(self, tau_NX: Floats, vector: int, first: int = 0) -> Floats:
        """`Norm(tau_vector tau_j)` of one block, for j from `first`."""
        norm_NX: Floats = tau_NX[first:] * tau_NX[vector]
        norm_NX -= self.low_NN[vector, first:, None]
        norm_NX *= self.scale_NN[vector, first:, None]
        return norm_NX

    def scores(self, tau_NX: Floats) -> Floats:
        """`log beta` of one block [N, X] plus a constant of each vector, so that it is not negative."""
        score_NX = np.empty_like(tau_NX)
        for n in range(len(tau_NX)):
            norm_NX = self.norms(tau_NX, n)
            score_NX[n] = norm_NX[n] * np.float32(len(tau_NX)) + np.float32(1)
            np.exp(norm_NX, out=norm_NX)
            norm_NX *= self.share_NN[n, :, None]
            score_NX[n] += np.log(norm_NX.mean(0))  # at least -1: exp is at least 1, and its mean at most e
        return score_NX


@dataclass(frozen=True)
class _Scores:
    """The scores of vectors, as vectors of their own."""

    vectors: Vectors
    balance: _Balance

    @property
    def labels(self) -> Sequence[str]:
        return self.vectors.labels

    @property
    def shapes(self) -> Mapping[str, tuple[int, ...]]:
        return self.vectors.shapes

    def blocks(self, unit: Unit = "block") -> Iterator[Block]:
        return self._of(self.vectors.blocks(unit))

    def shares(self, look: Callable[[Iterator[Block]], T]) -> list[T]:
        return in_shares(self.vectors, lambda blocks: look(self._of(blocks)))

    def sample(self) -> Floats | None:
        runs_NRX = sample(self.vectors)
        if runs_NRX is None:
            return None
        return self.balance.scores(runs_NRX.reshape(len(runs_NRX), -1)).reshape(runs_NRX.shape)

    def values(self, vector: int) -> Iterator[tuple[str, Floats]]:
        return ((block.name, block.tau_NX[vector]) for block in self.blocks())

    def _of(self, blocks: Iterator[Block]) -> Iterator[Block]:
        return (replace(block, tau_NX=self.balance.scores(block.tau_NX)) for block in blocks)


def _measure(vectors: Vectors) -> _Balance:
    """Two passes: the smallest and largest product of each pair, then the mean exponentials."""
    count = len(vectors.labels)
    total = sum(math.prod(shape) for shape in vectors.shapes.values())

    def extremes(blocks: Iterator[Block]) -> tuple[Floats, Floats]:
        low_NN = np.full((count, count), np.inf, np.float32)
        high_NN = np.full((count, count), -np.inf, np.float32)
        for block in blocks:
            for n, tau_X in enumerate(block.tau_NX):
                product_NX = block.tau_NX[n:] * tau_X
                low_NN[n, n:] = np.minimum(low_NN[n, n:], product_NX.min(1))
                high_NN[n, n:] = np.maximum(high_NN[n, n:], product_NX.max(1))
        return low_NN, high_NN

    lows, highs = zip(*in_shares(vectors, extremes), strict=True)
    low_NN, high_NN = np.minimum.reduce(lows), np.maximum.reduce(highs)
    range_NN = np.where(high_NN > low_NN, high_NN - low_NN, np.inf)
    zeros_N = np.zeros(count, np.float32)
    norm = _Balance(_mirror(low_NN), _mirror((1 / range_NN).astype(np.float32)), zeros_N, zeros_N)

    def sums(blocks: Iterator[Block]) -> tuple[Doubles, Doubles]:
        inter_NN, intra_N = np.zeros((count, count)), np.zeros(count)
        for block in blocks:
            for n in range(count):
                norm_NX = norm.norms(block.tau_NX, n, n)
                intra = np.exp((norm_NX[0] - 1) * np.float32(count)).sum(dtype=np.float64)
                intra_N[n] += _on_grid(intra, total)
                inter_NN[n, n:] += _on_grid(np.exp(norm_NX).sum(1, dtype=np.float64), total)
        return inter_NN, intra_N

    inters, intras = zip(*in_shares(vectors, sums), strict=True)
    share_NN = _mirror((total / np.maximum(sum(inters), 1)).astype(np.float32))
    log_mean_N = np.log(sum(intras) / total) + count
    return _Balance(norm.low_NN, norm.scale_NN, share_NN, log_mean_N.astype(np.float32))


def _on_grid(sum_X: Doubles, total: int) -> Doubles:
    """Sums rounded to multiples so coarse that adding up `total` terms of at most e is exact in float64.

    So the result does not depend on the order, nor on how many processes share the blocks. What is lost is
    at most `total` / 2^49 a block.
    """
    shift = 3.0 * 2.0 ** (1 + math.ceil(math.log2(total)))  # ulp(shift) is the grid
    rounded: Doubles = (sum_X + shift) - shift
    return rounded


def _mirror(upper_NN: Floats) -> Floats:
    """The symmetric matrix with this upper triangle."""
    upper = np.triu(upper_NN)
    return np.where(np.tri(len(upper), k=-1, dtype=bool), upper.T, upper)
