"""The choice of a layout: given, by dynamic programming over similarities, or by scores."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from uniattn_cli.analysis.measured import Measured
from uniattn_cli.errors import LayoutError, StageError
from uniattn_cli.fitting.match_maps import Matcher
from uniattn_cli.layouts.budget import Budget
from uniattn_cli.layouts.by_scores import by_scores
from uniattn_cli.layouts.considered import Considered, Point, frontier_table
from uniattn_cli.layouts.fast import Choice, candidates_table, frontier, parameter_counts
from uniattn_cli.layouts.picture import draw_layout
from uniattn_cli.layouts.plans import plan_of
from uniattn_cli.layouts.shorthand import parse_groups
from uniattn_cli.layouts.solutions import Wish
from uniattn_cli.layouts.workbench import Workbench, matches_by_output
from uniattn_cli.modeling.configuration_uniattn import attention_shape
from uniattn_cli.modeling.layout_uniattn import KINDS, AttentionShape, Layout
from uniattn_cli.models.costs import kv_bytes_per_token
from uniattn_cli.models.of_run import base_of
from uniattn_cli.options import RunOptions
from uniattn_cli.recipe.schema import LayoutSpec, Recipe
from uniattn_cli.run.directory import RunDir
from uniattn_cli.tables import Result, Table

# Similarities that propose other layouts for the shortlist of the fast search, and their names.
SHORTLIST_METRICS = {"cosine_no_sink": "cosine without the sink", "js_no_sink": "Jensen-Shannon without the sink"}


@dataclass(frozen=True)
class Grouping(Result):
    """A chosen layout.

    Attributes:
        layout: one plan per layer.
        considered: what the choice was made from; None for a layout that was given.
    """

    layout: Layout
    considered: Considered | None = None


def compensation_of(recipe: Recipe) -> str | int:
    """The W_c that is asked for where a layer's own entry does not say, see `Kind.compensation_for`."""
    spec = recipe.conversion
    if spec.solve in ("output", "none"):
        return "none"
    # Without a W_c there would be nothing to solve.
    return "full" if spec.rank == "auto" and spec.solve != "both" else spec.rank


def check_rank(rank: str | int, shape: AttentionShape) -> None:
    """Raises `LayoutError` if W_c would have more rank than the hidden size allows."""
    if isinstance(rank, int) and rank > shape.hidden_size:
        raise LayoutError(f"conversion.rank is {rank}, but the hidden size is only {shape.hidden_size}; use full")


def check_analysis(run: RunDir, recipe: Recipe, fingerprint: str) -> None:
    """Makes sure that `analysis/` is of the recipe's model.

    Raises:
        StageError: it is missing, damaged or of another model.
    """
    record = run.record("analyze")
    measured = record["inputs"].get("model")
    if measured != fingerprint:
        name = record.get("settings", {}).get("model", {}).get("name", "another model")
        raise StageError(
            f"{run.output('analyze')} is of {name} ({measured}), but the recipe's model is {recipe.model.name} "
            f"({fingerprint}); use another run directory or run `uniattn analyze --force`"
        )


def choose(run: RunDir, recipe: Recipe, config: Any, options: RunOptions, *, load: bool = True) -> Grouping:
    """The layout that the recipe asks for, without writing anything.

    Args:
        load: whether weights may be loaded, which missing scores need.

    Raises:
        LayoutError: the shorthand or the budget cannot be met.
        StageError: `auto` or a measured head map without an analysis of this model.
    """
    spec = recipe.layout
    shape = attention_shape(config)
    rank = compensation_of(recipe)
    check_rank(rank, shape)
    fixed = None if spec.groups == "auto" else parse_groups(spec.groups, shape, rank)
    check_protected(spec, shape, fixed)
    if fixed is not None and (spec.head_map == "identity" or not _plain_leaders(fixed)):
        return _fixed(fixed, f"layout '{spec.groups}', heads as given")
    source = base_of(recipe)
    check_analysis(run, recipe, source.fingerprint)
    measured = Measured.load(run.output("analyze"))
    bench = Workbench(recipe, source, measured, options)
    if fixed is not None:
        layout = with_head_maps(fixed, measured, spec)
        if load:
            layout = bench.match_heads(layout, fixed=True)
        return _fixed(layout, f"layout '{spec.groups}', head map '{spec.head_map}' {_matched(recipe, layout, load)}")
    if spec.search == "scores":
        return _by_scores(run, bench, Wish.of(spec, shape, config), rank, load)
    return _fast(bench, Budget.of(spec, shape, config), rank, config, load)


def _plain_leaders(layout: Layout) -> bool:
    """Whether a layout borrows, and leaves open which heads."""
    return _borrows(layout) and not any(plan.heads for plan in layout)


def _borrows(layout: Layout) -> bool:
    return any(plan.traits.borrows for plan in layout)


def _matched(recipe: Recipe, layout: Layout, load: bool) -> str:
    """How heads were matched, in words."""
    if recipe.layout.head_map == "identity":
        return "as given"
    words = "matched by similarity of maps"
    if matches_by_output(recipe):
        words = "matched by attention output" if load else f"{words} (a dry run converts nothing)"
    if recipe.layout.head_map == "free" and not layout.followers:
        words += ", key/value heads as a whole (head_map: free is for softmax layers)"
    return words


