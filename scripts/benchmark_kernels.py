"""Attention kernels of one decoding step: leader, followers and PyTorch's own, at the shapes of a Llama-3.1-8B layer.

    python scripts/benchmark_kernels.py --out docs/benchmarks/kernels.json
    python scripts/benchmark_kernels.py --out docs/benchmarks/kernels_grid.json --grid
    python scripts/benchmark_kernels.py --out docs/benchmarks/kernels_products.json --products

Needs one GPU and nothing but torch, triton and this repository on PYTHONPATH. Every candidate is captured in a graph;
in each round all of them have their turn. Ratios are of medians. `--block` tries another size of the blocks of keys.

A leader that weighs its followers' values does the work of several layers in one pass, so its time is compared with
that of cuDNN's full attention over as many keys and values. A follower costs what the pass takes longer than a layer
that lends nothing, divided by the number of followers, and the kernel that adds its newest value.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch.nn import functional
from torch.nn.attention import SDPBackend, sdpa_kernel

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
# A leader with one follower, one with three, and a layer that lends nothing.
LAYERS = [{}, {"leader": 0}, {}, *[{"leader": 2}] * 3, {}]
PASSES = {"pass of 2": (0, 1), "pass of 4": (2, 3)}
CALLS = 8
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


def main() -> None:
    """Reads the command line and measures."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--shapes", nargs="*", default=list(SHAPES), metavar="BxT")
    parser.add_argument("--block", type=int, help="keys that a kernel handles at once; default: as the engine chooses")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--tunings", type=int, default=len(TUNINGS), help="how many of the launch settings to try")
    parser.add_argument("--grid", action="store_true", help="check correctness over many shapes instead of speed")
    parser.add_argument("--products", action="store_true", help="time products with one row instead of attention")
    parser.add_argument("--device", default="cuda")
    arguments = parser.parse_args()
    from uniattn_cli.inference.roofline import copy_bandwidth
    from uniattn_cli.models.device import describe_device

    device = torch.device(arguments.device)
    started = time.perf_counter()
    content = {
        "device": describe_device(device),
        "torch": torch.__version__,
        "heads": HEADS,
        "kv_heads": KV_HEADS,
        "head_dim": HEAD_DIM,
        "dtype": "bfloat16",
        "copy_bandwidth": copy_bandwidth(device),
        "shapes": {},
    }
    print(f"{content['device']}: copies at {content['copy_bandwidth'] / 1e9:.0f} GB/s")

    def keep(line: str) -> None:
        """Says what was just measured, and writes all that is known."""
        print(line, flush=True)
        content["seconds"] = time.perf_counter() - started
        arguments.out.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")

    for shape in GRID if arguments.grid else ():
        content.setdefault("grid", []).append(check_shape(device, *shape))
        keep(json.dumps(content["grid"][-1]))
    for name, (rows, columns, activation) in PRODUCTS.items() if arguments.products else ():
        found = measure_product(rows, columns, activation, device)
        content.setdefault("products", {})[name] = found
        keep(f"{name}: {json.dumps(found)}")
    for shape in () if arguments.grid or arguments.products else arguments.shapes:
        batch, context = (int(part) for part in shape.split("x"))
        found = measure(batch, context, device, arguments.rounds, TUNINGS[: arguments.tunings], arguments.block)
        found |= judge(shape, found, content["copy_bandwidth"])
        content["shapes"][shape] = found
        keep(f"{shape}: {json.dumps({key: found[key] for key in found if key != 'times'})}")


