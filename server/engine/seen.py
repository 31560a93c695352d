"""What a merge notices of its vectors while it reads them, and says at the end: nothing is read for it.

Norms are taken of a sample of the blocks. Whether a vector is zero, or equals another, is looked for until it
is settled that none is and none does, which is mostly in the first block.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from server.merging._vectors import Floats

FAR = 0.5  # of the base's norm: fine-tuning moves a model by a few percent, another base lies 100% away


@dataclass
class Seen:
    """Of N vectors, over all passes so far."""

    changed_N: list[bool]  # whether there is a value other than zero
    print_N: list[int]  # equal vectors have equal prints
    squares_N: list[float]  # the sum of a vector's squares in the sample
    base_squares: float

    @classmethod
    def nothing(cls, count: int) -> Seen:
        return cls([False] * count, [0] * count, [0.0] * count, 0.0)

    @property
    def is_settled(self) -> bool:
        """Whether no vector is zero and no two are equal, whatever else is read."""
        return all(self.changed_N) and len(set(self.print_N)) == len(self.print_N)

    def add(self, vector: int, tau_X: Floats, squares: float, in_sample: bool = True) -> None:
        """A block of a vector, and the sum of its squares (which may be 0 for tiny values)."""
        self.changed_N[vector] = self.changed_N[vector] or squares > 0 or bool(tau_X.any())
        self.print_N[vector] = hash((self.print_N[vector], squares))
        if in_sample:
            self.squares_N[vector] += squares

    def followed_by(self, parts: Sequence[Seen]) -> Seen:
        """With what others noticed in the blocks after these."""
        total = Seen(list(self.changed_N), list(self.print_N), list(self.squares_N), self.base_squares)
        for part in parts:
            for vector, mark in enumerate(part.print_N):
                total.changed_N[vector] = total.changed_N[vector] or part.changed_N[vector]
                total.print_N[vector] = hash((total.print_N[vector], mark))
                total.squares_N[vector] += part.squares_N[vector]
            total.base_squares += part.base_squares
        return total

    def warnings(self, labels: Sequence[str], weight_N: Sequence[float]) -> list[str]:
        """Zero vectors, equal vectors, and models that seem to be of another base."""
        found = []
        first: dict[int, str] = {}
        for label, weight, changed, mark in zip(labels, weight_N, self.changed_N, self.print_N, strict=True):
            other = first.setdefault(mark, label)
            if not changed:
                why = "equals the base" if weight else "has weight 0"
                found.append(f"{label} {why}: its task vector is zero and counts as one")
            elif other != label:
                found.append(f"{label} and {other} have the same weights; they count twice")
        for label, weight, squares in zip(labels, weight_N, self.squares_N, strict=True):
            if squares > self.base_squares * (FAR * weight) ** 2 > 0:
                far = math.sqrt(squares / self.base_squares) / abs(weight)
                found.append(
                    f"{label} lies {far:.0%} of the base's norm away from the base: "
                    "was it fine-tuned from this one?"
                )
        return found
