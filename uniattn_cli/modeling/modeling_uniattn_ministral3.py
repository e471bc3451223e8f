"""Ministral 3 with layers that share attention maps. Copied into every converted checkpoint of this family.

Annotations are evaluated here: transformers reads the class of `config` from them.
"""

from typing import Any

from huggingface_hub.dataclasses import strict
from transformers.models.ministral3.configuration_ministral3 import Ministral3Config
from transformers.models.ministral3.modeling_ministral3 import (
    Ministral3Attention,
    Ministral3ForCausalLM,
    Ministral3Model,
    apply_rotary_pos_emb,
    eager_attention_forward,
    get_llama_4_attn_scale,
    rotate_half,
)

from .configuration_uniattn import UniAttnConfigMixin
from .sharing_uniattn import SharedAttentionMixin, SharedCausalLMMixin, SharedModelMixin


@strict
class UniAttnMinistral3Config(UniAttnConfigMixin, Ministral3Config):
    """Ministral 3's configuration with a layout."""

    model_type = "uniattn_ministral3"
    uniattn: dict | None = None


class UniAttnMinistral3Attention(SharedAttentionMixin, Ministral3Attention):  # type: ignore[misc]  # stock forward requires positions
    """Ministral 3's attention, own or borrowed."""

    rotate = staticmethod(apply_rotary_pos_emb)
    rotate_half = staticmethod(rotate_half)
    eager_attention = staticmethod(eager_attention_forward)
    config: Any

    def attention_arguments(self) -> dict:
        return {"sliding_window": self.config.sliding_window}

    def embed_positions(self, states: dict, position_embeddings, position_ids) -> None:
        """Queries far from the beginning are made longer, so that their maps stay sharp."""
        super().embed_positions(states, position_embeddings, position_ids)
        if "q" in states:
            rope = self.config.rope_parameters
            known = rope.get("original_max_position_embeddings")
            scale = get_llama_4_attn_scale(position_ids, rope.get("llama_4_scaling_beta"), known)
            states["q"] = states["q"] * scale.to(states["q"].dtype)


class UniAttnMinistral3Model(SharedModelMixin, Ministral3Model):
    """Ministral 3's base model."""

    config: UniAttnMinistral3Config
    attention_class = UniAttnMinistral3Attention


class UniAttnMinistral3ForCausalLM(SharedCausalLMMixin, Ministral3ForCausalLM):
    """Ministral 3 for text generation."""

    config: UniAttnMinistral3Config
    model_class = UniAttnMinistral3Model
