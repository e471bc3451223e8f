"""A layout as a few lines of characters."""

from __future__ import annotations

from collections import Counter
from string import ascii_uppercase

from uniattn_cli.modeling.layout_uniattn import Layout

WIDTH = 60
SYMBOLS = {"own": "■", "key": "k", "kv": "v", "pooled": "p", "linear": "l", "none": "·"}


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
            cells.append(letters.get(index, SYMBOLS["own"]))
        elif plan.kind == "softmax":
            layers = Counter(layer for layer, _ in plan.heads or ((plan.leader, 0),))
            cells.append(letters[layers.most_common(1)[0][0]].lower())
        else:
            cells.append(SYMBOLS[plan.kind])
    lines = []
    for start in range(0, len(cells), WIDTH):
        part = cells[start : start + WIDTH]
        marks = "".join(f"{index:<10}" for index in range(start, start + len(part), 10))
        lines += [f"layer  {marks}".rstrip(), f"       {''.join(part)}"]
    kinds = {plan.kind for plan in layout}
    legend = ["■ unchanged"]
    if "softmax" in kinds:
        legend.append("A lends its maps, a borrows (most) from A")
    legend += [f"{SYMBOLS[kind]} {kind}" for kind in ("key", "kv", "pooled", "linear", "none") if kind in kinds]
    return "\n".join([*lines, "       " + ", ".join(legend)])
