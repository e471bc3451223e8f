"""Phi-3 with layers that share attention maps. Copied into every converted checkpoint of this family.

Queries, keys and values come out of one projection, whose rows are those of the queries, then of the keys, then of the
values. Changed layers keep the rows that they need, in the same order and under the same name.

Annotations are evaluated here: transformers reads the class of `config` from them.
"""

from typing import Any

import torch
from huggingface_hub.dataclasses import strict
from torch import nn
from transformers.models.phi3.configuration_phi3 import Phi3Config
from transformers.models.phi3.modeling_phi3 import (
    Phi3Attention,
    Phi3ForCausalLM,
    Phi3Model,
    apply_rotary_pos_emb,
    eager_attention_forward,
)

from .configuration_uniattn import UniAttnConfigMixin
from .sharing_uniattn import SharedAttentionMixin, SharedCausalLMMixin, SharedModelMixin, some_rows


@strict
class UniAttnPhi3Config(UniAttnConfigMixin, Phi3Config):
    """Phi-3's configuration with a layout."""

    model_type = "uniattn_phi3"
    uniattn: dict | None = None


class UniAttnPhi3Attention(SharedAttentionMixin, Phi3Attention):  # type: ignore[misc]  # stock forward gives two, not three
    """Phi-3's attention, own or borrowed."""

    rotate = staticmethod(apply_rotary_pos_emb)
    eager_attention = staticmethod(eager_attention_forward)
    pooled_names = ()
    config: Any
    num_key_value_heads: int

    def drop_projections(self, removed: tuple[str, ...]) -> None:
        self.kept = "".join(part for part in "qkv" if f"{part}_proj" not in removed)
        if not self.kept:
            del self.qkv_proj
        elif self.kept != "qkv":
            self._narrow(self.num_key_value_heads)
        if "o_proj" in removed:
            del self.o_proj

    def shrink_kv_heads(self, kept: int) -> None:
        self._narrow(kept)

    def _narrow(self, kv_heads: int) -> None:
        """Makes the fused projection as wide as the parts that are kept."""
        self.num_key_value_heads = kv_heads
        old = self.qkv_proj
        self.qkv_proj = nn.Linear(old.in_features, sum(self._widths().values()), bias=old.bias is not None)

    def _widths(self) -> dict[str, int]:
        """Rows of each kept part, in order."""
        heads = {"q": self.config.num_attention_heads, "k": self.num_key_value_heads, "v": self.num_key_value_heads}
        return {part: heads[part] * self.head_dim for part in self.kept}

    @torch.no_grad()
    def take_weights(self, stock: nn.Module) -> None:
        super().take_weights(stock)
        if self.plan.kind == "own" or not self.kept:
            return
        heads = (self.config.num_attention_heads, *[self.config.num_key_value_heads] * 2)
        for name, fused in stock.get_submodule("qkv_proj").named_parameters():
            rows = dict(zip("qkv", fused.detach().split([count * self.head_dim for count in heads]), strict=True))
            if self.plan.traits.fewer_heads:
                rows |= {part: self.pool_heads(rows[part]) for part in "kv"}
            setattr(self.qkv_proj, name, nn.Parameter(torch.cat([rows[part] for part in self.kept])))

    def project(self, hidden_states: torch.Tensor, parts: str) -> dict[str, torch.Tensor]:
        if parts != self.kept:
            # Rows that need not be neighbours.
            return super().project(hidden_states, parts)
        fused = self.qkv_proj(hidden_states).split(list(self._widths().values()), dim=-1)
        return {part: self.split_heads(part, states) for part, states in zip(parts, fused, strict=True)}

    def projected(self, part: str, hidden_states: torch.Tensor, heads: slice | None = None) -> torch.Tensor:
        widths = self._widths()
        start = sum(widths[other] for other in self.kept[: self.kept.index(part)])
        rows = slice(0, widths[part]) if heads is None else self._rows(heads)
        return some_rows(self.qkv_proj, hidden_states, slice(start + rows.start, start + rows.stop))

    def attention_arguments(self) -> dict:
        return {"sliding_window": self.config.sliding_window}


class UniAttnPhi3Model(SharedModelMixin, Phi3Model):
    """Phi-3's base model."""

    config: UniAttnPhi3Config
    attention_class = UniAttnPhi3Attention


class UniAttnPhi3ForCausalLM(SharedCausalLMMixin, Phi3ForCausalLM):
    """Phi-3 for text generation."""

    config: UniAttnPhi3Config
    model_class = UniAttnPhi3Model
