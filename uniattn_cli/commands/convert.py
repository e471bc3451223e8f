"""`uniattn convert`: from the base and a layout to a fitted checkpoint that loads anywhere."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from uniattn_cli.commands.group import chooses_layout, layout_overrides, store_layout, write_considered
from uniattn_cli.errors import LayoutError
from uniattn_cli.layouts.choose import Grouping, check_analysis, check_protected, choose, compensation_of
from uniattn_cli.layouts.picture import draw_layout
from uniattn_cli.modeling.configuration_uniattn import attention_shape, layer_windows
from uniattn_cli.modeling.layout_uniattn import Layout
from uniattn_cli.models.costs import count_parameters, element_size_of, kv_bytes, kv_bytes_per_token
from uniattn_cli.models.families import check_target
from uniattn_cli.models.hub import context_window
from uniattn_cli.models.losses import Loss
from uniattn_cli.options import RunOptions
from uniattn_cli.recipe.schema import Recipe
from uniattn_cli.run.directory import REPORT_FILE, RunDir
from uniattn_cli.run.files import write_json
from uniattn_cli.run.lock import alone
from uniattn_cli.tables import Result, Table

if TYPE_CHECKING:
    from uniattn_cli.fitting.fit import LayerFit
    from uniattn_cli.fitting.needs import Need

# Held-out tokens for the perplexities that are printed; `uniattn eval` measures more.
QUICK_TOKENS = 8192


@dataclass(frozen=True)
class Costs:
    """What a model costs before and after.

    Attributes:
        parameters: base, converted.
        weight_bytes: bytes of the weights on disk, base, converted.
        kv_bytes: KV-cache bytes per token, base, converted.
    """

    parameters: tuple[int, int]
    weight_bytes: tuple[int, int]
    kv_bytes: tuple[int, int]


@dataclass(frozen=True)
class Conversion(Result):
    """Result of `convert`.

    Attributes:
        layout: what each layer does now.
        costs: before and after.
        fits: error of each changed layer before and after its fit; empty for a dry run.
        losses: held-out loss of `base`, `uncompensated` and `converted`; empty for a dry run.
        directory: the checkpoint, or None for a dry run.
        needs: memory and disk that it takes, for a dry run.
    """

    layout: Layout
    costs: Costs
    fits: list[LayerFit]
    losses: dict[str, Loss]
    directory: Path | None
    needs: list[Need] = field(default_factory=list)


@alone
def convert(
    *,
    run_dir: Path | str = ".",
    groups: str | None = None,
    dry_run: bool = False,
    overrides: Sequence[str] = (),
    options: RunOptions = RunOptions(),
) -> Conversion:
    """Builds, fits and saves the converted model; chooses the layout first if the recipe has none.

    Args:
        run_dir: holds `recipe.yaml`, and `analysis/` where the layout or head maps come from it.
        groups: a form of `--groups`; None takes the recipe's layout, unless an override of `layout` asks for another
            or there is none; then it chooses one as the recipe says.
        dry_run: only report layout, savings and what the conversion takes; no weights are loaded, nothing is written.
        overrides: `key.path=value` strings for the recipe.
        options: device, force, progress.

    Raises:
        UniAttnError: one of its subclasses, with one clear line.
    """
    from uniattn_cli.models.loading import check_lengths, load_config
    from uniattn_cli.models.of_run import base_of
    from uniattn_cli.models.parity import prove_parity

    run = RunDir(run_dir)
    overrides = layout_overrides(run, groups, overrides)
    recipe = Recipe.load(run.recipe, overrides)
    if not dry_run:
        run.check_free("convert", options.force)
    source = base_of(recipe)
    config = load_config(source)
    lengths = {"conversion.length": recipe.conversion.length, "evaluation.length": recipe.evaluation.length}
    check_lengths(config, lengths)
    check_target(config.model_type, recipe.conversion.aim)
    options.torch_device()  # a device that is not there is told before any work
    if run.is_complete("analyze"):
        # The layout in the recipe was most likely chosen from it.
        check_analysis(run, recipe, source.fingerprint)
    fresh = recipe.layout.layers is None or chooses_layout(overrides)
    grouping = choose(run, recipe, config, options, load=not dry_run) if fresh else _stored_layout(recipe, config)
    layout = grouping.layout
    element_size = element_size_of(recipe.model, config)
    costs = _costs(config, layout, element_size)
    notes = [*grouping.notes, *_alignment_notes(recipe, layout), *_window_notes(config, layout, element_size)]
    if dry_run:
        needs, table = _needs(recipe, source, config, costs, layout, run, options)
        notes.append("dry run: nothing was written")
        tables = [_cost_table(costs, {}), table]
        shown: dict[str, Any] = {"picture": grouping.picture, "tables": tables, "notes": notes}
        return Conversion(layout, costs, [], {}, None, needs, title="conversion", **shown)
    prove_parity(config)
    with run.write("convert", recipe, {"model": source.fingerprint}, force=options.force) as directory:
        fits, losses, more = _convert(recipe, source, layout, costs.weight_bytes[0], directory, options)
        _write_report(directory, layout, costs, fits, losses)
        if fresh:
            write_considered(run, recipe, grouping)
            store_layout(run, layout, recipe)
    notes += more
    notes.append(f"checkpoint: {run.output('convert')}; next: uniattn train recipe.yaml")
    shown = {"picture": grouping.picture, "tables": [_cost_table(costs, losses), *_fit_tables(fits)], "notes": notes}
    return Conversion(layout, costs, fits, losses, run.output("convert"), title="conversion", **shown)


def _stored_layout(recipe: Recipe, config: Any) -> Grouping:
    """The layout that the recipe holds, checked against the model."""
    shape = attention_shape(config)
    try:
        layout = Layout.from_list(recipe.layout.layers or (), compensation_of(recipe))
        problems = layout.problems(shape)
        if problems:
            raise ValueError(problems[0] + (f" (and {len(problems) - 1} more)" if len(problems) > 1 else ""))
        check_protected(recipe.layout, shape, layout)
    except (ValueError, LayoutError) as error:
        raise LayoutError(f"recipe.yaml, layout.layers: {error}") from None
    note = f"layout of the recipe, {len(layout.changed)} layers changed (--groups chooses another)"
    return Grouping(layout, title="layout", picture=draw_layout(layout), notes=[note])


def _costs(config: Any, layout: Layout, element_size: int) -> Costs:
    shape = attention_shape(config)
    pair = (Layout.own(shape.layers), layout)
    before, after = (count_parameters(config, entry) for entry in pair)
    kv_before, kv_after = (kv_bytes_per_token(entry, shape, element_size) for entry in pair)
    return Costs((before, after), (before * element_size, after * element_size), (kv_before, kv_after))


def _needs(
    recipe: Recipe, source: Any, config: Any, costs: Costs, layout: Layout, run: RunDir, options: RunOptions
) -> tuple[list[Need], Table]:
    """What the conversion will take, and a table of that."""
    import shutil

    import torch

    from uniattn_cli.fitting.needs import conversion_needs, needs_table
    from uniattn_cli.models.device import available_bytes
    from uniattn_cli.models.placement import place

    device, scored = options.torch_device(), recipe.evaluation
    placed = place(source, recipe.conversion.offload, costs.weight_bytes[0], device)
    heldout = min(scored.tokens, QUICK_TOKENS)
    needs = conversion_needs(
        config, layout, placed, element_size_of(recipe.model, config), recipe.conversion, scored, heldout
    )
    folder = next(each for each in (run.root.absolute(), *run.root.absolute().parents) if each.exists())
    free = {
        "device": available_bytes(device),
        "cpu": available_bytes(torch.device("cpu")),
        "disk": shutil.disk_usage(folder).free,
    }
    return needs, needs_table(needs, free, placed.words)


def _alignment_notes(recipe: Recipe, layout: Layout) -> list[str]:
    """A warning where queries meet keys that they were not made for, and nothing will match them."""
    layers = [index for index in layout.changed if layout[index].traits.aligns_queries]
    if recipe.conversion.align or not layers:
        return []
    named = ", ".join(map(str, layers))
    return [f"conversion.align is 0: queries do not fit the borrowed keys, and maps are noise, in layers {named}"]


def _window_notes(config: Any, layout: Layout, element_size: int) -> list[str]:
    """What is saved at full length, where sliding layers keep their window only and bytes per token mislead."""
    windows = [window for window in layer_windows(config) if window is not None]
    tokens = context_window(config)
    if not windows or not tokens or tokens <= min(windows):
        return []
    before, after = (kv_bytes(config, entry, tokens, element_size) for entry in (Layout.own(len(layout)), layout))
    return [
        f"KV cache of {tokens:,} tokens: {before / 1e6:,.1f} MB, converted {after / 1e6:,.1f} MB "
        f"({after / before - 1:+.1%}); {len(windows)} of {len(layout)} layers cache at most {min(windows):,} tokens"
    ]


def _convert(
    recipe: Recipe, source: Any, layout: Layout, weight_bytes: int, directory: Path, options: RunOptions
) -> tuple[list[LayerFit], dict[str, Loss], list[str]]:
    """Loads, fits, scores and saves, each layer only once. Returns fits, losses and notes."""
    import torch

    from uniattn_cli.data.chat import load_chat_tokenizer
    from uniattn_cli.data.screen import Screen
    from uniattn_cli.data.windows import calibration_windows, heldout_windows
    from uniattn_cli.fitting.fit import fit_layers
    from uniattn_cli.fitting.stream import Passage, start_batches
    from uniattn_cli.models.building import build_converted, save_checkpoint
    from uniattn_cli.models.loading import loading_notes
    from uniattn_cli.models.on_disk import Shards
    from uniattn_cli.models.placement import place

    spec = recipe.conversion
    progress = options.progress
    tokenizer = load_chat_tokenizer(source, recipe.data.chat_template)
    data, scored = recipe.data, recipe.evaluation
    screen = Screen(data, tokenizer, progress.warn)
    windows = calibration_windows(
        data, tokenizer, tokens=spec.tokens, length=spec.length, seed=recipe.seed, screen=screen
    )
    heldout = heldout_windows(
        data, tokenizer, tokens=min(scored.tokens, QUICK_TOKENS), length=scored.length, screen=screen
    )
    notes = []
    if windows.numel() < spec.tokens - spec.length:
        notes.append(f"the calibration text has {windows.numel():,} of the {spec.tokens:,} tokens requested")
    if len(windows) == 1 and layout.changed:
        notes.append("one calibration sequence: nothing is held out from the fit, so its errors are underestimated")
    placed = place(source, spec.offload, weight_bytes, options.torch_device())
    progress.note(f"loading {recipe.model.name} {placed.words}")
    base = placed.load(source, recipe.model)
    notes += loading_notes(source, base.config)
    torch.manual_seed(recipe.seed)
    converted = build_converted(base, layout)
    batch_size = recipe.evaluation.batch_size
    scored_batches = start_batches(base, heldout, 0.0, batch_size, placed.device)
    passages = {name: Passage(scored_batches) for name in ("base", "uncompensated", "converted")}
    shards = None
    if placed.on_disk:
        # First, because what writes it removes shards that it does not know.
        save_checkpoint(converted, tokenizer, directory, weights=False)
        shards = Shards(directory, len(layout))

    def watch(index: int, base_layer: Any, layer: Any, fitted: bool) -> None:
        if fitted:
            passages["converted"].step(layer, index, layout)
            if shards is not None:
                shards.add_layer(index, layer)
        else:
            passages["base"].step(base_layer, index)
            passages["uncompensated"].step(layer, index, layout)

    with progress.track("fitting", len(layout)) as advance:
        fits = fit_layers(
            *(base, converted, windows, spec),
            device=placed.device,
            batch_size=batch_size,
            advance=advance,
            watch=watch,
        )
    losses = {name: passage.loss(base if name == "base" else converted, heldout) for name, passage in passages.items()}
    if shards is not None:
        shards.finish(converted)
    else:
        save_checkpoint(converted, tokenizer, directory)
    return fits, losses, notes


def _write_report(directory: Path, layout: Layout, costs: Costs, fits: list[LayerFit], losses: dict[str, Loss]) -> None:
    """Writes `uniattn_report.json` beside the weights: layout, costs, errors per layer, held-out losses in nats."""
    import math

    layers = []
    for fit in fits:
        entry = asdict(fit)
        entry["ridge"] = None if math.isinf(fit.ridge) else fit.ridge
        layers.append(entry)
    content = {
        "schema": 1,
        "layout": layout.to_list(),
        "costs": {key: {"base": value[0], "converted": value[1]} for key, value in asdict(costs).items()},
        "fits": layers,
        "losses": {
            name: {"mean": loss.mean, "stderr": None if math.isnan(loss.stderr) else loss.stderr, "tokens": loss.tokens}
            for name, loss in losses.items()
        },
    }
    write_json(directory / REPORT_FILE, content)


def _cost_table(costs: Costs, losses: dict[str, Loss]) -> Table:
    def row(name: str, pair: tuple[int, int]) -> list[str]:
        return [name, f"{pair[0]:,}", f"{pair[1]:,}", f"{pair[1] / pair[0] - 1:+.1%}"]

    rows = [
        row("parameters", costs.parameters),
        row("bytes of weights", costs.weight_bytes),
        row("KV bytes per token", costs.kv_bytes),
    ]
    if losses:
        base = losses["base"]
        for name, label in (("uncompensated", "perplexity, not fitted"), ("converted", "perplexity, fitted")):
            ratio = losses[name].perplexity / base.perplexity
            rows.append([label, f"{base.perplexity:.2f}", f"{losses[name].perplexity:.2f}", f"x{ratio:.3f}"])
    title = "before and after"
    if losses:
        title += f" (perplexity on {losses['base'].tokens:,} held-out tokens)"
    return Table(title, ["", "base", "converted", "change"], rows)


def _fit_tables(fits: list[LayerFit]) -> list[Table]:
    if not fits:
        return []
    rows = [
        [str(fit.layer), fit.kind, f"{fit.error_before:.3f}", f"{fit.error_after:.3f}", f"{fit.ridge:.0e}"]
        for fit in fits
    ]
    columns = ["layer", "kind", "error before", "after", "ridge"]
    tables = [Table("relative squared error of the attention output on tokens held out from the fit", columns, rows)]
    aligned = [(fit, fit.divergence) for fit in fits if fit.divergence is not None]
    if aligned:
        rows = [[str(fit.layer), fit.kind, f"{pair[0]:.3f}", f"{pair[1]:.3f}"] for fit, pair in aligned]
        title = "KL divergence of the maps from the base's, in nats, in layers with aligned queries"
        tables.append(Table(title, ["layer", "kind", "before", "after"], rows))
    refined = [(fit, fit.refined) for fit in fits if fit.refined is not None]
    if refined:
        rows = [[str(fit.layer), fit.kind, f"{pair[0]:.3f}", f"{pair[1]:.3f}"] for fit, pair in refined]
        title = "error after the fit, as above, with W_o and W_c solved and with all projections refined"
        tables.append(Table(title, ["layer", "kind", "solved", "refined"], rows))
    return tables
