"""Looks at all vectors before a merge: by several processes, or at a sample alone, where the source can."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Protocol, TypeVar, runtime_checkable

from server.merging._vectors import Block, Floats, Vectors

T = TypeVar("T")


@runtime_checkable
class Sampled(Protocol):
    """Vectors that can give a sample of themselves without a whole pass."""

    def sample(self) -> Floats | None:
        """Values of every vector in runs of neighbours at even distances, [N, runs, values]; or None."""


@runtime_checkable
class Shared(Protocol):
    """Vectors whose blocks several processes can read."""

    def shares(self, look: Callable[[Iterator[Block]], T]) -> list[T]:
        """What `look` finds in each share of the blocks, which together are all of them, in their order."""


@runtime_checkable
class Dealt(Protocol):
    """Vectors of which several processes can read one each."""

    def each(self, look: Callable[[int], T]) -> list[T]:
        """What `look` finds in each vector, in their order."""


def sample(vectors: Vectors) -> Floats | None:
    """A sample of the vectors, [N, runs, values]; None where the source has none."""
    return vectors.sample() if isinstance(vectors, Sampled) else None


def in_shares(vectors: Vectors, look: Callable[[Iterator[Block]], T]) -> list[T]:
    """What `look` finds in each share of the blocks, in their order; how many shares is up to the source."""
    return vectors.shares(look) if isinstance(vectors, Shared) else [look(vectors.blocks())]


def in_each(vectors: Vectors, look: Callable[[int], T]) -> list[T]:
    """What `look` finds in each vector, in their order."""
    if isinstance(vectors, Dealt):
        return vectors.each(look)
    return [look(vector) for vector in range(len(vectors.labels))]
