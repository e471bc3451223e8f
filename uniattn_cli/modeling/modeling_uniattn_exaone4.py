"""EXAONE 4 with layers that share attention maps. Copied into every converted checkpoint of this family.

Annotations are evaluated here: transformers reads the class of `config` from them.
"""

from huggingface_hub.dataclasses import strict
from transformers.models.exaone4.configuration_exaone4 import Exaone4Config
from transformers.models.exaone4.modeling_exaone4 import (
    Exaone4Attention,
    Exaone4ForCausalLM,
    Exaone4Model,
    apply_rotary_pos_emb,
    eager_attention_forward,
    rotate_half,
)

from .configuration_uniattn import UniAttnConfigMixin
from .sharing_uniattn import SharedAttentionMixin, SharedCausalLMMixin, SharedModelMixin


@strict
class UniAttnExaone4Config(UniAttnConfigMixin, Exaone4Config):
    """EXAONE 4's configuration with a layout."""

    model_type = "uniattn_exaone4"
    uniattn: dict | None = None


class UniAttnExaone4Attention(SharedAttentionMixin, Exaone4Attention):  # type: ignore[misc]  # stock forward gives three, not two
    """EXAONE 4's attention, own or borrowed."""

    rotate = staticmethod(apply_rotary_pos_emb)
    rotate_half = staticmethod(rotate_half)
    eager_attention = staticmethod(eager_attention_forward)

    def attention_arguments(self) -> dict:
        return {"sliding_window": self.sliding_window if self.is_sliding else None}

    def embed_positions(self, states: dict, position_embeddings, position_ids) -> None:
        """Full layers beside sliding ones know no positions."""
        if self.sliding_window is None or self.is_sliding:
            super().embed_positions(states, position_embeddings, position_ids)


class UniAttnExaone4Model(SharedModelMixin, Exaone4Model):
    """EXAONE 4's base model."""

    config: UniAttnExaone4Config
    attention_class = UniAttnExaone4Attention


class UniAttnExaone4ForCausalLM(SharedCausalLMMixin, Exaone4ForCausalLM):
    """EXAONE 4 for text generation."""

    config: UniAttnExaone4Config
    model_class = UniAttnExaone4Model
