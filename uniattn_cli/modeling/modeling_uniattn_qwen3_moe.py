"""Qwen3-MoE with layers that share attention maps. Copied into every converted checkpoint of this family.

Annotations are evaluated here: transformers reads the class of `config` from them.
"""

from huggingface_hub.dataclasses import strict
from transformers.models.qwen3_moe.configuration_qwen3_moe import Qwen3MoeConfig
from transformers.models.qwen3_moe.modeling_qwen3_moe import (
    Qwen3MoeAttention,
    Qwen3MoeForCausalLM,
    Qwen3MoeModel,
    apply_rotary_pos_emb,
    eager_attention_forward,
    rotate_half,
)

from .configuration_uniattn import UniAttnConfigMixin
from .sharing_uniattn import SharedAttentionMixin, SharedCausalLMMixin, SharedModelMixin


@strict
class UniAttnQwen3MoeConfig(UniAttnConfigMixin, Qwen3MoeConfig):
    """Qwen3-MoE's configuration with a layout."""

    model_type = "uniattn_qwen3_moe"
    uniattn: dict | None = None


class UniAttnQwen3MoeAttention(SharedAttentionMixin, Qwen3MoeAttention):
    """Qwen3-MoE's attention, own or borrowed."""

    rotate = staticmethod(apply_rotary_pos_emb)
    rotate_half = staticmethod(rotate_half)
    eager_attention = staticmethod(eager_attention_forward)

    def attention_arguments(self) -> dict:
        return {"sliding_window": self.sliding_window}


class UniAttnQwen3MoeModel(SharedModelMixin, Qwen3MoeModel):
    """Qwen3-MoE's base model."""

    config: UniAttnQwen3MoeConfig
    attention_class = UniAttnQwen3MoeAttention


class UniAttnQwen3MoeForCausalLM(SharedCausalLMMixin, Qwen3MoeForCausalLM):
    """Qwen3-MoE for text generation."""

    config: UniAttnQwen3MoeConfig
    model_class = UniAttnQwen3MoeModel
