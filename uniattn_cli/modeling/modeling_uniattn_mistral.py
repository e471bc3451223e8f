"""Mistral with layers that share attention maps. Copied into every converted checkpoint of this family.

Annotations are evaluated here: transformers reads the class of `config` from them.
"""

from huggingface_hub.dataclasses import strict
from transformers.models.mistral.configuration_mistral import MistralConfig
from transformers.models.mistral.modeling_mistral import (
    MistralAttention,
    MistralForCausalLM,
    MistralModel,
    apply_rotary_pos_emb,
    eager_attention_forward,
    rotate_half,
)

from .configuration_uniattn import UniAttnConfigMixin
from .sharing_uniattn import SharedAttentionMixin, SharedCausalLMMixin, SharedModelMixin


@strict
class UniAttnMistralConfig(UniAttnConfigMixin, MistralConfig):
    """Mistral's configuration with a layout."""

    model_type = "uniattn_mistral"
    uniattn: dict | None = None


class UniAttnMistralAttention(SharedAttentionMixin, MistralAttention):
    """Mistral's attention, own or borrowed."""

    rotate = staticmethod(apply_rotary_pos_emb)
    rotate_half = staticmethod(rotate_half)
    eager_attention = staticmethod(eager_attention_forward)

    def attention_arguments(self) -> dict:
        return {"sliding_window": self.config.sliding_window}


class UniAttnMistralModel(SharedModelMixin, MistralModel):
    """Mistral's base model."""

    config: UniAttnMistralConfig
    attention_class = UniAttnMistralAttention


class UniAttnMistralForCausalLM(SharedCausalLMMixin, MistralForCausalLM):
    """Mistral for text generation."""

    config: UniAttnMistralConfig
    model_class = UniAttnMistralModel
