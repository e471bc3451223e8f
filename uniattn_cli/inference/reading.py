"""Reads what each layer does from a stock or converted transformers model."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from uniattn_cli.errors import UniAttnError
from uniattn_cli.inference.program import (
    Asked,
    Gated,
    LayerProgram,
    Program,
    UnsupportedError,
    map_slots,
    plan_asking,
    read_sources,
)
from uniattn_cli.inference.weights import fuse_biases, fuse_columns, fuse_rows
from uniattn_cli.modeling.configuration_uniattn import attention_shape, layer_windows, layout_of
from uniattn_cli.modeling.layout_uniattn import AttentionShape, Layout
from uniattn_cli.modeling.sharing_uniattn import LowRankCompensation
from uniattn_cli.models.families import family_of

if TYPE_CHECKING:
    from transformers import PreTrainedModel

ACTIVATIONS = {"SiLUActivation": "silu", "SiLU": "silu", "GELUTanh": "gelu_tanh", "PytorchGELUTanh": "gelu_tanh"}


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
        layer.rope = _rope_key(config, shape.mask_types[index], index, by_type)
        layers.append(layer)
    plan_asking(layers, shape)
    _read_projections(layers, [block.self_attn for block in base.layers])
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
        family = family_of(config.model_type)
    except UniAttnError as error:
        raise UnsupportedError(str(error)) from None
    if family.not_in_engine:
        raise UnsupportedError(family.not_in_engine)
    if getattr(config, "use_bidirectional_attention", None):
        raise UnsupportedError("its attention is not causal")
    if model.lm_head.bias is not None:
        raise UnsupportedError("its output layer has a bias")
    plain = all(type(weight) is nn.Parameter and weight.is_floating_point() for weight in model.parameters())
    if getattr(model, "is_quantized", False) or not plain:
        raise UnsupportedError("its weights are quantised")
    devices = {parameter.device for parameter in model.parameters()}
    dtypes = {parameter.dtype for parameter in model.parameters()}
    if len(devices) != 1 or len(dtypes) != 1:
        raise UnsupportedError("its weights are on several devices or of several dtypes")


def _rope_key(config: Any, mask_type: str, index: int, by_type: bool) -> str | None:
    if mask_type.endswith("/no_rope"):
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
    )
    norm: Any = layer.q_norm or layer.k_norm
    layer.wide_norm = norm is not None and norm.weight.shape[0] != shape.head_dim
    if layer.kind.attends:
        read_sources(layer, shape)
    return layer


def _read_projections(layers: Sequence[LayerProgram], attentions: Sequence[Any]) -> None:
    """Fuses projections of the same input, and those whose outputs are added; W_c is in one or both."""
    apart: dict[int, tuple[torch.Tensor, torch.Tensor | None]] = {}
    # Borrowers first: lenders have to know the weights of the queries that they project for them.
    for layer, attention in reversed(list(zip(layers, attentions, strict=True))):
        if not layer.kind.attends:
            continue
        asked = [_with_weights(one, layers[one.borrower], apart.get(one.borrower)) for one in layer.asked]
        layer.asked = tuple(sorted(asked, key=lambda one: one.weight is not None))
        joined = [one for one in layer.asked if one.weight is None]
        if hasattr(attention, "qkv_proj"):
            linears = [attention.qkv_proj]
        else:
            parts = layer.parts if _joins(layer, attention) else layer.kind.projects
            linears = [getattr(attention, f"{part}_proj") for part in parts]
            linears[1:1] = [attentions[one.borrower].q_proj for one in joined]
        _fuse_projections(layer, attention, linears)
        if joined and layer.q_norm is not None:
            layer.query_norms = fuse_rows([norm.weight for norm in (layer.q_norm, *(one.norm for one in joined))])
        if layer.kind.early and not _joins(layer, attention):
            apart[layer.index] = _take_queries(layer)


def _joins(layer: LayerProgram, attention: Any) -> bool:
    """Whether W_q of a layer that asks early can be rows of one lender's projection, as a view of the same memory."""
    lenders = {lender for lender, _ in layer.key_sources}
    return layer.kind.early and len(lenders) == 1 and not layer.wide_norm and hasattr(attention, "q_proj")


def _with_weights(
    asked: Asked, borrower: LayerProgram, apart: tuple[torch.Tensor, torch.Tensor | None] | None
) -> Asked:
    if apart is None:
        return replace(asked, norm=borrower.q_norm)
    dim = borrower.head_dim
    rows = slice(None) if borrower.wide_norm else slice(asked.first * dim, (asked.first + asked.heads) * dim)
    weight, bias = (None if tensor is None else tensor[rows] for tensor in apart)
    return replace(asked, weight=weight, bias=bias, norm=borrower.q_norm, wide=borrower.wide_norm)


def _fuse_projections(layer: LayerProgram, attention: Any, linears: Sequence[Any]) -> None:
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
    if weights:
        layer.project_bias = fuse_biases(biases, [weight.shape[0] for weight in weights], weights[0].data)
        layer.project = fuse_rows(weights)
    layer.output = fuse_columns(output)
    layer.output_bias = None if attention.o_proj.bias is None else attention.o_proj.bias.data
    layer.extra = layer.output.shape[1] - layer.width


def _take_queries(layer: LayerProgram) -> tuple[torch.Tensor, torch.Tensor | None]:
    """W_q and its bias, which a layer that asks early leaves to its lenders."""
    weight, bias, width = layer.project, layer.project_bias, layer.width
    assert weight is not None, "queries are projected"
    layer.project, layer.project_bias = (weight[width:] if len(weight) > width else None), None
    if bias is None:
        return weight[:width], None
    if layer.project is not None:
        layer.project_bias = bias[width:]
    return weight[:width], bias[:width]


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
