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
def _cap(s, scale, softcap, SOFTCAP: tl.constexpr):
    """Scores in units of log2 from products of queries and keys."""
    s = s * scale
    if SOFTCAP:
        s = softcap * (2.0 * tl.sigmoid(2.0 * s / softcap) - 1.0)
    return s * 1.4426950408889634


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
    follower_heads,
    lent,
    newest,
    query_row,
    key_row,
    value_row,
    out_row,
    part_rows,
    lent_rows,
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
    LENT: tl.constexpr,
    SOFTCAP: tl.constexpr,
    WINDOW: tl.constexpr,
):
    """Attention over one split of the keys, and with the same map over the older values of up to three followers.

    Args:
        follower_heads: [HEADS, LENT], where followers' values begin for the first row of the batch; -1 for none.
        lent: [LENT, rows, D], what followers add their newest value to.
        newest: score of the newest key, times log2(e).
        query_row, key_row, value_row, out_row: elements from one row of the batch to the next.
        part_rows, lent_rows: heads of all rows (times splits) in `part_out` and `lent`, one follower after the other.
    """
    # A kept map is relative to the maximum of a block, what is weighed for followers to that of all blocks so far.
    tl.static_assert(LENT == 0 or not KEEP)
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
    if LENT > 0:
        first = tl.load(follower_heads + kv_head * LENT)
        first_base = tl.multiple_of(tl.maximum(first, 0) + row64 * value_row, 16)
        first_acc = tl.zeros((GROUP_PAD, D_PAD), tl.float32)
    if LENT > 1:
        second = tl.load(follower_heads + kv_head * LENT + 1)
        second_base = tl.multiple_of(tl.maximum(second, 0) + row64 * value_row, 16)
        second_acc = tl.zeros((GROUP_PAD, D_PAD), tl.float32)
    if LENT > 2:
        third = tl.load(follower_heads + kv_head * LENT + 2)
        third_base = tl.multiple_of(tl.maximum(third, 0) + row64 * value_row, 16)
        third_acc = tl.zeros((GROUP_PAD, D_PAD), tl.float32)
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
        # A follower's newest value is not there yet.
        older = wanted & (place < end - 1)[:, None]
        if LENT > 0:
            first_v = tl.load(flat + first_base + offsets, mask=older & (first >= 0), other=0.0)
        if LENT > 1:
            second_v = tl.load(flat + second_base + offsets, mask=older & (second >= 0), other=0.0)
        if LENT > 2:
            third_v = tl.load(flat + third_base + offsets, mask=older & (third >= 0), other=0.0)
        s = _cap(tl.dot(q, tl.trans(k), input_precision="ieee"), scale, softcap, SOFTCAP)
        s = tl.where(seen[None, :], s, float("-inf"))
        # Every block of the loop has a place that is seen, so its maximum is finite.
        high = tl.max(s, 1)
        new_top = tl.maximum(top, high)
        old = tl.exp2(top - new_top)
        top = new_top
        if KEEP:
            # Below the maximum of its block, which is exact enough in 16 bits.
            p = tl.exp2(s - high[:, None])
            new = tl.exp2(high - new_top)
            total = total * old + new * tl.sum(p, 1)
            p = p.to(v.dtype)
            acc = acc * old[:, None] + new[:, None] * tl.dot(p, v, input_precision="ieee")
        else:
            p = tl.exp2(s - new_top[:, None])
            total = total * old + tl.sum(p, 1)
            p = p.to(v.dtype)
            acc = tl.dot(p, v, acc * old[:, None], input_precision="ieee")
        if LENT > 0:
            first_acc = tl.dot(p, first_v, first_acc * old[:, None], input_precision="ieee")
        if LENT > 1:
            second_acc = tl.dot(p, second_v, second_acc * old[:, None], input_precision="ieee")
        if LENT > 2:
            third_acc = tl.dot(p, third_v, third_acc * old[:, None], input_precision="ieee")
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
    filled = here[:, None] & inside[None, :]
    if not SPLIT:
        norm = 1.0 / tl.where(total > 0.0, total, 1.0)[:, None]
        place_out = row64 * out_row + heads[:, None] * D + d[None, :]
        tl.store(out + place_out, (acc * norm).to(out.dtype.element_ty), mask=filled)
        if KEEP or LENT > 0:
            tl.store(lse + kept, top + tl.log2(total), mask=here)
        target, rows = lent + (kept * D)[:, None] + d[None, :], lent_rows
    else:
        norm = 1.0
        part = kept * splits + split
        place_part = (part * D)[:, None] + d[None, :]
        tl.store(part_out + place_part, acc, mask=filled)
        tl.store(part_max + part, top, mask=here)
        tl.store(part_sum + part, total, mask=here)
        target, rows = part_out + part_rows * D + place_part, part_rows
    if LENT > 0:
        tl.store(target, first_acc * norm, mask=filled)
        if split == 0:
            k = tl.load(flat + key_base + (end - 1) * D + d, mask=inside, other=0.0)
            s = tl.sum(q.to(tl.float32) * k.to(tl.float32)[None, :], 1)
            tl.store(newest + kept, _cap(s, scale, softcap, SOFTCAP), mask=here)
    if LENT > 1:
        tl.store(target + rows * D, second_acc * norm, mask=filled)
    if LENT > 2:
        tl.store(target + rows * (2 * D), third_acc * norm, mask=filled)


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
def receive_kernel(
    flat,
    map_rows,
    loans,
    value_heads,
    starts,
    ends,
    out,
    lent,
    newest,
    lse,
    value_row,
    out_row,
    batch_heads,
    HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    D: tl.constexpr,
    D_PAD: tl.constexpr,
    MOST: tl.constexpr,
):
    """What a leader summed up for a follower, and the follower's newest value; one head of one row."""
    row = tl.program_id(0) // HEADS
    head = tl.program_id(0) % HEADS
    d = tl.arange(0, D_PAD)
    inside = d < D
    row64 = row.to(tl.int64)
    # A source is slot * heads + head; a row of what was lent is ((slot * most + place) * batch + row) * heads + head.
    source = tl.load(map_rows + head)
    slot = source // HEADS
    borrowed = row64 * HEADS + source % HEADS
    end = tl.load(ends + row)
    value = tl.load(value_heads + head // GROUP) + row64 * value_row + (end - 1) * D
    v = tl.load(flat + value + d, mask=inside, other=0.0).to(tl.float32)
    older = tl.load(
        lent + ((slot * MOST + tl.load(loans + head)) * batch_heads + borrowed) * D + d, mask=inside, other=0.0
    )
    weight = tl.exp2(tl.load(newest + slot * batch_heads + borrowed) - tl.load(lse + slot * batch_heads + borrowed))
    weight = tl.where(end > tl.load(starts + row), weight, 0.0)
    tl.store(out + row64 * out_row + head * D + d, (older + weight * v).to(out.dtype.element_ty), mask=inside)


@triton.jit
def merge_kernel(
    out,
    part_out,
    part_max,
    part_sum,
    lse,
    lent,
    out_row,
    part_rows,
    lent_rows,
    splits,
    HEADS: tl.constexpr,
    D: tl.constexpr,
    D_PAD: tl.constexpr,
    SPLITS_PAD: tl.constexpr,
    NORMALISED: tl.constexpr,
    KEEP: tl.constexpr,
):
    """Puts the parts of one query head of one row together: a log-sum-exp merge, or a sum of normalised parts.

    The second number of a program is 0 for the layer's own output, else that of a follower, see `lead_kernel`.
    """
    index = tl.program_id(0).to(tl.int64)
    which = tl.program_id(1).to(tl.int64)
    part = tl.arange(0, SPLITS_PAD)
    d = tl.arange(0, D_PAD)
    here = part < splits
    inside = d < D
    values = tl.load(
        part_out + ((which * part_rows + index * splits + part) * D)[:, None] + d[None, :],
        mask=here[:, None] & inside[None, :],
        other=0.0,
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
    if which == 0:
        place = index // HEADS * out_row + index % HEADS * D + d
        tl.store(out + place, result.to(out.dtype.element_ty), mask=inside)
    else:
        tl.store(lent + ((which - 1) * lent_rows + index) * D + d, result, mask=inside)
