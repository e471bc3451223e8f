"""Attention kernels of one decoding step: leader, followers and PyTorch's own, at the shapes of a Llama-3.1-8B layer.

    python -m benchmarks.kernels --out docs/benchmarks/kernels.json
    python -m benchmarks.kernels --out docs/benchmarks/kernels_grid.json --parts grid
    python -m benchmarks.kernels --out docs/benchmarks/kernels_products.json --parts products

Needs one GPU, torch, triton and transformers. Every candidate is captured in a graph, and all take turns in each round.
Ratios are of medians. The part `grid` checks correctness over many shapes, `products` times products with one row.

A leader that weighs its followers' values does the work of several layers in one pass, so its time is compared with
that of cuDNN's full attention over as many keys and values, and with that of moving its keys and all values at the
speed of a copy. A follower costs what the pass takes longer than a layer that lends nothing, divided by the number of
followers, and the kernel that adds its newest value. In an early pass the borrowers have queries of their own.
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Callable

import torch
from torch.nn import functional
from torch.nn.attention import SDPBackend, sdpa_kernel

from benchmarks import runner
from uniattn_cli.inference.caches import Caches, whole_grains
from uniattn_cli.inference.ops import TorchOps
from uniattn_cli.inference.program import LayerProgram, Program
from uniattn_cli.inference.roofline import copy_bandwidth
from uniattn_cli.inference.trial import attention_program, decoding_step
from uniattn_cli.modeling.layout_uniattn import Layout
from uniattn_cli.models.device import captured, describe_device, take_turns, timed

HEADS, KV_HEADS, HEAD_DIM = 32, 8, 128
# batch x context, and what is asked of the follower and the leader there, as ratios to cuDNN's full attention.
SHAPES = {
    "64x8192": (1.8, 1.05),
    "16x8192": (1.6, 1.05),
    "64x2048": (1.6, 1.05),
    "1x65536": (None, None),
    "16x4096": (None, None),
    "1x4096": (None, None),
}
STOCK = {"cudnn": SDPBackend.CUDNN_ATTENTION, "flash": SDPBackend.FLASH_ATTENTION}
# Where a leader keeps its map: programs per multiprocessor, warps, stages, and the percentage of the L2 cache for it.
TUNINGS = [(1, 4, 4, 33), (1, 4, 4, 0), (1, 4, 4, 50), (1, 4, 4, 20), (1, 4, 4, 100), (2, 8, 3, 33), (2, 8, 3, 0)]
TUNINGS += [(2, 4, 3, 33), (2, 4, 3, 0), (1, 8, 4, 33), (1, 8, 4, 0)]
# Where a leader weighs its followers' values: programs per multiprocessor, warps, stages.
LENDING_TUNINGS = [(1, 4, 4), (1, 4, 3), (1, 8, 4), (2, 4, 3)]
# A lender with one follower, one with three, the same with layers that ask early, and a layer that lends nothing.
LAYERS = [{}, {"leader": 0}, {}, *[{"leader": 2}] * 3]
LAYERS += [{}, {"kind": "early", "leader": 6}, {}, *[{"kind": "early", "leader": 8}] * 3, {}]
PASSES = {"pass of 2": (0, 1), "pass of 4": (2, 3), "early pass of 2": (6, 1), "early pass of 4": (8, 3)}
# What a pass may take over the time of moving its keys and values at the speed of a copy.
OVER_COPY = 1.05
CALLS = 8
PARTS = ("grid", "products", "shapes")
# Rows and columns of the matrices that a step of one row is multiplied with, and the activation that follows.
PRODUCTS = {
    "query, key, value": (6144, 4096, ""),
    "value": (1024, 4096, ""),
    "output": (4096, 4096, ""),
    "output and W_c": (4096, 8192, ""),
    "gate and up": (28672, 4096, ""),
    "gate and up, gated": (28672, 4096, "silu"),
    "down": (4096, 14336, ""),
    "head": (128256, 4096, ""),
}
# For correctness: head size, query and key/value heads, window, soft-cap.
GRID = [
    (64, 32, 8, None, None),
    (64, 9, 3, None, None),
    (80, 32, 32, None, None),
    (96, 32, 32, 2047, None),
    (128, 32, 8, None, None),
    (128, 64, 8, 4096, None),
    (128, 16, 8, 300, 50.0),
    (256, 8, 4, 4096, 50.0),
    (256, 4, 1, 512, None),
]
GRID_BATCH, GRID_CONTEXT = 5, 6144
SHARE_OF_COPY = 0.9


def measure(
    batch: int, context: int, device: torch.device, rounds: int, tunings: list[tuple[int, ...]], block: int | None
) -> dict:
    """Milliseconds of every candidate, all rounds, and how far the kernels are from float64."""
    layout = Layout.from_list(LAYERS, compensation="none")
    program = attention_program(
        layout, heads=HEADS, kv_heads=KV_HEADS, head_dim=HEAD_DIM, dtype=torch.bfloat16, device=device
    )
    caches = Caches(program, batch, context, block=block)
    caches.flat.normal_()
    step = decoding_step(caches, [0] * batch, [context] * batch)
    queries = torch.randn(batch, 4 * HEADS, HEAD_DIM, device=device, dtype=torch.bfloat16)
    out = torch.empty(batch, HEADS * HEAD_DIM, device=device, dtype=torch.bfloat16)
    candidates, failures, errors = {}, {}, {}

    def attempt(name: str, call: Callable[[], None]) -> None:
        """Captures a candidate, or notes why it cannot run here: backends and launch settings have their limits."""
        try:
            candidates[name] = milliseconds(call, device)
        except Exception as problem:
            failures[name] = f"{type(problem).__name__}: {problem}".splitlines()[0][:200]

    def add(role: str, name: str, ops: TorchOps, index: int) -> None:
        layer = program.layers[index]
        first = first_query(program, layer)
        own = queries[:, first : first + max(layer.placed_heads, HEADS)] if "q" in layer.kind.projects else None
        call = lambda: ops.decode(layer, own, step, out)  # noqa: E731
        attempt(f"{role} {name}", call)
        if f"{role} {name}" in candidates:
            errors[f"{role} {name}"] = error(program, layer, caches, queries, out)

    last = len(LAYERS) - 1
    for name, ops in operations(program, caches, tunings, device, lending=False).items():
        for role, index in (("leader", 0), ("follower", 1), ("alone", last)):
            add(role, name, ops, index)
    for name, ops in operations(program, caches, LENDING_TUNINGS[: len(tunings)], device).items():
        for role, (index, followers) in PASSES.items():
            add(role, name, ops, index)
            add(role.replace("pass", "newest"), name, ops, index + followers)
    for name, backend in STOCK.items() if device.type == "cuda" else ():
        # Or query heads of a group as queries of one head: the same sums, for kernels that know no groups.
        for way, shape in (("", (HEADS, 1)), (" grouped", (KV_HEADS, HEADS // KV_HEADS))):
            shaped = queries[:, :HEADS].reshape(batch, *shape, HEAD_DIM)
            call = lambda backend=backend, shaped=shaped: stock(backend, shaped, caches)  # noqa: E731
            attempt(name + way, call)
    times = take_turns(candidates, rounds)
    return {"block": caches.block, "times": times, "errors": errors, "failures": failures}


def measure_product(rows: int, columns: int, activation: str, device: torch.device) -> dict:
    """Milliseconds of the library and of our kernel with every launch setting, and the bytes per second of each."""
    # Needs Triton, which the other parts can do without.
    from uniattn_cli.inference import tuning

    weights = [torch.randn(rows, columns, device=device, dtype=torch.bfloat16)]
    x = torch.randn(1, columns, device=device, dtype=torch.bfloat16)
    candidates = tuning.gate_candidates(x, activation) if activation else tuning.product_candidates(x)
    measured = tuning.measure(candidates, weights)
    times = {"library" if key is None else ",".join(map(str, key)): value for key, value in measured.items()}
    return {
        "bytes": weights[0].nbytes,
        "best": min(times, key=times.__getitem__),
        "ms": times,
        "bytes_per_second": {name: weights[0].nbytes / value * 1e3 for name, value in times.items()},
    }


def check_shape(
    device: torch.device, head_dim: int, heads: int, kv_heads: int, window: int | None, softcap: float | None
) -> dict:
    """Kernels over caches that are filled raggedly, every kind of layer, against the plain operations in float64."""
    free = " ".join(f"{head % 2}:{(7 * head + 3) % heads}" for head in range(heads))
    crossed = " ".join(f"{head % 2}:{kv_heads - 1 - head}" for head in range(kv_heads))
    turned = " ".join(f"9:{kv_heads - 1 - head}" for head in range(kv_heads))
    # Layers 0 and 1 keep their maps for others, layer 6 serves its followers, layer 9 those that ask early.
    group = heads // kv_heads
    first = " ".join(f"6:{head // group * group}" for head in range(heads))
    layout = Layout.from_list(
        [
            *({}, {}, {"leader": 1}, {"heads": free}, {"kind": "key", "heads": crossed}),
            *({"kind": "kv", "heads": crossed}, {}, {"leader": 6}, {"heads": first}),
            *({}, {"kind": "early", "leader": 9}, {"kind": "early-kv", "heads": turned}),
        ],
        compensation="none",
    )
    context = GRID_CONTEXT if device.type == "cuda" else 192
    starts = [0, context // 3, 0, context - 70, 1]
    ends = [context, context, 1, context - 5, context // 2]
    sizes = {"heads": heads, "kv_heads": kv_heads, "head_dim": head_dim, "window": window, "softcap": softcap}
    errors = {}
    # Large kernels in float32 take minutes to compile and nobody decodes with them.
    for dtype in (torch.bfloat16, torch.float16, *([torch.float32] if head_dim == 64 else [])):
        outputs, kept = [], None
        torch.manual_seed(0)
        queries = torch.randn(len(layout), GRID_BATCH, heads, head_dim, device=device).to(dtype)
        for kind in (dtype, torch.float64):
            program = attention_program(layout, dtype=kind, device=device, **sizes)
            caches = Caches(program, GRID_BATCH, whole_grains(context))
            kept = caches.flat.normal_() if kept is None else kept
            caches.flat.copy_(kept)
            ops = TorchOps(program, caches)
            if kind != torch.float64:
                ops = next(iter(operations(program, caches, TUNINGS[:1], device).values()))
            step = decoding_step(caches, starts, ends)
            out = torch.zeros(len(layout), GRID_BATCH, heads * head_dim, dtype=kind, device=device)
            for layer in program.layers:
                ops.decode(layer, placed(layer, queries.to(kind)), step, out[layer.index])
            outputs.append(out.double())
        difference = (outputs[0] - outputs[1]).abs().max() / outputs[1].abs().max()
        errors[str(dtype).removeprefix("torch.")] = difference.item()
    return {**sizes, "errors": errors}


def placed(layer: LayerProgram, queries: torch.Tensor) -> torch.Tensor | None:
    """What a session gives an operation: a layer's queries and those of others that it projects, of all layers'."""
    if not layer.placed_heads:
        # Those that ask early and are not served have been asked for.
        return queries[layer.index] if layer.kind.early else None
    asked = [queries[one.borrower][:, one.first : one.first + one.heads] for one in layer.asked]
    return torch.cat([queries[layer.index], *asked], dim=1)


def operations(
    program: Program, caches: Caches, tunings: list[tuple[int, ...]], device: torch.device, *, lending: bool = True
) -> dict[str, TorchOps]:
    """The kernels with every launch setting; without a GPU the plain operations, to try the benchmark itself."""
    if device.type != "cuda":
        return {"plain": TorchOps(program, caches)}
    from uniattn_cli.inference.triton_ops import TritonOps, Tuning

    return {
        ",".join(map(str, values)): TritonOps(program, caches, lending=lending, tuning=Tuning(*values))
        for values in tunings
    }


def stock(backend: SDPBackend, queries: torch.Tensor, caches: Caches) -> None:
    """Full attention by one of PyTorch's kernels, over the keys and values of the leader."""
    with sdpa_kernel([backend]):
        grouped = queries.shape[1] != KV_HEADS
        functional.scaled_dot_product_attention(queries, caches.keys[0], caches.values[0], enable_gqa=grouped)


