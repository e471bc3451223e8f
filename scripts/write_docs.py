"""Writes the parts of the documentation that follow from the code, below a mark on the pages that hold them.

    python scripts/write_docs.py

The settings of a recipe come from its schema, the commands from the command line, the messages from every place that
makes one.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Callable, Iterator
from pathlib import Path

import typer
import typer.main
from typer.cli import get_docs_for_click

from uniattn_cli import errors
from uniattn_cli.cli import settings
from uniattn_cli.cli.app import app

ROOT = Path(__file__).resolve().parent.parent
MARK = "<!-- Below: written by scripts/write_docs.py -->"
# Of each folder that reports faults: what they are about, and the page that helps.
SUBJECTS = {
    "recipe": ("Recipe and settings", "[the recipe](recipe.md)"),
    "cli": ("Command line", "[commands](commands.md)"),
    "commands": ("Stages", "[stages and files](stages.md)"),
    "run": ("Run directory and files", "[stages and files](stages.md)"),
    "models": ("Models and checkpoints", "[families](families.md), [checkpoints](checkpoints.md)"),
    "modeling": ("Layouts in a checkpoint", "[kinds of layer](kinds.md)"),
    "data": ("Data", "[data](data.md)"),
    "analysis": ("Analysis", "[choosing the layout](layouts.md)"),
    "layouts": ("Choosing a layout", "[search and budgets](search.md)"),
    "fitting": ("Fit", "[the fit](layouts.md)"),
    "training": ("Training", "[training](training.md)"),
    "evaluation": ("Evaluation", "[evaluation](evaluation.md)"),
    "generation": ("Generating text", "[generating text](decoding.md)"),
    "inference": ("Decoding engine", "[decoding](decoding.md)"),
    "publishing": ("Model card", "[checkpoints](checkpoints.md)"),
    "serving": ("Serving", "[serving](serving.md)"),
}
ERRORS = {name for name, value in vars(errors).items() if isinstance(value, type)}


def recipe_settings() -> str:
    """Every setting of a recipe, one table for each section."""
    parts = ["## All settings", "The same as `uniattn recipe` prints. `[]` stands for each entry of a list."]
    for table in settings.list_settings().tables:
        name, _, meaning = table.title.partition(": ")
        of_command = f" ({code(meaning)})" if meaning.startswith("uniattn ") else ""
        parts.append(f"### {name or 'Top level'}{of_command}")
        parts.append(grid(table.columns, [[code(key), code(default), words] for key, default, words in table.rows]))
    return "\n\n".join(parts)


def commands() -> str:
    """Arguments and options of every command, as Typer describes them."""
    group = typer.main.get_command(app)
    text = get_docs_for_click(obj=group, ctx=typer.Context(group, info_name="uniattn"), name="uniattn")
    # The start repeats the page's own.
    text = text[text.index("## ") :]
    # Typer's mark of a paragraph that is not wrapped.
    text = text.replace("\b", "")
    text = re.sub(r"\n\s*Example:\n((?:  .*\n)+)", _as_block, text)
    text = re.sub(r"```console\n\$ (.*)\n```", r"`\1`", text)
    return re.sub(r"\n{3,}", "\n\n", text).strip()


def _as_block(found: re.Match[str]) -> str:
    return "\n\n```sh\n" + re.sub(r"^  ", "", found[1], flags=re.M) + "```\n"


def messages() -> str:
    """Every message of the package with its way out, by subject; `…` stands for what is filled in."""
    found: dict[str, list[list[str]]] = {folder: [] for folder in SUBJECTS}
    for folder, text in all_messages():
        cause, _, way_out = text.rpartition("; ") if "; " in text else (text, "", "")
        found[folder].append([code(cause), way_out or f"see {SUBJECTS[folder][1]}"])
    parts = ["## All messages", "`…` stands for what is filled in: a name, a number, a list of what is known."]
    for folder, rows in found.items():
        if rows:
            parts += [f"### {SUBJECTS[folder][0]}", f"More in {SUBJECTS[folder][1]}."]
            parts.append(grid(["message", "what to do"], rows))
    return "\n\n".join(parts)


def grid(columns: list[str], rows: list[list[str]]) -> str:
    """A table without the spaces that align columns, so that a longer cell changes no other line."""
    cells = [[cell.replace("|", "\\|") for cell in row] for row in (columns, [":--"] * len(columns), *rows)]
    return "\n".join(f"| {' | '.join(row)} |" for row in cells)


def code(text: str) -> str:
    """A text in the typeface of code, whatever it holds."""
    return f"`` {text} ``" if "`" in text else f"`{text}`"


def all_messages() -> Iterator[tuple[str, str]]:
    """(folder, text) of whatever the code gives to one of our errors, to a list of faults or to standard error."""
    package = ROOT / "uniattn_cli"
    seen = set()
    for path in sorted(package.rglob("*.py")):
        folder = path.relative_to(package).parts[0]
        # Files beside the folders hold what the command line gives to all commands.
        folder = folder if folder in SUBJECTS else "cli"
        for text in _messages_of(ast.parse(path.read_text(encoding="utf-8")), folder):
            # What is filled in is made elsewhere.
            cause = text.rpartition("; ")[0] or text
            if re.search("[A-Za-z]{2}", cause) and (folder, text) not in seen:
                seen.add((folder, text))
                yield folder, text


def _messages_of(module: ast.Module, folder: str) -> Iterator[str]:
    functions = {node.name: node for node in ast.walk(module) if isinstance(node, ast.FunctionDef)}
    constants = {
        node.targets[0].id: node.value
        for node in module.body
        if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name)
    }
    for node in ast.walk(module):
        given = _given(node, folder)
        if isinstance(given, ast.Call) and isinstance(given.func, ast.Name) and given.func.id in functions:
            yield from (
                _text(part.value) for part in ast.walk(functions[given.func.id]) if isinstance(part, ast.Return)
            )
        elif isinstance(given, ast.Name) and given.id in constants:
            yield _text(constants[given.id])
        elif isinstance(given, ast.List):
            yield from map(_text, given.elts)
        else:
            yield _text(given)


def _given(node: ast.AST, folder: str) -> ast.AST | None:
    """The message that a piece of code states."""
    if isinstance(node, ast.Yield) and folder == "modeling":
        return node.value
    if not isinstance(node, ast.Call) or not node.args:
        return None
    name = ast.unparse(node.func)
    if name in ERRORS or name.endswith("faults.append") or name == "_fail":
        return node.args[0]
    return node.args[-1] if name.endswith(".fault") else None


def _text(node: ast.AST | None) -> str:
    if isinstance(node, ast.Constant):
        return str(node.value)
    if isinstance(node, ast.JoinedStr):
        return "".join(map(_text, node.values))
    if isinstance(node, ast.BinOp):
        return _text(node.left) + _text(node.right)
    return "…" if node is not None else ""


PAGES: dict[str, Callable[[], str]] = {
    "recipe.md": recipe_settings,
    "commands.md": commands,
    "troubleshooting.md": messages,
}


def page(name: str) -> str:
    """The whole page as it should be."""
    by_hand = (ROOT / "docs" / name).read_text(encoding="utf-8").partition(MARK)[0]
    return f"{by_hand}{MARK}\n\n{PAGES[name]()}\n"


if __name__ == "__main__":
    for name in PAGES:
        (ROOT / "docs" / name).write_text(page(name), encoding="utf-8")
