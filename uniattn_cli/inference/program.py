"""What each layer of a model does in a decoding step, read once from a stock or converted transformers model."""

from __future__ import annotations

import inspect
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from uniattn_cli.errors import UniAttnError
from uniattn_cli.inference.weights import fuse_biases, fuse_columns, fuse_rows
from uniattn_cli.modeling.configuration_uniattn import attention_shape, layer_windows, layout_of
from uniattn_cli.modeling.layout_uniattn import AttentionShape, Kind, LayerPlan, Layout
from uniattn_cli.modeling.sharing_uniattn import Compensation, LowRankCompensation
from uniattn_cli.models.families import family_of

if TYPE_CHECKING:
    from transformers import PreTrainedModel

ACTIVATIONS = {"SiLUActivation": "silu", "SiLU": "silu", "GELUTanh": "gelu_tanh", "PytorchGELUTanh": "gelu_tanh"}


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


@dataclass
class LayerProgram:
    """One layer.

    Attributes:
        index: number of the layer.
        plan: its entry of the layout.
        parts: which of the letters q, k, v it projects.
        kv_heads: key/value heads of its own.
        window: keys that a query sees at most, None for all.
        rope: the key of its table of rotary embeddings, None where it knows no positions.
        pre_attention, post_attention, pre_mlp, post_mlp: norms before and after the two parts, None where absent.
        feed: the feed-forward part; the model's own module where it is not the usual one.
        project: [rows, hidden]: queries, keys, values, and `down` of a low-rank W_c.
        output: [hidden, heads * head_dim + extra]: W_o, then W_c or `up` of a low-rank one.
        extra: columns of `output` beside those of the heads.
        takes_input: the extra columns multiply the layer's input (full W_c), not rows of `project` (low rank).
        wide_norm: norms of queries and keys run over all heads.
        early_norm: norm of all query heads from one lender's input, before heads of several are put together.
        map_slot: where its map is kept for followers, None where nobody borrows it.
        query_sources: (layer, head) of each borrowed query head.
        key_sources: (layer, head) of each borrowed key/value head; one per query head where a map is free.
        value_groups: query heads per value head where `key_sources` has one entry per query head, else 1.
    """

    index: int
    plan: LayerPlan
    parts: str
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
    compensation: LowRankCompensation | Compensation | None = None
    project: torch.Tensor | None = None
    project_bias: torch.Tensor | None = None
    output: torch.Tensor | None = None
    output_bias: torch.Tensor | None = None
    extra: int = 0
    takes_input: bool = False
    q_norm: nn.Module | None = None
    k_norm: nn.Module | None = None
    wide_norm: bool = False
    early_norm: nn.Module | None = None
    is_source: bool = False
    map_slot: int | None = None
    query_sources: tuple[tuple[int, int], ...] = ()
    key_sources: tuple[tuple[int, int], ...] = ()
    value_groups: int = 1

    @property
    def kind(self) -> Kind:
        return self.plan.traits

    @property
    def width(self) -> int:
        """Columns of the output projection that belong to the heads; as many rows of `project` give the queries."""
        return self.heads * self.head_dim


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


def read_program(model: PreTrainedModel) -> Program:
    """Reads a model; its parameters become views of fused ones.

    Raises:
        UnsupportedError: the model has a part that the engine does not know.
    """
    config = model.config
    _refuse_unknown(model)
    shape = attention_shape(config)
    layout = layout_of(config)
    slots, count = map_slots(layout)
    windows = layer_windows(config)
    base = model.model
    by_type = "layer_type" in inspect.signature(type(base.rotary_emb).forward).parameters
    layers = []
    for index, block in enumerate(base.layers):
        layer = _read_layer(block, layout, shape, index, windows[index])
        layer.map_slot = slots.get(index)
        layer.rope = _rope_key(block.self_attn, config, index, by_type)
        layers.append(layer)
    return Program(
        config=config,
        shape=shape,
        layout=layout,
        layers=layers,
        embed=base.embed_tokens,
        norm=base.norm,
        head=model.lm_head.weight.data,
        logit_cap=getattr(config, "final_logit_softcapping", None),
        rotary=base.rotary_emb,
        rotary_keys=tuple(sorted({layer.rope for layer in layers if layer.rope is not None})),
        map_slots=count,
        dense=all(isinstance(layer.feed, Gated) for layer in layers),
        embed_scale=getattr(config, "embedding_multiplier", 1.0),
        update_scale=getattr(config, "residual_multiplier", 1.0),
        logit_scale=1.0 / getattr(config, "logits_scaling", 1.0),
    )


def _refuse_unknown(model: PreTrainedModel) -> None:
    config = model.config
    try:
        family_of(config.model_type)
    except UniAttnError as error:
        raise UnsupportedError(str(error)) from None
    if getattr(config, "use_bidirectional_attention", None):
        raise UnsupportedError("its attention is not causal")
    if model.lm_head.bias is not None:
        raise UnsupportedError("its output layer has a bias")
    devices = {parameter.device for parameter in model.parameters()}
    dtypes = {parameter.dtype for parameter in model.parameters() if parameter.dtype.is_floating_point}
    if len(devices) != 1 or len(dtypes) != 1:
        raise UnsupportedError("its weights are on several devices or of several dtypes")


