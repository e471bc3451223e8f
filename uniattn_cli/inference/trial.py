"""Attention layers without a model around them: for measuring and testing the operations of a decoding step alone."""

from __future__ import annotations

from types import SimpleNamespace

import torch
from torch import nn

from uniattn_cli.inference.caches import Caches
from uniattn_cli.inference.program import LayerProgram, Program, map_slots, plan_asking, read_sources
from uniattn_cli.inference.step import Step
from uniattn_cli.modeling.configuration_uniattn import attention_shape
from uniattn_cli.modeling.layout_uniattn import Layout


def attention_program(
    layout: Layout,
    *,
    heads: int,
    kv_heads: int,
    head_dim: int,
    dtype: torch.dtype,
    device: torch.device | str = "cpu",
    window: int | None = None,
    softcap: float | None = None,
) -> Program:
    """A program of attention layers that have neither projections nor anything else."""
    config = SimpleNamespace(
        model_type="llama",
        num_hidden_layers=len(layout),
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        head_dim=head_dim,
        hidden_size=heads * head_dim,
    )
    shape = attention_shape(config)
    slots, count = map_slots(layout)
    layers = []
    for index, plan in enumerate(layout):
        layer = LayerProgram(
            index=index,
            plan=plan,
            heads=heads,
            kv_heads=plan.own_kv_heads(shape),
            head_dim=head_dim,
            window=window,
            rope=None,
            scale=head_dim**-0.5,
            softcap=softcap,
            pre_attention=None,
            post_attention=None,
            pre_mlp=None,
            post_mlp=None,
            feed=nn.Identity(),
            map_slot=slots.get(index),
        )
        if layer.kind.attends:
            read_sources(layer, shape)
        layers.append(layer)
    plan_asking(layers, shape)
    return Program(
        config=config,
        shape=shape,
        layout=layout,
        layers=layers,
        embed=nn.Identity(),
        norm=nn.Identity(),
        head=torch.empty(0, dtype=dtype, device=device),
        logit_cap=None,
        rotary=nn.Identity(),
        rotary_keys=(),
        map_slots=count,
        dense=True,
    )


def decoding_step(caches: Caches, starts: list[int], ends: list[int]) -> Step:
    """The step that takes in the token before `ends`, in every row of the batch."""
    device = caches.flat.device
    first, last = (torch.tensor(values, dtype=torch.int32, device=device) for values in (starts, ends))
    return Step(caches, {}, first, last, last - 1, last - 1 - first, 1, None, True)
