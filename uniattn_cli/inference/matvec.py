"""Matrix times one vector, for a decoding step of one row, where libraries leave bandwidth unused on small matrices.

Nothing but reading the matrix takes time, so all that counts is how many loads are on their way. A program has whole
chunks of its rows in flight, 16 bytes per load, and sums in float32. Which launch setting is best, and whether it beats
the library, depends on the shape and the device: `tuning` measures it.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl

from uniattn_cli.inference.pointwise import gated

# Elements that one warp takes in with 16-byte loads of a 16-bit type; chunks are no smaller, so that the vector is laid
# out over the threads as the matrix is.
WARP_ELEMENTS = 256


class Setting(NamedTuple):
    """How a product is launched.

    Attributes:
        rows: results of one program.
        block: columns of a chunk.
        warps: warps per program.
    """

    rows: int
    block: int
    warps: int


# Those of eight that were fastest for some matrix of an 8B model on an H200; each one more takes seconds to compile.
SETTINGS = (Setting(1, 4096, 4), Setting(1, 2048, 8), Setting(2, 4096, 8), Setting(2, 2048, 4))


@triton.jit
def _sums(x, weight, row, weight_row, LANES: tl.constexpr, COLUMNS: tl.constexpr, BLOCK: tl.constexpr):
    """Products of rows [LANES] with the vector. Weights are read once, so no cache has to keep them."""
    base = weight + (row.to(tl.int64) * weight_row)[:, None]
    acc = tl.zeros((LANES, BLOCK), tl.float32)
    for chunk in tl.static_range(COLUMNS // BLOCK):
        column = chunk * BLOCK + tl.arange(0, BLOCK)
        w = tl.load(base + column[None, :], eviction_policy="evict_first")
        acc += w.to(tl.float32) * tl.load(x + column).to(tl.float32)[None, :]
    if COLUMNS % BLOCK > 0:
        column = COLUMNS // BLOCK * BLOCK + tl.arange(0, BLOCK)
        inside = column < COLUMNS
        w = tl.load(base + column[None, :], mask=inside[None, :], other=0.0, eviction_policy="evict_first")
        acc += w.to(tl.float32) * tl.load(x + column, mask=inside, other=0.0).to(tl.float32)[None, :]
    return tl.sum(acc, 1)


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
    """`ROWS` elements of `weight @ x + bias`."""
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    here = row < rows
    # Beyond the end the last row again, so that loads need no mask.
    result = _sums(x, weight, tl.minimum(row, rows - 1), weight_row, ROWS, COLUMNS, BLOCK)
    if BIAS:
        result += tl.load(bias + row, mask=here, other=0.0).to(tl.float32)
    tl.store(out + row, result.to(out.dtype.element_ty), mask=here)


@triton.jit
def gated_matvec_kernel(
    x,
    weight,
    out,
    rows,
    weight_row,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    BLOCK: tl.constexpr,
    GELU: tl.constexpr,
):
    """`ROWS` elements of activation(gate @ x) * (up @ x); `weight` has `rows` rows of each."""
    kind = out.dtype.element_ty
    # Neighbouring lanes are a row of `gate` and its row of `up`.
    lane = tl.arange(0, 2 * ROWS)
    row = tl.minimum(tl.program_id(0) * ROWS + lane // 2, rows - 1) + lane % 2 * rows
    sums = _sums(x, weight, row, weight_row, 2 * ROWS, COLUMNS, BLOCK)
    gate, up = tl.split(tl.reshape(sums.to(kind), (ROWS, 2)))
    target = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    tl.store(out + target, gated(gate, up, GELU), mask=target < rows)


def matvec(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, setting: Setting) -> torch.Tensor:
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
    matvec_kernel[(triton.cdiv(rows, setting.rows),)](
        x,
        weight,
        weight if bias is None else bias,
        out,
        rows,
        weight.stride(0),
        ROWS=setting.rows,
        COLUMNS=columns,
        BLOCK=_block(columns, setting),
        BIAS=bias is not None,
        num_warps=setting.warps,
    )
    return out


def gated_matvec(x: torch.Tensor, gate_up: torch.Tensor, activation: str, setting: Setting) -> torch.Tensor:
    """activation(gate @ x) * (up @ x) in one kernel.

    Args:
        x: [1, columns], contiguous.
        gate_up: [2 * rows, columns], gate rows first, contiguous within rows.
        activation: `silu` or `gelu_tanh`.

    Returns:
        [1, rows].
    """
    rows, columns = gate_up.shape[0] // 2, gate_up.shape[1]
    out = x.new_empty(1, rows)
    gated_matvec_kernel[(triton.cdiv(rows, setting.rows),)](
        x,
        gate_up,
        out,
        rows,
        gate_up.stride(0),
        ROWS=setting.rows,
        COLUMNS=columns,
        BLOCK=_block(columns, setting),
        GELU=activation == "gelu_tanh",
        num_warps=setting.warps,
    )
    return out


def _block(columns: int, setting: Setting) -> int:
    """Columns of a chunk: no more than there are, as far as the threads have something to do."""
    return min(setting.block, max(triton.next_power_of_2(columns), WARP_ELEMENTS * setting.warps))
