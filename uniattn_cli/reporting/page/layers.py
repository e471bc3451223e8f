"""The parts of the page that show layers: similarity map with the groups on it, error by layer, layouts considered."""

from __future__ import annotations

from collections import Counter
from typing import Any

from uniattn_cli.modeling.layout_uniattn import KINDS, Layout
from uniattn_cli.reporting.page.evidence import Evidence
from uniattn_cli.reporting.page.markup import Html, figure, join, table, tag
from uniattn_cli.reporting.page.plot import WIDTH, Axis, DataSeries, chart, drawing, legend, marker

LEVELS = 16
MAP_LEFT, MAP_TOP, MAP_BOTTOM = 40.0, 22.0, 66.0


def redundancy(evidence: Evidence) -> Html | None:
    """Similarity of the maps, every layer against the earlier ones, with the chosen borrowings framed."""
    layout = None if evidence.conversion is None else Layout.from_list(evidence.conversion["layout"])
    if evidence.similarity is None and layout is None:
        return None
    count = len(evidence.similarity or layout or ())
    cell = (WIDTH - MAP_LEFT - 14) / count
    parts = []
    known = [value for row in evidence.similarity or () for value in row if value is not None]
    low, high = (min(known), max(known)) if known else (0.0, 1.0)
    if evidence.similarity is not None:
        parts += _cells(evidence.similarity, cell, low, high)
    if layout is not None:
        parts += _borrowings(layout, cell)
    parts += _numbers(count, cell)
    height = MAP_TOP + count * cell + MAP_BOTTOM
    if known:
        parts.append(_key(low, high, height))
    words = _sentences(evidence, layout, known)
    drawn = drawing("Similarity of the layers' maps, and which layers share", words, height, parts)
    return figure(join((drawn, _map_legend(layout))), words)


def _place(index: int, cell: float, start: float) -> float:
    return start + index * cell


def _cells(similarity: list[list[float | None]], cell: float, low: float, high: float) -> list[Html]:
    """One path for all cells of a level, so that a hundred layers stay a small file."""
    levels: dict[int, list[str]] = {}
    for layer, row in enumerate(similarity):
        for other, value in enumerate(row):
            if value is not None:
                level = round((value - low) / ((high - low) or 1) * (LEVELS - 1))
                x, y = _place(other, cell, MAP_LEFT), _place(layer, cell, MAP_TOP)
                levels.setdefault(level, []).append(f"M{x:.1f} {y:.1f}h{cell:.1f}v{cell:.1f}h-{cell:.1f}z")
    return [
        tag("path", d="".join(cells), class_="heat", fill_opacity=f"{_strength(level):.3f}")
        for level, cells in sorted(levels.items())
    ]


def _strength(level: int) -> float:
    return 0.04 + 0.9 * level / (LEVELS - 1)


def _borrowings(layout: Layout, cell: float) -> list[Html]:
    """Layers on the diagonal; a frame where a layer borrows from another, the thicker the more heads."""
    parts = []
    for layer, plan in enumerate(layout):
        x, y = (_place(layer, cell, start) + cell / 2 for start in (MAP_LEFT, MAP_TOP))
        if plan.kind == "own":
            parts.append(tag("g", marker(x, y, 0, min(cell / 2.6, 4)), class_="s0"))
        elif plan.traits.borrows_maps:
            parts.append(tag("g", marker(x, y, 0, min(cell / 2.6, 4), "hollow"), class_="s1"))
        else:
            letter = plan.traits.symbol
            parts.append(tag("text", letter, x=f"{x:.1f}", y=f"{y + 4:.1f}", text_anchor="middle", class_="s1"))
        heads = Counter(source for source, _ in plan.heads or ())
        for source in plan.source_layers:
            share = heads[source] / sum(heads.values()) if heads else 1.0
            words = f"layer {layer} borrows {share:.0%} of its heads from layer {source}"
            parts.append(_frame(source, layer, cell, share, words))
    return parts


