"""Draws docs/images/kinds.svg from the `Kind` records: what a layer of each kind computes, borrows, caches and reads.

python scripts/draw_kinds.py
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from markupsafe import Markup

from uniattn_cli.modeling.layout_uniattn import KINDS, Kind

TARGET = Path(__file__).resolve().parent.parent / "docs" / "images" / "kinds.svg"
COLUMNS, GAP = 3, 16
WIDTH, HEIGHT = 300, 266
LEGEND = 44
TOP, BOTTOM = 118, 172  # rows of a card: queries, keys and values above the input
LENDER, BORROWER, ALONE = 80, 220, 150  # the middle of a layer in its card
STEP, RADIUS = 38, 13
WORDS = {"q": "queries", "k": "keys", "v": "values"}
# GitHub shows pictures on its own background, light or dark.
STYLE = """
text { font-family: system-ui, "Segoe UI", "DejaVu Sans", sans-serif; font-size: 12px; fill: #1f2328 }
.card { fill: #ffffff; stroke: #d0d7de } .name { font-size: 15px; font-weight: 700 }
.soft { fill: #59636e } .small { font-size: 11px }
.badge { fill: #1f2328 } .sign { fill: #ffffff; font-weight: 700; font-size: 14px }
.own { fill: #2563eb } .own-line { stroke: #2563eb; fill: none; stroke-width: 1.6 } .head { fill: #2563eb }
.borrowed { fill: #ffffff; stroke: #ea580c; stroke-width: 2; stroke-dasharray: 4 3 }
.borrowed-line { stroke: #ea580c; fill: none; stroke-width: 1.8; stroke-dasharray: 5 3 }
.borrowed-head, .letter-borrowed { fill: #ea580c } .letter { fill: #ffffff }
.letter, .letter-borrowed { font-weight: 700 }
.cached { fill: none; stroke: #16a34a; stroke-width: 3 } .input { fill: #eaeef2; stroke: #59636e }
.middle { text-anchor: middle }
@media (prefers-color-scheme: dark) {
  text { fill: #e6edf3 } .card { fill: #161b22; stroke: #3d444d } .soft { fill: #9198a1 }
  .badge { fill: #e6edf3 } .sign { fill: #161b22 } .borrowed { fill: #161b22 } .input { fill: #2a313c }
  .own { fill: #3b82f6 } .own-line { stroke: #3b82f6 } .head { fill: #3b82f6 }
}
"""


def picture() -> Markup:
    """The whole drawing, a card for each kind and a legend."""
    rows = -(-len(KINDS) // COLUMNS)
    width, height = COLUMNS * (WIDTH + GAP) + GAP, rows * (HEIGHT + GAP) + GAP + LEGEND
    cards = []
    for index, kind in enumerate(KINDS.values()):
        x, y = GAP + index % COLUMNS * (WIDTH + GAP), GAP + index // COLUMNS * (HEIGHT + GAP)
        cards.append(tag("g", card(kind), transform=f"translate({x} {y})"))
    title = tag("title", "What a layer of each kind computes, borrows, caches and reads")
    heads = tag("defs", arrow_head("head"), arrow_head("borrowed-head"))
    legend = tag("g", legend_items(), transform=f"translate({GAP} {height - LEGEND + 12})")
    size = {"viewBox": f"0 0 {width} {height}", "width": width, "height": height}
    parts = (title, tag("style", Markup(STYLE)), heads, cards, legend)
    return tag("svg", parts, xmlns="http://www.w3.org/2000/svg", **size)


def card(kind: Kind) -> list[Markup]:
    """One kind: its name, a drawing, and what it caches, reads and has no weights for."""
    box = tag("rect", width=WIDTH, height=HEIGHT, rx=10, class_="card")
    badge = tag("rect", x=14, y=12, width=24, height=24, rx=5, class_="badge")
    parts = [box, badge, text(26, 29, kind.symbol, "sign middle"), text(48, 29, kind.name, "name")]
    for line, words in enumerate(kind.phrase.split(", ")):
        parts.append(text(14, 54 + 15 * line, words, "soft"))
    if kind.borrows:
        parts += [*layer(LENDER, KINDS["own"], "the lender"), *layer(BORROWER, kind, "this layer"), *loans(kind)]
    else:
        parts += layer(ALONE, kind, "this layer")
    for line, (label, words) in enumerate(facts(kind)):
        y = 216 + 17 * line
        parts += [text(14, y, label, "soft small"), text(66, y, words, "small")]
    return parts


def facts(kind: Kind) -> list[tuple[str, str]]:
    """What it keeps, what decoding a token has to read for it, and its weights."""
    fewer = "fewer " if kind.fewer_heads else ""
    kept, lent = named(kind.caches), named(kind.borrows.replace("q", ""))
    with_lender = kind.borrows_maps or kind.early
    read = [f"{fewer}{kept}"] if kept else []
    if lent:
        read.append(f"{lent} {'once, with the lender' if with_lender else 'of the lender again'}")
    missing = ", ".join(f"W_{part[0]}" for part in kind.removed)
    weights = [f"no {missing}" if missing else "smaller W_k, W_v" if kind.fewer_heads else "all"]
    if kind.compensation != "forbidden":
        weights.append(f"W_c {kind.compensation}")
    told = {"caches": [f"{fewer}{kept}"] if kept else [], "reads": read, "weights": weights}
    return [(label, "; ".join(words) or "nothing") for label, words in told.items()]


def named(letters: str) -> str:
    """`keys and values` for `kv`."""
    return " and ".join(WORDS[letter] for letter in letters)


def layer(middle: int, kind: Kind, caption: str) -> list[Markup]:
    """A layer's input, and the queries, keys and values that it projects from it or borrows."""
    parts = [text(middle, 198, caption, "soft small middle")]
    if not kind.attends:
        words = "W_c" if kind.compensation == "required" else "no attention"
        if kind.compensation == "required":
            parts += [arrow(middle, BOTTOM - 14, middle, TOP + 16), node(middle, TOP, words, "own", 15)]
        else:
            parts.append(text(middle, TOP + 4, words, "soft middle"))
    for letter, x in places(middle):
        if letter in kind.borrows:
            parts.append(node(x, TOP, letter.upper(), "borrowed"))
        elif letter in kind.projects:
            size = 9 if kind.fewer_heads and letter in kind.caches else RADIUS
            if not (kind.early and letter == "q"):
                parts.append(arrow(middle + (x - middle) * 0.25, BOTTOM - 12, x + (middle - x) * 0.16, TOP + size + 5))
            parts.append(node(x, TOP, letter.upper(), "own", size))
            if letter in kind.caches:
                parts.append(tag("circle", cx=x, cy=TOP, r=size + 3.5, class_="cached"))
    return [*parts, node(middle, BOTTOM, "x", "input", 11)]


def loans(kind: Kind) -> list[Markup]:
    """Arrows from the lender to the layer that borrows."""
    parts = []
    for (letter, start), (_, end) in zip(places(LENDER), places(BORROWER), strict=True):
        if letter in kind.borrows:
            curve = f"M{start} {TOP - 19}C{start} {TOP - 36} {end} {TOP - 36} {end} {TOP - 18}"
            parts.append(tag("path", d=curve, class_="borrowed-line", marker_end="url(#borrowed-head)"))
    if kind.early:
        end = places(BORROWER)[0][1]
        parts.append(arrow(LENDER + 14, BOTTOM, end - 9, TOP + 15))
    return parts


def places(middle: int) -> list[tuple[str, int]]:
    """Where the queries, keys and values of a layer are drawn."""
    return [(letter, middle + STEP * offset) for letter, offset in zip("qkv", (-1, 0, 1), strict=True)]


def tag(name: str, *children: Any, **attributes: Any) -> Markup:
    """An element; children are markup, text, or lists of them. `class_` is `class`, other underscores are hyphens."""
    words = (Markup(' {}="{}"').format(key.rstrip("_").replace("_", "-"), value) for key, value in attributes.items())
    inside = [part for child in children for part in (child if isinstance(child, (list, tuple)) else [child])]
    inside = [tag("", *part) if isinstance(part, (list, tuple)) else part for part in inside]
    whole = Markup("").join(inside)
    return Markup("<{0}{1}>{2}</{0}>").format(name, Markup("").join(words), whole) if name else whole


def node(x: float, y: float, letter: str, style: str, radius: float = RADIUS) -> Markup:
    """A circle with a letter."""
    written = {"own": "letter", "borrowed": "letter-borrowed", "input": "soft"}[style]
    size = "small " if radius < RADIUS or len(letter) > 1 else ""
    circle = tag("circle", cx=x, cy=y, r=radius, class_=style)
    return tag("g", circle, text(x, y + 4, letter, f"{size}{written} middle"))


def arrow(x: float, y: float, to_x: float, to_y: float) -> Markup:
    """A projection."""
    path = f"M{x:.1f} {y:.1f}L{to_x:.1f} {to_y:.1f}"
    return tag("path", d=path, class_="own-line", marker_end="url(#head)")


def arrow_head(name: str) -> Markup:
    """The end of an arrow."""
    size = {"markerWidth": 5, "markerHeight": 5}
    shape = tag("path", d="M0 0L8 4L0 8z", class_=name)
    return tag("marker", shape, id=name, viewBox="0 0 8 8", refX=6, refY=4, orient="auto", **size)


def text(x: float, y: float, words: str, style: str) -> Markup:
    """A line of text."""
    return tag("text", words, x=x, y=y, class_=style)


def legend_items() -> list[Markup]:
    """What colours and rings mean."""
    return [
        node(12, 10, "K", "own", 11),
        text(30, 14, "computed by this layer", "small"),
        node(222, 10, "K", "borrowed", 11),
        text(240, 14, "borrowed from the lender", "small"),
        tag("circle", cx=428, cy=10, r=9, class_="cached"),
        text(446, 14, "cached", "small"),
        node(534, 10, "x", "input", 11),
        text(552, 14, "input of the layer", "small"),
        text(690, 14, "reads: what decoding a token has to read", "small soft"),
    ]


if __name__ == "__main__":
    TARGET.write_text(picture() + "\n", encoding="utf-8")
