"""Entry point `vllm.general_plugins`: lets vLLM drop borrowed keys and values from its cache.

vLLM calls `register` in each of its processes. Only this file's functions and the other `vllm_*` files import vLLM.
"""

from __future__ import annotations

import functools
import importlib
import multiprocessing
from typing import Any

from uniattn_cli.models.families import FAMILIES
from uniattn_cli.serving.cache_plan import KEYS_SUFFIX, best_capacity, clusters, pack

# Releases (major.minor) and devices that the `vllm_*` files were written for and tested with, and the attention there.
TESTED = {
    ("0.32", "cpu"): "uniattn_cli.serving.vllm_cpu.SharedCPUBackend",
    ("0.32", "cuda"): "uniattn_cli.serving.vllm_flash.SharedFlashBackend",
}
# Releases whose interfaces are known, and where each groups the layers of the cache. Where the pair is not in `TESTED`,
# the cache is vLLM's own; layers without attention, or that read another's whole cache, take no room in it either.
GROUPING = {"0.32": "vllm.v1.core.kv_cache_utils", "0.33": "vllm.v1.core.kv_cache_planning"}
WITH_EXPERTS = ("mixtral", "qwen3_moe")


def register() -> None:
    """Registers the model classes and the grouping of cache layers; with an unknown vLLM it only warns."""
    import vllm
    from vllm.logger import init_logger
    from vllm.platforms import current_platform

    if release() not in GROUPING or current_platform.device_name not in {device for _, device in TESTED}:
        if multiprocessing.parent_process() is None:
            init_logger("vllm.uniattn").warning(
                "uniattn's plugin supports vLLM %s, not %s on %s, and is disabled: converted checkpoints are served "
                "with keys cached for every layer",
                " and ".join(f"{release} on {device}" for release, device in TESTED),
                vllm.__version__,
                current_platform.device_name,
            )
        return
    from vllm import ModelRegistry

    for family in (family for family in FAMILIES.values() if family.in_vllm):
        name = "TransformersMoEForCausalLM" if family.model_type in WITH_EXPERTS else "TransformersForCausalLM"
        ModelRegistry.register_model(f"{family.prefix}ForCausalLM", f"uniattn_cli.serving.vllm_model:{name}")
    grouping: Any = importlib.import_module(GROUPING[release()])
    if not hasattr(grouping.get_kv_cache_groups, "__wrapped__"):
        grouping.get_kv_cache_groups = _keep_clusters_together(grouping.get_kv_cache_groups)


def tested_backend() -> str | None:
    """Name of the attention backend for this vLLM on this device; None where nobody has tried it."""
    from vllm.platforms import current_platform

    return TESTED.get((release(), current_platform.device_name))


def release() -> str:
    """Major and minor version of this vLLM."""
    import vllm

    return ".".join(vllm.__version__.split(".")[:2])


def _keep_clusters_together(stock: Any) -> Any:
    """Wraps vLLM's grouping of cache layers, which deals layers of models with windows out to several block tables."""

    @functools.wraps(stock)
    def get_kv_cache_groups(vllm_config: Any, kv_cache_spec: dict[str, Any]) -> list[Any]:
        groups = stock(vllm_config, kv_cache_spec)
        if not any(name.endswith(KEYS_SUFFIX) for name in kv_cache_spec):
            return groups
        names = _unit_names(vllm_config, kv_cache_spec)
        table = {name: index for index, group in enumerate(groups) for name in group.layer_names}
        if all(len({table[name] for name in cluster}) == 1 for cluster in names):
            return groups
        return _group(vllm_config, kv_cache_spec, names)

    return get_kv_cache_groups


def _unit_names(vllm_config: Any, kv_cache_spec: dict[str, Any]) -> list[list[str]]:
    """Names of the cached units of each cluster of layers."""
    from vllm.model_executor.models.utils import extract_layer_index

    from uniattn_cli.modeling.layout_uniattn import Layout

    layout = Layout.from_list(vllm_config.model_config.hf_text_config.uniattn["layers"])
    by_layer: dict[int, list[str]] = {}
    for name in kv_cache_spec:
        by_layer.setdefault(extract_layer_index(name), []).append(name)
    found = [[name for index in cluster for name in by_layer.get(index, ())] for cluster in clusters(layout)]
    return [cluster for cluster in found if cluster]


def _group(vllm_config: Any, kv_cache_spec: dict[str, Any], names: list[list[str]]) -> list[Any]:
    """Groups that hold whole clusters, with the block size that serves a request of full length in least memory."""
    from vllm.utils.math_utils import cdiv

    create_kv_cache_group_specs = importlib.import_module(GROUPING[release()]).create_kv_cache_group_specs
    sorts: dict[Any, list[list[str]]] = {}
    for cluster in names:
        sorts.setdefault(kv_cache_spec[cluster[0]], []).append(cluster)
    if len({spec.page_size_bytes for spec in sorts}) > 1:
        raise ValueError(
            "uniattn: sliding and pooled layers in one model cannot be cached together yet; start vLLM "
            "with VLLM_PLUGINS= (empty), or with --disable-hybrid-kv-cache-manager"
        )
    sizes = [[len(cluster) for cluster in sort] for sort in sorts.values()]
    pages = [cdiv(spec.max_memory_usage_bytes(vllm_config), spec.page_size_bytes) for spec in sorts]
    capacity = best_capacity(sizes, pages)
    grouped = []
    for sort, size in zip(sorts.values(), sizes, strict=True):
        for group in pack(size, capacity):
            grouped.append([name for index in group for name in sort[index]])
    return create_kv_cache_group_specs(kv_cache_spec, grouped)
