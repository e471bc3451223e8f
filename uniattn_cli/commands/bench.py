"""`uniattn bench`: time to first token and time per output token, compared with the floor and with transformers."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from uniattn_cli.errors import ModelError, StageError, UsageError
from uniattn_cli.modeling.configuration_uniattn import attention_shape, layout_of
from uniattn_cli.models.hub import Source
from uniattn_cli.models.of_run import CONTROL, find, own_models
from uniattn_cli.options import RunOptions
from uniattn_cli.recipe.schema import ModelSpec, Recipe
from uniattn_cli.run.directory import RunDir
from uniattn_cli.run.files import file_errors, now, taken, versions, write_json, written
from uniattn_cli.run.lock import alone
from uniattn_cli.tables import Result, Table, to_markdown

if TYPE_CHECKING:
    import torch
    from transformers import LlamaConfig, PreTrainedModel

    from uniattn_cli.inference.engine import Engine
    from uniattn_cli.inference.measurement import Measurement
    from uniattn_cli.modeling.layout_uniattn import Layout

SCHEMA = 1
RESULTS, REPORT, PLOT = "results.json", "report.md", "bench.png"


@dataclass(frozen=True)
class BenchSpec:
    """What is measured.

    Attributes:
        batches, contexts: batch sizes, and tokens per sequence before the first new one; every pair is measured.
        new: decoding steps per round.
        repeats: rounds.
        stock: models that are also timed with transformers' `generate`: `base`, `all` or `none`.
        prompt_tokens: the time to first token is skipped for batches with more prompt tokens.
        dtype: `auto` uses the checkpoint's own, and bfloat16 for random weights.
    """

    batches: tuple[int, ...] = (1, 16)
    contexts: tuple[int, ...] = (512, 4096)
    new: int = 16
    repeats: int = 5
    stock: str = "base"
    prompt_tokens: int = 131072
    dtype: str = "auto"

    def __post_init__(self) -> None:
        for name in ("batches", "contexts"):
            values = getattr(self, name)
            if not values or min(values) < 1:
                raise UsageError(f"{name} must be positive numbers, not {list(values)}")
        for name in ("new", "repeats"):
            if getattr(self, name) < 1:
                raise UsageError(f"{name} must be at least 1, not {getattr(self, name)}")
        if self.stock not in ("base", "all", "none"):
            raise UsageError(f"stock must be base, all or none, not '{self.stock}'")


@dataclass(frozen=True)
class BenchResult(Result):
    """What was measured.

    Attributes:
        directory: where `results.json`, the report and the plot were written.
        device: its name.
        bandwidth: bytes per second of a large copy on the device, which the floors are computed with.
        measurements: one per model, path, batch and context.
    """

    directory: Path
    device: str
    bandwidth: float
    measurements: tuple[Measurement, ...]


@alone
def bench(
    checkpoints: Sequence[str] = (),
    *,
    run_dir: Path | str = ".",
    shape: str | None = None,
    groups: Sequence[str] = (),
    compensation: str | int = "auto",
    layers: int | None = None,
    spec: BenchSpec = BenchSpec(),
    out: Path | str = "bench",
    options: RunOptions = RunOptions(),
) -> BenchResult:
    """Times all models, which take turns, and writes a directory with all numbers, tables and a plot.

    Args:
        checkpoints: directories or hub ids; without any, base, `converted/` and `trained/` of the run directory. The
            others are compared with the first one.
        run_dir: holds `recipe.yaml` and what the stages wrote.
        shape: random weights of this shape instead, see `models.random.SHAPES`.
        groups: layouts of the random models to compare with the base, see `layouts.shorthand.parse_groups`.
        compensation: W_c of their changed layers: `full`, `none`, a rank, or `auto` for the default of each kind.
        layers: number of layers of the random model.
        spec: what is measured.
        out: directory to write, within the run directory.
        options: device, overwriting, progress.

    Raises:
        UsageError: options that contradict each other.
        ModelError, CheckpointError, LayoutError, RecipeError: a model cannot be found, loaded or built.
        StageError: the output directory exists, or cannot be written.
    """
    import torch

    from uniattn_cli.inference.roofline import copy_bandwidth

    check_choice(checkpoints, shape, groups, compensation, layers)
    directory = Path(run_dir) / out
    with results_folder(directory, options.force) as partial:
        device = options.torch_device()
        models = _models(checkpoints, shape, groups, compensation, layers, spec, run_dir, device)
        engines = _engines(models)
        bandwidth = copy_bandwidth(device)
        measurements = _measure(models, engines, spec, bandwidth, options)
        settings = {
            "spec": dataclasses.asdict(spec),
            "models": {name: _describe(model) for name, model in models.items()},
            "shape": shape,
            "threads": torch.get_num_threads(),
            "ops": {name: engine.ops.name for name, engine in engines.items()},
            "graphs": {name: engine.graphs for name, engine in engines.items()},
        }
        result = _result(directory, measurements, bandwidth, device)
        _write(partial, result, settings)
    return result


def results_folder(directory: Path, force: bool) -> contextlib.AbstractContextManager[Path]:
    """Gives a hidden folder to fill, made before anything is measured; on success it becomes `directory`.

    Raises:
        StageError: something else is in the way, or the folder cannot be made.
    """
    if taken(directory):
        # The user has chosen the name: what has no plot of the bench, such as a checkpoint, may be dear to them.
        if directory.name in ("", "..") or not (directory / PLOT).is_file():
            raise StageError(f"{directory} exists but was not written by `uniattn bench`; choose another --out DIR")
        if not force:
            raise StageError(f"{directory} exists; use --force to replace it, or --out DIR")
    return written(directory, functools.partial(file_errors, directory, instead="choose another --out DIR"))


def write_results(
    folder: Path, content: dict[str, Any], heading: Sequence[str], tables: Sequence[Table], draw: Callable[[Path], None]
) -> None:
    """Writes what every bench leaves: all numbers, a report and a plot.

    Args:
        folder: of `results_folder`.
        content: the numbers, to which versions and time are added.
        heading: paragraphs of the report before its tables.
        tables: of the report.
        draw: writes the plot.
    """
    write_json(folder / RESULTS, {"schema": SCHEMA, "versions": versions(), "finished": now(), **content})
    text = "\n\n".join([*heading, *map(to_markdown, tables)])
    (folder / REPORT).write_text(text + "\n", encoding="utf-8")
    draw(folder / PLOT)


def _models(
    checkpoints: Sequence[str],
    shape: str | None,
    groups: Sequence[str],
    compensation: str | int,
    layers: int | None,
    spec: BenchSpec,
    run_dir: Path | str,
    device: torch.device,
) -> dict[str, PreTrainedModel]:
    from uniattn_cli.inference.measurement import NoRoomError, room
    from uniattn_cli.models.loading import load_model
    from uniattn_cli.models.random import random_models

    try:
        with room("the weights of all models together"):
            if shape:
                dtype = "bfloat16" if spec.dtype == "auto" else spec.dtype
                return random_models(*config_and_layouts(shape, groups, compensation, layers), dtype, device)
            sources, model_spec = sources_to_measure(RunDir(run_dir), checkpoints), ModelSpec(dtype=spec.dtype)
            # They are measured in turn, so they have to fit together.
            return {name: load_model(source, model_spec, device) for name, source in sources.items()}
    except NoRoomError as error:
        raise ModelError(
            f"{error} on {device}; give fewer checkpoints, or choose a larger device with --device"
        ) from None


def check_choice(
    checkpoints: Sequence[str], shape: str | None, groups: Sequence[str], compensation: str | int, layers: int | None
) -> None:
    """Refuses options that contradict each other, or would be ignored.

    Raises:
        UsageError: says which.
    """
    if groups and not shape:
        raise UsageError("--groups needs --shape, since it converts random weights; or give a converted checkpoint")
    if layers is not None and not shape:
        raise UsageError("--layers needs --shape, since it makes random weights")
    if compensation != "auto" and not groups:
        raise UsageError("--compensation needs --groups, the layouts that it is for")
    if shape and checkpoints:
        raise UsageError("give checkpoints or --shape, not both")


def config_and_layouts(
    shape: str, groups: Sequence[str], compensation: str | int, layers: int | None
) -> tuple[LlamaConfig, dict[str, Layout]]:
    """Of the random models that are asked for, see `bench`.

    Raises:
        UsageError, LayoutError: the shape or a layout is unknown.
    """
    from uniattn_cli.layouts.shorthand import parse_groups
    from uniattn_cli.models.random import known_config

    config = known_config(shape, layers)
    return config, {text: parse_groups(text, attention_shape(config), compensation) for text in groups}


def sources_to_measure(run: RunDir, checkpoints: Sequence[str]) -> dict[str, Source]:
    """The checkpoints named, or the models of the run; a control is as fast as the base."""
    if checkpoints:
        return {name.rstrip("/"): find(run, name) for name in checkpoints}
    own = own_models(run, Recipe.load(run.recipe))
    return {subject.name: subject.source for subject in own if subject.role != CONTROL}


def _engines(models: dict[str, PreTrainedModel]) -> dict[str, Engine]:
    from uniattn_cli.inference.engine import engine_for
    from uniattn_cli.inference.program import UnsupportedError

    found = {}
    for name, model in models.items():
        try:
            found[name] = engine_for(model)
        except UnsupportedError as error:
            raise ModelError(f"{name}: the decoding engine cannot run this model: {error}") from None
    return found


def _measure(
    models: dict[str, PreTrainedModel],
    engines: dict[str, Engine],
    spec: BenchSpec,
    bandwidth: float,
    options: RunOptions,
) -> list[Measurement]:
    """All batch sizes and contexts; one that does not fit into memory is reported, and the next one follows."""
    from uniattn_cli.inference.measurement import measure_shape, measure_stock, random_prompt

    stock = dict(list(models.items())[: {"none": 0, "base": 1, "all": None}[spec.stock]])
    ways = [False, True] if next(iter(models.values())).device.type == "cuda" else [False]
    pairs = [(batch, context) for context in spec.contexts for batch in spec.batches]
    rounds = len(pairs) * spec.repeats * (len(models) + len(stock) * len(ways))
    found = []
    with options.progress.track("bench", rounds) as advance:
        for batch, context in pairs:
            measured = measure_shape(
                engines,
                batch,
                context,
                new=spec.new,
                repeats=spec.repeats,
                prompts=batch * context <= spec.prompt_tokens,
                bandwidth=bandwidth,
                advance=advance,
            )
            prompt = random_prompt(next(iter(engines.values())), batch, context)
            for static in ways if stock else ():
                measured += measure_stock(
                    stock, prompt, new=spec.new, repeats=spec.repeats, static=static, advance=advance
                )
            for one in measured:
                if not one.fits:
                    options.progress.warn(f"batch {batch}, context {context}: {one.model} ({one.path}): {one.note}")
            found += measured
    return found


def _describe(model: PreTrainedModel) -> dict[str, Any]:
    kinds = Counter(plan.kind for plan in layout_of(model.config))
    parameters = sum(parameter.numel() for parameter in model.parameters())
    return {"kinds": dict(kinds), "parameters": parameters, "dtype": str(model.dtype).removeprefix("torch.")}


def _result(directory: Path, measurements: list[Measurement], bandwidth: float, device: torch.device) -> BenchResult:
    from uniattn_cli.models.device import describe_device
    from uniattn_cli.reporting import bench

    name = describe_device(device)
    notes = [bench.explanation(bandwidth), *bench.conclusions(measurements), f"Written to {directory}/"]
    shown = bench.tables(measurements)
    title = f"Decoding speed on {name}"
    return BenchResult(directory, name, bandwidth, tuple(measurements), title=title, tables=shown, notes=notes)


def _write(folder: Path, result: BenchResult, settings: dict[str, Any]) -> None:
    from uniattn_cli.reporting import bench

    content = {
        "device": result.device,
        "copy_bandwidth": result.bandwidth,
        "settings": settings,
        "measurements": [dataclasses.asdict(one) for one in result.measurements],
    }
    heading = ["# Decoding speed", f"{result.device}; {bench.explanation(result.bandwidth)}"]
    write_results(folder, content, heading, result.tables, functools.partial(bench.draw, result.measurements))