def milliseconds(call: Callable[[], None], device: torch.device) -> Callable[[], float]:
    """A function that returns the milliseconds of one call, replayed from a graph on a GPU."""
    if device.type == "cuda":
        return captured([call] * CALLS)
    call()

    def once() -> float:
        seconds: list[float] = []
        with timed(seconds, device):
            call()
        return seconds[0] * 1e3

    return once


def first_query(program: Program, layer: LayerProgram) -> int:
    """Where a layer's queries begin among those that are placed at once: behind its lender's own if it asks early."""
    if not layer.kind.early:
        return 0
    asked = [one.borrower for one in program.layers[layer.plan.leader].asked]
    return HEADS * (1 + asked.index(layer.index))


def error(program: Program, layer: LayerProgram, caches: Caches, queries: torch.Tensor, out: torch.Tensor) -> float:
    """Largest difference to float64 attention with whole maps, relative to the largest output, over two rows."""
    worst = 0.0
    source = layer.index if layer.plan.leader is None else layer.plan.leader
    first = first_query(program, layer)
    for row in {0, len(out) - 1}:
        keys = caches.keys[source][row].double().repeat_interleave(HEADS // KV_HEADS, dim=0)
        values = caches.values[layer.index][row].double().repeat_interleave(HEADS // KV_HEADS, dim=0)
        scores = torch.einsum("hd,hkd->hk", queries[row, first : first + HEADS].double(), keys) * HEAD_DIM**-0.5
        wanted = torch.einsum("hk,hkd->hd", scores.softmax(-1), values)
        found = out[row].view(HEADS, HEAD_DIM).double()
        worst = max(worst, ((found - wanted).abs().max() / wanted.abs().max()).item())
    return worst


def judge(shape: str, found: dict, bandwidth: float) -> dict:
    """The best launch setting of each role, its share of the copy bandwidth, and the ratios that are asked for."""
    batch, context = (int(part) for part in shape.split("x"))
    medians = {name: statistics.median(values) for name, values in found["times"].items()}
    head_bytes = batch * context * KV_HEADS * HEAD_DIM * 2
    maps = batch * HEADS * context * 2
    # What a role must read; a map is read by followers and written by leaders.
    bytes_of = {"leader": 2 * head_bytes + maps, "follower": head_bytes + maps, "alone": 2 * head_bytes}
    bytes_of |= {role: (2 + followers) * head_bytes for role, (_, followers) in PASSES.items()}
    bytes_of |= {role.replace("pass", "newest"): 0 for role in PASSES}
    best = {}
    for role, count in bytes_of.items():
        own = {name: value for name, value in medians.items() if name.rpartition(" ")[0] == role}
        if own:
            name = min(own, key=own.get)
            speed = count / own[name] * 1e3
            best[role] = {"setting": name.split(" ")[-1], "ms": own[name], "of_copy": speed / bandwidth, "bytes": count}
    stock_ms = {name: value for name, value in medians.items() if name.split(" ")[0] in STOCK}
    over = {role: 1 / best[role]["of_copy"] for role in PASSES if role in best}
    result = {"best": best, "stock_ms": stock_ms, "pass_over_copy": over}
    # The faster of its two ways.
    cudnn = min((value for name, value in stock_ms.items() if name.startswith("cudnn")), default=None)
    if cudnn and best:
        faster, slower = SHAPES.get(shape, (None, None))
        result["leader_over_cudnn"], result["cudnn_over_follower"], result["follower_of_copy"] = {}, {}, {}
        for role, (_, followers) in PASSES.items():
            took = best[role]["ms"]
            follower = (took - best["alone"]["ms"]) / followers + best[role.replace("pass", "newest")]["ms"]
            result["leader_over_cudnn"][role] = took / (1 + followers / 2) / cudnn
            result["cudnn_over_follower"][role] = cudnn / follower
            result["follower_of_copy"][role] = head_bytes / follower * 1e3 / bandwidth
        # With a map that is kept, as free head maps need it.
        result["leader_over_cudnn"]["map"] = best["leader"]["ms"] / cudnn
        result["cudnn_over_follower"]["map"] = cudnn / best["follower"]["ms"]
        result["follower_of_copy"]["map"] = best["follower"]["of_copy"]
        if faster:
            result["met"] = {
                f"follower {faster}x": min(result["cudnn_over_follower"].values()) >= faster,
                f"leader within {slower}": max(result["leader_over_cudnn"][role] for role in PASSES) <= slower,
                f"leader that keeps its map within {slower}": result["leader_over_cudnn"]["map"] <= slower,
                "follower at the copy's speed": min(result["follower_of_copy"].values()) >= SHARE_OF_COPY,
                f"early pass within {OVER_COPY} of the copy": max(
                    value for role, value in over.items() if role.startswith("early")
                )
                <= OVER_COPY,
            }
    return result


def add_options(parser: argparse.ArgumentParser) -> None:
    """The options of this benchmark."""
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=["shapes"])
    parser.add_argument("--shapes", nargs="+", default=list(SHAPES), metavar="BxT", help="batch x context")
    parser.add_argument("--block", type=int, help="keys that a kernel handles at once; default: as the engine chooses")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--tunings", type=int, default=len(TUNINGS), help="how many of the launch settings to try")


def measure_parts(arguments: argparse.Namespace, results: runner.Results) -> None:
    """All parts that were asked for."""
    device, parts = arguments.device, arguments.parts
    sizes = {"heads": HEADS, "kv_heads": KV_HEADS, "head_dim": HEAD_DIM, "dtype": "bfloat16"}
    results.begin({"device": describe_device(device), **sizes})
    bandwidth = results.content["copy_bandwidth"] = copy_bandwidth(device)
    print(f"{describe_device(device)}: copies at {bandwidth / 1e9:.0f} GB/s")
    grid = {json.dumps(shape): shape for shape in GRID}
    for name in results.missing("grid", grid) if "grid" in parts else ():
        results.add("grid", name, check_shape(device, *grid[name]))
    for name in results.missing("products", PRODUCTS) if "products" in parts else ():
        results.add("products", name, measure_product(*PRODUCTS[name], device))
    for shape in results.missing("shapes", arguments.shapes) if "shapes" in parts else ():
        batch, context = (int(part) for part in shape.split("x"))
        row = measure(batch, context, device, arguments.rounds, TUNINGS[: arguments.tunings], arguments.block)
        row |= judge(shape, row, bandwidth)
        results.add("shapes", shape, row, {key: row[key] for key in row if key != "times"})


if __name__ == "__main__":
    runner.run("kernels", __doc__, PARTS, add_options, measure_parts)
