"""vLLM's CPU attention with keys and values of different layers. Imported by vLLM's processes only.

The CPU kernel reads and writes keys and values through one set of strides, in a packing that depends on the processor.
"""

from __future__ import annotations

import torch
from vllm import _custom_ops as ops
from vllm import envs
from vllm.v1.attention.backends.cpu_attn import CPUAttentionBackend, CPUAttentionBackendImpl, CPUAttentionMetadata

from uniattn_cli.serving.cache_plan import Run
from uniattn_cli.serving.vllm_layers import SharedCacheAttention


class SharedCPUImpl(CPUAttentionBackendImpl):
    """The CPU kernel with keys and values from the units that a layer's runs name."""

    strided_heads = False
    writes_borrowed_keys = True

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


class SharedCPUBackend(CPUAttentionBackend):
    """vLLM's CPU backend with `SharedCPUImpl`."""

    @staticmethod
    def get_impl_cls() -> type[SharedCPUImpl]:
        return SharedCPUImpl
