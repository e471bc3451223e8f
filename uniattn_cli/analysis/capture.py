"""Reads queries, keys and values of every layer as they arrive at the attention backend, whatever the family."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch
from transformers import AttentionInterface
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, AttentionMaskInterface
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

if TYPE_CHECKING:
    from transformers import PreTrainedModel

BACKEND = "uniattn_capture"


@dataclass
class LayerStates:
    """What one layer gave to the attention backend for one sequence.

    Attributes:
        queries: [query_heads, tokens, head_dim], after rotary embedding and norms.
        keys: [kv_heads, tokens, head_dim].
        values: [kv_heads, tokens, head_dim].
        mask: what the backend was given: None for plain causal attention, else [1, 1, tokens, tokens].
        scaling: factor on the scores.
        softcap: bound of the scores, or None.
    """

    queries: torch.Tensor
    keys: torch.Tensor
    values: torch.Tensor
    mask: torch.Tensor | None
    scaling: float
    softcap: float | None


@dataclass
class Captured:
    """States by layer; emptied by the reader after each sequence."""

    layers: dict[int, LayerStates] = field(default_factory=dict)
    original: str = "sdpa"

    def attention(self, module, query, key, value, attention_mask, *, scaling, softcap=None, **kwargs):
        """The registered attention function: keeps the states, then lets the original backend answer."""
        self.layers[module.layer_idx] = LayerStates(query[0], key[0], value[0], attention_mask, scaling, softcap)
        if softcap is not None:
            kwargs["softcap"] = softcap
        eager = getattr(sys.modules[type(module).__module__], "eager_attention_forward", None)
        backend = ALL_ATTENTION_FUNCTIONS.get_interface(self.original, eager)
        return backend(module, query, key, value, attention_mask, scaling=scaling, **kwargs)


@contextlib.contextmanager
def capture(model: PreTrainedModel) -> Iterator[Captured]:
    """While active, each forward call of the model (batch size 1) fills the yielded `Captured`."""
    original = model.config._attn_implementation
    captured = Captured(original=original)
    AttentionInterface.register(BACKEND, captured.attention)
    # Without a mask function of its own a registered backend gets no mask at all, and padding would be ignored.
    AttentionMaskInterface.register(BACKEND, ALL_MASK_ATTENTION_FUNCTIONS[original])
    model.config._attn_implementation = BACKEND
    try:
        yield captured
    finally:
        model.config._attn_implementation = original
        captured.layers.clear()
