"""Whole decoding steps, prompts and capacity on a model shape with random weights, for the goals of fast inference.

    python -m benchmarks.decoding --out docs/benchmarks/decoding.json --parts steps

Needs one GPU and torch, triton and transformers; no downloads. Each part fits into ten minutes with everything that it
compiles.
"""

from __future__ import annotations

import argparse
import dataclasses
import time
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from transformers import PreTrainedModel

from benchmarks import runner
from uniattn_cli.inference.engine import Engine, decode
from uniattn_cli.inference.measurement import Measurement, largest_batch, measure_shape, measure_stock, random_prompt
from uniattn_cli.inference.roofline import copy_bandwidth
from uniattn_cli.layouts.shorthand import parse_groups
from uniattn_cli.modeling.configuration_uniattn import attention_shape
from uniattn_cli.models.device import clock, describe_device, release_memory
from uniattn_cli.models.of_run import BASE
from uniattn_cli.models.random import known_config, random_models
from uniattn_cli.run.files import now

PAPER, FOURS = "paper", "every:4"
# The same groups with layers that ask early, which need no W_c: as many weights.
EARLY = tuple(f"early@{groups}" for groups in (PAPER, FOURS))
# Steps under the profiler.
PROFILED = 4


def build(
    options: argparse.Namespace,
    groups: Sequence[str] = (PAPER, FOURS, *EARLY),
    compensation: str | int = "full",
    shape: str | None = None,
    dtype: str | None = None,
) -> dict[str, PreTrainedModel]:
    """A base with random weights and one model for each layout."""
    config = known_config(shape or options.shape, options.layers)
    shape_of = attention_shape(config)
    layouts = {text: parse_groups(text, shape_of, "none" if text in EARLY else compensation) for text in groups}
    dtype = dtype or ("bfloat16" if options.device.type == "cuda" else "float32")
    return random_models(config, layouts, dtype, options.device)


def engines_of(models: Mapping[str, PreTrainedModel]) -> dict[str, Engine]:
    """Checking an engine against transformers is part of making it."""
    return {name: Engine(model) for name, model in models.items()}


