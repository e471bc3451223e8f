"""Qwen2 with layers that share attention maps. Copied into every converted checkpoint of this family.

Annotations are evaluated here: transformers reads the class of `config` from them.
"""

from huggingface_hub.dataclasses import strict
from transformers.models.qwen2.configuration_qwen2 import Qwen2Config
from transformers.models.qwen2.modeling_qwen2 import (
    Qwen2Attention,
    Qwen2ForCausalLM,
    Qwen2Model,
    apply_rotary_pos_emb,
    eager_attention_forward,
    rotate_half,
)

from .configuration_uniattn import UniAttnConfigMixin
from .sharing_uniattn import SharedAttentionMixin, SharedCausalLMMixin, SharedModelMixin


@strict
class UniAttnQwen2Config(UniAttnConfigMixin, Qwen2Config):
    """Qwen2's configuration with a layout."""

    model_type = "uniattn_qwen2"
    uniattn: dict | None = None


class UniAttnQwen2Attention(SharedAttentionMixin, Qwen2Attention):
    """Qwen2's attention, own or borrowed."""

    rotate = staticmethod(apply_rotary_pos_emb)
    rotate_half = staticmethod(rotate_half)
    eager_attention = staticmethod(eager_attention_forward)

    def attention_arguments(self) -> dict:
        return {"sliding_window": self.sliding_window}


class UniAttnQwen2Model(SharedModelMixin, Qwen2Model):
    """Qwen2's base model."""

    config: UniAttnQwen2Config
    attention_class = UniAttnQwen2Attention


class UniAttnQwen2ForCausalLM(SharedCausalLMMixin, Qwen2ForCausalLM):
    """Qwen2 for text generation."""

    config: UniAttnQwen2Config
    model_class = UniAttnQwen2Model
