"""`uniattn group`: chooses a layout under a budget and writes it into the recipe."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from uniattn_cli.analysis.measured import Measured
from uniattn_cli.errors import UsageError
from uniattn_cli.layouts.choose import Grouping, choose, compensation_of
from uniattn_cli.layouts.plots import plot_frontier
from uniattn_cli.modeling.layout_uniattn import Layout
from uniattn_cli.models.loading import load_config
from uniattn_cli.models.of_run import base_of
from uniattn_cli.options import RunOptions
from uniattn_cli.recipe.files import read_tree, write_tree
from uniattn_cli.recipe.schema import BUDGETS, Recipe
from uniattn_cli.run.directory import RunDir
from uniattn_cli.run.files import file_errors
from uniattn_cli.run.lock import alone

PLOT_FILE = "frontier.png"
# Settings that mean nothing where a layout is given.
CHOOSING = (*(f"layout.{budget}" for budget in BUDGETS), "layout.kinds")


@alone
def group(
    *,
    run_dir: Path | str = ".",
    groups: str | None = None,
    overrides: Sequence[str] = (),
    options: RunOptions = RunOptions(),
) -> Grouping:
    """Chooses a layout and writes it into `recipe.yaml`, keeping the user's comments and order.

    Args:
        run_dir: holds `recipe.yaml` and `analysis/`.
        groups: a form of `shorthand.FORMS`; None takes the recipe's.
        overrides: `key.path=value` strings for the recipe.
        options: device and progress, for searches that convert.

    Raises:
        RecipeError, StageError, LayoutError, ModelError: see the messages.
    """
    run = RunDir(run_dir)
    recipe = Recipe.load(run.recipe, layout_overrides(run, groups, overrides))
    config = load_config(base_of(recipe))
    grouping = choose(run, recipe, config, options)
    write_considered(run, recipe, grouping)
    store_layout(run, grouping.layout, recipe)
    written = [] if grouping.considered is None else [f"candidates: {run.output('group')}"]
    written.append(f"layout written to {run.recipe}; next: uniattn convert")
    return replace(grouping, notes=[*grouping.notes, "; ".join(written)])


def write_considered(run: RunDir, recipe: Recipe, grouping: Grouping) -> None:
    """Writes `grouping/`: the frontier, the shortlist and their picture; what an earlier choice left is replaced."""
    if grouping.considered is None:
        return
    inputs = {"model": run.record("analyze")["inputs"]["model"]}
    with run.write("group", recipe, inputs, force=True) as directory:
        shape = Measured.load(run.output("analyze")).shape
        grouping.considered.save(directory, shape)
        plot_frontier(grouping.considered, shape, directory / PLOT_FILE)


def layout_overrides(run: RunDir, groups: str | None, overrides: Sequence[str]) -> list[str]:
    """The overrides with `groups` among them, as it is to stand in the recipe.

    Budgets and kinds ask for a choice: with one, `groups` is `auto` unless it is given too, whatever the recipe has.

    Raises:
        UsageError: a budget or kinds together with a fixed layout.
    """
    given = {key: value.strip() for key, _, value in (override.partition("=") for override in overrides)}
    asked = [key for key in CHOOSING if given.get(key, "null") not in ("", "~", "null")]
    fixed = given.get("layout.groups") if groups is None else groups
    if asked and fixed not in (None, "auto"):
        instead = f"--groups auto, or KIND@{fixed}" if asked == ["layout.kinds"] else "--groups auto"
        raise UsageError(f"--groups {fixed} leaves nothing to choose; remove {asked[0]}, or use {instead}")
    if asked and fixed is None:
        groups = "auto"
    if groups is not None and Path(groups).is_file() and not Path(groups).is_absolute():
        groups = os.path.relpath(groups, run.root)
    return [*overrides, *([] if groups is None else [f"layout.groups={json.dumps(groups)}"])]


def chooses_layout(overrides: Sequence[str]) -> bool:
    """Whether a setting asks for another layout than the one that the recipe holds."""
    keys = {override.partition("=")[0] for override in overrides}
    return any(key.startswith("layout.") and key != "layout.layers" for key in keys)


def store_layout(run: RunDir, layout: Layout, recipe: Recipe) -> None:
    """Writes the chosen layout and the settings that led to it into the recipe; one short line for each layer.

    A compensation that follows from `conversion` is left out, so that changing it there changes all layers.
    """
    from ruamel.yaml.comments import CommentedMap, CommentedSeq

    tree = read_tree(run.recipe)
    section = tree.setdefault("layout", CommentedMap())
    defaults = Recipe().to_dict()["layout"]
    for key, value in recipe.to_dict()["layout"].items():
        if key != "layers" and section.get(key, defaults[key]) != value:
            if key in section:
                section[key] = value
            else:  # the comment above the next section hangs on the last line of this one
                section.insert(0, key, value)
    usual = compensation_of(recipe)
    entries = CommentedSeq()
    for index, plan in enumerate(layout):
        fields = plan.to_dict()
        if plan.compensation == plan.traits.compensation_for(usual):
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
