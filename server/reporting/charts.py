"""What only the run's report draws: bars and line charts."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence

from common.pages import Html, number, tag

WIDTH, HEIGHT, LEFT, TOP, BOTTOM = 420, 200, 46, 10, 24  # of a chart, in SVG units
COLOURS = 10
MOST_POINTS = 120

Points = list[tuple[float, float]]


def bars(rows: Sequence[tuple[str, float, bool]], digits: int) -> Html:
    """Label, bar from zero and number a row; the third field marks the one that the reader looks for."""
    most = max((value for _, value, _ in rows), default=0.0) or 1.0
    cells: list[Html] = []
    for label, value, marked in rows:
        width = f"--w:{max(0.0, 100 * value / most):.2f}%"
        text = "b" if marked else "span"
        bar = tag("span", tag("i", style=width, class_="own" if marked else ""))
        cells += [tag(text, label), bar, tag(text, number(value, digits))]
    return tag("div", *cells, class_="bars")


def legend(names: Sequence[str], shown: Collection[str]) -> Html:
    """Which line is whose: the order of `names` gives the colours, as in `chart`; `shown` have a line."""
    keys = (
        tag(
            "span",
            tag(
                "svg", tag("path", d="M1 5H23", class_=_style(index)), viewBox="0 0 24 10", aria_hidden="true"
            ),
            name,
        )
        for index, name in enumerate(names)
        if name in shown
    )
    return tag("div", *keys, class_="legend")


def chart(title: str, curves: Mapping[str, Points], names: Sequence[str]) -> Html:
    """Lines over steps as SVG; nothing when there are no two points. A curve not in `names` is plain ink."""
    points = [point for curve in curves.values() for point in curve]
    if not any(len(curve) > 1 for curve in curves.values()):
        return Html("")
    x_lo, x_hi = min(x for x, _ in points), max(x for x, _ in points)
    y_ticks, digits = _ticks(min(y for _, y in points), max(y for _, y in points))
    y_lo, y_hi = y_ticks[0], y_ticks[-1]

    def place(x: float, y: float) -> tuple[float, float]:
        across = (x - x_lo) / ((x_hi - x_lo) or 1.0) * (WIDTH - LEFT - 12)
        return LEFT + across, TOP + (y_hi - y) / (y_hi - y_lo) * (HEIGHT - TOP - BOTTOM)

    parts: list[Html] = []
    for tick in y_ticks:
        height = place(x_lo, tick)[1]
        parts.append(tag("path", d=f"M{LEFT} {height:.1f}H{WIDTH - 8}", class_="grid"))
        parts.append(tag("text", f"{tick:.{digits}f}", x=LEFT - 6, y=f"{height + 4:.1f}", text_anchor="end"))
    for x, anchor in ((x_lo, "start"), (x_hi, "end")):
        parts.append(tag("text", f"{x:.0f}", x=f"{place(x, y_lo)[0]:.1f}", y=HEIGHT - 6, text_anchor=anchor))
    for name, curve in curves.items():
        line = " ".join(f"{x:.1f},{y:.1f}" for x, y in (place(*point) for point in _thin(curve)))
        style = _style(list(names).index(name)) if name in names else "line kx"
        parts.append(tag("polyline", tag("title", name or title), points=line, class_=style))
    picture = tag("svg", *parts, viewBox=f"0 0 {WIDTH} {HEIGHT}", role="img", aria_label=title)
    return tag("figure", tag("figcaption", title), picture)


def smooth(points: Points) -> Points:
    """Means over neighbours, at most `MOST_POINTS` of them, for a curve that is mostly noise."""
    width = math.ceil(len(points) / MOST_POINTS) or 1
    parts = [points[start : start + width] for start in range(0, len(points), width)]
    return [(part[-1 if i else 0][0], sum(y for _, y in part) / len(part)) for i, part in enumerate(parts)]


def _thin(points: Points) -> Points:
    """Every n-th point and the last."""
    return [*points[: -1 : math.ceil(len(points) / MOST_POINTS)], points[-1]] if points else []


def _style(index: int) -> str:
    return f"line k{index % COLOURS} dash{index // COLOURS % 3}"


def _ticks(low: float, high: float) -> tuple[list[float], int]:
    """Three to seven round numbers around low..high, and the decimals that they need."""
    span = (high - low) or abs(high) or 1.0
    power = math.floor(math.log10(span / 4))
    step = next(f * 10.0**power for f in (1, 2, 5, 10) if f * 10.0**power >= span / 4)
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    last = max(last, first + 1)
    return [index * step for index in range(first, last + 1)], max(0, -math.floor(math.log10(step) + 1e-9))
