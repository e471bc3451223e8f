"""HTML and SVG elements as text in which everything that comes from outside is escaped."""

from __future__ import annotations

import html
import re
from collections.abc import Iterable, Iterator
from typing import Any

VOID = ("meta", "br")


class Html(str):
    """Text that is markup already; any other text is escaped where it is put into an element."""

    __slots__ = ()


def tag(name: str, /, *children: Any, **attributes: Any) -> Html:
    """An element.

    Args:
        name: of the element.
        children: markup, text, numbers, or lists of them; None is left out.
        attributes: None is left out. `class_` is `class`, and other underscores are hyphens.

    >>> tag("p", "a < b", tag("b", "c"), class_="x")
    '<p class="x">a &lt; b<b>c</b></p>'
    """
    words = [
        f' {key.rstrip("_").replace("_", "-")}="{html.escape(str(value))}"'
        for key, value in attributes.items()
        if value is not None
    ]
    start = f"<{name}{''.join(words)}>"
    return Html(start if name in VOID else f"{start}{join(children)}</{name}>")


def join(children: Iterable[Any]) -> Html:
    """Children one after the other, escaped where they are not markup."""
    return Html("".join(child if isinstance(child, Html) else html.escape(str(child)) for child in _flat(children)))


def _flat(children: Iterable[Any]) -> Iterator[Any]:
    for child in children:
        if isinstance(child, (list, tuple)):
            yield from _flat(child)
        elif child is not None:
            yield child


def table(caption: str, columns: list[Any], rows: list[list[Any]], *, words: bool = False) -> Html:
    """A table whose first column names the rows; it scrolls sideways by itself where it is too wide.

    Args:
        caption: stands above it and does not scroll.
        columns: headings.
        rows: as many cells each as there are columns.
        words: cells hold words, not numbers.
    """
    name = re.sub(r"[^a-z]+", "-", caption.lower()).strip("-")
    head = tag("thead", tag("tr", *(tag("th", column, scope="col") for column in columns)))
    body = [tag("tr", tag("th", row[0], scope="row"), *(tag("td", cell) for cell in row[1:])) for row in rows]
    inner = tag("table", head, tag("tbody", *body), aria_labelledby=name, class_="words" if words else None)
    scroll = tag("div", inner, class_="scroll", tabindex=0, role="region", aria_labelledby=name)
    return join((tag("h3", caption, id=name, class_="caption"), scroll))


def figure(drawing: Html, caption: Any) -> Html:
    """A drawing with what it shows."""
    return tag("figure", drawing, tag("figcaption", caption))