def _fast(bench: Workbench, budget: Budget, rank: str | int, config: Any, load: bool) -> Grouping:
    """Dynamic programming over similarities, and a comparison of what different similarities propose."""
    spec, measured = bench.recipe.layout, bench.measured
    shape = measured.shape
    kind = spec.kinds[0]
    settings: dict[str, Any] = {"protect": spec.protect, "max_group": spec.max_group}
    settings |= {"compensation": rank, "kind": kind}
    choices = frontier(bench.matcher, **settings)
    counts = parameter_counts(config, choices)
    chosen = _within_budget(choices, budget, shape, counts)
    proposals = {"fast": chosen.layout}
    for name in SHORTLIST_METRICS if load else ():
        matcher = Matcher(measured.heads[name], shape, spec.head_map, spec.sources)
        other = _within_budget(frontier(matcher, **settings), budget, shape, counts).layout
        if all(other.changed != known.changed for known in proposals.values()):
            proposals[f"fast, by {SHORTLIST_METRICS[name]}"] = other
    proposals = dict(list(proposals.items())[: spec.compared])
    shortlist = bench.validate(proposals) if len(proposals) > 1 else []
    if shortlist:
        layout = shortlist[0].layout
    else:
        layout = bench.match_heads(chosen.layout) if load else chosen.layout
    points = [Point("fast", choice.layout, choice.changed - sum(choice.scores.values())) for choice in choices]
    checked = bench.texts.check.numel() if shortlist else 0
    considered = Considered("sum over changed layers of 1 - similarity", points, shortlist, checked, layout)
    note = f"{chosen.changed} {kind} layers: {budget.words}"
    if chosen.changed:
        note += f"; heads {_matched(bench.recipe, layout, load)}"
        if KINDS[kind].borrows_maps:
            note += f", mean similarity of the borrowed maps {bench.matcher.similarity_of(layout):.3f}"
    marked = chosen if not shortlist or shortlist[0].name == "fast" else None
    tables = [candidates_table(choices, shape, measured.element_size, counts, marked)]
    return _grouping(considered, measured, tables, [note])


def _by_scores(run: RunDir, bench: Workbench, wish: Wish, rank: str | int, load: bool) -> Grouping:
    """The layouts that the scores of single layers predict to be best are converted and compared."""
    found = by_scores(run, bench, wish, rank, load)
    considered, layout = found.considered, found.layout
    asked = [wish.words, *([] if found.speed is None else [f"budget speed {bench.recipe.layout.speed}"])]
    note = f"{len(layout.changed)} layers changed: {', '.join(filter(None, asked))}"
    note += f"; predicted loss {found.predicted:.4f} nats per token"
    if found.speed is not None:
        note += f"; decoding steps {found.speed:.3f} times as fast as the base's"
    if _borrows(layout):
        note += f"; heads {_matched(bench.recipe, layout, True)}"
    table = frontier_table(considered.frontier, bench.measured.shape, bench.measured.element_size)
    return _grouping(considered, bench.measured, [table], [note])


def _grouping(considered: Considered, measured: Measured, tables: list[Table], notes: list[str]) -> Grouping:
    table = considered.table(measured.shape, measured.element_size)
    if table is not None:
        tables = [*tables, table]
        notes = [*notes, considered.reason()]
    layout = considered.chosen
    return Grouping(layout, considered, title="layout", picture=draw_layout(layout), tables=tables, notes=notes)


def check_protected(spec: LayoutSpec, shape: AttentionShape, layout: Layout | None = None) -> None:
    """Raises `LayoutError` if a layer that is to stay as it is does not exist, or is changed by a fixed layout."""
    for layer in spec.protect:
        if not 0 <= layer < shape.layers:
            raise LayoutError(f"layout.protect: layer {layer} does not exist; the model has 0 to {shape.layers - 1}")
        if layout is not None and layout[layer].kind != "own":
            raise LayoutError(f"layer {layer} is in layout.protect, but is '{layout[layer].kind}' in the layout")


def _fixed(layout: Layout, note: str) -> Grouping:
    note = f"{len(layout.changed)} layers changed: {note}"
    return Grouping(layout, title="layout", picture=draw_layout(layout), notes=[note])


def with_head_maps(layout: Layout, measured: Measured, spec: LayoutSpec) -> Layout:
    """Gives the borrowing layers of a fixed layout the measured head maps onto their own leaders.

    Layers farther from their leader than was measured keep the plain map.
    """
    matcher = Matcher(measured.score, measured.shape, spec.head_map, "one")
    size = measured.shape.group_size
    plans = list(layout)
    for index, plan in enumerate(plans):
        if plan.leader is not None and index - plan.leader <= measured.max_distance:
            match = matcher.for_kind(plan.kind).match(index, [plan.leader])
            plans[index] = plan_of(match, plan.compensation, plan.kind, size) if match else plan
    return Layout(tuple(plans))


def _within_budget(choices: list[Choice], budget: Budget, shape: AttentionShape, counts: dict[int, int]) -> Choice:
    """The choice with the fewest changed layers that meets the budget."""
    meets = [choice for choice in choices if budget.met(choice.layout)]
    if not meets:
        most = choices[-1]
        least_kv = kv_bytes_per_token(most.layout, shape, 1) / kv_bytes_per_token(choices[0].layout, shape, 1)
        least_parameters = min(counts.values()) / counts[0]
        more = ", layout.protect or analysis.max_distance"
        if budget.unit == "params" and least_parameters == 1:
            more = "; a full W_c is as large as the weights saved: set conversion.rank or conversion.solve: output"
        raise LayoutError(
            f"{budget.words} cannot be met: at most {most.changed} layers can change (at least {least_kv:.3f} of the "
            f"base's KV bytes and {least_parameters:.3f} of its parameters remain); relax the budget{more}"
        )
    return meets[0]
