"""From a YAML tree to a recipe: strict, and all faults at once."""

from __future__ import annotations

import dataclasses
import math
import os
import types
import typing
from collections.abc import Sequence
from pathlib import Path
from typing import Any, TypeVar

from uniattn_cli.errors import RecipeError, suggest
from uniattn_cli.recipe.files import apply_overrides, plain
from uniattn_cli.recipe.paths import RecipePath, at_home

Section = TypeVar("Section")

# Beyond these no library below takes a whole number as a size or a count.
SMALLEST, LARGEST = -(2**31), 2**31 - 1
_TYPE_NAMES = {bool: "true or false", int: "a whole number", float: "a number", str: "text", dict: "a mapping"}


def types_of(hint: Any) -> tuple:
    """The types that a setting with this annotation may have."""
    return typing.get_args(hint) if isinstance(hint, types.UnionType) else (hint,)


def read_section(
    cls: type[Section], tree: Any, name: str, overrides: Sequence[str] = (), folder: Path = Path()
) -> Section:
    """A section of settings from a parsed YAML tree.

    Args:
        cls: a dataclass of settings (see `schema.setting`); its method `contradictions` gives faults of valid settings
            that do not go together.
        tree: what `files.read_tree` gave.
        name: of the file, for messages.
        overrides: `key.path=value` strings, the value in YAML, applied before checking.
        folder: that relative paths start from.

    Raises:
        RecipeError: all faults at once.
    """
    reader = _Reader(name, folder)
    if isinstance(tree, dict):
        reader.overridden = apply_overrides(tree, overrides)
    section = reader.section(cls, tree, "")
    if section is not None and not reader.faults:
        for fault in section.contradictions():
            given = next((each for each in reversed(overrides) if fault.startswith(each.partition("=")[0])), None)
            reader.faults.append(f"--set {given}: {fault}" if given else f"{name}: {fault}")
    if reader.faults:
        raise RecipeError(reader.faults)
    return section


def move_paths(cls: type, tree: Any, old: Path, new: Path) -> None:
    """Rewrites the relative paths of a tree that was read in one folder and is to be written into another.

    Args:
        cls: the dataclass of settings that the tree is for.
        tree: what `files.read_tree` gave; changed in place. What names nothing in the old folder stays as it is.
        old: where its relative paths start now.
        new: where they are to start.
    """
    reader = _Reader("", old)
    reader.section(cls, tree, "")
    for node, key in reader.paths:
        path = at_home(node[key])
        if not path.is_absolute() and (old / path).exists():
            node[key] = os.path.relpath((old / path).resolve(), new.resolve())


