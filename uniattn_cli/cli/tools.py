"""The commands that use the models of a run: serve, publish, compare, try and time them."""

from __future__ import annotations

import enum
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

from uniattn_cli.cli import settings, talk
from uniattn_cli.cli.flags import DebugOption, DeviceOption, Dtype, ForceOption, JsonOption, RunDirOption, SetOption
from uniattn_cli.cli.guard import Common, guard, run_command


class DecodingEngine(str, enum.Enum):
    """What can run a model."""

    auto = "auto"
    engine = "engine"
    transformers = "transformers"


class ServingEngine(str, enum.Enum):
    """What can serve a checkpoint."""

    vllm = "vllm"
    transformers = "transformers"


class BenchEngine(str, enum.Enum):
    """What is measured."""

    engine = "engine"
    vllm = "vllm"


BesideOption = Annotated[
    str | None,
    typer.Option("--beside", metavar="MODEL", help="A second model to answer, given like CHECKPOINT."),
]
NewTokensOption = Annotated[
    int, typer.Option("--max-new-tokens", metavar="N", help="Largest number of generated tokens.")
]
TemperatureOption = Annotated[float | None, typer.Option("--temperature", metavar="T", help="Sampling temperature.")]
TopPOption = Annotated[
    float | None,
    typer.Option("--top-p", metavar="P", help="Nucleus sampling: total probability of the tokens to draw from."),
]
GreedyOption = Annotated[bool, typer.Option("--greedy", help="Greedy decoding, the default.")]
SeedOption = Annotated[int, typer.Option("--seed", metavar="N", help="Seed of the sampling.", min=0, max=2**32 - 1)]
StatsOption = Annotated[bool, typer.Option("--stats", help="Print tokens per second and KV-cache bytes per answer.")]


def serve(
    context: typer.Context,
    directory: Annotated[
        Path, typer.Argument(metavar="[DIR]", help="A checkpoint, or a run directory with one (the newest is used).")
    ] = Path("."),
    engine: Annotated[ServingEngine, typer.Option("--engine", help="Serving engine.")] = ServingEngine.vllm,
    program: Annotated[
        str | None,
        typer.Option("--program", metavar="PATH", help="The engine's executable, if not on the PATH."),
    ] = None,
    print_: Annotated[bool, typer.Option("--print", help="Print the command line without running it.")] = False,
    debug: DebugOption = False,
) -> None:
    """Serve a checkpoint with vLLM or transformers.

    Checks the checkpoint, prints the engine's command line and what its cache will hold, and runs it. Options not
    listed here are passed on to the engine, see `vllm serve --help`.

    \b
    Example:
      uniattn serve trained --max-model-len 4096 --port 8001
    """
    with guard("serve", debug):
        from uniattn_cli.commands.serve import serve

        command = serve(directory, engine=engine.value, program=program, arguments=context.args)
        typer.echo(str(command))
        if not print_:
            typer.echo(command.cache)
            sys.stdout.flush()
            command.run()


