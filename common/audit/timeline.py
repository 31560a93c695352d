"""When what crossed, drawn as one inline SVG that needs no script.

Time runs from left to right; long idle stretches are cut out and marked. Every lane belongs to one domain
and one direction. A mark stands for the messages of one kind in one of `BINS` slices of the time, so that
a hundred messages and a hundred thousand give a picture of the same size. Positions are per cent of the
width: the text stays readable on a narrow screen.
"""

from __future__ import annotations

import math
import time
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from itertools import pairwise

from common.audit.words import KINDS
from common.pages import Html, cut, join, size, tag

BINS = 72
MOST_LANES = 60
IDLE_S = 3600  # a shorter pause is never cut out
MOST_CUTS = 6
LABEL_Y, STRIP_Y, STRIP, LANE = 13, 20, 56, 90  # of a lane, in pixels
PARCELS_Y = 18  # in the strip; receipts and messages have lines of their own below
_LINES = {"receipt": 39, "message": 49}
TICKS = 5
_STEPS_S = (1, 2, 5, 10, 15, 30, 60, 120, 300, 600, 900, 1800, 3600, 7200, 10800, 21600, 43200, 86400)
LATEST_S = 253_402_300_799  # the end of the year 9999: what a clock may say and a page can show
_SHAPES = {
    "domain-card": "M-.85-.85H.85V.85H-.85Z",
    "catalog": "M0-1.2L1.2 0 0 1.2-1.2 0Z",
    "task-vector": "M-1 0A1 1 0 1 0 1 0A1 1 0 1 0-1 0Z",
    "metrics": "M0-1.15L1.1.8H-1.1Z",
    "fitness": "M0 1.15L1.1-.8H-1.1Z",
    "candidate": "M-1.1 0L-.55-.95H.55L1.1 0 .55.95H-.55Z",
    "universal-model": "M0-1.2L.35-.4 1.2-.35.55.2.75 1.05 0 .6-.75 1.05-.55.2-1.2-.35-.35-.4Z",
    "revocation": "M-.35-1.1H.35V-.35H1.1V.35H.35V1.1H-.35V.35H-1.1V-.35H-.35Z",
    "receipt": "M-.9.05L-.4-.45-.1-.1.55-.85 1-.35-.1.85Z",
    "message": "M-1-.3H1V.3H-1Z",
}
_OTHER = "M-1-1L1-1 0 1.1Z"


@dataclass(frozen=True)
class Dot:
    """One message on a lane; `found`: there is a finding at its entry."""

    time_s: int
    kind: str
    size_bytes: int
    found: bool = False


@dataclass
class Lane:
    """All that one domain sent, or all that it received."""

    name: str
    dots: list[Dot] = field(default_factory=list)

    @property
    def bytes(self) -> int:
        return sum(dot.size_bytes for dot in self.dots)


