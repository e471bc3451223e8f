"""The commands of `uniattn`: parse, call one function, print. Nothing heavy is imported outside a command's body."""

from __future__ import annotations

import enum
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

from uniattn_cli import __version__
from uniattn_cli.cli import settings
from uniattn_cli.cli.runner import Common, guard, run_stage

app = typer.Typer(
    name="uniattn",
    help="Let the layers of a pre-trained LLM share their Softmax maps, post-train it, and measure the outcome.\n\n"
    "\b\nIn an empty folder:\n  uniattn analyze HuggingFaceTB/SmolLM2-135M-Instruct\n  uniattn convert --groups auto\n"
    "  uniattn train recipe.yaml\n  uniattn eval",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    # Plain help starts in half the time.
    rich_markup_mode=None,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def _words(name: str, key: str) -> Any:
    return enum.Enum(name, {word: word for word in settings.choices(key)}, type=str)


Dtype = _words("Dtype", "model.dtype")
HeadMap = _words("HeadMap", "layout.head_map")
Sources = _words("Sources", "layout.sources")
Search = _words("Search", "layout.search")


class Engine(str, enum.Enum):
    """What can serve a checkpoint."""

    vllm = "vllm"
    transformers = "transformers"


def _setting(key: str, flag: str, metavar: str | None = None) -> Any:
    """An option that stands for a setting of the recipe and takes its help from there."""
    entry = settings.find(key)
    default = "" if entry.default == "null" else f", default {entry.default}"
    return typer.Option(flag, metavar=metavar, help=f"{entry.help} [recipe: {key}{default}]", show_default=False)


def _complete_setting(incomplete: str) -> list[str]:
    return [f"{entry.key}=" for entry in settings.settings() if entry.key.startswith(incomplete)]


def _complete_groups(incomplete: str) -> list[str]:
    return [word for word in ("auto", "paper", "every:4") if word.startswith(incomplete)]


RunDirOption = Annotated[
    Path,
    typer.Option(
        "-C",
        "--run-dir",
        metavar="DIR",
        file_okay=False,
        help="Work as if started in DIR: recipe and outputs lie there and every path is relative to it.",
    ),
]
SetOption = Annotated[
    list[str] | None,
    typer.Option(
        "--set",
        metavar="KEY=VALUE",
        autocompletion=_complete_setting,
        help="Use this value instead of the recipe's; repeatable. `uniattn recipe` lists the keys.",
    ),
]
DeviceOption = Annotated[str, typer.Option("--device", metavar="DEVICE", help="auto, cpu, cuda, cuda:1, mps, ...")]
ForceOption = Annotated[bool, typer.Option("--force", help="Replace a complete output directory.")]
DebugOption = Annotated[bool, typer.Option("--debug", help="Show tracebacks and what the libraries below print.")]
GroupsOption = Annotated[
    str | None,
    typer.Option(
        "--groups",
        metavar="auto|paper|every:N|FIRST-LAST:N|LIST|FILE",
        autocompletion=_complete_groups,
        help="Which layers share [recipe: layout.groups, default auto].",
        show_default=False,
    ),
]
FollowersOption = Annotated[int | None, _setting("layout.followers", "--followers", "N")]
KvOption = Annotated[float | None, _setting("layout.kv", "--kv", "SHARE")]
HeadMapOption = Annotated[HeadMap | None, _setting("layout.head_map", "--head-map")]
SearchOption = Annotated[Search | None, _setting("layout.search", "--search")]
KindsOption = Annotated[
    str | None,
    typer.Option(
        "--kinds",
        metavar="KIND,...",
        help="Kinds that the thorough search may use: softmax, key, kv, pooled, linear, none [recipe: layout.kinds].",
        show_default=False,
    ),
]
SourcesOption = Annotated[Sources | None, _setting("layout.sources", "--sources")]


def _overrides(**values: Any) -> list[str]:
    """`section__name=value` as `section.name=value` strings, for the options that were given."""
    plain = {key: value.value if isinstance(value, enum.Enum) else value for key, value in values.items()}
    return [f"{key.replace('__', '.')}={value}" for key, value in plain.items() if value is not None]


def _layout_overrides(
    followers: int | None,
    kv: float | None,
    search: Search | None,
    kinds: str | None,
    head_map: HeadMap | None,
    sources: Sources | None,
) -> list[str]:
    """Overrides of `group` and `convert`; a budget replaces whichever budget the recipe has."""
    if followers is not None and kv is not None:
        raise typer.BadParameter("give one budget, not two", param_hint="--followers, --kv")
    found = _overrides(layout__search=search, layout__head_map=head_map, layout__sources=sources)
    if kinds is not None:
        found.append(f"layout.kinds=[{kinds}]")
    if followers is not None or kv is not None:
        budgets = {"followers": followers, "kv": kv, "params": None}
        found += [f"layout.{key}={'null' if value is None else value}" for key, value in budgets.items()]
    return found


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


@app.command()
def analyze(
    model: Annotated[
        str | None, typer.Argument(metavar="MODEL", help="Hub id or directory; default: the recipe's.")
    ] = None,
    tokens: Annotated[int | None, _setting("analysis.tokens", "--tokens", "N")] = None,
    length: Annotated[int | None, _setting("analysis.length", "--length", "N")] = None,
    max_distance: Annotated[int | None, _setting("analysis.max_distance", "--max-distance", "N")] = None,
    dtype: Annotated[Dtype | None, _setting("model.dtype", "--dtype")] = None,
    recipe: Annotated[
        Path | None, typer.Option("--recipe", metavar="FILE", help="Start recipe.yaml from this file.")
    ] = None,
    run_dir: RunDirOption = Path("."),
    set_: SetOption = None,
    device: DeviceOption = "auto",
    force: ForceOption = False,
    debug: DebugOption = False,
) -> None:
    """Measure how alike the layers' maps are.

    Says what sharing would save and cost. Writes analysis/ and, if there is none, recipe.yaml.

    \b
    Example:
      uniattn analyze HuggingFaceTB/SmolLM2-135M-Instruct --tokens 32768
    """
    overrides = _overrides(
        analysis__tokens=tokens, analysis__length=length, analysis__max_distance=max_distance, model__dtype=dtype
    )

    def call(overrides: Sequence[str], options: Any) -> Any:
        from uniattn_cli.analysis.analyze import analyze

        return analyze(model, recipe=recipe, overrides=overrides, options=options)

    run_stage("analyze", Common(run_dir, set_ or (), device, force, debug), overrides, call)


@app.command()
def group(
    groups: GroupsOption = None,
    followers: FollowersOption = None,
    kv: KvOption = None,
    search: SearchOption = None,
    kinds: KindsOption = None,
    head_map: HeadMapOption = None,
    sources: SourcesOption = None,
    run_dir: RunDirOption = Path("."),
    set_: SetOption = None,
    device: DeviceOption = "auto",
    force: ForceOption = False,
    debug: DebugOption = False,
) -> None:
    """Choose which layers share, under a budget.

    Shows the layout chosen from the analysis and writes it into recipe.yaml.

    \b
    Example:
      uniattn group --followers 12
    """

    def call(overrides: Sequence[str], options: Any) -> Any:
        from uniattn_cli.grouping.group import group

        return group(groups=groups, overrides=overrides, options=options)

    overrides = _layout_overrides(followers, kv, search, kinds, head_map, sources)
    run_stage("group", Common(run_dir, set_ or (), device, force, debug), overrides, call)


@app.command()
def convert(
    groups: GroupsOption = None,
    followers: FollowersOption = None,
    kv: KvOption = None,
    search: SearchOption = None,
    kinds: KindsOption = None,
    head_map: HeadMapOption = None,
    sources: SourcesOption = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print plan and savings; load and write nothing.")] = False,
    run_dir: RunDirOption = Path("."),
    set_: SetOption = None,
    device: DeviceOption = "auto",
    force: ForceOption = False,
    debug: DebugOption = False,
) -> None:
    """Write the converted checkpoint.

    Fits the layers that borrow their maps and writes converted/, an ordinary Hugging Face checkpoint. Chooses the
    layout first where `uniattn group` has not.

    \b
    Example:
      uniattn convert --groups auto --kv 0.8
    """

    def call(overrides: Sequence[str], options: Any) -> Any:
        from uniattn_cli.conversion.convert import convert

        return convert(groups=groups, dry_run=dry_run, overrides=overrides, options=options)

    overrides = _layout_overrides(followers, kv, search, kinds, head_map, sources)
    run_stage("convert", Common(run_dir, set_ or (), device, force, debug), overrides, call)


@app.command()
def train(
    recipe: Annotated[Path, typer.Argument(metavar="RECIPE", help="The YAML file.")] = Path("recipe.yaml"),
    run_dir: RunDirOption = Path("."),
    set_: SetOption = None,
    device: DeviceOption = "auto",
    force: ForceOption = False,
    debug: DebugOption = False,
) -> None:
    """Post-train the converted model.

    Runs the stages that the recipe lists and writes trained/. After an interruption the same command continues from
    the last checkpoint.

    \b
    Example:
      uniattn train recipe.yaml --set train.batch_size=32
    """

    def call(overrides: Sequence[str], options: Any) -> Any:
        from uniattn_cli.training.train import train

        return train(recipe, overrides=overrides, options=options)

    run_stage("train", Common(run_dir, set_ or (), device, force, debug), [], call)


@app.command(name="eval")
def evaluate(
    checkpoints: Annotated[
        list[str] | None, typer.Argument(metavar="[CHECKPOINT]...", help="Further checkpoint directories.")
    ] = None,
    run_dir: RunDirOption = Path("."),
    set_: SetOption = None,
    device: DeviceOption = "auto",
    force: ForceOption = False,
    debug: DebugOption = False,
) -> None:
    """Compare base, converted and trained model.

    Measures quality, size and speed side by side and writes evaluation/.

    \b
    Example:
      uniattn eval ../other-run/trained --set evaluation.limit=50
    """

    def call(overrides: Sequence[str], options: Any) -> Any:
        from uniattn_cli.evaluation.evaluate import evaluate

        return evaluate(checkpoints=checkpoints or (), overrides=overrides, options=options)

    run_stage("eval", Common(run_dir, set_ or (), device, force, debug), [], call)


@app.command(context_settings={"allow_extra_args": True, "ignore_unknown_options": True})
def serve(
    context: typer.Context,
    directory: Annotated[
        Path, typer.Argument(metavar="[DIR]", help="A checkpoint, or a run directory: its newest checkpoint.")
    ] = Path("."),
    engine: Annotated[Engine, typer.Option("--engine", help="What serves it.")] = Engine.vllm,
    program: Annotated[
        str | None,
        typer.Option("--program", metavar="PATH", help="The engine's program, if it is installed elsewhere."),
    ] = None,
    print_: Annotated[bool, typer.Option("--print", help="Print the command line and start nothing.")] = False,
    debug: DebugOption = False,
) -> None:
    """Serve a checkpoint with vLLM or transformers.

    Checks the checkpoint, shows the engine's command line and becomes it. Options that are not listed here go to the
    engine, which has its own help: `vllm serve --help`.

    \b
    Example:
      uniattn serve trained --max-model-len 4096 --port 8001
    """
    with guard("serve", debug):
        from uniattn_cli.serving.serve import serve

        command = serve(directory, engine=engine.value, program=program, arguments=context.args)
        typer.echo(str(command))
        if not print_:
            sys.stdout.flush()
            command.run()


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


@app.command()
def families(debug: DebugOption = False) -> None:
    """List the model families that can be converted.

    With well-known models, what their layers attend to, and the attention backends that they can use.

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
    """Show what this machine has and lacks.

    Versions, devices, dtypes, attention backends, caches, free disk, and the extras that are not installed.

    \b
    Example:
      uniattn doctor
    """
    with guard("doctor", debug):
        from uniattn_cli.cli.console import show
        from uniattn_cli.cli.doctor import examine
        from uniattn_cli.cli.runner import quiet_libraries

        if not debug:
            quiet_libraries()
        show(examine())
