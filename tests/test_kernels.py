"""The attention of a decoding step against maps in float64: the plain form always, the kernels where Triton is.

On a machine without CUDA: `pip install "triton<3.9" "numpy<2.4"` and `TRITON_INTERPRET=1 pytest tests/test_kernels.py`.
"""

from __future__ import annotations

import importlib.util
import os
from functools import partial

import pytest
import tiny
import torch
from test_inference import make_model

from uniattn_cli.inference.caches import BLOCKS, Caches, choose_block
from uniattn_cli.inference.engine import Engine
from uniattn_cli.inference.ops import TorchOps
from uniattn_cli.inference.reading import read_program
from uniattn_cli.inference.session import Session
from uniattn_cli.inference.trial import attention_program, decoding_step
from uniattn_cli.modeling.layout_uniattn import Layout

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
needs_triton = pytest.mark.skipif(
    importlib.util.find_spec("triton") is None or not (INTERPRETED or torch.cuda.is_available()),
    reason="needs triton and a CUDA device, or TRITON_INTERPRET=1",
)
DEVICE = "cpu" if INTERPRETED or not torch.cuda.is_available() else "cuda"
# The interpreter multiplies bfloat16 matrices as if they were integers.
DTYPES = [torch.float32, torch.float16] + ([] if DEVICE == "cpu" else [torch.bfloat16])
TOLERANCES = {torch.float64: 1e-12, torch.float32: 2e-6, torch.float16: 2e-3, torch.bfloat16: 1.5e-2}

OWN = {}
FREE = {"heads": "0:3 1:2 1:0 0:1 0:0 1:1"}
GROUPED = {"heads": "1:1 1:0 0:2 0:2 1:4 1:5"}
LAYERS = [
    OWN,
    OWN,
    {"leader": 1},
    FREE,
    GROUPED,
    {"kind": "key", "heads": "0:1 1:0 1:2"},
    {"kind": "kv", "heads": "0:2 1:1 0:0"},
    {"kind": "pooled", "kv_heads": 1},
]
# Followers that their leaders can serve: the same heads, groups of two layers, two of one group; one head serves three.
SERVED = [
    OWN,
    OWN,
    {"leader": 1},
    {"heads": "1:1 1:0 0:2 0:2 1:4 1:5"},
    {"heads": "0:0 0:1 1:5 1:5 0:1 0:0"},
    {"kind": "key", "heads": "0:1 1:0 1:2"},
    {"kind": "pooled", "kv_heads": 1},
    OWN,
    {"leader": 7},
]
# Early queries: of one lender, of two at once, with the lender's values, beside a follower; one head serves three.
# Those that come fourth, or to a layer that keeps its map for a free follower, have to read keys again.
EARLY = [
    OWN,
    OWN,
    {"kind": "early", "leader": 1},
    {"kind": "early", "heads": "0:2 1:1 0:0"},
    {"kind": "early-kv", "heads": "1:2 0:1 0:2"},
    {"heads": "0:1 0:0 1:3 1:2 0:4 0:5"},
    {"kind": "early", "leader": 1},
    {"kind": "early-kv", "leader": 1},
    OWN,
    {"heads": "8:3 8:2 8:0 8:5 8:0 8:1"},
    {"kind": "early", "leader": 8},
    {"kind": "early", "heads": "0:0 0:0 8:1"},
    OWN,
    {"kind": "early-kv", "leader": 12},
]
# Rows: everything, padding, one key, a part of a block, the end of a block, nothing but the newest.
STARTS = [0, 70, 0, 130, 1, 191]
ENDS = [192, 192, 1, 150, 128, 192]
CASES = {
    "plain": {},
    "window": {"window": 70},
    "small window": {"window": 3},
    "softcap": {"softcap": 2.0},
    "head of 16": {"head_dim": 16},
    "head of 96": {"head_dim": 96},
    "head of 256": {"head_dim": 256},
    "large blocks": {"block": BLOCKS[1]},
    "large blocks and a window": {"block": BLOCKS[1], "window": 100},
    "everything": {"head_dim": 80, "softcap": 1.5, "window": 100},
}


