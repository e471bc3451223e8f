"""`uniattn bench --engine vllm`: requests per second of vLLM's server in a cache of fixed size, under rising load."""

from __future__ import annotations

import dataclasses
import functools
import json
import subprocess
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from uniattn_cli.commands.bench import (
    check_choice,
    config_and_layouts,
    results_folder,
    sources_to_measure,
    write_results,
)
from uniattn_cli.commands.serve import find_program, python_beside, vllm_command
from uniattn_cli.errors import StageError, UsageError
from uniattn_cli.models.hub import Source, locate
from uniattn_cli.models.random import write_without_weights
from uniattn_cli.options import RunOptions
from uniattn_cli.reporting.load import Load, draw, table
from uniattn_cli.run.directory import RunDir
from uniattn_cli.run.lock import alone
from uniattn_cli.serving import server, vllm_load
from uniattn_cli.tables import Result

# Requests of a load, for each of those that are sent at the same time: the first answers make room for others.
REQUESTS_EACH = 4
# A prompt of random tokens is sent as text, of which the server may make a few tokens more.
SPARE_TOKENS = 64


@dataclass(frozen=True)
class LoadSpec:
    """What is measured.

    Attributes:
        loads: requests that are sent at the same time, in rising order.
        contexts: tokens of a prompt.
        new: tokens of an answer.
        repeats: rounds, each of which starts a server for every model.
        cache: memory for keys and values, as vLLM reads it.
        options: of the server, for all models.
    """

    loads: tuple[int, ...] = (1, 16)
    contexts: tuple[int, ...] = (512, 4096)
    new: int = 128
    repeats: int = 1
    cache: str = "4G"
    options: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        for name, values in (("--batch", self.loads), ("--context", self.contexts)):
            if not values or min(values) < 1:
                raise UsageError(f"{name} must be positive numbers, not {list(values)}")
        for name, value in (("--new", self.new), ("--repeats", self.repeats)):
            if value < 1:
                raise UsageError(f"{name} must be at least 1, not {value}")


@dataclass(frozen=True)
class LoadResult(Result):
    """What was measured.

    Attributes:
        directory: where `results.json` and the report were written.
        loads: one per model, round, context and load.
        cache_tokens: tokens that the cache holds, by model.
    """

    directory: Path
    loads: tuple[Load, ...]
    cache_tokens: dict[str, int]


@alone
def bench_serving(
    checkpoints: Sequence[str] = (),
    *,
    run_dir: Path | str = ".",
    shape: str | None = None,
    groups: Sequence[str] = (),
    compensation: str | int = "auto",
    layers: int | None = None,
    spec: LoadSpec = LoadSpec(),
    program: Path | str | None = None,
    out: Path | str = "bench",
    options: RunOptions = RunOptions(),
) -> LoadResult:
    """Serves the models one after the other with vLLM, and sends each the same rising loads over HTTP.

    Args:
        checkpoints: directories or hub ids; without any, base, `converted/` and `trained/` of the run directory. The
            others are compared with the first one.
        run_dir: holds `recipe.yaml` and what the stages wrote.
        shape: random weights instead, as of `bench`; vLLM draws them, in bfloat16 unless its options say otherwise.
        groups: layouts that are compared, with a shape.
        compensation: as of `bench`.
        layers: as of `bench`.
        spec: what is measured.
        program: vLLM's program; None takes the one next to this Python, or the one on the PATH.
        out: directory to write, within the run directory.
        options: overwriting, progress.

    Raises:
        UsageError: vLLM is not installed, or options that contradict each other.
        ModelError, LayoutError, RecipeError: a model cannot be found or built.
        StageError: a server does not start, a load gets no answers, or the output directory exists or cannot be
            written.
    """
    check_choice(checkpoints, shape, groups, compensation, layers)
    found = find_program("vllm", program)
    directory = Path(run_dir) / out
    with (
        results_folder(directory, options.force) as partial,
        tempfile.TemporaryDirectory(prefix="uniattn-bench-") as folder,
    ):
        random = None
        if shape:
            random = {"shape": shape, "groups": list(groups), "compensation": compensation, "layers": layers}
            models = config_and_layouts(shape, groups, compensation, layers)
            directories = write_without_weights(*models, "bfloat16", Path(folder))
            sources = {name: locate(str(path)) for name, path in directories.items()}
            spec = dataclasses.replace(spec, options=("--load-format=dummy", *spec.options))
        else:
            sources = sources_to_measure(RunDir(run_dir), checkpoints)
        loads, caches = _measure(found, sources, spec, Path(folder), options)
        result = _result(directory, loads, caches, spec)
        _write(partial, result, {"settings": dataclasses.asdict(spec), "random": random}, caches)
    return result


