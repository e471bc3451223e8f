"""Reads the forms that `--groups` accepts beside `auto`."""

from __future__ import annotations

import re
from pathlib import Path

from uniattn_cli.errors import LayoutError, RecipeError, suggest
from uniattn_cli.layouts.plans import plan_alone
from uniattn_cli.modeling.layout_uniattn import CHANGED_KINDS, KINDS, AttentionShape, LayerPlan, Layout
from uniattn_cli.recipe.paths import located

FORMS = "auto, paper, every:N, FIRST-LAST:N, a list such as 16-19,20-23, KIND@ with any of these except auto, or a file"


def parse_groups(text: str, shape: AttentionShape, compensation: str | int = "auto") -> Layout:
    """A fixed layout from its shorthand; each group's first layer leads with all heads mapped to the same heads.

    Layers of different mask types are never put in one group by `paper`, `every:N` and `FIRST-LAST:N`: there the layers
    of each type are grouped among themselves. `KIND@GROUPS` makes what would follow layers of another kind.

    Args:
        text: the shorthand.
        shape: of the model.
        compensation: W_c that is asked for, see `Kind.compensation_for`.

    Raises:
        LayoutError: form or kind is unknown, or the layout is illegal (says which layer and why).
    """
    path, text = located(text), text.strip()
    kind, form = _kind_and_form(text) if "@" in text and not path.is_file() else ("softmax", text)
    if match := re.fullmatch(r"every:(\d+)", form):
        groups = _chunks(range(shape.layers), int(match[1]), shape, text)
    elif form == "paper":
        size = min(4, shape.layers)
        blocks = max(1, round(shape.layers / 2 / size))
        groups = _chunks(range(max(0, shape.layers - blocks * size), shape.layers), size, shape, text)
    elif match := re.fullmatch(r"(\d+)-(\d+):(\d+)", form):
        groups = _chunks(_layers(match[1], match[2], shape, text), int(match[3]), shape, text)
    elif re.fullmatch(r"\d+-\d+(,\d+-\d+)*", form):
        groups = [list(_layers(first, last, shape, text)) for first, last in re.findall(r"(\d+)-(\d+)", form)]
    elif path.is_file():
        return _checked(_from_file(path, compensation), shape, text)
    else:
        raise LayoutError(f"--groups {text}: not one of {FORMS}")
    alone, usual = plan_alone(kind, shape, compensation), KINDS[kind].compensation_for(compensation)
    plans = [LayerPlan()] * shape.layers
    taken: set[int] = set()
    for leader, *followers in groups:
        if again := taken.intersection([leader, *followers]):
            raise LayoutError(f"--groups {text}: layer {min(again)} is in two groups")
        taken.update([leader, *followers])
        for follower in followers:
            plans[follower] = alone or LayerPlan(kind, leader=leader, compensation=usual)
    return _checked(Layout(tuple(plans)), shape, text)


def _kind_and_form(text: str) -> tuple[str, str]:
    """The parts of `KIND@GROUPS`; the second may be no form at all."""
    kind, _, form = text.partition("@")
    if kind not in CHANGED_KINDS:
        known = ", ".join(CHANGED_KINDS)
        raise LayoutError(f"--groups {text}: '{kind}' is not one of {known}{suggest(kind, CHANGED_KINDS)}")
    if form == "auto":
        search = "" if KINDS[kind].borrows else " --search scores"
        raise LayoutError(f"--groups {text}: to choose such layers, use --groups auto --kinds {kind}{search}")
    if not form or "@" in form or Path(form).is_file():
        raise LayoutError(f"--groups {text}: the part after @ must be paper, every:N, FIRST-LAST:N or a list")
    return kind, form


def _layers(first: str, last: str, shape: AttentionShape, text: str) -> range:
    if int(first) >= int(last):
        raise LayoutError(f"--groups {text}: {first}-{last} is not an ascending range of at least two layers")
    if int(last) >= shape.layers:
        raise LayoutError(f"--groups {text}: layer {last} does not exist; the model has layers 0 to {shape.layers - 1}")
    return range(int(first), int(last) + 1)


def _chunks(layers: range, size: int, shape: AttentionShape, text: str) -> list[list[int]]:
    if size < 2:
        raise LayoutError(f"--groups {text}: a group needs at least 2 layers")
    if size > len(layers):
        raise LayoutError(f"--groups {text}: a group of {size} is larger than the {len(layers)} layers to be grouped")
    groups = []
    for name in dict.fromkeys(shape.mask_types):
        same = [layer for layer in layers if shape.mask_types[layer] == name]
        groups += [same[start : start + size] for start in range(0, len(same), size)]
    return [group for group in groups if group]


def _from_file(path: Path, compensation: str | int) -> Layout:
    from uniattn_cli.recipe.files import read_tree

    try:
        tree = read_tree(path)
    except RecipeError as error:
        raise LayoutError(str(error)) from None
    for key in ("layout", "uniattn"):
        if isinstance(tree, dict) and key in tree:
            tree = tree[key]
    entries = tree.get("layers") if isinstance(tree, dict) else tree
    if not isinstance(entries, list):
        raise LayoutError(f"{path}: expected a list of layers, or a mapping with `layers`")
    try:
        return Layout.from_list(entries, compensation)
    except ValueError as error:
        raise LayoutError(f"{path}: {error}") from None


def _checked(layout: Layout, shape: AttentionShape, text: str) -> Layout:
    problems = layout.problems(shape)
    if problems:
        more = f" (and {len(problems) - 1} more)" if len(problems) > 1 else ""
        raise LayoutError(f"--groups {text}: {problems[0]}{more}")
    return layout
