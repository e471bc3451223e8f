"""Qwen3 with layers that share attention maps. Copied into every converted checkpoint of this family.

Annotations are evaluated here: transformers reads the class of `config` from them.
"""

from huggingface_hub.dataclasses import strict
from transformers.models.qwen3.configuration_qwen3 import Qwen3Config
from transformers.models.qwen3.modeling_qwen3 import (
    Qwen3Attention,
    Qwen3ForCausalLM,
    Qwen3Model,
    apply_rotary_pos_emb,
    eager_attention_forward,
    rotate_half,
)

from .configuration_uniattn import UniAttnConfigMixin
from .sharing_uniattn import SharedAttentionMixin, SharedCausalLMMixin, SharedModelMixin


@strict
class UniAttnQwen3Config(UniAttnConfigMixin, Qwen3Config):
    """Qwen3's configuration with a layout."""

    model_type = "uniattn_qwen3"
    uniattn: dict | None = None


class UniAttnQwen3Attention(SharedAttentionMixin, Qwen3Attention):
    """Qwen3's attention, own or borrowed."""

    rotate = staticmethod(apply_rotary_pos_emb)
    rotate_half = staticmethod(rotate_half)
    eager_attention = staticmethod(eager_attention_forward)

    def attention_arguments(self) -> dict:
        return {"sliding_window": self.sliding_window}


class UniAttnQwen3Model(SharedModelMixin, Qwen3Model):
    """Qwen3's base model."""

    config: UniAttnQwen3Config
    attention_class = UniAttnQwen3Attention


class UniAttnQwen3ForCausalLM(SharedCausalLMMixin, Qwen3ForCausalLM):
    """Qwen3 for text generation."""

    config: UniAttnQwen3Config
    model_class = UniAttnQwen3Model
