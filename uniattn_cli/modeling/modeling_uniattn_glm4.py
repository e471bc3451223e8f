"""GLM-4-0414 with layers that share attention maps. Copied into every converted checkpoint of this family.

Annotations are evaluated here: transformers reads the class of `config` from them.
"""

from huggingface_hub.dataclasses import strict
from transformers.models.glm4.configuration_glm4 import Glm4Config
from transformers.models.glm4.modeling_glm4 import (
    Glm4Attention,
    Glm4ForCausalLM,
    Glm4Model,
    apply_rotary_pos_emb,
    eager_attention_forward,
)

from .configuration_uniattn import UniAttnConfigMixin
from .sharing_uniattn import SharedAttentionMixin, SharedCausalLMMixin, SharedModelMixin


@strict
class UniAttnGlm4Config(UniAttnConfigMixin, Glm4Config):
    """GLM-4-0414's configuration with a layout."""

    model_type = "uniattn_glm4"
    uniattn: dict | None = None


class UniAttnGlm4Attention(SharedAttentionMixin, Glm4Attention):
    """GLM-4-0414's attention, own or borrowed."""

    rotate = staticmethod(apply_rotary_pos_emb)
    eager_attention = staticmethod(eager_attention_forward)


class UniAttnGlm4Model(SharedModelMixin, Glm4Model):
    """GLM-4-0414's base model."""

    config: UniAttnGlm4Config
    attention_class = UniAttnGlm4Attention


class UniAttnGlm4ForCausalLM(SharedCausalLMMixin, Glm4ForCausalLM):
    """GLM-4-0414 for text generation."""

    config: UniAttnGlm4Config
    model_class = UniAttnGlm4Model
