"""`uniattn analyze`: one pass over calibration text that measures how redundant the attention maps are."""

from __future__ import annotations

import functools
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from uniattn_cli.analysis.measured import Measured
from uniattn_cli.errors import DataError, StageError
from uniattn_cli.fitting.match_maps import Matcher
from uniattn_cli.layouts.choose import check_protected, compensation_of
from uniattn_cli.layouts.considered import frontier_table
from uniattn_cli.layouts.fast import candidates_table, frontier, parameter_counts
from uniattn_cli.layouts.scores import Score, kept
from uniattn_cli.layouts.solutions import frontier as frontier_of_scores
from uniattn_cli.modeling.configuration_uniattn import attention_shape
from uniattn_cli.modeling.layout_uniattn import KINDS, AttentionShape, Layout
from uniattn_cli.options import RunOptions, Silent
from uniattn_cli.recipe import ready
from uniattn_cli.recipe.files import commented_tree, read_tree, write_tree
from uniattn_cli.recipe.paths import located
from uniattn_cli.recipe.reading import move_paths
from uniattn_cli.recipe.schema import ModelSpec, Recipe
from uniattn_cli.run.directory import RunDir
from uniattn_cli.run.files import file_errors
from uniattn_cli.run.lock import alone
from uniattn_cli.run.process import join_processes, shared_output
from uniattn_cli.tables import Result, Table

if TYPE_CHECKING:
    import torch

# Sequences that wait for the end of a pass take this share of the free CPU memory, and are no more than these.
MOST_WAITING, MOST_AT_ONCE = 0.4, 64
# A sample is too small if the usual 95 % half-width of a score exceeds this share of the spread between scores.
RESOLVED = 0.25


@dataclass(frozen=True)
class Analysis(Result):
    """Result of `analyze`.

    Attributes:
        measured: all numbers.
        directory: where they were written.
    """

    measured: Measured
    directory: Path


@alone
def analyze(
    model: str | None = None,
    *,
    run_dir: Path | str = ".",
    recipe: Path | str | None = None,
    overrides: Sequence[str] = (),
    options: RunOptions = RunOptions(),
) -> Analysis:
    """Measures the similarity of all attention maps and writes `analysis/`, and `recipe.yaml` if there is none.

    Several processes, started by `torchrun`, share the sequences among them.

    Args:
        model: hub id or directory; None takes the recipe's.
        run_dir: where to write.
        recipe: file or ready recipe that a new `recipe.yaml` starts from, with `model` put in and its paths rewritten
            for the run directory; None starts from the defaults.
        overrides: `key.path=value` strings for the recipe.
        options: device, force, progress.

    Raises:
        UniAttnError: one of the subclasses in `uniattn_cli.errors`, with one clear line.
    """
    from uniattn_cli.data.chat import load_chat_tokenizer
    from uniattn_cli.data.screen import Screen
    from uniattn_cli.data.windows import calibration_windows
    from uniattn_cli.models.costs import count_parameters, element_size_of
    from uniattn_cli.models.loading import check_lengths, load_config, loading_notes
    from uniattn_cli.models.of_run import base_of
    from uniattn_cli.models.placement import place

    run = RunDir(run_dir)
    settings, new_tree = _recipe(run, model, recipe, overrides)
    run.check_free("analyze", options.force)
    source = base_of(settings)
    config = load_config(source)
    spec = settings.analysis
    check_lengths(config, {"analysis.length": spec.length})
    check_protected(settings.layout, attention_shape(config))
    process = join_processes(options)  # a device that is not there is told before any work
    progress = options.progress if process.is_main_process else Silent()
    device = process.device
    tokenizer = load_chat_tokenizer(source, settings.data.chat_template)
    windows = calibration_windows(
        settings.data,
        tokenizer,
        tokens=spec.tokens,
        length=spec.length,
        seed=settings.seed,
        screen=Screen(settings.data, tokenizer, progress.warn),
    )
    notes = _check_text(windows, tokenizer, spec.tokens)
    from uniattn_cli.analysis.measure import measure  # a slow import; faults of the settings are told before it

    shape, element = attention_shape(config), element_size_of(settings.model, config)
    weights = count_parameters(config, Layout.own(shape.layers)) * element
    placed = place(source, settings.conversion.offload, weights, device)
    progress.note(f"loading {settings.model.name} {placed.words}")
    loaded = placed.load(source, _readable(settings.model))
    notes += loading_notes(source, loaded.config)
    inputs = {"model": source.fingerprint}
    with shared_output(process, run, "analyze", settings, inputs, force=options.force, resume=False) as directory:
        with progress.track("analyzing", len(windows)) as advance:
            measured, left_out = measure(
                loaded,
                windows,
                spec,
                source,
                functools.partial(advance, process.num_processes),
                device=placed.device,
                at_once=1 if placed.whole else _at_once(shape, spec.length * element),
                process=process,
            )
        matcher = Matcher(measured.score, measured.shape, settings.layout.head_map, settings.layout.sources)
        tables = [neighbours_table(measured), _candidates(measured, config, matcher, settings)]
        if process.is_main_process:
            _write(directory, measured, tables)
            if new_tree is not None:
                with file_errors(run.root):
                    write_tree(new_tree, run.recipe)
    proposed = _scored(kept(run, source.fingerprint, measured), measured, settings)
    notes += [*left_out, *resolution_note(measured)]
    notes.append(
        f"{measured.tokens:,} tokens in {measured.seconds:.0f} s, {measured.forward_ratio:.1f}x a plain forward pass"
    )
    search = " --search scores" if proposed else ""
    notes.append(f"plots and figures: {run.output('analyze')}; next: uniattn convert --groups auto{search}")
    return Analysis(measured, run.output("analyze"), title="analysis", tables=[*tables, *proposed], notes=notes)


