"""The picture of a choice: what each budget would cost."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from uniattn_cli.modeling.layout_uniattn import AttentionShape, Layout
from uniattn_cli.models.costs import kv_bytes_per_token

if TYPE_CHECKING:
    from uniattn_cli.layouts.considered import Considered

# Distinct for people who cannot tell red from green (Okabe and Ito); shapes differ too.
COLOURS = ("#000000", "#D55E00", "#0072B2", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
MARKERS = "osD^vP*X"


def plot_frontier(considered: Considered, shape: AttentionShape, path: Path) -> None:
    """Damage over the share of KV bytes kept, one line for each search; beside it the converted shortlist."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    own = kv_bytes_per_token(Layout.own(shape.layers), shape, 1)

    def share(layout: Layout) -> float:
        return 100 * kv_bytes_per_token(layout, shape, 1) / own

    panels = 2 if considered.shortlist else 1
    figure = Figure(figsize=(5.6 * panels, 4.2), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(1, panels, squeeze=False)[0]
    names = list(dict.fromkeys(point.series for point in considered.frontier))
    for index, name in enumerate(names):
        points = [point for point in considered.frontier if point.series == name]
        marker = MARKERS[index % len(MARKERS)]
        xs = [share(point.layout) for point in points]
        axes[0].plot(xs, [point.value for point in points], marker=marker, markersize=4, label=name)
    axes[0].axvline(share(considered.chosen), linestyle=":", color="gray", label="chosen")
    axes[0].set_xlabel("KV bytes per token kept, % of the base")
    axes[0].set_ylabel(considered.measure)
    axes[0].set_ylim(bottom=0)
    axes[0].legend()
    if considered.shortlist:
        entries = considered.shortlist[::-1]
        errors = [0.0 if entry.stderr != entry.stderr else 1.96 * entry.stderr for entry in entries]
        axes[1].barh([entry.name for entry in entries], [entry.divergence for entry in entries], xerr=errors)
        axes[1].set_xlabel(f"KL from the base after conversion, nats per token ({considered.tokens:,} tokens, 95 %)")
        axes[1].set_title("shortlist")
    figure.savefig(path, dpi=110)
