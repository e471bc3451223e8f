"""The commands of `uniattn`: parse, call one function, print. Nothing heavy is imported outside a command's body."""

from __future__ import annotations

import enum
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

from uniattn_cli import __version__
from uniattn_cli.cli import recipes, settings, talk
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
Part = enum.Enum("Part", {"train": "train", "heldout": "heldout"}, type=str)
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


def _complete_recipe(incomplete: str) -> list[str]:
    from uniattn_cli import ready

    return [name for name in ready.names() if name.startswith(incomplete)]


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


BesideOption = Annotated[
    str | None,
    typer.Option("--beside", metavar="MODEL", help="Let this model answer too: `base`, a directory or a hub id."),
]
NewTokensOption = Annotated[int, typer.Option("--max-new-tokens", metavar="N", help="Cut the answer there.")]
TemperatureOption = Annotated[
    float | None, typer.Option("--temperature", metavar="T", help="Sample, with logits divided by T.")
]
TopPOption = Annotated[
    float | None, typer.Option("--top-p", metavar="P", help="Sample from the likeliest tokens that make up P.")
]
GreedyOption = Annotated[bool, typer.Option("--greedy", help="Take the likeliest token; the default.")]
SeedOption = Annotated[int, typer.Option("--seed", metavar="N", help="Of the sampling.", min=0)]
StatsOption = Annotated[bool, typer.Option("--stats", help="Tell tokens per second and KV-cache bytes of each answer.")]


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
        str | None,
        typer.Option(
            "--recipe",
            metavar="FILE|NAME",
            autocompletion=_complete_recipe,
            help="Start recipe.yaml from this file or ready recipe (`uniattn recipes`).",
        ),
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
    run_stage("group", Common(run_dir, set_ or (), device, False, debug), overrides, call)


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
    control: Annotated[
        bool, typer.Option("--control", help="Train the unconverted base in the same way, for comparison.")
    ] = False,
    run_dir: RunDirOption = Path("."),
    set_: SetOption = None,
    device: DeviceOption = "auto",
    force: ForceOption = False,
    debug: DebugOption = False,
) -> None:
    """Post-train the converted model.

    Runs the stages that the recipe lists and writes trained/. After an interruption the same command continues from
    the last checkpoint. With --control the base sees the same rows in the same order, and control/ is written: what
    sharing costs is the difference between the two.

    \b
    Example:
      uniattn train recipe.yaml --set train.batch_size=32
    """

    def call(overrides: Sequence[str], options: Any) -> Any:
        from uniattn_cli.training.train import train

        return train(recipe, control=control, overrides=overrides, options=options)

    run_stage("train", Common(run_dir, set_ or (), device, force, debug), [], call)


