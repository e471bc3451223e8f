"""Where kernels find the heads of a layer: its own, those it borrows, and those of the borrowers that it serves."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch

from uniattn_cli.inference.caches import Caches
from uniattn_cli.inference.lending import Lending
from uniattn_cli.inference.program import LayerProgram, Program


@dataclass(frozen=True)
class HeadTable:
    """Where the heads of a layer begin in the caches' memory.

    Attributes:
        queries: [heads], or for a lender [heads of keys, units * group], elements from a row's first query.
        keys: [heads of keys], elements from the beginning of the memory; None where the layer reads none.
        values: [heads of keys, 1 + lent], likewise, its own and then those that it weighs for others; -1 for none.
        key_row, value_row: elements from one row of the batch to the next.
        borrowers: of a lender [heads of keys, units], heads from the beginning of what is lent, see `lead_kernel`.
    """

    queries: torch.Tensor
    keys: torch.Tensor | None
    values: torch.Tensor
    key_row: int
    value_row: int
    borrowers: torch.Tensor | None = None


def head_tables(
    program: Program, caches: Caches, lending: Lending, map_rows: Mapping[int, torch.Tensor] | None
) -> dict[int, HeadTable]:
    """The table of each layer that attends.

    Args:
        lending: who is served.
        map_rows: where maps are computed again, per follower slot * heads + head of the queries of each of its heads.
    """
    layers = [layer for layer in program.layers if layer.kind.attends]
    tables = {layer.index: _table(layer, program, caches, map_rows) for layer in layers}
    for lender in lending.lenders:
        tables[lender] = _with_borrowers(tables[lender], program.layers[lender], program, caches, lending)
    return tables


def _table(
    layer: LayerProgram, program: Program, caches: Caches, map_rows: Mapping[int, torch.Tensor] | None
) -> HeadTable:
    """Own heads, or those that the layer borrows; one key/value head per query head where its map is free."""
    dim = layer.head_dim
    own = tuple((layer.index, head) for head in range(layer.kv_heads))
    key_sources = layer.key_sources or own
    value_sources = key_sources if layer.kind.borrows_values else own
    reads_keys = map_rows is not None or not layer.kind.borrows_maps
    if map_rows is not None and layer.kind.borrows_maps:
        value_sources = tuple(source for source in value_sources for _ in range(layer.value_groups))
        heads, sources = layer.heads, map_rows[layer.index]
        # Queries of a slot lie behind those of all rows of the slots before it.
        queries = (sources // heads * caches.batch * heads + sources % heads) * dim
    else:
        queries = torch.arange(layer.heads, device=program.device) * dim
    # Heads of the layers that are borrowed from decide where the next row begins.
    key_heads, value_heads = (program.layers[sources[0][0]].kv_heads for sources in (key_sources, value_sources))
    return HeadTable(
        queries,
        caches.head_offsets("k", key_sources) if reads_keys else None,
        caches.head_offsets("v", value_sources)[:, None],
        caches.row_elements(key_heads),
        caches.row_elements(value_heads),
    )


def _with_borrowers(
    table: HeadTable, layer: LayerProgram, program: Program, caches: Caches, lending: Lending
) -> HeadTable:
    """The table of a lender, with the heads of those that it serves."""
    group = layer.heads // layer.kv_heads
    lent, units = lending.lent(layer.index), lending.units(layer.index)
    nobody: list[list[tuple[int, int]]] = [[]] * layer.kv_heads
    served = (lending.owning.get(layer.index, nobody), lending.sharing.get(layer.index, nobody))
    queries, values, borrowers = [], [], []
    for head, (owning, sharing) in enumerate(zip(*served, strict=True)):
        taken = [*owning, *[None] * (lent - len(owning)), *sharing, *[None] * (units - 1 - lent - len(sharing))]
        own = list(range(head * group, (head + 1) * group))
        asked = [own if unit is None else _query_places(layer, program.layers[unit[0]], unit[1]) for unit in taken]
        queries.append([place * layer.head_dim for places in (own, *asked) for place in places])
        offsets = caches.head_offsets("v", tuple(owning)).tolist() if owning else []
        values.append([int(table.values[head, 0]), *offsets, *[-1] * (lent - len(owning))])
        loans = [-1 if unit is None else lending.slots[unit[0]] * caches.batch * layer.heads for unit in taken]
        loans = [loan if unit is None else loan + unit[1] * group for loan, unit in zip(loans, taken, strict=True)]
        borrowers.append([-1, *loans])
    tensors = [torch.tensor(rows, dtype=torch.int64, device=program.device) for rows in (queries, values, borrowers)]
    return replace(table, queries=tensors[0], values=tensors[1], borrowers=tensors[2])


def _query_places(lender: LayerProgram, borrower: LayerProgram, head: int) -> list[int]:
    """Where among the heads that a lender places the queries for one key/value head of a borrower are."""
    group = lender.heads // lender.kv_heads
    heads = range(head * group, (head + 1) * group)
    if borrower.kind.borrows_maps:
        return [borrower.query_sources[one][1] for one in heads]
    used = lender.heads
    for asked in lender.asked:
        if asked.borrower == borrower.index and asked.first <= heads[0] < asked.first + asked.heads:
            return [used + one - asked.first for one in heads]
        used += asked.heads
    raise AssertionError(f"layer {lender.index} projects no queries for head {head} of layer {borrower.index}")
