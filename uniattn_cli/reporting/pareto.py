"""Quality against cost, as a picture."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from uniattn_cli.evaluation.comparison import QUALITY_LABELS, cost_of
from uniattn_cli.layouts.plots import COLOURS, MARKERS
from uniattn_cli.models.of_run import BASE
from uniattn_cli.reporting.markdown import short

COLUMNS = 2
LABEL_HEIGHT = 15.0  # points between two labels


KV_LABEL = "KV cache, kB per token (measured)"
SPEED_LABEL = "tokens per second, divided by the base's"


def draw(results: dict[str, Any], path: Path) -> None:
    """Writes a PNG: perplexity, and means of tasks where some were run, each against KV bytes per token.

    The base has a line across the panel; the bars of the others are standard errors of their paired difference to it,
    because errors that all models share say nothing about which is better.
    """
    panels = [(key, "kv") for key in QUALITY_LABELS if key in results["models"][BASE]["quality"]]
    draw_panels(results["models"], panels, {}, path)


def draw_panels(
    models: dict[str, Any], panels: Sequence[tuple[str, str]], fronts: dict[str, list[str]], path: Path
) -> None:
    """Writes a PNG with one panel for each pair of quality (a key of `QUALITY_LABELS`) and cost (`kv`, `speed`).

    Args:
        models: as in `results.json`, the base first.
        panels: what to draw.
        fronts: for `quality/cost` the models that no other beats in both; joined by a line.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    columns, rows = min(len(panels), COLUMNS), -(-len(panels) // COLUMNS)
    page = Figure(figsize=(6.2 * columns, 4.8 * rows), dpi=150, layout="constrained")
    FigureCanvasAgg(page)
    axes = [page.add_subplot(rows, columns, index + 1) for index in range(len(panels))]
    for axis, (key, cost) in zip(axes, panels, strict=True):
        label, factor = QUALITY_LABELS[key]
        _panel(axis, models, key, factor, cost)
        _front(axis, models, fronts.get(f"{key}/{cost}", []), key, factor, cost)
        axis.set_ylabel(label)
        axis.set_xlabel(KV_LABEL if cost == "kv" else SPEED_LABEL)
    page.supxlabel("bars: one standard error of the difference from the base, on the same rows or items", fontsize=9)
    page.canvas.draw()
    for axis in axes:
        _spread_labels(axis)
    page.savefig(path)


def _front(axis: Any, models: dict[str, Any], names: Sequence[str], key: str, factor: float, cost: str) -> None:
    points = sorted((cost_of(models[name], cost), models[name]["quality"][key].value * factor) for name in names)
    if len(points) > 1:
        axis.plot(*zip(*points, strict=True), color="#888888", linewidth=1.2, zorder=0)


def _panel(axis: Any, models: dict[str, Any], key: str, factor: float, cost: str) -> None:
    values, places = [], []
    for index, (name, model) in enumerate(models.items()):
        entry, x = model["quality"][key], cost_of(model, cost)
        if x is None:
            continue
        y = entry.value * factor
        values.append(y)
        places.append(x)
        colour = COLOURS[index % len(COLOURS)]
        error = entry.difference_to_base and entry.difference_to_base.stderr
        error = None if error is None else error * factor
        axis.errorbar(
            x, y, yerr=error, fmt=MARKERS[index % len(MARKERS)], color=colour, capsize=4, markersize=7, alpha=0.85
        )
        axis.annotate(
            short(name, 18), (x, y), xytext=(10, 0), textcoords="offset points", va="center", color=colour, fontsize=10
        )
        if name == BASE:
            axis.axhline(y, color=colour, linestyle="--", linewidth=0.8, alpha=0.6)
    _scales(axis, values, places)


def _scales(axis: Any, values: list[float], sizes: list[float]) -> None:
    from matplotlib.ticker import FuncFormatter

    if min(values) > 0 and max(values) > 4 * min(values):
        axis.set_yscale("log")
        axis.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        axis.yaxis.set_minor_formatter(FuncFormatter(lambda value, _: f"{value:g}" if f"{value:e}"[0] in "235" else ""))
    # From zero, so that a saving looks as large as it is; room for the labels on the right.
    axis.set_xlim(0, 1.4 * max(sizes) or 1)
    axis.margins(y=0.2)
    axis.grid(alpha=0.25)
    axis.spines[["top", "right"]].set_visible(False)


def _spread_labels(axis: Any) -> None:
    """Moves labels up until none covers another or the line of the base."""
    scale = 72 / axis.figure.dpi
    labels = [(text, *(axis.transData.transform(text.xy) * scale)) for text in axis.texts]
    placed: list[tuple[float, float, float]] = []
    for text, x, y in sorted(labels, key=lambda label: label[2]):
        width = text.get_window_extent().width * scale
        # The base has a line through it, so that its name stands above.
        height = y + LABEL_HEIGHT / 2 if text.get_text() == BASE else y
        for other_x, other_width, other_y in placed:
            if x < other_x + other_width + 10 and other_x < x + width + 10:
                height = max(height, other_y + LABEL_HEIGHT)
        text.set_position((10, height - y))
        placed.append((x, width, height))
