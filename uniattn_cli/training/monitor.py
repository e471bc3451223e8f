"""What happens around each optimiser step: progress, log lines, validation, the best state, marks on checkpoints."""

from __future__ import annotations

import json
import math
import shutil
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from transformers import TrainerCallback

from uniattn_cli.recipe.files import write_whole
from uniattn_cli.run.files import read_json, read_lines, write_json
from uniattn_cli.training.trainer import diverged, save_weights

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from uniattn_cli.training.trainer import StageTrainer

# Written into a checkpoint after everything else; a checkpoint without it was interrupted while it was written.
MARKER = "uniattn_progress.json"
# Steps whose mean loss is watched; single ones are noisy.
WINDOW = 5


class Log:
    """`log.jsonl`: one line per logged step, and one per validation, over all stages.

    Args:
        path: the file, made if it is missing.
        writes: whether this process may write.
    """

    def __init__(self, path: Path, writes: bool):
        self.path = path
        self.writes = writes

    def lines(self) -> list[dict]:
        """All lines, oldest first; a line that an interruption cut off is left out."""
        return read_lines(self.path) if self.path.is_file() else []

    def add(self, line: dict) -> None:
        """Appends a line."""
        if self.writes:
            with self.path.open("a", encoding="utf-8") as stream:
                stream.write(json.dumps(line) + "\n")

    def rewind(self, stage: str, step: int) -> None:
        """Removes the lines of a stage after a step, because these steps are taken again."""
        kept = [line for line in self.lines() if line["stage"] != stage or line["step"] <= step]
        if self.writes:
            write_whole(self.path, "".join(json.dumps(line) + "\n" for line in kept))


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


@dataclass(frozen=True)
class Best:
    """The state of lowest loss on validation rows.

    Attributes:
        step: optimiser steps taken; 0 is the state in which the stage began.
        loss: in nats per token.
        first: the loss at step 0.
    """

    step: int
    loss: float
    first: float

    @property
    def folder(self) -> str:
        """Where its weights are, inside the stage's folder; there is none for step 0."""
        return f"best-{self.step}"


class Watch:
    """Decides from the losses of the steps whether training diverged.

    Args:
        max_rise: nats by which the mean of the last steps may exceed the lowest such mean before.
    """

    def __init__(self, max_rise: float):
        self.max_rise = max_rise
        self.recent: list[float] = []
        self.lowest = math.inf

    def trouble(self, loss: float) -> str:
        """What is wrong with a step's loss; empty if nothing is."""
        if not math.isfinite(loss):
            return f"is {loss}"
        self.recent = [*self.recent, loss][-WINDOW:]
        if len(self.recent) < WINDOW:
            return ""
        mean = sum(self.recent) / WINDOW
        self.lowest = min(self.lowest, mean)
        if mean > self.lowest + self.max_rise:
            return f"has risen to {mean:.2f} over the last {WINDOW} steps, from {self.lowest:.2f}"
        return ""


