"""The JSON Schema of a recipe, so that editors complete and check it. It follows from the dataclasses of the schema."""

from __future__ import annotations

import dataclasses
import json
import typing
from typing import Any

from uniattn_cli.recipe.files import plain
from uniattn_cli.recipe.reading import types_of
from uniattn_cli.recipe.schema import Recipe, default_of

BOUNDS = {"minimum": "minimum", "maximum": "maximum", "above": "exclusiveMinimum"}
TYPES = {bool: "boolean", int: "integer", float: "number", str: "string", dict: "object"}


def json_schema() -> str:
    """The schema as text, in the draft of 2020-12."""
    sections: dict[str, Any] = {}
    whole = _section(Recipe, sections)
    head = {"$schema": "https://json-schema.org/draft/2020-12/schema", "title": "recipe.yaml of uniattn"}
    return json.dumps({**head, **whole, "$defs": sections}, indent=2, ensure_ascii=False)


def _section(cls: Any, sections: dict[str, Any]) -> dict[str, Any]:
    hints = typing.get_type_hints(cls)
    properties = {}
    for entry in dataclasses.fields(cls):
        found = _value(hints[entry.name], entry.metadata, sections)
        properties[entry.name] = {**found, "description": entry.metadata["help"], **_default(entry)}
    return {"type": "object", "additionalProperties": False, "properties": properties}


def _default(entry: dataclasses.Field) -> dict[str, Any]:
    """Its default; sections have theirs inside."""
    value = default_of(entry)
    return {} if dataclasses.is_dataclass(value) else {"default": plain(value)}


def _value(hint: Any, meta: typing.Mapping, sections: dict[str, Any]) -> dict[str, Any]:
    """What a setting may be."""
    found = [_option(option, meta, sections) for option in types_of(hint)]
    return found[0] if len(found) == 1 else {"anyOf": found}


def _option(option: Any, meta: typing.Mapping, sections: dict[str, Any]) -> dict[str, Any]:
    if option is type(None):
        return {"type": "null"}
    if dataclasses.is_dataclass(option):
        return _reference(option, sections)
    if typing.get_origin(option) is tuple:
        item = typing.get_args(option)[0]
        one = _option(item, meta, sections)
        if not hasattr(item, "main"):
            return {"type": "array", "items": one}
        # An item may be written as its main setting alone, and a single one without the list.
        one = {"anyOf": [{"type": "string"}, one]}
        return {"anyOf": [*one["anyOf"], {"type": "array", "items": one}]}
    if option is str and meta["choices"]:
        return {"enum": list(meta["choices"])}
    bounds = {word: meta[bound] for bound, word in BOUNDS.items() if meta[bound] is not None}
    return {"type": TYPES[option], **(bounds if option in (int, float) else {})}


def _reference(cls: Any, sections: dict[str, Any]) -> dict[str, Any]:
    if cls.__name__ not in sections:
        # Before its parts, which may lead back to it.
        sections[cls.__name__] = {}
        sections[cls.__name__] = _section(cls, sections)
    return {"$ref": f"#/$defs/{cls.__name__}"}
