"""OLMo 3 with layers that share attention maps. Copied into every converted checkpoint of this family.

Annotations are evaluated here: transformers reads the class of `config` from them.
"""

from huggingface_hub.dataclasses import strict
from transformers.models.olmo3.configuration_olmo3 import Olmo3Config
from transformers.models.olmo3.modeling_olmo3 import (
    Olmo3Attention,
    Olmo3ForCausalLM,
    Olmo3Model,
    apply_rotary_pos_emb,
    eager_attention_forward,
)

from .configuration_uniattn import UniAttnConfigMixin
from .sharing_uniattn import SharedCausalLMMixin, SharedModelMixin, WideNormAttentionMixin


@strict
class UniAttnOlmo3Config(UniAttnConfigMixin, Olmo3Config):
    """OLMo 3's configuration with a layout."""

    model_type = "uniattn_olmo3"
    uniattn: dict | None = None


class UniAttnOlmo3Attention(WideNormAttentionMixin, Olmo3Attention):
    """OLMo 3's attention, own or borrowed."""

    rotate = staticmethod(apply_rotary_pos_emb)
    eager_attention = staticmethod(eager_attention_forward)

    def attention_arguments(self) -> dict:
        return {"sliding_window": self.sliding_window}


class UniAttnOlmo3Model(SharedModelMixin, Olmo3Model):
    """OLMo 3's base model."""

    config: UniAttnOlmo3Config
    attention_class = UniAttnOlmo3Attention


class UniAttnOlmo3ForCausalLM(SharedCausalLMMixin, Olmo3ForCausalLM):
    """OLMo 3 for text generation."""

    config: UniAttnOlmo3Config
    model_class = UniAttnOlmo3Model
