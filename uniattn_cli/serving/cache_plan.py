"""What an engine that owns its cache has to keep for a layout, and which cached heads each layer reads.

Everything is counted in units: the keys, or the values, of one layer. Units have the same shape in every layer, so one
block table addresses all of them: a stock layer is two, one that borrows its keys only one. Standard library only.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from uniattn_cli.modeling.layout_uniattn import AttentionShape, Layout

# vLLM knows the keys of layer `X.attn` as the layer `X.attn_keys`.
KEYS_SUFFIX = "_keys"


@dataclass(frozen=True)
class Run:
    """Neighbouring query heads that one call of a kernel serves.

    Attributes:
        query_head: first query head.
        query_heads: how many; a multiple of `kv_heads`.
        key_layer: layer whose cached keys they read.
        key_head: first key head there.
        value_layer: layer whose cached values they read.
        value_head: first value head there.
        kv_heads: how many key heads, and as many value heads.
        key_step: distance of one key head to the next.
        value_step: the same for value heads.
    """

    query_head: int
    query_heads: int
    key_layer: int
    key_head: int
    value_layer: int
    value_head: int
    kv_heads: int
    key_step: int = 1
    value_step: int = 1


@dataclass(frozen=True)
class Write:
    """Neighbouring heads of new values, with the keys that belong beside them.

    Attributes:
        key_layer: layer in whose cache the keys lie.
        key_head: first key head there.
        value_head: first value head in the layer's own cache.
        argument: first head in the tensors that the model code passes to the attention call.
        heads: how many.
    """

    key_layer: int
    key_head: int
    value_head: int
    argument: int
    heads: int


def kv_heads_of(layout: Layout, shape: AttentionShape, index: int) -> int:
    """Key/value heads that a layer keeps in each of its units."""
    return layout[index].own_kv_heads(shape)


def read_runs(layout: Layout, shape: AttentionShape, index: int, strided: bool = False) -> tuple[Run, ...]:
    """The kernel calls of one layer, as few as its head map allows: one where heads are neighbours of one layer.

    Args:
        layout: of the heads that are here (`shard_layout`).
        shape: sizes to match.
        index: the layer.
        strided: the kernel also takes heads at equal distances, and other distances of keys than of values.
    """
    plan = layout[index]
    group = shape.query_heads // kv_heads_of(layout, shape, index)
    sources = []
    pairs = plan.sources(shape)
    if plan.traits.borrows_maps:
        sources = [(layer, head // group, index, query // group) for query, (layer, head) in enumerate(pairs)]
    elif plan.traits.borrows:
        for query in range(shape.query_heads):
            layer, head = pairs[query // group]
            values = (layer, head) if plan.traits.borrows_values else (index, query // group)
            sources.append((layer, head, *values))
    else:
        sources = [(index, query // group, index, query // group) for query in range(shape.query_heads)]
    return _merge(sources, strided)


def passed_kv_heads(layout: Layout, shape: AttentionShape, index: int) -> int:
    """Key/value heads that the model code passes to the attention call: free head maps get one per query head."""
    kept = kv_heads_of(layout, shape, index)
    if not layout[index].traits.borrows_maps:
        return kept
    keys = {
        (run.value_head + head, run.key_layer, run.key_head + head)
        for run in read_runs(layout, shape, index)
        for head in range(run.kv_heads)
    }
    return kept if len(keys) == kept else shape.query_heads


def writes(layout: Layout, shape: AttentionShape, index: int) -> tuple[Write, ...]:
    """How the new values of a layer, and its keys where they are its own, get into the cache."""
    if "v" not in layout[index].traits.caches:
        return ()
    runs = read_runs(layout, shape, index)
    if passed_kv_heads(layout, shape, index) == kv_heads_of(layout, shape, index):
        return tuple(Write(run.key_layer, run.key_head, run.value_head, run.value_head, run.kv_heads) for run in runs)
    first: dict[int, Write] = {}
    for run in runs:
        group = run.query_heads // run.kv_heads
        for head in range(run.kv_heads):
            value_head = run.value_head + head
            first.setdefault(
                value_head, Write(run.key_layer, run.key_head + head, value_head, run.query_head + head * group, 1)
            )
    return tuple(first.values())


def _merge(sources: Sequence[tuple[int, int, int, int]], strided: bool) -> tuple[Run, ...]:
    """Joins query heads that read the same heads, then groups of equal size that read heads at equal distances."""
    groups: list[list] = []
    for query, source in enumerate(sources):
        if groups and groups[-1][2] == source:
            groups[-1][1] += 1
        else:
            groups.append([query, 1, source])
    runs: list[Run] = []
    for query, count, (key_layer, key_head, value_layer, value_head) in groups:
        joined = None if not runs else _extended(runs[-1], count, key_layer, key_head, value_layer, value_head, strided)
        if joined is None:
            runs.append(Run(query, count, key_layer, key_head, value_layer, value_head, 1))
        else:
            runs[-1] = joined
    return tuple(runs)


def _extended(
    run: Run, count: int, key_layer: int, key_head: int, value_layer: int, value_head: int, strided: bool
) -> Run | None:
    """A run with `count` query heads more, which read these heads; None where they need a call of their own."""
    if (run.key_layer, run.value_layer) != (key_layer, value_layer) or run.query_heads != run.kv_heads * count:
        return None
    last = run.kv_heads - 1
    steps = (
        key_head - run.key_head - last * run.key_step,
        value_head - run.value_head - last * run.value_step,
    )
    if steps != (1, 1) if not strided else min(steps) < 1:
        return None
    if last and steps != (run.key_step, run.value_step):
        return None
    return replace(
        run,
        query_heads=run.query_heads + count,
        kv_heads=run.kv_heads + 1,
        key_step=steps[0],
        value_step=steps[1],
    )


def shard_layout(layout: Layout, shape: AttentionShape, rank: int, ranks: int) -> tuple[Layout, AttentionShape]:
    """Layout and sizes of the heads that one of several tensor-parallel ranks has, in that rank's own numbers.

    Args:
        layout: of all heads.
        shape: sizes of the whole model.
        rank: this rank.
        ranks: number of ranks.

    Raises:
        ValueError: the heads cannot be dealt out evenly, or one borrows from a head of another rank.
    """
    if ranks == 1:
        return layout, shape
    advice = "convert with layout.head_map=identity, or serve with fewer ranks"
    counts = [shape.query_heads, shape.kv_heads, *(plan.kv_heads for plan in layout if plan.kv_heads)]
    if any(count % ranks for count in counts):
        raise ValueError(f"layers with {min(counts)} heads cannot be shared by {ranks} tensor-parallel ranks")
    plans = []
    for index, plan in enumerate(layout):
        changes: dict = {}
        if plan.heads is not None:
            heads = plan.traits.borrowed_heads(shape) // ranks
            part = plan.heads[rank * heads : (rank + 1) * heads]
            if any(head // heads != rank for _, head in part):
                raise ValueError(f"the head map of layer {index} crosses the shards of {ranks} ranks; {advice}")
            changes["heads"] = tuple((layer, head - rank * heads) for layer, head in part)
        if plan.kv_heads:
            changes["kv_heads"] = plan.kv_heads // ranks
        plans.append(replace(plan, **changes))
    local = replace(shape, query_heads=shape.query_heads // ranks, kv_heads=shape.kv_heads // ranks)
    return Layout(tuple(plans)), local


def clusters(layout: Layout) -> list[list[int]]:
    """Layers that read each other's cache, directly or not, and so must share a block table; in ascending order."""
    parent = list(range(len(layout)))

    def root(index: int) -> int:
        while parent[index] != index:
            index = parent[index]
        return index

    for index, plan in enumerate(layout):
        for source in plan.source_layers:
            first, second = sorted((root(source), root(index)))
            parent[second] = first
    found: dict[int, list[int]] = {}
    for index in range(len(layout)):
        found.setdefault(root(index), []).append(index)
    return list(found.values())


