"""vLLM's FlashAttention with keys and values of different layers. Imported by vLLM's processes only.

FlashAttention takes strides of keys and of values one by one, so that each unit is read where it lies, and a head map
needs one call for all heads that lie at equal distances in one layer. vLLM's kernel that fills the cache writes two
tensors through one set of strides; a borrower, which has only values, gives it the same one twice.
"""

from __future__ import annotations

import torch
from vllm.platforms import current_platform
from vllm.utils.torch_utils import canonicalize_singleton_dim_strides
from vllm.v1.attention.backend import AttentionCGSupport
from vllm.v1.attention.backends import fa_utils
from vllm.v1.attention.backends.flash_attn import (
    FlashAttentionBackend,
    FlashAttentionImpl,
    FlashAttentionMetadata,
    FlashAttentionMetadataBuilder,
)
from vllm.v1.kv_cache_interface import is_quantized_kv_cache

from uniattn_cli.serving.fused_decoding import wants_fusing
from uniattn_cli.serving.vllm_layers import SharedCacheAttention


class SharedFlashImpl(FlashAttentionImpl):
    """FlashAttention with keys and values from the units that a layer's runs name."""

    strided_heads = True
    writes_borrowed_keys = False

    def forward(
        self,
        layer: SharedCacheAttention,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        kv_cache: torch.Tensor,
        attn_metadata: FlashAttentionMetadata | None,
        output: torch.Tensor,
        output_scale: torch.Tensor | None = None,
        output_block_scale: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Fills `output` [tokens, query heads, head size]; keys and values come from the caches, not from arguments."""
        if output_scale is not None or output_block_scale is not None:
            raise NotImplementedError("fused output quantisation is not supported by vLLM's FlashAttention")
        if attn_metadata is None:  # vLLM measures memory without a cache
            return output.fill_(0)
        # Behind its own, a lender may be given queries of other layers.
        query = query.view(len(output), -1, self.head_size)
        if layer.fused is not None and attn_metadata.max_query_len == 1:
            layer.fused.attend(layer.index, query, attn_metadata, output)
            return output
        tokens, requests = attn_metadata.num_actual_tokens, len(attn_metadata.query_start_loc) - 1
        for run in layer.runs:
            heads = slice(run.query_head, run.query_head + run.query_heads)
            lender, owner = layer.peers[run.key_layer], layer.peers[run.value_layer]
            keys = lender.keys.heads(run.key_head, run.kv_heads, run.key_step)
            values = owner.heads(run.value_head, run.kv_heads, run.value_step)
            # FlashAttention 3 makes its own division of work where that of the step is for other numbers of heads.
            whole = run.query_heads == self.num_heads and run.kv_heads == layer.stored_heads
            fa_utils.flash_attn_varlen_func(
                q=query[:tokens, heads],
                k=self._paged(keys),
                v=self._paged(values),
                out=output[:tokens, heads],
                cu_seqlens_q=attn_metadata.query_start_loc,
                max_seqlen_q=attn_metadata.max_query_len,
                seqused_k=attn_metadata.seq_lens,
                max_seqlen_k=attn_metadata.max_seq_len,
                softmax_scale=self.scale,
                causal=attn_metadata.causal,
                window_size=list(self.sliding_window),
                block_table=attn_metadata.block_table,
                softcap=self.logits_soft_cap,
                scheduler_metadata=attn_metadata.scheduler_metadata if whole else None,
                fa_version=self.vllm_flash_attn_version,
                num_splits=attn_metadata.max_num_splits,
                # Of a cache in FP8: each tensor has the scale of the layer that wrote it.
                q_descale=layer._q_scale.expand(requests, run.kv_heads),
                k_descale=lender._k_scale.expand(requests, run.kv_heads),
                v_descale=owner._v_scale.expand(requests, run.kv_heads),
            )
        return output

    def _paged(self, heads: torch.Tensor) -> torch.Tensor:
        """Cached heads [blocks, heads, block size, head size] as FlashAttention takes them, heads third; no copy."""
        if is_quantized_kv_cache(self.kv_cache_dtype):
            heads = heads.view(current_platform.fp8_dtype())
        return canonicalize_singleton_dim_strides(heads.transpose(1, 2))

    def do_kv_cache_update(
        self,
        layer: SharedCacheAttention,
        key: torch.Tensor,
        value: torch.Tensor,
        kv_cache: torch.Tensor,
        slot_mapping: torch.Tensor,
    ) -> None:
        """Stores the new tokens' values, and keys where they are the layer's own; [tokens, heads, head size] each."""
        repeated = value.shape[1] // layer.stored_heads
        if repeated > 1:  # free head maps: one value head for each query head
            value = value[:, ::repeated]
        # The kernel reads the heads of a token as one row, which not all compiled code makes of them.
        key, value = _as_rows(key), _as_rows(value)
        values = layer.heads(0, layer.stored_heads).transpose(1, 2)
        key, keys = (
            (value, values) if layer.keys is None else (key, layer.keys.heads(0, layer.stored_heads).transpose(1, 2))
        )
        fa_utils.reshape_and_cache_flash(
            key, value, keys, values, slot_mapping, self.kv_cache_dtype, layer._k_scale, layer._v_scale
        )


def _as_rows(heads: torch.Tensor) -> torch.Tensor:
    """The tensor [tokens, heads, head size], copied unless the heads of each token lie one after the other."""
    return heads if heads.stride()[1:] == (heads.shape[2], 1) else heads.contiguous()


class SharedFlashMetadataBuilder(FlashAttentionMetadataBuilder):
    """vLLM's; where decoding is fused, a step that is captured for decoding serves no other batch."""

    @classmethod
    def get_cudagraph_support(cls, vllm_config, kv_cache_spec) -> AttentionCGSupport:
        if wants_fusing(vllm_config):
            return AttentionCGSupport.UNIFORM_SINGLE_TOKEN_DECODE
        return super().get_cudagraph_support(vllm_config, kv_cache_spec)


class SharedFlashBackend(FlashAttentionBackend):
    """vLLM's FlashAttention with `SharedFlashImpl`; it keeps the name, because vLLM knows its backends by name."""

    @staticmethod
    def get_builder_cls() -> type[SharedFlashMetadataBuilder]:
        return SharedFlashMetadataBuilder

    @staticmethod
    def get_impl_cls() -> type[SharedFlashImpl]:
        return SharedFlashImpl
