"""Granite with layers that share attention maps. Copied into every converted checkpoint of this family.

Annotations are evaluated here: transformers reads the class of `config` from them.
"""

from huggingface_hub.dataclasses import strict
from transformers.models.granite.configuration_granite import GraniteConfig
from transformers.models.granite.modeling_granite import (
    GraniteAttention,
    GraniteForCausalLM,
    GraniteModel,
    apply_rotary_pos_emb,
    eager_attention_forward,
    rotate_half,
)

from .configuration_uniattn import UniAttnConfigMixin
from .sharing_uniattn import SharedAttentionMixin, SharedCausalLMMixin, SharedModelMixin


@strict
class UniAttnGraniteConfig(UniAttnConfigMixin, GraniteConfig):
    """Granite's configuration with a layout."""

    model_type = "uniattn_granite"
    uniattn: dict | None = None

    @property
    def logit_scale(self) -> float:
        """Factor of the logits under the name that vLLM's Transformers backend asks for; it knows no other."""
        return 1.0 / self.logits_scaling


class UniAttnGraniteAttention(SharedAttentionMixin, GraniteAttention):
    """Granite's attention, own or borrowed."""

    rotate = staticmethod(apply_rotary_pos_emb)
    rotate_half = staticmethod(rotate_half)
    eager_attention = staticmethod(eager_attention_forward)


class UniAttnGraniteModel(SharedModelMixin, GraniteModel):
    """Granite's base model."""

    config: UniAttnGraniteConfig
    attention_class = UniAttnGraniteAttention


class UniAttnGraniteForCausalLM(SharedCausalLMMixin, GraniteForCausalLM):
    """Granite for text generation."""

    config: UniAttnGraniteConfig
    model_class = UniAttnGraniteModel
