"""OLMo 3 with layers that share attention maps. Copied into every converted checkpoint of this family.

Annotations are evaluated here: transformers reads the class of `config` from them.
"""

import torch
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
from .sharing_uniattn import SharedAttentionMixin, SharedCausalLMMixin, SharedModelMixin


@strict
class UniAttnOlmo3Config(UniAttnConfigMixin, Olmo3Config):
    """OLMo 3's configuration with a layout."""

    model_type = "uniattn_olmo3"
    uniattn: dict | None = None


class UniAttnOlmo3Attention(SharedAttentionMixin, Olmo3Attention):
    """OLMo 3's attention, own or borrowed."""

    rotate = staticmethod(apply_rotary_pos_emb)
    eager_attention = staticmethod(eager_attention_forward)
    pooled_names = ("k_proj", "v_proj", "k_norm")

    def shrink_kv_heads(self, kept: int) -> None:
        super().shrink_kv_heads(kept)
        self.k_norm = type(self.k_norm)(kept * self.head_dim, self.config.rms_norm_eps)

    def project(self, hidden_states: torch.Tensor, parts: str) -> dict[str, torch.Tensor]:
        """Norms come before the split into heads: their statistics are those of all heads."""
        shape = (*hidden_states.shape[:-1], -1, self.head_dim)
        states = {}
        for part in parts:
            projected = getattr(self, f"{part}_proj")(hidden_states)
            norm = getattr(self, f"{part}_norm", None)
            states[part] = (projected if norm is None else norm(projected)).view(shape).transpose(1, 2)
        return states

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
