"""What merge methods read: N task vectors over the same tensors, block by block.

`Vectors` is the one interface; `InMemory` holds arrays (the federation's admitted vectors), and
`server.engine.stream` reads them from model folders. Every block that a source gives out has been
checked: floating point, finite. Blocks have fixed borders (`block_values` from the start of each tensor),
so what is drawn for a block from a seed does not depend on who reads it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol

import numpy as np
import numpy.typing as npt

from common.errors import VectorError

Floats = npt.NDArray[np.float32]
Doubles = npt.NDArray[np.float64]
Solve = Callable[[Doubles, Floats], Floats]
Unit = Literal["block", "rows", "matrix", "tensor"]
BLOCK_VALUES = 1 << 16


def block_values(unit: Unit, name: str, shape: tuple[int, ...]) -> int:
    """How many values of a tensor one block holds, at most; 1 for an empty one.

    "block": `BLOCK_VALUES`. "rows": as many whole rows as that is (of all that stands behind the first
    axis; a tensor of one axis is one row), at least one. "matrix": the whole weight of a linear layer, and
    `BLOCK_VALUES` of any other tensor. "tensor": the whole tensor.
    """
    size = max(1, math.prod(shape))
    if unit == "tensor" or (unit == "matrix" and is_linear_weight(name, shape)):
        return size
    if unit == "rows":
        row = max(1, math.prod(shape[1:])) if len(shape) > 1 else size
        return min(size, row * max(1, BLOCK_VALUES // row))
    return min(size, BLOCK_VALUES)


def is_linear_weight(name: str, shape: tuple[int, ...]) -> bool:
    """Whether the tensor is the weight of a linear layer: two axes, neither of them 1, no embedding table."""
    from common.models.base import is_table  # takes long to import, and most methods ask for no matrix

    return len(shape) == 2 and min(shape) > 1 and not is_table(name)


@dataclass(frozen=True)
class Block:
    """Values `start` to `stop` of the flattened tensor `name` of every vector: `tau_NX` [N, X] float32.

    A kernel may write to `tau_NX`; the source does not read it again.
    """

    name: str
    shape: tuple[int, ...]
    start: int
    tau_NX: Floats
    labels: Sequence[str]

    @property
    def stop(self) -> int:
        return self.start + int(self.tau_NX.shape[1])

    @property
    def is_linear(self) -> bool:
        """Whether the block is the whole weight of a linear layer, as with the unit "matrix"."""
        return self.tau_NX.shape[1] == math.prod(self.shape) and is_linear_weight(self.name, self.shape)

    def matrices(self) -> Floats:
        """The block of a whole two-axis tensor as [N, R, C] (rows by columns: outputs by inputs)."""
        return self.tau_NX.reshape(-1, *self.shape)

    def random(self, seed: int, vector: int) -> np.random.Generator:
        """A generator for this block of this vector: it depends on seed, label, tensor and place alone."""
        from server.merging._draws import generator  # most methods draw nothing: spare them numpy.random

        return generator(seed, self.start, self.labels[vector], self.name)


class Vectors(Protocol):
    """N task vectors `tau_d = theta_d - theta_0` of the same tensors and shapes."""

    @property
    def labels(self) -> Sequence[str]:
        """What the vectors are called, in the order of axis N."""

    @property
    def shapes(self) -> Mapping[str, tuple[int, ...]]:
        """Shape of every tensor, in the order in which blocks come."""

    def blocks(self, unit: Unit = "block") -> Iterator[Block]:
        """Every value of every vector once, in blocks of `block_values`.

        A block's memory may be used again for the next one. Raises VectorError naming vector and tensor
        where a value is not finite.
        """

    def values(self, vector: int) -> Iterator[tuple[str, Floats]]:
        """Every value of one vector once, as (tensor, slice of it [X]) in blocks of `BLOCK_VALUES`."""


class Grams(Protocol):
    """`G_d = sum_x x x^T` of the inputs `x` of linear layers (pseudo-users': `server.learning.grams`)."""

    def get(self, tensor: str) -> Doubles | None:
        """[N, C, C] for the weight `tensor` [R, C], normalised to a mean over rows; None for any other.

        The inputs are those in each domain's own model.
        """

    def merge_in_order(self, solve: Solve) -> Mapping[str, Floats]:
        """`solve(gram_NCC, tau_NRC)` of every linear weight, front to back; its results [R, C] by name.

        The inputs of each layer are what the merged layers before it make of each domain's pseudo-users.
        """


class InMemory:
    """Vectors in memory: label -> tensor -> values; any float dtype that numpy knows."""

    def __init__(self, vectors: Mapping[str, Mapping[str, npt.NDArray[Any]]]) -> None:
        check_alike(
            {label: {n: (t.shape, t.dtype.name) for n, t in v.items()} for label, v in vectors.items()}
        )
        self._vectors = [dict(vector) for vector in vectors.values()]
        self._labels = list(vectors)
        self._shapes = {name: tuple(self._vectors[0][name].shape) for name in sorted(self._vectors[0])}

    @property
    def labels(self) -> Sequence[str]:
        return self._labels

    @property
    def shapes(self) -> Mapping[str, tuple[int, ...]]:
        return self._shapes

    def blocks(self, unit: Unit = "block") -> Iterator[Block]:
        for name, shape in self._shapes.items():
            flat = [vector[name].reshape(-1) for vector in self._vectors]
            step = block_values(unit, name, shape)
            for start in range(0, math.prod(shape), step):
                tau_NX = np.stack([values[start : start + step] for values in flat]).astype(np.float32)
                block = Block(name, shape, start, tau_NX, self._labels)
                check_finite(block)
                yield block

    def values(self, vector: int) -> Iterator[tuple[str, Floats]]:
        for name in self._shapes:
            flat = self._vectors[vector][name].reshape(-1)
            for start in range(0, len(flat), BLOCK_VALUES):
                yield name, flat[start : start + BLOCK_VALUES].astype(np.float32)


def check_alike(tables: Mapping[str, Mapping[str, tuple[tuple[int, ...], str]]]) -> None:
    """Refuse vectors (label -> tensor -> shape, dtype) that cannot be merged with each other.

    Raises VectorError naming the vector and the tensor that is missing, extra, misshapen or not a float.
    """
    if not tables:
        raise VectorError("no task vectors to merge", next_step="give at least one")
    first_label, first = next(iter(tables.items()))
    if not first:
        raise VectorError(f"task vector {first_label} has no tensors", next_step="send it again")
    for label, table in tables.items():
        if different := sorted(first.keys() ^ table.keys()):
            side = "has no" if different[0] in first else "has an extra"
            raise VectorError(
                f"task vector {label} {side} tensor {different[0]!r}",
                next_step="merge only vectors of the same base and the same trainable tensors",
            )
        for name, (shape, dtype) in table.items():
            if shape != first[name][0]:
                raise VectorError(
                    f"task vector {label}, tensor {name!r}: expected shape {list(first[name][0])}, "
                    f"got {list(shape)}",
                    next_step="merge only vectors of the same base",
                )
            if "float" not in dtype:
                raise VectorError(
                    f"task vector {label}, tensor {name!r}: expected floating point, got {dtype}",
                    next_step="leave tensors that are not trained out of the vector",
                )


def is_finite(values_X: Floats) -> bool:
    """Whether no value is NaN or infinite."""
    # a sum of squares is finite nearly always, and costs a fraction of looking at each value
    with np.errstate(over="ignore", invalid="ignore"):
        return math.isfinite(float(np.dot(values_X, values_X))) or bool(np.isfinite(values_X).all())


def check_finite(block: Block) -> None:
    """Raise VectorError where a value of the block is NaN or infinite."""
    for label, tau_X in zip(block.labels, block.tau_NX, strict=True):
        if not is_finite(tau_X):
            raise VectorError(
                f"task vector {label}, tensor {block.name!r}: holds NaN or infinite values",
                next_step="ask the domain to fine-tune again; its training diverged",
            )