def push(
    directory: Annotated[
        Path,
        typer.Argument(metavar="DIR", help="A converted checkpoint, such as trained; its README.md replaces the card."),
    ],
    repo_id: Annotated[str, typer.Argument(metavar="REPO_ID", help="OWNER/NAME on the hub.")],
    private: Annotated[bool, typer.Option("--private", help="Make the repository private.")] = False,
    revision: Annotated[
        str | None,
        typer.Option("--revision", metavar="BRANCH", help="Branch, created if missing; default: main."),
    ] = None,
    message: Annotated[str | None, typer.Option("--message", metavar="TEXT", help="Commit message.")] = None,
    base_model: Annotated[
        str | None,
        typer.Option("--base-model", metavar="ID", help="Hub id of the base, if the recipe has a directory."),
    ] = None,
    licence: Annotated[
        str | None,
        typer.Option("--license", metavar="ID", help="Such as apache-2.0; default: the licence in the base's card."),
    ] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Print the model card and the files; needs no network.")
    ] = False,
    run_dir: RunDirOption = Path("."),
    force: Annotated[
        bool, typer.Option("--force", help="Add a commit to a repository that already has files.")
    ] = False,
    json: JsonOption = False,
    debug: DebugOption = False,
) -> None:
    """Upload a checkpoint with a model card.

    The card states base, layout, costs, figures of `uniattn eval`, data, training and licence. Uploads that take more
    than a few minutes are split into several commits; after an interruption, the same command with --force resumes.

    \b
    Example:
      uniattn push trained my-name/my-model --private --dry-run
    """

    def call(_: Sequence[str], options: Any) -> Any:
        from uniattn_cli.commands.push import push

        return push(
            directory,
            repo_id,
            private=private,
            revision=revision,
            message=message,
            base_model=base_model,
            licence=licence,
            dry_run=dry_run,
            options=options,
        )

    run_command("push", Common(run_dir, (), "auto", force, debug, json), [], call)


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
    json: JsonOption = False,
    debug: DebugOption = False,
) -> None:
    """Compare any models in one table, with the Pareto front.

    Checkpoints are evaluated in the same way, finished evaluations are read; results on other items or with other
    settings are rejected. Writes comparison/ with table, figures and a plot of quality against KV bytes and speed.

    \b
    Example:
      uniattn compare run-a run-b other/trained
    """

    def call(overrides: Sequence[str], options: Any) -> Any:
        from uniattn_cli.commands.compare import compare

        return compare(inputs, recipe=recipe, overrides=overrides, options=options)

    run_command("compare", Common(run_dir, set_ or (), device, force, debug, json), [], call)


def _list(text: str | None, flag: str, of: Any = str, separator: str = ",") -> list:
    """The values of an option that takes several."""
    try:
        return [of(part.strip()) for part in (text or "").split(separator) if part.strip()]
    except ValueError:
        raise typer.BadParameter(f"'{text}' is not a list of numbers", param_hint=flag) from None


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
            help="Sets of kinds of layer, such as 'softmax;key;softmax,kv'; several together, pooled, linear and none "
            "are searched by scores, which points of the same fit share.",
        ),
    ] = None,
    solve: Annotated[
        str | None,
        typer.Option(
            "--solve",
            metavar="WHAT,...",
            help="What the fit solves: both (then with a W_c in every kind), compensation, output, none.",
        ),
    ] = None,
    discard: Annotated[bool, typer.Option("--discard", help="Delete the weights of each point after scoring.")] = False,
    run_dir: RunDirOption = Path("."),
    set_: SetOption = None,
    device: DeviceOption = "auto",
    force: ForceOption = False,
    json: JsonOption = False,
    debug: DebugOption = False,
) -> None:
    """Convert under many budgets and plot the cost of each.

    Every combination of budgets, kinds and fits is converted and scored in its own folder in sweep/, with the
    analysis of this run; the base is scored once. After an interruption the same command resumes.

    \b
    Example:
      uniattn sweep --kv 0.9,0.8,0.7 --solve both,output
    """
    budgets: dict[str, Any] = {
        "kv": _list(kv, "--kv", float),
        "followers": _list(followers, "--followers", int),
        "kinds": [_list(each, "--kinds") for each in _list(kinds, "--kinds", separator=";")],
        "solve": _list(solve, "--solve"),
    }

    def call(overrides: Sequence[str], options: Any) -> Any:
        from uniattn_cli.commands.sweep import sweep

        return sweep(**budgets, discard=discard, overrides=overrides, options=options)

    run_command("sweep", Common(run_dir, set_ or (), device, force, debug, json), [], call)


