"""Ministral with layers that share attention maps. Copied into every converted checkpoint of this family.

Annotations are evaluated here: transformers reads the class of `config` from them.
"""

from huggingface_hub.dataclasses import strict
from transformers.models.ministral.configuration_ministral import MinistralConfig
from transformers.models.ministral.modeling_ministral import (
    MinistralAttention,
    MinistralForCausalLM,
    MinistralModel,
    apply_rotary_pos_emb,
    eager_attention_forward,
    rotate_half,
)

from .configuration_uniattn import UniAttnConfigMixin
from .sharing_uniattn import SharedAttentionMixin, SharedCausalLMMixin, SharedModelMixin


@strict
class UniAttnMinistralConfig(UniAttnConfigMixin, MinistralConfig):
    """Ministral's configuration with a layout."""

    model_type = "uniattn_ministral"
    uniattn: dict | None = None


class UniAttnMinistralAttention(SharedAttentionMixin, MinistralAttention):
    """Ministral's attention, own or borrowed."""

    rotate = staticmethod(apply_rotary_pos_emb)
    rotate_half = staticmethod(rotate_half)
    eager_attention = staticmethod(eager_attention_forward)

    def attention_arguments(self) -> dict:
        return {"sliding_window": self.sliding_window}


class UniAttnMinistralModel(SharedModelMixin, MinistralModel):
    """Ministral's base model."""

    config: UniAttnMinistralConfig
    attention_class = UniAttnMinistralAttention


class UniAttnMinistralForCausalLM(SharedCausalLMMixin, MinistralForCausalLM):
    """Ministral for text generation."""

    config: UniAttnMinistralConfig
    model_class = UniAttnMinistralModel
