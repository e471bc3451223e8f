"""The model classes that vLLM takes for converted checkpoints where the plugin is installed.

vLLM's Transformers backend around the checkpoint's own code, with attention layers whose cache holds what the layout
says. Imported by vLLM's processes only.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import nn
from vllm.distributed import get_tensor_model_parallel_rank
from vllm.logger import init_logger
from vllm.model_executor.layers.attention import Attention
from vllm.model_executor.models import transformers as backend
from vllm.model_executor.models.utils import extract_layer_index
from vllm.platforms import current_platform

from uniattn_cli.modeling.configuration_uniattn import attention_shape
from uniattn_cli.modeling.layout_uniattn import AttentionShape, Layout
from uniattn_cli.serving.cache_plan import shard_layout
from uniattn_cli.serving.vllm_layers import SharedCacheAttention

if TYPE_CHECKING:
    # The mixin below stands before this class among the bases of a class.
    from vllm.model_executor.models.transformers import TransformersForCausalLM as _Model
else:
    _Model = object

logger = init_logger("vllm.uniattn")
# To be raised when the layers of `vllm_layers` are called in another way.
CODE_VERSION = 1


def obstacles(vllm_config) -> list[str]:
    """What, of the engine's settings, the shared cache has not been made for; empty where it can be used."""
    found = []
    if not current_platform.is_cpu():
        found.append(f"it is written for vLLM's CPU attention, not for {current_platform.device_type}")
    if vllm_config.cache_config.cache_dtype not in ("auto", "bfloat16", "float16"):
        found.append(f"the cache is stored as {vllm_config.cache_config.cache_dtype}")
    if vllm_config.kv_transfer_config is not None:
        found.append("a KV connector is used")
    if vllm_config.speculative_config is not None:
        found.append("speculative decoding is used")
    if vllm_config.parallel_config.pipeline_parallel_size > 1:
        found.append("pipeline parallelism is used")
    if not isinstance(vllm_config.additional_config, dict):
        found.append("additional_config is no mapping")
    if vllm_config.use_v2_model_runner:
        found.append("model runner V2 is used")
    return found


class SharedCacheMixin(_Model):
    """Gives each attention module of the model its layer of `vllm_layers`."""

    _shared_layout: Layout | None
    _shared_shape: AttentionShape | None

    def _create_attention_instances(self, prefix: str = "") -> None:
        self._shared_layout = self._shared_shape = None
        config = self.text_config
        layout = Layout.from_list(config.uniattn["layers"]) if getattr(config, "uniattn", None) else None
        if layout is not None and layout.changed:
            if found := obstacles(self.vllm_config):
                logger.warning("uniattn: borrowed keys and values are cached too, because %s", found[0])
            else:
                ranks, rank = self.parallel_config.tensor_parallel_size, get_tensor_model_parallel_rank()
                self._shared_layout, self._shared_shape = shard_layout(layout, attention_shape(config), rank, ranks)
                self._localise_heads()
                # Compiled code is kept by configuration, and that of the plain path writes other caches.
                self.vllm_config.additional_config |= {"uniattn_cache": CODE_VERSION}
        self._shared_peers: dict[int, SharedCacheAttention] = {}
        super()._create_attention_instances(prefix)

    def _localise_heads(self) -> None:
        """Gives the model code the head maps of this rank."""
        layout, shape = self._shared_layout, self._shared_shape
        assert layout is not None
        for module in self.model.modules():
            plan = getattr(module, "plan", None)
            if plan is None or not hasattr(module, "layer_idx"):
                continue
            module.borrow_from(layout[module.layer_idx], shape)

    def _get_attn_cls(self):
        stock = super()._get_attn_cls()
        return self._make_attention if stock is Attention and self._shared_layout is not None else stock

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
            **arguments,
        )


# vLLM tells by the name of the class whether its Transformers backend is used.
class TransformersForCausalLM(SharedCacheMixin, backend.TransformersForCausalLM):
    """Dense models."""


class TransformersMoEForCausalLM(SharedCacheMixin, backend.TransformersMoEForCausalLM):
    """Models with experts."""