def _recipe(
    run: RunDir, model: str | None, template: Path | str | None, overrides: Sequence[str]
) -> tuple[Recipe, Any]:
    """The recipe, and the tree to write if there is none yet."""
    model = None if model is None else _resolved(model)
    if run.recipe.exists():
        if template is not None:
            raise StageError(f"{run.recipe} exists, but --recipe starts a new one; use another run directory (-C DIR)")
        recipe = Recipe.load(run.recipe, overrides)
        if model is not None and _resolved(recipe.model.name) != model:
            raise StageError(
                f"{run.recipe} is for {recipe.model.name}, not {model}; use another run directory (-C DIR) or edit it"
            )
        return recipe, None
    if template is not None:
        path = ready.resolve(template)
        tree, name = read_tree(path), path.name
        move_paths(Recipe, tree, path.parent, run.root)
        named = [] if model is None else [f"model.name={json.dumps(model)}"]
        return Recipe.from_tree(tree, name, [*named, *overrides], run.root), tree
    if model is None:
        raise StageError(f"{run.recipe} does not exist; run `uniattn analyze MODEL`")
    tree = commented_tree(Recipe(model=ModelSpec(name=model)))
    return Recipe.from_tree(tree, "recipe.yaml", overrides, run.root), tree


def _at_once(shape: AttentionShape, element: int) -> int:
    """Sequences of one pass, where layers come to the device one by one: as many as can wait in CPU memory.

    Args:
        element: bytes of a number for each token of a sequence.
    """
    import torch

    from uniattn_cli.models.device import available_bytes

    heads = 2 * (shape.query_heads + shape.kv_heads) * shape.head_dim
    share = MOST_WAITING * available_bytes(torch.device("cpu"))
    return max(1, min(MOST_AT_ONCE, int(share / (shape.layers * (heads + shape.hidden_size) * element))))


def _resolved(model: str) -> str:
    """The absolute path of a directory, so that other stages find it from anywhere; hub ids as they are."""
    path = located(model)
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
            f"{1 - ordinary / windows.numel():.0%} of the calibration tokens are special tokens; use ordinary text"
        )
    if windows.numel() < wanted - windows.shape[1]:
        return [f"the calibration text has {windows.numel():,} of the {wanted:,} tokens requested"]
    return []


