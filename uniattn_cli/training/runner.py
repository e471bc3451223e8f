"""One stage of training, from a loaded model to its trained weights on disk."""

from __future__ import annotations

import contextlib
import copy
import gc
import json
import logging
import re
import shutil
import warnings
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from uniattn_cli.checkpoint import Source, load_model
from uniattn_cli.options import Progress
from uniattn_cli.recipe import Recipe
from uniattn_cli.training.monitor import Log, Monitor, last_checkpoint
from uniattn_cli.training.order import accumulation, batches, stage_steps
from uniattn_cli.training.process import Process
from uniattn_cli.training.sft import (
    StageTrainer,
    compute_dtype,
    load_trained,
    make_config,
    tokens_per_step,
    training_attention,
)
from uniattn_cli.training.stages import freeze_all_but, trained_names

if TYPE_CHECKING:
    import datasets
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

DONE_FILE = "done.json"


@dataclass(frozen=True)
class StageResult:
    """One finished stage.

    Attributes:
        name: its name in the recipe.
        trains: which parameters it changed.
        parameters: their number.
        steps: optimiser steps.
        rows: rows seen, or packed sequences.
        tokens: tokens seen, padding not counted.
        seconds: time in optimiser steps, over all sessions.
        start_loss: mean loss over the steps of the first log line, in nats per learned token.
        end_loss: the same for the last log line.
    """

    name: str
    trains: str
    parameters: int
    steps: int
    rows: int
    tokens: int
    seconds: float
    start_loss: float
    end_loss: float


@dataclass(frozen=True)
class Job:
    """What the stages have in common.

    Attributes:
        recipe: the resolved recipe.
        converted: the model that the first stage starts from.
        tokenizer: its tokenizer.
        sequences: columns `input_ids`, `labels` and, where packed, `seq_lengths`.
        lengths: tokens of each sequence.
        partial: folder that becomes the output.
    """

    recipe: Recipe
    converted: Source
    tokenizer: PreTrainedTokenizerBase
    sequences: datasets.Dataset
    lengths: list[int]
    partial: Path
    process: Process
    progress: Progress
    log: Log

    @property
    def work(self) -> Path:
        """Folder of everything that is not part of the output."""
        return self.partial / "stages"

    def folder(self, index: int) -> Path:
        """Folder of a stage."""
        stage = self.recipe.train.stages[index]
        return self.work / f"{index + 1}-{re.sub(r'[^A-Za-z0-9_-]+', '_', stage.name or stage.trains)}"


def finished(job: Job, index: int) -> StageResult | None:
    """The result of a stage that this run has finished already, perhaps before it was interrupted."""
    path = job.folder(index) / DONE_FILE
    return StageResult(**json.loads(path.read_text(encoding="utf-8"))) if path.is_file() else None


def load_after(job: Job, stages: int, *, training: bool = False) -> PreTrainedModel:
    """The converted model with the weights that the first `stages` stages of the recipe have trained.

    Args:
        training: in float32 and with the attention that trains fastest, instead of as it is saved.
    """
    spec, device = replace(job.recipe.model, dtype="auto"), job.process.device
    if training:
        spec = replace(spec, dtype="float32", attention=training_attention(job.recipe, device))
    model = load_model(job.converted, spec, device)
    for index in range(stages):
        if finished(job, index):
            load_trained(model, job.folder(index))
    return model


