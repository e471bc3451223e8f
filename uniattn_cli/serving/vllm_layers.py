"""Attention layers for vLLM whose cache holds what a layout says and no more. Imported by vLLM's processes only.

Keys and values are cached as layers of their own, half a stock page each: an `own` layer has two (`attn` and
`attn_keys`), one that borrows its keys only one. All have the same specification, so vLLM's own cache manager puts them
under one block table, and its numbers of blocks follow from the number of units. A borrowing layer calls the device's
stock kernel (`vllm_cpu`, `vllm_flash`) with the source's keys and its own values, once for each run of heads.
"""

from __future__ import annotations

import dataclasses

import torch
from vllm.config import VllmConfig
from vllm.model_executor.layers.attention import Attention
from vllm.model_executor.layers.attention_layer_base import AttentionLayerBase
from vllm.v1.attention.backend import AttentionBackend
from vllm.v1.kv_cache_interface import AttentionSpec, KVCacheSpec

from uniattn_cli.modeling.layout_uniattn import AttentionShape, Layout
from uniattn_cli.serving.cache_plan import KEYS_SUFFIX, kv_heads_of, passed_kv_heads, read_runs, writes
from uniattn_cli.serving.fused_decoding import FusedDecoding


class KeyCache(AttentionLayerBase):
    """The cached keys of a layer, a layer of its own in vLLM's eyes; it computes nothing."""

    def __init__(self, owner: SharedCacheAttention, name: str, vllm_config: VllmConfig):
        self.owner = owner
        self.layer_name = name
        self.impl = owner.impl
        self.num_heads = owner.num_heads
        self.kv_cache = torch.tensor([])
        vllm_config.compilation_config.static_forward_context[name] = self

    def bind_kv_cache(self, kv_cache: torch.Tensor) -> None:
        super().bind_kv_cache(kv_cache)
        if self.owner.fused is not None:
            self.owner.fused.bound("k", self.owner.index)

    def heads(self, first: int, count: int, step: int = 1) -> torch.Tensor:
        """Keys of some heads, [blocks, heads, block size, head size]."""
        return self.kv_cache[:, first : first + step * count : step]

    def get_attn_backend(self) -> type[AttentionBackend]:
        return self.owner.attn_backend

    def get_kv_cache_spec(self, vllm_config: VllmConfig) -> KVCacheSpec:
        return self.owner.get_kv_cache_spec(vllm_config)


class SharedCacheAttention(Attention):
    """vLLM's attention layer for one layer of a layout.

    Args:
        layout: of the heads on this rank.
        shape: sizes on this rank.
        index: the layer.
        peers: all layers made so far, by index; this one adds itself.
        vllm_config: the engine's configuration.
        prefix: vLLM's name of the layer.
        backend: of this device. Its implementation says what the kernels can do: `strided_heads`, take heads at equal
            distances, other ones of keys than of values; `writes_borrowed_keys`, write nothing but keys beside values.
        arguments: what vLLM gives its own class.

    Attributes:
        fused: the passes in which it takes part while decoding; None where it does not.
    """

    def __init__(
        self,
        *,
        layout: Layout,
        shape: AttentionShape,
        index: int,
        peers: dict[int, SharedCacheAttention],
        vllm_config: VllmConfig,
        prefix: str,
        backend: type[AttentionBackend],
        **arguments,
    ):
        impl = backend.get_impl_cls()
        self.runs = read_runs(layout, shape, index, impl.strided_heads)
        self.writes = writes(layout, shape, index)
        self.stored_heads = kv_heads_of(layout, shape, index)
        arguments["num_kv_heads"] = passed_kv_heads(layout, shape, index)
        target = None
        if layout[index].traits.borrows_values:
            # vLLM then caches nothing for the layer and gives it the block table of this one.
            target = peers[layout[index].source_layers[0]].layer_name
        super().__init__(prefix=prefix, attn_backend=backend, kv_sharing_target_layer_name=target, **arguments)
        # Not attributes of a module, which would register each other's buffers twice.
        object.__setattr__(self, "peers", peers)
        peers[index] = self
        keys = KeyCache(self, prefix + KEYS_SUFFIX, vllm_config) if "k" in layout[index].traits.caches else None
        object.__setattr__(self, "keys", keys)
        self.needs_new_keys = keys is not None or impl.writes_borrowed_keys
        self.index = index
        self.fused: FusedDecoding | None = None

    def bind_kv_cache(self, kv_cache: torch.Tensor) -> None:
        super().bind_kv_cache(kv_cache)
        if self.fused is not None:
            self.fused.bound("v", self.index)

    def heads(self, first: int, count: int, step: int = 1) -> torch.Tensor:
        """Cached values of some heads, [blocks, heads, block size, head size]."""
        return self.kv_cache[:, first : first + step * count : step]

    def forward(self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, *args, **kwargs) -> torch.Tensor:
        """As vLLM's; borrowed keys that nobody writes again are not looked at, so that compiled code gathers none."""
        return super().forward(query, key if self.needs_new_keys else value, value, *args, **kwargs)

    def get_kv_cache_spec(self, vllm_config: VllmConfig) -> KVCacheSpec | None:
        """One unit: the page of a stock layer with keys or values only."""
        spec = super().get_kv_cache_spec(vllm_config)
        if not isinstance(spec, AttentionSpec):
            return spec
        return dataclasses.replace(
            spec, num_kv_heads=self.stored_heads, state_content_bytes=spec.head_size * spec.dtype.itemsize
        )
