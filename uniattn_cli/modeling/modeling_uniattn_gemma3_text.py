"""Gemma 3 with layers that share attention maps. Copied into every converted checkpoint of this family.

Annotations are evaluated here: transformers reads the class of `config` from them.
"""

from huggingface_hub.dataclasses import strict
from transformers.models.gemma3.configuration_gemma3 import Gemma3TextConfig
from transformers.models.gemma3.modeling_gemma3 import (
    Gemma3Attention,
    Gemma3ForCausalLM,
    Gemma3TextModel,
    apply_rotary_pos_emb,
    eager_attention_forward,
    rotate_half,
)

from .configuration_uniattn import UniAttnConfigMixin
from .sharing_uniattn import SharedAttentionMixin, SharedCausalLMMixin, SharedModelMixin


@strict
class UniAttnGemma3TextConfig(UniAttnConfigMixin, Gemma3TextConfig):
    """Gemma 3's configuration with a layout."""

    model_type = "uniattn_gemma3_text"
    uniattn: dict | None = None


class UniAttnGemma3TextAttention(SharedAttentionMixin, Gemma3Attention):  # type: ignore[misc]  # stock forward gives two, not three
    """Gemma 3's attention, own or borrowed."""

    rotate = staticmethod(apply_rotary_pos_emb)
    rotate_half = staticmethod(rotate_half)
    eager_attention = staticmethod(eager_attention_forward)

    def attention_arguments(self) -> dict:
        return {"sliding_window": self.sliding_window}


class UniAttnGemma3TextModel(SharedModelMixin, Gemma3TextModel):
    """Gemma 3's base model."""

    config: UniAttnGemma3TextConfig
    attention_class = UniAttnGemma3TextAttention


class UniAttnGemma3TextForCausalLM(SharedCausalLMMixin, Gemma3ForCausalLM):
    """Gemma 3 for text generation."""

    config: UniAttnGemma3TextConfig
    model_class = UniAttnGemma3TextModel
