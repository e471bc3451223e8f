"""The picture of a choice: what each budget would cost."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from uniattn_cli.charts import COLOURS, Chart, from_zero, plot, write_png
from uniattn_cli.modeling.layout_uniattn import AttentionShape, Layout
from uniattn_cli.models.costs import kv_bytes_per_token

if TYPE_CHECKING:
    from uniattn_cli.layouts.considered import Considered


def plot_frontier(considered: Considered, shape: AttentionShape, path: Path) -> None:
    """Damage over the share of KV bytes kept, one line for each search; beside it the converted shortlist."""
    own = kv_bytes_per_token(Layout.own(shape.layers), shape, 1)

    def share(layout: Layout) -> float:
        return 100 * kv_bytes_per_token(layout, shape, 1) / own

    points = [(point.series, share(point.layout), point.value) for point in considered.frontier]
    charts = [frontier_chart(points, share(considered.chosen), considered.measure, "")]
    if considered.shortlist:
        charts.append(_shortlist_chart(considered))
    write_png(charts, path)


def frontier_chart(points: Sequence[tuple[str, float, float]], chosen: float | None, measure: str, words: str) -> Chart:
    """The layouts that a search kept.

    Args:
        points: (search, share of the KV bytes in per cent, damage).
        chosen: share of the KV bytes of the chosen one; None if it is not among them.
        measure: of the damage.
        words: what there is to see.
    """

    def draw(axis: Any) -> None:
        for style, name in enumerate(dict.fromkeys(series for series, _, _ in points), 1):
            plot(axis, name, sorted((x, y) for series, x, y in points if series == name), style=style)
        if chosen is not None:
            axis.axvline(chosen, linestyle=":", color=COLOURS["ink"], label="chosen")
        axis.set(xlabel="KV cache, % of the base's", ylabel=measure if len(measure) <= 40 else "measure of the search")
        from_zero(axis)
        axis.legend()

    return Chart("Layouts considered", words, draw)


def _shortlist_chart(considered: Considered) -> Chart:
    def draw(axis: Any) -> None:
        entries = considered.shortlist[::-1]
        errors = [0.0 if entry.stderr != entry.stderr else 1.96 * entry.stderr for entry in entries]
        values = [entry.divergence for entry in entries]
        axis.barh([entry.name for entry in entries], values, xerr=errors, color=COLOURS["s2"])
        axis.set_xlabel(f"KL from the base after conversion, nats per token ({considered.tokens:,} tokens, 95 %)")

    return Chart("Shortlist", "", draw)