def units(layout: Layout, index: int) -> int:
    """Units that a layer caches: 2 (keys and values), 1 (values) or 0."""
    return len(layout[index].traits.caches)


def pack(sizes: Sequence[int], capacity: int) -> list[list[int]]:
    """Puts clusters of these sizes into groups of at most `capacity` units, largest first; indices per group."""
    groups: list[list[int]] = []
    room: list[int] = []
    for index in sorted(range(len(sizes)), key=lambda index: (-sizes[index], index)):
        for group, free in enumerate(room):
            if sizes[index] <= free:
                groups[group].append(index)
                room[group] -= sizes[index]
                break
        else:
            groups.append([index])
            room.append(capacity - sizes[index])
    return [sorted(group) for group in groups]


def best_capacity(sizes: Sequence[Sequence[int]], pages: Sequence[int]) -> int:
    """Units per block with which one request of full length takes the least memory.

    Args:
        sizes: for each sort of layer (full, sliding), the units of its clusters.
        pages: for each sort, the blocks that a request of full length needs of one group.

    Returns:
        The capacity; the smallest among equals, because small blocks waste less at the end of a sequence.
    """
    largest, total = max(max(sort) for sort in sizes), max(sum(sort) for sort in sizes)

    def cost(capacity: int) -> int:
        return capacity * sum(len(pack(sort, capacity)) * count for sort, count in zip(sizes, pages, strict=True))

    return min(range(largest, total + 1), key=lambda capacity: (cost(capacity), capacity))
