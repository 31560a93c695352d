"""What may say how good a candidate is: one interface, three sources."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Protocol

from common.language.pool import Candidate


class Fitness(Protocol):
    """Scores candidates. Losses only: neither parameters nor gradients pass through here."""

    @property
    def key(self) -> Mapping[str, Any]:
        """What the losses follow from, as JSON: an interrupted search goes on only with the same key."""

    def losses(self, candidates: Sequence[Candidate]) -> Sequence[float]:
        """One loss for each candidate, lower is better; NaN where there is none."""