def run_shapes(
    options: argparse.Namespace,
    shapes: Sequence[tuple[int, int]],
    bandwidth: float,
    compensation: str | int | None = None,
    **settings: Any,
) -> list[Measurement]:
    """Base and layouts at all shapes, with a line for each as soon as it is known; names tell a compensation.

    Layers that ask early are left out where it is of low rank: they have none.
    """
    groups = (PAPER, FOURS) if isinstance(compensation, int) else (PAPER, FOURS, *EARLY)
    models, found = build(options, groups, compensation or "full"), []
    suffix = f", {compensation}" if compensation else ""
    plain = (BASE, *EARLY)
    engines = {name if name in plain else name + suffix: engine for name, engine in engines_of(models).items()}
    for batch, context in shapes:
        measured = measure_shape(engines, batch, max(context // options.scale, 8), bandwidth=bandwidth, **settings)
        for one in measured:
            print(f"  {one.model} {batch}x{context}: {line(one)}", flush=True)
        found += measured
    return found


def line(one: Measurement) -> str:
    """A measurement in a few words."""
    if not one.fits:
        return one.note
    words = [f"step {one.step.median * 1e3:.3f} ms"]
    words += [f"{one.step.median / one.floor:.3f} x floor"] if one.floor else []
    return ", ".join(words + ([f"first {one.first.median * 1e3:.1f} ms"] if one.first else []))


def ratios(measured: list[Measurement]) -> dict:
    """For each shape: steps over the floor, and tokens per second over the base's."""
    base = {(one.batch, one.context): one for one in measured if one.model == BASE}
    result = {}
    for one in measured:
        key, first = f"{one.model} {one.batch}x{one.context}", base[one.batch, one.context]
        if one.step is not None:
            result[key] = {"over_floor": one.step.median / one.floor}
            if first.step is not None:
                result[key]["over_base"] = first.step.median / one.step.median
        else:
            result[key] = {"note": one.note}
    return result


def packed(measured: list[Measurement], summary: dict, **more: dict) -> dict:
    """For the file."""
    return {"measurements": [dataclasses.asdict(one) for one in measured], "summary": summary, **more}


def steps(options: argparse.Namespace, bandwidth: float) -> dict:
    """Goals: at most 1.25 x the floor; 1.12 x and 1.30 x the base's tokens per second at 64 x 8k (wants 139 GiB).

    With early layers within 3 % of the same groups of followers.
    """
    shapes = [(1, 4096), (16, 4096), (64, 8192)]
    measured = run_shapes(options, shapes, bandwidth, new=16, repeats=5, prompts=False)
    return packed(measured, ratios(measured))


def sweep(options: argparse.Namespace, bandwidth: float) -> dict:
    """Goal: the converted model is nowhere below 0.99 x the base; with a full and a low-rank compensation."""
    measured, found = [], {}
    shapes = [(batch, context) for batch in (1, 4, 16, 64) for context in (512, 2048, 8192) if batch * context < 300000]
    for compensation in ("full", 64):
        # Each with the base that took turns with it.
        part = run_shapes(options, shapes, bandwidth, compensation, new=16, repeats=3, prompts=False)
        found |= {name: value for name, value in ratios(part).items() if not name.startswith(BASE)}
        measured += part
    lowest = min(value["over_base"] for value in found.values() if "over_base" in value)
    return packed(measured, {"lowest_over_base": lowest}, ratios=found)


def stock(options: argparse.Namespace, bandwidth: float) -> dict:
    """Goal: twice the tokens per second of `generate` with a static cache, compiled, at 16 x 4k."""
    models = build(options, [])
    engines = engines_of(models)
    batch, context = 16, max(4096 // options.scale, 8)
    measured = measure_shape(engines, batch, context, new=32, repeats=3, prompts=True, bandwidth=bandwidth)
    prompt = random_prompt(engines[BASE], batch, context)
    for static in (False, True):
        measured += measure_stock({BASE: models[BASE]}, prompt, new=32, repeats=3, static=static)
        print(f"  {measured[-1].path}: {line(measured[-1])}", flush=True)
    return packed(measured, {one.path: one.tokens_per_second for one in measured})


def prompts(options: argparse.Namespace, bandwidth: float) -> dict:
    """Goal: time to first token at most the base's, and below it with a rank of at most 128."""
    measured, summary = [], {}
    for compensation in ("full", 128, 64):
        # A step is timed with each prompt; one is enough.
        shapes = [(1, 4096), (1, 16384)]
        part = run_shapes(options, shapes, bandwidth, compensation, new=1, repeats=7, prompts=True)
        seconds = {(one.model, one.context): one.first.median for one in part if one.first}
        base = {context: value for (name, context), value in seconds.items() if name == BASE}
        summary |= {f"{name} {at}": value / base[at] for (name, at), value in seconds.items() if name != BASE}
        measured += part
    return packed(measured, summary)


def capacity(options: argparse.Namespace, bandwidth: float) -> dict:
    """Goal: the largest batch at 8k grows as the bytes of the cache shrink."""
    context = max(8192 // options.scale, 8)
    found = {}
    for name, engine in engines_of(build(options)).items():
        found[name] = largest_batch(engine, context, most=None if options.device.type == "cuda" else 8)
        print(f"  {name}: {found[name]} rows of {context}", flush=True)
    return {"context": context, "summary": found}


def text(options: argparse.Namespace, bandwidth: float) -> dict:
    """Goal: 256 greedy tokens equal to the plain path in float32; logits within the noise of bfloat16."""
    result = {}
    for dtype in ("float32", "bfloat16"):
        groups = [PAPER, FOURS, f"kv@{PAPER}", EARLY[1], f"early-kv@{FOURS}"]
        models = build(options, groups, 64, "smollm2-135m", dtype)
        prompt = torch.randint(0, 49152, (4, 64), generator=torch.Generator().manual_seed(0)).to(options.device)
        mask = torch.ones_like(prompt)
        mask[1, :30] = 0
        for name, model in models.items():
            # What the kernels give, and what plain operations give on the same weights.
            entry = result[f"{name}, {dtype}"] = {"logits": Engine(model).difference}
            if dtype != "float32":
                continue
            texts = [
                decode(model, prompt, mask, max_new_tokens=256, engine=engine).tokens
                for engine in ("engine", "transformers")
            ]
            entry["equal_tokens"] = (texts[0] == texts[1]).cumprod(-1).sum(-1).min().item()
    return {"summary": result}


def profile(options: argparse.Namespace, bandwidth: float) -> dict:
    """What each kernel of a step takes; the profiler itself adds a little between them."""
    from torch.profiler import ProfilerActivity
    from torch.profiler import profile as profiler

    summary, kernels = {}, {}
    for name, engine in engines_of(build(options, [FOURS])).items():
        for batch, context in ((1, 4096 // options.scale), (16, 4096 // options.scale)):
            session = engine.session(batch, context + 2 * PROFILED, 2 * PROFILED)
            session.pretend(context)
            for _ in range(2):
                session.advance()
            activity = ProfilerActivity.CUDA if options.device.type == "cuda" else ProfilerActivity.CPU
            with profiler(activities=[activity]) as record:
                for _ in range(PROFILED):
                    session.advance()
                clock(options.device)
            events = [event for event in record.events() if event.time_range.elapsed_us()]
            found: dict[str, dict] = {}
            for event in events:
                entry = found.setdefault(event.name, {"us": 0.0, "calls": 0})
                entry["us"] += event.time_range.elapsed_us() / PROFILED
                entry["calls"] += 1 / PROFILED
            span = max(event.time_range.end for event in events) - min(event.time_range.start for event in events)
            key = f"{name} {batch}x{context}"
            busy = sum(entry["us"] for entry in found.values())
            summary[key] = {"span_us": span / PROFILED, "busy_us": busy, "launches": len(events) / PROFILED}
            kernels[key] = dict(sorted(found.items(), key=lambda item: -item[1]["us"]))
            del session
    return {"summary": summary, "kernels": kernels}


PARTS = {call.__name__: call for call in (text, steps, stock, prompts, capacity, sweep, profile)}


def add_options(parser: argparse.ArgumentParser) -> None:
    """The options of this benchmark."""
    parser.add_argument("--parts", nargs="+", choices=list(PARTS), default=list(PARTS))
    parser.add_argument("--shape", default="llama-3.1-8b")
    parser.add_argument("--layers", type=int, help="make the model shallower")
    parser.add_argument("--scale", type=int, default=1, help="divide contexts, to try the benchmark itself")


def measure_parts(options: argparse.Namespace, results: runner.Results) -> None:
    """All parts that were asked for."""
    setting = {name: getattr(options, name) for name in ("shape", "layers", "scale")}
    results.begin(setting | {"device": describe_device(options.device)})
    for part in results.missing("parts", options.parts):
        # Models of the part before refer to themselves; the next one may want all of the memory.
        release_memory(options.device)
        started = time.perf_counter()
        bandwidth = copy_bandwidth(options.device)
        entry = {"copy_bandwidth": bandwidth, **PARTS[part](options, bandwidth), "finished": now()}
        entry["seconds"] = time.perf_counter() - started
        results.add("parts", part, entry, entry["summary"])


if __name__ == "__main__":
    runner.run("decoding", __doc__, ("parts",), add_options, measure_parts)
