"""gpt-oss with layers that share attention maps. Copied into every converted checkpoint of this family.

A map has a sink for each query head, a score for no key at all, which takes weight from the keys. It belongs to the
map: a layer that borrows maps has no sinks of its own.

Annotations are evaluated here: transformers reads the class of `config` from them.
"""

from typing import Any, NamedTuple

import torch
from huggingface_hub.dataclasses import strict
from transformers.models.gpt_oss.configuration_gpt_oss import GptOssConfig
from transformers.models.gpt_oss.modeling_gpt_oss import (
    GptOssAttention,
    GptOssForCausalLM,
    GptOssModel,
    apply_rotary_pos_emb,
)
from transformers.models.gpt_oss.modeling_gpt_oss import (
    eager_attention_forward as stock_attention_forward,
)

from .configuration_uniattn import UniAttnConfigMixin
from .sharing_uniattn import SharedAttentionMixin, SharedCausalLMMixin, SharedModelMixin, SharedPreTrainedMixin


class _Module(NamedTuple):
    """What stock's eager attention reads from a module."""

    sinks: torch.Tensor
    num_key_value_groups: int
    training: bool


def eager_attention_forward(module: Any, *states: Any, s_aux: torch.Tensor, **options: Any):
    """Stock's, which reads sinks from the module, with those that it is given."""
    given: Any = _Module(s_aux, module.num_key_value_groups, module.training)
    return stock_attention_forward(given, *states, **options)


@strict
class UniAttnGptOssConfig(UniAttnConfigMixin, GptOssConfig):
    """gpt-oss's configuration with a layout."""

    model_type = "uniattn_gpt_oss"
    uniattn: dict | None = None


class UniAttnGptOssAttention(SharedAttentionMixin, GptOssAttention):
    """gpt-oss's attention, own or borrowed."""

    rotate = staticmethod(apply_rotary_pos_emb)
    eager_attention = staticmethod(eager_attention_forward)

    def attention_arguments(self) -> dict:
        return {"sliding_window": self.sliding_window}


class _WithoutSinks(SharedPreTrainedMixin):
    """Lets stock's initialisation pass over layers that have no sinks."""

    def _init_weights(self, module) -> None:
        if not isinstance(module, UniAttnGptOssAttention) or hasattr(module, "sinks"):
            super()._init_weights(module)


class UniAttnGptOssModel(_WithoutSinks, SharedModelMixin, GptOssModel):
    """gpt-oss's base model."""

    config: UniAttnGptOssConfig
    attention_class = UniAttnGptOssAttention


class UniAttnGptOssForCausalLM(_WithoutSinks, SharedCausalLMMixin, GptOssForCausalLM):
    """gpt-oss for text generation."""

    config: UniAttnGptOssConfig
    model_class = UniAttnGptOssModel