class _Reader:
    """Checks a YAML tree against the dataclasses, collecting every fault, and the places of all paths."""

    def __init__(self, name: str, folder: Path):
        self.name = name
        self.folder = folder
        self.paths: list[tuple[Any, Any]] = []
        self.faults: list[str] = []
        self.overridden: dict[tuple[int, Any], str] = {}

    def fault(self, node: Any, key: Any, message: str) -> None:
        if (id(node), key) in self.overridden:
            self.faults.append(f"--set {self.overridden[id(node), key]}: {message}")
            return
        line = None
        if hasattr(node, "lc") and node.lc.data and key in node.lc.data:
            line = node.lc.data[key][0] + 1
        where = f"{self.name}, line {line}" if line else self.name
        self.faults.append(f"{where}: {message}")

    def section(self, cls: Any, node: Any, path: str, parent: Any = None, key: Any = None) -> Any:
        """Reads a mapping into dataclass `cls`; returns None after a fault."""
        if not isinstance(node, dict):
            expected = "a mapping of settings"
            self.fault(parent, key, f"{path or 'the file'} must be {expected}, not {_describe(node)}")
            return None
        hints = typing.get_type_hints(cls)
        fields = {entry.name: entry for entry in dataclasses.fields(cls)}
        values = {}
        for name, value in node.items():
            where = f"{path}.{name}" if path else str(name)
            if name not in fields:
                known = ", ".join(fields)
                self.fault(node, name, f"unknown key '{where}'{suggest(str(name), fields) or f' (known: {known})'}")
                continue
            values[name] = self.value(hints[name], value, where, node, name, fields[name].metadata)
        return cls(**values)

    def value(self, hint: Any, value: Any, path: str, node: Any, key: Any, meta: typing.Mapping) -> Any:
        """Reads one value of annotated type `hint`."""
        options = types_of(hint)
        if value is None and type(None) in options:
            return None
        for option in options:
            if dataclasses.is_dataclass(option):
                return self.section(option, value, path, node, key)
            if typing.get_origin(option) is tuple:
                return self.sequence(typing.get_args(option)[0], value, path, node, key, meta)
        scalars = [option for option in options if option is not type(None)]
        number = float in scalars and isinstance(value, int) and not isinstance(value, bool)
        if float in scalars and isinstance(value, str):
            # YAML 1.2 reads 1e-4 as a string unless it has a dot.
            try:
                value, number = float(value), True
            except ValueError:
                pass
        right_type = any(type(value) is option or isinstance(value, option) for option in scalars)
        if isinstance(value, bool) and bool not in scalars:
            right_type = False
        if not (right_type or number):
            names = " or ".join(_TYPE_NAMES[option] for option in scalars)
            self.fault(node, key, f"{path} must be {names}, not {_describe(value)}")
            return None
        return self.bounded(_as_float(value) if number else value, path, node, key, meta)

    def bounded(self, value: Any, path: str, node: Any, key: Any, meta: typing.Mapping) -> Any:
        if isinstance(value, str):
            if meta["choices"] and value not in meta["choices"]:
                near = suggest(value, meta["choices"])
                self.fault(node, key, f"{path} must be one of {', '.join(meta['choices'])}, not '{value}'{near}")
            return self.text(value, node, key, meta)
        if isinstance(value, (int, float)) and not isinstance(value, bool):
            if isinstance(value, float) and (math.isnan(value) or (math.isinf(value) and not meta["endless"])):
                self.fault(node, key, f"{path} must be a finite number, not {value}")
                return value
            bounds = {name: meta[name] for name in ("minimum", "maximum", "above") if meta[name] is not None}
            if isinstance(value, int):
                bounds = {"minimum": SMALLEST, "maximum": LARGEST} | bounds
            for name, broken, words in (
                ("minimum", lambda bound: value < bound, "at least"),
                ("maximum", lambda bound: value > bound, "at most"),
                ("above", lambda bound: value <= bound, "greater than"),
            ):
                if name in bounds and broken(bounds[name]):
                    self.fault(node, key, f"{path} must be {words} {bounds[name]}, not {value}")
            return float(value) if isinstance(value, float) else int(value)
        return plain(value) if isinstance(value, dict) else value

    def text(self, value: str, node: Any, key: Any, meta: typing.Mapping) -> str:
        if not meta["path"]:
            return str(value)
        self.paths.append((node, key))
        return RecipePath(value, self.folder)

    def sequence(self, item_hint: Any, value: Any, path: str, node: Any, key: Any, meta: typing.Mapping) -> tuple:
        # One item may be written without the list, and by its main setting alone.
        main = getattr(item_hint, "main", None)
        alone = bool(main) and isinstance(value, (str, dict))
        if alone:
            value = [value]
        if not isinstance(value, (list, tuple)):
            self.fault(node, key, f"{path} must be a list, not {_describe(value)}")
            return ()
        items = []
        for index, item in enumerate(value):
            where = f"{path}[{index}]"
            if main and isinstance(item, str):
                holder, place = (node, key) if alone else (value, index)
                text = self.text(item, holder, place, item_hint.__dataclass_fields__[main].metadata)
                items.append(item_hint(**{main: text}))
            elif item_hint is dict:
                if isinstance(item, dict):
                    items.append(plain(dict(item)))
                else:
                    self.fault(value, index, f"{where} must be a mapping, not {_describe(item)}")
            elif dataclasses.is_dataclass(item_hint):
                items.append(self.section(item_hint, item, where, value, index))
            else:
                items.append(self.value(item_hint, item, where, value, index, meta))
        return tuple(items)


def _as_float(value: Any) -> float:
    """A number as it is stored; infinity where a whole number is beyond all others."""
    try:
        return float(value)
    except OverflowError:
        return math.inf if value > 0 else -math.inf


def _describe(value: Any) -> str:
    if isinstance(value, dict):
        return "a mapping"
    if isinstance(value, (list, tuple)):
        return "a list"
    return "empty" if value is None else repr(value)
