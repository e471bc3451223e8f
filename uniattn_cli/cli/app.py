"""The command line of `uniattn`: parse, call one function, print. Nothing heavy is imported outside of commands."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from uniattn_cli import __version__
from uniattn_cli.cli import pipeline, recipes, settings, tools
from uniattn_cli.cli.flags import DebugOption, SetOption
from uniattn_cli.cli.guard import guard

app = typer.Typer(
    name="uniattn",
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


app.command()(pipeline.analyze)
app.command()(pipeline.score)
app.command()(pipeline.group)
app.command()(pipeline.convert)
app.command()(pipeline.train)
app.command()(pipeline.data)
app.command()(pipeline.synthesize)
app.command(name="eval")(pipeline.evaluate)
# What it does not know goes to the engine.
app.command(context_settings={"allow_extra_args": True, "ignore_unknown_options": True})(tools.serve)
app.command()(tools.push)
app.command()(tools.compare)
app.command()(tools.sweep)
app.command()(tools.report)
app.command()(tools.generate)
app.command()(tools.chat)
app.command()(tools.bench)


@app.command()
def recipe(
    section: Annotated[
        str | None, typer.Argument(metavar="[SECTION]", help="Only this section, such as layout.")
    ] = None,
    check: Annotated[
        Path | None, typer.Option("--check", metavar="FILE", help="Check this file and list every fault.")
    ] = None,
    set_: SetOption = None,
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

        if check is None:
            show(settings.list_settings(section))
        else:
            show(settings.check(check, set_ or ()))


app.add_typer(recipes.app, name="recipes")


@app.command()
def families(debug: DebugOption = False) -> None:
    """List the model families that can be converted.

    With well-known models, their attention masks, and the attention backends they support.

    \b
    Example:
      uniattn families
    """
    with guard("families", debug):
        from uniattn_cli.cli.console import show
        from uniattn_cli.cli.families import list_families

        show(list_families())


@app.command()
def doctor(debug: DebugOption = False) -> None:
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
        show(examine())
