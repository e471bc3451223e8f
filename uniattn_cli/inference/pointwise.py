"""Triton kernels for what stands between the matrix products of a decoder layer: norms, rotary embedding, gates."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

GATE_BLOCK = 1024


@triton.jit
def residual_norm_kernel(
    residual,
    update,
    post_weight,
    pre_weight,
    summed,
    normed,
    normed_row,
    width,
    post_eps,
    pre_eps,
    BLOCK: tl.constexpr,
    UPDATE: tl.constexpr,
    POST: tl.constexpr,
    PRE: tl.constexpr,
    OFFSET: tl.constexpr,
):
    """residual + norm(update), and the norm of that; one program per token. OFFSET is what is added to weights."""
    row = tl.program_id(0).to(tl.int64)
    i = tl.arange(0, BLOCK)
    inside = i < width
    x = tl.load(residual + row * width + i, mask=inside, other=0.0)
    if UPDATE:
        y = tl.load(update + row * width + i, mask=inside, other=0.0)
        if POST:
            z = y.to(tl.float32)
            z = z * tl.rsqrt(tl.sum(z * z, 0) / width + post_eps)
            z = z * (tl.load(post_weight + i, mask=inside, other=0.0).to(tl.float32) + OFFSET)
            y = z.to(x.dtype)
        # Rounded as two steps would round.
        x = (x.to(tl.float32) + y.to(tl.float32)).to(x.dtype)
        tl.store(summed + row * width + i, x, mask=inside)
    if PRE:
        z = x.to(tl.float32)
        z = z * tl.rsqrt(tl.sum(z * z, 0) / width + pre_eps)
        z = z * (tl.load(pre_weight + i, mask=inside, other=0.0).to(tl.float32) + OFFSET)
        tl.store(normed + row * normed_row + i, z.to(x.dtype), mask=inside)


@triton.jit
def place_kernel(
    projected,
    cos,
    sin,
    positions,
    places,
    query_weight,
    key_weight,
    queries,
    keys,
    values,
    extra,
    projected_row,
    query_row,
    key_row,
    extra_row,
    tokens,
    capacity,
    eps,
    NQ: tl.constexpr,
    NK: tl.constexpr,
    NV: tl.constexpr,
    RANK: tl.constexpr,
    D: tl.constexpr,
    D_PAD: tl.constexpr,
    ROTARY: tl.constexpr,
    QUERY_NORM: tl.constexpr,
    KEY_NORM: tl.constexpr,
    LAYER_HEADS: tl.constexpr,
    NORMED: tl.constexpr,
    NORM: tl.constexpr,
    OFFSET: tl.constexpr,
):
    """Takes one head of one token from the projection to where it belongs: queries, caches, or the low-rank part.

    Queries and keys are rotated on the way, and normed where all of them are (NORM); of queries the first NORMED, those
    of each layer with its own weights. `places` says where in the cache, `tokens` is the number per row.
    """
    token = tl.program_id(0).to(tl.int64)
    head = tl.program_id(1)
    d = tl.arange(0, D_PAD)
    source = projected + token * projected_row + head * D
    row = token // tokens
    place = tl.load(places + token).to(tl.int64)
    if head < NQ + NK:
        inside = d < D
        x = tl.load(source + d, mask=inside, other=0.0)
        kind = x.dtype
        # Dimension d turns together with its partner, half the rotary width away; the lower half has the minus sign.
        partner = tl.where(d < ROTARY // 2, d + ROTARY // 2, d - ROTARY // 2)
        turns = d < ROTARY
        y = tl.load(source + partner, mask=turns, other=0.0)
        x = x.to(tl.float32)
        y = y.to(tl.float32)
        if NORM:
            factor = tl.rsqrt(tl.sum(x * x, 0) / D + eps)
            wx = tl.zeros((D_PAD,), tl.float32)
            wy = tl.zeros((D_PAD,), tl.float32)
            if QUERY_NORM:
                mine = inside & (head < NORMED)
                weight = query_weight + head // LAYER_HEADS * D
                wx += tl.load(weight + d, mask=mine, other=0.0).to(tl.float32)
                wy += tl.load(weight + partner, mask=mine & turns, other=0.0).to(tl.float32)
            if KEY_NORM:
                mine = inside & (head >= NQ)
                wx += tl.load(key_weight + d, mask=mine, other=0.0).to(tl.float32)
                wy += tl.load(key_weight + partner, mask=mine & turns, other=0.0).to(tl.float32)
            plain = (head >= NORMED) & (head < NQ)
            x = tl.where(plain, x, (x * factor * (wx + OFFSET)).to(kind).to(tl.float32))
            y = tl.where(plain, y, (y * factor * (wy + OFFSET)).to(kind).to(tl.float32))
        if ROTARY > 0:
            position = tl.load(positions + token).to(tl.int64)
            c = tl.load(cos + position * ROTARY + d, mask=turns, other=1.0).to(tl.float32)
            s = tl.load(sin + position * ROTARY + d, mask=turns, other=0.0).to(tl.float32)
            x = x * c + tl.where(d < ROTARY // 2, -y, y) * s
        if head < NQ:
            tl.store(queries + token * query_row + head * D + d, x.to(kind), mask=inside)
        else:
            key = keys + row * key_row + (head - NQ) * capacity * D + place * D
            tl.store(key + d, x.to(kind), mask=inside)
    else:
        if head < NQ + NK + NV:
            moved = tl.load(source + d, mask=d < D, other=0.0)
            value = values + row * key_row + (head - NQ - NK) * capacity * D + place * D
            tl.store(value + d, moved, mask=d < D)
        else:
            column = (head - NQ - NK - NV) * D + d
            wanted = (d < D) & (column < RANK)
            low = tl.load(projected + token * projected_row + (NQ + NK + NV) * D + column, mask=wanted, other=0.0)
            tl.store(extra + token * extra_row + column, low, mask=wanted)


@triton.jit
def gated(gate, up, GELU: tl.constexpr):
    """activation(gate) * up, rounded as two steps would round."""
    x = gate.to(tl.float32)
    if GELU:
        # tanh(z) = 2 sigmoid(2 z) - 1, so that 0.5 (1 + tanh(z)) = sigmoid(2 z).
        x = x * tl.sigmoid(1.5957691216057308 * (x + 0.044715 * x * x * x))
    else:
        x = x * tl.sigmoid(x)
    return (x.to(gate.dtype).to(tl.float32) * up.to(tl.float32)).to(gate.dtype)


@triton.jit
def gate_kernel(gate_up, out, width, BLOCK: tl.constexpr, GELU: tl.constexpr):
    """activation(gate) * up for one piece of one token."""
    row = tl.program_id(0).to(tl.int64)
    i = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = i < width
    gate = tl.load(gate_up + row * 2 * width + i, mask=inside, other=0.0)
    up = tl.load(gate_up + row * 2 * width + width + i, mask=inside, other=0.0)
    tl.store(out + row * width + i, gated(gate, up, GELU), mask=inside)


def gate(activation: str, gate_up: torch.Tensor) -> torch.Tensor:
    """activation(gate) * up: [tokens, 2 * intermediate] to [tokens, intermediate].

    Args:
        activation: `silu` or `gelu_tanh`.
    """
    tokens, width = gate_up.shape[0], gate_up.shape[1] // 2
    out = gate_up.new_empty(tokens, width)
    gate_kernel[(tokens, triton.cdiv(width, GATE_BLOCK))](
        gate_up, out, width, BLOCK=GATE_BLOCK, GELU=activation == "gelu_tanh", num_warps=4
    )
    return out
