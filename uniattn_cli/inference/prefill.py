"""Attention of the prompt by PyTorch's own kernels, in pieces where a mask would not fit."""

from __future__ import annotations

import torch
from torch.nn import functional
from torch.nn.attention.bias import causal_lower_right

# Entries of a mask, or of a score matrix, that may exist at the same time.
MASK_ENTRIES = 1 << 28
SCORE_ENTRIES = 1 << 26
# Queries that are handled together where a window makes most keys useless.
WINDOW_PIECE = 1024


def attend(
    queries: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    *,
    starts: torch.Tensor | None,
    first: int,
    window: int | None,
    scale: float,
    softcap: float | None,
) -> torch.Tensor:
    """Causal attention of new tokens to themselves and everything before them.

    Args:
        queries: [batch, heads, tokens, head_dim].
        keys, values: [batch, kv_heads, first + tokens, head_dim].
        starts: [batch], first place that holds a token; None where that is 0 in every row.
        first: place of the first query.

    Returns:
        [batch, heads, tokens, head_dim]. Rows of padding hold something finite.
    """
    batch, heads, tokens, _ = queries.shape
    length = first + tokens
    if window is not None and window >= length:
        window = None
    if starts is None and window is None and softcap is None:
        return _plain(queries, keys, values, first, scale)
    limit = (SCORE_ENTRIES // (batch * heads * length)) if softcap is not None else MASK_ENTRIES // (batch * length)
    piece = max(1, min(tokens, limit))
    if window is not None:
        piece = min(piece, max(window, WINDOW_PIECE))
    found = []
    for begin in range(0, tokens, piece):
        part = queries[:, :, begin : begin + piece]
        place = first + begin
        stop = place + part.shape[2]
        low = 0 if window is None else max(0, place - window + 1)
        mask = _mask(starts, place, stop, low, window, queries.device)
        found.append(_masked(part, keys[:, :, low:stop], values[:, :, low:stop], mask, scale, softcap))
    return found[0] if len(found) == 1 else torch.cat(found, dim=2)


def _plain(queries: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, first: int, scale: float) -> torch.Tensor:
    grouped = keys.shape[1] != queries.shape[1]
    if first == 0:
        return functional.scaled_dot_product_attention(
            queries, keys, values, is_causal=queries.shape[2] > 1, scale=scale, enable_gqa=grouped
        )
    if queries.is_cuda:
        # Unlike a mask, this bias keeps FlashAttention.
        bias = causal_lower_right(queries.shape[2], keys.shape[2])
        keys, values = _expand(keys, queries.shape[1]), _expand(values, queries.shape[1])
        return functional.scaled_dot_product_attention(queries, keys, values, attn_mask=bias, scale=scale)
    mask = _mask(None, first, keys.shape[2], 0, None, queries.device)
    return _masked(queries, keys, values, mask, scale, None)


def _mask(
    starts: torch.Tensor | None, place: int, stop: int, low: int, window: int | None, device: torch.device
) -> torch.Tensor:
    """[batch or 1, 1, queries, keys]; a query always sees itself, so that rows of padding are not empty."""
    query = torch.arange(place, stop, device=device)[:, None]
    key = torch.arange(low, stop, device=device)[None]
    mask = key <= query
    if window is not None:
        mask &= key > query - window
    mask = mask[None, None]
    if starts is not None:
        mask = (mask & (key >= starts[:, None, None])[:, None]) | (key == query)
    return mask


def _masked(
    queries: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    mask: torch.Tensor,
    scale: float,
    softcap: float | None,
) -> torch.Tensor:
    keys, values = _expand(keys, queries.shape[1]), _expand(values, queries.shape[1])
    if softcap is None:
        return functional.scaled_dot_product_attention(queries, keys, values, attn_mask=mask, scale=scale)
    # No stock kernel knows soft-capping of the scores.
    scores = torch.tanh(queries @ keys.transpose(-1, -2) * (scale / softcap)) * softcap
    kind = torch.float64 if queries.dtype == torch.float64 else torch.float32
    weights = scores.to(kind).masked_fill(~mask, float("-inf")).softmax(-1).to(values.dtype)
    return weights @ values


def _expand(states: torch.Tensor, heads: int) -> torch.Tensor:
    """One key/value head per query head: the kernels that take masks know no groups."""
    return states if states.shape[1] == heads else states.repeat_interleave(heads // states.shape[1], dim=1)
