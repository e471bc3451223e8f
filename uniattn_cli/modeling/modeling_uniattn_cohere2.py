"""Cohere 2 with layers that share attention maps. Copied into every converted checkpoint of this family.

Annotations are evaluated here: transformers reads the class of `config` from them.
"""

from huggingface_hub.dataclasses import strict
from transformers.models.cohere2.configuration_cohere2 import Cohere2Config
from transformers.models.cohere2.modeling_cohere2 import (
    Cohere2Attention,
    Cohere2ForCausalLM,
    Cohere2Model,
    apply_rotary_pos_emb,
    eager_attention_forward,
)

from .configuration_uniattn import UniAttnConfigMixin
from .sharing_uniattn import SharedAttentionMixin, SharedCausalLMMixin, SharedModelMixin


@strict
class UniAttnCohere2Config(UniAttnConfigMixin, Cohere2Config):
    """Cohere 2's configuration with a layout."""

    model_type = "uniattn_cohere2"
    uniattn: dict | None = None


class UniAttnCohere2Attention(SharedAttentionMixin, Cohere2Attention):  # type: ignore[misc]  # stock forward gives three, not two
    """Cohere 2's attention, own or borrowed."""

    rotate = staticmethod(apply_rotary_pos_emb)
    eager_attention = staticmethod(eager_attention_forward)

    def attention_arguments(self) -> dict:
        return {"sliding_window": self.sliding_window}

    def embed_positions(self, states: dict, position_embeddings, position_ids) -> None:
        """Full layers know no positions."""
        if self.sliding_window is not None:
            super().embed_positions(states, position_embeddings, position_ids)


class UniAttnCohere2Model(SharedModelMixin, Cohere2Model):
    """Cohere 2's base model."""

    config: UniAttnCohere2Config
    attention_class = UniAttnCohere2Attention


class UniAttnCohere2ForCausalLM(SharedCausalLMMixin, Cohere2ForCausalLM):
    """Cohere 2 for text generation."""

    config: UniAttnCohere2Config
    model_class = UniAttnCohere2Model
