"""Gemma 1 with layers that share attention maps. Copied into every converted checkpoint of this family.

Annotations are evaluated here: transformers reads the class of `config` from them.
"""

from huggingface_hub.dataclasses import strict
from transformers.models.gemma.configuration_gemma import GemmaConfig
from transformers.models.gemma.modeling_gemma import (
    GemmaAttention,
    GemmaForCausalLM,
    GemmaModel,
    apply_rotary_pos_emb,
    eager_attention_forward,
    rotate_half,
)

from .configuration_uniattn import UniAttnConfigMixin
from .sharing_uniattn import SharedAttentionMixin, SharedCausalLMMixin, SharedModelMixin


@strict
class UniAttnGemmaConfig(UniAttnConfigMixin, GemmaConfig):
    """Gemma 1's configuration with a layout."""

    model_type = "uniattn_gemma"
    uniattn: dict | None = None


class UniAttnGemmaAttention(SharedAttentionMixin, GemmaAttention):
    """Gemma 1's attention, own or borrowed."""

    rotate = staticmethod(apply_rotary_pos_emb)
    rotate_half = staticmethod(rotate_half)
    eager_attention = staticmethod(eager_attention_forward)


class UniAttnGemmaModel(SharedModelMixin, GemmaModel):
    """Gemma 1's base model."""

    config: UniAttnGemmaConfig
    attention_class = UniAttnGemmaAttention


class UniAttnGemmaForCausalLM(SharedCausalLMMixin, GemmaForCausalLM):
    """Gemma 1 for text generation."""

    config: UniAttnGemmaConfig
    model_class = UniAttnGemmaModel
