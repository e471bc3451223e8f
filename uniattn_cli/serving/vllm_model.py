"""The model classes that vLLM takes for converted checkpoints where the plugin is installed.

vLLM's Transformers backend around the checkpoint's own code, with attention layers whose cache holds what the layout
says. Imported by vLLM's processes only.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from vllm import envs
from vllm.distributed import get_tensor_model_parallel_rank
from vllm.logger import init_logger
from vllm.model_executor.layers.attention import Attention
from vllm.model_executor.models import transformers as backend
from vllm.model_executor.models.utils import extract_layer_index
from vllm.platforms import current_platform
from vllm.triton_utils import HAS_TRITON
from vllm.utils.import_utils import resolve_obj_by_qualname
from vllm.utils.torch_utils import kv_cache_dtype_str_to_dtype
from vllm.v1.attention.backend import AttentionBackend
from vllm.v1.attention.backends.fa_utils import get_flash_attn_version
from vllm.v1.attention.selector import get_attn_backend

from uniattn_cli.modeling.configuration_uniattn import attention_shape
from uniattn_cli.modeling.layout_uniattn import AttentionShape, Layout
from uniattn_cli.serving.cache_plan import shard_layout
from uniattn_cli.serving.fused_decoding import FusedDecoding, ask_with_lender, wants_fusing
from uniattn_cli.serving.head_order import Orders, in_order_of_sources, joined, reorder_weights
from uniattn_cli.serving.vllm_layers import SharedCacheAttention
from uniattn_cli.serving.vllm_plugin import release, tested_backend

if TYPE_CHECKING:
    # The mixin below stands before this class among the bases of a class.
    from vllm.model_executor.models.transformers import TransformersForCausalLM as _Model
else:
    _Model = object

logger = init_logger("vllm.uniattn")
# To be raised when the layers of `vllm_layers` are called in another way.
CODE_VERSION = 3


def obstacles(vllm_config) -> list[str]:
    """What, of the engine's settings, the shared cache has not been made for; empty where it can be used."""
    if tested_backend() is None:
        return [f"it has not been tried with vLLM {release()} on {current_platform.device_name}"]
    parallel, cache = vllm_config.parallel_config, vllm_config.cache_config
    checks = {
        "some layers are left out of the cache's dtype": bool(cache.kv_cache_dtype_skip_layers),
        "a KV connector is used": vllm_config.kv_transfer_config is not None,
        "fast prefill of layers that share keys and values is used": cache.kv_sharing_fast_prefill,
        "speculative decoding is used": vllm_config.speculative_config is not None,
        "pipeline parallelism is used": parallel.pipeline_parallel_size > 1,
        "context parallelism is used": max(
            parallel.prefill_context_parallel_size, parallel.decode_context_parallel_size
        )
        > 1,
        "batches are computed in two overlapping parts": parallel.use_ubatching,
        "additional_config is no mapping": not isinstance(vllm_config.additional_config, dict),
    }
    found = [what for what, is_so in checks.items() if is_so]
    stored = ["auto", "bfloat16", "float16"]
    if current_platform.is_cpu():
        found += ["model runner V2 is used"] if vllm_config.use_v2_model_runner else []
    else:
        found += _cuda_obstacles(vllm_config)
        stored += ["fp8", "fp8_e4m3"]
    if cache.cache_dtype not in stored:
        found.append(f"the cache is stored as {cache.cache_dtype}")
    return found


def _cuda_obstacles(vllm_config) -> list[str]:
    model, size = vllm_config.model_config, vllm_config.model_config.get_head_size()
    chosen = {
        get_attn_backend(size, model.dtype, vllm_config.cache_config.cache_dtype, has_sliding_window=window).get_name()
        for window in (False, True)
    }
    found = [f"the attention backend is {name}, not FLASH_ATTN" for name in sorted(chosen - {"FLASH_ATTN"})]
    version = get_flash_attn_version(
        head_size=size, requires_softcap=getattr(model.hf_text_config, "attn_logit_softcapping", None) is not None
    )
    if not found and version != 3:
        found.append(f"it has been tested with FlashAttention 3, not {version}")
    if vllm_config.cache_config.cache_dtype.startswith("fp8") and vllm_config.quant_config is not None:
        found.append("the checkpoint is quantised, and may bring scales for a cache in FP8")
    if envs.VLLM_BATCH_INVARIANT:
        found.append("VLLM_BATCH_INVARIANT is set")
    return found


def fusing_obstacles(vllm_config) -> list[str]:
    """Why a decoding step cannot read borrowed keys once, where the cache is shared; empty where it can."""
    model, cache = vllm_config.model_config, vllm_config.cache_config
    checks = {
        "vLLM runs without a GPU": current_platform.is_cpu(),
        "Triton is missing": not HAS_TRITON,
        "the cache is not stored in the model's dtype": cache.cache_dtype != "auto"
        and kv_cache_dtype_str_to_dtype(cache.cache_dtype, model) != model.dtype,
    }
    return [what for what, is_so in checks.items() if is_so]


