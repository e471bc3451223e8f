"""Time and peak memory of analysis, conversion and thorough search on a Llama-3.1-8B shape with random weights.

    python scripts/benchmark_scale.py --out docs/benchmarks/scale.json

Needs one GPU of 80 GB; `--layers` makes the model shallower. Parts already in the output stay unless they are measured
again (`--parts`). Layouts of a random model mean nothing; time and memory do not depend on the weights.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from pathlib import Path

import torch
import transformers
from transformers import LlamaConfig, LlamaForCausalLM

from uniattn_cli.analysis.measure import measure
from uniattn_cli.fitting.fit import fit_layers
from uniattn_cli.fitting.match_maps import Matcher
from uniattn_cli.fitting.match_outputs import Limits, SourceChooser
from uniattn_cli.layouts.fast import frontier
from uniattn_cli.layouts.greedy import ThoroughSearch
from uniattn_cli.layouts.thorough import proposer
from uniattn_cli.modeling.configuration_uniattn import attention_shape
from uniattn_cli.models.building import build_converted
from uniattn_cli.models.hub import Source
from uniattn_cli.recipe.schema import AnalysisSpec, ConversionSpec

LENGTH = 1024
TOKENS = 131072
FOLLOWERS = 12


def make_model(layers: int) -> LlamaForCausalLM:
    """A Llama-3.1-8B shape with random weights in bfloat16."""
    config = LlamaConfig(
        vocab_size=128256,
        hidden_size=4096,
        intermediate_size=14336,
        num_hidden_layers=layers,
        num_attention_heads=32,
        num_key_value_heads=8,
        max_position_embeddings=131072,
        rope_parameters={"rope_type": "default", "rope_theta": 500000.0},
        tie_word_embeddings=False,
        dtype="bfloat16",
    )
    torch.set_default_dtype(torch.bfloat16)
    with torch.device("cuda"):
        model = LlamaForCausalLM(config)
    torch.set_default_dtype(torch.float32)
    return model.eval()


def main() -> None:
    """Reads the command line and measures."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", default="docs/benchmarks/scale.json")
    parser.add_argument("--layers", type=int, default=32)
    parser.add_argument("--search-tokens", type=int, default=24576, help="tokens that candidates are fitted on")
    parser.add_argument("--score-tokens", type=int, default=16384, help="tokens that candidates are judged on")
    parser.add_argument("--parts", nargs="*", default=["analysis", "conversion", "offloaded", "thorough"])
    arguments = parser.parse_args()
    out = Path(arguments.out)
    content = json.loads(out.read_text()) if out.exists() else {}
    generator = torch.Generator().manual_seed(0)
    windows = torch.randint(0, 128256, (TOKENS // LENGTH, LENGTH), generator=generator)
    model = make_model(arguments.layers)
    weights = sum(parameter.numel() * parameter.element_size() for parameter in model.parameters())
    content["setting"] = {
        "device": torch.cuda.get_device_name(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "layers": arguments.layers,
        "dtype": "bfloat16",
        "attention": model.config._attn_implementation,
        "weights_gib": round(weights / 2**30, 2),
        "sequence_length": LENGTH,
    }

    def timed(name: str, call: Callable, **more) -> object:
        torch.cuda.synchronize()
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        started = time.perf_counter()
        result = call()
        torch.cuda.synchronize()
        seconds = time.perf_counter() - started
        peak = torch.cuda.max_memory_allocated() / 2**30
        content[name] = {"seconds": round(seconds, 1), "peak_gib": round(peak, 2), **more}
        print(name, content[name], flush=True)
        out.parent.mkdir(parents=True, exist_ok=True)
        out.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
        return result

    spec = AnalysisSpec(tokens=TOKENS, length=LENGTH)
    source = Source("random", Path("."), "random")
    parts = arguments.parts
    with torch.no_grad():
        analysed = windows if "analysis" in parts else windows[:4]
        name = "analysis" if "analysis" in parts else "short analysis"
        measured = timed(name, lambda: measure(model, analysed, spec, source)[0], tokens=analysed.numel())
    content[name]["times_a_plain_forward"] = round(measured.forward_ratio, 2)
    shape = attention_shape(model.config)
    matcher = Matcher(measured.score, shape, "grouped", "several")
    chooser = SourceChooser(matcher, matcher.lenders, Limits.of(torch.device("cuda")))
    followers = min(FOLLOWERS, shape.layers // 2)
    layout = next(choice.layout for choice in frontier(matcher) if choice.followers == followers)

    def convert(device: torch.device | None = None, matched: SourceChooser | None = None) -> None:
        converted = build_converted(model, layout)
        fit_layers(model, converted, windows, ConversionSpec(), chooser=matched, device=device, batch_size=8)

    if "conversion" in parts:
        timed("conversion", convert, tokens=TOKENS, followers=followers)
        timed("conversion with heads matched", lambda: convert(matched=chooser), tokens=TOKENS, followers=followers)
    if "thorough" in parts:
        rows = arguments.search_tokens // LENGTH, arguments.score_tokens // LENGTH

        def search() -> list:
            runner = ThoroughSearch(
                model,
                windows[: rows[0]],
                windows[rows[0] : sum(rows)],
                ConversionSpec(),
                proposer(matcher, ("softmax",), "full"),
                chooser=chooser,
                batch_size=4,
            )
            begun = time.perf_counter()
            return runner.run(
                lambda layout: len(layout.changed) >= followers,
                report=lambda step: print(
                    "step", step.layer, step.measured, round(time.perf_counter() - begun), flush=True
                ),
            )

        steps = timed(
            "thorough", search, fit_tokens=rows[0] * LENGTH, score_tokens=rows[1] * LENGTH, followers=followers
        )
        content["thorough"]["candidates"] = sum(step.measured for step in steps)
    if "offloaded" in parts:
        model.to("cpu")
        torch.cuda.empty_cache()
        allowed = 0.75 * weights
        torch.cuda.set_per_process_memory_fraction(allowed / torch.cuda.get_device_properties(0).total_memory)
        timed(
            "conversion with the model larger than the memory",
            lambda: convert(torch.device("cuda")),
            tokens=TOKENS,
            followers=followers,
            memory_allowed_gib=round(allowed / 2**30, 2),
        )
    out.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
