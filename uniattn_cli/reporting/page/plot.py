"""Charts as inline SVG: lines, points with error bars, and a map of cells. Sizes are those of a phone's width.

Nothing but shapes and text: colours come from the style sheet, so that a chart follows light and dark. Each has a title
and a description for those who do not see it.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from uniattn_cli.reporting.page.markup import Html, tag
from uniattn_cli.reporting.page.style import SERIES

WIDTH, HEIGHT = 380.0, 250.0
LEFT, RIGHT, TOP, BOTTOM = 52.0, 14.0, 22.0, 40.0
DASHES = (None, "7 3", "2 3", "9 3 2 3", "5 5", "1 4")
LABEL_HEIGHT = 13.0
_ids = itertools.count()


@dataclass(frozen=True)
class DataSeries:
    """Points that belong together.

    Attributes:
        name: for the legend.
        points: (x, y) in data units.
        errors: half-widths of the bars, one per point; None where there is none.
        style: colour, shape and dashes, from 0.
        line: join the points.
        label: write the name beside the last point.
    """

    name: str
    points: Sequence[tuple[float, float]]
    errors: Sequence[float | None] = ()
    style: int = 0
    line: bool = True
    label: bool = False


@dataclass(frozen=True)
class Axis:
    """One axis.

    Attributes:
        label: with the unit.
        log: logarithmic.
        zero: begins at zero.
        ticks: where to write numbers; None chooses.
        whole: only whole numbers.
    """

    label: str
    log: bool = False
    zero: bool = False
    ticks: Sequence[float] | None = None
    whole: bool = False


def chart(
    title: str,
    description: str,
    series: Sequence[DataSeries],
    x: Axis,
    y: Axis,
    *,
    limits: Sequence[tuple[str, float]] = (),
    breaks: Sequence[float] = (),
    room: float = 0.04,
) -> Html:
    """Lines and points.

    Args:
        title: shown above.
        description: what there is to see, in words.
        series: at least one with a point.
        x, y: axes.
        limits: (label, y) of horizontal reference lines.
        breaks: x of vertical lines.
        room: share of the width that stays free on the right, for labels.
    """
    points = [point for entry in series for point in entry.points]
    lows = [
        value
        for entry in series
        for (_, height), error in zip(entry.points, _errors(entry), strict=True)
        for value in (height - error, height + error)
    ]
    across = _scale([point[0] for point in points], x, LEFT, WIDTH - RIGHT, room)
    heights = [*lows, *(height for _, height in limits)]
    up = _scale([value for value in heights if value > 0 or not y.log], y, HEIGHT - BOTTOM, TOP, 0.06)
    parts = [*_frame(x, y, across, up)]
    for position in breaks:
        parts.append(_line(across(position), TOP, across(position), HEIGHT - BOTTOM, "limit"))
    for label, height in limits:
        parts.append(_line(LEFT, up(height), WIDTH - RIGHT, up(height), "limit"))
        if label:
            parts.append(tag("text", label, x=WIDTH - RIGHT, y=_n(up(height) - 4), text_anchor="end", class_="tick"))
    for entry in series:
        parts.append(_draw_series(entry, across, up))
    parts.append(_labels(series, across, up))
    return drawing(title, description, HEIGHT, parts)


def drawing(title: str, description: str, height: float, parts: Sequence[Html]) -> Html:
    """An SVG as wide as all others, with its title written on it and its description for screen readers."""
    number = next(_ids)
    names = f"t{number} d{number}"
    head = [tag("title", title, id=f"t{number}"), tag("desc", description, id=f"d{number}")]
    shown = tag("text", title, x=0, y=11, font_weight=600)
    return tag(
        "svg", head, shown, parts, viewBox=f"0 0 {WIDTH:g} {_n(height)}", role="img", aria_labelledby=names
    )  # fmt: skip


def restart_ids() -> None:
    """Numbers the charts of a page from zero, so that the same results give the same page."""
    global _ids
    _ids = itertools.count()


def legend(entries: Sequence[tuple[str, int, bool]]) -> Html:
    """The names of series, each with its line and shape; (name, style, line)."""
    items = []
    for name, style, line in entries:
        parts = [tag("path", d="M1 7H29", class_="line", stroke_dasharray=DASHES[style % SERIES])] if line else []
        parts.append(marker(15, 7, style))
        swatch = tag("svg", parts, viewBox="0 0 30 14", aria_hidden="true", class_=f"s{style % SERIES}")
        items.append(tag("li", swatch, " ", name))
    return tag("ul", items, class_="legend")


def marker(x: float, y: float, style: int, size: float = 4.2, name: str = "dot") -> Html:
    """A point: circle, square, diamond, triangle, triangle on its tip, cross."""
    kind, s = style % SERIES, size
    if kind == 0:
        return tag("circle", cx=_n(x), cy=_n(y), r=s, class_=name)
    shapes = {
        1: [(-s, -s), (s, -s), (s, s), (-s, s)],
        2: [(0, -1.4 * s), (1.4 * s, 0), (0, 1.4 * s), (-1.4 * s, 0)],
        3: [(0, -1.3 * s), (1.2 * s, s), (-1.2 * s, s)],
        4: [(0, 1.3 * s), (1.2 * s, -s), (-1.2 * s, -s)],
        5: [(-s, -s / 3), (-s / 3, -s / 3), (-s / 3, -s), (s / 3, -s), (s / 3, -s / 3), (s, -s / 3), (s, s / 3),
            (s / 3, s / 3), (s / 3, s), (-s / 3, s), (-s / 3, s / 3), (-s, s / 3)],
    }  # fmt: skip
    corners = " ".join(f"{_n(x + dx)},{_n(y + dy)}" for dx, dy in shapes[kind])
    return tag("polygon", points=corners, class_=name)


def _errors(entry: DataSeries) -> list[float]:
    return [error or 0.0 for error in entry.errors] or [0.0] * len(entry.points)


def _draw_series(entry: DataSeries, across: _Scale, up: _Scale) -> Html:
    style = entry.style % SERIES
    places = [(across(x), up(y)) for x, y in entry.points]
    parts = []
    if entry.line and len(places) > 1:
        path = "M" + "L".join(f"{_n(x)} {_n(y)}" for x, y in places)
        parts.append(tag("path", d=path, class_="line", stroke_dasharray=DASHES[style]))
    for (x, y), (_, value), error in zip(places, entry.points, _errors(entry), strict=True):
        if error:
            low, high = up(value - error), up(value + error)
            ends = "".join(f"M{_n(x - 4)} {_n(end)}h8" for end in (low, high))
            parts.append(tag("path", d=f"M{_n(x)} {_n(low)}V{_n(high)}{ends}", class_="bar", fill="none"))
        # Many points on a line are a line.
        if len(places) <= 60 or not entry.line:
            parts.append(marker(x, y, style, 4.2 if len(places) <= 30 else 2.8))
    return tag("g", parts, class_=f"s{style}")


def _labels(series: Sequence[DataSeries], across: _Scale, up: _Scale) -> Html:
    """Names beside the last points, moved up until none covers another."""
    placed: list[tuple[float, float]] = []
    parts = []
    wanted = [(up(entry.points[-1][1]), entry) for entry in series if entry.label and entry.points]
    for height, entry in sorted(wanted, key=lambda pair: -pair[0]):
        x = across(entry.points[-1][0]) + 9
        y = height + 4
        for other_x, other_y in placed:
            if abs(other_x - x) < 90 and y > other_y - LABEL_HEIGHT:
                y = other_y - LABEL_HEIGHT
        placed.append((x, y))
        parts.append(tag("text", entry.name, x=_n(x), y=_n(y), class_=f"label s{entry.style % SERIES}"))
    return tag("g", parts)


@dataclass(frozen=True)
class _Scale:
    """From data units to places.

    Attributes:
        place: of a value.
        range: the values at the ends.
    """

    place: Callable[[float], float]
    range: tuple[float, float]

    def __call__(self, value: float) -> float:
        return self.place(value)


def _scale(values: Sequence[float], axis: Axis, start: float, end: float, room: float) -> _Scale:
    """From data units to places; the range has some room at its ends."""
    change: Callable[[float], float] = math.log10 if axis.log else float
    low, high = change(min(values)), change(max(values))
    if axis.zero and not axis.log:
        low = min(low, 0.0)
    span = (high - low) or abs(high) or 1.0
    if not (axis.zero and low == 0):
        low -= 0.06 * span
    high += room * span
    floor = 10**low if axis.log else low

    def place(value: float) -> float:
        value = change(max(value, floor) if axis.log else value)
        return start + (end - start) * (value - low) / (high - low)

    return _Scale(place, (floor, 10**high if axis.log else high))


def _frame(x: Axis, y: Axis, across: _Scale, up: _Scale) -> list[Html]:
    parts = []
    for value in _ticks(y, *up.range):
        height = up(value)
        parts.append(_line(LEFT, height, WIDTH - RIGHT, height, "grid"))
        parts.append(tag("text", short(value), x=LEFT - 6, y=_n(height + 4), text_anchor="end", class_="tick"))
    parts.append(_line(LEFT, HEIGHT - BOTTOM, WIDTH - RIGHT, HEIGHT - BOTTOM, "axis"))
    last = -math.inf
    for value in _ticks(x, *across.range, count=8):
        place, text = across(value), short(value)
        if place - last < 7 * len(text) + 6:
            continue
        last = place
        parts.append(_line(place, HEIGHT - BOTTOM, place, HEIGHT - BOTTOM + 4, "axis"))
        parts.append(tag("text", text, x=_n(place), y=HEIGHT - BOTTOM + 16, text_anchor="middle", class_="tick"))
    middle = (LEFT + WIDTH - RIGHT) / 2
    parts.append(tag("text", x.label, x=_n(middle), y=HEIGHT - 7, text_anchor="middle"))
    height = (TOP + HEIGHT - BOTTOM) / 2
    parts.append(
        tag("text", y.label, text_anchor="middle", transform=f"translate(11 {_n(height)}) rotate(-90)")
    )  # fmt: skip
    return parts


def _ticks(axis: Axis, low: float, high: float, count: int = 5) -> list[float]:
    if axis.ticks is not None:
        return [value for value in axis.ticks if low <= value <= high]
    if axis.log:
        powers = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
        found = [digit * 10.0**power for power in powers for digit in (1, 2, 5)]
        found = [value for value in found if low <= value <= high]
        if len(found) > 1:
            return found
    step = _step((high - low) / count)
    if axis.whole:
        step = max(1.0, round(step))
    return [step * index for index in range(math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9) + 1)]


def _step(size: float) -> float:
    """The next of 1, 2, 5, 10, …"""
    power = 10.0 ** math.floor(math.log10(size)) if size > 0 else 1.0
    return next(digit * power for digit in (1, 2, 5, 10) if digit * power >= size * (1 - 1e-9))


def short(value: float) -> str:
    """A number for an axis: `0.5`, `12`, `4k`, `2M`."""
    for size, letter in ((1e9, "G"), (1e6, "M"), (1e4, "k")):
        if abs(value) >= size:
            return f"{value / (1e3 if letter == 'k' else size):.3g}{letter}"
    return f"{value:.4g}"


def _line(x1: float, y1: float, x2: float, y2: float, name: str) -> Html:
    return tag("path", d=f"M{_n(x1)} {_n(y1)}L{_n(x2)} {_n(y2)}", class_=name)


def _n(value: float) -> str:
    return f"{value:.1f}".rstrip("0").rstrip(".")
