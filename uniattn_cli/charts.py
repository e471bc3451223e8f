"""The look of all charts: one palette, one set of shapes, as PNG files and as SVG with text inside pages.

A chart is a function that draws on a matplotlib axis. A page gives the colours of its theme to an SVG, so that charts
follow light and dark.
"""

from __future__ import annotations

import io
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import Any

# Every colour has a contrast of at least 4.5 to the background (a test computes it); those of series can be told apart
# by people who see no red or no green, and each series has a shape of its own.
COLOURS = {
    "page": "#ffffff",
    "ink": "#1b1f24",
    "soft": "#565e68",
    "rule": "#d0d5db",
    "heat": "#0b5394",
    "s1": "#b04a00",
    "s2": "#0060a8",
    "s3": "#00704f",
    "s4": "#8f3f7f",
    "s5": "#7a5c00",
}
SERIES = ("ink", "s1", "s2", "s3", "s4", "s5")
MARKERS = "osD^vP"
DASHES = ("-", (0, (5, 2)), (0, (1.5, 2)), (0, (6, 2, 1.5, 2)), (0, (4, 4)), (0, (1, 3)))
# Inches; a chart is as wide as a phone's screen.
WIDTH, HEIGHT = 4.4, 3.0
LABEL_HEIGHT = 11.0  # points between two labels
LOOK: dict[Any, Any] = {
    "axes.edgecolor": COLOURS["soft"],
    "axes.facecolor": "none",
    "axes.grid": True,
    "axes.labelcolor": COLOURS["ink"],
    "axes.prop_cycle": f"cycler('color', {[COLOURS[name] for name in SERIES[1:]]})",
    "axes.spines.right": False,
    "axes.spines.top": False,
    "axes.titlesize": 9,
    "axes.titleweight": "bold",
    "font.size": 8.5,
    "grid.color": COLOURS["rule"],
    "legend.edgecolor": "none",
    "legend.facecolor": COLOURS["page"],
    "legend.fontsize": 8,
    "savefig.facecolor": COLOURS["page"],
    "svg.fonttype": "none",
    "text.color": COLOURS["ink"],
    # Names of models may hold dollar signs.
    "text.parse_math": False,
    "xtick.color": COLOURS["soft"],
    "ytick.color": COLOURS["soft"],
}


@dataclass(frozen=True)
class Chart:
    """What is drawn, and the same in words for those who do not see it.

    Attributes:
        title: one line above it.
        words: what there is to see; a page shows them below.
        draw: draws on a matplotlib axis.
        height: inches.
    """

    title: str
    words: str
    draw: Callable[[Any], None]
    height: float = HEIGHT


