"""Which lenders weigh their borrowers' values together with their own.

A follower's map is its leader's, the queries of a layer that asks early are known when its lender runs, and all values
but the newest are in the cache by then. So the lender's pass over its keys can do the sums of both: out_b = sum over
older keys of p_j v_b,j, to which the borrower only adds its newest value. Keys are read once for all of them, and no
map leaves the kernel: it is neither written nor read again.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from uniattn_cli.inference.program import LayerProgram, Program, share_slots

# Borrowers for each key/value head of a lender; a kernel's shared memory holds blocks of no more values.
MOST_LENT = 3

# Of a lender, for each of its key/value heads the (borrower, key/value head of it) that take it.
Heads = list[list[tuple[int, int]]]


@dataclass(frozen=True)
class Lending:
    """Who is served.

    Attributes:
        owning: per lender the heads of borrowers that have values of their own.
        sharing: the same for borrowers of the lender's values, whose output is complete.
        slots: per borrower a place for its results, given back when it has run.
    """

    owning: dict[int, Heads]
    sharing: dict[int, Heads]
    slots: dict[int, int]

    def lent(self, lender: int) -> int:
        """Most borrowers with values of their own that one key/value head serves; 0 for a layer that serves nobody."""
        return max(map(len, self.owning.get(lender, ())), default=0)

    def units(self, lender: int) -> int:
        """Layers whose queries one pass of a lender answers, at most, itself included."""
        return 1 + self.lent(lender) + max(map(len, self.sharing.get(lender, ())), default=0)

    @property
    def lenders(self) -> set[int]:
        """Layers that serve somebody."""
        return {lender for served in (self.owning, self.sharing) for lender, heads in served.items() if any(heads)}


def plan_lending(program: Program, *, keeps_maps: bool = True) -> Lending:
    """Serves the borrowers of which every key/value head takes one key/value head of a lender.

    A leader serves all its followers or none: one that needs the map needs it written, and then the others may as well
    read it. So a follower with a free head map, or one too many, also leaves its leaders' other followers unserved. A
    layer that asks early and finds no place reads keys again, which others need not do.

    Args:
        keeps_maps: followers for whom there is no place read a map that is kept; else they too read keys again, and
            each is served for whom there is a place.
    """
    followers = [layer for layer in program.layers if layer.kind.borrows_maps]
    kept: set[int] = set()
    while True:
        found = _Served()
        missed = found.take(layer for layer in followers if not kept & _lenders(layer))
        missed += [layer for layer in followers if kept & _lenders(layer)]
        if not keeps_maps:
            break
        more = kept.union(*map(_lenders, missed))
        if more == kept:
            break
        kept = more
    # A kernel that writes its map serves nobody.
    found.take(layer for layer in program.layers if layer.kind.early and not kept & _lenders(layer))
    spans = {layer.index: (min(_lenders(layer)), layer.index) for layer in found.served}
    return Lending(found.owning, found.sharing, share_slots(spans))


def _lenders(layer: LayerProgram) -> set[int]:
    return {lender for lender, _ in layer.key_sources}


class _Served:
    """Layers that have been given places, each wholly or not at all."""

    def __init__(self) -> None:
        self.owning: dict[int, Heads] = {}
        self.sharing: dict[int, Heads] = {}
        self.served: list[LayerProgram] = []

    def take(self, layers: Iterable[LayerProgram]) -> list[LayerProgram]:
        """Serves layers in order, and returns those for which there is no place."""
        missed = []
        for layer in layers:
            sources = layer.key_sources
            # One head may be taken several times.
            if layer.value_groups == 1 and all(
                self._count(*source) + sources.count(source) <= MOST_LENT for source in sources
            ):
                served = self.sharing if layer.kind.borrows_values else self.owning
                for head, (lender, place) in enumerate(sources):
                    served.setdefault(lender, [[] for _ in sources])[place].append((layer.index, head))
                self.served.append(layer)
            else:
                missed.append(layer)
        return missed

    def _count(self, lender: int, head: int) -> int:
        return sum(len(served[lender][head]) for served in (self.owning, self.sharing) if lender in served)
