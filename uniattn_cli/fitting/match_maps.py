"""Which head of which earlier layer each head of a follower borrows, from the similarities that `analyze` measured.

Similarities have shape [layers, max_distance, heads, heads]: entry [j, d - 1, h, g] compares head h of layer j with
head g of layer j - d; larger is more alike.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass

import numpy as np

from uniattn_cli.modeling.layout_uniattn import KINDS, AttentionShape, Layout


@dataclass(frozen=True)
class Match:
    """A head map and how good it is.

    Attributes:
        score: similarity of the borrowed to the own maps, averaged over query heads.
        sources: (layer, head) for each query head.
    """

    score: float
    sources: tuple[tuple[int, int], ...]


class Matcher:
    """Finds head maps of one family: `identity`, `grouped` or `free` (see `LayoutSpec.head_map`)."""

    def __init__(self, similarity: np.ndarray, shape: AttentionShape, head_map: str, sources: str):
        self.similarity = similarity
        self.shape = shape
        self.head_map = head_map
        self.several = sources == "several" and head_map != "identity"
        self.max_distance = similarity.shape[1]
        self._units: dict[tuple[int, int], list[tuple[float, list[tuple[int, int]]]]] = {}

    def for_kind(self, kind: str) -> Matcher:
        """What matches layers of a kind: without borrowed maps, all queries of a key/value group take the same head."""
        if KINDS[kind].borrows_maps or self.head_map != "free":
            return self
        return Matcher(self.similarity, self.shape, "grouped", "several" if self.several else "one")

    def candidates(self, layer: int) -> list[int]:
        """Earlier layers that `layer` may borrow from, nearest first."""
        first = max(0, layer - self.max_distance)
        same = self.shape.mask_types[layer]
        return [other for other in range(layer - 1, first - 1, -1) if self.shape.mask_types[other] == same]

    def lenders(self, layout: Layout, layer: int, max_group: int | None = None) -> list[int]:
        """Layers that can lend to `layer` in a layout, nearest first.

        Args:
            max_group: largest number of layers that one layer may lend to; `layer` itself does not count.
        """
        borrowers = Counter(
            source for index, plan in enumerate(layout) if index != layer for source in plan.source_layers
        )
        return [
            other
            for other in self.candidates(layer)
            if layout[other].kind == "own" and (max_group is None or borrowers[other] < max_group)
        ]

    def similarity_of(self, layout: Layout) -> float:
        """Mean similarity of the borrowed to the own maps over the heads of all Softmax followers; NaN without any.

        Followers of layers farther away than was measured are left out.
        """
        found = [
            self.similarity[layer, layer - source - 1, own, head]
            for layer in layout.followers
            for own, (source, head) in enumerate(layout[layer].sources(self.shape))
            if layer - source <= self.max_distance
        ]
        return float(np.mean(found)) if found else float("nan")

    def match(self, layer: int, sources: list[int]) -> Match | None:
        """The best head map of `layer` onto `sources`; None if there are none.

        Heads are chosen unit by unit: a unit is what must come from one layer together, a key/value group for
        `grouped`, a head for `free`, the whole layer for `identity`.
        """
        if not sources:
            return None
        per_layer = {source: self._best_units(layer, source) for source in sources}
        if not self.several:
            best = max(sources, key=lambda source: sum(score for score, _ in per_layer[source]))
            chosen = per_layer[best]
        else:
            units = range(len(next(iter(per_layer.values()))))
            chosen = [max((per_layer[source][unit] for source in sources), key=lambda item: item[0]) for unit in units]
        heads = [pair for _, pairs in chosen for pair in pairs]
        return Match(sum(score for score, _ in chosen) / self.shape.query_heads, tuple(heads))

    def _best_units(self, layer: int, source: int) -> list[tuple[float, list[tuple[int, int]]]]:
        key = (layer, source)
        if key not in self._units:
            table = self.similarity[layer, layer - source - 1]
            self._units[key] = [(score, [(source, head) for head in heads]) for score, heads in self._units_of(table)]
        return self._units[key]

    def _units_of(self, table: np.ndarray) -> list[tuple[float, list[int]]]:
        """(summed similarity, source heads) of each unit, for one pair of layers [heads, heads]."""
        if self.head_map == "identity":
            return [(float(np.trace(table)), list(range(len(table))))]
        if self.head_map == "free":
            return [(float(row.max()), [int(row.argmax())]) for row in table]
        size = self.shape.group_size
        units = []
        for start in range(0, self.shape.query_heads, size):
            rows = table[start : start + size].reshape(size, -1, size)
            group = int(rows.max(2).sum(0).argmax())
            heads = group * size + rows[:, group].argmax(1)
            units.append((float(rows[:, group].max(1).sum()), [int(head) for head in heads]))
        return units
