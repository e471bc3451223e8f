"""Decoding steps and prompts in vLLM on a model shape with random weights: base, layouts, and fused decoding.

    python -m benchmarks.vllm_steps

Needs one GPU and, in the same environment, vLLM and this package, whose plugin vLLM finds. Each model has an engine in
a process of its own, one after the other, with the same memory for keys and values. Prompts are timed once, with
nothing in the prefix cache. For a step, answers of one token and of many are timed with the prompts in that cache; the
difference is divided by the number of further tokens. Medians of the rounds.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import statistics
import tempfile
import time
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from benchmarks import runner
from benchmarks.decoding import FOURS, PAPER
from uniattn_cli.errors import StageError
from uniattn_cli.layouts.shorthand import parse_groups
from uniattn_cli.modeling.configuration_uniattn import attention_shape
from uniattn_cli.models.device import describe_device
from uniattn_cli.models.of_run import BASE
from uniattn_cli.models.random import known_config, write_without_weights
from uniattn_cli.serving.fused_decoding import SETTING
from uniattn_cli.tables import Table, to_markdown

EARLY = f"early@{FOURS}"
FUSED = ", fused"
# The most telling ones first: time on a device may end.
MODELS = (BASE, FOURS + FUSED, PAPER + FUSED, EARLY + FUSED, FOURS, PAPER, EARLY)
# Tokens to which an engine rounds what it reserves for a request, at most.
GRAIN = 128
CHUNK = 8192
# An engine that has failed says why and ends.
END_SECONDS = 60


def run_engine(name: str, directory: Path, options: dict[str, Any], answer: Connection) -> None:
    """Sends what one engine measured; to be run in a process of its own."""
    with answer:
        answer.send(time_engine(name, directory, options))


def time_engine(name: str, directory: Path, options: dict[str, Any]) -> dict[str, Any]:
    """Loads a model into vLLM and times prompts and steps.

    Raises:
        RuntimeError: decoding is fused where it should not be, or not where it should.
    """
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    import torch
    from vllm import LLM, SamplingParams

    rows, context, new = (options[key] for key in ("rows", "context", "new"))
    begun = time.perf_counter()
    llm = LLM(
        str(directory),
        trust_remote_code=True,
        dtype=options["dtype"],
        load_format="dummy",
        skip_tokenizer_init=True,
        kv_cache_memory_bytes=options["cache_bytes"],
        # The memory is given above; this share of it only has to be free.
        gpu_memory_utilization=0.05,
        max_model_len=context + new + GRAIN,
        max_num_seqs=rows,
        max_num_batched_tokens=max(CHUNK, rows),
        enable_prefix_caching=True,
        enforce_eager=options["eager"],
        compilation_config={"cudagraph_capture_sizes": sorted({1, rows})},
        additional_config={SETTING: name.endswith(FUSED)},
    )
    started = time.perf_counter() - begun
    config = llm.llm_engine.vllm_config
    fused = sum(
        getattr(layer, "fused", None) is not None for layer in config.compilation_config.static_forward_context.values()
    )
    if bool(fused) != name.endswith(FUSED):
        raise RuntimeError(f"{name}: {fused} layers have fused decoding; vLLM's warnings above say why")

    def timed(prompts: list[list[int]], tokens: int) -> float:
        params = SamplingParams(temperature=0, max_tokens=tokens, ignore_eos=True, detokenize=False)
        first = time.perf_counter()
        llm.generate([{"prompt_token_ids": row} for row in prompts], params, use_tqdm=False)
        return time.perf_counter() - first

    torch.manual_seed(0)
    timed(torch.randint(2, options["vocabulary"], (rows, min(context, 512))).tolist(), 8)
    prompts = torch.randint(2, options["vocabulary"], (rows, context)).tolist()
    prefill = timed(prompts, 1)
    one, many = [], []
    for _ in range(options["rounds"]):
        one.append(timed(prompts, 1))
        many.append(timed(prompts, 1 + new))
    return {
        "step_ms": [round((long - short) / new * 1e3, 3) for short, long in zip(one, many, strict=True)],
        "prefill_s": round(prefill, 3),
        "again_s": [round(short, 3) for short in one],
        "cache_tokens": config.cache_config.kv_cache_size_tokens,
        "fused_layers": fused,
        "start_s": round(started, 1),
        "graphs": str(config.compilation_config.cudagraph_mode).rpartition(".")[2],
        "runner": 2 if config.use_v2_model_runner else 1,
    }


def measure(name: str, directory: Path, options: dict[str, Any]) -> dict[str, Any]:
    """What an engine in a process of its own measured.

    Raises:
        EOFError: it ended without an answer; it has said why.
    """
    spawn = multiprocessing.get_context("spawn")
    received, sent = spawn.Pipe(duplex=False)
    process = spawn.Process(target=run_engine, args=(name, directory, options, sent))
    process.start()
    sent.close()
    try:
        return received.recv()
    except EOFError:
        process.join(END_SECONDS)
        raise
    finally:
        # vLLM's own end may hang, and nothing is left to be done.
        process.kill()
        process.join()


def markdown(content: runner.Content) -> str:
    """The table."""
    setting, models = content["setting"], content["models"]
    base, lines = models.get(BASE), []
    for name, row in models.items():
        step, base_step = (statistics.median(one["step_ms"]) if one else None for one in (row, base))
        prompts = setting["rows"] * setting["context"] / row["prefill_s"]
        lines.append(
            [
                *(name, f"{row['cache_tokens']:,}", f"{step:.2f}", f"{setting['rows'] / step * 1e3:,.0f}"),
                f"{base_step / step:.2f}" if base_step else "",
                f"{prompts:,.0f}",
                f"{base['prefill_s'] / row['prefill_s']:.2f}" if base else "",
            ]
        )
    columns = ["", "cache, tokens", "step, ms", "tokens/s", "× base", "prompts, tokens/s", "× base"]
    about = f"{setting['shape']}, {setting['rows']} rows of {setting['context']:,} tokens, {setting['dtype']}"
    return f"{about}, on {setting['device']}.\n\n{to_markdown(Table('', columns, lines))}\n"


def add_options(parser: argparse.ArgumentParser) -> None:
    """The options of this benchmark."""
    parser.add_argument("--shape", default="llama-3.1-8b")
    parser.add_argument("--layers", type=int, help="make it shallower")
    parser.add_argument("--rows", type=int, default=64)
    parser.add_argument("--context", type=int, default=8192, help="tokens of a prompt")
    parser.add_argument("--new", type=int, default=96, help="steps of a round")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--eager", action="store_true", help="neither compile nor capture graphs")
    parser.add_argument("--models", nargs="+", choices=MODELS, default=MODELS, metavar="NAME", help=" | ".join(MODELS))


def measure_models(arguments: argparse.Namespace, results: runner.Results) -> None:
    """All models that are still to be measured."""
    config = known_config(arguments.shape, arguments.layers)
    shape = attention_shape(config)
    dtype = "bfloat16" if arguments.device.type == "cuda" else "float32"
    per_token = 2 * config.num_hidden_layers * shape.kv_heads * shape.head_dim * (2 if dtype == "bfloat16" else 4)
    setting = {name: getattr(arguments, name) for name in ("shape", "layers", "rows", "context", "new", "eager")}
    # What the base needs, and a block for vLLM itself.
    tokens = arguments.rows * -(-(arguments.context + arguments.new + 1) // GRAIN) * GRAIN + GRAIN
    setting |= {"dtype": dtype, "cache_bytes": tokens * per_token, "device": describe_device(arguments.device)}
    results.begin(setting)
    options = setting | {"rounds": arguments.rounds, "vocabulary": config.vocab_size}
    groups = {text: parse_groups(text, shape, "none" if text == EARLY else "full") for text in (FOURS, PAPER, EARLY)}
    with tempfile.TemporaryDirectory(prefix="uniattn-vllm-") as folder:
        directories = write_without_weights(config, groups, dtype, Path(folder))
        failed = []
        for name in results.missing("models", arguments.models):
            try:
                results.add("models", name, measure(name, directories[name.removesuffix(FUSED)], options))
            except EOFError:
                failed.append(name)
    if failed:
        raise StageError(f"engines that ended without an answer: {'; '.join(failed)}; see what they wrote above")


def main() -> None:
    """The command."""
    runner.run("vllm_steps", __doc__ or "", ("models",), add_options, measure_models, markdown=markdown)


if __name__ == "__main__":
    main()