def write_png(charts: Sequence[Chart], path: Path, *, columns: int = 2, note: str = "") -> None:
    """Writes charts as the panels of one picture, with a note below."""
    from matplotlib import rc_context

    columns = min(len(charts), columns)
    rows = -(-len(charts) // columns)
    with rc_context(LOOK):
        page = _canvas(1.35 * WIDTH * columns, 1.4 * max(chart.height for chart in charts) * rows)
        for index, chart in enumerate(charts):
            _draw(chart, page.add_subplot(rows, columns, index + 1))
        page.supxlabel(note, fontsize=8)
        _spread_labels(page)
        page.savefig(path, dpi=130)


def to_svg(chart: Chart, number: int) -> str:
    """The chart for a page that defines `--NAME` for every colour.

    Args:
        number: of the chart on its page, so that ids are different.
    """
    from matplotlib import rc_context

    with rc_context(LOOK | {"svg.hashsalt": str(number), "savefig.facecolor": "none"}):
        page = _canvas(WIDTH, chart.height)
        _draw(chart, page.add_subplot())
        _spread_labels(page)
        file = io.StringIO()
        page.savefig(file, format="svg", metadata=dict.fromkeys(("Creator", "Date", "Format", "Type")))
    return _for_page(file.getvalue(), chart, number)


def _canvas(width: float, height: float) -> Any:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    page = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(page)
    return page


def _draw(chart: Chart, axis: Any) -> None:
    axis.set_axisbelow(True)
    chart.draw(axis)
    axis.set_title(chart.title, loc="left", color=COLOURS["ink"])


def _for_page(svg: str, chart: Chart, number: int) -> str:
    """An SVG file as an element of a page: themed, named, without what only files need."""
    _, _, body = svg.partition("<svg ")
    attributes, _, body = body.partition(">")
    (box,) = re.findall(r'viewBox="[^"]*"', attributes)
    body = re.sub(r"<defs>\s*<style.*?</defs>", "", body, count=1, flags=re.S)
    # Groups are numbered anew in each chart; what is referred to has a hash.
    body = re.sub(r' id="[^"]*_\d+"', "", body)
    body = re.sub(r"font-family: [^;\"]*;? ?", "", body)
    body = body.replace("xlink:href=", "href=")
    # Of places and strengths, not of what is written.
    body = re.sub(r"<[^>]*>", lambda tag: re.sub(r"(\d\.\d\d)\d+", r"\1", tag[0]), body)
    for name, colour in COLOURS.items():
        body = body.replace(colour, f"var(--{name})")
    body = re.sub(r"\s*\n\s*", " ", body)
    names = f'role="img" aria-labelledby="t{number} d{number}"'
    told = f'<title id="t{number}">{escape(chart.title)}</title><desc id="d{number}">{escape(chart.words)}</desc>'
    return f"<svg {box} {names}>{told}{body.strip()}"


def colour(style: int) -> str:
    """The colour of a series, from 0."""
    return COLOURS[SERIES[style % len(SERIES)]]


def plot(
    axis: Any,
    name: str,
    points: Sequence[tuple[float, float]],
    *,
    style: int = 0,
    errors: Sequence[float | None] | None = None,
    line: bool = True,
) -> None:
    """Draws points that belong together.

    Args:
        name: for the legend.
        points: (x, y).
        style: colour, shape and dashes, from 0.
        errors: half-widths of bars, one per point; None where there is none.
        line: join the points.
    """
    style %= len(SERIES)
    # Many points on a line are a line.
    size = 0 if line and len(points) > 60 else 3 if len(points) > 30 else 5
    axis.errorbar(
        *zip(*points, strict=True),
        yerr=None if errors is None else [float("nan") if error is None else error for error in errors],
        label=name,
        color=colour(style),
        marker=MARKERS[style],
        markersize=size,
        linestyle=DASHES[style] if line else "none",
        linewidth=1.4,
        capsize=3,
    )


def label(axis: Any, name: str, point: tuple[float, float], style: int, *, above: bool = False) -> None:
    """Writes a name beside a point, or above the line through it; names that would cover each other are moved up."""
    place = (8, LABEL_HEIGHT / 2 if above else 0)
    axis.annotate(name, point, xytext=place, textcoords="offset points", va="center", color=colour(style))


def from_zero(axis: Any) -> None:
    """Begins the vertical axis at zero, with room above what was drawn."""
    axis.set_ylim(0, 1.05 * axis.get_ylim()[1] or 1)


def plain_log(axis: Any) -> None:
    """A logarithmic vertical axis with numbers as they are written in text."""
    from matplotlib.ticker import FuncFormatter

    axis.set_yscale("log")
    axis.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axis.yaxis.set_minor_formatter(FuncFormatter(lambda value, _: f"{value:g}" if f"{value:e}"[0] in "235" else ""))


def _spread_labels(page: Any) -> None:
    """Moves labels up until none covers another."""
    beside = {axis: [text for text in axis.texts if hasattr(text, "xy")] for axis in page.axes}
    if not any(beside.values()):
        return
    page.canvas.draw()
    scale = 72 / page.dpi
    for axis, texts in beside.items():
        found = [(text, *(axis.transData.transform(text.xy) * scale)) for text in texts]
        placed: list[tuple[float, float, float]] = []
        for text, x, y in sorted(found, key=lambda entry: entry[2]):
            width, height = text.get_window_extent().width * scale, y + text.xyann[1]
            for other_x, other_width, other_y in placed:
                if x < other_x + other_width + 8 and other_x < x + width + 8:
                    height = max(height, other_y + LABEL_HEIGHT)
            text.set_position((8, height - y))
            placed.append((x, width, height))
