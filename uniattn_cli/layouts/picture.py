"""A layout as a few lines of characters."""

from __future__ import annotations

from collections import Counter
from string import ascii_uppercase

from uniattn_cli.modeling.layout_uniattn import KINDS, Layout

WIDTH = 60


def draw_layout(layout: Layout) -> str:
    """Draws layers from left to right.

    A source layer is a capital letter, a Softmax follower the small letter of the layer that it borrows most heads
    from; other layers are symbols that the legend explains.
    """
    sources = sorted(layout.last_use)
    letters = {layer: ascii_uppercase[index % 26] for index, layer in enumerate(sources)}
    cells = []
    for index, plan in enumerate(layout):
        if plan.kind == "own":
            cells.append(letters.get(index, plan.traits.symbol))
        elif plan.traits.borrows_maps:
            layers = Counter(layer for layer, _ in plan.heads or ((plan.leader or 0, 0),))
            cells.append(letters[layers.most_common(1)[0][0]].lower())
        else:
            cells.append(plan.traits.symbol)
    lines = []
    for start in range(0, len(cells), WIDTH):
        part = cells[start : start + WIDTH]
        marks = "".join(f"{index:<10}" for index in range(start, start + len(part), 10))
        lines += [f"layer  {marks}".rstrip(), f"       {''.join(part)}"]
    kinds = [kind for kind in KINDS.values() if any(plan.kind == kind.name for plan in layout)]
    legend = ["■ unchanged"]
    if any(kind.borrows_maps for kind in kinds):
        legend.append("A lends its maps, a borrows (most) from A")
    elif letters:
        legend.append("capital letters lend to later layers")
    legend += [f"{kind.symbol} {kind.name}" for kind in kinds if kind.name != "own" and not kind.borrows_maps]
    return "\n".join([*lines, "       " + ", ".join(legend)])
