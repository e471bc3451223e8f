"""Llama with layers that share attention maps. Copied into every converted checkpoint of this family.

Annotations are evaluated here: transformers reads the class of `config` from them.
"""

from huggingface_hub.dataclasses import strict
from transformers.models.llama.configuration_llama import LlamaConfig
from transformers.models.llama.modeling_llama import (
    LlamaAttention,
    LlamaForCausalLM,
    LlamaModel,
    apply_rotary_pos_emb,
    eager_attention_forward,
    rotate_half,
)

from .configuration_uniattn import UniAttnConfigMixin
from .sharing_uniattn import SharedAttentionMixin, SharedCausalLMMixin, SharedModelMixin


@strict
class UniAttnLlamaConfig(UniAttnConfigMixin, LlamaConfig):
    """Llama's configuration with a layout."""

    model_type = "uniattn_llama"
    uniattn: dict | None = None


class UniAttnLlamaAttention(SharedAttentionMixin, LlamaAttention):
    """Llama's attention, own or borrowed."""

    rotate = staticmethod(apply_rotary_pos_emb)
    rotate_half = staticmethod(rotate_half)
    eager_attention = staticmethod(eager_attention_forward)


class UniAttnLlamaModel(SharedModelMixin, LlamaModel):
    """Llama's base model."""

    config: UniAttnLlamaConfig
    attention_class = UniAttnLlamaAttention


class UniAttnLlamaForCausalLM(SharedCausalLMMixin, LlamaForCausalLM):
    """Llama for text generation."""

    config: UniAttnLlamaConfig
    model_class = UniAttnLlamaModel
