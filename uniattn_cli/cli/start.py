"""`uniattn init`: the first recipe, from three answers."""

from __future__ import annotations

import enum
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, TypeVar

import typer

from uniattn_cli.cli.flags import DebugOption, KvOption, RunDirOption
from uniattn_cli.cli.guard import guard, run_directory

Answer = TypeVar("Answer", str, float, "Goal")
MODEL = "HuggingFaceTB/SmolLM2-135M-Instruct"


class Goal(str, enum.Enum):
    """What matters beside memory."""

    time = "time"
    loss = "loss"
    paper = "paper"


# What each goal means, and the kind of layer that serves it.
GOALS = {
    Goal.time: ("less memory and time, at a small loss", "early"),
    Goal.loss: ("the least loss for the memory, at the base's speed", "key"),
    Goal.paper: ("the method of the paper", "softmax"),
}


def init(
    model: Annotated[str | None, typer.Argument(metavar="MODEL", help="Hub id or directory.")] = None,
    train: Annotated[
        list[str] | None,
        typer.Option("--train", metavar="FILE", help="File or hub data set of training rows, or builtin; repeatable."),
    ] = None,
    kv: KvOption = None,
    goal: Annotated[
        Goal | None,
        typer.Option("--goal", help="; ".join(f"{goal.value}: {words}" for goal, (words, _) in GOALS.items()) + "."),
    ] = None,
    run_dir: RunDirOption = Path("."),
    debug: DebugOption = False,
) -> None:
    """Write a recipe.yaml from three answers.

    Asks on a terminal for what is not given: which model, which data, what to save. Elsewhere it takes the defaults.

    \b
    Example:
      uniattn init Qwen/Qwen3-0.6B --train chats.jsonl --kv 0.7
    """
    with guard("init", debug), run_directory(run_dir, create=True):
        from uniattn_cli.cli.console import show
        from uniattn_cli.errors import StageError
        from uniattn_cli.recipe.files import commented_tree, write_tree
        from uniattn_cli.recipe.schema import DatasetSpec, DataSpec, LayoutSpec, ModelSpec, Recipe
        from uniattn_cli.run.directory import RunDir
        from uniattn_cli.run.files import file_errors
        from uniattn_cli.tables import Result

        path = RunDir(".").recipe
        if path.exists():
            raise StageError(f"{path} exists; edit it, or start in another folder with -C DIR")
        model = model or _ask("Which model? A hub id or a directory", MODEL)
        train = train or [_ask("Which training rows? A file, a hub data set, or builtin", "builtin")]
        share = _ask("Which share of the KV cache to keep, at most?", 0.8, _share_fault) if kv is None else kv
        if goal is None:
            lines = (f"  {each.value}: {words} (layers of kind {kind})" for each, (words, kind) in GOALS.items())
            goal = _ask("\n".join(["What matters most?", *lines, "Goal"]), Goal.time)
        recipe = Recipe(
            model=ModelSpec(name=model),
            data=DataSpec(train=tuple(DatasetSpec(source=source) for source in train)),
            layout=LayoutSpec(kv=share, kinds=(GOALS[goal][1],)),
        )
        tree = commented_tree(recipe)
        Recipe.from_tree(tree, f"--kv {share}")
        with file_errors(Path(".")):
            write_tree(tree, path)
        notes = [
            "Look at what training will see: uniattn data",
            "then: uniattn analyze, uniattn convert, uniattn train recipe.yaml, uniattn eval",
        ]
        show(Result(title=f"wrote {path}", notes=notes))


def _ask(question: str, default: Answer, fault: Callable[[Answer], str | None] = lambda answer: None) -> Answer:
    """An answer of the type of the default; the default itself where nobody can be asked.

    Args:
        fault: what is wrong with an answer, which is then asked for again.

    Raises:
        KeyboardInterrupt: after Ctrl-C or Ctrl-D.
    """
    if not sys.stdin.isatty():
        return default
    while True:
        try:
            text = typer.prompt(question, default=getattr(default, "value", default), err=True)
        except typer.Abort:
            typer.echo(err=True)
            raise KeyboardInterrupt from None
        try:
            answer = type(default)(text)
        except ValueError as error:
            wrong: str | None = str(error)
        else:
            wrong = fault(answer)
            if wrong is None:
                return answer
        typer.echo(wrong, err=True)


def _share_fault(share: float) -> str | None:
    """Why the recipe cannot have this budget."""
    from uniattn_cli.errors import RecipeError
    from uniattn_cli.recipe.schema import Recipe

    try:
        Recipe.from_tree({"model": {"name": MODEL}, "layout": {"kv": share}}, "not possible")
    except RecipeError as error:
        return error.faults[0]
    return None
