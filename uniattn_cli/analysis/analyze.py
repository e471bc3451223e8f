"""`uniattn analyze`: one pass over calibration text that measures how redundant the attention maps are."""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING

from uniattn_cli.errors import DataError, StageError
from uniattn_cli.grouping.choose import candidates_table, check_protected, parameter_counts
from uniattn_cli.grouping.matching import Matcher
from uniattn_cli.grouping.measured import Measured
from uniattn_cli.grouping.search import Choice, frontier
from uniattn_cli.modeling.configuration_uniattn import attention_shape
from uniattn_cli.options import RunOptions
from uniattn_cli.recipe import ModelSpec, Recipe, default_tree, read_tree, write_tree
from uniattn_cli.rundir import RunDir, file_errors
from uniattn_cli.tables import Table

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel

# Sequences that are also run plainly, to state the cost of measuring.
TIMED_SEQUENCES = 3


@dataclass(frozen=True)
class Analysis:
    """Result of `analyze`.

    Attributes:
        measured: all numbers.
        directory: where they were written.
        tables: most similar neighbours, and candidate layouts over budgets.
        notes: what the user should know.
    """

    measured: Measured
    directory: Path
    tables: list[Table]
    notes: list[str] = field(default_factory=list)
    title: str = "analysis"


def analyze(
    model: str | None = None,
    run_dir: Path | str = ".",
    *,
    recipe: Path | str | None = None,
    overrides: Sequence[str] = (),
    options: RunOptions | None = None,
) -> Analysis:
    """Measures the similarity of all attention maps and writes `analysis/`, and `recipe.yaml` if there is none.

    Args:
        model: hub id or directory; None takes the recipe's.
        run_dir: where to write.
        recipe: file that a new `recipe.yaml` starts from, with `model` put in; None starts from the defaults.
        overrides: `key.path=value` strings for the recipe.
        options: device, force, progress.

    Raises:
        UniAttnError: one of the subclasses in `uniattn_cli.errors`, with one clear line.
    """
    from uniattn_cli import data
    from uniattn_cli.checkpoint import check_lengths, load_config, load_model, load_tokenizer, locate

    options = options or RunOptions()
    run = RunDir(run_dir)
    recipe, new_tree = _recipe(run, model, recipe, overrides)
    run.check_free("analyze", options.force)
    source = locate(recipe.model.name, recipe.model.revision)
    config = load_config(source)
    spec = recipe.analysis
    check_lengths(config, {"analysis.length": spec.length})
    check_protected(recipe.layout, attention_shape(config))
    device = options.torch_device()
    tokenizer = load_tokenizer(source)
    windows = data.calibration_windows(recipe.data, tokenizer, tokens=spec.tokens, length=spec.length, seed=recipe.seed)
    notes = _check_text(windows, tokenizer, spec.tokens)
    import torch  # a slow import; faults of the settings are told before it

    options.progress.note(f"loading {recipe.model.name} on {device}")
    loaded = load_model(source, _readable(recipe.model), device)
    inputs = {"model": source.fingerprint}
    with run.write("analyze", recipe, inputs, force=options.force) as directory:
        with options.progress.track("analyzing", len(windows)) as advance, torch.no_grad():
            measured = measure(loaded, windows, recipe, source, advance)
        matcher = Matcher(measured.score, measured.shape, recipe.layout.head_map, recipe.layout.sources)
        choices = frontier(matcher, protect=recipe.layout.protect, max_group=recipe.layout.max_group)
        tables = [neighbours_table(measured), _candidates(measured, config, choices)]
        _write(directory, measured, tables)
        if new_tree is not None:
            with file_errors(run.root):
                write_tree(new_tree, run.recipe)
    notes.append(f"{measured.tokens:,} tokens in {measured.seconds:.0f} s, {measured.forward_ratio:.1f}x plain forward")
    notes.append(f"pictures and numbers: {run.output('analyze')}; next: uniattn convert --groups auto")
    return Analysis(measured, run.output("analyze"), tables, notes)


def _recipe(run: RunDir, model: str | None, template: Path | str | None, overrides: Sequence[str]):
    """The recipe, and the tree to write if there is none yet."""
    model = None if model is None else _resolved(model)
    if run.recipe.exists():
        if template is not None:
            raise StageError(f"{run.recipe} exists; --recipe starts a new one, so use another run directory (-C DIR)")
        recipe = Recipe.load(run.recipe, overrides)
        if model is not None and _resolved(recipe.model.name) != model:
            raise StageError(
                f"{run.recipe} is for {recipe.model.name}, not {model}; use another run directory (-C DIR) or edit it"
            )
        return recipe, None
    if template is not None:
        tree, name = read_tree(Path(template)), Path(template).name
        named = [] if model is None else [f"model.name={json.dumps(model)}"]
        return Recipe.from_tree(tree, name, [*named, *overrides]), tree
    if model is None:
        raise StageError(f"{run.recipe} does not exist; name the model: `uniattn analyze MODEL`")
    tree = default_tree(model)
    return Recipe.from_tree(tree, "recipe.yaml", overrides), tree