class Axis:
    """Where a time is, from 0 (left) to 1, among the times that occur."""

    def __init__(self, times: Iterable[int]) -> None:
        """`times` in Unix seconds, at least one. The longest idle stretches are cut out of the axis."""
        known = sorted(set(times))
        remaining = known[-1] - known[0]
        self.cuts: list[tuple[int, int]] = []
        for start, end in sorted(pairwise(known), key=lambda pair: pair[0] - pair[1])[:MOST_CUTS]:
            if end - start < IDLE_S or 3 * (end - start) < remaining:
                break
            remaining -= end - start
            self.cuts.append((start, end))
        self.cuts.sort()
        starts = [known[0], *(end for _, end in self.cuts)]
        ends = [*(start for start, _ in self.cuts), known[-1]]
        self.pieces = list(zip(starts, ends, strict=True))
        self._pad = max(remaining / 25, 1.0)  # left and right of every piece
        self._whole = remaining + 2 * self._pad * len(self.pieces)

    def place(self, time_s: float) -> float:
        """Where `time_s` is; what lies in a cut or outside is put at the nearest edge."""
        passed = self._pad
        for start, end in self.pieces:
            if time_s <= end:
                return (passed + max(0.0, time_s - start)) / self._whole
            passed += end - start + 2 * self._pad
        return (self._whole - self._pad) / self._whole

    def ticks(self) -> list[int]:
        """Round moments to label: about `TICKS` in all, and the start of a piece that would have none."""
        found: list[int] = []
        for start, end in self.pieces:
            wanted = max(1, round(TICKS * (end - start) / self._whole))
            step = _step((end - start) / wanted)
            first = -(-start // step) * step
            found += range(first, end + 1, step) if first <= end else [start]
        return found


def timeline(lanes: Sequence[Lane]) -> Html:
    """The figure with its legend; a sentence where nothing is recorded."""
    filled = [lane for lane in lanes if lane.dots]
    if not filled:
        return tag("p", "There is nothing to draw: no entry could be read.")
    kept = {id(lane) for lane in sorted(filled, key=lambda lane: -lane.bytes)[:MOST_LANES]}
    shown = [lane for lane in filled if id(lane) in kept]
    axis = Axis(dot.time_s for lane in shown for dot in lane.dots)
    height = len(shown) * LANE + 40
    tops = [n * LANE for n in range(len(shown))]
    strips = (tag("rect", y=top + STRIP_Y, width="100%", height=STRIP, rx=4, class_="strip") for top in tops)
    parts = [
        *strips,
        _scale(axis, height),
        *(_lane(lane, axis, top) for lane, top in zip(shown, tops, strict=True)),
    ]
    first, last = axis.pieces[0][0], axis.pieces[-1][1]
    span = _span(first, last)
    label = f"Timeline of {len(shown)} lanes, {span}"
    picture = tag("svg", *parts, width="100%", height=height, role="img", aria_label=label, class_="timeline")
    notes = [f"{span}, by the clocks of the parties."]
    if axis.cuts:
        notes.append("Dashed lines stand for pauses that are left out.")
    if len(shown) < len(filled):
        notes.append(f"Drawn are the {len(shown)} lanes with the most bytes, of {len(filled)}.")
    return tag("figure", _legend(shown), picture, tag("figcaption", " ".join(notes)))


def mark(kind: str, radius: float = 5.0) -> Html:
    """The sign of a kind, drawn around 0, 0."""
    style = list(_SHAPES).index(kind) if kind in _SHAPES else "x"
    return tag("path", d=_SHAPES.get(kind, _OTHER), transform=f"scale({radius:.1f})", class_=f"mark f{style}")


def sign(kind: str) -> Html:
    """The sign of a kind as a small picture of its own, beside its name."""
    return tag("svg", mark(kind, 5.5), viewBox="-8 -8 16 16", class_="sign", aria_hidden="true")


def named(kind: str) -> Html:
    """A kind with its sign before it."""
    return join(sign(kind), cut(kind))


def moment(time_s: int) -> str:
    """A time as a reader says it.

    >>> moment(0)
    '1 Jan 1970, 00:00 UTC'
    """
    at = time.gmtime(min(time_s, LATEST_S))
    return f"{at.tm_mday} {time.strftime('%b %Y, %H:%M', at)} UTC"


def _lane(lane: Lane, axis: Axis, top: int) -> Html:
    bins: dict[int, dict[str, list[Dot]]] = defaultdict(lambda: defaultdict(list))
    for dot in lane.dots:
        bins[int(axis.place(dot.time_s) * BINS)][dot.kind].append(dot)
    marks = [drawn for kinds in bins.values() for drawn in _stack(kinds, axis, top + STRIP_Y)]
    count = len(lane.dots)
    said = f"{count:,} message{'s' * (count != 1)}, {size(lane.bytes)}"
    return join(
        tag("text", lane.name, x=0, y=top + LABEL_Y, class_="name"),
        tag("text", said, x="100%", y=top + LABEL_Y, text_anchor="end"),
        *(picture for _, picture in sorted(marks, key=lambda drawn: drawn[0])),
    )


def _stack(kinds: dict[str, list[Dot]], axis: Axis, top: int) -> list[tuple[float, Html]]:
    """The marks of one slice of time, parcels one above the other, with the order to draw them in."""
    parcels = sorted(kind for kind in kinds if kind not in _LINES)
    apart = min(13.0, (2 * PARCELS_Y - 8) / max(1, len(parcels) - 1))
    rows = {kind: PARCELS_Y + apart * (n - (len(parcels) - 1) / 2) for n, kind in enumerate(parcels)}
    drawn = []
    for kind, y in (rows | {kind: y for kind, y in _LINES.items() if kind in kinds}).items():
        dots = kinds[kind]
        total = sum(dot.size_bytes for dot in dots)
        radius = 4.0 if kind in _LINES else _radius(total)
        x = sum(axis.place(dot.time_s) for dot in dots) / len(dots)
        when = _span(min(dot.time_s for dot in dots), max(dot.time_s for dot in dots))
        said = tag("title", f"{len(dots):,} {kind}, {size(total)}, {when}")
        where = {"x": f"{100 * x:.2f}%", "y": f"{top + y:.1f}"}
        drawn.append((-radius, tag("svg", said, mark(kind, radius), **where)))
        if any(dot.found for dot in dots):
            ring = tag("circle", r=f"{radius + 4:.1f}", class_="ring")
            drawn.append((1.0, tag("svg", said, ring, **where)))
    return drawn


def _scale(axis: Axis, height: int) -> Html:
    """Labelled ticks below the lanes, and a dashed line where a pause is left out."""
    parts: list[Html] = []
    bottom, day, right = height - 36, "", -1.0
    seconds = any(tick % 60 for tick in axis.ticks())
    for tick in axis.ticks():
        place = axis.place(tick)
        at = time.gmtime(tick)
        clock = time.strftime("%H:%M:%S" if seconds else "%H:%M", at)
        date = f"{at.tm_mday} {time.strftime('%b', at)}" + (f" {at.tm_year}" if not day else "")
        x = f"{100 * place:.2f}%"
        parts.append(tag("line", x1=x, x2=x, y1=0, y2=bottom + 4, class_="grid"))
        if place - right < 0.13:
            continue  # no room for another label
        anchor = "start" if place < 0.08 else "end" if place > 0.92 else "middle"
        parts.append(tag("text", clock, x=x, y=bottom + 18, text_anchor=anchor))
        if date.split()[:2] != day.split()[:2]:
            parts.append(tag("text", date, x=x, y=bottom + 33, text_anchor=anchor))
        day, right = date, place
    for start, end in axis.cuts:
        x = f"{50 * (axis.place(start) + axis.place(end)):.2f}%"
        said = tag("title", f"{_duration(end - start)} without any message")
        parts.append(tag("line", said, x1=x, x2=x, y1=0, y2=bottom + 4, class_="cut"))
    return join(*parts)


def _legend(lanes: Sequence[Lane]) -> Html:
    used = {dot.kind for lane in lanes for dot in lane.dots}
    keys = [tag("li", sign(kind), kind) for kind in KINDS if kind in used]
    if not used <= set(KINDS):
        keys.append(tag("li", sign(""), "of no known kind"))
    if any(dot.found for lane in lanes for dot in lane.dots):
        ring = tag(
            "svg",
            tag("circle", r=6.5, class_="ring"),
            viewBox="-8 -8 16 16",
            class_="sign",
            aria_hidden="true",
        )
        keys.append(tag("li", ring, "with a finding"))
    for example in (1e3, 1e6, 1e9):
        dot = tag("circle", r=f"{_radius(example):.1f}", class_="sample")
        keys.append(
            tag(
                "li",
                tag("svg", dot, viewBox="-11 -11 22 22", class_="sample", aria_hidden="true"),
                size(example),
            )
        )
    return tag("ul", *keys, class_="legend")


def _radius(size_bytes: float) -> float:
    """By the logarithm: 4 pixels for 100 bytes, and 0.9 for every factor of ten."""
    return 4 + 0.9 * min(8.0, max(0.0, math.log10(max(size_bytes, 1)) - 2))


def _step(seconds: float) -> int:
    """The round step that is at least so long."""
    for step in _STEPS_S:
        if step >= seconds:
            return step
    days = math.ceil(seconds / 86400)
    power = int(10 ** (len(str(days)) - 1))
    return 86400 * next(factor * power for factor in (1, 2, 5, 10) if factor * power >= days)


def _span(first: int, last: int) -> str:
    start, end = moment(first), moment(last)
    return start if start == end else f"{start} to {end}"


def _duration(seconds: int) -> str:
    for unit, factor in (("years", 365 * 86400), ("days", 86400), ("hours", 3600)):
        if seconds >= 2 * factor:
            return f"{seconds // factor:,} {unit}"
    return f"{seconds // 60} minutes"