def report(run_dir: RunDirOption = Path("."), json: JsonOption = False, debug: DebugOption = False) -> None:
    """Rewrite the report of an evaluation.

    Writes evaluation/report.html from results.json and the outputs of other stages, without loading any model.

    \b
    Example:
      uniattn report -C my-run
    """

    def call(overrides: Sequence[str], options: Any) -> Any:
        from uniattn_cli.commands.report import report

        return report()

    run_command("report", Common(run_dir, (), "cpu", False, debug, json), [], call)


def generate(
    words: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="[CHECKPOINT] [PROMPT]",
            help="The run's `base`, `control`, `converted` or `trained`, a directory or a hub id (default: the newest "
            "of trained/ and converted/); and the prompt (default: stdin).",
        ),
    ] = None,
    beside: BesideOption = None,
    raw: Annotated[bool, typer.Option("--raw", help="Continue the text without the chat template.")] = False,
    max_new_tokens: NewTokensOption = 256,
    temperature: TemperatureOption = None,
    top_p: TopPOption = None,
    greedy: GreedyOption = False,
    seed: SeedOption = 0,
    engine: Annotated[
        DecodingEngine,
        typer.Option("--engine", help="What runs the model; auto uses this package's engine on a GPU."),
    ] = DecodingEngine.auto,
    stats: StatsOption = False,
    run_dir: RunDirOption = Path("."),
    set_: SetOption = None,
    device: DeviceOption = "auto",
    debug: DebugOption = False,
) -> None:
    """Answer a prompt with one model, or with two for comparison.

    Streams the answer. Needs no run directory if a checkpoint is given.

    \b
    Example:
      uniattn generate "Why is the sky blue?" --beside base
    """

    def call(overrides: Sequence[str], options: Any) -> Any:
        def decoding() -> Any:
            return talk.make_decoding(max_new_tokens, temperature, top_p, seed, greedy)

        return talk.run_generate(
            words or (),
            decoding,
            beside=beside,
            raw=raw,
            engine=engine.value,
            stats=stats,
            overrides=overrides,
            options=options,
        )

    run_command("generate", Common(run_dir, set_ or (), device, False, debug), [], call)


