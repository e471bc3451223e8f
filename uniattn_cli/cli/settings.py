"""The recipe's settings as tables, and as options of the command line: both come from the recipe's own schema."""

from __future__ import annotations

import dataclasses
import functools
import typing
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import typer

from uniattn_cli.errors import UsageError, suggest
from uniattn_cli.recipe.reading import LARGEST, types_of
from uniattn_cli.recipe.schema import Recipe, default_of, flow
from uniattn_cli.tables import Result, Table

TYPE_NAMES = {bool: "true or false", int: "whole number", float: "number", str: "text", dict: "mapping"}


@dataclass(frozen=True)
class RecipeSetting:
    """One setting of the recipe.

    Attributes:
        key: dotted path; `[]` stands for each item of a list.
        default: its default, as YAML.
        allowed: type and bounds, or the list of choices.
        help: one sentence.
    """

    key: str
    default: str
    allowed: str
    help: str


def list_settings(section: str | None = None) -> Result:
    """Every setting with default, bounds and meaning, one table per section.

    Args:
        section: only this section, such as `layout`.

    Raises:
        UsageError: there is no such section.
    """
    groups: dict[str, list[RecipeSetting]] = {}
    for entry in settings():
        groups.setdefault(entry.key.split(".")[0] if "." in entry.key else "", []).append(entry)
    if section is not None and section not in groups:
        names = [name for name in groups if name]
        near = suggest(section, names) or f" (sections: {', '.join(names)})"
        raise UsageError(f"the recipe has no section '{section}'{near}")
    helps = {entry.name: entry.metadata["help"] for entry in dataclasses.fields(Recipe)}
    tables = [
        Table(
            f"{name}: {helps[name]}" if name else "",
            ["setting", "default", "meaning"],
            [[entry.key, entry.default, f"{entry.help} ({entry.allowed})"] for entry in entries],
        )
        for name, entries in groups.items()
        if section in (None, name)
    ]
    notes = ["To override one for a single command: --set KEY=VALUE, for example --set analysis.tokens=8192"]
    return Result(title="Settings of recipe.yaml", tables=tables, notes=notes)


@functools.cache
def settings() -> tuple[RecipeSetting, ...]:
    """Every setting of the recipe, in the order of the schema."""
    return tuple(_walk(Recipe, "", set()))


def find(key: str) -> RecipeSetting:
    """The setting with this dotted path."""
    return next(entry for entry in settings() if entry.key == key)


def choices(key: str) -> tuple[str, ...]:
    """The allowed words of a setting such as `layout.head_map`."""
    section, name = key.split(".")
    spec = typing.get_type_hints(Recipe)[section]
    return {entry.name: entry for entry in dataclasses.fields(spec)}[name].metadata["choices"]


def _walk(spec: Any, path: str, seen: set[Any]) -> Iterator[RecipeSetting]:
    hints = typing.get_type_hints(spec)
    for entry in dataclasses.fields(spec):
        key = f"{path}.{entry.name}" if path else entry.name
        hint = hints[entry.name]
        if dataclasses.is_dataclass(hint):
            yield from _walk(hint, key, seen)
            continue
        yield RecipeSetting(
            key, flow(default_of(entry), number="{:g}".format), _allowed(hint, entry.metadata), entry.metadata["help"]
        )
        item = _item_type(hint)
        # A kind of list item is explained where it appears first.
        if dataclasses.is_dataclass(item) and item not in seen:
            seen.add(item)
            yield from _walk(item, f"{key}[]", seen)


def _item_type(hint: Any) -> Any:
    for option in types_of(hint):
        if typing.get_origin(option) is tuple:
            return typing.get_args(option)[0]
    return None


def _allowed(hint: Any, meta: typing.Mapping) -> str:
    names = []
    for option in types_of(hint):
        if option is type(None) or (option is str and meta["choices"]):
            continue
        item = _item_type(option)
        if item is not None:
            names.append("list" if dataclasses.is_dataclass(item) else f"list ({TYPE_NAMES[item]})")
        else:
            names.append("mapping" if dataclasses.is_dataclass(option) else TYPE_NAMES[option])
    names.extend(meta["choices"] or ())
    if type(None) in types_of(hint):
        names.append("null")
    bounds = [
        f"{word} {meta[bound]:g}"
        for bound, word in (("minimum", ">="), ("above", ">"), ("maximum", "<="))
        if meta[bound] is not None
    ]
    return ", ".join([" | ".join(names), *bounds])


def check(path: Path, overrides: Sequence[str]) -> Result:
    """Reads and checks a recipe.

    Raises:
        RecipeError: all its faults.
    """
    recipe = Recipe.load(path, overrides)
    stages = ", ".join(stage.name or stage.trains for stage in recipe.train.stages)
    note = f"model {recipe.model.name}; training stages: {stages}"
    return Result(title=f"{path}: valid", notes=[note])


def numbers(text: str, option: str) -> tuple[int, ...]:
    """A list such as `1,16`.

    Raises:
        UsageError: something else.
    """
    try:
        found = tuple(int(part) for part in text.split(","))
    except ValueError:
        found = ()
    if not found or min(found) < 1 or max(found) > LARGEST:
        raise UsageError(f"{option} {text}: give numbers from 1 to {LARGEST} separated by commas, such as 1,16")
    return found


def refuse(given: typer.Context, names: Sequence[str], needed: str) -> None:
    """Refuses options that were given on the command line and would be ignored.

    Args:
        given: the command's context.
        names: its parameters that mean nothing here.
        needed: what they belong to, such as `--engine vllm`.

    Raises:
        UsageError: one of them was given.
    """
    for parameter in given.command.params:
        source = given.get_parameter_source(parameter.name or "")
        if parameter.name in names and source is not None and source.name == "COMMANDLINE":
            raise UsageError(f"{parameter.opts[0]} is for {needed}")


def compensation(text: str) -> str | int:
    """`auto`, `full`, `none` or a rank.

    Raises:
        UsageError: something else.
    """
    if text in ("auto", "full", "none"):
        return text
    if not text.isdigit() or not int(text):
        raise UsageError(f"--compensation {text}: give auto, full, none or a rank of at least 1")
    return int(text)
