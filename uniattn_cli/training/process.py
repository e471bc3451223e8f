"""One of the processes that a launcher may have started; alone without one."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from uniattn_cli.options import Progress, RunOptions, Silent
from uniattn_cli.recipe.schema import Recipe
from uniattn_cli.run.directory import RunDir

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class Process:
    """Who this process is.

    Attributes:
        rank: 0 is the only one that writes and reports.
        world: number of processes.
        device: where this one trains.
    """

    rank: int
    world: int
    device: torch.device

    @classmethod
    def current(cls, options: RunOptions) -> Process:
        """Reads what `accelerate launch` and `torchrun` put into the environment, and joins the others."""
        import torch

        device = options.torch_device()
        rank, world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
        if device.type == "cuda" and device.index is None:
            device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
        if world > 1:
            from accelerate import PartialState

            PartialState(cpu=device.type == "cpu")
        return cls(rank, world, device)

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    def wait(self) -> None:
        """Returns once all processes have come here."""
        if self.world > 1:
            import torch

            torch.distributed.barrier()

    def progress(self, options: RunOptions) -> Progress:
        """Where this process reports: only the first one does."""
        return options.progress if self.is_main else Silent()

    @contextlib.contextmanager
    def output(
        self, run: RunDir, stage: str, recipe: Recipe, inputs: dict[str, Any], *, force: bool, decisive: Sequence[str]
    ) -> Iterator[Path]:
        """The hidden folder of a stage, the same for all processes; see `RunDir.write`."""
        if self.is_main:
            with run.write(stage, recipe, inputs, force=force, resume=True, decisive=decisive) as partial:
                self.wait()
                yield partial
                self.wait()
        else:
            self.wait()
            yield run.partial(stage)
            self.wait()
        self.wait()
