"""A page as a parser sees it, without a browser: well nested, and its text apart from its markup."""

from __future__ import annotations

from html.parser import HTMLParser

VOID = {"meta", "br"}
LOADING = {"script", "link", "img", "iframe", "object", "embed", "base", "form", "video", "audio"}


class Page(HTMLParser):
    """Checks nesting; keeps text, attributes and tables (rows of cell texts)."""

    def __init__(self, source: str) -> None:
        super().__init__()
        self.source, self.text = source, ""
        self.open: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.rows: list[list[str]] = []
        self.bold: list[str] = []
        self.feed(source)
        self.close()
        assert self.open == []

    def handle_starttag(self, name: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((name, dict(attrs)))
        if name not in VOID:
            self.open.append(name)
        if name == "tr":
            self.rows.append([])
        if name in ("td", "th"):
            self.rows[-1].append("")

    def handle_endtag(self, name: str) -> None:
        assert self.open.pop() == name

    def handle_data(self, data: str) -> None:
        if "style" in self.open:
            return
        self.text += data
        if {"td", "th"} & set(self.open):
            self.rows[-1][-1] += data
        if self.open[-1:] == ["b"] and "td" in self.open:
            self.bold.append(data)

    def labelled(self, start: str) -> list[list[str]]:
        return [row for row in self.rows if row and row[0].startswith(start)]

    def loads_nothing(self) -> bool:
        """Whether nothing in it can run, or fetch anything from anywhere, and links stay inside."""
        anchors = {attrs.get("id") for _, attrs in self.tags}
        links = {(attrs["href"] or "").removeprefix("#") for _, attrs in self.tags if "href" in attrs}
        return (
            {name for name, _ in self.tags}.isdisjoint(LOADING)
            and not any(key == "src" or key.startswith("on") for _, attrs in self.tags for key in attrs)
            and not any(text in self.source for text in ("http:", "https:", "url(", "@import"))
            and links <= anchors
        )
