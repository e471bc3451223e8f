"""The charts of an evaluation: quality against cost, agreement with the base, lengths of text, layers, training."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

from uniattn_cli.charts import COLOURS, HEIGHT, MARKERS, Chart, from_zero, label, plain_log, plot
from uniattn_cli.evaluation.comparison import QUALITY_LABELS, cost_of
from uniattn_cli.evaluation.wording import as_value
from uniattn_cli.layouts.plots import frontier_chart
from uniattn_cli.modeling.layout_uniattn import KINDS, Layout
from uniattn_cli.models.of_run import BASE
from uniattn_cli.reporting.evidence import Evidence
from uniattn_cli.reporting.tables import short
from uniattn_cli.training.plots import loss_chart

BARS = "bars: one standard error of the difference from the base, on the same rows or items"
COSTS = {"kv": "KV cache, kB per token (measured)", "speed": "tokens per second, divided by the base's"}
QUALITY = {"perplexity": "Perplexity", "accuracy": "Accuracy", "generated": "Generated answers"}
LEVELS = 16


def of_models(results: dict[str, Any]) -> list[Chart]:
    """Perplexity, and means of tasks where some were run, each against KV bytes per token."""
    return [quality_chart(results["models"], key, "kv") for key in QUALITY_LABELS if key in _base(results)["quality"]]


def _base(results: dict[str, Any]) -> dict[str, Any]:
    return results["models"][BASE]


def quality_chart(models: dict[str, Any], key: str, cost: str, front: Sequence[str] = ()) -> Chart:
    """One quality against one cost.

    The base has a line across; bars of the others are standard errors of their paired difference to it, because errors
    that all models share say nothing about which is better.

    Args:
        models: as in `results.json`, the base first.
        key: of `QUALITY_LABELS`.
        cost: `kv` or `speed`.
        front: models that no other beats in both; joined by a line.
    """
    unit, factor = QUALITY_LABELS[key]
    figures = {name: model["quality"][key] for name, model in models.items()}
    places = {name: place for name, model in models.items() if (place := cost_of(model, cost)) is not None}
    points = {name: (place, figures[name].value * factor) for name, place in places.items()}

    def draw(axis: Any) -> None:
        for index, name in enumerate(models):
            if name in points:
                difference = figures[name].difference_to_base
                error = None if difference is None or difference.stderr is None else difference.stderr * factor
                plot(axis, name, [points[name]], style=index, errors=[error], line=False)
                label(axis, short(name, 18), points[name], index, above=name == BASE)
        joined = sorted(points[name] for name in front)
        if len(joined) > 1:
            axis.plot(*zip(*joined, strict=True), color=COLOURS["soft"], linewidth=1, zorder=0)
        axis.axhline(points[BASE][1], color=COLOURS["soft"], linestyle="--", linewidth=0.8, zorder=0)
        values = [value for _, value in points.values()]
        if min(values) > 0 and max(values) > 4 * min(values):
            plain_log(axis)
        # From zero, so that a saving looks as large as it is; room for the labels on the right.
        axis.set(xlabel=COSTS[cost], ylabel=unit, xlim=(0, 1.4 * max(places.values()) or 1))
        axis.margins(y=0.2)

    told = "; ".join(f"{name}: {as_value(figures[name])} at {place:.4g}" for name, place in places.items())
    words = f"{BARS.capitalize()}. The dashed line is the base's. {told}."
    against = "KV cache" if cost == "kv" else "speed"
    return Chart(f"{QUALITY[key]} against {against}", words, draw)


def agreement(results: dict[str, Any]) -> list[Chart]:
    """KL and share of equal greedy tokens by position."""
    found = []
    for key, title, factor, unit in (
        ("kl", "Divergence from the base (lower is better)", 1, "KL, nats per token"),
        ("top1", "Same next token as the base (higher is better)", 100, "share of positions, %"),
    ):
        series = {}
        for name, model in results["models"].items():
            buckets = (model.get("agreement") or {}).get("by_position")
            if buckets:
                edges, values = buckets["edges"], buckets[key]
                ends = [*edges[1:], edges[-1] * 2]
                # A bucket stands at its geometric middle, because the axis is logarithmic.
                middles = [((start + 1) * max(end, start + 1)) ** 0.5 for start, end in zip(edges, ends, strict=True)]
                series[name] = [(x, y * factor) for x, y in zip(middles, values, strict=False)]
        found += _curves(results, series, title, "position in the text, tokens", unit, zero=True)
    return found


def lengths(results: dict[str, Any]) -> list[Chart]:
    """Perplexity by length of the text, and the retrieval probe by length."""
    texts, errors, answers = {}, {}, {}
    for name, model in results["models"].items():
        if model.get("lengths"):
            texts[name] = [(entry["length"], entry["perplexity"]) for entry in model["lengths"]]
            errors[name] = [entry["stderr"] for entry in model["lengths"]]
        if model.get("retrieval"):
            asked = [entry for entry in model["retrieval"] if entry["items"]]
            answers[name] = [(entry["length"], 100 * entry["correct"] / entry["items"]) for entry in asked]
    tokens = "tokens of the text"
    return [
        *_curves(results, texts, "Perplexity by length (lower is better)", tokens, "perplexity", errors=errors),
        *_curves(
            results, answers, "Retrieval from a long text (higher is better)", tokens, "correct answers, %", zero=True
        ),
    ]


def _curves(
    results: dict[str, Any],
    series: dict[str, list[tuple[float, float]]],
    title: str,
    x: str,
    y: str,
    *,
    errors: dict[str, list[float]] | None = None,
    zero: bool = False,
) -> list[Chart]:
    """One line for each model over a logarithmic axis; no chart where nothing was measured."""
    series = {name: points for name, points in series.items() if points}
    if not series:
        return []

    def draw(axis: Any) -> None:
        from matplotlib.ticker import ScalarFormatter

        for index, name in enumerate(results["models"]):
            if name in series:
                plot(axis, short(name), series[name], style=index, errors=(errors or {}).get(name))
        axis.set_xscale("log", base=2)
        axis.xaxis.set_major_formatter(ScalarFormatter())
        axis.set(xlabel=x, ylabel=y)
        if zero:
            from_zero(axis)
        axis.legend()

    told = "; ".join(
        f"{name}: {points[0][1]:.4g} at {points[0][0]:,.0f} tokens, {points[-1][1]:.4g} at {points[-1][0]:,.0f}"
        for name, points in series.items()
    )
    bars = "Bars: one standard error of each value. " if errors else ""
    return [Chart(title, f"{bars}{told}.", draw)]


def training(evidence: Evidence) -> list[Chart]:
    """Loss over steps, one chart for each trained model, with the loss on held-out rows."""
    found = []
    for folder, content in evidence.training.items():
        heldout = {
            name: (entry["mean"], entry["stderr"])
            for name, entry in (content["report"].get("heldout_responses") or {}).items()
        }
        if any(line.get("loss") is not None for line in content["lines"]):
            found.append(loss_chart(content["lines"], heldout, f"Training of {folder}/ (lower is better)"))
    return found


def damage(evidence: Evidence) -> Chart | None:
    """Error of each changed layer's attention output before and after the fit."""
    fits = (evidence.conversion or {}).get("fits")
    if not fits:
        return None

    def draw(axis: Any) -> None:
        for style, (key, name) in enumerate((("error_before", "before the fit"), ("error_after", "after the fit")), 1):
            plot(axis, name, [(fit["layer"], fit[key]) for fit in fits], style=style, line=False)
        axis.axhline(1, color=COLOURS["soft"], linestyle="--", linewidth=0.8, label="no output at all")
        axis.set(xlabel="layer", ylabel="relative squared error")
        from_zero(axis)
        axis.xaxis.get_major_locator().set_params(integer=True)
        axis.legend()

    worst = max(fits, key=lambda fit: fit["error_after"])
    words = (
        f"Relative squared error of the attention output of each changed layer, on tokens held out from its "
        f"fit; 1 is as bad as no output at all. Largest after the fit: layer {worst['layer']}, "
        f"{worst['error_after']:.3f} (before the fit {worst['error_before']:.3f})."
    )
    return Chart("Error by layer, before and after the fit", words, draw)


