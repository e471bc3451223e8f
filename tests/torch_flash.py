"""PyTorch in the place of vLLM's GPU kernels, so that the code around them runs in vLLM for CPUs.

Slow, and strict where the kernels are: strides, shapes, and a division of work that is for other numbers of heads.
"""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable

import torch

CALLS = 0
FP8 = torch.float8_e4m3fn
# Whether each layer has scales of its own. With powers of two, FP8 rounds alike whatever they are.
SCALED = False


def calls() -> int:
    """How often `attend` was called in this process."""
    return CALLS


def scale(on: bool) -> None:
    """Gives the layers of models that are loaded from now on scales of their own, or 1 to all."""
    global SCALED
    SCALED = on


def install() -> None:
    """Makes vLLM on this process's CPU take the GPU's attention; caches start full of NaN."""
    from vllm.v1.attention.backends import fa_utils, flash_attn

    from uniattn_cli.serving import vllm_layers, vllm_plugin

    fa_utils.flash_attn_varlen_func = attend
    fa_utils.reshape_and_cache_flash = write
    flash_attn.flash_attn_supports_kv_cache_dtype = lambda *args, **kwargs: True
    flash = importlib.import_module("uniattn_cli.serving.vllm_flash")
    vllm_plugin.TESTED[vllm_plugin.release(), "cpu"] = f"{flash.__name__}.{flash.SharedFlashBackend.__name__}"
    vllm_model = importlib.import_module("uniattn_cli.serving.vllm_model")
    vllm_model.fusing_obstacles = lambda vllm_config: []
    for layer in (vllm_layers.KeyCache, vllm_layers.SharedCacheAttention):
        layer.bind_kv_cache = functools.partialmethod(bind_full_of_nan, layer.bind_kv_cache)


def bind_full_of_nan(layer, bind: Callable, kv_cache: torch.Tensor) -> None:
    """In the place of a layer's `bind_kv_cache`."""
    bind(layer, kv_cache.fill_(torch.nan) if kv_cache.is_floating_point() else kv_cache.fill_(0x7F))
    if SCALED and hasattr(layer, "_k_scale"):
        index = int(layer.layer_name.split(".")[2])
        for shift, name in enumerate(("_q_scale", "_k_scale", "_v_scale")):
            getattr(layer, name).fill_(2.0 ** ((index + shift) % 4 - 2))


def attend(
    *,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    out: torch.Tensor,
    cu_seqlens_q: torch.Tensor,
    max_seqlen_q: int,
    seqused_k: torch.Tensor,
    max_seqlen_k: int,
    softmax_scale: float,
    causal: bool,
    window_size: list[int],
    block_table: torch.Tensor,
    softcap: float,
    scheduler_metadata: torch.Tensor | None,
    fa_version: int | None,
    num_splits: int,
    q_descale: torch.Tensor,
    k_descale: torch.Tensor,
    v_descale: torch.Tensor,
) -> None:
    """`flash_attn_varlen_func`: queries and output [tokens, heads, size], pages [blocks, block size, heads, size]."""
    global CALLS
    CALLS += 1
    assert causal
    assert k.shape == v.shape
    assert {tensor.stride(-1) for tensor in (q, k, v, out)} == {1}
    starts, groups = cu_seqlens_q.tolist(), q.shape[1] // k.shape[2]
    assert groups * k.shape[2] == q.shape[1]
    for scales in (q_descale, k_descale, v_descale):
        assert scales.shape == (len(seqused_k), k.shape[2])
    for row, length in enumerate(seqused_k.tolist()):
        start, stop = starts[row], starts[row + 1]
        assert stop - start <= max_seqlen_q
        assert length <= max_seqlen_k
        if start == stop:
            continue
        pages = block_table[row, : -(-length // k.shape[1])].long()
        keys, values = (
            real(cache[pages].flatten(0, 1)[:length], scales[row]).transpose(0, 1).repeat_interleave(groups, 0)
            for cache, scales in ((k, k_descale), (v, v_descale))
        )
        queries = real(q[start:stop], q_descale[row].repeat_interleave(groups)).transpose(0, 1)
        scores = queries @ keys.transpose(1, 2) * softmax_scale
        if softcap:
            scores = softcap * (scores / softcap).tanh()
        age = torch.arange(length - stop + start, length)[:, None] - torch.arange(length)[None]
        hidden = (age < 0) | (age > window_size[0] if window_size[0] >= 0 else False)
        out[start:stop] = (scores.masked_fill(hidden, -torch.inf).softmax(-1) @ values).transpose(0, 1)


def real(stored: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
    """Numbers [tokens, heads, size] in float32, those in FP8 with a scale for each head."""
    return stored.float() * scales[None, :, None] if stored.dtype == FP8 else stored


def write(
    key: torch.Tensor,
    value: torch.Tensor,
    key_cache: torch.Tensor,
    value_cache: torch.Tensor,
    slot_mapping: torch.Tensor,
    kv_cache_dtype: str,
    k_scale: torch.Tensor,
    v_scale: torch.Tensor,
) -> None:
    """`reshape_and_cache_flash`: tokens [tokens, heads, size] into pages [blocks, block size, heads, size]."""
    assert key_cache.stride() == value_cache.stride(), "the kernel has one set of strides"
    assert key_cache.shape == value_cache.shape
    for new, cache, scales in ((key, key_cache, k_scale), (value, value_cache, v_scale)):
        assert new.shape[1:] == cache.shape[2:]
        assert new.stride()[1:] == (new.shape[2], 1), (
            f"the kernel reads the heads of a token as one row, not {new.shape} {new.stride()}"
        )
        if kv_cache_dtype == "fp8":
            new, cache = (new / scales).to(FP8).view(torch.uint8), cache.view(torch.uint8)
        for token, slot in enumerate(slot_mapping.tolist()):
            if slot >= 0:
                cache[slot // cache.shape[1], slot % cache.shape[1]] = new[token]
