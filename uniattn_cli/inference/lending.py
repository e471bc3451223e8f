"""Which leaders weigh their followers' values together with their own.

A follower's map is its leader's, and all its values but the newest are in the cache when the leader runs. So it
can do both sums in one pass: out_f = sum over older keys of p_j v_f,j, to which the follower only adds its newest
value. The map then never leaves the kernel: it is neither written nor read again.
"""

from __future__ import annotations

from dataclasses import dataclass

from uniattn_cli.inference.program import LayerProgram, Program

# Followers for each key/value head of a leader; a kernel's shared memory holds blocks of no more.
MOST_LENT = 3


@dataclass(frozen=True)
class Lending:
    """Who is served.

    Attributes:
        served: per leader and key/value head of it, the (follower, key/value head) that it weighs the values of.
        places: per follower, the place in that list for each of its key/value heads.
    """

    served: dict[int, tuple[tuple[tuple[int, int], ...], ...]]
    places: dict[int, tuple[int, ...]]

    def count(self, leader: int) -> int:
        """Most followers that one of a leader's key/value heads serves; 0 for a layer that serves nobody."""
        return max(map(len, self.served.get(leader, ())), default=0)


def plan_lending(program: Program) -> Lending:
    """Serves the followers of which every key/value head takes one key/value head of a leader.

    A leader serves all its followers or none: one that needs the map needs it written, and then the others may as well
    read it. So a follower with a free head map, or one too many, also leaves its leaders' other followers unserved.
    """
    layers = {layer.index: layer for layer in program.layers if layer.kind.borrows_maps}
    kept: set[int] = set()
    while True:
        served, places = _serve([layer for layer in layers.values() if not kept & _leaders(layer)])
        missed = set(layers) - set(places)
        found = kept.union(*(_leaders(layers[index]) for index in missed))
        if found == kept:
            return Lending(
                {leader: tuple(map(tuple, heads)) for leader, heads in served.items()},
                {follower: tuple(heads) for follower, heads in places.items()},
            )
        kept = found


def _leaders(layer: LayerProgram) -> set[int]:
    return {leader for leader, _ in layer.query_sources}


def _serve(
    followers: list[LayerProgram],
) -> tuple[dict[int, list[list[tuple[int, int]]]], dict[int, list[int]]]:
    """Serves followers in order, each wholly or not at all."""
    served: dict[int, list[list[tuple[int, int]]]] = {}
    places: dict[int, list[int]] = {}
    for layer in followers:
        if layer.value_groups > 1:
            continue
        lists = [
            served.setdefault(leader, [[] for _ in range(layer.kv_heads)])[head] for leader, head in layer.key_sources
        ]
        # One list may be wanted by several heads.
        if any(len(wanted) + sum(other is wanted for other in lists) > MOST_LENT for wanted in lists):
            continue
        places[layer.index] = []
        for head, wanted in enumerate(lists):
            places[layer.index].append(len(wanted))
            wanted.append((layer.index, head))
    return {leader: heads for leader, heads in served.items() if any(heads)}, places