def _resolved(model: str) -> str:
    """The absolute path of a directory, so that other stages find it from anywhere; hub ids as they are."""
    path = Path(model).expanduser()
    return str(path.resolve()) if path.is_dir() else model


def _readable(spec: ModelSpec) -> ModelSpec:
    """FlexAttention gets block masks, from which maps cannot be computed; the maps are the same with any backend."""
    return replace(spec, attention="auto") if spec.attention == "flex_attention" else spec


def _check_text(windows: torch.Tensor, tokenizer, wanted: int) -> list[str]:
    """Refuses calibration text that says nothing; warns if there is less than was asked for."""
    special = set(tokenizer.all_special_ids)
    ordinary = sum(1 for token in windows.flatten().tolist() if token not in special)
    if ordinary < windows.numel() / 2:
        raise DataError(
            f"{1 - ordinary / windows.numel():.0%} of the calibration tokens are special tokens; give ordinary text"
        )
    if windows.numel() < wanted - windows.shape[1]:
        return [f"the calibration text holds {windows.numel():,} tokens, {wanted:,} were asked for"]
    return []


def measure(model: PreTrainedModel, windows: torch.Tensor, recipe: Recipe, source, advance) -> Measured:
    """Runs the model over windows [sequences, length] and accumulates all similarities."""
    from uniattn_cli.analysis.capture import capture
    from uniattn_cli.analysis.statistics import MapStatistics

    spec = recipe.analysis
    shape = attention_shape(model.config)
    distance = min(spec.max_distance, shape.layers - 1)
    statistics = MapStatistics(distance, spec.rows, spec.top_k)
    device = next(model.parameters()).device
    backbone = model.base_model
    measuring, plain = [], []
    with capture(model) as captured:
        for window in windows:
            started = time.perf_counter()
            backbone(window[None].to(device), use_cache=False)
            statistics.add([captured.layers[layer] for layer in range(shape.layers)])
            captured.layers.clear()
            measuring.append(time.perf_counter() - started)
            advance()
    for window in windows[:TIMED_SEQUENCES]:
        started = time.perf_counter()
        backbone(window[None].to(device), use_cache=False).last_hidden_state[0, -1, 0].item()
        plain.append(time.perf_counter() - started)
    return Measured(
        model=source.name,
        fingerprint=source.fingerprint,
        model_type=model.config.model_type,
        shape=shape,
        element_size=model.dtype.itemsize,
        tokens=windows.numel(),
        sequences=len(windows),
        length=windows.shape[1],
        max_distance=distance,
        seconds=sum(measuring),
        forward_ratio=median(measuring) / median(plain),
        layers={
            name: {"mean": entry.mean.tolist(), "stderr": entry.stderr.tolist()}
            for name, entry in sorted(statistics.layers.items())
        },
        sink=statistics.sink.mean.tolist(),
        heads={name: entry.mean.numpy() for name, entry in statistics.heads.items()},
        heads_stderr={name: entry.stderr.numpy() for name, entry in statistics.heads.items()},
    )


def neighbours_table(measured: Measured, most: int = 8) -> Table:
    """The pairs of neighbouring layers whose maps are most alike."""
    names = ("averaged_cosine", "cosine", "cosine_no_sink", "js", "top_k")
    means = {name: measured.layers[name]["mean"] for name in names}
    errors = measured.layers["cosine_no_sink"]["stderr"]
    pairs = sorted(range(1, measured.shape.layers), key=lambda j: -means["cosine_no_sink"][j][j - 1])[:most]
    rows = []
    for layer in sorted(pairs):
        cells = [f"{means[name][layer][layer - 1]:.3f}" for name in names]
        if measured.sequences > 1:
            cells[2] += f" ± {1.96 * errors[layer][layer - 1]:.3f}"
        rows.append([f"{layer - 1}, {layer}", *cells])
    columns = ["layers", "head-averaged", "same heads", "no sink (95 %)", "1 - JS", "top-k"]
    return Table("most similar neighbours", columns, rows)


def _candidates(measured: Measured, config, choices: list[Choice]) -> Table:
    return candidates_table(choices, measured.shape, measured.element_size, parameter_counts(config, choices))


def _write(directory: Path, measured: Measured, tables: list[Table]) -> None:
    from uniattn_cli.analysis.plots import plot_depth, plot_heatmap

    neighbours, candidates = ([dict(zip(t.columns, row, strict=True)) for row in t.rows] for t in tables)
    measured.save(directory, {"neighbours": neighbours, "candidates": candidates})
    plot_heatmap(measured, directory / "similarity.png")
    plot_depth(measured, directory / "depth.png")
