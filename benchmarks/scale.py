"""Time and peak memory of analysis, conversion and scores of five kinds on a well-known shape with random weights.

    python -m benchmarks.scale --out docs/benchmarks/scale.json
    python -m benchmarks.scale --device cpu --shape tiny --tokens 1024 --length 64 --out /tmp/scale.json  # a rehearsal

The default, Llama-3.1-8B, needs one GPU of 80 GB; `--layers` makes the model shallower. Layouts of a random model mean
nothing; time and memory do not depend on the weights. On a CPU no peaks are told and memory is not limited.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from benchmarks import runner
from uniattn_cli.analysis.measure import measure
from uniattn_cli.analysis.measured import Measured
from uniattn_cli.fitting.fit import fit_layers
from uniattn_cli.fitting.match_maps import Matcher
from uniattn_cli.fitting.match_outputs import Limits, SourceChooser
from uniattn_cli.layouts.fast import frontier
from uniattn_cli.layouts.scores import score_plans
from uniattn_cli.layouts.workbench import Texts, Workbench
from uniattn_cli.modeling.configuration_uniattn import attention_shape
from uniattn_cli.models.building import build_converted
from uniattn_cli.models.device import describe_device, release_memory, timed
from uniattn_cli.models.hub import Source
from uniattn_cli.models.of_run import BASE
from uniattn_cli.models.placement import Placement
from uniattn_cli.models.pool import weight_bytes
from uniattn_cli.models.random import SHAPES, known_config, random_models
from uniattn_cli.options import RunOptions
from uniattn_cli.recipe.schema import AnalysisSpec, EvaluationSpec, LayoutSpec, ModelSpec, Recipe
from uniattn_cli.run.directory import RunDir

FOLLOWERS = 12
PARTS = ("analysis", "conversion", "scores", "offloaded")
KINDS = ("key", "kv", "early", "softmax", "linear")


def add_options(parser: argparse.ArgumentParser) -> None:
    """The options of this benchmark."""
    parser.add_argument("--shape", choices=SHAPES, default="llama-3.1-8b")
    parser.add_argument("--layers", type=int, help="make it shallower")
    parser.add_argument("--tokens", type=int, default=131072, help="of calibration text")
    parser.add_argument("--length", type=int, default=1024, help="of a sequence")
    parser.add_argument("--allowed", type=float, default=0.5, help="share of the weights that `offloaded` may use")
    parser.add_argument("--search-tokens", type=int, default=24576, help="tokens that plans are fitted on")
    parser.add_argument("--score-tokens", type=int, default=16384, help="tokens that plans are scored on")
    parser.add_argument("--parts", nargs="*", choices=PARTS, default=list(PARTS))


def measure_parts(arguments: argparse.Namespace, results: runner.Results) -> None:
    """All parts that were asked for; `offloaded` is the last, because it limits the memory of the process."""
    device, parts = arguments.device, arguments.parts
    on_gpu, tokens, length = device.type == "cuda", arguments.tokens, arguments.length
    config = known_config(arguments.shape, arguments.layers)
    windows = torch.randint(
        0, config.vocab_size, (tokens // length, length), generator=torch.Generator().manual_seed(0)
    )
    model = random_models(config, {}, "bfloat16", device)[BASE]
    recipe = Recipe(
        model=ModelSpec(name="random", dtype="bfloat16"),
        layout=LayoutSpec(search="scores", kinds=KINDS),
        evaluation=EvaluationSpec(batch_size=4),
    )
    weights, shape, spec, source = (
        weight_bytes(model),
        attention_shape(config),
        recipe.conversion,
        Source("random", Path("."), "random"),
    )
    results.begin(
        {
            "device": describe_device(device),
            "shape": arguments.shape,
            "layers": config.num_hidden_layers,
            "dtype": "bfloat16",
            "attention": config._attn_implementation,
            "weights_gib": round(weights / 2**30, 2),
            "sequence_length": length,
        }
    )

    def row(name: str, call: Callable[[], dict[str, Any] | None], **facts: Any) -> None:
        """Time and peak memory of a call, which may return further facts."""
        if not results.missing("rows", [name]):
            return
        release_memory(device)
        if on_gpu:
            torch.cuda.reset_peak_memory_stats(device)
        seconds: list[float] = []
        with timed(seconds, device):
            facts |= call() or {}
        peak = {"peak_gib": round(torch.cuda.max_memory_allocated(device) / 2**30, 2)} if on_gpu else {}
        results.add("rows", name, {"seconds": round(seconds[0], 1), **peak, **facts})

    def analyze(count: int) -> Measured:
        analysis = AnalysisSpec(tokens=tokens, length=length)
        with torch.no_grad():
            return measure(model, windows[:count], analysis, source)[0]

    if "analysis" in parts:
        call = lambda: {"times_a_plain_forward": round(analyze(len(windows)).forward_ratio, 2)}  # noqa: E731
        row("analysis", call, tokens=tokens)
    # Which layers and heads match makes no difference to time and memory.
    measured = analyze(4)
    matcher = Matcher(measured.score, shape, "grouped", "several")
    chooser = SourceChooser(matcher, matcher.lenders, Limits.of(device))
    followers = min(FOLLOWERS, shape.layers // 2)
    layout = next(choice.layout for choice in frontier(matcher) if choice.changed == followers)

    def convert(place: torch.device | None = None, matched: SourceChooser | None = None) -> None:
        fit_layers(model, build_converted(model, layout), windows, spec, chooser=matched, device=place, batch_size=8)

    if "conversion" in parts:
        row("conversion", convert, tokens=tokens, followers=followers)
        row("conversion with heads matched", lambda: convert(matched=chooser), tokens=tokens, followers=followers)
    if "scores" in parts:
        fitted, compared = arguments.search_tokens // length, arguments.score_tokens // length
        bench = Workbench(recipe, source, measured, RunOptions(device=str(device)))
        # What it would load and read.
        texts = windows[:fitted], windows[fitted : fitted + compared], windows[:0]
        vars(bench).update(base=model, placement=Placement(device), texts=Texts(*texts))

        def score() -> dict[str, Any]:
            with tempfile.TemporaryDirectory() as folder:
                return {"plans": len(score_plans(RunDir(folder), bench, "auto"))}

        given = {"fit_tokens": fitted * length, "score_tokens": compared * length}
        row("scores", score, **given, kinds=list(KINDS))
    if "offloaded" in parts:
        model.to("cpu")
        release_memory(device)
        allowed, facts = arguments.allowed * weights, {"followers": followers}
        if on_gpu:
            torch.cuda.set_per_process_memory_fraction(allowed / torch.cuda.get_device_properties(device).total_memory)
            facts["memory_allowed_gib"] = round(allowed / 2**30, 2)
        row("conversion with the model larger than the memory", lambda: convert(device), tokens=tokens, **facts)


if __name__ == "__main__":
    runner.run("scale", __doc__, ("rows",), add_options, measure_parts)
