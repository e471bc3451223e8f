"""The commands of a run: analysis, layout, conversion, training, evaluation. Each one calls one function."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

from uniattn_cli.cli.flags import (
    DebugOption,
    DeviceOption,
    Dtype,
    FollowersOption,
    ForceOption,
    GroupsOption,
    HeadMapOption,
    JsonOption,
    KindsOption,
    KvOption,
    MaxLossOption,
    ParamsOption,
    Part,
    RunDirOption,
    SaveOption,
    SearchOption,
    SetOption,
    SourcesOption,
    SpeedOption,
    complete_recipe,
    layout_overrides,
    overrides_of,
    setting,
)
from uniattn_cli.cli.guard import Common, run_command


def analyze(
    model: Annotated[
        str | None, typer.Argument(metavar="MODEL", help="Hub id or directory; default: the recipe's.")
    ] = None,
    tokens: Annotated[int | None, setting("analysis.tokens", "--tokens", "N")] = None,
    length: Annotated[int | None, setting("analysis.length", "--length", "N")] = None,
    max_distance: Annotated[int | None, setting("analysis.max_distance", "--max-distance", "N")] = None,
    dtype: Annotated[Dtype | None, setting("model.dtype", "--dtype")] = None,
    recipe: Annotated[
        str | None,
        typer.Option(
            "--recipe",
            metavar="FILE|NAME",
            autocompletion=complete_recipe,
            help="Start recipe.yaml from this file or ready recipe (`uniattn recipes`).",
        ),
    ] = None,
    run_dir: RunDirOption = Path("."),
    set_: SetOption = None,
    device: DeviceOption = "auto",
    force: ForceOption = False,
    json: JsonOption = False,
    debug: DebugOption = False,
) -> None:
    """Measure how similar the layers' attention maps are.

    Reports what sharing would save and cost. Writes analysis/ and, if missing, recipe.yaml.

    \b
    Example:
      uniattn analyze HuggingFaceTB/SmolLM2-135M-Instruct --tokens 32768
    """
    overrides = overrides_of(
        analysis__tokens=tokens, analysis__length=length, analysis__max_distance=max_distance, model__dtype=dtype
    )

    def call(overrides: Sequence[str], options: Any) -> Any:
        from uniattn_cli.commands.analyze import analyze

        return analyze(model, recipe=recipe, overrides=overrides, options=options)

    run_command("analyze", Common(run_dir, set_ or (), device, force, debug, json), overrides, call)


def score(
    kinds: KindsOption = None,
    run_dir: RunDirOption = Path("."),
    set_: SetOption = None,
    device: DeviceOption = "auto",
    force: ForceOption = False,
    json: JsonOption = False,
    debug: DebugOption = False,
) -> None:
    """Measure what every change of every layer costs.

    Converts each layer alone to every kind, with and without W_c, and measures the loss. Writes scores/, from which
    `--search scores` finds a layout for any budget. A kind that is added later adds its scores; an interrupted run goes
    on. Best on a GPU, or on several with `torchrun -m uniattn_cli score`.

    \b
    Example:
      uniattn score --kinds key,kv,linear
    """

    def call(overrides: Sequence[str], options: Any) -> Any:
        from uniattn_cli.commands.score import score

        return score(overrides=overrides, options=options)

    overrides = [] if kinds is None else [f"layout.kinds=[{kinds}]"]
    run_command("score", Common(run_dir, set_ or (), device, force, debug, json), overrides, call)


def group(
    groups: GroupsOption = None,
    followers: FollowersOption = None,
    kv: KvOption = None,
    params: ParamsOption = None,
    max_loss: MaxLossOption = None,
    speed: SpeedOption = None,
    save: SaveOption = None,
    search: SearchOption = None,
    kinds: KindsOption = None,
    head_map: HeadMapOption = None,
    sources: SourcesOption = None,
    run_dir: RunDirOption = Path("."),
    set_: SetOption = None,
    device: DeviceOption = "auto",
    json: JsonOption = False,
    debug: DebugOption = False,
) -> None:
    """Choose which layers share, under a budget.

    Shows the layout chosen from the analysis and writes it into recipe.yaml.

    \b
    Example:
      uniattn group --followers 12
    """

    def call(overrides: Sequence[str], options: Any) -> Any:
        from uniattn_cli.commands.group import group

        return group(groups=groups, overrides=overrides, options=options)

    budgets = {"followers": followers, "kv": kv, "params": params, "max_loss": max_loss, "speed": speed}
    overrides = layout_overrides(budgets, save, search, kinds, head_map, sources)
    run_command("group", Common(run_dir, set_ or (), device, False, debug, json), overrides, call)


def convert(
    groups: GroupsOption = None,
    followers: FollowersOption = None,
    kv: KvOption = None,
    params: ParamsOption = None,
    max_loss: MaxLossOption = None,
    speed: SpeedOption = None,
    save: SaveOption = None,
    search: SearchOption = None,
    kinds: KindsOption = None,
    head_map: HeadMapOption = None,
    sources: SourcesOption = None,
    dry_run: Annotated[
        bool,
        typer.Option("--dry-run", help="Print layout, savings, memory and disk needed; load and write nothing."),
    ] = False,
    run_dir: RunDirOption = Path("."),
    set_: SetOption = None,
    device: DeviceOption = "auto",
    force: ForceOption = False,
    json: JsonOption = False,
    debug: DebugOption = False,
) -> None:
    """Write the converted checkpoint.

    Fits the changed layers and writes converted/, an ordinary Hugging Face checkpoint. Chooses the layout first unless
    `uniattn group` has done so.

    \b
    Example:
      uniattn convert --groups auto --kv 0.8
    """

    def call(overrides: Sequence[str], options: Any) -> Any:
        from uniattn_cli.commands.convert import convert

        return convert(groups=groups, dry_run=dry_run, overrides=overrides, options=options)

    budgets = {"followers": followers, "kv": kv, "params": params, "max_loss": max_loss, "speed": speed}
    overrides = layout_overrides(budgets, save, search, kinds, head_map, sources)
    run_command("convert", Common(run_dir, set_ or (), device, force, debug, json), overrides, call)


def train(
    recipe: Annotated[Path, typer.Argument(metavar="RECIPE", help="The YAML file.")] = Path("recipe.yaml"),
    control: Annotated[
        bool, typer.Option("--control", help="Train the unconverted base the same way, for comparison.")
    ] = False,
    run_dir: RunDirOption = Path("."),
    set_: SetOption = None,
    device: DeviceOption = "auto",
    force: ForceOption = False,
    json: JsonOption = False,
    debug: DebugOption = False,
) -> None:
    """Post-train the converted model.

    Runs the stages of the recipe and writes trained/. After an interruption the same command resumes from the last
    checkpoint. With --control it trains the base on the same rows in the same order and writes control/; the difference
    between the two is the cost of sharing.

    \b
    Example:
      uniattn train recipe.yaml --set train.batch_size=32
    """

    def call(overrides: Sequence[str], options: Any) -> Any:
        from uniattn_cli.commands.train import train

        return train(recipe=recipe, control=control, overrides=overrides, options=options)

    run_command("train", Common(run_dir, set_ or (), device, force, debug, json), [], call)


def data(
    recipe: Annotated[
        str | None,
        typer.Argument(metavar="[RECIPE]", help="The YAML file, or the name of a ready recipe; default: recipe.yaml."),
    ] = None,
    model: Annotated[
        str | None,
        typer.Option("--model", metavar="MODEL", help="Hub id or directory; with it, no recipe is needed."),
    ] = None,
    train: Annotated[
        list[str] | None,
        typer.Option("--train", metavar="FILE", help="File or hub data set of training rows; repeatable."),
    ] = None,
    samples: Annotated[int, typer.Option("--samples", metavar="N", min=0, help="Rows to show.")] = 3,
    seed: Annotated[
        int | None, typer.Option("--seed", metavar="N", help="Show other rows; changes nothing else.")
    ] = None,
    split: Annotated[Part, typer.Option("--split", help="Training rows or held-out rows.")] = Part.train,
    run_dir: RunDirOption = Path("."),
    set_: SetOption = None,
    json: JsonOption = False,
    debug: DebugOption = False,
) -> None:
    """Show what training sees: rows, masks, lengths, steps.

    Decodes some rows, with the tokens that count in the loss in colour, and counts what is truncated, dropped or
    repeated. Needs only the model's tokenizer, no weights and no other stage.

    \b
    Example:
      uniattn data recipe.yaml --samples 5 --set train.max_length=1024
      uniattn data --model HuggingFaceTB/SmolLM2-135M --train chats.jsonl
    """

    def call(overrides: Sequence[str], options: Any) -> Any:
        from uniattn_cli.commands.view_data import view_data

        return view_data(
            recipe=recipe,
            model=model,
            train=train or (),
            samples=samples,
            seed=seed,
            part=split.value,
            overrides=overrides,
            options=options,
        )

    run_command("data", Common(run_dir, set_ or (), "cpu", False, debug, json), [], call)


def synthesize(
    model: Annotated[str | None, setting("synthesis.model", "--model", "MODEL")] = None,
    tokens: Annotated[int | None, setting("synthesis.tokens", "--tokens", "N")] = None,
    temperature: Annotated[float | None, setting("synthesis.temperature", "--temperature", "T")] = None,
    run_dir: RunDirOption = Path("."),
    set_: SetOption = None,
    device: DeviceOption = "auto",
    force: ForceOption = False,
    json: JsonOption = False,
    debug: DebugOption = False,
) -> None:
    """Generate training rows with a model, if there are too few.

    Continues passages of the recipe's texts and answers the questions of its conversations, never held-out ones.
    Writes synthetic/, whose files can be listed in data.train.

    \b
    Example:
      uniattn synthesize --tokens 2000000 --set model.dtype=bfloat16
    """

    def call(overrides: Sequence[str], options: Any) -> Any:
        from uniattn_cli.commands.synthesize import synthesize

        return synthesize(overrides=overrides, options=options)

    overrides = overrides_of(synthesis__model=model, synthesis__tokens=tokens, synthesis__temperature=temperature)
    run_command("synthesize", Common(run_dir, set_ or (), device, force, debug, json), overrides, call)


def evaluate(
    checkpoints: Annotated[
        list[str] | None, typer.Argument(metavar="[CHECKPOINT]...", help="Additional checkpoint directories.")
    ] = None,
    run_dir: RunDirOption = Path("."),
    set_: SetOption = None,
    device: DeviceOption = "auto",
    force: ForceOption = False,
    json: JsonOption = False,
    debug: DebugOption = False,
) -> None:
    """Compare base, control, converted and trained model.

    Measures quality, size and speed of each and writes evaluation/.

    \b
    Example:
      uniattn eval ../other-run/trained --set evaluation.limit=50
    """

    def call(overrides: Sequence[str], options: Any) -> Any:
        from uniattn_cli.commands.evaluate import evaluate

        return evaluate(checkpoints or (), overrides=overrides, options=options)

    run_command("eval", Common(run_dir, set_ or (), device, force, debug, json), [], call)
