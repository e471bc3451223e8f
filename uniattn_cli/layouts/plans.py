"""The plan of a single layer: what it becomes, and from which heads it borrows."""

from __future__ import annotations

from collections.abc import Sequence

from uniattn_cli.fitting.match_maps import Match, Matcher
from uniattn_cli.modeling.layout_uniattn import KINDS, AttentionShape, LayerPlan


def may_change(shape: AttentionShape, layer: int) -> bool:
    """Whether a layer may be anything but `own`: the first one of each mask type has to stay."""
    return shape.mask_types.index(shape.mask_types[layer]) != layer


def proposal(
    matcher: Matcher, layer: int, kind: str, compensation: str | int, lenders: Sequence[int]
) -> LayerPlan | None:
    """The plan of a kind to try for a layer, with the best-matching sources; None where there is none.

    Args:
        matcher: of the kind, see `Matcher.for_kind`.
        compensation: W_c that is asked for, see `Kind.compensation_for`; `linear` always has a full one.
        lenders: layers that may lend.
    """
    shape, traits = matcher.shape, KINDS[kind]
    if traits.borrows:
        match = matcher.match(layer, list(lenders))
        return plan_of(match, compensation, kind, shape.group_size) if match else None
    if traits.fewer_heads and shape.kv_heads == 1:
        return None
    return plan_alone(kind, shape, "full" if traits.compensation == "required" else compensation)


def plan_of(match: Match, compensation: str | int, kind: str = "softmax", group_size: int = 1) -> LayerPlan:
    """A borrowing layer's plan; a head map that changes nothing is written as a plain leader.

    Args:
        match: sources of all query heads.
        compensation: W_c that is asked for, see `Kind.compensation_for`.
        kind: where only keys are borrowed, each key/value group takes the head that its first query head matches.
        group_size: query heads of a key/value group.
    """
    compensation = KINDS[kind].compensation_for(compensation)
    if not KINDS[kind].borrows_maps:
        heads = tuple((source, head // group_size) for source, head in match.sources[::group_size])
        return LayerPlan(kind, heads=heads, compensation=compensation)
    layers = {layer for layer, _ in match.sources}
    if len(layers) == 1 and [head for _, head in match.sources] == list(range(len(match.sources))):
        return LayerPlan(kind, leader=layers.pop(), compensation=compensation)
    return LayerPlan(kind, heads=match.sources, compensation=compensation)


def plan_alone(kind: str, shape: AttentionShape, compensation: str | int) -> LayerPlan | None:
    """The plan of a layer of a kind that borrows nothing; None of one that borrows.

    A layer with fewer key/value heads has as many as divide those of the model, half of them at most.

    Args:
        compensation: W_c that is asked for, see `Kind.compensation_for`.
    """
    traits = KINDS[kind]
    if traits.borrows:
        return None
    kept = max((n for n in range(1, shape.kv_heads) if shape.kv_heads % n == 0), default=1)
    heads = kept if traits.fewer_heads else None
    return LayerPlan(kind, kv_heads=heads, compensation=traits.compensation_for(compensation))
