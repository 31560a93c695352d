"""What an instruction is made from: a ranking task over titles, or a question with Yes or No.

>>> ranking = Ranking("u1", ("green tea",), ("tea pot", "lamp"), target=0)
>>> ranking.best_first()
('tea pot', 'lamp')
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass

from common.errors import DataError


@dataclass(frozen=True)
class Ranking:
    """One user's `history` (titles, oldest first) and the `candidates` (titles) to be ranked for it.

    `target` is the position of the one relevant candidate, None where it is not known. Raises DataError
    where candidates are fewer than two, empty or not distinct, or where `target` is none of them.
    """

    user: str
    history: tuple[str, ...]
    candidates: tuple[str, ...]
    target: int | None

    def __post_init__(self) -> None:
        if len(self.candidates) < 2:
            raise DataError(
                f"a ranking has {len(self.candidates)} candidates, expected two or more",
                next_step="give it the relevant title and at least one other",
            )
        empty = next((n for n, title in enumerate(self.candidates) if not title.strip()), None)
        if empty is not None:
            raise DataError(
                f"candidate {empty} of a ranking is empty", next_step="leave items without title out"
            )
        title, times = Counter(map(title_key, self.candidates)).most_common(1)[0]
        if times > 1:
            where = [n for n, candidate in enumerate(self.candidates) if title_key(candidate) == title]
            raise DataError(
                f"candidates {where[0]} and {where[1]} of a ranking have the same title",
                next_step="an answer could not tell them apart: give one of them, or longer titles",
            )
        if self.target is not None and not 0 <= self.target < len(self.candidates):
            raise DataError(
                f"the target of a ranking is candidate {self.target}, there are {len(self.candidates)}"
            )

    def best_first(self) -> tuple[str, ...]:
        """The relevant title, then the others in their order. Raises DataError without a target."""
        if self.target is None:
            raise DataError("a ranking without a target has no answer", next_step="use labelled rankings")
        others = self.candidates[: self.target] + self.candidates[self.target + 1 :]
        return (self.candidates[self.target], *others)


@dataclass(frozen=True)
class YesNo:
    """A question about a user: `text` holds everything that it says, `answer` is None where unknown."""

    user: str
    text: str
    answer: bool | None


def cut_title(title: str, words: int) -> str:
    """The first `words` words (0: all), white space collapsed."""
    return " ".join(title.split()[: words or None])


def title_key(title: str) -> str:
    """What two equal titles share: letters without case, white space collapsed."""
    return " ".join(title.split()).casefold()
