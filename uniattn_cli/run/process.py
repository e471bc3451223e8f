"""The processes that a launcher may have started; one alone without a launcher."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from uniattn_cli.errors import UsageError
from uniattn_cli.options import RunOptions
from uniattn_cli.recipe.schema import Recipe
from uniattn_cli.run.directory import RunDir

if TYPE_CHECKING:
    from accelerate import PartialState

# What a launcher sets for each process.
NUMBERS = ("RANK", "LOCAL_RANK", "WORLD_SIZE")
LAUNCHED = (*NUMBERS, "MASTER_ADDR", "MASTER_PORT")


def join_processes(options: RunOptions, *, objects: bool = False) -> PartialState:
    """Joins what `accelerate launch` or `torchrun` started; its `device` is where this process works.

    Args:
        options: its device counts for all processes; `cuda` is the GPU of the same number in each.
        objects: only Python objects are exchanged, which several processes on one GPU can do, too.

    Raises:
        UsageError: the environment has only some of the variables that a launcher sets, or impossible ones.
    """
    import torch
    from accelerate import PartialState

    _check_launcher()
    device = options.torch_device()
    if device.type == "cuda" and device.index is None:
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
    process = PartialState(cpu=device.type == "cpu" or (objects and "RANK" in os.environ))
    process.device = device
    return process


def _check_launcher() -> None:
    """Refuses what some batch systems and containers leave of a launcher, on which Accelerate fails or waits."""
    if os.environ.get("ACCELERATE_USE_DEEPSPEED", "").lower() in ("1", "true"):
        raise UsageError(
            "training with DeepSpeed is not supported; launch without it, and set train.fsdp to shard a model"
        )
    given = {name: os.environ[name] for name in LAUNCHED if name in os.environ}
    odd = [f"{name}={value}" for name, value in given.items() if name in NUMBERS and not value.isdecimal()]
    missing = [name for name in LAUNCHED if name not in given]
    if odd or (missing and ("LOCAL_RANK" in given or given.get("WORLD_SIZE", "1") != "1")):
        wrong = f"{' and '.join(odd)} makes no sense" if odd else f"it has no {' and '.join(missing)}"
        raise UsageError(
            f"the environment has {', '.join(given)}, as a launcher sets them, but {wrong}; start with `torchrun` or "
            f"`accelerate launch`, or unset {', '.join(given)}"
        )


@contextlib.contextmanager
def shared_output(
    process: PartialState | None,
    run: RunDir,
    stage: str,
    recipe: Recipe,
    inputs: dict[str, Any],
    *,
    force: bool,
    decisive: Sequence[str] = ("",),
    resume: bool = True,
) -> Iterator[Path]:
    """The hidden folder of a stage, the same for all processes; the main one makes and finishes it (`RunDir.write`).

    Args:
        process: None where there is only one.
    """
    if process is None:
        with run.write(stage, recipe, inputs, force=force, resume=resume, decisive=decisive) as partial:
            yield partial
        return
    with contextlib.ExitStack() as stack:
        if process.is_main_process:
            writing = run.write(stage, recipe, inputs, force=force, resume=resume, decisive=decisive)
            partial = stack.enter_context(writing)
        else:
            partial = run.partial(stage)
        process.wait_for_everyone()
        yield partial
        process.wait_for_everyone()
    process.wait_for_everyone()
