"""Pages that one file holds: escaped markup, tables, and a frame that loads nothing from anywhere.

All markup goes through `tag`, which escapes every text and attribute that is not `Html` already.

    >>> tag("td", "<b>", class_="x")
    '<td class="x">&lt;b&gt;</td>'

`page` adds the style that all our pages share (`page.css`) and a content security policy under which a
browser would run no script and fetch nothing, were there any.
"""

from __future__ import annotations

import html
import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from string import Template
from typing import Any, TypeGuard

DASH = "\N{EN DASH}"
FRAME = Path(__file__).parent
MOST_TEXT = 120


class Html(str):
    """Text that is markup already."""

    __slots__ = ()


def tag(name: str, *children: object, **attributes: object) -> Html:
    """An element. Empty attributes are left out; `class_` is `class`, `data_x` is `data-x`."""
    given = "".join(
        f' {key.rstrip("_").replace("_", "-")}="{html.escape(str(value))}"'
        for key, value in attributes.items()
        if value not in ("", None)
    )
    return Html(f"<{name}{given}>" if name == "br" else f"<{name}{given}>{join(*children)}</{name}>")


def join(*children: object) -> Html:
    """The children one after the other, escaped unless they are markup."""
    return Html("".join(c if isinstance(c, Html) else html.escape(str(c)) for c in children))


def page(title: str, css: str, body: Html, banner: Html | str = "") -> str:
    """A whole document: `css` comes after the style that all pages share, `banner` before `body`."""
    template = Template((FRAME / "page.html").read_text(encoding="utf-8"))
    style = (FRAME / "page.css").read_text(encoding="utf-8") + css
    return template.substitute(title=html.escape(title), css=style, banner=join(banner), body=body)


def table(
    head: Sequence[Html], rows: Iterable[Html], class_: str = "", caption: object = "", label: str = ""
) -> Html:
    """A table that scrolls sideways where it is too wide, also by keyboard.

    It needs a name: a `caption`, or a `label` that is not shown where a heading says it already.
    """
    named = tag("caption", caption) if caption else ""
    parts = (named, tag("thead", tag("tr", *head)), tag("tbody", *rows))
    whole = tag("table", *parts, class_=class_, aria_label=label)
    return tag("div", whole, class_="scroll", tabindex=0)


def finite(value: Any) -> TypeGuard[float]:
    """Whether `value` is a number that can be shown."""
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def number(value: Any, digits: int) -> str:
    """`value` with so many decimals, or a dash."""
    return f"{value:,.{digits}f}" if finite(value) else DASH


def size(value: Any) -> str:
    """Bytes in decimal units, or a dash."""
    if not finite(value):
        return DASH
    for unit, factor in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if value >= factor:
            return f"{value / factor:.1f} {unit}"
    return f"{value:.0f} B"


def digest(value: object) -> Html:
    """The first twelve digits; the whole digest appears on pointing at it."""
    text = str(value or "")
    return tag("code", text[:12] + "…" if len(text) > 12 else text or DASH, title=text)


def row(cells: Iterable[object]) -> Html:
    """A row of a table; its first cell names it."""
    first, *others = cells
    return tag("tr", tag("th", first, scope="row"), *(tag("td", cell) for cell in others))


def columns(names: Iterable[str]) -> list[Html]:
    """The head of a table."""
    return [tag("th", name, scope="col") for name in names]


def facts(values: Mapping[str, object]) -> Html:
    """A list of names and what they stand for."""
    pairs = (join(tag("dt", name), tag("dd", value)) for name, value in values.items())
    return tag("dl", *pairs, class_="facts")


def cut(text: str, most: int = MOST_TEXT) -> str:
    """Text of unknown length, not longer than a page can bear."""
    return text if len(text) <= most else text[: most - 1] + "…"


def count(number: int, one: str, many: str = "") -> str:
    """How many of what.

    >>> count(1, "entry", "entries"), count(1200, "entry", "entries"), count(0, "finding")
    ('1 entry', '1,200 entries', '0 findings')
    """
    return f"{number:,} {one if number == 1 else many or one + 's'}"


def listed(names: Sequence[str]) -> str:
    """Names with commas, and "and" before the last."""
    return " and ".join([", ".join(names[:-1]), names[-1]]) if len(names) > 1 else "".join(names)