@app.command()
def data(
    recipe: Annotated[
        str, typer.Argument(metavar="RECIPE", help="The YAML file, or the name of a ready recipe.")
    ] = "recipe.yaml",
    samples: Annotated[int, typer.Option("--samples", metavar="N", min=0, help="Rows to show.")] = 3,
    seed: Annotated[
        int | None, typer.Option("--seed", metavar="N", help="Show other rows; changes nothing else.")
    ] = None,
    split: Annotated[Part, typer.Option("--split", help="Rows that are trained on, or held-out ones.")] = Part.train,
    run_dir: RunDirOption = Path("."),
    set_: SetOption = None,
    debug: DebugOption = False,
) -> None:
    """Show what training sees: rows, masks, lengths, steps.

    Decodes some rows, what is learned of them in colour, and counts what is cut, left out or repeated. Needs the
    model's tokenizer, not its weights, and nothing else to have been run.

    \b
    Example:
      uniattn data recipe.yaml --samples 5 --set train.max_length=1024
    """

    def call(overrides: Sequence[str], options: Any) -> Any:
        from uniattn_cli.training.dataview import view_data

        return view_data(recipe, samples=samples, seed=seed, part=split.value, overrides=overrides, options=options)

    run_stage("data", Common(run_dir, set_ or (), "cpu", False, debug), [], call)


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
    """Compare base, control, converted and trained model.

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
def push(
    directory: Annotated[
        Path, typer.Argument(metavar="DIR", help="A converted checkpoint, such as trained; its README.md is the card.")
    ],
    repo_id: Annotated[str, typer.Argument(metavar="REPO_ID", help="OWNER/NAME on the hub.")],
    private: Annotated[bool, typer.Option("--private", help="Make the repository private.")] = False,
    revision: Annotated[
        str | None, typer.Option("--revision", metavar="BRANCH", help="Branch, made if it is missing; default: main.")
    ] = None,
    message: Annotated[str | None, typer.Option("--message", metavar="TEXT", help="Of the commit.")] = None,
    base_model: Annotated[
        str | None,
        typer.Option("--base-model", metavar="ID", help="Hub id of the base, where the recipe names a directory."),
    ] = None,
    licence: Annotated[
        str | None,
        typer.Option("--license", metavar="ID", help="Such as apache-2.0; default: what the base's card says."),
    ] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Print the model card and the files; needs no network.")
    ] = False,
    run_dir: RunDirOption = Path("."),
    force: Annotated[bool, typer.Option("--force", help="Add a commit to a repository that holds files.")] = False,
    debug: DebugOption = False,
) -> None:
    """Upload a checkpoint with a model card.

    The card states base, layout, costs, figures of `uniattn eval`, data, training and licence. Everything goes up in
    one commit, so that the repository is never half a model.

    \b
    Example:
      uniattn push trained my-name/my-model --private --dry-run
    """

    def call(_: Sequence[str], options: Any) -> Any:
        from uniattn_cli.publishing.push import push

        details = {"private": private, "revision": revision, "message": message, "base_model": base_model}
        return push(directory, repo_id, **details, licence=licence, dry_run=dry_run, options=options)

    run_stage("push", Common(run_dir, (), "auto", force, debug), [], call)


@app.command()
def compare(
    inputs: Annotated[
        list[str],
        typer.Argument(
            metavar="A B ...", help="Checkpoint directories, evaluated run directories, or results.json files."
        ),
    ],
    recipe: Annotated[
        Path | None,
        typer.Option("--recipe", metavar="FILE", help="Evaluate checkpoints with this recipe; default: recipe.yaml."),
    ] = None,
    run_dir: RunDirOption = Path("."),
    set_: SetOption = None,
    device: DeviceOption = "auto",
    force: ForceOption = False,
    debug: DebugOption = False,
) -> None:
    """Compare any models: one table, and who is beaten by nobody.

    Checkpoints are evaluated alike, finished evaluations are read; what was scored on other items or with other
    settings is refused. Writes comparison/ with table, figures and a picture of quality against KV bytes and speed.

    \b
    Example:
      uniattn compare run-a run-b other/trained
    """

    def call(overrides: Sequence[str], options: Any) -> Any:
        from uniattn_cli.evaluation.compare import compare

        return compare(inputs, recipe=recipe, overrides=overrides, options=options)

    run_stage("compare", Common(run_dir, set_ or (), device, force, debug), [], call)


def _list(text: str | None, flag: str, of: Any = str, separator: str = ",") -> list:
    """The values of an option that takes several."""
    try:
        return [of(part.strip()) for part in (text or "").split(separator) if part.strip()]
    except ValueError:
        raise typer.BadParameter(f"'{text}' is not a list of numbers", param_hint=flag) from None


@app.command()
def sweep(
    kv: Annotated[
        str | None,
        typer.Option("--kv", metavar="SHARE,...", help="Budgets: shares of the KV bytes to keep, default 0.9,0.8,0.7."),
    ] = None,
    followers: Annotated[
        str | None, typer.Option("--followers", metavar="N,...", help="Budgets: numbers of layers to change.")
    ] = None,
    kinds: Annotated[
        str | None,
        typer.Option(
            "--kinds",
            metavar="KIND,...;...",
            help="Sets of kinds of layer, such as 'softmax;softmax,kv'; all but softmax alone are searched thoroughly.",
        ),
    ] = None,
    solve: Annotated[
        str | None,
        typer.Option("--solve", metavar="WHAT,...", help="What the fit solves: both, compensation, output, none."),
    ] = None,
    discard: Annotated[bool, typer.Option("--discard", help="Delete the weights of each point once scored.")] = False,
    run_dir: RunDirOption = Path("."),
    set_: SetOption = None,
    device: DeviceOption = "auto",
    force: ForceOption = False,
    debug: DebugOption = False,
) -> None:
    """Convert under many budgets and draw what each one costs.

    Every combination of budgets, kinds and fits is converted and scored in a folder of its own below sweep/, with the
    analysis of this run; the base is scored once. After an interruption the same command goes on where it was.

    \b
    Example:
      uniattn sweep --kv 0.9,0.8,0.7 --solve both,output
    """
    budgets = {
        "kv": _list(kv, "--kv", float),
        "followers": _list(followers, "--followers", int),
        "kinds": [_list(each, "--kinds") for each in _list(kinds, "--kinds", separator=";")],
        "solve": _list(solve, "--solve"),
    }

    def call(overrides: Sequence[str], options: Any) -> Any:
        from uniattn_cli.sweeping.sweep import sweep

        return sweep(**budgets, discard=discard, overrides=overrides, options=options)

    run_stage("sweep", Common(run_dir, set_ or (), device, force, debug), [], call)


@app.command()
def report(run_dir: RunDirOption = Path("."), debug: DebugOption = False) -> None:
    """Make the page of an evaluation again.

    Writes evaluation/report.html from results.json and what the other stages left, without loading any model.

    \b
    Example:
      uniattn report -C my-run
    """

    def call(overrides: Sequence[str], options: Any) -> Any:
        from uniattn_cli.evaluation.rewrite import report

        return report()

    run_stage("report", Common(run_dir, (), "cpu", False, debug), [], call)


@app.command()
def generate(
    words: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="[CHECKPOINT] [PROMPT]",
            help="Model directory, hub id or `base`, by default what train or convert left; and the prompt, by default "
            "from stdin.",
        ),
    ] = None,
    beside: BesideOption = None,
    raw: Annotated[bool, typer.Option("--raw", help="Continue the text as it is, without the chat template.")] = False,
    max_new_tokens: NewTokensOption = 256,
    temperature: TemperatureOption = None,
    top_p: TopPOption = None,
    greedy: GreedyOption = False,
    seed: SeedOption = 0,
    stats: StatsOption = False,
    run_dir: RunDirOption = Path("."),
    set_: SetOption = None,
    device: DeviceOption = "auto",
    debug: DebugOption = False,
) -> None:
    """Let a model answer a prompt, alone or beside another.

    Prints the answer as it comes. Needs no run directory if a checkpoint is named.

    \b
    Example:
      uniattn generate "Why is the sky blue?" --beside base
    """

    def call(overrides: Sequence[str], options: Any) -> Any:
        def decoding() -> Any:
            return talk.make_decoding(max_new_tokens, temperature, top_p, seed, greedy)

        return talk.run_generate(
            words or (), decoding, beside=beside, raw=raw, stats=stats, overrides=overrides, options=options
        )

    run_stage("generate", Common(run_dir, set_ or (), device, False, debug), [], call)


@app.command()
def chat(
    checkpoint: Annotated[
        str | None,
        typer.Argument(metavar="[CHECKPOINT]", help="As in generate: directory, hub id or `base`."),
    ] = None,
    beside: BesideOption = None,
    max_new_tokens: NewTokensOption = 256,
    temperature: TemperatureOption = None,
    top_p: TopPOption = None,
    greedy: GreedyOption = False,
    seed: SeedOption = 0,
    stats: StatsOption = False,
    run_dir: RunDirOption = Path("."),
    set_: SetOption = None,
    device: DeviceOption = "auto",
    debug: DebugOption = False,
) -> None:
    """Talk with a model, alone or beside another.

    One line is one turn; /reset begins anew, /exit or Ctrl-D ends, Ctrl-C stops an answer.

    \b
    Example:
      uniattn chat trained --beside base --stats
    """

    def call(overrides: Sequence[str], options: Any) -> Any:
        def decoding() -> Any:
            return talk.make_decoding(max_new_tokens, temperature, top_p, seed, greedy)

        return talk.run_chat(checkpoint, decoding, beside=beside, stats=stats, overrides=overrides, options=options)

    run_stage("chat", Common(run_dir, set_ or (), device, False, debug), [], call)


@app.command()
def bench(
    checkpoints: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="[CHECKPOINT]...",
            help="Models, the reference first; default: the run's base, converted/ and trained/.",
        ),
    ] = None,
    shape: Annotated[
        str | None,
        typer.Option("--shape", metavar="NAME", help="Random weights instead: llama-3.1-8b, llama-3.2-1b, ..."),
    ] = None,
    groups: Annotated[
        list[str] | None,
        typer.Option(
            "--groups",
            metavar="[KIND@]GROUPS",
            help="A layout beside the base of --shape, as `convert` takes it; kv@paper: the same followers as rivals "
            "of another kind; repeatable.",
        ),
    ] = None,
    compensation: Annotated[
        str, typer.Option("--compensation", metavar="full|none|RANK", help="W_c of these layouts.")
    ] = "full",
    layers: Annotated[int | None, typer.Option("--layers", metavar="N", min=1, help="A shallower --shape.")] = None,
    batch: Annotated[str, typer.Option("--batch", metavar="N,...", help="Rows.")] = "1,16",
    context: Annotated[str, typer.Option("--context", metavar="N,...", help="Tokens before the first new one.")] = (
        "512,4096"
    ),
    new: Annotated[int, typer.Option("--new", metavar="N", help="New tokens per round.")] = 16,
    repeats: Annotated[
        int, typer.Option("--repeats", metavar="N", help="Rounds; in each, every model has its turn.")
    ] = 5,
    stock: Annotated[
        str, typer.Option("--stock", metavar="base|all|none", help="Models that transformers generates with too.")
    ] = "base",
    prompt_tokens: Annotated[
        int, typer.Option("--prompt-tokens", metavar="N", help="Time no prompts that have more in the whole batch.")
    ] = 131072,
    dtype: Annotated[Dtype | None, typer.Option("--dtype", help="Default: the checkpoint's own.")] = None,
    out: Annotated[Path, typer.Option("--out", metavar="DIR", help="Directory to write.")] = Path("bench"),
    run_dir: RunDirOption = Path("."),
    device: DeviceOption = "auto",
    force: ForceOption = False,
    debug: DebugOption = False,
) -> None:
    """Measure decoding speed beside the limit and transformers.

    Time to the first token and per token after it, for every batch and context, all models in turn under one engine.
    Writes a table, a plot and all numbers.

    \b
    Example:
      uniattn bench --shape llama-3.1-8b --groups paper --groups every:4 --batch 1,16 --context 4096
    """

    def call(overrides: Sequence[str], options: Any) -> Any:
        from uniattn_cli.benchmarking.bench import BenchSpec, bench

        spec = BenchSpec(
            settings.numbers(batch, "--batch"),
            settings.numbers(context, "--context"),
            new,
            repeats,
            stock,
            prompt_tokens,
            "auto" if dtype is None else dtype.value,
        )
        return bench(
            checkpoints or (),
            shape=shape,
            groups=groups or (),
            compensation=settings.compensation(compensation),
            layers=layers,
            spec=spec,
            out=out,
            options=options,
        )

    run_stage("bench", Common(run_dir, (), device, force, debug), [], call)


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

    Ready recipes to start from are another command, `uniattn recipes`.

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