def make_trial(ops, dtype, *, reuse=True, head_dim=64, block=BLOCKS[0], layers=LAYERS, **options):
    """Layers with random caches; returns the attention outputs of all of them, and what made them."""
    layout = Layout.from_list(layers, compensation="none")
    program = attention_program(layout, heads=6, kv_heads=3, head_dim=head_dim, dtype=dtype, device=DEVICE, **options)
    caches = Caches(program, len(STARTS), 192 if block == BLOCKS[0] else 256, block=block)
    torch.manual_seed(0)
    caches.flat.copy_(torch.randn(caches.flat.shape))
    # What was left in unused places must not matter.
    caches.maps.fill_(7.0), caches.block_max.fill_(3.0)
    queries = torch.randn(len(layers), len(STARTS), 6, head_dim).mul(2).to(DEVICE, dtype)
    step = decoding_step(caches, STARTS, ENDS)
    operations = ops(program, caches, reuse=reuse)
    found = []
    for layer in program.layers:
        out = torch.full((len(STARTS), 6 * head_dim + 8), 5.0, dtype=dtype, device=DEVICE)
        operations.decode(layer, own_queries(operations, layer, queries), step, out[:, : 6 * head_dim])
        assert (out[:, 6 * head_dim :] == 5.0).all()
        found.append(out[:, : 6 * head_dim].unflatten(1, (6, head_dim)))
    return program, caches, queries, found


def own_queries(operations, layer, queries):
    """What a session gives `decode`: a layer's queries and those that it projects for others."""
    if "q" not in layer.kind.projects or layer.index in operations.served:
        return None
    asked = [queries[one.borrower][:, one.first : one.first + one.heads] for one in layer.asked]
    return torch.cat([queries[layer.index], *asked], dim=1)


def materialised(program, caches, queries, starts=STARTS, ends=ENDS):
    """The same from whole maps in float64, head by head, as the layout reads."""
    outputs = []
    for layer in program.layers:
        rows = []
        for row, (start, end) in enumerate(zip(starts, ends, strict=True)):
            low = start if layer.window is None else max(start, end - layer.window)
            heads = [one_head(program, caches, queries, layer, row, head, low, end) for head in range(layer.heads)]
            rows.append(torch.stack(heads))
        outputs.append(torch.stack(rows))
    return outputs


