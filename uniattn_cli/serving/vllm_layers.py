"""Attention layers for vLLM whose cache holds what a layout says and no more. Imported by vLLM's processes only.

vLLM's CPU kernel reads keys and values through one set of strides, so both must lie in tensors of the same shape. Keys
and values are therefore cached as layers of their own, half a stock page each: an `own` layer has two (`attn` and
`attn_keys`), one that borrows its keys only one. All have the same specification, so vLLM's own cache manager puts them
under one block table, and its numbers of blocks follow from the number of units. A borrowing layer calls the stock
kernel with the source's keys and its own values, once for each run of neighbouring heads.
"""

from __future__ import annotations

import dataclasses

import torch
from vllm import _custom_ops as ops
from vllm import envs
from vllm.config import VllmConfig
from vllm.model_executor.layers.attention import Attention
from vllm.model_executor.layers.attention_layer_base import AttentionLayerBase
from vllm.v1.attention.backend import AttentionBackend
from vllm.v1.attention.backends.cpu_attn import CPUAttentionBackend, CPUAttentionBackendImpl, CPUAttentionMetadata
from vllm.v1.kv_cache_interface import AttentionSpec, KVCacheSpec

from uniattn_cli.modeling.layout_uniattn import AttentionShape, Layout
from uniattn_cli.serving.cache_plan import (
    KEYS_SUFFIX,
    Run,
    kv_heads_of,
    passed_kv_heads,
    read_runs,
    writes,
)


