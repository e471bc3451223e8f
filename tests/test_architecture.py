"""Who may import whom: the floors of the house, each of which knows only those below it."""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import uniattn_cli

PACKAGE = Path(uniattn_cli.__file__).resolve().parent
# From the ground up; rooms of one floor do not know each other.
FLOORS = [
    {"charts", "errors", "tables"},
    {"options"},
    {"modeling"},
    {"recipe"},
    {"run"},
    {"models"},
    {"data", "analysis", "fitting", "inference"},
    {"layouts"},
    {"generation"},
    {"training"},
    {"evaluation"},
    {"reporting"},
    {"publishing", "serving"},
    {"commands"},
    {"cli"},
]
# Files that no room holds, and the parts of the package that are not code.
OUTSIDE = {"__init__", "__main__"}
FLOOR = {room: floor for floor, rooms in enumerate(FLOORS) for room in rooms}


def files() -> list[Path]:
    found = sorted(PACKAGE.rglob("*.py"))
    assert len(found) > 100
    return found


def room_of(path: Path) -> str:
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def imports(path: Path) -> Iterator[str]:
    """Every module that a file imports, also inside functions and for type checkers."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and not node.level:
            yield node.module
            if (PACKAGE.parent / node.module.replace(".", "/")).is_dir():
                yield from (f"{node.module}.{alias.name}" for alias in node.names)


def test_every_file_is_in_a_room_that_has_a_floor():
    assert {room_of(path) for path in files()} == set(FLOOR) | OUTSIDE


@pytest.mark.parametrize("room", sorted(FLOOR))
def test_a_room_knows_only_the_floors_below(room):
    for path in files():
        if room_of(path) != room:
            continue
        for name in imports(path):
            parts = name.split(".")
            if parts[0] == "uniattn_cli" and len(parts) > 1 and parts[1] in FLOOR and parts[1] != room:
                assert FLOOR[parts[1]] < FLOOR[room], f"{path} imports {name}"


def test_no_two_files_import_each_other():
    modules = {".".join(path.relative_to(PACKAGE.parent).with_suffix("").parts): path for path in files()}
    graph = {name: {other for other in imports(path) if other in modules} for name, path in modules.items()}
    done: set[str] = set()

    def visit(name: str, way: tuple[str, ...]) -> None:
        assert name not in way, " -> ".join((*way[way.index(name) :], name))
        if name not in done:
            for other in graph[name]:
                visit(other, (*way, name))
            done.add(name)

    for name in graph:
        visit(name, ())


def test_only_the_plugin_knows_vllm():
    users = {path.name for path in files() if any(name.split(".")[0] == "vllm" for name in imports(path))}
    assert users == {f"vllm_{name}.py" for name in ("plugin", "model", "layers", "cpu", "flash", "load")}


def test_only_the_console_knows_rich():
    users = {path.name for path in files() if any(name.split(".")[0] == "rich" for name in imports(path))}
    assert users == {"console.py"}


def test_the_plugin_needs_nothing_that_vllm_does_not_bring():
    """So that `pip install --no-deps uniattn` is enough in vLLM's environment."""
    waiting = [path for path in (PACKAGE / "serving").glob("vllm_*.py")]
    seen, libraries = set(waiting), set()
    assert len(waiting) == 6
    while waiting:
        path = waiting.pop()
        tree = ast.parse(path.read_text(encoding="utf-8"))
        # What other files import in functions is for other commands.
        loaded = ast.walk(tree) if path.name.startswith(("vllm_", "fused_")) else tree.body
        for node in loaded:
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            if isinstance(node, ast.ImportFrom):
                module = f"uniattn_cli.modeling.{node.module}" if node.level else node.module
                # Of a file or of a folder.
                names = [module, *(f"{module}.{alias.name}" for alias in node.names)]
            for name in names:
                file = (PACKAGE.parent / name.replace(".", "/")).with_suffix(".py")
                if name.startswith("uniattn_cli.") and file.is_file() and file not in seen:
                    seen.add(file)
                    waiting.append(file)
                libraries.add(name.partition(".")[0])
    assert libraries - set(sys.stdlib_module_names) <= {*("uniattn_cli", "torch", "vllm", "transformers", "triton")}
    assert PACKAGE / "modeling" / "layout_uniattn.py" in seen
