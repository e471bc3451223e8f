"""Triton kernels of one decoding step of attention, split over the keys. `reference` says what they compute.

One program handles all query heads that share a key/value head, for one part of the keys of one row; a second, small
kernel merges the parts. Where heads begin comes from tables, so that borrowed keys, values and maps of several layers
cost no copies. Lengths are read on the device: a captured graph stays valid while the cache fills up. Keys and values
of a row lie together, or in pages that a table names (PAGE > 0, the places of a page): what each kernel is told of them
is the table, [rows, pages] int32, and how many elements lie from one of its rows, of the pages and of the places of a
page to the next.
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
def _pages(table, place, seen, PAGE: tl.constexpr):
    """The pages in which places of a row lie; of those that are not seen, page 0."""
    return tl.load(table + place // PAGE, mask=seen, other=0)


@triton.jit
def _starts(page, place, page_size, place_size, D: tl.constexpr, PAGE: tl.constexpr):
    """Elements from the beginning of a head to each place."""
    if PAGE:
        return page.to(tl.int64) * page_size + place % PAGE * place_size
    else:
        return place * D


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
    borrowers,
    starts,
    ends,
    out,
    part_out,
    part_max,
    part_sum,
    maps,
    block_max,
    lse,
    lent,
    newest,
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
    table,
    table_row,
    page_size,
    place_size,
    HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    UNITS: tl.constexpr,
    ROWS_PAD: tl.constexpr,
    D: tl.constexpr,
    D_PAD: tl.constexpr,
    BLOCK: tl.constexpr,
    SPLIT: tl.constexpr,
    KEEP: tl.constexpr,
    LENT: tl.constexpr,
    SOFTCAP: tl.constexpr,
    WINDOW: tl.constexpr,
    PAGE: tl.constexpr,
):
    """Attention over one split of the keys, of the layer that has them and of those that borrow them from it.

    A unit is the query heads of one layer that share a key/value head here: the lender's own are the first, then those
    of borrowers with values of their own, then those of borrowers of the lender's values.

    Args:
        query_heads: [HEADS, UNITS * GROUP], where queries begin for the first row of the batch.
        value_heads: [HEADS, 1 + LENT], where values begin, likewise; -1 for none.
        borrowers: [HEADS, UNITS], head of `lent` of the first query head of a unit; -1 for none.
        lent: [heads, D], outputs of borrowers, of those with values of their own without the newest.
        newest: [heads], the share of the newest key in the map; if split, its score times log2(e).
        query_row, key_row, value_row, out_row: elements from one row of the batch to the next.
    """
    # A kept map is relative to the maximum of a block, what is weighed for borrowers to that of all blocks so far.
    tl.static_assert(UNITS == 1 or not KEEP)
    row = tl.program_id(0) // HEADS
    kv_head = tl.program_id(0) % HEADS
    split = tl.program_id(1)
    low, end, begin, stop = _span(starts, ends, row, split, splits, window, BLOCK, WINDOW)
    lane = tl.arange(0, ROWS_PAD)
    unit = lane // GROUP
    d = tl.arange(0, D_PAD)
    own = lane < GROUP
    here = own
    inside = d < D
    row64 = row.to(tl.int64)
    if UNITS > 1:
        borrower = tl.load(borrowers + kv_head * UNITS + unit, mask=(unit > 0) & (unit < UNITS), other=-1)
        here = own | (borrower >= 0)
        # Where the results of a borrower's head are found.
        loan = borrower + row64 * (HEADS * GROUP) + lane % GROUP
    # Nobody knows the alignment of offsets that are read from memory; unless told, loads are taken apart.
    key_base = tl.multiple_of(tl.load(key_heads + kv_head) + row64 * key_row, 16)
    value_base = tl.multiple_of(tl.load(value_heads + kv_head * (1 + LENT)) + row64 * value_row, 16)
    query_at = tl.load(query_heads + kv_head * (UNITS * GROUP) + lane, mask=here, other=0)
    query_base = tl.multiple_of(query_at + row64 * query_row, 8)
    q = tl.load(queries + query_base[:, None] + d[None, :], mask=here[:, None] & inside[None, :], other=0.0)
    if LENT > 0:
        first = tl.load(value_heads + kv_head * (1 + LENT) + 1)
        first_base = tl.multiple_of(tl.maximum(first, 0) + row64 * value_row, 16)
        first_acc = tl.zeros((ROWS_PAD, D_PAD), tl.float32)
    if LENT > 1:
        second = tl.load(value_heads + kv_head * (1 + LENT) + 2)
        second_base = tl.multiple_of(tl.maximum(second, 0) + row64 * value_row, 16)
        second_acc = tl.zeros((ROWS_PAD, D_PAD), tl.float32)
    if LENT > 2:
        third = tl.load(value_heads + kv_head * (1 + LENT) + 3)
        third_base = tl.multiple_of(tl.maximum(third, 0) + row64 * value_row, 16)
        third_acc = tl.zeros((ROWS_PAD, D_PAD), tl.float32)
    top = tl.full((ROWS_PAD,), float("-inf"), tl.float32)
    total = tl.zeros((ROWS_PAD,), tl.float32)
    acc = tl.zeros((ROWS_PAD, D_PAD), tl.float32)
    kept = row64 * (HEADS * GROUP) + kv_head * GROUP + lane
    blocks = capacity // BLOCK
    pages = table + row64 * table_row
    ahead = begin * BLOCK + tl.arange(0, BLOCK)
    # Loaded one block ahead, so that keys and values need not wait for it.
    page = _pages(pages, ahead, ahead < end, PAGE) if PAGE else ahead
    for block in range(begin, stop):
        place = block * BLOCK + tl.arange(0, BLOCK)
        seen = (place >= low) & (place < end)
        offsets = _starts(page, place, page_size, place_size, D, PAGE)[:, None] + d[None, :]
        if PAGE:
            page = _pages(pages, place + BLOCK, place + BLOCK < end, PAGE)
        wanted = seen[:, None] & inside[None, :]
        k = tl.load(flat + key_base + offsets, mask=wanted, other=0.0)
        v = tl.load(flat + value_base + offsets, mask=wanted, other=0.0)
        # A borrower's newest value is not there yet.
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
        # Rows of all units go through each product, of which their own count: the tile has as many rows anyway, and
        # masking would take the map through shared memory once for each.
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
    if LENT > 0:
        acc = tl.where((unit == 1)[:, None], first_acc, acc)
    if LENT > 1:
        acc = tl.where((unit == 2)[:, None], second_acc, acc)
    if LENT > 2:
        acc = tl.where((unit == 3)[:, None], third_acc, acc)
    filled = here[:, None] & inside[None, :]
    if LENT > 0:
        # A row without tokens fills up a captured batch.
        filled_row = end > 0
        last = _pages(pages, end - 1, filled_row, PAGE) if PAGE else end
        newest_at = _starts(last, end - 1, page_size, place_size, D, PAGE) + d
        newest_k = tl.load(flat + key_base + newest_at, mask=inside & filled_row, other=0.0)
        s = tl.sum(q.to(tl.float32) * newest_k.to(tl.float32)[None, :], 1)
        share = _cap(s, scale, softcap, SOFTCAP)
        owning = here & (unit > 0) & (unit <= LENT)
    if not SPLIT:
        acc = acc / tl.where(total > 0.0, total, 1.0)[:, None]
        place_out = row64 * out_row + (kv_head * GROUP + lane)[:, None] * D + d[None, :]
        tl.store(out + place_out, acc.to(out.dtype.element_ty), mask=own[:, None] & inside[None, :])
        if KEEP:
            tl.store(lse + kept, top + tl.log2(total), mask=here)
        if UNITS > 1:
            tl.store(lent + (loan * D)[:, None] + d[None, :], acc, mask=filled & (unit > 0)[:, None])
        if LENT > 0:
            share = tl.where(total > 0.0, tl.exp2(share - top) / total, 0.0)
            tl.store(newest + loan, share, mask=owning)
    else:
        part = ((row64 * HEADS + kv_head) * (UNITS * GROUP) + lane) * splits + split
        tl.store(part_out + (part * D)[:, None] + d[None, :], acc, mask=filled)
        tl.store(part_max + part, top, mask=here)
        tl.store(part_sum + part, total, mask=here)
        if LENT > 0:
            if split == 0:
                tl.store(newest + loan, share, mask=owning)


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
    value_heads,
    ends,
    out,
    lent,
    newest,
    value_row,
    out_row,
    table,
    table_row,
    page_size,
    place_size,
    HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    D: tl.constexpr,
    D_PAD: tl.constexpr,
    NEWEST: tl.constexpr,
    PAGE: tl.constexpr,
):
    """What lenders summed up for a borrower, and its newest value where it has values; one head of one row."""
    row = tl.program_id(0) // HEADS
    head = tl.program_id(0) % HEADS
    d = tl.arange(0, D_PAD)
    inside = d < D
    row64 = row.to(tl.int64)
    loan = row64 * HEADS + head
    total = tl.load(lent + loan * D + d, mask=inside, other=0.0)
    if NEWEST:
        last = tl.load(ends + row) - 1
        page = _pages(table + row64 * table_row, last, last >= 0, PAGE) if PAGE else last
        value = tl.load(value_heads + head // GROUP) + row64 * value_row
        value += _starts(page, last, page_size, place_size, D, PAGE)
        v = tl.load(flat + value + d, mask=inside & (last >= 0), other=0.0).to(tl.float32)
        total += tl.load(newest + loan) * v
    tl.store(out + row64 * out_row + head * D + d, total.to(out.dtype.element_ty), mask=inside)


@triton.jit
def merge_kernel(
    out,
    part_out,
    part_max,
    part_sum,
    lse,
    borrowers,
    lent,
    newest,
    out_row,
    splits,
    HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    UNITS: tl.constexpr,
    D: tl.constexpr,
    D_PAD: tl.constexpr,
    SPLITS_PAD: tl.constexpr,
    NORMALISED: tl.constexpr,
    KEEP: tl.constexpr,
    LENT: tl.constexpr,
):
    """Puts the parts of one query head of one row together: a log-sum-exp merge, or a sum of normalised parts.

    Heads are those of `lead_kernel`: HEADS key/value heads, each with UNITS times GROUP query heads.
    """
    index = tl.program_id(0).to(tl.int64)
    row = index // (HEADS * UNITS * GROUP)
    kv_head = index // (UNITS * GROUP) % HEADS
    unit = index // GROUP % UNITS
    member = index % GROUP
    part = tl.arange(0, SPLITS_PAD)
    d = tl.arange(0, D_PAD)
    here = part < splits
    inside = d < D
    loan = row * (HEADS * GROUP) + member
    if UNITS > 1:
        borrower = tl.load(borrowers + kv_head * UNITS + unit, mask=unit > 0, other=0)
        loan += borrower
        here &= borrower >= 0
    values = tl.load(
        part_out + ((index * splits + part) * D)[:, None] + d[None, :],
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
            tl.store(lse + row * (HEADS * GROUP) + kv_head * GROUP + member, high + tl.log2(norm))
        if LENT > 0:
            owning = (unit > 0) & (unit <= LENT) & (norm > 0.0)
            score = tl.load(newest + loan, mask=owning, other=float("-inf"))
            share = tl.where(norm > 0.0, tl.exp2(score - high) / norm, 0.0)
            tl.store(newest + loan, share, mask=(unit > 0) & (unit <= LENT) & (borrower >= 0))
    place = row * out_row + (kv_head * GROUP + member) * D + d
    tl.store(out + place, result.to(out.dtype.element_ty), mask=inside & (unit == 0))
    if UNITS > 1:
        tl.store(lent + loan * D + d, result, mask=inside & (unit > 0) & (borrower >= 0))
