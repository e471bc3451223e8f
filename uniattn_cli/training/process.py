"""The processes that a launcher may have started; one alone without a launcher."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from uniattn_cli.options import RunOptions
from uniattn_cli.recipe.schema import Recipe
from uniattn_cli.run.directory import RunDir

if TYPE_CHECKING:
    from accelerate import PartialState


def join_processes(options: RunOptions) -> PartialState:
    """Joins what `accelerate launch` or `torchrun` started; its `device` is where this process trains."""
    import torch
    from accelerate import PartialState

    device = options.torch_device()
    if device.type == "cuda" and device.index is None:
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
    process = PartialState(cpu=device.type == "cpu")
    process.device = device
    return process


@contextlib.contextmanager
def shared_output(
    process: PartialState,
    run: RunDir,
    stage: str,
    recipe: Recipe,
    inputs: dict[str, Any],
    *,
    force: bool,
    decisive: Sequence[str],
) -> Iterator[Path]:
    """The hidden folder of a stage, the same for all processes; the main one makes and finishes it (`RunDir.write`)."""
    with contextlib.ExitStack() as stack:
        if process.is_main_process:
            writing = run.write(stage, recipe, inputs, force=force, resume=True, decisive=decisive)
            partial = stack.enter_context(writing)
        else:
            partial = run.partial(stage)
        process.wait_for_everyone()
        yield partial
        process.wait_for_everyone()
    process.wait_for_everyone()
