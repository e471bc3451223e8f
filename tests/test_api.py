"""The package as a library: what it exports, and how its functions are called."""

from __future__ import annotations

import inspect
from pathlib import Path

import pytest

import uniattn_cli

PACKAGE = Path(uniattn_cli.__file__).parent
COMMANDS = [path.stem for path in sorted((PACKAGE / "commands").glob("[!_]*.py"))]


def test_every_command_is_exported():
    assert set(uniattn_cli.__all__) == {*COMMANDS, "__version__", "Recipe", "RunOptions", "UniAttnError", "load"}
    for name in uniattn_cli.__all__:
        assert getattr(uniattn_cli, name) is not None
    with pytest.raises(AttributeError, match="no attribute 'anlyze'"):
        _ = uniattn_cli.anlyze


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_has_the_same_order_of_arguments(name):
    """Inputs, and by keyword: run directory, recipe, what only this command has, overrides, options."""
    parameters = inspect.signature(getattr(uniattn_cli, name)).parameters.values()
    by_keyword = [each.name for each in parameters if each.kind is each.KEYWORD_ONLY]
    place = {"run_dir": 0, "recipe": 1, "overrides": 3, "options": 4}
    assert by_keyword == sorted(by_keyword, key=lambda key: place.get(key, 2))
    assert not set(place) & {each.name for each in parameters if each.kind is not each.KEYWORD_ONLY}
