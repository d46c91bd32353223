"""HTML in which foreign text cannot become markup: a string is escaped unless it is `Html` already."""

import html
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass
from itertools import groupby

from v4quant.words import escaped


class Html(str):
    """Markup, safe as it stands; made by this module and by the plots only."""

    __slots__ = ()


@dataclass(frozen=True, slots=True)
class Column:
    """A column of a table.

    Attributes:
        title: its heading.
        numeric: True sets it to the right, in figures of one width.
        group: a heading over this column and its neighbours of the same group.
        kind: a CSS class of its cells.
    """

    title: str
    numeric: bool = False
    group: str = ""
    kind: str = ""

    @property
    def css(self) -> str:
        """Classes of its cells."""
        return " ".join(filter(None, ["number" if self.numeric else "", self.kind]))


def visible(text: str) -> str:
    """Text whose control characters are seen, line ends and tabs too: HTML would swallow them in a name."""
    return escaped(text).replace("\n", "\\n").replace("\t", "\\t")


def shown(value: object) -> Html:
    """Html as it is; anything else as visible, escaped text."""
    return value if isinstance(value, Html) else Html(html.escape(visible(str(value))))


def join(parts: Iterable[object], between: str = "") -> Html:
    """Parts one after the other, escaped where they are plain."""
    return Html(shown(between).join(shown(part) for part in parts))


def tag(name: str, *children: object, **attributes: object) -> Html:
    """An element; children and attribute values are escaped where they are plain.

    Args:
        attributes: `class_` is written "class", `aria_label` "aria-label"; empty ones are left out.
    """
    written = "".join(
        f' {key.strip("_").replace("_", "-")}="{shown(value)}"' for key, value in attributes.items() if value != ""
    )
    return Html(f"<{name}{written}>{join(children)}</{name}>")


def section(anchor: str, title: str, *children: object) -> Html:
    """A part of the page, with a heading that the contents point at."""
    return tag("section", tag("h2", title), *children, id=anchor)


def pairs(items: Iterable[tuple[str, object]]) -> Html:
    """Names and values, as a description list."""
    return tag("dl", *(tag("div", tag("dt", name), tag("dd", value)) for name, value in items), class_="pairs")


def table(
    caption: str,
    columns: Sequence[Column],
    rows: Iterable[Sequence[object]],
    marked: Collection[int] = (),
    *,
    dense: bool = False,
) -> Html:
    """A table that scrolls by itself where the window is too narrow.

    Args:
        caption: what it holds; read out, and shown over it.
        columns: one each cell; the first cell of a row is its heading.
        rows: cells, escaped where they are plain.
        marked: numbers of the rows to set off.
        dense: True for one of many columns.
    """
    body = [
        tag(
            "tr",
            *(
                tag("td", cell, class_=column.css) if at else tag("th", cell, scope="row", class_=column.css)
                for at, (column, cell) in enumerate(zip(columns, row, strict=True))
            ),
            class_="marked" if number in marked else "",
        )
        for number, row in enumerate(rows)
    ]
    head = tag("thead", *_head(columns))
    whole = tag("table", tag("caption", caption), head, tag("tbody", *body), class_="dense" if dense else "")
    return tag("div", whole, class_="scroll", role="region", aria_label=caption, tabindex="0")


def _head(columns: Sequence[Column]) -> list[Html]:
    """One row of headings, or two where columns have groups."""
    if not any(column.group for column in columns):
        return [tag("tr", *(tag("th", column.title, scope="col", class_=column.css) for column in columns))]
    upper: list[Html] = []
    for group, members in groupby(columns, key=lambda column: column.group):
        of_group = list(members)
        if group:
            upper.append(tag("th", group, scope="colgroup", colspan=len(of_group), class_="group"))
        else:
            upper += (tag("th", column.title, scope="col", rowspan=2, class_=column.css) for column in of_group)
    lower = (tag("th", column.title, scope="col", class_=column.css) for column in columns if column.group)
    return [tag("tr", *upper), tag("tr", *lower)]