def run_stage(job: Job, index: int, first: int) -> StageResult | None:
    """Trains one stage, or what is left of it.

    Args:
        index: which of the recipe's stages.
        first: optimiser steps of the stages before.

    Returns:
        None if the layout has nothing that the stage could train.

    Raises:
        StageError: the loss is not a number.
    """
    stage = job.recipe.train.stages[index]
    name = stage.name or stage.trains
    source_dtype = _source_dtype(job)
    model = load_after(job, index, training=True)
    names = trained_names(model, stage.trains)
    if not names:
        return None
    low = compute_dtype(job.process.device)
    freeze_all_but(model, names, low if low is source_dtype else None)
    steps = stage_steps(stage, len(job.lengths), job.recipe.train.batch_size)
    order = batches(job.lengths, batch_size=job.recipe.train.batch_size, first=first, steps=steps, seed=job.recipe.seed)
    monitor = _train(job, index, model, order)
    logged = [line["loss"] for line in job.log.lines() if line["stage"] == name]
    result = StageResult(
        name=name,
        trains=stage.trains,
        parameters=sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad),
        steps=steps,
        rows=sum(map(len, order)),
        tokens=sum(monitor.tokens),
        seconds=monitor.seconds,
        start_loss=logged[0],
        end_loss=logged[-1],
    )
    _finish(job, index, result)
    # The trainer and the model refer to each other; the next stage needs their memory.
    del model
    gc.collect()
    return result


def _source_dtype(job: Job) -> Any:
    from uniattn_cli.checkpoint import load_config

    return load_config(job.converted, converted=True).dtype


def _train(job: Job, index: int, model: PreTrainedModel, order: list[list[int]]) -> Monitor:
    """Runs TRL's loop over the rows in this order and writes the trained weights into the stage's folder."""
    stage, spec, folder = job.recipe.train.stages[index], job.recipe.train, job.folder(index)
    name = stage.name or stage.trains
    tokens = tokens_per_step(job.lengths, order)
    checkpoint = last_checkpoint(folder, clean=job.process.is_main)
    done = int(checkpoint.name.rpartition("-")[2]) if checkpoint else 0
    job.process.wait()
    job.log.rewind(name, done)
    if checkpoint:
        job.progress.note(f"stage '{name}' goes on after step {done} of {len(order)}, from {checkpoint}")
    with job.progress.track(f"training {name}", len(order)) as advance, quiet_training():
        monitor = Monitor(name, len(order), tokens, job.log, advance)
        trainer = StageTrainer(
            model,
            make_config(
                spec,
                folder=folder,
                learning_rate=stage.learning_rate,
                steps=len(order),
                accumulation=accumulation(spec, job.process.world),
                device=job.process.device,
                seed=job.recipe.seed,
            ),
            train_dataset=job.sequences.select([row for batch in order for row in batch]),
            # TRL gives it a padding token, which must not reach the saved tokenizer.
            processing_class=copy.deepcopy(job.tokenizer),
        )
        watch(trainer, monitor)
        if checkpoint:
            monitor.resume(checkpoint)
            advance(done)
        trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
        trainer.save_model(str(folder))
        trainer.accelerator.free_memory()
        monitor.trainer = None
    return monitor


def watch(trainer: StageTrainer, monitor: Monitor) -> None:
    """Lets a monitor see the steps of a trainer, and nothing else print them."""
    from transformers import PrinterCallback

    trainer.remove_callback(PrinterCallback)
    trainer.add_callback(monitor)
    monitor.trainer = trainer


def _finish(job: Job, index: int, result: StageResult) -> None:
    """Marks the stage as finished and removes its checkpoints."""
    job.process.wait()
    if job.process.is_main:
        folder = job.folder(index)
        partial = folder / f".{DONE_FILE}"
        partial.write_text(json.dumps(asdict(result), indent=1) + "\n", encoding="utf-8")
        partial.replace(folder / DONE_FILE)
        for checkpoint in folder.glob("checkpoint-*"):
            shutil.rmtree(checkpoint)
    job.process.wait()


@contextlib.contextmanager
def quiet_training() -> Iterator[None]:
    """Keeps TRL and transformers from talking beside the progress bar; restores what was set before."""
    from transformers.utils import logging as transformers_logging

    verbosity = transformers_logging.get_verbosity()
    loggers = [logging.getLogger(name) for name in ("trl", "accelerate")]
    levels = [logger.level for logger in loggers]
    try:
        for logger in loggers:
            logger.setLevel(logging.ERROR)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        transformers_logging.set_verbosity(verbosity)
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
