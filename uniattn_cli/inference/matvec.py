"""Matrix times one vector, for a decoding step of one row, where libraries leave bandwidth unused on small matrices.

Whether the kernel or the library is faster is measured once per shape, on the device, with a cold cache.
"""

from __future__ import annotations

import statistics

import torch
import triton
import triton.language as tl
from torch.nn import functional

# Products of one program are a handful of rows; many small programs keep many loads in flight.
BLOCK = 1024
FEWEST_PROGRAMS = 512
MOST_ROWS = 8
ROUNDS = 7
# Read between two measurements, so that no weights are left in the L2 cache.
FLUSH_BYTES = 1 << 27

# Shape, strides, type and device of a weight: whether the kernel is faster.
_FASTER: dict[tuple, bool] = {}


@triton.jit
def matvec_kernel(
    x,
    weight,
    bias,
    out,
    rows,
    weight_row,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    BLOCK: tl.constexpr,
    BIAS: tl.constexpr,
):
    """`ROWS` elements of `weight @ x`, summed in float32."""
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    here = row < rows
    base = row.to(tl.int64) * weight_row
    acc = tl.zeros((ROWS, BLOCK), tl.float32)
    for first in range(0, COLUMNS, BLOCK):
        column = first + tl.arange(0, BLOCK)
        inside = column < COLUMNS
        v = tl.load(x + column, mask=inside, other=0.0).to(tl.float32)
        w = tl.load(weight + base[:, None] + column[None, :], mask=here[:, None] & inside[None, :], other=0.0)
        acc += w.to(tl.float32) * v[None, :]
    result = tl.sum(acc, 1)
    if BIAS:
        result += tl.load(bias + row, mask=here, other=0.0).to(tl.float32)
    tl.store(out + row, result.to(out.dtype.element_ty), mask=here)


def matvec(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    """`functional.linear` of one row.

    Args:
        x: [1, columns], contiguous.
        weight: [rows, columns], contiguous within rows.
        bias: [rows], or None.

    Returns:
        [1, rows].
    """
    rows, columns = weight.shape
    out = x.new_empty(1, rows)
    share = max(1, min(MOST_ROWS, rows // FEWEST_PROGRAMS))
    share = 1 << (share.bit_length() - 1)
    matvec_kernel[(triton.cdiv(rows, share),)](
        x,
        weight,
        weight if bias is None else bias,
        out,
        rows,
        weight.stride(0),
        ROWS=share,
        COLUMNS=columns,
        BLOCK=BLOCK,
        BIAS=bias is not None,
        num_warps=4,
    )
    return out


def faster(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> bool:
    """Whether `matvec` beats the library for such a weight on this device; not asked while a graph is captured."""
    key = (*weight.shape, weight.stride(), weight.dtype, bias is None, weight.device)
    if key not in _FASTER:
        if torch.cuda.is_current_stream_capturing():
            return False
        _FASTER[key] = _measure(matvec, x, weight, bias) < _measure(functional.linear, x, weight, bias)
    return _FASTER[key]


def _measure(product, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> float:
    """Median milliseconds with nothing of the weight in the cache."""
    flush = torch.empty(FLUSH_BYTES, dtype=torch.int8, device=x.device)
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    product(x, weight, bias)
    times = []
    for _ in range(ROUNDS):
        flush.zero_()
        begin.record()
        product(x, weight, bias)
        end.record()
        end.synchronize()
        times.append(begin.elapsed_time(end))
    return statistics.median(times)
