"""What happens around each optimiser step: progress, log lines, the check of the loss, marks on whole checkpoints."""

from __future__ import annotations

import json
import math
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from transformers import TrainerCallback

from uniattn_cli.training.sft import diverged

if TYPE_CHECKING:
    from uniattn_cli.training.sft import StageTrainer

# Written into a checkpoint after everything else; a checkpoint without it was interrupted while it was written.
MARKER = "uniattn_progress.json"


class Log:
    """`log.jsonl`: one line per logged step, over all stages.

    Args:
        path: the file, made if it is missing.
        writes: whether this process may write.
    """

    def __init__(self, path: Path, writes: bool):
        self.path = path
        self.writes = writes

    def lines(self) -> list[dict]:
        """All lines, oldest first; a line that an interruption cut off is left out."""
        if not self.path.is_file():
            return []
        found = []
        for line in self.path.read_text(encoding="utf-8").splitlines():
            try:
                found.append(json.loads(line))
            except ValueError:
                continue
        return found

    def add(self, line: dict) -> None:
        """Appends a line."""
        if self.writes:
            with self.path.open("a", encoding="utf-8") as stream:
                stream.write(json.dumps(line) + "\n")

    def rewind(self, stage: str, step: int) -> None:
        """Removes the lines of a stage after a step, because these steps are taken again."""
        kept = [line for line in self.lines() if line["stage"] != stage or line["step"] <= step]
        if self.writes:
            self.path.write_text("".join(json.dumps(line) + "\n" for line in kept), encoding="utf-8")


def last_checkpoint(folder: Path, *, clean: bool) -> Path | None:
    """The newest complete checkpoint of a stage's folder.

    Args:
        clean: remove everything that an interruption left half written.
    """
    complete = {}
    for path in folder.glob("checkpoint-*"):
        if (path / MARKER).is_file():
            complete[int(path.name.rpartition("-")[2])] = path
        elif clean:
            shutil.rmtree(path)
    return complete[max(complete)] if complete else None


class Monitor(TrainerCallback):
    """Watches one stage.

    Args:
        stage: its name, for the log.
        steps: optimiser steps of the stage.
        tokens: tokens of each step, padding not counted.
        log: where lines go.
        advance: the progress bar.

    Attributes:
        seconds: time spent in optimiser steps, over all sessions.
    """

    def __init__(self, stage: str, steps: int, tokens: list[int], log: Log, advance: Callable[..., None]):
        self.stage = stage
        self.steps = steps
        self.tokens = tokens
        self.log = log
        self.advance = advance
        self.trainer: StageTrainer | None = None
        self.seconds = 0.0
        self._losses: list[float] = []  # of the steps since the last log line
        self._logged = (0, 0.0)  # step and seconds at the last log line
        self._clock = 0.0

    def resume(self, checkpoint: Path) -> None:
        """Takes up where a checkpoint was written."""
        kept = json.loads((checkpoint / MARKER).read_text(encoding="utf-8"))
        self.seconds, self._losses, self._logged = kept["seconds"], kept["losses"], tuple(kept["logged"])

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._clock = time.perf_counter()

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        loss = self.trainer.take_step_loss()
        if not math.isfinite(loss):
            raise diverged(f"the loss of stage '{self.stage}' is {loss}", state.global_step + 1, args.output_dir)
        self._losses.append(loss)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        now = time.perf_counter()
        elapsed, self._clock = now - self._clock, now
        self.seconds += elapsed
        step = state.global_step
        self.advance(1, text=f"loss {self._losses[-1]:.3f}, {self.tokens[step - 1] / elapsed:,.0f} tok/s")
        if step == self.steps:
            control.should_log = True
            control.should_save = False  # the stage's result is written instead

    def on_log(self, args: Any, state: Any, control: Any, logs: dict | None = None, **kwargs: Any) -> None:
        if not self._losses or not logs or "learning_rate" not in logs:
            return
        step, (before, seconds) = state.global_step, self._logged
        tokens = sum(self.tokens[before:step])
        self.log.add(
            {
                "stage": self.stage,
                "step": step,
                "loss": sum(self._losses) / len(self._losses),
                "learning_rate": logs["learning_rate"],
                "grad_norm": logs.get("grad_norm"),
                "tokens": sum(self.tokens[:step]),
                "tokens_per_second": tokens / (self.seconds - seconds),
                "seconds": self.seconds,
            }
        )
        self._losses, self._logged = [], (step, self.seconds)

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.trainer.accelerator.wait_for_everyone()
        if state.is_world_process_zero:
            folder = Path(args.output_dir)
            checkpoint = folder / f"checkpoint-{state.global_step}"
            kept = {"seconds": self.seconds, "losses": self._losses, "logged": self._logged}
            partial = checkpoint / f".{MARKER}"
            partial.write_text(json.dumps(kept), encoding="utf-8")
            partial.replace(checkpoint / MARKER)
            for other in folder.glob("checkpoint-*"):
                if other != checkpoint:
                    shutil.rmtree(other)
        # Writing is not training; it must not count as time per token.
        self._clock = time.perf_counter()