def one_head(program, caches, queries, layer, row, head, low, end):
    group, kind = program.shape.group_size, layer.plan.kind
    source, query_head = layer.query_sources[head] if kind == "softmax" else (layer.index, head)
    own = layer.index, head // (layer.heads // layer.kv_heads)
    borrowed = layer.key_sources[head // group] if "q" in layer.kind.projects and layer.kind.borrows else own
    key = (source, query_head // group) if kind == "softmax" else borrowed
    value = borrowed if layer.kind.borrows_values else own
    keys = caches.keys[key[0]][row, key[1], low:end].double()
    values = caches.values[value[0]][row, value[1], low:end].double()
    scores = keys @ queries[source, row, query_head].double() * layer.scale
    if layer.softcap:
        scores = torch.tanh(scores / layer.softcap) * layer.softcap
    return scores.softmax(0) @ values


def check(ops, dtype, reuse, options):
    program, caches, queries, found = make_trial(ops, dtype, reuse=reuse, **options)
    for layer, got, wanted in zip(program.layers, found, materialised(program, caches, queries), strict=True):
        difference = (got.double() - wanted).abs().max().item()
        assert difference <= TOLERANCES[dtype] * 4, f"layer {layer.index} ({layer.plan.kind}): {difference:.1e}"


@pytest.mark.parametrize("reuse", [True, False], ids=["reuse", "recompute"])
@pytest.mark.parametrize("options", CASES.values(), ids=CASES)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("layers", [LAYERS, EARLY], ids=["layers", "early"])
def test_plain_operations_equal_materialised_maps(layers, dtype, options, reuse):
    check(TorchOps, dtype, reuse, options | {"layers": layers})


@needs_triton
@pytest.mark.parametrize(("reuse", "splits"), [(True, 1), (True, 3), (False, 2)])
@pytest.mark.parametrize("options", CASES.values(), ids=CASES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_kernels_equal_materialised_maps(dtype, options, reuse, splits, monkeypatch):
    from uniattn_cli.inference import triton_ops

    monkeypatch.setattr(triton_ops, "choose_splits", lambda *arguments: splits)
    check(triton_ops.TritonOps, dtype, reuse, options)


@needs_triton
@pytest.mark.parametrize("splits", [1, 3])
@pytest.mark.parametrize("options", CASES.values(), ids=CASES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("layers", [SERVED, EARLY], ids=["served", "early"])
def test_lenders_that_serve_borrowers_equal_materialised_maps(layers, dtype, options, splits, monkeypatch):
    from uniattn_cli.inference import triton_ops

    monkeypatch.setattr(triton_ops, "choose_splits", lambda *arguments: splits)
    check(triton_ops.TritonOps, dtype, True, options | {"layers": layers})


@needs_triton
def test_early_queries_without_lending_equal_materialised_maps():
    from uniattn_cli.inference import triton_ops

    check(partial(triton_ops.TritonOps, lending=False), torch.float32, True, {"layers": EARLY})


@needs_triton
@pytest.mark.parametrize(("shared", "blocks"), [(227 << 10, {64}), (99 << 10, {16, 32}), (30 << 10, {16})])
def test_leaders_that_serve_their_followers_fit_into_shared_memory(shared, blocks, monkeypatch):
    from uniattn_cli.inference import triton_ops

    monkeypatch.setattr(triton_ops, "_shared_memory", lambda device: shared)
    program, caches, *_ = make_trial(triton_ops.TritonOps, torch.float32, layers=SERVED)
    operations, found = triton_ops.TritonOps(program, caches), {}
    for leader in operations.lending.lenders:
        block, stages = operations.lending_block(program.layers[leader], triton_ops.Tuning(1, 4, 4))
        size = (2 + operations.lending.lent(leader)) * 64 * torch.float32.itemsize * block
        assert stages >= 2 and (size * (stages - 1) <= shared - triton_ops.OTHER_SHARED or block == 16)
        found[leader] = block
    assert set(found.values()) == blocks
    check(triton_ops.TritonOps, torch.float32, True, {"layers": SERVED})


@needs_triton
def test_a_leader_that_serves_its_followers_keeps_no_map_and_does_not_see_their_newest_value():
    from uniattn_cli.inference import triton_ops

    program, caches, queries, before = make_trial(triton_ops.TritonOps, torch.float32, layers=SERVED)
    # As it was filled: nobody has written into it.
    assert (caches.maps == 7.0).all() and (caches.block_max == 3.0).all()
    del caches.maps, caches.block_max
    operations = triton_ops.TritonOps(program, caches)
    step = decoding_step(caches, STARTS, ENDS)
    newest = [caches.values[2][row, :, end - 1].clone() for row, end in enumerate(ENDS)]
    outputs = torch.empty(len(SERVED), len(STARTS), 6 * 64, device=DEVICE)
    for layer in program.layers[:3]:
        if layer.index == 2:
            for row, values in enumerate(newest):
                caches.values[2][row, :, ENDS[row] - 1] = values
        operations.decode(layer, own_queries(operations, layer, queries), step, outputs[layer.index])
        for row, end in enumerate(ENDS):
            # What a step leaves behind that is run again before it counts, as while it is captured.
            caches.values[2][row, :, end - 1] = float("nan")
    assert "maps" not in vars(caches)
    torch.testing.assert_close(outputs[2].view(before[2].shape), before[2], rtol=1e-5, atol=1e-5)


def serving(*layers):
    """Who is served in a layout of layers with six query and three key/value heads."""
    from uniattn_cli.inference.lending import plan_lending

    layout = Layout.from_list(list(layers), compensation="none")
    return plan_lending(attention_program(layout, heads=6, kv_heads=3, head_dim=16, dtype=torch.float32))


def test_followers_are_served_whose_groups_take_one_group_of_a_leader():
    found = serving(OWN, {"leader": 0}, OWN, {"heads": "2:1 2:0 0:5 0:4 2:0 2:0"}, {"kind": "key", "leader": 0})
    assert set(found.slots) == {1, 3} and not found.sharing
    assert found.owning == {0: [[(1, 0)], [(1, 1)], [(1, 2), (3, 1)]], 2: [[(3, 0), (3, 2)], [], []]}
    assert [found.lent(layer) for layer in range(5)] == [2, 0, 2, 0, 0]
    three = serving(OWN, *[{"leader": 0}] * 3)
    assert three.lent(0) == 3 and set(three.slots) == {1, 2, 3}


def test_a_leader_serves_all_its_followers_or_none():
    # A free map of layer 0; whoever else borrows from layer 0, and from whom they borrow too, reads maps as well.
    free = {"heads": "0:3 0:2 0:1 0:0 0:0 0:5"}
    found = serving(OWN, OWN, free, {"heads": "0:0 0:1 1:2 1:3 1:4 1:5"}, {"leader": 1}, OWN, {"leader": 5})
    assert found.lenders == {5} and set(found.slots) == {6}
    assert not serving(OWN, *[{"leader": 0}] * 4).slots
    # Four heads that all want one.
    assert not serving(OWN, {"leader": 0}, {"heads": "0:0 0:1 0:0 0:1 0:0 0:1"}).slots
    assert set(serving(OWN, {"heads": "0:0 0:1 0:0 0:1 0:0 0:1"}).slots) == {1}


def test_early_borrowers_are_served_where_there_is_a_place():
    found = serving(*EARLY)
    assert set(found.slots) == {2, 3, 4, 5, 13}
    assert found.owning[1] == [[(2, 0)], [(5, 1), (2, 1), (3, 1)], [(2, 2)]]
    assert found.sharing[1] == [[], [], [(4, 0)]] and found.sharing[12] == [[(13, 0)], [(13, 1)], [(13, 2)]]
    assert [found.units(layer) for layer in (0, 1, 8, 12)] == [4, 5, 1, 2]
    # Places for results are given back.
    assert len(set(found.slots.values())) < len(found.slots)


@needs_triton
@pytest.mark.parametrize("resident", [0, 2, len(STARTS)])
def test_where_maps_stay_changes_no_result(resident, monkeypatch):
    from uniattn_cli.inference import triton_ops

    monkeypatch.setenv("UNIATTN_LEAD", "1,4,4,50")
    program, caches, *_ = make_trial(triton_ops.TritonOps, torch.float32)
    row = program.map_slots * 6 * 192 * torch.float32.itemsize
    monkeypatch.setattr(triton_ops, "cache_bytes", lambda device: resident * row * 2)
    assert triton_ops.TritonOps(program, caches).resident_rows == resident
    check(triton_ops.TritonOps, torch.float32, True, {})


@needs_triton
@pytest.mark.parametrize("splits", [1, 3])
def test_kernels_keep_the_map_that_the_plain_operations_keep(splits, monkeypatch):
    from uniattn_cli.inference import triton_ops

    monkeypatch.setattr(triton_ops, "choose_splits", lambda *arguments: splits)
    plain, kernels = (make_trial(ops, torch.float32)[1] for ops in (TorchOps, triton_ops.TritonOps))
    # Whole blocks from the first to the last place that a row sees.
    for row, (start, end) in enumerate(zip(STARTS, ENDS, strict=True)):
        blocks = slice(start // BLOCKS[0], -(-end // BLOCKS[0]))
        places = slice(blocks.start * BLOCKS[0], blocks.stop * BLOCKS[0])
        torch.testing.assert_close(kernels.maps[:, row, :, places], plain.maps[:, row, :, places])
        torch.testing.assert_close(kernels.block_max[:, row, :, blocks], plain.block_max[:, row, :, blocks])
    torch.testing.assert_close(kernels.lse, plain.lse)


def test_blocks_are_large_where_rows_are_many_and_heads_small():
    def block(batch, head_dim=128, dtype=torch.bfloat16):
        layout = Layout.from_list([{}])
        program = attention_program(layout, heads=32, kv_heads=8, head_dim=head_dim, dtype=dtype, device="cpu")
        return choose_block(program, batch)

    assert [block(batch) for batch in (1, 15, 16, 64)] == [64, 64, 128, 128]
    assert block(64, head_dim=256) == block(64, dtype=torch.float32) == 64


def settings():
    """All launch settings of products, where Triton is."""
    if importlib.util.find_spec("triton") is None:
        return []
    from uniattn_cli.inference.matvec import SETTINGS

    return SETTINGS


@needs_triton
@pytest.mark.parametrize("setting", settings(), ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("rows", "columns"), [(5, 40), (70, 1500), (256, 4096), (30, 64), (50, 4160)])
def test_a_vector_product_is_that_of_a_library(dtype, rows, columns, setting):
    from uniattn_cli.inference.matvec import matvec

    torch.manual_seed(0)
    # A view of wider rows, as the parts of a joined weight are.
    weight = torch.randn(rows, columns + 8).to(DEVICE, dtype)[:, :columns]
    x, offset = torch.randn(1, columns).to(DEVICE, dtype), torch.randn(rows).to(DEVICE, dtype)
    tolerance = 3 * TOLERANCES[dtype]
    for bias in (None, offset):
        found = matvec(x, weight, bias, setting).double()
        wanted = torch.nn.functional.linear(x.double(), weight.double(), None if bias is None else bias.double())
        torch.testing.assert_close(found, wanted, rtol=tolerance, atol=tolerance * columns**0.5)


@needs_triton
@pytest.mark.parametrize("setting", settings(), ids=str)
@pytest.mark.parametrize("activation", ["silu", "gelu_tanh"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("rows", "columns"), [(5, 40), (70, 1500), (256, 2048)])
def test_a_gated_product_is_a_product_and_a_gate(dtype, rows, columns, activation, setting):
    from uniattn_cli.inference.matvec import gated_matvec

    torch.manual_seed(0)
    weight, x = (torch.randn(size, columns).to(DEVICE, dtype) for size in (2 * rows, 1))
    gate, up = (
        torch.nn.functional.linear(x.double(), weight.double()).to(dtype).double().mul(columns**-0.5).chunk(2, -1)
    )
    function = (
        torch.nn.functional.silu if activation == "silu" else partial(torch.nn.functional.gelu, approximate="tanh")
    )
    found = gated_matvec(x * columns**-0.5, weight, activation, setting)
    torch.testing.assert_close(found.double(), function(gate) * up, rtol=0, atol=10 * TOLERANCES[dtype])


@needs_triton
@pytest.mark.parametrize("family", ["llama", "gemma2", "phi3", "qwen2"])
@pytest.mark.parametrize("way", [0, -1], ids=["library", "kernels"])
def test_products_of_one_row_are_chosen_once_and_give_the_logits_of_transformers(family, way, monkeypatch):
    from uniattn_cli.inference import tuning

    measured, used = [], []
    monkeypatch.setattr(tuning, "_CHOSEN", {})
    monkeypatch.setattr(
        tuning, "fastest", lambda candidates, weights: measured.append(weights) or list(candidates)[way]
    )
    for name in ("matvec", "gated_matvec"):
        call = getattr(tuning.matvec, name)
        spy = lambda *values, name=name, call=call, **named: used.append(name) or call(*values, **named)  # noqa: E731
        monkeypatch.setattr(tuning.matvec, name, spy)
    entry = next(entry for entry in tiny.FAMILIES if entry[0] == family)
    model = make_model(entry, "mixed").to(DEVICE)
    engine = Engine(model, ops="triton")
    assert not measured, "a batch needs no products of one row"
    tokens = torch.randint(3, 97, (1, 12), generator=torch.Generator().manual_seed(1)).to(DEVICE)
    session = engine.session(1, 16, 4, graph=False)
    count = len(measured)
    # Every weight of a step and no other, the gates' twice.
    program = engine.program
    weights = [weight for layer in program.layers for weight in (layer.project, layer.output) if weight is not None]
    assert sum(map(len, measured)) == len(weights) + 3 * len(program.layers) + 1
    session.prefill(tokens[:, :-1])
    used.clear()
    session.state.token.copy_(tokens[:, -1])
    session.advance()
    with torch.inference_mode():
        torch.testing.assert_close(session.logits, model(tokens).logits[:, -1], rtol=1e-4, atol=1e-4)
    products = len(weights) + len(program.layers) + 1
    assert used.count("gated_matvec") == (len(program.layers) if way else 0)
    assert used.count("matvec") == (products if way else 0)
    engine.session(1, 16, 4, graph=False)
    assert len(measured) == count


@pytest.mark.skipif(not torch.cuda.is_available(), reason="measures on a CUDA device")
def test_a_measurement_finds_the_faster_way():
    from torch.nn import functional

    from uniattn_cli.inference import tuning

    # Small enough for the cache: copies are what keeps it from being measured.
    weight, x = (torch.randn(size, 2048, device="cuda").bfloat16() for size in (1024, 1))
    once = lambda weight: functional.linear(x, weight)  # noqa: E731
    assert tuning.fastest({"twice": lambda weight: (once(weight), once(weight)), "once": once}, [weight]) == "once"
    [milliseconds] = tuning.measure({"once": once}, [weight]).values()
    # No device reads this fast from memory.
    assert weight.nbytes / milliseconds * 1e3 < 1e13


@needs_triton
@pytest.mark.parametrize("layout", ["mixed", "leader", "early"])
@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3", "gemma2", "olmo2", "phi3", "smollm3"])
def test_a_model_on_kernels_gives_the_logits_of_transformers(family, layout):
    from uniattn_cli.inference.lending import plan_lending

    entry = next(entry for entry in tiny.FAMILIES if entry[0] == family)
    engine = Engine(make_model(entry, layout).to(DEVICE), ops="triton")
    assert engine.ops.name == "triton"
    # Leaders of one layout serve their followers.
    followers = {layer.index for layer in engine.program.layers if layer.kind.borrows_maps}
    assert layout != "leader" or (followers and set(plan_lending(engine.program).slots) == followers)
    assert engine.difference < 1e-5


# --- compiled for a GPU that is not there -----------------------------------------------------------------------------


class Recorder:
    """Stands in for a kernel and compiles it for Hopper with the arguments of each call, instead of running it."""

    def __init__(self, kernel, found):
        self.kernel, self.found = kernel, found

    def __getitem__(self, grid):
        return self.compile

    def compile(self, *arguments, num_warps=4, num_stages=3, **constants):
        import triton
        from triton.backends.compiler import GPUTarget
        from triton.compiler import ASTSource

        names = self.kernel.arg_names
        values = dict(zip(names, arguments, strict=False)) | constants
        signature, attributes = {}, {}
        for index, name in enumerate(names):
            value = values[name]
            if name.isupper():
                signature[name] = "constexpr"
            elif isinstance(value, torch.Tensor):
                signature[name] = "*" + TYPES[value.dtype]
                attributes[(index,)] = [["tt.divisibility", 16]]
            else:
                signature[name] = "i32" if isinstance(value, int) else "fp32"
                if isinstance(value, int) and value % 16 == 0:
                    attributes[(index,)] = [["tt.divisibility", 16]]
        source = ASTSource(self.kernel, signature, {name: values[name] for name in names if name.isupper()}, attributes)
        options = {"num_warps": num_warps, "num_stages": num_stages}
        compiled = triton.compile(source, target=GPUTarget("cuda", 90, 32), options=options)
        # What a program of this generation may have.
        assert compiled.metadata.shared <= 227 * 1024
        self.found.append((self.kernel.__name__, compiled.asm["ptx"]))


TYPES = {
    torch.float32: "fp32",
    torch.bfloat16: "bf16",
    torch.float16: "fp16",
    torch.int64: "i64",
    torch.int32: "i32",
}


@pytest.fixture
def compiled(monkeypatch):
    """A list that fills with (kernel, assembly) while operations are called on the CPU."""
    from uniattn_cli.inference import kernels, matvec, pointwise

    found = []
    for module in (kernels, matvec, pointwise):
        for name in [name for name in vars(module) if name.endswith("_kernel")]:
            monkeypatch.setattr(module, name, Recorder(getattr(module, name), found))
    return found


@pytest.mark.skipif(
    importlib.util.find_spec("triton") is None or INTERPRETED, reason="needs triton and no TRITON_INTERPRET"
)
@pytest.mark.parametrize(
    ("dtype", "options"),
    [
        (torch.bfloat16, {"head_dim": 128}),
        (torch.bfloat16, {"head_dim": 128, "block": BLOCKS[1]}),
        (torch.float16, {"head_dim": 96, "softcap": 2.0, "window": 70}),
        pytest.param(torch.float32, {"head_dim": 256}, marks=pytest.mark.slow),
    ],
    ids=str,
)
def test_attention_kernels_compile_for_hopper_and_read_whole_vectors(compiled, dtype, options, monkeypatch):
    from uniattn_cli.inference import triton_ops

    monkeypatch.setattr(triton_ops, "choose_splits", lambda *arguments: 3)
    make_trial(triton_ops.TritonOps, dtype, **options)
    assert {name for name, _ in compiled} == {"lead_kernel", "follow_kernel", "merge_kernel"}
    for name, assembly in compiled:
        if name != "merge_kernel" and dtype != torch.float32:
            # Keys and values go through shared memory in pieces of 16 bytes; smaller ones would halve the speed.
            assert "cp.async.cg.shared.global" in assembly and "0x10" in assembly
    compiled.clear()
    make_trial(triton_ops.TritonOps, dtype, layers=SERVED, **options)
    assert {name for name, _ in compiled} == {"lead_kernel", "receive_kernel", "merge_kernel"}
    leaders = [assembly for name, assembly in compiled if name == "lead_kernel"]
    assert dtype == torch.float32 or all("cp.async.cg.shared.global" in assembly for assembly in leaders)
    compiled.clear()
    make_trial(triton_ops.TritonOps, dtype, layers=EARLY, **options)
    assert {name for name, _ in compiled} == {"lead_kernel", "receive_kernel", "follow_kernel", "merge_kernel"}


@pytest.mark.skipif(
    importlib.util.find_spec("triton") is None or INTERPRETED, reason="needs triton and no TRITON_INTERPRET"
)
@pytest.mark.parametrize("block", BLOCKS)
def test_maps_are_asked_to_stay_in_the_cache(compiled, block):
    from uniattn_cli.inference import triton_ops

    make_trial(triton_ops.TritonOps, torch.bfloat16, head_dim=128, block=block)
    # The first layer lends its map, the last one does not.
    leaders = [assembly for name, assembly in compiled if name == "lead_kernel"]
    assert "st.global.L1::evict_last.L2::cache_hint" in leaders[0]
    assert "evict_last" not in leaders[-1]


@pytest.mark.skipif(
    importlib.util.find_spec("triton") is None or INTERPRETED, reason="needs triton and no TRITON_INTERPRET"
)
@pytest.mark.parametrize("setting", settings(), ids=str)
@pytest.mark.parametrize("columns", [4096, 8192, 14336, 4160])
def test_a_vector_product_compiles_for_hopper_and_reads_whole_vectors(compiled, columns, setting):
    from uniattn_cli.inference.matvec import gated_matvec, matvec

    weight, x = (torch.empty(size, columns, dtype=torch.bfloat16) for size in (1024, 1))
    matvec(x, weight, None, setting)
    gated_matvec(x, weight, "silu", setting)
    for (name, assembly), lanes in zip(compiled, (setting.rows, 2 * setting.rows), strict=True):
        loads = [line for line in assembly.splitlines() if "ld.global" in line]
        weights = [line for line in loads if "L1::evict_first" in line]
        # 16 bytes per thread and load, of the matrix and of the vector, and none through shared memory.
        assert loads and all(".v4.b32" in line for line in loads), name
        chunks = -(-columns // setting.block)
        assert len(weights) == chunks * lanes * setting.block // (setting.warps * 256), name


@pytest.mark.skipif(
    importlib.util.find_spec("triton") is None or INTERPRETED, reason="needs triton and no TRITON_INTERPRET"
)
@pytest.mark.parametrize("family", ["llama", "qwen3", "gemma2", "phi3"])
def test_every_kernel_of_a_model_compiles_for_hopper(compiled, family):
    from uniattn_cli.inference.triton_ops import TritonOps

    entry = next(entry for entry in tiny.FAMILIES if entry[0] == family)
    program = read_program(make_model(entry, "others").bfloat16())
    session = Session(program, 2, 64, 4, ops=TritonOps)
    session.prefill(torch.ones(2, 5, dtype=torch.int64))
    session.advance()
    expected = {"lead_kernel", "follow_kernel", "residual_norm_kernel", "place_kernel", "gate_kernel"}
    assert expected <= {name for name, _ in compiled}
