"""Paths in a recipe: kept as the user wrote them, and looked for from the recipe's folder."""

from __future__ import annotations

import os
from pathlib import Path


class RecipePath(str):
    """A path, or a name that may stand in its place (a hub id, `builtin`), as the user wrote it.

    Tables and records then name the same thing wherever the recipe is read from; only `located` asks for the folder.

    Attributes:
        folder: that relative paths start from.
    """

    folder: Path

    def __new__(cls, text: str, folder: Path = Path()) -> RecipePath:
        made = super().__new__(cls, text)
        made.folder = folder
        return made


def at_home(text: Path | str) -> Path:
    """A path with the home directory in place of `~`; as it is where the system knows no such user, unlike `Path`."""
    return Path(os.path.expanduser(text))


def located(text: str) -> Path:
    """Where a path is, if it is one: those of a recipe start at its folder, all others at the current one."""
    path = at_home(text)
    if not isinstance(text, RecipePath):
        return path
    # From a folder that is yet to be made, `..` leads nowhere.
    return text.folder / path if text.folder.is_dir() else (text.folder / path).resolve()
