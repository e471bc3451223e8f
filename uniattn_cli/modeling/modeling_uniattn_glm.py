"""GLM-4 with layers that share attention maps. Copied into every converted checkpoint of this family.

Annotations are evaluated here: transformers reads the class of `config` from them.
"""

from huggingface_hub.dataclasses import strict
from transformers.models.glm.configuration_glm import GlmConfig
from transformers.models.glm.modeling_glm import (
    GlmAttention,
    GlmForCausalLM,
    GlmModel,
    apply_rotary_pos_emb,
    eager_attention_forward,
)

from .configuration_uniattn import UniAttnConfigMixin
from .sharing_uniattn import SharedAttentionMixin, SharedCausalLMMixin, SharedModelMixin


@strict
class UniAttnGlmConfig(UniAttnConfigMixin, GlmConfig):
    """GLM-4's configuration with a layout."""

    model_type = "uniattn_glm"
    uniattn: dict | None = None


class UniAttnGlmAttention(SharedAttentionMixin, GlmAttention):
    """GLM-4's attention, own or borrowed."""

    rotate = staticmethod(apply_rotary_pos_emb)
    eager_attention = staticmethod(eager_attention_forward)


class UniAttnGlmModel(SharedModelMixin, GlmModel):
    """GLM-4's base model."""

    config: UniAttnGlmConfig
    attention_class = UniAttnGlmAttention


class UniAttnGlmForCausalLM(SharedCausalLMMixin, GlmForCausalLM):
    """GLM-4 for text generation."""

    config: UniAttnGlmConfig
    model_class = UniAttnGlmModel
