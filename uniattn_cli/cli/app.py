"""The command line of `uniattn`: parse, call one function, print. Nothing heavy is imported outside of commands."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from uniattn_cli import __version__
from uniattn_cli.cli import pipeline, recipes, settings, start, tools
from uniattn_cli.cli.flags import DebugOption, JsonOption, SetOption
from uniattn_cli.cli.guard import guard


class Grouped(TyperGroup):
    """Commands listed by what they are for; Typer does so only in the markup of rich, which starts slowly."""

    def format_commands(self, ctx: Any, formatter: Any) -> None:
        """Writes one list for each purpose."""
        shown = {name: command for name in self.list_commands(ctx) if (command := self.get_command(ctx, name))}
        room = formatter.width - 6 - max(map(len, shown))
        for purpose in dict.fromkeys(getattr(command, "rich_help_panel", None) for command in shown.values()):
            with formatter.section(purpose):
                formatter.write_dl(
                    [
                        (name, command.get_short_help_str(room))
                        for name, command in shown.items()
                        if getattr(command, "rich_help_panel", None) == purpose
                    ]
                )


app = typer.Typer(
    name="uniattn",
    cls=Grouped,
    help="Let layers of a pre-trained LLM share attention maps or keys, post-train it, and measure the result.\n\n"
    "\b\nIn an empty folder:\n  uniattn analyze HuggingFaceTB/SmolLM2-135M-Instruct\n  uniattn convert --groups auto\n"
    "  uniattn train recipe.yaml\n  uniattn eval",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    # Plain help starts in half the time.
    rich_markup_mode=None,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def _print_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"uniattn {__version__}")
        raise typer.Exit


@app.callback()
def _main(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    pass


PIPELINE, LOOK, SHARE, ABOUT = "Pipeline", "Look at", "Share and serve", "About"
app.command(rich_help_panel=PIPELINE)(start.init)
app.command(rich_help_panel=PIPELINE)(pipeline.analyze)
app.command(rich_help_panel=PIPELINE)(pipeline.score)
app.command(rich_help_panel=PIPELINE)(pipeline.group)
app.command(rich_help_panel=PIPELINE)(pipeline.convert)
app.command(rich_help_panel=PIPELINE)(pipeline.synthesize)
app.command(rich_help_panel=PIPELINE)(pipeline.train)
app.command(rich_help_panel=PIPELINE, name="eval")(pipeline.evaluate)
app.command(rich_help_panel=LOOK)(pipeline.data)
app.command(rich_help_panel=LOOK)(tools.report)
app.command(rich_help_panel=LOOK)(tools.compare)
app.command(rich_help_panel=LOOK)(tools.sweep)
app.command(rich_help_panel=LOOK)(tools.generate)
app.command(rich_help_panel=LOOK)(tools.chat)
app.command(rich_help_panel=LOOK)(tools.bench)
# What it does not know goes to the engine.
extra = {"allow_extra_args": True, "ignore_unknown_options": True}
app.command(rich_help_panel=SHARE, context_settings=extra)(tools.serve)
app.command(rich_help_panel=SHARE)(tools.push)


@app.command(rich_help_panel=ABOUT)
def recipe(
    section: Annotated[
        str | None, typer.Argument(metavar="[SECTION]", help="Only this section, such as layout.")
    ] = None,
    check: Annotated[
        Path | None, typer.Option("--check", metavar="FILE", help="Check this file and list every fault.")
    ] = None,
    set_: SetOption = None,
    json: JsonOption = False,
    debug: DebugOption = False,
) -> None:
    """List all settings, or check a recipe.

    For ready recipes to start from, see `uniattn recipes`.

    \b
    Example:
      uniattn recipe --check recipe.yaml
    """
    with guard("recipe", debug):
        from uniattn_cli.cli.console import show
        from uniattn_cli.errors import UsageError

        if check is None:
            if set_:
                raise UsageError("--set is for --check FILE")
            show(settings.list_settings(section), as_json=json)
        else:
            if section is not None:
                raise UsageError("give a section or --check FILE, not both")
            show(settings.check(check, set_ or ()), as_json=json)


app.add_typer(recipes.app, name="recipes", rich_help_panel=ABOUT)


@app.command(rich_help_panel=ABOUT)
def schema(debug: DebugOption = False) -> None:
    """Print the JSON Schema of a recipe, for editors.

    Name the file in the first line of a recipe, and an editor completes and checks it:
    # yaml-language-server: $schema=recipe.schema.json

    \b
    Example:
      uniattn schema
    """
    with guard("schema", debug):
        from uniattn_cli.recipe.json_schema import json_schema

        typer.echo(json_schema())


@app.command(rich_help_panel=ABOUT)
def families(json: JsonOption = False, debug: DebugOption = False) -> None:
    """List the model families that can be converted.

    With well-known models, their attention masks, and the attention backends they support.

    \b
    Example:
      uniattn families
    """
    with guard("families", debug):
        from uniattn_cli.cli.console import show
        from uniattn_cli.cli.families import list_families

        show(list_families(), as_json=json)


@app.command(rich_help_panel=ABOUT)
def doctor(json: JsonOption = False, debug: DebugOption = False) -> None:
    """Show what this machine supports and what is missing.

    Versions, devices, dtypes, attention backends, caches, free disk space, and extras that are not installed.

    \b
    Example:
      uniattn doctor
    """
    with guard("doctor", debug):
        from uniattn_cli.cli.console import show
        from uniattn_cli.cli.doctor import examine
        from uniattn_cli.cli.guard import quiet_libraries

        if not debug:
            quiet_libraries()
        show(examine(), as_json=json)
