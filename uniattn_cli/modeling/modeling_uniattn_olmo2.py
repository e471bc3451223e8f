"""OLMo 2 with layers that share attention maps. Copied into every converted checkpoint of this family.

Annotations are evaluated here: transformers reads the class of `config` from them.
"""

from huggingface_hub.dataclasses import strict
from transformers.models.olmo2.configuration_olmo2 import Olmo2Config
from transformers.models.olmo2.modeling_olmo2 import (
    Olmo2Attention,
    Olmo2ForCausalLM,
    Olmo2Model,
    apply_rotary_pos_emb,
    eager_attention_forward,
)

from .configuration_uniattn import UniAttnConfigMixin
from .sharing_uniattn import SharedCausalLMMixin, SharedModelMixin, WideNormAttentionMixin


@strict
class UniAttnOlmo2Config(UniAttnConfigMixin, Olmo2Config):
    """OLMo 2's configuration with a layout."""

    model_type = "uniattn_olmo2"
    uniattn: dict | None = None


class UniAttnOlmo2Attention(WideNormAttentionMixin, Olmo2Attention):
    """OLMo 2's attention, own or borrowed."""

    rotate = staticmethod(apply_rotary_pos_emb)
    eager_attention = staticmethod(eager_attention_forward)


class UniAttnOlmo2Model(SharedModelMixin, Olmo2Model):
    """OLMo 2's base model."""

    config: UniAttnOlmo2Config
    attention_class = UniAttnOlmo2Attention


class UniAttnOlmo2ForCausalLM(SharedCausalLMMixin, Olmo2ForCausalLM):
    """OLMo 2 for text generation."""

    config: UniAttnOlmo2Config
    model_class = UniAttnOlmo2Model