class SharedCacheMixin(_Model):
    """Gives each attention module of the model its layer of `vllm_layers`."""

    _layout: Layout | None  # of a converted checkpoint, as it says
    _shared_layout: Layout | None  # of this rank, where the cache is shared
    _shared_shape: AttentionShape | None
    _shared_backend: type[AttentionBackend]
    _shared_orders: Orders

    def _create_attention_instances(self, prefix: str = "") -> None:
        self._shared_layout = self._shared_shape = None
        self._shared_orders = {}
        config = self.text_config
        self._layout = Layout.from_list(config.uniattn["layers"]) if getattr(config, "uniattn", None) else None
        if self._layout is not None and self._layout.changed:
            if found := obstacles(self.vllm_config):
                logger.warning("uniattn: borrowed keys are cached too, because %s", found[0])
            else:
                self._share(self._layout, attention_shape(config))
            if isinstance(self.vllm_config.additional_config, dict):
                # Compiled code is kept by configuration, and writes other caches in each of these cases.
                # The setting is part of that configuration.
                self.vllm_config.additional_config |= {"uniattn_cache": [CODE_VERSION, self._shared_layout is not None]}
            else:
                self._layout = None
        self._shared_peers: dict[int, SharedCacheAttention] = {}
        super()._create_attention_instances(prefix)
        if self._shared_layout is not None and wants_fusing(self.vllm_config):
            if found := fusing_obstacles(self.vllm_config):
                logger.warning("uniattn: each layer reads the keys that it borrows again, because %s", found[0])
            else:
                self._fuse()

    def _fuse(self) -> None:
        """Makes the passes of lenders that serve their borrowers while decoding."""
        layout, shape = self._shared_layout, self._shared_shape
        assert layout is not None and shape is not None
        fused = FusedDecoding(
            layout,
            shape,
            self._shared_peers,
            self.vllm_config.scheduler_config.max_num_seqs,
            self.model_config.max_model_len,
            self.model_config.dtype,
            self.device_config.device,
        )
        for index in fused.taking_part:
            self._shared_peers[index].fused = fused
        modules = {module.layer_idx: module for module in self._borrowing_modules()}
        for lender, borrowers in fused.asked.items():
            ask_with_lender(modules[lender], [modules[index] for index in borrowers])

    def _share(self, layout: Layout, shape: AttentionShape) -> None:
        """Plans the cache of this rank, with heads in the order in which few calls read them."""
        self._shared_backend = resolve_obj_by_qualname(tested_backend())
        ranks = self.parallel_config.tensor_parallel_size
        shards = [shard_layout(layout, shape, rank, ranks) for rank in range(ranks)]
        self._shared_layout, self._shared_shape = shards[get_tensor_model_parallel_rank()]
        # Quantised weights come in other pieces than rows, and adapters in the order of the checkpoint.
        if self.quant_config is None and self.vllm_config.lora_config is None:
            strided = self._shared_backend.get_impl_cls().strided_heads
            ordered = [in_order_of_sources(*shard, strided) for shard in shards]
            self._shared_layout = ordered[get_tensor_model_parallel_rank()][0]
            self._shared_orders = joined([orders for _, orders in ordered], self._shared_shape.kv_heads)
        self._localise_heads()

    def load_weights(self, weights: Iterable[tuple[str, torch.Tensor]]) -> set[str]:
        """As vLLM's, with the heads of `_shared_orders` moved."""
        if self._shared_orders:
            assert self._layout is not None
            weights = reorder_weights(weights, self._layout, attention_shape(self.text_config), self._shared_orders)
        return super().load_weights(weights)

    def _localise_heads(self) -> None:
        """Gives the model code the head maps of this rank."""
        layout, shape = self._shared_layout, self._shared_shape
        assert layout is not None
        for module in self._borrowing_modules():
            module.borrow_from(layout[module.layer_idx], shape)

    def _borrowing_modules(self) -> list[Any]:
        """The attention modules of the checkpoint's own code."""
        return [module for module in self.model.modules() if hasattr(module, "plan") and hasattr(module, "layer_idx")]

    def _get_attn_cls(self):
        stock = super()._get_attn_cls()
        if stock is not Attention or self._layout is None:
            return stock
        return self._make_stock_attention if self._shared_layout is None else self._make_attention

    def _make_stock_attention(self, prefix: str, **arguments) -> nn.Module:
        """vLLM's own layer; it too can do without the cache of a layer that does not attend or reads another's."""
        index, layout = extract_layer_index(prefix), self._layout
        assert layout is not None
        plan = layout[index]
        if not plan.traits.attends:
            return nn.Identity()  # never called, and caches nothing
        together = self.parallel_config.pipeline_parallel_size == 1
        # A quantised checkpoint may bring scales for each layer's cache.
        if plan.traits.borrows_values and plan.leader is not None and together and self.quant_config is None:
            arguments["kv_sharing_target_layer_name"] = prefix.replace(f".{index}.", f".{plan.leader}.")
        return Attention(prefix=prefix, **arguments)

    def _make_attention(self, prefix: str, **arguments) -> nn.Module:
        index, layout, shape = extract_layer_index(prefix), self._shared_layout, self._shared_shape
        assert layout is not None and shape is not None
        if not layout[index].traits.attends:
            return nn.Identity()  # never called, and caches nothing
        return SharedCacheAttention(
            layout=layout,
            shape=shape,
            index=index,
            peers=self._shared_peers,
            vllm_config=self.vllm_config,
            prefix=prefix,
            backend=self._shared_backend,
            **arguments,
        )


# vLLM tells by the name of the class whether its Transformers backend is used.
class TransformersForCausalLM(SharedCacheMixin, backend.TransformersForCausalLM):
    """Dense models."""


class TransformersMoEForCausalLM(SharedCacheMixin, backend.TransformersMoEForCausalLM):
    """Models with experts."""