def frontier(evidence: Evidence) -> Chart | None:
    """The layouts that the search saw, and the chosen one."""
    grouping = evidence.grouping
    seen = [entry for entry in (grouping or {}).get("frontier", ()) if entry.get("value") is not None]
    if grouping is None or not seen:
        return None
    # The head maps of the chosen one may have been refined afterwards; which layers borrow stays.
    kinds = [entry["kind"] for entry in (evidence.conversion or {}).get("layout") or ()]
    chosen = next((entry for entry in seen if [layer["kind"] for layer in entry["layers"]] == kinds), None)
    words = f"Layouts kept by the search, by remaining KV bytes; lower is better ({grouping['measure']})."
    if chosen is not None:
        share = 100 * chosen["kv_share"]
        words += f" Chosen: {chosen['changed']} changed layers, {share:.0f} % of the KV bytes."
    points = [(entry["series"], 100 * entry["kv_share"], entry["value"]) for entry in seen]
    return frontier_chart(points, chosen and 100 * chosen["kv_share"], str(grouping["measure"]), words)


def layer_map(evidence: Evidence) -> Chart | None:
    """Similarity of the maps, every layer against the earlier ones, with the chosen borrowings framed."""
    layout = None if evidence.conversion is None else Layout.from_list(evidence.conversion["layout"])
    if evidence.similarity is None and layout is None:
        return None
    similarity = evidence.similarity or []
    known = [value for row in similarity for value in row if value is not None]
    count = len(similarity or layout or ())

    def draw(axis: Any) -> None:
        if known:
            _cells(axis, similarity, known)
        if layout is not None:
            _borrowings(axis, layout, 200 / count)
        axis.set(xlabel="earlier layer", ylabel="layer", xlim=(-0.6, count - 0.4), ylim=(count - 0.4, -0.6))
        axis.set_aspect("equal")
        axis.grid(visible=False)
        for each in (axis.xaxis, axis.yaxis):
            each.get_major_locator().set_params(integer=True)

    words = _map_words(evidence, layout, known)
    return Chart("Similarity of the layers' maps, and which layers share", words, draw, height=HEIGHT + 1.6)


