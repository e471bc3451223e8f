"""Options that several commands share, and what they mean for the recipe."""

from __future__ import annotations

import enum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from uniattn_cli.cli import settings
from uniattn_cli.modeling.layout_uniattn import BORROWING_KINDS, CHANGED_KINDS


def _words(name: str, key: str) -> Any:
    return enum.Enum(name, {word: word for word in settings.choices(key)}, type=str)


if TYPE_CHECKING:
    # Their words are those of the schema, which type checkers do not see.
    class _Word(str, enum.Enum): ...

    Dtype = _Word
    HeadMap = _Word
    Save = _Word
    Search = _Word
    Sources = _Word
else:
    Dtype = _words("Dtype", "model.dtype")
    HeadMap = _words("HeadMap", "layout.head_map")
    Save = _words("Save", "layout.save")
    Search = _words("Search", "layout.search")
    Sources = _words("Sources", "layout.sources")
Part = enum.Enum("Part", {"train": "train", "heldout": "heldout"}, type=str)


def setting(key: str, flag: str, metavar: str | None = None) -> Any:
    """An option that stands for a setting of the recipe and takes its help from there."""
    entry = settings.find(key)
    default = "" if entry.default == "null" else f", default {entry.default}"
    text = f"{entry.help[0].upper()}{entry.help[1:]} [recipe: {key}{default}]"
    return typer.Option(flag, metavar=metavar, help=text, show_default=False)


def complete_setting(incomplete: str) -> list[str]:
    """Keys of settings, for the shell."""
    return [f"{entry.key}=" for entry in settings.settings() if entry.key.startswith(incomplete)]


def complete_recipe(incomplete: str) -> list[str]:
    """Names of ready recipes, for the shell."""
    from uniattn_cli.recipe import ready

    return [name for name in ready.names() if name.startswith(incomplete)]


def complete_groups(incomplete: str) -> list[str]:
    """Forms of layouts, for the shell."""
    return [word for word in ("auto", "paper", "every:4") if word.startswith(incomplete)]


RunDirOption = Annotated[
    Path,
    typer.Option(
        "-C",
        "--run-dir",
        metavar="DIR",
        file_okay=False,
        help="Work as if started in DIR: recipe and outputs are there, and paths are relative to it.",
    ),
]
SetOption = Annotated[
    list[str] | None,
    typer.Option(
        "--set",
        metavar="KEY=VALUE",
        autocompletion=complete_setting,
        help="Override a setting of the recipe; repeatable. `uniattn recipe` lists the keys.",
    ),
]
DeviceOption = Annotated[str, typer.Option("--device", metavar="DEVICE", help="auto, cpu, cuda, cuda:1, mps, ...")]
ForceOption = Annotated[bool, typer.Option("--force", help="Replace a complete output directory.")]
JsonOption = Annotated[bool, typer.Option("--json", help="Print the result as JSON.")]
DebugOption = Annotated[bool, typer.Option("--debug", help="Show tracebacks and the output of libraries.")]
GroupsOption = Annotated[
    str | None,
    typer.Option(
        "--groups",
        metavar="auto|[KIND@]paper|every:N|FIRST-LAST:N|LIST|FILE",
        autocompletion=complete_groups,
        help="Which layers share; key@every:4 for another kind than softmax [recipe: layout.groups, default auto]",
        show_default=False,
    ),
]
FollowersOption = Annotated[int | None, setting("layout.followers", "--followers", "N")]
KvOption = Annotated[float | None, setting("layout.kv", "--kv", "SHARE")]
ParamsOption = Annotated[float | None, setting("layout.params", "--params", "SHARE")]
MaxLossOption = Annotated[float | None, setting("layout.max_loss", "--max-loss", "NATS")]
SpeedOption = Annotated[str | None, setting("layout.speed", "--speed", "RATIO@BATCHxCONTEXT")]
SaveOption = Annotated[Save | None, setting("layout.save", "--save")]
HeadMapOption = Annotated[HeadMap | None, setting("layout.head_map", "--head-map")]
SearchOption = Annotated[Search | None, setting("layout.search", "--search")]
KindsOption = Annotated[
    str | None,
    typer.Option(
        "--kinds",
        metavar="KIND,...",
        help=f"Kinds of layer that auto may use: one of {', '.join(BORROWING_KINDS)}; with --search scores "
        f"several of {', '.join(CHANGED_KINDS)} [recipe: layout.kinds, default early]",
        show_default=False,
    ),
]
SourcesOption = Annotated[Sources | None, setting("layout.sources", "--sources")]


def overrides_of(**values: Any) -> list[str]:
    """`section__name=value` as `section.name=value` strings, for the options that were given."""
    plain = {key: value.value if isinstance(value, enum.Enum) else value for key, value in values.items()}
    return [f"{key.replace('__', '.')}={value}" for key, value in plain.items() if value is not None]


def layout_overrides(
    budgets: dict[str, float | str | None],
    save: Save | None,
    search: Search | None,
    kinds: str | None,
    head_map: HeadMap | None,
    sources: Sources | None,
) -> list[str]:
    """Overrides of `group` and `convert`; budgets replace whichever budgets the recipe has.

    Args:
        budgets: each with its limit, or None where it is not given.
    """
    found = overrides_of(layout__search=search, layout__head_map=head_map, layout__sources=sources)
    if kinds is not None:
        found.append(f"layout.kinds=[{kinds}]")
    if any(limit is not None for limit in budgets.values()):
        found += [f"layout.{key}={'null' if limit is None else limit}" for key, limit in budgets.items()]
        found.append(f"layout.save={'kv' if save is None else save.value}")
    else:
        found += overrides_of(layout__save=save)
    return found