def _measure(
    program: Path, sources: dict[str, Source], spec: LoadSpec, folder: Path, options: RunOptions
) -> tuple[list[Load], dict[str, tuple[int, float]]]:
    """All loads of all rounds, and what each model's cache holds."""
    loads: list[Load] = []
    caches: dict[str, tuple[int, float]] = {}
    with options.progress.track("bench", spec.repeats * len(sources)) as advance:
        for index in range(spec.repeats):
            # A machine that gets slower or busier favours nobody.
            for name in list(sources)[:: -1 if index % 2 else 1]:
                answers, caches[name] = _serve_and_send(program, sources[name], spec, index, folder)
                loads += [_read(name, index, *pair, answer) for pair, answer in zip(_pairs(spec), answers, strict=True)]
                advance()
    return loads, {name: caches[name] for name in sources}


def _result(directory: Path, loads: list[Load], caches: dict[str, tuple[int, float]], spec: LoadSpec) -> LoadResult:
    tokens = {name: count for name, (count, _) in caches.items()}
    notes = [
        f"The cache holds {', '.join(f'{count:,} tokens of {name}' for name, count in tokens.items())}.",
        f"{REQUESTS_EACH} requests for each of those that are sent at once, {spec.new} new tokens each; times are "
        "median and 99th percentile of a load.",
        f"Written to {directory}/",
    ]
    title = f"Requests per second of vLLM, with {spec.cache} of cache"
    return LoadResult(directory, tuple(loads), tokens, title=title, tables=[table(loads)], notes=notes)


def _write(folder: Path, result: LoadResult, settings: dict[str, Any], caches: dict[str, tuple[int, float]]) -> None:
    content = {
        **settings,
        "cache_tokens": result.cache_tokens,
        "max_concurrency": {name: concurrency for name, (_, concurrency) in caches.items()},
        "loads": [dataclasses.asdict(one) for one in result.loads],
    }
    heading = [f"# {result.title}", *result.notes[:-1]]
    write_results(folder, content, heading, result.tables, functools.partial(draw, result.loads))


def _pairs(spec: LoadSpec) -> list[tuple[int, int]]:
    return [(context, load) for context in spec.contexts for load in sorted(spec.loads)]


def _serve_and_send(
    program: Path, source: Source, spec: LoadSpec, seed: int, folder: Path
) -> tuple[list[dict[str, Any]], tuple[int, float]]:
    """Starts a server, sends all loads; what vLLM reports of each, and what the cache holds."""
    model, log, results = str(source.path if not source.on_hub else source.name), folder / "log", folder / "results"
    command = [*vllm_command(program, model), "--trust-remote-code", f"--kv-cache-memory-bytes={spec.cache}"]
    command += [f"--max-model-len={max(spec.contexts) + spec.new + SPARE_TOKENS}", *spec.options]
    common = ["--model", model, "--trust-remote-code", "--dataset-name=random", "--random-range-ratio=0"]
    common += ["--ignore-eos", "--temperature=0", "--disable-tqdm", "--percentile-metrics=ttft,tpot"]
    common += ["--metric-percentiles=50,99", f"--random-output-len={spec.new}"]
    # Other prompts for each load, so that none finds those of another in the prefix cache.
    loads = [
        [
            *common,
            f"--random-input-len={context}",
            f"--max-concurrency={load}",
            f"--num-prompts={load * REQUESTS_EACH}",
            f"--seed={seed * 1000 + index}",
        ]
        for index, (context, load) in enumerate(_pairs(spec))
    ]
    with server.running(command, log) as address:
        sent = subprocess.run(
            [str(python_beside(program)), vllm_load.__file__, address, str(results), json.dumps(loads)],
            capture_output=True,
            text=True,
            check=False,
        )
        if sent.returncode:
            raise StageError(f"vLLM's load test of {source.name} failed: {server.reason(sent.stderr)}")
        return json.loads(results.read_text(encoding="utf-8")), server.cache_of(log)


def _read(model: str, index: int, context: int, load: int, answer: dict[str, Any]) -> Load:
    if not answer["completed"]:
        raise StageError(f"{model}: no request was answered at {load} requests of {context} tokens; see vLLM's options")
    first, later = ((answer[f"p50_{name}_ms"] / 1e3, answer[f"p99_{name}_ms"] / 1e3) for name in ("ttft", "tpot"))
    return Load(
        model,
        index,
        context,
        load,
        answer["request_throughput"],
        answer["output_throughput"],
        first,
        later,
        answer["preemptions"],
        answer["failed"],
    )
