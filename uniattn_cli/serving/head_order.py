"""The order in which a borrowing layer keeps its heads, so that an engine reads a head map in few calls.

The key/value groups of a layer may stand in any order, as long as the rows of W_q and W_v and the columns of W_o do,
too: the layer's output stays the same. Groups that read the same layer are put next to each other when the checkpoint
is loaded, in the order of the heads that they read. Standard library only; tensors bring their own methods.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import replace
from typing import TYPE_CHECKING

from uniattn_cli.modeling.layout_uniattn import AttentionShape, LayerPlan, Layout

if TYPE_CHECKING:
    import torch

# Per layer, the group of the checkpoint that stands at each place.
Orders = dict[int, tuple[int, ...]]


def in_order_of_sources(layout: Layout, shape: AttentionShape, strided: bool) -> tuple[Layout, Orders]:
    """A layout whose grouped head maps are sorted by source, and how groups were moved; free maps stay as they are.

    Args:
        layout: of the heads that are here (`cache_plan.shard_layout`).
        shape: sizes to match.
        strided: as for `cache_plan.read_runs`.
    """
    plans, orders = list(layout), {}
    for index, plan in enumerate(layout):
        order = _order(plan, shape, strided)
        if plan.heads is not None and order != tuple(range(shape.kv_heads)):
            size = len(plan.heads) // shape.kv_heads
            heads = [plan.heads[group * size : (group + 1) * size] for group in order]
            plans[index] = replace(plan, heads=tuple(pair for part in heads for pair in part))
            orders[index] = order
    return Layout(tuple(plans)), orders


def _order(plan: LayerPlan, shape: AttentionShape, strided: bool) -> tuple[int, ...]:
    """The groups of a layer, those that one call can read after each other."""
    keys, repeated = plan.key_sources(shape)
    if not keys or repeated > 1:
        return tuple(range(shape.kv_heads))
    order: list[int] = []
    for layer in plan.source_layers:
        left: dict[int, list[int]] = {}
        for group, (source, head) in enumerate(keys):
            if source == layer:
                left.setdefault(head, []).append(group)
        while left:
            for head in _longest_progression(set(left), shape.kv_heads if strided else 1):
                order.append(left[head].pop(0))
                if not left[head]:
                    del left[head]
    return tuple(order)


def _longest_progression(heads: set[int], largest_step: int) -> list[int]:
    """The most heads at equal distances; of equally many, those nearest to each other and then the first."""
    best: list[int] = []
    for step in range(1, largest_step + 1):
        for first in sorted(heads):
            found = [first]
            while found[-1] + step in heads:
                found.append(found[-1] + step)
            if len(found) > len(best):
                best = found
    return best


def joined(orders: Iterable[Orders], groups: int) -> Orders:
    """The orders of all heads, from those of each tensor-parallel rank; `groups` is the number of groups of a rank."""
    whole: Orders = {}
    parts = list(orders)
    for index in sorted({index for part in parts for index in part}):
        stays = tuple(range(groups))
        whole[index] = tuple(
            rank * groups + group for rank, part in enumerate(parts) for group in part.get(index, stays)
        )
    return whole


def reorder_weights(
    weights: Iterable[tuple[str, torch.Tensor]], layout: Layout, shape: AttentionShape, orders: Orders
) -> Iterator[tuple[str, torch.Tensor]]:
    """The weights of a checkpoint, with the groups of each layer of `orders` moved.

    Args:
        weights: names and tensors, as a checkpoint holds them.
        layout: of the checkpoint.
        shape: sizes of all heads.
        orders: of all heads.
    """
    for name, tensor in weights:
        before, _, module = name.rpartition(".self_attn.")
        index = before.rpartition(".")[2]
        if before and index.isdigit() and int(index) in orders:
            tensor = _reordered(module.partition(".")[0], tensor, layout[int(index)], shape, orders[int(index)])
        yield name, tensor


def _reordered(
    module: str, tensor: torch.Tensor, plan: LayerPlan, shape: AttentionShape, order: tuple[int, ...]
) -> torch.Tensor:
    """One weight or bias of an attention module; what has nothing for each group stays as it is."""
    heads = {"q": shape.query_heads, "v": shape.kv_heads}
    # A borrower projects no keys, so a fused projection has the rows of its queries and of its values.
    sections = {
        "q_proj": "q",
        "v_proj": "v",
        "qkv_proj": "".join(part for part in "qv" if part in plan.traits.projects),
        # Some families norm all heads at once.
        "q_norm": "q" if len(tensor) == shape.query_heads * shape.head_dim else "",
        # A bias belongs to the output, which has no heads.
        "o_proj": "q" if tensor.dim() > 1 else "",
        "sinks": "q",
    }.get(module, "")
    places: list[int] = []
    rows = 1 if module == "sinks" else shape.head_dim
    for part in sections:
        start, size = len(places), heads[part] * rows // len(order)
        places += [start + group * size + place for group in order for place in range(size)]
    if not places:
        return tensor
    return tensor[:, places] if module == "o_proj" else tensor[places]
