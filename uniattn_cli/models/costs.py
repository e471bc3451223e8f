"""What a layout costs: KV-cache bytes by formula and of a real cache; parameters by building a model without memory."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from uniattn_cli.modeling.configuration_uniattn import attention_shape, layer_windows
from uniattn_cli.modeling.layout_uniattn import AttentionShape, LayerPlan, Layout

if TYPE_CHECKING:
    from transformers import DynamicCache

    from uniattn_cli.recipe.schema import ModelSpec


def element_size_of(spec: ModelSpec, config: Any) -> int:
    """Bytes of a weight of a model that is loaded as a recipe says."""
    import torch

    name = spec.dtype if spec.dtype != "auto" else str(config.dtype or "float32").split(".")[-1]
    return getattr(torch, name).itemsize


def cached_heads(plan: LayerPlan, shape: AttentionShape) -> int:
    """Heads of size `head_dim` that a layer keeps per token, keys and values counted apart."""
    return len(plan.traits.caches) * plan.own_kv_heads(shape)


def kv_bytes_per_token(layout: Layout, shape: AttentionShape, element_size: int) -> int:
    """Bytes that one token adds to the KV cache of all layers.

    Sliding layers count like full ones: below their window they cost the same. `kv_bytes` knows the windows.

    Args:
        element_size: bytes per element of the cache's dtype.
    """
    return sum(cached_heads(plan, shape) for plan in layout) * shape.head_dim * element_size


def kv_bytes(config: Any, layout: Layout, tokens: int, element_size: int) -> int:
    """Bytes of the KV cache of one sequence while its next token is decoded; sliding layers keep their window only.

    Args:
        config: of the base or of a converted model.
        tokens: length of the sequence.
        element_size: bytes per element of the cache's dtype.
    """
    shape = attention_shape(config)
    heads = sum(
        cached_heads(plan, shape) * (tokens if window is None else min(tokens, window))
        for plan, window in zip(layout, layer_windows(config), strict=True)
    )
    return heads * shape.head_dim * element_size


def cache_bytes(cache: DynamicCache) -> int:
    """Bytes of memory that a cache keeps alive: whole storages, so that a view into something larger is not missed."""
    storages = {}
    for layer in cache.layers:
        for states in (getattr(layer, "keys", None), getattr(layer, "values", None)):
            if states is not None and states.numel():
                storage = states.untyped_storage()
                storages[storage.data_ptr()] = storage.nbytes()
    return sum(storages.values())


def count_parameters(config: Any, layout: Layout) -> int:
    """Parameters of a stock configuration converted to a layout; tied embeddings count once."""
    import torch

    from uniattn_cli.models.building import converted_classes, make_config

    with torch.device("meta"):
        model = converted_classes(config.model_type).causal_lm(make_config(config, layout))
    return sum(parameter.numel() for parameter in model.parameters())
