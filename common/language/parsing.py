"""Reading the candidates out of a generated answer: real models number, quote, repeat, cut and invent.

Each line is one entry. A line that holds several candidates' whole titles (a list on one line) counts for
each, in the order in which they occur. Otherwise a line names the candidate whose title it is after taking
off numbering, bullets, quotes, case, punctuation and white space; or which it begins (a title cut short, if
no other candidate begins so); or which it nearly is (`NEAR` of the letters, and nearer than to any other).
What names no candidate is made up and counted, and so is a repetition.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from difflib import SequenceMatcher

NEAR = 0.85  # share of equal letters from which on a misspelt title counts
MARGIN = 0.05  # by which it must be nearer than to the next candidate
SHORTEST_CUT = 4  # letters that a title cut short must still have
_MARK = re.compile(
    r"^\s*(?:[-*\u2022>#]+\s*|\(?\[?\d{1,3}[\])]?[.):]?\s+|\d{1,3}[.):]\s*|[\"'`\u201c\u2018*]+\s*)+"
)
_SYMBOL = re.compile(r"[\W_]+")


@dataclass(frozen=True)
class Parsed:
    """`order`: positions of the candidates named, best first, each once. The rest are counts of entries."""

    order: tuple[int, ...]
    made_up: int
    repeated: int

    @property
    def valid(self) -> bool:
        """Whether the answer names any candidate."""
        return bool(self.order)

    def rank(self, position: int, candidates: int) -> int:
        """The rank of a candidate, 1 = best; the last where it is not named (ties count against us)."""
        return self.order.index(position) + 1 if position in self.order else candidates


def parse_answer(text: str, candidates: Sequence[str]) -> Parsed:
    """The candidates that `text` names. Candidates are distinct (`Ranking` sees to it)."""
    keys = [_plain(title) for title in candidates]
    order: list[int] = []
    made_up = repeated = 0
    for line in text.splitlines():
        if not _plain(_MARK.sub("", line)) and not _plain(line):
            continue
        named = _named(line, keys)
        made_up += not named
        for position in named:
            if position in order:
                repeated += 1
            else:
                order.append(position)
    return Parsed(tuple(order), made_up, repeated)


def _named(line: str, keys: Sequence[str]) -> list[int]:
    forms = list(dict.fromkeys(form for form in (_plain(line), _plain(_MARK.sub("", line))) if form))
    for form in forms:
        if keys.count(form) == 1:
            return [keys.index(form)]
    inside = _inside(forms[0], keys)
    if inside:
        return inside
    for form in reversed(forms):
        begun = [position for position, key in enumerate(keys) if key.startswith(form)]
        if len(form) >= SHORTEST_CUT and len(begun) == 1:
            return begun
    near = _nearest(forms[-1], keys)
    return [] if near is None else [near]


def _inside(line: str, keys: Sequence[str]) -> list[int]:
    """Whole titles in the line at word borders, in order; a title inside a longer one gives way."""
    found: list[tuple[int, int, int]] = []
    for position, key in enumerate(keys):
        at = f" {line} ".find(f" {key} ") if key else -1
        if at >= 0:
            found.append((at, at + len(key), position))
    found = [
        own for own in found
        if not any(o[0] <= own[0] and own[1] <= o[1] and o[1] - o[0] > own[1] - own[0] for o in found)
    ]  # fmt: skip
    return [position for _, _, position in sorted(found)]


def _nearest(form: str, keys: Sequence[str]) -> int | None:
    ratios = []
    for position, key in enumerate(keys):
        matcher = SequenceMatcher(None, form, key, autojunk=False)
        if matcher.real_quick_ratio() >= NEAR - MARGIN and matcher.quick_ratio() >= NEAR - MARGIN:
            ratios.append((matcher.ratio(), position))
    ratios.sort(reverse=True)
    if not ratios or ratios[0][0] < NEAR:
        return None
    if len(ratios) > 1 and ratios[0][0] - ratios[1][0] < MARGIN:
        return None
    return ratios[0][1]


def _plain(text: str) -> str:
    """Letters and digits without case, everything else one space."""
    return " ".join(_SYMBOL.sub(" ", text.casefold()).split())
