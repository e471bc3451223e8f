"""Mixtral with layers that share attention maps. Copied into every converted checkpoint of this family.

Annotations are evaluated here: transformers reads the class of `config` from them.
"""

from huggingface_hub.dataclasses import strict
from transformers.models.mixtral.configuration_mixtral import MixtralConfig
from transformers.models.mixtral.modeling_mixtral import (
    MixtralAttention,
    MixtralForCausalLM,
    MixtralModel,
    apply_rotary_pos_emb,
    eager_attention_forward,
    rotate_half,
)

from .configuration_uniattn import UniAttnConfigMixin
from .sharing_uniattn import SharedAttentionMixin, SharedCausalLMMixin, SharedModelMixin


@strict
class UniAttnMixtralConfig(UniAttnConfigMixin, MixtralConfig):
    """Mixtral's configuration with a layout."""

    model_type = "uniattn_mixtral"
    uniattn: dict | None = None


class UniAttnMixtralAttention(SharedAttentionMixin, MixtralAttention):
    """Mixtral's attention, own or borrowed."""

    rotate = staticmethod(apply_rotary_pos_emb)
    rotate_half = staticmethod(rotate_half)
    eager_attention = staticmethod(eager_attention_forward)

    def attention_arguments(self) -> dict:
        return {"sliding_window": self.config.sliding_window}


class UniAttnMixtralModel(SharedModelMixin, MixtralModel):
    """Mixtral's base model."""

    config: UniAttnMixtralConfig
    attention_class = UniAttnMixtralAttention


class UniAttnMixtralForCausalLM(SharedCausalLMMixin, MixtralForCausalLM):
    """Mixtral for text generation."""

    config: UniAttnMixtralConfig
    model_class = UniAttnMixtralModel
