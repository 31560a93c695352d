"""Task vectors that are made when a merge method asks for them, one tensor of each at a time."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence

from server.merging import Block, Floats, InMemory, Unit


class Lazy:
    """`server.merging.Vectors` whose tensor `name` of vector `n` is `read(n, name)`."""

    def __init__(
        self,
        labels: Sequence[str],
        shapes: Mapping[str, tuple[int, ...]],
        read: Callable[[int, str], Floats],
    ) -> None:
        self.labels = labels
        self.shapes = shapes
        self._read = read

    def blocks(self, unit: Unit = "block") -> Iterator[Block]:
        for name in self.shapes:
            tensors = {label: {name: self._read(n, name)} for n, label in enumerate(self.labels)}
            yield from InMemory(tensors).blocks(unit)

    def values(self, vector: int) -> Iterator[tuple[str, Floats]]:
        for name in self.shapes:
            yield from InMemory({self.labels[vector]: {name: self._read(vector, name)}}).values(0)
