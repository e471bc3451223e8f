"""Decoding passes of lenders over caches that another engine keeps in pages.

The kernels are those of `triton_ops`. The engine brings keys and values of each layer as tensors of pages, a table
that says in which page a place of a row lies, and the lengths of the rows; what no lender serves, it computes itself.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

from uniattn_cli.inference.caches import Caches, choose_block
from uniattn_cli.inference.head_tables import head_tables
from uniattn_cli.inference.lending import plan_lending
from uniattn_cli.inference.program import Asked, LayerProgram, Program
from uniattn_cli.inference.step import Step
from uniattn_cli.inference.triton_ops import TritonOps, Tuning

# Places of a row that one program handles at most, since a step takes as long as its longest program and rows may be of
# very different lengths. More parts than occupy the device cost a few percent.
LONGEST_PART = 1 << 15
# Keys (`k`) or values (`v`) of a layer: [pages, heads, places of a page, head_dim], without any until they are there.
Pages = Callable[[str, int], torch.Tensor]


class PagedCaches(Caches):
    """Keys and values in pages; those of lenders, and of layers that they serve, with the same strides.

    Args:
        program: the layers.
        rows: most rows of a step.
        places: most places of a row.
        pages: where they are.
    """

    def __init__(self, program: Program, rows: int, places: int, pages: Pages):
        self.block, self.batch, self.capacity = choose_block(program, rows), rows, places
        self.pages = pages
        self._head_dim = program.shape.head_dim
        self.flat = self.table = torch.empty(0, 0, 0, 0, dtype=program.dtype, device=program.device)

    @property
    def page(self) -> int:
        return self.flat.shape[2]

    @property
    def row_counts(self) -> Sequence[int]:
        return range(1, self.batch + 1)

    def row_elements(self, kv_heads: int) -> int:
        """The table says where a row is."""
        return 0

    @property
    def paging(self) -> tuple[torch.Tensor, int, int, int]:
        return self.table, self.table.stride(0), self.flat.stride(0), self.flat.stride(2)

    @property
    def flat_head_dim(self) -> int:
        return self._head_dim

    def head_offsets(self, name: str, sources: tuple[tuple[int, int], ...]) -> torch.Tensor:
        """Where heads begin, counted from `flat`: the layers' tensors lie anywhere in the device's memory."""
        offsets = []
        for layer, head in sources:
            pages = self.pages(name, layer)
            start = (pages.data_ptr() - self.flat.data_ptr()) // pages.element_size()
            offsets.append(start + head * pages.stride(1) if pages.numel() else 0)
        return torch.tensor(offsets, dtype=torch.int64, device=self.flat.device)


class PagedOps(TritonOps):
    """Passes of lenders, and what their borrowers add to these.

    Tables and workspaces have a place of their own from the beginning, so that graphs may be captured with them.

    Args:
        program: the layers. Each lender is told anew what it is `asked`: all heads of each layer that it serves.
        rows: most rows of a step.
        places: most places of a row.
        pages: keys and values.
    """

    caches: PagedCaches

    def __init__(self, program: Program, rows: int, places: int, pages: Pages):
        lending = plan_lending(program, keeps_maps=False)
        for layer in program.layers:
            borrowers = dict.fromkeys(asked.borrower for asked in layer.asked if asked.borrower in lending.slots)
            layer.asked = tuple(Asked(borrower, 0, layer.heads) for borrower in borrowers)
        super().__init__(program, PagedCaches(program, rows, places, pages), lending=lending)
        self._starts = torch.zeros(rows, dtype=torch.int32, device=program.device)

    def _keeps_map(self, layer: LayerProgram) -> bool:
        return False

    def _splits(self, layer: LayerProgram, tuning: Tuning, rows: int, block: int | None = None) -> int:
        keys = min(self.caches.capacity, layer.window or self.caches.capacity)
        return max(super()._splits(layer, tuning, rows, block), -(-keys // LONGEST_PART))

    @property
    def units(self) -> list[tuple[str, int]]:
        """The keys and values that passes read, as `Pages` names them."""
        layers = sorted({*self.lending.lenders, *self.lending.slots})
        return [(name, index) for index in layers for name in self.program.layers[index].kind.caches]

    @torch.inference_mode()
    def bind(self) -> None:
        """To be called when the pages are there, or have moved; captured graphs have to be captured again.

        Raises:
            ValueError: they are not all alike.
        """
        found = [self.caches.pages(*unit) for unit in self.units]
        if len({(pages.stride(), pages.shape[2]) for pages in found}) > 1:
            raise ValueError("the keys and values that a pass reads lie in pages of different shapes")
        self.caches.flat = min(found, key=torch.Tensor.data_ptr)
        for index, table in head_tables(self.program, self.caches, self.lending, None).items():
            for old, new in ((self.tables[index].keys, table.keys), (self.tables[index].values, table.values)):
                if old is not None and new is not None:
                    old.copy_(new)

    def attend(
        self, index: int, queries: torch.Tensor, table: torch.Tensor, ends: torch.Tensor, out: torch.Tensor
    ) -> None:
        """Attention of one new token per row, in a layer that lends or is served.

        Args:
            index: the layer.
            queries: [rows, heads, head_dim]; of a lender its own heads, then those of layers that it is `asked` by.
            table: [rows, pages] int32, where the places of each row lie.
            ends: [rows] int32, filled places, that of the new token included; 0 for a row that only fills up a batch.
            out: [rows, heads * head_dim].
        """
        if queries.stride()[1:] != (self.caches.flat_head_dim, 1):
            queries = queries.contiguous()
        self.caches.table = table
        step = Step(self.caches, {}, self._starts[: len(ends)], ends, ends, ends, 1, None, False)
        self.decode(self.program.layers[index], queries, step, out)
