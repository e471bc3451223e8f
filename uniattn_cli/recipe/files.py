"""Recipes as YAML files: read, overridden, written with comments."""

from __future__ import annotations

import dataclasses
import io
import os
import typing
from pathlib import Path
from typing import Any

from uniattn_cli.errors import RecipeError

# What the parser raises for a text that nests too deep, a mapping that merges itself, a number of thousands of digits.
SENSELESS = (AttributeError, RecursionError, ValueError)


def _yaml() -> Any:
    from ruamel.yaml import YAML

    yaml = YAML()
    yaml.width = 118
    yaml.indent(mapping=2, sequence=4, offset=2)
    # Otherwise null is written as nothing at all, which reads like a mistake.
    yaml.representer.add_representer(
        type(None), lambda representer, _: representer.represent_scalar("tag:yaml.org,2002:null", "null")
    )
    return yaml


def read_tree(path: Path) -> Any:
    """Parses a YAML file into ruamel's round-trip tree, which keeps comments, order and line numbers.

    Raises:
        RecipeError: the file is missing, unreadable or not YAML.
    """
    from ruamel.yaml.error import YAMLError

    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise RecipeError(
            f"{path}: no such file (looked for {path.absolute()}); `uniattn analyze MODEL` writes a recipe.yaml"
        ) from None
    except (OSError, UnicodeDecodeError) as error:
        raise RecipeError(f"{path}: cannot be read: {error}") from None
    try:
        tree = _yaml().load(text)
    except (YAMLError, *SENSELESS) as error:
        mark = getattr(error, "problem_mark", None)
        where = f", line {mark.line + 1}" if mark else ""
        problem = getattr(error, "problem", None) or str(error).splitlines()[0]
        raise RecipeError(f"{path.name}{where}: not valid YAML: {problem}") from None
    return {} if tree is None else tree


def write_tree(tree: Any, path: Path) -> None:
    """Writes a round-trip tree, as a whole or not at all."""
    buffer = io.StringIO()
    _yaml().dump(tree, buffer)
    write_whole(path, buffer.getvalue())


def write_whole(path: Path, text: str) -> None:
    """Writes a file as a whole or not at all, even if several processes write it at once."""
    partial = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        partial.write_text(text, encoding="utf-8")
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


def apply_overrides(tree: Any, overrides: typing.Sequence[str]) -> dict[tuple[int, Any], str]:
    """Sets `key.path=value` strings in a tree, creating sections on the way.

    Returns:
        The override behind each place that was set, keyed by (id of the node, key), for messages.

    Raises:
        RecipeError: an override that is not of that form.
    """
    from ruamel.yaml.error import YAMLError

    origin: dict[tuple[int, Any], str] = {}
    for override in overrides:
        key, equals, text = override.partition("=")
        if not equals or not key:
            raise RecipeError(f"--set {override}: write KEY=VALUE, for example --set analysis.tokens=8192")
        try:
            value = _yaml().load(text) if text.strip() else None
            places = list(_places(value))
        except (YAMLError, *SENSELESS):
            raise RecipeError(f"--set {override}: the value is not valid YAML") from None
        *parents, last = key.split(".")
        node = tree
        for parent in parents:
            if not isinstance(node.get(parent), dict):
                node[parent] = {}
                origin[id(node), parent] = override
            node = node[parent]
        node[last] = value
        origin[id(node), last] = override
        origin.update((place, override) for place in places)
    return origin


def _places(value: Any) -> typing.Iterator[tuple[int, Any]]:
    """(id of the node, key) of everything inside a value."""
    if isinstance(value, (dict, list)):
        for key, item in value.items() if isinstance(value, dict) else enumerate(value):
            yield id(value), key
            yield from _places(item)


def commented_tree(recipe: Any) -> Any:
    """A recipe as the file that `uniattn analyze` writes: common settings only, one comment each."""
    tree = _commented(recipe, 0, 0)
    tree.yaml_set_start_comment(
        "Settings of this run. Delete a line to get its default; `uniattn recipe` lists all settings."
    )
    return tree


def _commented(section: Any, depth: int, indent: int, comments: bool = True) -> Any:
    """A section as a commented map; `indent` is its column in the file."""
    from ruamel.yaml.comments import CommentedMap, CommentedSeq

    tree = CommentedMap()
    shown = {e.name: getattr(section, e.name) for e in dataclasses.fields(section) if e.metadata["common"]}
    plain = {name: value for name, value in shown.items() if not dataclasses.is_dataclass(value)}
    widths = [len(f"{name}: {value}") for name, value in plain.items() if not isinstance(value, tuple)]
    column = indent + 2 + max((width for width in widths if width <= 40), default=0)
    for entry in dataclasses.fields(section):
        if not entry.metadata["common"]:
            continue
        value = getattr(section, entry.name)
        if dataclasses.is_dataclass(value):
            tree[entry.name] = _commented(value, depth + 1, indent + 2)
            if depth == 0:
                tree.yaml_set_comment_before_after_key(entry.name, before="\n" + entry.metadata["help"])
            continue
        if isinstance(value, tuple):
            # What the keys of a list's items mean is said once.
            items = [
                _commented_item(item, depth + 1, indent + 4, comments=not index) for index, item in enumerate(value)
            ]
            tree[entry.name] = CommentedSeq(items)
            tree.yaml_set_comment_before_after_key(entry.name, before=entry.metadata["help"], indent=2 * depth)
            continue
        tree[entry.name] = value
        if comments:
            comment, choices = entry.metadata["help"], entry.metadata["choices"] or ()
            if not all(choice in comment for choice in choices):
                comment += f" ({' | '.join(choices)})"
            tree.yaml_add_eol_comment(comment, entry.name, column=column)
    return tree


def _commented_item(item: Any, depth: int, indent: int, comments: bool) -> Any:
    if not dataclasses.is_dataclass(item):
        return item
    if not any(entry.metadata["common"] for entry in dataclasses.fields(item)):
        given = {
            entry.name: getattr(item, entry.name)
            for entry in dataclasses.fields(item)
            if entry.name == item.main or getattr(item, entry.name) != entry.default  # type: ignore[union-attr]
        }
        return given if len(given) > 1 else next(iter(given.values()))
    return _commented(item, depth, indent, comments)


def plain(value: Any) -> Any:
    """Nested dicts and lists of what may be dataclasses and tuples."""
    if dataclasses.is_dataclass(value):
        return {entry.name: plain(getattr(value, entry.name)) for entry in dataclasses.fields(value)}
    if isinstance(value, dict):
        return {key: plain(item) for key, item in value.items()}
    if isinstance(value, (tuple, list)):
        return [plain(item) for item in value]
    # Of texts that know more than their characters (`RecipePath`, those of the YAML parser), the characters.
    return str(value) if isinstance(value, str) else value
