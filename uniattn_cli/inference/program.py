"""What each layer of a model does in a decoding step."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from uniattn_cli.errors import UniAttnError
from uniattn_cli.modeling.layout_uniattn import AttentionShape, Kind, LayerPlan, Layout
from uniattn_cli.modeling.sharing_uniattn import LowRankCompensation


class UnsupportedError(UniAttnError):
    """The engine cannot run a model, or not at this length; transformers can."""


@dataclass
class Gated:
    """The usual feed-forward part, with the gate's projection and the other one fused.

    Attributes:
        gate_up: [2 * intermediate, hidden], gate rows first.
        down: [hidden, intermediate].
        activation: `silu`, `gelu_tanh`, or empty for a function that only the module knows.
        function: the module's own activation.
    """

    gate_up: torch.Tensor
    down: torch.Tensor
    activation: str
    function: Any


@dataclass(frozen=True)
class Asked:
    """Query heads of a layer that asks early, projected when its lender runs, from the lender's input.

    Attributes:
        borrower: the layer whose queries they are.
        first, heads: which of its query heads: so many from the first one on.
        weight: [rows, hidden] where they take a product of their own; None where they are rows of the lender's
            `project`, behind its own queries.
        bias: likewise.
        norm: the borrower's norm of queries.
        wide: the norm runs over all heads of the borrower, so that `weight` has the rows of all.
    """

    borrower: int
    first: int
    heads: int
    weight: torch.Tensor | None = None
    bias: torch.Tensor | None = None
    norm: nn.Module | None = None
    wide: bool = False


@dataclass
class LayerProgram:
    """One layer.

    Attributes:
        index: number of the layer.
        plan: its entry of the layout.
        heads, head_dim: query heads, and the size of a head.
        kv_heads: key/value heads of its own.
        window: keys that a query sees at most, None for all.
        rope: the key of its table of rotary embeddings, None where it knows no positions.
        scale, softcap: of its scores; None for no soft-cap.
        pre_attention, post_attention, pre_mlp, post_mlp: norms before and after the two parts, None where absent.
        feed: the feed-forward part; the model's own module where it is not the usual one.
        compensation: the module of W_c, None where it has none.
        project: [rows, hidden]: queries, those that others ask early, keys, values, and `down` of a low-rank W_c.
        project_bias: [rows], None where no part has one.
        output: [hidden, heads * head_dim + extra]: W_o, then W_c or `up` of a low-rank one.
        output_bias: [hidden], None where W_o has none.
        extra: columns of `output` beside those of the heads.
        takes_input: the extra columns multiply the layer's input (full W_c), not rows of `project` (low rank).
        q_norm, k_norm: norms of its queries and keys, None where absent.
        wide_norm: these norms run over all heads.
        query_norms: [layers * head_dim], weights of the norm of its queries and of those that others ask, one after the
            other; None where `q_norm` has all there are.
        asked: queries of others that it projects, those that are rows of `project` first.
        map_slot: where its map is kept for followers, None where nobody borrows it.
        query_sources: (layer, head) of each borrowed query head.
        key_sources: (layer, head) of each borrowed key/value head; one per query head where a map is free.
        value_groups: query heads per value head where `key_sources` has one entry per query head, else 1.
    """

    index: int
    plan: LayerPlan
    heads: int
    kv_heads: int
    head_dim: int
    window: int | None
    rope: str | None
    scale: float
    softcap: float | None
    pre_attention: nn.Module | None
    post_attention: nn.Module | None
    pre_mlp: nn.Module | None
    post_mlp: nn.Module | None
    feed: Gated | nn.Module
    compensation: LowRankCompensation | nn.Linear | None = None
    project: torch.Tensor | None = None
    project_bias: torch.Tensor | None = None
    output: torch.Tensor | None = None
    output_bias: torch.Tensor | None = None
    extra: int = 0
    takes_input: bool = False
    q_norm: nn.Module | None = None
    k_norm: nn.Module | None = None
    wide_norm: bool = False
    query_norms: torch.Tensor | None = None
    asked: tuple[Asked, ...] = ()
    map_slot: int | None = None
    query_sources: tuple[tuple[int, int], ...] = ()
    key_sources: tuple[tuple[int, int], ...] = ()
    value_groups: int = 1

    @property
    def kind(self) -> Kind:
        return self.plan.traits

    @property
    def parts(self) -> str:
        """Which of the letters q, k, v it projects from its own input."""
        return self.kind.projects.replace("q", "") if self.kind.early else self.kind.projects

    @property
    def width(self) -> int:
        """Columns of the output projection that belong to the heads."""
        return self.heads * self.head_dim

    @property
    def joined_heads(self) -> int:
        """Query heads among the rows of `project`, its own and those that others ask."""
        own = self.heads if "q" in self.parts else 0
        return own + sum(asked.heads for asked in self.asked if asked.weight is None)

    @property
    def placed_heads(self) -> int:
        """All query heads that are known once it has projected: its own, and those that others ask."""
        own = self.heads if "q" in self.parts else 0
        return own + sum(asked.heads for asked in self.asked)


@dataclass
class Program:
    """A whole model.

    Attributes:
        layers: in order.
        embed: the model's own embedding module.
        norm: the last norm.
        head: [vocabulary, hidden].
        logit_cap: soft-cap of the logits.
        embed_scale, update_scale, logit_scale: factors of embeddings, of what each part adds to the residual stream,
            and of logits, as Granite has them; 1 elsewhere.
        rotary: the model's own module of rotary embeddings.
        rotary_keys: the layer types that it is called with; `("",)` where it takes none.
        map_slots: maps that have to be kept at the same time.
        dense: every feed-forward part is the usual one, so that a step has no data-dependent shapes.
    """

    config: Any
    shape: AttentionShape
    layout: Layout
    layers: list[LayerProgram]
    embed: nn.Module
    norm: nn.Module
    head: torch.Tensor
    logit_cap: float | None
    rotary: nn.Module
    rotary_keys: tuple[str, ...]
    map_slots: int
    dense: bool
    embed_scale: float = 1.0
    update_scale: float = 1.0
    logit_scale: float = 1.0

    @property
    def dtype(self) -> torch.dtype:
        return self.head.dtype

    @property
    def device(self) -> torch.device:
        return self.head.device


def map_slots(layout: Layout) -> tuple[dict[int, int], int]:
    """A place for the map of each layer that lends it, given back after its last borrower.

    Returns:
        Slot per lending layer, and how many slots are needed at the same time.
    """
    last: dict[int, int] = {}
    for index, plan in enumerate(layout):
        if plan.traits.borrows_maps:
            last.update(dict.fromkeys(plan.source_layers, index))
    slots = share_slots({source: (source, last[source]) for source in sorted(last)})
    return slots, max(slots.values(), default=-1) + 1


def share_slots(spans: Mapping[int, tuple[int, int]]) -> dict[int, int]:
    """The first place for each that is free from the first to the last layer of its span, both included."""
    slots: dict[int, int] = {}
    for index, (begin, end) in spans.items():
        taken = {slot for other, slot in slots.items() if spans[other][0] <= end and begin <= spans[other][1]}
        slots[index] = next(slot for slot in range(len(slots) + 1) if slot not in taken)
    return slots


def read_sources(layer: LayerProgram, shape: AttentionShape) -> None:
    """Says which heads a layer borrows."""
    if layer.kind.borrows_maps:
        layer.query_sources = layer.plan.sources(shape)
    layer.key_sources, layer.value_groups = layer.plan.key_sources(shape)


def plan_asking(layers: Sequence[LayerProgram], shape: AttentionShape) -> None:
    """Tells lenders which queries of others they project: those of each layer that asks early, run by run of heads."""
    for layer in layers:
        for lender, heads in layer.plan.asked(shape):
            layers[lender].asked += (Asked(layer.index, heads.start, heads.stop - heads.start),)