class SharedCacheImpl(CPUAttentionBackendImpl):
    """The CPU kernel with keys and values from the units that a layer's runs name."""

    def forward(
        self,
        layer: SharedCacheAttention,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        kv_cache: torch.Tensor,
        attn_metadata: CPUAttentionMetadata | None,
        output: torch.Tensor,
        output_scale: torch.Tensor | None = None,
        output_block_scale: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Fills `output` [tokens, query heads, head size]; keys and values come from the caches, not from arguments."""
        if output_scale is not None or output_block_scale is not None:
            raise NotImplementedError("fused output quantisation is not supported by vLLM's CPU attention")
        if attn_metadata is None:  # vLLM warms up without a cache
            return output
        tokens = attn_metadata.num_actual_tokens
        for run in layer.runs:
            heads = slice(run.query_head, run.query_head + run.query_heads)
            queries, whole = query[:tokens, heads], run.query_heads == self.num_heads
            # The kernel writes dense output only.
            result = output[:tokens] if whole else torch.empty_like(queries, memory_format=torch.contiguous_format)
            ops.cpu_attention_with_kv_cache(
                query=queries,
                key_cache=layer.peers[run.key_layer].keys.heads(run.key_head, run.kv_heads),
                value_cache=layer.peers[run.value_layer].heads(run.value_head, run.kv_heads),
                output=result,
                query_start_loc=attn_metadata.query_start_loc,
                seq_lens=attn_metadata.seq_lens,
                scale=self.scale,
                causal=attn_metadata.causal,
                alibi_slopes=self.alibi_slopes,
                sliding_window=self.sliding_window,
                block_table=attn_metadata.block_table,
                softcap=self.logits_soft_cap,
                scheduler_metadata=self._schedule(layer, run, query.dtype, attn_metadata),
                s_aux=None,
                dynamic_causal=attn_metadata.dynamic_causal,
                k_scale=layer._k_scale_float,
                v_scale=layer._v_scale_float,
                kv_cache_dtype=self.kv_cache_dtype,
            )
            if not whole:
                output[:tokens, heads] = result
        return output

    def _schedule(self, layer: SharedCacheAttention, run: Run, dtype: torch.dtype, metadata: CPUAttentionMetadata):
        """The kernel's division of work for a number of heads, made once per step and number."""
        if run.query_heads == self.num_heads and run.kv_heads == layer.stored_heads:
            return metadata.scheduler_metadata
        made = metadata.__dict__.setdefault("uniattn_schedules", {})
        key = (run.query_heads, run.kv_heads, self.sliding_window)
        if key not in made:
            made[key] = ops.cpu_attn_get_scheduler_metadata(
                num_reqs=metadata.seq_lens.shape[0],
                num_heads=run.query_heads,
                num_kv_heads=run.kv_heads,
                head_dim=self.head_size,
                seq_lens=metadata.seq_lens,
                dtype=dtype,
                query_start_loc=metadata.query_start_loc,
                causal=metadata.causal,
                sliding_window_size=self.sliding_window,
                isa=layer.isa,
                enable_kv_split=envs.VLLM_CPU_ATTN_SPLIT_KV,
                dynamic_causal=metadata.dynamic_causal,
                kv_cache_dtype=self.kv_cache_dtype,
            )
        return made[key]

    def do_kv_cache_update(
        self,
        layer: SharedCacheAttention,
        key: torch.Tensor,
        value: torch.Tensor,
        kv_cache: torch.Tensor,
        slot_mapping: torch.Tensor,
    ) -> None:
        """Stores the new tokens' values, and keys where they are the layer's own; [tokens, heads, head size] each.

        The kernel always writes both, in a packing that depends on the processor. A borrower therefore writes its
        source's keys again: the same numbers into the same places.
        """
        for write in layer.writes:
            passed = slice(write.argument, write.argument + write.heads)
            ops.cpu_attn_reshape_and_cache(
                key[:, passed],
                value[:, passed],
                layer.peers[write.key_layer].keys.heads(write.key_head, write.heads),
                layer.heads(write.value_head, write.heads),
                slot_mapping,
                layer.isa,
                k_scale=layer._k_scale_float,
                v_scale=layer._v_scale_float,
                kv_cache_dtype=self.kv_cache_dtype,
            )


class SharedCacheBackend(CPUAttentionBackend):
    """vLLM's CPU backend with `SharedCacheImpl`."""

    @staticmethod
    def get_impl_cls() -> type[SharedCacheImpl]:
        return SharedCacheImpl


class KeyCache(AttentionLayerBase):
    """The cached keys of a layer, a layer of its own in vLLM's eyes; it computes nothing."""

    def __init__(self, owner: SharedCacheAttention, name: str, vllm_config: VllmConfig):
        self.owner = owner
        self.layer_name = name
        self.impl = owner.impl
        self.num_heads = owner.num_heads
        self.kv_cache = torch.tensor([])
        vllm_config.compilation_config.static_forward_context[name] = self

    def heads(self, first: int, count: int) -> torch.Tensor:
        """Keys of some heads, [blocks, heads, block size, head size]."""
        return self.kv_cache[:, first : first + count]

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
        arguments: what vLLM gives its own class.
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
        **arguments,
    ):
        self.runs = read_runs(layout, shape, index)
        self.writes = writes(layout, shape, index)
        self.stored_heads = kv_heads_of(layout, shape, index)
        arguments["num_kv_heads"] = passed_kv_heads(layout, shape, index)
        target = None
        if layout[index].traits.borrows_values:
            # vLLM then caches nothing for the layer and gives it the block table of this one.
            target = peers[layout[index].source_layers[0]].layer_name
        super().__init__(
            prefix=prefix, attn_backend=SharedCacheBackend, kv_sharing_target_layer_name=target, **arguments
        )
        # Not attributes of a module, which would register each other's buffers twice.
        object.__setattr__(self, "peers", peers)
        peers[index] = self
        keys = KeyCache(self, prefix + KEYS_SUFFIX, vllm_config) if "k" in layout[index].traits.caches else None
        object.__setattr__(self, "keys", keys)

    def heads(self, first: int, count: int) -> torch.Tensor:
        """Cached values of some heads, [blocks, heads, block size, head size]."""
        return self.kv_cache[:, first : first + count]

    def get_kv_cache_spec(self, vllm_config: VllmConfig) -> KVCacheSpec | None:
        """One unit: the page of a stock layer with keys or values only."""
        spec = super().get_kv_cache_spec(vllm_config)
        if not isinstance(spec, AttentionSpec):
            return spec
        return dataclasses.replace(
            spec, num_kv_heads=self.stored_heads, state_content_bytes=spec.head_size * spec.dtype.itemsize
        )
