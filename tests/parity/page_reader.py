"""Reads a page as a browser would, and fails on what a browser would forgive."""

from html.parser import HTMLParser
from pathlib import Path

_VOID = {"meta", "br", "hr", "img", "link", "input"}


class PageReader(HTMLParser):
    """A page taken apart.

    Attributes:
        elements: tag and attributes of every element, in order.
        texts: the text of every element that is no <style>, whole, in the order in which they end.
        rows: the texts of the cells of every row of a table.
    """

    def __init__(self, markup: str) -> None:
        super().__init__(convert_charrefs=True)
        self.elements: list[tuple[str, dict[str, str]]] = []
        self.texts: list[str] = []
        self.rows: list[list[str]] = []
        self._open: list[tuple[str, list[str]]] = []
        self.feed(markup)
        self.close()
        assert not self._open, f"never closed: {self._open}"

    @classmethod
    def of(cls, path: Path) -> "PageReader":
        return cls(path.read_text(encoding="utf-8"))

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        assert len({name for name, _ in attrs}) == len(attrs), f"<{tag}> has an attribute twice: {attrs}"
        self.elements.append((tag, {name: value or "" for name, value in attrs}))
        if tag == "tr":
            self.rows.append([])
        if tag not in _VOID:
            self._open.append((tag, []))

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, attrs)
        if tag not in _VOID:
            self.handle_endtag(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self._open and self._open[-1][0] == tag, f"</{tag}> closes {self._open[-1:]}"
        _, parts = self._open.pop()
        if tag != "style":
            self.texts.append("".join(parts))
        if tag in ("td", "th"):
            self.rows[-1].append(self.texts[-1])
        if self._open:
            self._open[-1][1].extend(parts)

    def handle_data(self, data: str) -> None:
        if self._open:
            self._open[-1][1].append(data)

    def attributes(self, tag: str) -> list[dict[str, str]]:
        """Attributes of every element of this tag."""
        return [attributes for name, attributes in self.elements if name == tag]

    def row(self, heading: str) -> list[str]:
        """Cells of the one row with this heading."""
        (found,) = [row for row in self.rows if row[0] == heading]
        return found

    @property
    def text(self) -> str:
        """All that is to be read."""
        return self.texts[-1]