def resolution_note(measured: Measured) -> list[str]:
    """A warning if the sample is too small to tell borrowings apart, with the tokens that would do."""
    width, spread = measured.resolution()
    # NaN for a single sequence compares as false.
    if not width > RESOLVED * spread > 0:
        return []
    # Errors fall with the root of the number of sequences. Two digits are all that the estimate is worth.
    wanted = measured.tokens * (width / (RESOLVED * spread)) ** 2
    unit = 10 ** (math.floor(math.log10(wanted)) - 1)
    return [
        f"few tokens: similarities have 95 % intervals of ± {width:.3f} but differ by only {spread:.3f} between heads; "
        f"for a reliable choice: uniattn analyze --force --tokens {math.ceil(wanted / unit) * unit}"
    ]


def neighbours_table(measured: Measured, most: int = 8) -> Table:
    """The pairs of adjacent layers with the most similar maps."""
    names = ("averaged_cosine", "cosine", "cosine_no_sink", "js", "top_k")
    columns = ["layers", "head-averaged", "same heads", "no sink", "1 - JS", "top-k"]
    shown = [measured.layers[name] for name in names]
    if measured.output_error is not None:
        errors = measured.output_error
        shown += [{"mean": errors[name], "stderr": errors[name + "_stderr"]} for name in ("before", "after")]
        columns += ["output error", "compensated"]
    likeness = measured.layers["cosine_no_sink"]["mean"]
    pairs = sorted(sorted(range(1, measured.shape.layers), key=lambda j: -likeness[j][j - 1])[:most])
    rows = [[f"{j - 1}, {j}", *(_number(entry["mean"][j][j - 1]) for entry in shown)] for j in pairs]
    widths = [1.96 * value for j in pairs for entry in shown if _known(value := entry["stderr"][j][j - 1])]
    return Table("most similar adjacent layers" + _within(widths), columns, rows)


def _scored(scores: list[Score], measured: Measured, recipe: Recipe) -> list[Table]:
    """What the best layouts at several sizes of the cache are predicted to lose, where plans have been scored."""
    if not scores:
        return []
    kinds = tuple(dict.fromkeys(score.question.kind for score in scores))
    points = frontier_of_scores(scores, replace(recipe.layout, kinds=kinds), measured.shape)
    return [frontier_table(points, measured.shape, measured.element_size)]


def _candidates(measured: Measured, config, matcher: Matcher, recipe: Recipe) -> Table:
    """What the fast search would choose for the first kind of the recipe that borrows."""
    spec = recipe.layout
    limits: dict[str, Any] = {"protect": spec.protect, "max_group": spec.max_group}
    kind = next((kind for kind in spec.kinds if KINDS[kind].borrows), "softmax")
    choices = frontier(matcher, kind=kind, compensation=compensation_of(recipe), **limits)
    table = candidates_table(choices, measured.shape, measured.element_size, parameter_counts(config, choices))
    heads, errors = measured.shape.query_heads, measured.score_stderr
    widths = []
    # The same layers with the same maps, whatever they become.
    alike = choices if KINDS[kind].borrows_maps else frontier(matcher.for_kind(kind), **limits)
    for choice in alike:
        for layer in choice.layout.changed:
            sources = enumerate(choice.layout[layer].sources(measured.shape))
            total = sum(errors[layer, layer - other - 1, own, head] for own, (other, head) in sources)
            widths.append(1.96 * float(total) / heads)
    return replace(table, title=table.title + _within([width for width in widths if _known(width)]))


def _known(value: float | None) -> bool:
    """Whether there is a number: null where an analysis was read from its file, NaN before it was written."""
    return value is not None and not math.isnan(value)


def _number(value: float | None) -> str:
    return f"{value:.3f}" if _known(value) else "-"


def _within(widths: list[float]) -> str:
    return f" (95 % intervals: ± {max(widths):.3f} or less)" if widths else ""


def _write(directory: Path, measured: Measured, tables: list[Table]) -> None:
    from uniattn_cli.analysis.plots import plot_depth, plot_heatmap

    neighbours, candidates = ([dict(zip(t.columns, row, strict=True)) for row in t.rows] for t in tables)
    measured.save(directory, {"neighbours": neighbours, "candidates": candidates})
    plot_heatmap(measured, directory / "similarity.png")
    plot_depth(measured, directory / "depth.png")
