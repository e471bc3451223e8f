"""`uniattn recipes`: the ready recipes that come with the package."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from uniattn_cli.cli.flags import JsonOption
from uniattn_cli.cli.guard import guard
from uniattn_cli.tables import Result, Table

app = typer.Typer(
    help="List, show or copy ready recipes.\n\nFor the settings of a recipe, see `uniattn recipe`."
    "\n\n\b\nExample:\n  uniattn recipes copy qwen3-0.6b",
    invoke_without_command=True,
    rich_markup_mode=None,
)
NameArgument = Annotated[str, typer.Argument(metavar="NAME", autocompletion=lambda incomplete: _complete(incomplete))]
DebugOption = Annotated[bool, typer.Option("--debug", help="Show tracebacks.")]


def _complete(incomplete: str) -> list[str]:
    from uniattn_cli.recipe import ready

    return [name for name in ready.names() if name.startswith(incomplete)]


@app.callback()
def _list(context: typer.Context, json: JsonOption = False, debug: DebugOption = False) -> None:
    if context.invoked_subcommand is not None:
        return
    with guard("recipes", debug):
        from uniattn_cli.cli.console import show
        from uniattn_cli.recipe import ready

        found = [ready.load(name) for name in ready.names()]
        rows = [[entry.name, entry.recipe.model.name, entry.purpose] for entry in found]
        notes = [
            "Start with one of them: uniattn analyze --recipe NAME",
            "Copy one to edit it: uniattn recipes copy NAME (writes recipe.yaml; then uniattn data, uniattn analyze)",
            "Show one: uniattn recipes show NAME. List all settings: uniattn recipe",
        ]
        table = Table("", ["name", "model", "what it does"], rows)
        show(Result(title=f"{len(rows)} ready recipes", tables=[table], notes=notes), as_json=json)


@app.command()
def show(name: NameArgument, debug: DebugOption = False) -> None:
    """Print a ready recipe.

    \b
    Example:
      uniattn recipes show qwen3-0.6b
    """
    with guard("recipes", debug):
        from uniattn_cli.recipe import ready

        # As it is, so that it can be redirected into a file.
        typer.echo(ready.find(name).read_text(encoding="utf-8"), nl=False)


@app.command()
def copy(
    name: NameArgument,
    file: Annotated[
        Path, typer.Argument(metavar="[FILE]", help="The new file, or a folder for it.", show_default="recipe.yaml")
    ] = Path("recipe.yaml"),
    force: Annotated[bool, typer.Option("--force", help="Replace an existing file.")] = False,
    debug: DebugOption = False,
) -> None:
    """Copy a ready recipe into recipe.yaml or another file.

    \b
    Example:
      uniattn recipes copy llama-3.1-8b-tulu3
    """
    with guard("recipes", debug):
        from uniattn_cli.cli.console import show
        from uniattn_cli.recipe import ready
        from uniattn_cli.run.files import file_errors

        with file_errors(file, making=True, instead="name another file"):
            written = ready.copy(name, file, force=force)
        default = written.resolve() == Path("recipe.yaml").resolve()
        follow = "uniattn data and uniattn analyze" if default else f"uniattn analyze --recipe {written}"
        show(Result(title=f"wrote {written}", notes=[f"next: edit it as needed, then {follow}"]))
