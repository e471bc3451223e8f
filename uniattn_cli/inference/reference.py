"""One decoding step of attention in plain PyTorch: the algorithm of the kernels, for CPUs and as their measure.

The keys are cut into blocks. For each block the leader keeps its largest score m_b and p_b = 2^(s - m_b), with scores
s in units of log2, and for the row the log2 of the normalising sum, lse. The map is p_b 2^(m_b - lse), so a follower
needs neither queries nor keys, and the values p_b are exact enough in 16 bits because the largest of a block is 1 (the
same rounding as in FlashAttention, arXiv 2205.14135, whose online Softmax this is).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

LOG2_E = 1.4426950408889634


@dataclass
class Kept:
    """What a leader keeps of its map, see the head of this file.

    Attributes:
        map: [batch, heads, capacity].
        block_max: [batch, heads, capacity / block].
        lse: [batch, heads].
    """

    map: torch.Tensor
    block_max: torch.Tensor
    lse: torch.Tensor


def accumulator(dtype: torch.dtype) -> torch.dtype:
    """Scores and sums are float32, or float64 for float64 models."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def visible(starts: torch.Tensor, ends: torch.Tensor, window: int | None, keys: int) -> torch.Tensor:
    """Places of a cache that the newest token sees, [batch, keys]: from `starts` to before `ends`, in the window."""
    first = starts if window is None else torch.maximum(starts, ends - window)
    places = torch.arange(keys, device=starts.device)
    return (places >= first[:, None]) & (places < ends[:, None])


def lead(
    queries: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    starts: torch.Tensor,
    ends: torch.Tensor,
    *,
    scale: float,
    block: int,
    softcap: float | None = None,
    window: int | None = None,
    kept: Kept | None = None,
) -> torch.Tensor:
    """Attention of one new token per row, which may keep its map for followers.

    Args:
        queries: [batch, heads, head_dim].
        keys, values: [batch, kv_heads, keys, head_dim]; keys a multiple of `block`.
        starts, ends: [batch], the first place in use and the one after the last.
        kept: filled up to `keys`; the rest of it stays as it is.

    Returns:
        [batch, heads, head_dim]; zero for a row that sees nothing.
    """
    batch, heads, _ = queries.shape
    kv_heads, length = keys.shape[1:3]
    kind = accumulator(queries.dtype)
    grouped = queries.view(batch, kv_heads, heads // kv_heads, -1).to(kind)
    scores = (grouped @ keys.to(kind).transpose(-1, -2)).view(batch, heads, length) * scale
    if softcap is not None:
        scores = torch.tanh(scores / softcap) * softcap
    seen = visible(starts, ends, window, length)[:, None]
    scores = (scores * LOG2_E).masked_fill(~seen, float("-inf")).view(batch, heads, -1, block)
    block_max = scores.amax(-1)
    reached = block_max.clamp(min=torch.finfo(kind).min)
    powers = torch.exp2(scores - reached[..., None])
    lse = torch.logsumexp((block_max + powers.sum(-1).log2()) / LOG2_E, dim=-1) * LOG2_E
    powers = powers.to(values.dtype)
    if kept is not None:
        kept.map[..., :length] = powers.flatten(-2)
        kept.block_max[..., : length // block] = block_max
        kept.lse.copy_(lse)
    return _weigh(powers, block_max, lse, values)


def follow(
    maps: torch.Tensor,
    block_max: torch.Tensor,
    lse: torch.Tensor,
    rows: torch.Tensor,
    values: torch.Tensor,
) -> torch.Tensor:
    """Attention with borrowed maps: reads no queries and no keys.

    Args:
        maps: [slots, batch, heads, capacity].
        block_max: [slots, batch, heads, capacity / block].
        lse: [slots, batch, heads].
        rows: [heads], slot * heads + head for each head of the follower.
        values: [batch, kv_heads, keys, head_dim], keys a multiple of the block.

    Returns:
        [batch, heads, head_dim].
    """
    block = maps.shape[-1] // block_max.shape[-1]
    length, heads = values.shape[2], maps.shape[2]
    slots, head = rows // heads, rows % heads

    def borrowed(kept: torch.Tensor) -> torch.Tensor:
        # Advanced indices that are apart come first: [heads, batch, ...].
        return kept[slots, :, head].transpose(0, 1)

    powers = borrowed(maps[..., :length]).reshape(values.shape[0], len(rows), -1, block)
    return _weigh(powers, borrowed(block_max[..., : length // block]), borrowed(lse), values)


def _weigh(powers: torch.Tensor, block_max: torch.Tensor, lse: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
    """Sum over keys of map times values; blocks that see nothing have a maximum of -inf and count as zero."""
    kind = accumulator(values.dtype)
    batch, heads = powers.shape[:2]
    factors = torch.exp2(block_max - lse.clamp(min=torch.finfo(kind).min)[..., None])
    weights = (powers.to(kind) * factors[..., None]).view(batch, values.shape[1], -1, values.shape[2])
    return (weights @ values.to(kind)).view(batch, heads, -1).to(values.dtype)
