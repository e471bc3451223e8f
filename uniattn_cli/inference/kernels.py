"""Triton kernels of one decoding step of attention, split over the keys. `reference` says what they compute.

One program handles all query heads that share a key/value head, for one part of the keys of one row; a second, small
kernel merges the parts. Where heads begin comes from tables, so that borrowed keys, values and maps of several layers
cost no copies. Lengths are read on the device: a captured graph stays valid while the cache fills up.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def _span(starts, ends, row, split, splits, window, BLOCK: tl.constexpr, WINDOW: tl.constexpr):
    """First and last place that a row sees, and the blocks of one split."""
    end = tl.load(ends + row)
    low = tl.load(starts + row)
    if WINDOW:
        low = tl.maximum(low, end - window)
    first = low // BLOCK
    total = tl.maximum(tl.cdiv(end, BLOCK) - first, 0)
    share = tl.cdiv(total, splits)
    begin = first + tl.minimum(split * share, total)
    stop = first + tl.minimum(split * share + share, total)
    return low, end, begin, stop


@triton.jit
def lead_kernel(
    queries,
    flat,
    query_heads,
    key_heads,
    value_heads,
    starts,
    ends,
    out,
    part_out,
    part_max,
    part_sum,
    maps,
    block_max,
    lse,
    query_row,
    key_row,
    value_row,
    out_row,
    capacity,
    scale,
    softcap,
    window,
    splits,
    resident_rows,
    HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    GROUP_PAD: tl.constexpr,
    D: tl.constexpr,
    D_PAD: tl.constexpr,
    BLOCK: tl.constexpr,
    SPLIT: tl.constexpr,
    KEEP: tl.constexpr,
    SOFTCAP: tl.constexpr,
    WINDOW: tl.constexpr,
):
    """Attention over one split of the keys. `query_row` and so on: elements from one row of the batch to the next."""
    row = tl.program_id(0) // HEADS
    kv_head = tl.program_id(0) % HEADS
    split = tl.program_id(1)
    low, end, begin, stop = _span(starts, ends, row, split, splits, window, BLOCK, WINDOW)
    lane = tl.arange(0, GROUP_PAD)
    heads = kv_head * GROUP + lane
    d = tl.arange(0, D_PAD)
    here = lane < GROUP
    inside = d < D
    row64 = row.to(tl.int64)
    # Nobody knows the alignment of offsets that are read from memory; unless told, loads are taken apart.
    key_base = tl.multiple_of(tl.load(key_heads + kv_head) + row64 * key_row, 16)
    value_base = tl.multiple_of(tl.load(value_heads + kv_head) + row64 * value_row, 16)
    query_base = tl.multiple_of(tl.load(query_heads + heads, mask=here, other=0) + row64 * query_row, 8)
    q = tl.load(queries + query_base[:, None] + d[None, :], mask=here[:, None] & inside[None, :], other=0.0)
    top = tl.full((GROUP_PAD,), float("-inf"), tl.float32)
    total = tl.zeros((GROUP_PAD,), tl.float32)
    acc = tl.zeros((GROUP_PAD, D_PAD), tl.float32)
    kept = row64 * (HEADS * GROUP) + heads
    blocks = capacity // BLOCK
    for block in range(begin, stop):
        place = block * BLOCK + tl.arange(0, BLOCK)
        seen = (place >= low) & (place < end)
        offsets = place[:, None] * D + d[None, :]
        wanted = seen[:, None] & inside[None, :]
        k = tl.load(flat + key_base + offsets, mask=wanted, other=0.0)
        v = tl.load(flat + value_base + offsets, mask=wanted, other=0.0)
        s = tl.dot(q, tl.trans(k), input_precision="ieee") * scale
        if SOFTCAP:
            s = softcap * (2.0 * tl.sigmoid(2.0 * s / softcap) - 1.0)
        s = tl.where(seen[None, :], s * 1.4426950408889634, float("-inf"))
        # Every block of the loop has a place that is seen, so its maximum is finite.
        high = tl.max(s, 1)
        p = tl.exp2(s - high[:, None])
        new_top = tl.maximum(top, high)
        old = tl.exp2(top - new_top)
        new = tl.exp2(high - new_top)
        total = total * old + new * tl.sum(p, 1)
        p = p.to(v.dtype)
        acc = acc * old[:, None] + new[:, None] * tl.dot(p, v, input_precision="ieee")
        top = new_top
        if KEEP:
            map_place = maps + (kept * capacity)[:, None] + place[None, :]
            max_place = block_max + kept * blocks + block
            # Followers read it soon and the next leader writes over it: what stays in the cache never goes to memory.
            if row < resident_rows:
                tl.store(map_place, p, mask=here[:, None], eviction_policy="evict_last")
                tl.store(max_place, high, mask=here, eviction_policy="evict_last")
            else:
                tl.store(map_place, p, mask=here[:, None])
                tl.store(max_place, high, mask=here)
    if not SPLIT:
        acc = acc / tl.where(total > 0.0, total, 1.0)[:, None]
        place_out = row64 * out_row + heads[:, None] * D + d[None, :]
        tl.store(out + place_out, acc.to(out.dtype.element_ty), mask=here[:, None] & inside[None, :])
        if KEEP:
            tl.store(lse + kept, top + tl.log2(total), mask=here)
    else:
        part = kept * splits + split
        tl.store(part_out + (part * D)[:, None] + d[None, :], acc, mask=here[:, None] & inside[None, :])
        tl.store(part_max + part, top, mask=here)
        tl.store(part_sum + part, total, mask=here)


@triton.jit
def follow_kernel(
    flat,
    map_rows,
    value_heads,
    starts,
    ends,
    out,
    part_out,
    maps,
    block_max,
    lse,
    value_row,
    out_row,
    capacity,
    batch_heads,
    window,
    splits,
    HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    GROUP_PAD: tl.constexpr,
    D: tl.constexpr,
    D_PAD: tl.constexpr,
    BLOCK: tl.constexpr,
    SPLIT: tl.constexpr,
    WINDOW: tl.constexpr,
):
    """Borrowed maps times own values over one split of the keys. Normalised already, so parts are simply added."""
    row = tl.program_id(0) // HEADS
    kv_head = tl.program_id(0) % HEADS
    split = tl.program_id(1)
    low, end, begin, stop = _span(starts, ends, row, split, splits, window, BLOCK, WINDOW)
    lane = tl.arange(0, GROUP_PAD)
    heads = kv_head * GROUP + lane
    d = tl.arange(0, D_PAD)
    here = lane < GROUP
    inside = d < D
    row64 = row.to(tl.int64)
    value_base = tl.multiple_of(tl.load(value_heads + kv_head) + row64 * value_row, 16)
    # A source is slot * heads + head; a row of the maps is (slot * batch + row) * heads + head.
    source = tl.load(map_rows + heads, mask=here, other=0)
    borrowed = source // (HEADS * GROUP) * batch_heads + row64 * (HEADS * GROUP) + source % (HEADS * GROUP)
    map_base = tl.multiple_of(borrowed * capacity, 16)
    blocks = capacity // BLOCK
    norm = tl.load(lse + borrowed, mask=here, other=0.0)
    acc = tl.zeros((GROUP_PAD, D_PAD), tl.float32)
    for block in range(begin, stop):
        place = block * BLOCK + tl.arange(0, BLOCK)
        seen = (place >= low) & (place < end)
        v = tl.load(
            flat + value_base + place[:, None] * D + d[None, :],
            mask=seen[:, None] & inside[None, :],
            other=0.0,
        )
        p = tl.load(maps + map_base[:, None] + place[None, :], mask=here[:, None], other=0.0)
        high = tl.load(block_max + borrowed * blocks + block, mask=here, other=0.0)
        acc += tl.exp2(high - norm)[:, None] * tl.dot(p, v, input_precision="ieee")
    wanted = here[:, None] & inside[None, :]
    if not SPLIT:
        place_out = row64 * out_row + heads[:, None] * D + d[None, :]
        tl.store(out + place_out, acc.to(out.dtype.element_ty), mask=wanted)
    else:
        part = (row64 * (HEADS * GROUP) + heads) * splits + split
        tl.store(part_out + (part * D)[:, None] + d[None, :], acc, mask=wanted)


@triton.jit
def merge_kernel(
    out,
    part_out,
    part_max,
    part_sum,
    lse,
    out_row,
    splits,
    HEADS: tl.constexpr,
    D: tl.constexpr,
    D_PAD: tl.constexpr,
    SPLITS_PAD: tl.constexpr,
    NORMALISED: tl.constexpr,
    KEEP: tl.constexpr,
):
    """Puts the parts of one query head of one row together: a log-sum-exp merge, or a sum of normalised parts."""
    index = tl.program_id(0).to(tl.int64)
    part = tl.arange(0, SPLITS_PAD)
    d = tl.arange(0, D_PAD)
    here = part < splits
    inside = d < D
    values = tl.load(
        part_out + ((index * splits + part) * D)[:, None] + d[None, :], mask=here[:, None] & inside[None, :], other=0.0
    )
    if NORMALISED:
        result = tl.sum(values, 0)
    else:
        top = tl.load(part_max + index * splits + part, mask=here, other=float("-inf"))
        total = tl.load(part_sum + index * splits + part, mask=here, other=0.0)
        high = tl.max(top, 0)
        weight = tl.where(total > 0.0, tl.exp2(top - high), 0.0)
        norm = tl.sum(weight * total, 0)
        result = tl.sum(weight[:, None] * values, 0) / tl.where(norm > 0.0, norm, 1.0)
        if KEEP:
            tl.store(lse + index, high + tl.log2(norm))
    place = index // HEADS * out_row + index % HEADS * D + d
    tl.store(out + place, result.to(out.dtype.element_ty), mask=inside)