def map_slots(layout: Layout) -> tuple[dict[int, int], int]:
    """A place for the map of each layer that lends it, given back after its last borrower.

    Returns:
        Slot per lending layer, and how many slots are needed at the same time.
    """
    last: dict[int, int] = {}
    for index, plan in enumerate(layout):
        if plan.traits.borrows_maps:
            last.update(dict.fromkeys(plan.source_layers, index))
    taken: dict[int, int] = {}
    slots: dict[int, int] = {}
    for index in range(len(layout)):
        if index in last:
            slots[index] = next(slot for slot in range(len(last)) if slot not in taken.values())
            taken[index] = slots[index]
        taken = {layer: slot for layer, slot in taken.items() if last[layer] > index}
    return slots, max(slots.values(), default=-1) + 1


def _rope_key(attention: nn.Module, config: Any, index: int, by_type: bool) -> str | None:
    if not getattr(attention, "use_rope", True):
        return None
    return config.layer_types[index] if by_type else ""


def _read_layer(block: Any, layout: Layout, shape: AttentionShape, index: int, window: int | None) -> LayerProgram:
    attention, plan = block.self_attn, layout[index]
    sandwich = hasattr(block, "pre_feedforward_layernorm")
    after_only = not hasattr(block, "input_layernorm")
    post_attention = block.post_attention_layernorm
    layer = LayerProgram(
        index=index,
        plan=plan,
        parts=plan.traits.projects,
        heads=shape.query_heads,
        kv_heads=plan.own_kv_heads(shape),
        head_dim=shape.head_dim,
        window=window,
        rope=None,
        scale=float(attention.scaling),
        softcap=getattr(attention, "attn_logit_softcapping", None),
        pre_attention=None if after_only else block.input_layernorm,
        post_attention=post_attention if sandwich or after_only else None,
        pre_mlp=block.pre_feedforward_layernorm if sandwich else None if after_only else post_attention,
        post_mlp=block.post_feedforward_layernorm if sandwich or after_only else None,
        feed=_read_feed(block.mlp),
        compensation=getattr(attention, "compensation", None),
        q_norm=getattr(attention, "q_norm", None),
        k_norm=getattr(attention, "k_norm", None),
        is_source=index in layout.last_use,
    )
    norm: Any = layer.q_norm or layer.k_norm
    layer.wide_norm = norm is not None and norm.weight.shape[0] != shape.head_dim
    if layer.wide_norm and layer.kind.early:
        layer.early_norm, layer.q_norm = layer.q_norm, None
    if layer.parts:
        _read_projections(layer, attention)
        read_sources(layer, shape)
    return layer


def _read_projections(layer: LayerProgram, attention: Any) -> None:
    """Fuses the projections of the input, and those whose outputs are added; W_c is in one or both."""
    if hasattr(attention, "qkv_proj"):
        linears = [attention.qkv_proj]
    else:
        linears = [getattr(attention, f"{part}_proj") for part in layer.parts]
    weights = [linear.weight for linear in linears]
    biases = [linear.bias for linear in linears]
    output = [attention.o_proj.weight]
    if isinstance(layer.compensation, LowRankCompensation):
        weights.append(layer.compensation.down.weight)
        biases.append(None)
        output.append(layer.compensation.up.weight)
    elif layer.compensation is not None:
        output.append(layer.compensation.weight)
        layer.takes_input = True
    layer.project_bias = fuse_biases(biases, [weight.shape[0] for weight in weights], weights[0].data)
    layer.project = fuse_rows(weights)
    layer.output = fuse_columns(output)
    layer.output_bias = None if attention.o_proj.bias is None else attention.o_proj.bias.data
    layer.extra = layer.output.shape[1] - layer.width


def read_sources(layer: LayerProgram, shape: AttentionShape) -> None:
    """Says which heads a layer borrows."""
    group = shape.group_size
    layer.key_sources = layer.plan.sources(shape)
    if layer.kind.borrows_maps:
        layer.query_sources = layer.key_sources
        keys = tuple((source, head // group) for source, head in layer.query_sources)
        if all(len(set(keys[start : start + group])) == 1 for start in range(0, len(keys), group)):
            layer.key_sources = keys[::group]
        else:
            layer.key_sources, layer.value_groups = keys, group


def _read_feed(module: nn.Module) -> Gated | nn.Module:
    linears = [getattr(module, name, None) for name in ("gate_proj", "up_proj", "gate_up_proj", "down_proj")]
    function = getattr(module, "act_fn", None) or getattr(module, "activation_fn", None)
    plain = [linear for linear in linears if isinstance(linear, nn.Linear)]
    down = linears[3]
    if function is None or any(linear.bias is not None for linear in plain) or not isinstance(down, nn.Linear):
        return module
    gate = [linear.weight for linear in linears[:3] if linear is not None]
    return Gated(
        gate_up=fuse_rows(gate),
        down=down.weight.data,
        activation=ACTIVATIONS.get(type(function).__name__, ""),
        function=function,
    )