def _cells(axis: Any, similarity: list[list[float | None]], known: list[float]) -> None:
    """One path for all cells of a level, so that a hundred layers stay a small file."""
    from matplotlib.patches import PathPatch
    from matplotlib.path import Path

    low, high = min(known), max(known)
    levels: dict[int, list[Any]] = {}
    for layer, row in enumerate(similarity):
        for other, value in enumerate(row):
            if value is not None:
                level = round((value - low) / ((high - low) or 1) * (LEVELS - 1))
                square = [(other + dx, layer + dy) for dx, dy in ((-0.5, -0.5), (0.5, -0.5), (0.5, 0.5), (-0.5, 0.5))]
                levels.setdefault(level, []).append(Path([*square, square[0]], closed=True))
    for level, cells in sorted(levels.items()):
        strength = 0.04 + 0.9 * level / (LEVELS - 1)
        axis.add_patch(
            PathPatch(Path.make_compound_path(*cells), facecolor=COLOURS["heat"], alpha=strength, linewidth=0)
        )


def _borrowings(axis: Any, layout: Layout, cell: float) -> None:
    """Layers on the diagonal; a frame where a layer borrows from another, the thicker the more heads.

    Args:
        cell: size of a cell, in points.
    """
    from matplotlib.patches import Rectangle

    size = min(cell / 1.6, 5)
    for layer, plan in enumerate(layout):
        if plan.kind == "own":
            axis.plot(layer, layer, MARKERS[0], markersize=size, color=COLOURS["ink"])
        elif plan.traits.borrows_maps:
            axis.plot(layer, layer, MARKERS[0], markersize=size, color=COLOURS["s1"], markerfacecolor=COLOURS["page"])
        else:
            axis.text(layer, layer, plan.traits.symbol, color=COLOURS["s1"], ha="center", va="center")
        for source, share in lenders(layout, layer).items():
            frame = partial(Rectangle, (source - 0.4, layer - 0.4), 0.8, 0.8, fill=False)
            width = max(0.8, min(cell, 10) * 0.25 * share)
            # On a halo in the colour of the page it shows on dark and on pale cells.
            axis.add_patch(frame(edgecolor=COLOURS["page"], linewidth=width + 1.4))
            axis.add_patch(frame(edgecolor=COLOURS["s1"], linewidth=width))


def lenders(layout: Layout, layer: int) -> dict[int, float]:
    """The layers that a layer borrows from, each with its share of the heads."""
    heads = Counter(source for source, _ in layout[layer].heads or ())
    total = sum(heads.values())
    return {source: heads[source] / total if total else 1.0 for source in layout[layer].source_layers}


def _map_words(evidence: Evidence, layout: Layout | None, known: list[float]) -> str:
    words = []
    if known:
        words.append(
            f"Each cell: similarity of a layer's heads to the most similar head of an earlier layer, averaged over "
            f"heads, on {evidence.similarity_tokens:,} tokens ({min(known):.2f}, faint, to {max(known):.2f}, strong; "
            f"empty if the layers are further apart than was measured)."
        )
    if layout is not None:
        groups: dict[tuple[int, ...], list[int]] = {}
        for layer in layout.changed:
            groups.setdefault(layout[layer].source_layers, []).append(layer)
        told = [
            f"{_listed(layers)} {'from ' + _listed(list(sources)) if sources else '(nothing borrowed)'}"
            for sources, layers in groups.items()
        ]
        words.append(f"{len(layout.changed)} of {len(layout)} layers were changed: {'; '.join(told)}.")
        kinds = [kind for kind in KINDS.values() if any(plan.kind == kind.name for plan in layout)]
        signs = [f"{'○' if kind.borrows_maps else kind.symbol} {kind.phrase}" for kind in kinds if kind.name != "own"]
        words.append(f"On the diagonal: {', '.join(['● unchanged layer', *signs])}.")
        if any(kind.borrows for kind in kinds):
            words.append("Frames show the lenders, thicker for more heads.")
    return " ".join(words)


def _listed(numbers: list[int]) -> str:
    return " and ".join(filter(None, [", ".join(map(str, numbers[:-1])), str(numbers[-1])]))


def existing(*makers: Callable[[Evidence], Chart | None], evidence: Evidence) -> list[Chart]:
    """The charts for which there are files."""
    return [chart for make in makers if (chart := make(evidence)) is not None]