def chat(
    checkpoint: Annotated[
        str | None,
        typer.Argument(metavar="[CHECKPOINT]", help="As in `uniattn generate`."),
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
    """Chat with one model, or with two for comparison.

    One line is one turn; /reset resets the conversation, /exit or Ctrl-D quits, Ctrl-C stops an answer.

    \b
    Example:
      uniattn chat trained --beside base --stats
    """

    def call(overrides: Sequence[str], options: Any) -> Any:
        def decoding() -> Any:
            return talk.make_decoding(max_new_tokens, temperature, top_p, seed, greedy)

        return talk.run_chat(checkpoint, decoding, beside=beside, stats=stats, overrides=overrides, options=options)

    run_command("chat", Common(run_dir, set_ or (), device, False, debug), [], call)


# Parameters of `bench` that mean nothing where the other is measured.
_OF_VLLM = ("program", "cache", "server_options")
_OF_THE_ENGINE = ("stock", "prompt_tokens", "device")


def bench(
    given: typer.Context,
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
            help="A layout to compare with the base of --shape, as in convert; kv@paper for another kind; repeatable.",
        ),
    ] = None,
    compensation: Annotated[
        str,
        typer.Option("--compensation", metavar="auto|full|none|RANK", help="W_c of these layouts; auto: as each kind."),
    ] = "auto",
    layers: Annotated[
        int | None, typer.Option("--layers", metavar="N", min=1, help="Number of layers of --shape.")
    ] = None,
    engine: Annotated[
        BenchEngine, typer.Option("--engine", help="This package's own engine, or the server of vLLM under load.")
    ] = BenchEngine.engine,
    batch: Annotated[
        str, typer.Option("--batch", metavar="N,...", help="Batch sizes; of vLLM, requests that are sent at once.")
    ] = "1,16",
    context: Annotated[str, typer.Option("--context", metavar="N,...", help="Context lengths, in tokens.")] = (
        "512,4096"
    ),
    new: Annotated[
        int | None,
        typer.Option("--new", metavar="N", help="Decoding steps per round (16), or tokens per answer (128)."),
    ] = None,
    repeats: Annotated[
        int | None,
        typer.Option("--repeats", metavar="N", help="Rounds; all models take turns in each. Default: 5; vLLM: 1."),
    ] = None,
    stock: Annotated[
        str,
        typer.Option("--stock", metavar="base|all|none", help="Models to time with transformers' generate as well."),
    ] = "base",
    prompt_tokens: Annotated[
        int,
        typer.Option(
            "--prompt-tokens", metavar="N", min=0, help="Skip time to first token for batches with more prompt tokens."
        ),
    ] = 131072,
    dtype: Annotated[Dtype | None, typer.Option("--dtype", help="Default: the checkpoint's own.")] = None,
    program: Annotated[
        str | None, typer.Option("--program", metavar="PATH", help="vLLM's executable, if not on the PATH.")
    ] = None,
    cache: Annotated[
        str | None,
        typer.Option("--cache", metavar="BYTES", help="Memory for vLLM's keys and values, such as 16G; default: 4G."),
    ] = None,
    server_options: Annotated[
        list[str] | None,
        typer.Option("--server-option", metavar="OPTION", help="For vLLM's server, as --name=value; repeatable."),
    ] = None,
    out: Annotated[Path, typer.Option("--out", metavar="DIR", help="Output directory.")] = Path("bench"),
    run_dir: RunDirOption = Path("."),
    device: DeviceOption = "auto",
    force: ForceOption = False,
    json: JsonOption = False,
    debug: DebugOption = False,
) -> None:
    """Measure decoding speed relative to the hardware limit, or requests per second of vLLM's server.

    Time to first token and time per output token for every batch size and context length, compared with transformers;
    all models take turns in the same engine. With --engine vllm, a server of each model is sent rising loads. Writes
    tables, a plot and all numbers.

    \b
    Example:
      uniattn bench --shape llama-3.1-8b --groups paper --groups every:4 --batch 1,16 --context 4096
      uniattn bench --engine vllm --program vllm-env/bin/vllm --batch 8,32,128 --context 4096 --cache 16G
    """

    def load(random: dict[str, Any], options: Any) -> Any:
        from uniattn_cli.commands.bench_serving import LoadSpec, bench_serving

        defaults = LoadSpec()
        spec = LoadSpec(
            settings.numbers(batch, "--batch"),
            settings.numbers(context, "--context"),
            defaults.new if new is None else new,
            defaults.repeats if repeats is None else repeats,
            cache or defaults.cache,
            (*(server_options or ()), *(() if dtype is None else (f"--dtype={dtype.value}",))),
        )
        return bench_serving(checkpoints or (), **random, spec=spec, program=program, out=out, options=options)

    def call(overrides: Sequence[str], options: Any) -> Any:
        from uniattn_cli.commands.bench import BenchSpec, bench

        others = _OF_VLLM if engine is BenchEngine.engine else _OF_THE_ENGINE
        settings.refuse(given, others, f"--engine {'vllm' if engine is BenchEngine.engine else 'engine'}")
        random: dict[str, Any] = {
            "shape": shape,
            "groups": groups or (),
            "compensation": settings.compensation(compensation),
            "layers": layers,
        }
        if engine is BenchEngine.vllm:
            return load(random, options)
        defaults = BenchSpec()
        spec = BenchSpec(
            settings.numbers(batch, "--batch"),
            settings.numbers(context, "--context"),
            defaults.new if new is None else new,
            defaults.repeats if repeats is None else repeats,
            stock,
            prompt_tokens,
            "auto" if dtype is None else dtype.value,
        )
        return bench(
            checkpoints or (),
            **random,
            spec=spec,
            out=out,
            options=options,
        )

    run_command("bench", Common(run_dir, (), device, force, debug, json), [], call)
