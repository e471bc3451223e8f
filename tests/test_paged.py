"""Passes of lenders over keys and values in pages, as vLLM keeps them, against maps in float64."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from test_kernels import DEVICE, DTYPES, EARLY, OWN, SERVED, TOLERANCES, materialised, needs_triton

from uniattn_cli.inference.lending import plan_lending
from uniattn_cli.inference.trial import attention_program
from uniattn_cli.modeling.layout_uniattn import Layout

pytestmark = needs_triton
# Rows: several blocks, one key, the end of a page, of a block, one more; and one that only fills up a batch.
ENDS = [190, 1, 16, 128, 65, 0]
PAGE, PLACES = 16, 192
CASES = {
    "plain": {},
    "window": {"window": 70},
    "softcap": {"softcap": 2.0},
    "head of 96": {"head_dim": 96},
    "head of 128": {"head_dim": 128},
    "small pages": {"page": 8, "token_first": True},
    "pages of a block": {"page": 64},
}
# A free map and what comes fourth find no place, and keep nobody else from one.
MIXED = [*SERVED, {"heads": "0:3 1:2 1:0 0:1 0:0 1:1"}, {"leader": 7}, {"leader": 7}, {"leader": 7}]


def make_pages(program, page, token_first):
    """Random keys and values of each layer in pages that stand in random order, and the table of each row's pages."""
    generator = torch.Generator().manual_seed(0)
    needed = len(ENDS) * (PLACES // page)
    # Page 0 belongs to nobody, and what nobody has written is no number.
    order = 1 + torch.randperm(needed, generator=generator)
    table = order.view(len(ENDS), -1).to(torch.int32)
    found = {}
    for layer in program.layers:
        for name in layer.kind.caches:
            shape = (needed + 1, page, layer.kv_heads, layer.head_dim)
            pages = torch.randn(shape, generator=generator).to(DEVICE, program.dtype).transpose(1, 2)
            pages = pages if token_first else pages.contiguous()
            for row, end in enumerate(ENDS):
                for place in range(end, PLACES):
                    pages[table[row, place // page], :, place % page] = torch.nan
            pages[0] = torch.nan
            found[name, layer.index] = pages
    return found, table.to(DEVICE)


def whole_rows(pages, table):
    """[rows, heads, places, head_dim]."""
    return pages[table.long()].transpose(1, 2).flatten(2, 3)


@pytest.mark.parametrize("kind", ["softmax", "early"])
def test_the_benchmark_compares_ways_that_do_the_same(kind, monkeypatch):
    from benchmarks import paged

    monkeypatch.setattr(torch, "bfloat16", DTYPES[-1])
    case = paged.Case(2, 40, 4, 2, 32, 2, kind, DEVICE)
    out = case.outputs()
    case.paged(out)(), case.whole(case.outputs())()
    assert case.moved == 4 * 80 * 2 * 32 * 2
    for index, found in enumerate(out):
        queries = case.queries[:, case.first[index] : case.first[index] + 4].unflatten(1, (2, 2)).double()
        keys, values = (
            whole_rows(case.pages[unit], case.table)[:, :, :40].double() for unit in (("k", 0), ("v", index))
        )
        weights = torch.einsum("bghd,bgkd->bghk", queries, keys).mul(32**-0.5).softmax(-1)
        wanted = torch.einsum("bghk,bgkd->bghd", weights, values).flatten(1)
        torch.testing.assert_close(found.double(), wanted, rtol=0, atol=4 * TOLERANCES[found.dtype])


def check(layers, dtype, *, page=PAGE, token_first=False, head_dim=64, heads=6, **options):
    from uniattn_cli.inference.paged import PagedOps

    layout = Layout.from_list(layers, compensation="none")
    program = attention_program(
        layout, heads=heads, kv_heads=3, head_dim=head_dim, dtype=dtype, device=DEVICE, **options
    )
    pages, table = {}, None
    operations = PagedOps(program, len(ENDS) + 3, PLACES, lambda *unit: pages.get(unit, torch.empty(0)))
    pages, table = make_pages(program, page, token_first)
    operations.bind()
    ends = torch.tensor(ENDS, dtype=torch.int32, device=DEVICE)
    torch.manual_seed(0)
    queries = torch.randn(len(layers), len(ENDS), heads, head_dim).mul(2).to(DEVICE, dtype)
    caches = SimpleNamespace(
        keys={layer: whole_rows(found, table) for (name, layer), found in pages.items() if name == "k"},
        values={layer: whole_rows(found, table) for (name, layer), found in pages.items() if name == "v"},
    )
    wanted = materialised(program, caches, queries, [0] * len(ENDS), ENDS)
    for layer in program.layers:
        if layer.index not in {*operations.lending.lenders, *operations.served}:
            continue
        own = torch.cat([queries[one] for one in (layer.index, *(asked.borrower for asked in layer.asked))], dim=1)
        out = torch.full((len(ENDS), heads * head_dim + 8), 5.0, dtype=dtype, device=DEVICE)
        operations.attend(layer.index, own, table, ends, out[:, : heads * head_dim])
        assert (out[:, heads * head_dim :] == 5.0).all()
        found = out[:, : heads * head_dim].unflatten(1, (heads, head_dim)).double()
        difference = (found - wanted[layer.index])[:-1].abs().max().item()
        assert difference <= TOLERANCES[dtype] * 4, f"layer {layer.index} ({layer.plan.kind}): {difference:.1e}"
        assert (found[-1] == 0).all(), "a row without tokens"
    return operations


@pytest.mark.parametrize("options", CASES.values(), ids=CASES)
@pytest.mark.parametrize("layers", [MIXED, EARLY], ids=["mixed", "early"])
def test_passes_over_pages_equal_materialised_maps(layers, options, monkeypatch):
    from uniattn_cli.inference import triton_ops

    monkeypatch.setattr(triton_ops, "choose_splits", lambda *arguments: 3)
    check(layers, torch.float32, **options)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_passes_that_are_not_split(dtype):
    check(MIXED, dtype)


@pytest.mark.parametrize("heads", [3, 12, 24])
def test_groups_of_other_sizes(heads):
    check(
        [OWN, {"leader": 0}, {"kind": "early", "leader": 0}, {"kind": "early-kv", "leader": 0}],
        torch.float32,
        heads=heads,
    )


@pytest.mark.parametrize(("window", "parts"), [(None, 4), (40_000, 2), (4096, 1)])
def test_no_part_of_a_row_is_longer_than_others_may_wait_for(window, parts):
    from uniattn_cli.inference.paged import PagedOps

    layout = Layout.from_list([OWN, {"leader": 0}], compensation="none")
    sizes = {"heads": 6, "kv_heads": 3, "head_dim": 16}
    program = attention_program(layout, **sizes, dtype=torch.float32, window=window, device=DEVICE)
    operations = PagedOps(program, 64, 131_072, lambda *unit: torch.empty(0))
    # So many rows occupy the device without being divided.
    assert operations._splits(program.layers[0], operations.tunings["lend"], 64) == parts


def test_an_engine_that_keeps_no_maps_serves_whoever_finds_a_place():
    layout = Layout.from_list(MIXED, compensation="none")
    program = attention_program(layout, heads=6, kv_heads=3, head_dim=16, dtype=torch.float32)
    assert not plan_lending(program).slots
    assert set(plan_lending(program, keeps_maps=False).slots) == {2, 3, 4, 8, 10, 11}
