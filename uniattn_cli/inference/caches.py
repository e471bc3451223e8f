"""Static caches of keys and values, carved out of one tensor, and the tables by which kernels find a head in it."""

from __future__ import annotations

import functools
from collections.abc import Sequence

import torch

from uniattn_cli.inference.program import LayerProgram, Program

# Keys that a kernel handles at once; the maximum of the scores is kept for each such block.
BLOCKS = (64, 128)
# Capacities are multiples of this.
GRAIN = max(BLOCKS)
# Large blocks are faster where rows alone occupy the device and some of them fit into shared memory (seen on an H200).
LARGE_ROWS, LARGE_HEAD_BYTES = 128, 256


def whole_grains(tokens: int) -> int:
    """The smallest capacity that holds so many tokens."""
    return -(-tokens // GRAIN) * GRAIN


def choose_block(program: Program, batch: int) -> int:
    """Keys that kernels handle at once: one of `BLOCKS`."""
    head_bytes = program.shape.head_dim * program.dtype.itemsize
    large = batch * program.shape.kv_heads >= LARGE_ROWS and head_bytes <= LARGE_HEAD_BYTES
    return BLOCKS[large]


def cache_elements(program: Program, batch: int, capacity: int) -> int:
    """Elements of all caches: what the layout predicts per token, times tokens."""
    heads = sum((_keeps_keys(layer) + _keeps_values(layer)) * layer.kv_heads for layer in program.layers)
    return heads * program.shape.head_dim * batch * capacity


def _keeps_keys(layer: LayerProgram) -> bool:
    return "k" in layer.parts


def _keeps_values(layer: LayerProgram) -> bool:
    return "v" in layer.parts


class Caches:
    """Keys and values of all layers, and the maps of this step.

    Attributes:
        block: keys that kernels handle at once.
        flat: the tensor that holds everything; heads of different layers are found in it by offset.
        keys: per layer that keeps keys, a view [batch, kv_heads, capacity, head_dim].
        values: the same for values.
        maps: [slots, batch, heads, capacity], powers of two of the scores below their block's maximum.
        block_max: [slots, batch, heads, blocks], maximum of the scores of a block, times log2(e).
        lse: [slots, batch, heads], log2 of the sum that normalises a row.
        queries: [slots, batch, heads, head_dim], this step's queries of layers that lend them.
    """

    def __init__(
        self,
        program: Program,
        batch: int,
        capacity: int,
        flat: torch.Tensor | None = None,
        block: int | None = None,
    ):
        self.block = block or choose_block(program, batch)
        if capacity % self.block:
            raise ValueError(f"a capacity must be a multiple of {self.block}, not {capacity}")
        device, dtype, shape = program.device, program.dtype, program.shape
        needed = cache_elements(program, batch, capacity)
        if flat is None:
            # Zeros: unused places are masked, but what is masked must not be NaN.
            flat = torch.zeros(needed, dtype=dtype, device=device)
        self.flat, self.batch, self.capacity = flat, batch, capacity
        self.keys: dict[int, torch.Tensor] = {}
        self.values: dict[int, torch.Tensor] = {}
        self._starts: dict[tuple[str, int], int] = {}
        used = 0
        for layer in program.layers:
            size = batch * layer.kv_heads * capacity * shape.head_dim
            for name, kept, views in (
                ("k", _keeps_keys(layer), self.keys),
                ("v", _keeps_values(layer), self.values),
            ):
                if kept:
                    views[layer.index] = flat[used : used + size].view(batch, layer.kv_heads, capacity, -1)
                    self._starts[name, layer.index] = used
                    used += size
        accumulator = torch.float64 if dtype == torch.float64 else torch.float32
        self._heads = (program.map_slots, batch, shape.query_heads)
        self.lse = torch.zeros(*self._heads, dtype=accumulator, device=device)
        self.queries = torch.zeros(*self._heads, shape.head_dim, dtype=dtype, device=device)

    @property
    def page(self) -> int:
        """Places of a page where a table says in which page a place lies; 0 where the places of a row lie together."""
        return 0

    @property
    def row_counts(self) -> Sequence[int]:
        """Rows that a step may have."""
        return (self.batch,)

    def row_elements(self, kv_heads: int) -> int:
        """Elements from one row of the batch to the next, of a layer with so many heads."""
        return self.capacity * self.flat_head_dim * kv_heads

    @property
    def paging(self) -> tuple[torch.Tensor, int, int, int]:
        """What kernels are told of pages: the table, and elements from one of its rows, page and place to the next."""
        return self.lse, 0, 0, 0

    @functools.cached_property
    def maps(self) -> torch.Tensor:
        """See the head of this class; made when first asked for, because not every way to decode keeps maps."""
        return torch.zeros(*self._heads, self.capacity, dtype=self.flat.dtype, device=self.flat.device)

    @functools.cached_property
    def block_max(self) -> torch.Tensor:
        """Likewise."""
        blocks = self.capacity // self.block
        return torch.zeros(*self._heads, blocks, dtype=self.lse.dtype, device=self.flat.device)

    @property
    def nbytes(self) -> int:
        """Bytes of keys and values, without the maps of the step."""
        return sum(view.nbytes for views in (self.keys, self.values) for view in views.values())

    def head_offsets(self, name: str, sources: tuple[tuple[int, int], ...]) -> torch.Tensor:
        """Where heads begin in `flat` for the first row of the batch; all layers named have the same number of heads.

        Args:
            name: `k` or `v`.
            sources: (layer, key/value head) for each head.
        """
        head_size = self.capacity * self.flat_head_dim
        offsets = [self._starts[name, layer] + head * head_size for layer, head in sources]
        return torch.tensor(offsets, dtype=torch.int64, device=self.flat.device)

    @property
    def flat_head_dim(self) -> int:
        """Size of a head."""
        return self.queries.shape[-1]