def _frame(source: int, layer: int, cell: float, share: float, words: str) -> Html:
    """A frame inside a cell, on a halo in the colour of the page, so that it shows on dark and on pale cells."""
    width = max(1.0, min(cell, 12) * 0.28 * share)
    inset = width / 2 + 0.6
    place = {
        "x": f"{_place(source, cell, MAP_LEFT) + inset:.1f}",
        "y": f"{_place(layer, cell, MAP_TOP) + inset:.1f}",
        "width": f"{cell - 2 * inset:.1f}",
        "height": f"{cell - 2 * inset:.1f}",
    }
    halo = tag("rect", **place, class_="halo", stroke_width=f"{width + 1.6:.1f}")
    return tag("g", tag("title", words), halo, tag("rect", **place, class_="frame", stroke_width=f"{width:.1f}"))


def _numbers(count: int, cell: float) -> list[Html]:
    step = next(step for step in (1, 2, 5, 10, 20) if cell * step >= 20)
    parts = []
    bottom = MAP_TOP + count * cell
    for layer in range(0, count, step):
        middle = _place(layer, cell, 0) + cell / 2
        parts.append(
            tag("text", layer, x=f"{MAP_LEFT + middle:.1f}", y=bottom + 14, text_anchor="middle", class_="tick")
        )  # fmt: skip
        parts.append(
            tag("text", layer, x=MAP_LEFT - 5, y=f"{MAP_TOP + middle + 4:.1f}", text_anchor="end", class_="tick")
        )
    centre = (MAP_LEFT + WIDTH - 14) / 2
    parts.append(tag("text", "earlier layer", x=f"{centre:.1f}", y=bottom + 30, text_anchor="middle"))
    side = (MAP_TOP + bottom) / 2
    parts.append(tag("text", "layer", text_anchor="middle", transform=f"translate(11 {side:.1f}) rotate(-90)"))
    return parts


def _key(low: float, high: float, height: float) -> Html:
    """The scale of the cells."""
    width = 9
    start = WIDTH - 14 - LEVELS * width
    parts = [
        tag(
            "rect",
            x=start + level * width,
            y=height - 25,
            width=width,
            height=9,
            class_="heat",
            fill_opacity=f"{_strength(level):.3f}",
        )
        for level in range(LEVELS)
    ]
    end = WIDTH - 14
    parts.append(tag("text", f"{low:.2f}", x=start, y=height - 4, class_="tick"))
    parts.append(tag("text", f"{high:.2f}", x=end, y=height - 4, text_anchor="end", class_="tick"))
    parts.append(tag("text", "similarity of maps", x=start - 8, y=height - 17, text_anchor="end", class_="tick"))
    return tag("g", parts)


def _map_legend(layout: Layout | None) -> Html | None:
    if layout is None:
        return None
    kinds = [kind for kind in KINDS.values() if any(plan.kind == kind.name for plan in layout)]

    def swatch(shape: Html, style: str) -> Html:
        return tag("svg", shape, viewBox="0 0 30 14", aria_hidden="true", class_=style)

    items = [tag("li", swatch(marker(15, 7, 0), "s0"), " unchanged layer")]
    for kind in kinds:
        if kind.name != "own":
            sign = swatch(marker(15, 7, 0, 4.2, "hollow"), "s1") if kind.borrows_maps else tag("b", kind.symbol)
            items.append(tag("li", sign, f" {kind.phrase}"))
    if any(kind.borrows for kind in kinds):
        frame = tag("rect", x=10, y=2, width=10, height=10, class_="frame", stroke_width=2.5)
        items.append(tag("li", swatch(frame, "s1"), " from this layer (thicker for more heads)"))
    return tag("ul", items, class_="legend")


