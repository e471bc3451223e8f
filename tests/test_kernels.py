"""The attention of a decoding step against maps in float64: the plain form always, the kernels where Triton is.

On a machine without CUDA: `pip install triton "numpy<2.4"` and `TRITON_INTERPRET=1 pytest tests/test_kernels.py`.
"""

from __future__ import annotations

import importlib.util
import os

import pytest
import tiny
import torch
from test_inference import make_model

from uniattn_cli.inference.caches import BLOCKS, Caches, choose_block
from uniattn_cli.inference.engine import Engine
from uniattn_cli.inference.ops import TorchOps
from uniattn_cli.inference.program import read_program
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


def make_trial(ops, dtype, *, reuse=True, head_dim=64, block=BLOCKS[0], **options):
    """Layers with random caches; returns the attention outputs of all of them, and what made them."""
    layout = Layout.from_list(LAYERS, compensation="none")
    program = attention_program(layout, heads=6, kv_heads=3, head_dim=head_dim, dtype=dtype, device=DEVICE, **options)
    caches = Caches(program, len(STARTS), 192 if block == BLOCKS[0] else 256, block=block)
    torch.manual_seed(0)
    caches.flat.copy_(torch.randn(caches.flat.shape))
    # What was left in unused places must not matter.
    caches.maps.fill_(7.0), caches.block_max.fill_(3.0)
    queries = torch.randn(len(LAYERS), len(STARTS), 6, head_dim).mul(2).to(DEVICE, dtype)
    step = decoding_step(caches, STARTS, ENDS)
    operations = ops(program, caches, reuse=reuse)
    found = []
    for layer in program.layers:
        out = torch.full((len(STARTS), 6 * head_dim + 8), 5.0, dtype=dtype, device=DEVICE)
        own = queries[layer.index] if "q" in layer.parts else None
        operations.decode(layer, own, step, out[:, : 6 * head_dim])
        assert (out[:, 6 * head_dim :] == 5.0).all()
        found.append(out[:, : 6 * head_dim].unflatten(1, (6, head_dim)))
    return program, caches, queries, found


def materialised(program, caches, queries):
    """The same from whole maps in float64, head by head, as the layout reads."""
    outputs = []
    for layer in program.layers:
        rows = []
        for row, (start, end) in enumerate(zip(STARTS, ENDS, strict=True)):
            low = start if layer.window is None else max(start, end - layer.window)
            rows.append(torch.stack([one_head(program, caches, queries, layer, row, h, low, end) for h in range(6)]))
        outputs.append(torch.stack(rows))
    return outputs


def one_head(program, caches, queries, layer, row, head, low, end):
    group, kind = 2, layer.kind
    source, query_head = layer.query_sources[head] if kind == "softmax" else (layer.index, head)
    own = layer.index, head // (6 // layer.kv_heads)
    borrowed = layer.key_sources[head // group] if kind in ("key", "kv") else own
    key = (source, query_head // group) if kind == "softmax" else borrowed
    value = borrowed if kind == "kv" else own
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
        assert difference <= TOLERANCES[dtype] * 4, f"layer {layer.index} ({layer.kind}): {difference:.1e}"


@pytest.mark.parametrize("reuse", [True, False], ids=["reuse", "recompute"])
@pytest.mark.parametrize("options", CASES.values(), ids=CASES)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_plain_operations_equal_materialised_maps(dtype, options, reuse):
    check(TorchOps, dtype, reuse, options)


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


@needs_triton
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("rows", "columns"), [(5, 40), (700, 1500), (4096, 1024), (3000, 64)])
@pytest.mark.parametrize("bias", [False, True], ids=["", "bias"])
def test_a_vector_product_is_that_of_a_library(dtype, rows, columns, bias):
    from uniattn_cli.inference.matvec import matvec

    torch.manual_seed(0)
    # A view of wider rows, as the parts of a joined weight are.
    weight = torch.randn(rows, columns + 8).to(DEVICE, dtype)[:, :columns]
    x, offset = torch.randn(1, columns).to(DEVICE, dtype), torch.randn(rows).to(DEVICE, dtype)
    found = matvec(x, weight, offset if bias else None).double()
    wanted = torch.nn.functional.linear(x.double(), weight.double(), offset.double() if bias else None)
    tolerance = 3 * TOLERANCES[dtype]
    torch.testing.assert_close(found, wanted, rtol=tolerance, atol=tolerance * columns**0.5)


@needs_triton
@pytest.mark.parametrize("family", ["llama", "qwen3", "gemma2", "olmo2", "phi3", "smollm3"])
def test_a_model_on_kernels_gives_the_logits_of_transformers(family):
    entry = next(entry for entry in tiny.FAMILIES if entry[0] == family)
    engine = Engine(make_model(entry, "mixed").to(DEVICE), ops="triton")
    assert engine.ops.name == "triton"
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


@pytest.mark.skipif(
    importlib.util.find_spec("triton") is None or INTERPRETED, reason="needs triton and no TRITON_INTERPRET"
)
@pytest.mark.parametrize("block", BLOCKS)
def test_maps_are_stored_directly_without_a_barrier(compiled, block, monkeypatch):
    from uniattn_cli.inference import triton_ops

    barriers = {}
    for direct in (0, 1):
        monkeypatch.setenv("UNIATTN_LEAD", f"1,4,4,{direct}")
        del compiled[:]
        make_trial(triton_ops.TritonOps, torch.bfloat16, head_dim=128, block=block)
        # The first layer lends its map, the last one does not.
        leaders = [assembly for name, assembly in compiled if name == "lead_kernel"]
        barriers[direct] = leaders[0].count("bar.sync") - leaders[-1].count("bar.sync")
        assert ("@q st.global.b32" in leaders[0]) is bool(direct)
    assert barriers[0] > barriers[1] == 0


@pytest.mark.skipif(
    importlib.util.find_spec("triton") is None or INTERPRETED, reason="needs triton and no TRITON_INTERPRET"
)
@pytest.mark.parametrize(("rows", "columns"), [(6144, 4096), (4096, 8192), (1024, 4096)])
def test_a_vector_product_compiles_for_hopper_and_reads_whole_vectors(compiled, rows, columns):
    from uniattn_cli.inference.matvec import matvec

    weight, x = (torch.empty(size, columns, dtype=torch.bfloat16) for size in (rows, 1))
    matvec(x, weight, None)
    [(_, assembly)] = compiled
    # 16 bytes of the weight per thread and load.
    assert "ld.global.v4.b32" in assembly


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
