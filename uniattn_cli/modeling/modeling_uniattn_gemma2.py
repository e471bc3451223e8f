"""Gemma 2 with layers that share attention maps. Copied into every converted checkpoint of this family.

Annotations are evaluated here: transformers reads the class of `config` from them.
"""

from huggingface_hub.dataclasses import strict
from transformers.models.gemma2.configuration_gemma2 import Gemma2Config
from transformers.models.gemma2.modeling_gemma2 import (
    Gemma2Attention,
    Gemma2ForCausalLM,
    Gemma2Model,
    apply_rotary_pos_emb,
    eager_attention_forward,
    rotate_half,
)

from .configuration_uniattn import UniAttnConfigMixin
from .sharing_uniattn import SharedAttentionMixin, SharedCausalLMMixin, SharedModelMixin


@strict
class UniAttnGemma2Config(UniAttnConfigMixin, Gemma2Config):
    """Gemma 2's configuration with a layout."""

    model_type = "uniattn_gemma2"
    uniattn: dict | None = None


class UniAttnGemma2Attention(SharedAttentionMixin, Gemma2Attention):  # type: ignore[misc]  # stock forward gives two, not three
    """Gemma 2's attention, own or borrowed."""

    rotate = staticmethod(apply_rotary_pos_emb)
    rotate_half = staticmethod(rotate_half)
    eager_attention = staticmethod(eager_attention_forward)

    def attention_arguments(self) -> dict:
        return {"sliding_window": self.sliding_window, "softcap": self.attn_logit_softcapping}


class UniAttnGemma2Model(SharedModelMixin, Gemma2Model):
    """Gemma 2's base model."""

    config: UniAttnGemma2Config
    attention_class = UniAttnGemma2Attention
    # SDPA knows no soft-capping; early 5.x releases of transformers drop it without a word.
    _supports_sdpa = False


class UniAttnGemma2ForCausalLM(SharedCausalLMMixin, Gemma2ForCausalLM):
    """Gemma 2 for text generation."""

    config: UniAttnGemma2Config
    model_class = UniAttnGemma2Model
    # SDPA knows no soft-capping; early 5.x releases of transformers drop it without a word.
    _supports_sdpa = False
