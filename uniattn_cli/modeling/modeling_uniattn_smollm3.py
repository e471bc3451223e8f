"""SmolLM3 with layers that share attention maps. Copied into every converted checkpoint of this family.

Annotations are evaluated here: transformers reads the class of `config` from them.
"""

from huggingface_hub.dataclasses import strict
from transformers.models.smollm3.configuration_smollm3 import SmolLM3Config
from transformers.models.smollm3.modeling_smollm3 import (
    SmolLM3Attention,
    SmolLM3ForCausalLM,
    SmolLM3Model,
    apply_rotary_pos_emb,
    eager_attention_forward,
    rotate_half,
)

from .configuration_uniattn import UniAttnConfigMixin
from .sharing_uniattn import SharedAttentionMixin, SharedCausalLMMixin, SharedModelMixin


@strict
class UniAttnSmolLM3Config(UniAttnConfigMixin, SmolLM3Config):
    """SmolLM3's configuration with a layout."""

    model_type = "uniattn_smollm3"
    uniattn: dict | None = None


class UniAttnSmolLM3Attention(SharedAttentionMixin, SmolLM3Attention):
    """SmolLM3's attention, own or borrowed."""

    rotate = staticmethod(apply_rotary_pos_emb)
    rotate_half = staticmethod(rotate_half)
    eager_attention = staticmethod(eager_attention_forward)

    def attention_arguments(self) -> dict:
        return {"sliding_window": self.sliding_window}

    def embed_positions(self, states: dict, position_embeddings, position_ids) -> None:
        """Some layers know no positions."""
        if self.use_rope:
            super().embed_positions(states, position_embeddings, position_ids)


class UniAttnSmolLM3Model(SharedModelMixin, SmolLM3Model):
    """SmolLM3's base model."""

    config: UniAttnSmolLM3Config
    attention_class = UniAttnSmolLM3Attention


class UniAttnSmolLM3ForCausalLM(SharedCausalLMMixin, SmolLM3ForCausalLM):
    """SmolLM3 for text generation."""

    config: UniAttnSmolLM3Config
    model_class = UniAttnSmolLM3Model