def _sentences(evidence: Evidence, layout: Layout | None, known: list[float]) -> str:
    words = []
    if known:
        words.append(
            f"Each cell: similarity of a layer's heads to the most similar head of an earlier layer, averaged over "
            f"heads, on {evidence.similarity_tokens:,} tokens ({min(known):.2f} to {max(known):.2f}; empty if the "
            f"layers are further apart than was measured)."
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
    return " ".join(words)


def _listed(numbers: list[int]) -> str:
    return " and ".join(filter(None, [", ".join(map(str, numbers[:-1])), str(numbers[-1])]))


def damage(evidence: Evidence) -> Html | None:
    """Error of each changed layer's attention output before and after the fit."""
    fits = (evidence.conversion or {}).get("fits")
    if not fits:
        return None
    before = [(fit["layer"], fit["error_before"]) for fit in fits]
    after = [(fit["layer"], fit["error_after"]) for fit in fits]
    worst = max(fits, key=lambda fit: fit["error_after"])
    words = (
        f"Relative squared error of the attention output of each changed layer, on tokens held out from its "
        f"fit; 1 is as bad as no output at all. Largest after the fit: layer {worst['layer']}, "
        f"{worst['error_after']:.3f} (before the fit {worst['error_before']:.3f})."
    )
    drawn = chart(
        "Error by layer, before and after the fit",
        words,
        [
            DataSeries("before the fit", before, style=1, line=False),
            DataSeries("after the fit", after, style=2, line=False),
        ],
        Axis("layer", whole=True, zero=True),
        Axis("relative squared error", zero=True),
        limits=[("no output at all", 1.0)],
    )
    names = legend([("before the fit", 1, False), ("after the fit", 2, False)])
    return figure(join((drawn, names)), words)


def fit_table(evidence: Evidence) -> Html | None:
    """The same in numbers, collapsed."""
    fits = (evidence.conversion or {}).get("fits")
    if not fits:
        return None
    rows = [[str(fit["layer"]), fit["kind"], f"{fit['error_before']:.3f}", f"{fit['error_after']:.3f}"] for fit in fits]
    body = table("Error of the attention output", ["layer", "kind", "before", "after the fit"], rows)
    return tag("details", tag("summary", "In numbers"), body)


def frontier(evidence: Evidence) -> Html | None:
    """The layouts that the search saw, and the chosen one."""
    grouping = evidence.grouping
    if grouping is None:
        return None
    series: dict[str, list[tuple[float, float]]] = {}
    for entry in grouping["frontier"]:
        if entry.get("value") is not None:
            series.setdefault(entry["series"], []).append((100 * entry["kv_share"], entry["value"]))
    if not series:
        return None
    # The head maps of the chosen one may have been refined afterwards; which layers borrow stays.
    kinds = [entry["kind"] for entry in (evidence.conversion or {}).get("layout") or ()]
    chosen = next(
        (entry for entry in grouping["frontier"] if [layer["kind"] for layer in entry["layers"]] == kinds), None
    )
    drawn_series = [
        DataSeries(name, sorted(points), style=index) for index, (name, points) in enumerate(series.items(), 1)
    ]
    words = f"Layouts kept by the search, by remaining KV bytes; lower is better ({grouping['measure']})."
    if chosen is not None and chosen.get("value") is not None:
        point = (100 * chosen["kv_share"], chosen["value"])
        drawn_series.append(DataSeries("chosen", [point], style=0, line=False, label=True))
        words += f" Chosen: {chosen['changed']} changed layers, {100 * chosen['kv_share']:.0f} % of the KV bytes."
    drawn = chart(
        "Layouts considered",
        words,
        drawn_series,
        Axis("KV cache, % of the base's"),
        Axis(_measure(grouping)),
        room=0.12,
    )
    names = legend([(entry.name, entry.style, entry.line) for entry in drawn_series])
    return figure(join((drawn, names)), words)


def _measure(grouping: dict[str, Any]) -> str:
    text = str(grouping["measure"])
    return text if len(text) <= 32 else "measure of the search"
