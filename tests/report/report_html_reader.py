"""A strict reader of the page: tags must close in order; tables, attributes and texts are collected."""

from __future__ import annotations

from html.parser import HTMLParser

VOID = {"meta", "img", "input", "link", "br", "hr"}


class Page(HTMLParser):
    """`tables`: id -> rows of (text, values); `attributes`: (tag, name, value) of every tag; `text`: all visible text."""

    def __init__(self, source: str) -> None:
        super().__init__(convert_charrefs=True)
        self.open: list[str] = []
        self.attributes: list[tuple[str, str, str]] = []
        self.tables: dict[str, list[list[tuple[str, tuple[float, ...]]]]] = {}
        self.text = ""
        self._table: list[list[tuple[str, tuple[float, ...]]]] = []
        self.feed(source)
        self.close()
        assert not self.open, f"never closed: {self.open}"

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.attributes += [(tag, name, value or "") for name, value in attrs]
        if tag not in VOID:
            self.open.append(tag)
        values = dict(attrs)
        if tag == "table":
            self._table = self.tables.setdefault(str(values["id"]), [])
        elif tag == "tr":
            self._table.append([])
        elif tag in ("td", "th"):
            self._table[-1].append(("", tuple(map(float, (values.get("data-value") or "").split()))))

    def handle_endtag(self, tag: str) -> None:
        assert self.open and self.open[-1] == tag, f"</{tag}> closes {self.open[-1:]}"
        self.open.pop()

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] not in ("style", "script"):
            self.text += data
        if self.open and self.open[-1] in ("td", "th"):
            text, values = self._table[-1][-1]
            self._table[-1][-1] = (text + data, values)
