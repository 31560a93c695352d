"""Reading the candidates out of a generated answer: real models number, quote, repeat, cut and invent.

Each line is one entry. It names the first of these that there is:

1. the candidate whose title it is, but for numbering, bullets, quotes, case, white space and a full stop;
2. the only candidate whose letters and digits it has;
3. the only candidate that it begins (a title cut short; `SHORTEST` letters at least);
4. every candidate whose whole title stands in it (a list on one line, a sentence), in that order;
5. the candidate that it nearly is (`NEAR` of the letters, and nearer than any other by `MARGIN`).

What names no candidate is made up and counted, and so is a repetition. Nothing is ever guessed between two.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from difflib import SequenceMatcher

from common.language.records import title_key

NEAR, MARGIN = 0.85, 0.05
SHORTEST = 4
_MARK = re.compile(
    r"(?:[-*#>\u2022\u2013]+|\(\d{1,3}\)|\[\d{1,3}\]|\d{1,3}[.):])(?:\s+|\Z)|[*_\"'`\u201c\u2018\u201e]+"
)
_TAIL = re.compile(r"[\s.,;*_\"'`\u201d\u2019\u201c\u2026]+\Z")
_SIGNS = re.compile(r"[\W_]+")


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
    titles = [title_key(title) for title in candidates]
    letters = [_letters(title) for title in candidates]
    order: list[int] = []
    made_up = repeated = 0
    for line in text.splitlines():
        forms = _undressed(line)
        named = _named([form for form in forms if form], titles, letters)
        made_up += not named and bool(_letters(forms[-1]))
        for position in named:
            if position in order:
                repeated += 1
            else:
                order.append(position)
    return Parsed(tuple(order), made_up, repeated)


def _undressed(line: str) -> list[str]:
    """The line, then without one mark after the other at its beginning, each also without quotes at its end.

    The last form is what is left: empty where the line is nothing but marks.
    """
    forms: list[str] = []
    rest = line.strip()
    while rest:
        forms += [title_key(rest), title_key(_TAIL.sub("", rest))]
        mark = _MARK.match(rest)
        if mark is None:
            return forms
        rest = rest[mark.end() :].lstrip()
    return [*forms, ""]


def _named(forms: list[str], titles: list[str], letters: list[str]) -> list[int]:
    for form in forms:
        if form in titles:
            return [titles.index(form)]
    plain = [form for form in dict.fromkeys(map(_letters, forms)) if form]
    for form in plain:
        if letters.count(form) == 1:
            return [letters.index(form)]
    begun: list[int] = []
    for form in plain:
        begun = [position for position, key in enumerate(letters) if key.startswith(form)]
        if len(form) >= SHORTEST and len(begun) == 1:
            return begun
    if not plain or begun:  # what begins several titles tells none of them
        return []
    return _inside(plain[0], letters) or _nearest(plain[-1], letters)


def _inside(line: str, letters: list[str]) -> list[int]:
    """Whole titles in the line at word borders, in order; a title inside a longer one gives way."""
    found: list[tuple[int, int, int]] = []
    for position, key in enumerate(letters):
        if len(key) >= SHORTEST and letters.count(key) == 1:
            at = [match.start() for match in re.finditer(rf"(?<!\S){re.escape(key)}(?!\S)", line)]
            found += [(start, start + len(key), position) for start in at]
    apart = [
        (start, position)
        for start, end, position in found
        if not any(a <= start and end <= b and b - a > end - start for a, b, _ in found)
    ]
    return list(dict.fromkeys(position for _, position in sorted(apart)))


def _nearest(form: str, letters: list[str]) -> list[int]:
    ratios = []
    for position, key in enumerate(letters):
        matcher = SequenceMatcher(None, form, key, autojunk=False)
        if matcher.real_quick_ratio() >= NEAR - MARGIN and matcher.quick_ratio() >= NEAR - MARGIN:
            ratios.append((matcher.ratio(), position))
    ratios.sort(reverse=True)
    if not ratios or ratios[0][0] < NEAR or (len(ratios) > 1 and ratios[0][0] - ratios[1][0] < MARGIN):
        return []
    return [ratios[0][1]]


def _letters(text: str) -> str:
    """Letters and digits without case, everything else one space."""
    return " ".join(_SIGNS.sub(" ", text.casefold()).split())