def measure(
    batch: int, context: int, device: torch.device, rounds: int, tunings: list[tuple[int, ...]], block: int | None
) -> dict:
    """Milliseconds of every candidate, all rounds, and how far the kernels are from float64."""
    from uniattn_cli.inference.caches import Caches
    from uniattn_cli.inference.trial import attention_program, decoding_step
    from uniattn_cli.modeling.layout_uniattn import Layout

    layout = Layout.from_list(LAYERS, compensation="none")
    program = attention_program(
        layout, heads=HEADS, kv_heads=KV_HEADS, head_dim=HEAD_DIM, dtype=torch.bfloat16, device=device
    )
    caches = Caches(program, batch, context, block=block)
    caches.flat.normal_()
    step = decoding_step(caches, [0] * batch, [context] * batch)
    queries = torch.randn(batch, HEADS, HEAD_DIM, device=device, dtype=torch.bfloat16)
    out = torch.empty(batch, HEADS * HEAD_DIM, device=device, dtype=torch.bfloat16)
    candidates, failures, errors = {}, {}, {}

    def add(role: str, name: str, ops, index: int) -> None:
        layer = program.layers[index]
        call = lambda: ops.decode(layer, queries if layer.parts != "v" else None, step, out)  # noqa: E731
        attempt(f"{role} {name}", call, candidates, failures, device)
        if f"{role} {name}" in candidates:
            errors[f"{role} {name}"] = error(layer, caches, queries, out, batch)

    last = len(LAYERS) - 1
    for name, ops in operations(program, caches, tunings, device, lending=False).items():
        for role, index in (("leader", 0), ("follower", 1), ("alone", last)):
            add(role, name, ops, index)
    for name, ops in operations(program, caches, LENDING_TUNINGS[: len(tunings)], device).items():
        for role, (index, followers) in PASSES.items():
            add(role, name, ops, index)
            add(f"newest of {followers + 1}", name, ops, index + followers)
    for name, backend in STOCK.items() if device.type == "cuda" else ():
        # Or query heads of a group as queries of one head: the same sums, for kernels that know no groups.
        for way, shape in (("", (HEADS, 1)), (" grouped", (KV_HEADS, HEADS // KV_HEADS))):
            shaped = queries.view(batch, *shape, HEAD_DIM)
            call = lambda backend=backend, shaped=shaped: stock(backend, shaped, caches)  # noqa: E731
            attempt(name + way, call, candidates, failures, device)
    times = {name: [] for name in candidates}
    for _ in range(rounds):
        for name, run in candidates.items():
            times[name].append(run())
    return {"block": caches.block, "times": times, "errors": errors, "failures": failures}


def measure_product(rows: int, columns: int, activation: str, device: torch.device) -> dict:
    """Milliseconds of the library and of our kernel with every launch setting, and the bytes per second of each."""
    from uniattn_cli.inference import tuning

    weights = [torch.randn(rows, columns, device=device, dtype=torch.bfloat16)]
    x = torch.randn(1, columns, device=device, dtype=torch.bfloat16)
    candidates = tuning.gate_candidates(x, activation) if activation else tuning.product_candidates(x)
    milliseconds = tuning.measure(candidates, weights)
    times = {"library" if key is None else ",".join(map(str, key)): value for key, value in milliseconds.items()}
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
    from uniattn_cli.inference.caches import Caches, whole_grains
    from uniattn_cli.inference.ops import TorchOps
    from uniattn_cli.inference.trial import attention_program, decoding_step
    from uniattn_cli.modeling.layout_uniattn import Layout

    free = " ".join(f"{head % 2}:{(7 * head + 3) % heads}" for head in range(heads))
    crossed = " ".join(f"{head % 2}:{kv_heads - 1 - head}" for head in range(kv_heads))
    # Layers 0 and 1 keep their maps for others, layer 6 serves its followers.
    group = heads // kv_heads
    first = " ".join(f"6:{head // group * group}" for head in range(heads))
    layout = Layout.from_list(
        [
            *({}, {}, {"leader": 1}, {"heads": free}, {"kind": "key", "heads": crossed}),
            *({"kind": "kv", "heads": crossed}, {}, {"leader": 6}, {"heads": first}),
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
            exact = kind == torch.float64
            ops = (
                TorchOps(program, caches)
                if exact
                else next(iter(operations(program, caches, TUNINGS[:1], device).values()))
            )
            step = decoding_step(caches, starts, ends)
            out = torch.zeros(len(layout), GRID_BATCH, heads * head_dim, dtype=kind, device=device)
            for layer in program.layers:
                own = queries[layer.index].to(kind) if "q" in layer.parts else None
                ops.decode(layer, own, step, out[layer.index])
            outputs.append(out.double())
        errors[str(dtype).removeprefix("torch.")] = (
            (outputs[0] - outputs[1]).abs().max() / outputs[1].abs().max()
        ).item()
    return {**sizes, "errors": errors}


def operations(program, caches, tunings: list[tuple[int, ...]], device: torch.device, *, lending: bool = True) -> dict:
    """The kernels with every launch setting; without a GPU the plain operations, to try the script itself."""
    if device.type != "cuda":
        from uniattn_cli.inference.ops import TorchOps

        return {"plain": TorchOps(program, caches)}
    from uniattn_cli.inference.triton_ops import TritonOps, Tuning

    return {
        ",".join(map(str, values)): TritonOps(program, caches, lending=lending, tuning=Tuning(*values))
        for values in tunings
    }


def stock(backend: SDPBackend, queries: torch.Tensor, caches) -> None:
    """Full attention by one of PyTorch's kernels, over the keys and values of the leader."""
    with sdpa_kernel([backend]):
        grouped = queries.shape[1] != KV_HEADS
        functional.scaled_dot_product_attention(queries, caches.keys[0], caches.values[0], enable_gqa=grouped)


def attempt(name: str, call: Callable[[], None], candidates: dict, failures: dict, device: torch.device) -> None:
    """Captures a candidate, or notes why it cannot run here: backends and launch settings have limits of their own."""
    try:
        candidates[name] = captured(call, device)
    except Exception as problem:
        failures[name] = f"{type(problem).__name__}: {problem}".splitlines()[0][:200]


def captured(call: Callable[[], None], device: torch.device) -> Callable[[], float]:
    """A function that runs `CALLS` calls from a graph and returns milliseconds of one."""
    for _ in range(3):
        call()
    if device.type != "cuda":

        def timed() -> float:
            started = time.perf_counter()
            call()
            return (time.perf_counter() - started) * 1e3

        return timed
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(CALLS):
            call()
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))

    def replay(call=call) -> float:
        # Holding on to `call` keeps the memory that the graph works on.
        begin.record()
        graph.replay()
        end.record()
        end.synchronize()
        return begin.elapsed_time(end) / CALLS

    return replay


def error(layer, caches, queries: torch.Tensor, out: torch.Tensor, batch: int) -> float:
    """Largest difference to float64 attention with whole maps, relative to the largest output, over two rows."""
    worst = 0.0
    for row in {0, batch - 1}:
        source = layer.plan.leader if layer.kind.borrows_maps else layer.index
        keys = caches.keys[source][row].double().repeat_interleave(HEADS // KV_HEADS, dim=0)
        values = caches.values[layer.index][row].double().repeat_interleave(HEADS // KV_HEADS, dim=0)
        scores = torch.einsum("hd,hkd->hk", queries[row].double(), keys) * HEAD_DIM**-0.5
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
    bytes_of |= {f"newest of {followers + 1}": 0 for _, followers in PASSES.values()}
    best = {}
    for role, count in bytes_of.items():
        own = {name: value for name, value in medians.items() if name.rpartition(" ")[0] == role}
        if own:
            name = min(own, key=own.get)
            speed = count / own[name] * 1e3
            best[role] = {"setting": name.split(" ")[-1], "ms": own[name], "of_copy": speed / bandwidth, "bytes": count}
    stock_ms = {name: value for name, value in medians.items() if name.split(" ")[0] in STOCK}
    result = {"best": best, "stock_ms": stock_ms}
    # The faster of its two ways.
    cudnn = min((value for name, value in stock_ms.items() if name.startswith("cudnn")), default=None)
    if cudnn and best:
        faster, slower = SHAPES.get(shape, (None, None))
        result["leader_over_cudnn"], result["cudnn_over_follower"], result["follower_of_copy"] = {}, {}, {}
        for role, (_, followers) in PASSES.items():
            took = best[role]["ms"]
            follower = (took - best["alone"]["ms"]) / followers + best[f"newest of {followers + 1}"]["ms"]
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
            }
    return result


if __name__ == "__main__":
    sys.exit(main())
