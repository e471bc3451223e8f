"""`uniattn group`: chooses a layout under a budget and writes it into the recipe."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from uniattn_cli.accounting import count_parameters, kv_bytes_per_token
from uniattn_cli.checkpoint import Source, load_config, locate
from uniattn_cli.errors import LayoutError, StageError, UsageError
from uniattn_cli.grouping.matching import Matcher
from uniattn_cli.grouping.measured import Measured
from uniattn_cli.grouping.picture import draw_layout
from uniattn_cli.grouping.search import Choice, frontier, plan_of
from uniattn_cli.grouping.shorthand import parse_groups
from uniattn_cli.modeling.configuration_uniattn import attention_shape
from uniattn_cli.modeling.layout_uniattn import AttentionShape, Layout
from uniattn_cli.options import RunOptions
from uniattn_cli.recipe import LayoutSpec, Recipe, read_tree, write_tree
from uniattn_cli.rundir import RunDir, file_errors
from uniattn_cli.tables import Table

DEFAULT_KV = 0.8
BUDGETS = ("layout.followers", "layout.kv", "layout.params")


@dataclass(frozen=True)
class Grouping:
    """A chosen layout.

    Attributes:
        layout: one plan per layer.
        picture: the layout drawn with characters.
        tables: candidates over budgets.
        notes: what was chosen and why.
    """

    layout: Layout
    picture: str
    tables: list[Table]
    notes: list[str] = field(default_factory=list)
    title: str = "layout"


def group(
    run_dir: Path | str = ".",
    *,
    groups: str | None = None,
    overrides: Sequence[str] = (),
    options: RunOptions | None = None,
) -> Grouping:
    """Chooses a layout and writes it into `recipe.yaml`, keeping the user's comments and order.

    Args:
        run_dir: holds `recipe.yaml` and `analysis/`.
        groups: a form of `shorthand.FORMS`; None takes the recipe's.
        overrides: `key.path=value` strings for the recipe.
        options: device and progress, for the thorough search.

    Raises:
        RecipeError, StageError, LayoutError, ModelError: see the messages.
    """
    run = RunDir(run_dir)
    recipe = Recipe.load(run.recipe, layout_overrides(groups, overrides))
    config = load_config(locate(recipe.model.name, recipe.model.revision))
    grouping = choose(run, recipe, config, options or RunOptions())
    store_layout(run, grouping.layout, recipe)
    return grouping


def layout_overrides(groups: str | None, overrides: Sequence[str]) -> list[str]:
    """The overrides with `groups` among them.

    A budget asks for a choice: with one, `groups` is `auto` unless it is given too, whatever the recipe has.

    Raises:
        UsageError: a budget together with a fixed layout.
    """
    given = {key: value.strip() for key, _, value in (override.partition("=") for override in overrides)}
    budgets = [key for key in BUDGETS if given.get(key, "null") not in ("", "~", "null")]
    fixed = given.get("layout.groups") if groups is None else groups
    if budgets and fixed not in (None, "auto"):
        raise UsageError(f"--groups {fixed} leaves nothing to choose; leave {budgets[0]} out, or use --groups auto")
    if budgets and fixed is None:
        groups = "auto"
    return [*overrides, *([] if groups is None else [f"layout.groups={json.dumps(groups)}"])]


def chooses_layout(overrides: Sequence[str]) -> bool:
    """Whether a setting asks for another layout than the one that the recipe holds."""
    keys = {override.partition("=")[0] for override in overrides}
    return any(key.startswith("layout.") and key != "layout.layers" for key in keys)


def compensation_of(recipe: Recipe) -> str | int:
    """The W_c that changed layers get unless their own entry says otherwise."""
    return recipe.conversion.rank if recipe.conversion.solve in ("both", "compensation") else "none"


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
            f"{run.output('analyze')} is of {name} ({measured}), the recipe's model is {recipe.model.name} "
            f"({fingerprint}); use another run directory or run `uniattn analyze --force`"
        )


def choose(run: RunDir, recipe: Recipe, config: Any, options: RunOptions, *, load: bool = True) -> Grouping:
    """The layout that the recipe asks for, without writing anything.

    Args:
        load: whether weights may be loaded, which the thorough search needs.

    Raises:
        LayoutError: the shorthand or the budget cannot be met.
        StageError: `auto` or a measured head map without an analysis of this model.
    """
    spec = recipe.layout
    shape = attention_shape(config)
    rank = compensation_of(recipe)
    if isinstance(rank, int) and rank > shape.hidden_size:
        raise LayoutError(f"conversion.rank is {rank}, but the model is only {shape.hidden_size} wide; use full")
    fixed = None if spec.groups == "auto" else parse_groups(spec.groups, shape, rank)
    check_protected(spec, shape, fixed)
    if fixed is not None and (spec.head_map == "identity" or any(plan.heads for plan in fixed)):
        return _fixed(fixed, f"layout '{spec.groups}', heads as given")
    source = locate(recipe.model.name, recipe.model.revision)
    check_analysis(run, recipe, source.fingerprint)
    measured = Measured.load(run.output("analyze"))
    if fixed is not None:
        layout = with_head_maps(fixed, measured, spec)
        return _fixed(layout, f"layout '{spec.groups}', head map '{spec.head_map}' from the analysis")
    if spec.search == "thorough":
        if not load:
            raise LayoutError("a dry run cannot search thoroughly; run `uniattn group` first, or use --search fast")
        return _thorough(recipe, source, config, measured, rank, options)
    matcher = Matcher(measured.score, shape, spec.head_map, spec.sources)
    choices = frontier(matcher, protect=spec.protect, max_group=spec.max_group, compensation=rank)
    counts = parameter_counts(config, choices)
    chosen, reason = _within_budget(choices, spec, shape, counts)
    table = candidates_table(choices, shape, measured.element_size, counts, chosen)
    note = f"{chosen.followers} followers: {reason}; mean similarity of the borrowed maps {chosen.mean_score:.3f}"
    return Grouping(chosen.layout, draw_layout(chosen.layout), [table], [note])


def _thorough(
    recipe: Recipe, source: Source, config: Any, measured: Measured, rank: str | int, options: RunOptions
) -> Grouping:
    from uniattn_cli.grouping.thorough import budget_met, search, steps_table

    met = budget_met(recipe.layout, measured.shape, config, DEFAULT_KV)
    steps = search(recipe, source, measured, met, rank, options)
    layout = steps[-1].layout if steps else Layout.own(measured.shape.layers)
    divergence = steps[-1].divergence if steps else 0.0
    note = (
        f"{len(layout.changed)} layers changed by the thorough search: KL from the base {divergence:.4f} nats per token"
    )
    return Grouping(layout, draw_layout(layout), [steps_table(steps, measured)], [note])


def check_protected(spec: LayoutSpec, shape: AttentionShape, layout: Layout | None = None) -> None:
    """Raises `LayoutError` if a layer that is to stay as it is does not exist, or is changed by a fixed layout."""
    for layer in spec.protect:
        if not 0 <= layer < shape.layers:
            raise LayoutError(f"layout.protect: layer {layer} does not exist; the model has 0 to {shape.layers - 1}")
        if layout is not None and layout[layer].kind != "own":
            raise LayoutError(f"layer {layer} is in layout.protect, but the layout makes it '{layout[layer].kind}'")


def _fixed(layout: Layout, note: str) -> Grouping:
    return Grouping(layout, draw_layout(layout), [], [f"{len(layout.changed)} layers changed: {note}"])


def with_head_maps(layout: Layout, measured: Measured, spec: LayoutSpec) -> Layout:
    """Gives the followers of a fixed layout the measured head maps onto their own leaders.

    Followers farther from their leader than was measured keep the plain map.
    """
    matcher = Matcher(measured.score, measured.shape, spec.head_map, "one")
    plans = list(layout)
    for index, plan in enumerate(plans):
        if plan.kind == "softmax" and plan.leader is not None and index - plan.leader <= measured.max_distance:
            plans[index] = plan_of(matcher.match(index, [plan.leader]), plan.compensation)
    return Layout(tuple(plans))


def parameter_counts(config: Any, choices: Sequence[Choice]) -> dict[int, int]:
    """Parameters by number of followers; every follower of one family saves the same, so two counts are enough."""
    own = count_parameters(config, choices[0].layout)
    if len(choices) == 1:
        return {0: own}
    saved = own - count_parameters(config, choices[1].layout)
    return {choice.followers: own - choice.followers * saved for choice in choices}


def _within_budget(choices: list[Choice], spec: LayoutSpec, shape: Any, counts: dict[int, int]) -> tuple[Choice, str]:
    """The choice with the fewest followers that meets the budget, and the budget in words."""
    own_kv = kv_bytes_per_token(choices[0].layout, shape, 1)
    if spec.followers is not None:
        meets = [choice for choice in choices if choice.followers >= spec.followers]
        reason = f"budget followers {spec.followers}"
    elif spec.params is not None:
        meets = [choice for choice in choices if counts[choice.followers] <= spec.params * counts[0]]
        reason = f"budget params {spec.params}"
    else:
        share = DEFAULT_KV if spec.kv is None else spec.kv
        meets = [choice for choice in choices if kv_bytes_per_token(choice.layout, shape, 1) <= share * own_kv]
        reason = f"{'budget' if spec.kv is not None else 'default budget'} kv {share}"
    if not meets:
        most = choices[-1]
        least_kv = kv_bytes_per_token(most.layout, shape, 1) / own_kv
        least_parameters = counts[most.followers] / counts[0]
        raise LayoutError(
            f"{reason} cannot be met: at most {most.followers} layers can follow (KV bytes {least_kv:.3f}, parameters "
            f"{least_parameters:.3f} of the base's); loosen the budget, layout.protect or analysis.max_distance"
        )
    return meets[0], reason


def candidates_table(
    choices: list[Choice], shape: Any, element_size: int, counts: dict[int, int], chosen: Choice | None = None
) -> Table:
    """The frontier at a handful of budgets."""
    steps = max(1, math.ceil((len(choices) - 1) / 8))
    shown = [choice for choice in choices if choice.followers % steps == 0 or choice is chosen]
    own_kv = kv_bytes_per_token(choices[0].layout, shape, element_size)
    rows = []
    for choice in shown:
        kv = kv_bytes_per_token(choice.layout, shape, element_size)
        worst = min(choice.scores.items(), key=lambda item: item[1], default=None)
        rows.append(
            [
                f"{choice.followers}{' *' if choice is chosen else ''}",
                f"{choice.mean_score:.3f}" if choice.scores else "-",
                f"{worst[1]:.3f} (layer {worst[0]})" if worst else "-",
                f"{kv:,} ({kv / own_kv:.0%})",
                f"{counts[choice.followers] / counts[0]:.1%}",
            ]
        )
    columns = ["followers", "similarity", "least similar", "KV bytes/token", "parameters"]
    return Table("candidate layouts" + (" (* chosen)" if chosen else ""), columns, rows)


def store_layout(run: RunDir, layout: Layout, recipe: Recipe) -> None:
    """Writes the chosen layout and the settings that led to it into the recipe; one short line for each layer.

    A compensation that follows from `conversion` is left out, so that changing it there changes all layers.
    """
    from ruamel.yaml.comments import CommentedMap, CommentedSeq

    tree = read_tree(run.recipe)
    section = tree.setdefault("layout", CommentedMap())
    for key in ("groups", "followers", "kv", "params", "search", "head_map", "sources"):
        value = getattr(recipe.layout, key)
        if section.get(key, getattr(LayoutSpec, key)) != value:
            section[key] = value
    usual = compensation_of(recipe)
    entries = CommentedSeq()
    for index, plan in enumerate(layout):
        fields = plan.to_dict()
        if plan.kind != "linear" and plan.compensation == usual:
            fields.pop("compensation", None)
        entry = CommentedMap(fields)
        entry.fa.set_flow_style()
        entries.append(entry)
        entries.yaml_add_eol_comment(f"layer {index}", index)
    _replace_layers(section, entries)
    with file_errors(run.root):
        write_tree(tree, run.recipe)


def _replace_layers(section: Any, entries: Any) -> None:
    """Puts the list first in its section.

    The parser hangs the comment above the next section on the last line of this one; a list that stood there takes what
    follows its last entry along, and a list added at the end would come after that comment.
    """
    old = section.pop("layers", None)
    if old and list(section) and old.ca.items.get(len(old) - 1):
        token = old.ca.items[len(old) - 1][0]
        _, newline, following = token.value.partition("\n") if token else ("", "", "")
        if following.strip():
            last = entries.ca.items[len(entries) - 1][0]
            last.value += newline + following
            section["layers"] = entries
            return
    section.insert(0, "layers", entries)