class Monitor(TrainerCallback):
    """Watches one stage; `StageTrainer` passes itself to each callback.

    Args:
        stage: its name, for the log.
        steps: optimiser steps of the stage.
        tokens: tokens of each step, padding not counted.
        log: where lines go.
        advance: the progress bar.
        validate: measures a model's loss on validation rows; None where there are none.
        every: steps between two validations.
        max_rise: see `Watch`; also how far the loss on validation rows may exceed that of the start.

    Attributes:
        seconds: time spent in optimiser steps, over all sessions.
        best: the state of lowest loss on validation rows; None without any.
        last: the loss on validation rows when it was last measured.
    """

    def __init__(
        self,
        stage: str,
        steps: int,
        tokens: list[int],
        log: Log,
        advance: Callable[..., None],
        *,
        validate: Callable[[PreTrainedModel], float] | None = None,
        every: int = 1,
        max_rise: float = math.inf,
    ):
        self.stage = stage
        self.steps = steps
        self.tokens = tokens
        self.log = log
        self.advance = advance
        self.validate = validate
        self.every = every
        self.watch = Watch(max_rise)
        self.seconds = 0.0
        self.best: Best | None = None
        self.last = math.nan
        self._resumed = False
        self._saved_best: str | None = None  # that the last checkpoint relies on
        self._losses: list[dict[str, float]] = []  # of the steps since the last log line
        self._logged = (0, 0.0)  # step and seconds at the last log line
        self._clock = 0.0

    def resume(self, checkpoint: Path) -> None:
        """Goes on where a checkpoint was written."""
        kept = read_json(checkpoint / MARKER, f"remove {checkpoint} and run the same command again")
        self.seconds, self._losses, self._logged = kept["seconds"], kept["losses"], tuple(kept["logged"])
        self.tokens[: len(kept["tokens"])] = kept["tokens"]
        self.watch.recent = kept["recent"]
        self.watch.lowest = math.inf if kept["lowest"] is None else kept["lowest"]
        self.best = Best(**kept["best"]) if kept["best"] else None
        self._saved_best = self.best.folder if self.best else None
        self._resumed = True

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if not self._resumed:
            self._validate(kwargs["trainer"], 0)
        self._clock = time.perf_counter()

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        trainer: StageTrainer = kwargs["trainer"]
        losses = trainer.take_step_losses()
        trouble = self.watch.trouble(losses["loss"])
        if trouble:
            raise diverged(f"the loss of stage '{self.stage}' {trouble}", state.global_step + 1, trainer.folder)
        self._losses.append(losses)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        now = time.perf_counter()
        elapsed, self._clock = now - self._clock, now
        self.seconds += elapsed
        step = state.global_step
        # How long the student's own responses are is known only now.
        self.tokens[step - 1] = kwargs["trainer"].step_tokens or self.tokens[step - 1]
        loss = self._losses[-1]["loss"]
        self.advance(1, text=f"loss {loss:.3f}, {self.tokens[step - 1] / elapsed:,.0f} tok/s")
        if step == self.steps:
            control.should_log = True
            control.should_save = False  # the stage's result is written instead
        if step % self.every == 0 or step == self.steps:
            self._validate(kwargs["trainer"], step)

    def _validate(self, trainer: StageTrainer, step: int) -> None:
        if self.validate is None:
            return
        self.last = loss = self.validate(trainer.model)
        first = loss if self.best is None else self.best.first
        self.log.add({"stage": self.stage, "step": step, "validation_loss": loss, "seconds": self.seconds})
        trainer.report(validation_loss=loss)
        folder = trainer.folder
        if not math.isfinite(loss):
            raise diverged(f"the loss of stage '{self.stage}' on validation rows is {loss}", step, folder)
        if loss > first + self.watch.max_rise:
            change = f"has risen to {loss:.2f}, from {first:.2f}"
            raise diverged(f"the loss of stage '{self.stage}' on validation rows {change}", step, folder)
        if self.best is None or loss < self.best.loss:
            self.best = Best(step, loss, first)
            if step:
                self._keep_weights(trainer, self.best.folder)
        # Measuring is not training; it must not count as time per token.
        self._clock = time.perf_counter()

    def _keep_weights(self, trainer: StageTrainer, name: str) -> None:
        """Writes the present weights, and removes those that neither they nor the last checkpoint need."""
        state = trainer.trained_state()
        if self.log.writes:
            save_weights(state, trainer.folder / name)
            self._remove_others(trainer.folder, {name, self._saved_best})

    def _remove_others(self, folder: Path, needed: set[str | None]) -> None:
        for other in folder.glob("best-*"):
            if other.name not in needed:
                shutil.rmtree(other)

    def on_log(self, args: Any, state: Any, control: Any, logs: dict | None = None, **kwargs: Any) -> None:
        if not self._losses or not logs or "learning_rate" not in logs:
            return
        step, (before, seconds) = state.global_step, self._logged
        tokens = sum(self.tokens[before:step])
        means = {name: sum(each[name] for each in self._losses) / len(self._losses) for name in self._losses[0]}
        self.log.add(
            {
                "stage": self.stage,
                "step": step,
                **means,
                "learning_rate": logs["learning_rate"],
                "grad_norm": logs.get("grad_norm"),
                "tokens": sum(self.tokens[:step]),
                "tokens_per_second": tokens / (self.seconds - seconds),
                "seconds": self.seconds,
            }
        )
        self._losses, self._logged = [], (step, self.seconds)

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        trainer: StageTrainer = kwargs["trainer"]
        trainer.accelerator.wait_for_everyone()
        if state.is_world_process_zero:
            folder = trainer.folder
            checkpoint = folder / f"checkpoint-{state.global_step}"
            kept = {
                "seconds": self.seconds,
                "tokens": self.tokens[: state.global_step],
                "losses": self._losses,
                "logged": self._logged,
                "recent": self.watch.recent,
                "lowest": self.watch.lowest if math.isfinite(self.watch.lowest) else None,
                "best": asdict(self.best) if self.best else None,
            }
            write_json(checkpoint / MARKER, kept)
            for other in folder.glob("checkpoint-*"):
                if other != checkpoint:
                    shutil.rmtree(other)
            self._saved_best = self.best.folder if self.best else None
            self._remove_others(folder, {self._saved_best})
        # Writing is not training; it must not count as time per token.
        self._clock = time.perf_counter()
