"""One stage of training, from a loaded model to its trained weights on disk."""

from __future__ import annotations

import contextlib
import copy
import gc
import logging
import os
import re
import shutil
import warnings
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from safetensors.torch import load_file

from uniattn_cli.models.hub import Source
from uniattn_cli.models.loading import load_model
from uniattn_cli.options import Progress
from uniattn_cli.recipe.schema import Recipe, TrainStage
from uniattn_cli.run.files import read_json, write_json
from uniattn_cli.training.lora import merged_weights
from uniattn_cli.training.monitor import Best, Log, Monitor, last_checkpoint
from uniattn_cli.training.objective import CrossEntropy, Objective
from uniattn_cli.training.on_policy import OnPolicy
from uniattn_cli.training.order import accumulation, batches, stage_steps
from uniattn_cli.training.trained import prepare
from uniattn_cli.training.trainer import WEIGHTS, StageTrainer, load_trained, save_weights, tokens_per_step
from uniattn_cli.training.trl_config import compute_dtype, make_config, training_attention
from uniattn_cli.training.validation import validation_loss

if TYPE_CHECKING:
    import datasets
    import torch
    from accelerate import PartialState
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from uniattn_cli.data.sequences import Tokenised
    from uniattn_cli.models.losses import Rows
    from uniattn_cli.training.teaching import Teaching

DONE_FILE = "done.json"
# Validations of a stage where the recipe leaves their number open, and the fewest steps between two of them.
VALIDATIONS, FEWEST_STEPS = 10, 10


@dataclass(frozen=True)
class StageResult:
    """One finished stage.

    Attributes:
        name: its name in the recipe.
        trains: which parameters it changed.
        parameters: number of those that were trained; of `lora` the adapters' own.
        steps: optimiser steps.
        rows: rows seen, or packed sequences.
        tokens: tokens seen, padding not counted.
        seconds: time in optimiser steps, over all sessions.
        start_loss: mean loss over the steps of the first log line; of `cross_entropy`, in nats per learned token.
        end_loss: the same for the last log line.
        kept_step: the step whose weights the stage ends with; 0 if it ends as it began.
        validation: loss on validation rows before, and of the weights it ends with; None where there were no rows.
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
    kept_step: int
    validation: tuple[float, float] | None


@dataclass(frozen=True)
class StageData:
    """What a stage is trained on.

    Attributes:
        rows: tokenised.
        sequences: columns `input_ids`, `labels` and, where packed, `seq_lengths`.
        lengths: tokens of each sequence.
    """

    rows: Tokenised
    sequences: datasets.Dataset
    lengths: list[int]


@dataclass(frozen=True)
class Job:
    """What the stages have in common.

    Attributes:
        recipe: the resolved recipe.
        stages: what is really run: those of the recipe that the model has something for.
        source: the model that the first stage starts from.
        dtype: in which the trained model is saved.
        tokenizer: its tokenizer.
        data: of each stage; of several with the same data the same object, for they share one stream of rows.
        validation: rows on which states are compared; None where there are none.
        teaching: gives the teacher to the stages that have one.
        partial: folder that becomes the output.
        process: one of those that a launcher started; the main one writes.
    """

    recipe: Recipe
    stages: tuple[TrainStage, ...]
    source: Source
    dtype: torch.dtype
    tokenizer: PreTrainedTokenizerBase
    data: tuple[StageData, ...]
    validation: Rows | None
    teaching: Teaching
    partial: Path
    process: PartialState
    progress: Progress
    log: Log

    @property
    def work(self) -> Path:
        """Folder of everything that is not part of the output."""
        return self.partial / "stages"

    def folder(self, index: int) -> Path:
        """Folder of a stage."""
        return self.work / f"{index + 1}-{_plain(self.stages[index].label)}"

    def steps(self, index: int) -> int:
        """Optimiser steps of a stage."""
        return stage_steps(self.stages[index], len(self.data[index].lengths), self.recipe.train.batch_size)

    def steps_before(self, index: int) -> int:
        """Optimiser steps that earlier stages take from the rows of a stage."""
        return sum(self.steps(other) for other in range(index) if self.data[other] is self.data[index])


# What `loss` of a stage may be; each is made for a stage, by its number, of a model that is ready for it.
OBJECTIVES: dict[str, Callable[[Job, int, PreTrainedModel], Objective]] = {
    "cross_entropy": lambda job, index, model: CrossEntropy(),
    "distillation": lambda job, index, model: job.teaching.distillation(
        job.recipe.train.distillation_of(job.stages[index]), job.data[index].rows, model
    ),
    "local": lambda job, index, model: job.teaching.local(model),
}


def _plain(name: str) -> str:
    return re.sub(r"[^A-Za-z0-9_-]+", "_", name)


def worth_keeping(work: Path) -> bool:
    """Whether an interrupted run has finished a stage or written a checkpoint."""
    return any(work.glob(f"*/{DONE_FILE}")) or any(last_checkpoint(folder, clean=False) for folder in work.glob("*"))


def finished(job: Job, index: int) -> StageResult | None:
    """The result of a stage that this run has finished already, perhaps before it was interrupted."""
    path = job.folder(index) / DONE_FILE
    if not path.is_file():
        return None
    return StageResult(**read_json(path, f"remove {path.parent} and run the same command again"))


def load_after(job: Job, stages: int, *, training: bool = False, device: torch.device | None = None) -> PreTrainedModel:
    """The model that training starts from, with the weights that the first `stages` stages have trained.

    Args:
        training: in float32 and with the attention that trains fastest, instead of as it is saved.
        device: where it goes; by default where this process trains.
    """
    spec, device = job.recipe.model, device or job.process.device
    if training:
        spec = replace(spec, dtype="float32", attention=training_attention(job.recipe, device))
    else:
        spec = replace(spec, dtype=str(job.dtype).removeprefix("torch."))
    model = load_model(job.source, spec, device)
    for index in range(stages):
        if finished(job, index):
            load_trained(model, job.folder(index))
    return model


def run_stage(job: Job, index: int) -> StageResult:
    """Trains one stage, or what is left of it.

    Args:
        index: which of the job's stages.

    Raises:
        StageError: the loss is not a number, or has risen too far.
    """
    from uniattn_cli.models.loading import load_config

    stage = job.stages[index]
    model = load_after(job, index, training=True)
    low = compute_dtype(job.process.device)
    stored = load_config(job.source, converted=None).dtype
    prepare(model, stage, low if low is stored else None, job.recipe.seed + index)
    trained = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    steps = job.steps(index)
    order = batches(
        job.data[index].lengths,
        batch_size=job.recipe.train.batch_size,
        first=job.steps_before(index),
        steps=steps,
        seed=job.recipe.seed,
        grouped=job.recipe.train.group_by_length,
    )
    monitor = _train(job, index, model, order)
    # The trainer and the model refer to each other; what follows needs their memory.
    del model
    gc.collect()
    logged = [line["loss"] for line in job.log.lines() if line["stage"] == stage.label and "loss" in line]
    best = monitor.best
    kept = _kept(job, best, steps)
    result = StageResult(
        name=stage.label,
        trains=stage.trains,
        parameters=trained,
        steps=steps,
        rows=sum(map(len, order)),
        tokens=sum(monitor.tokens),
        seconds=monitor.seconds,
        start_loss=logged[0],
        end_loss=logged[-1],
        kept_step=kept,
        validation=(best.first, best.loss if kept == best.step else monitor.last) if best else None,
    )
    _finish(job, index, result)
    return result


def _kept(job: Job, best: Best | None, steps: int) -> int:
    return best.step if best is not None and job.recipe.train.keep == "best" else steps


def _train(job: Job, index: int, model: PreTrainedModel, order: list[list[int]]) -> Monitor:
    """Runs TRL's loop over the rows in this order and writes the trained weights into the stage's folder."""
    stage, spec, folder = job.stages[index], job.recipe.train, job.folder(index)
    checkpoint = last_checkpoint(folder, clean=job.process.is_main_process)
    done = int(checkpoint.name.rpartition("-")[2]) if checkpoint else 0
    job.process.wait_for_everyone()
    job.log.rewind(stage.label, done if checkpoint else -1)
    if checkpoint:
        job.progress.note(f"stage '{stage.label}' resumes after step {done} of {len(order)}, from {checkpoint}")
    elif worth_keeping(folder.parent):
        job.progress.note(f"stage '{stage.label}' starts at step 0 of {len(order)}")
    with (
        job.progress.track(f"training {stage.label}", len(order)) as advance,
        quiet_training(),
        _tensorboard_folder(job.partial / "tensorboard" / _plain(stage.label)),
    ):
        monitor = Monitor(
            stage.label,
            len(order),
            tokens_per_step(job.data[index].lengths, order),
            job.log,
            advance,
            validate=_validate(job),
            every=spec.eval_steps or max(FEWEST_STEPS, len(order) // VALIDATIONS),
            max_rise=spec.max_rise,
        )
        trainer = StageTrainer(
            model,
            make_config(
                spec,
                stage,
                folder=folder,
                steps=len(order),
                accumulation=accumulation(spec, job.process.num_processes),
                device=job.process.device,
                seed=job.recipe.seed,
                name=f"{job.partial.absolute().parent.name}-{stage.label}",
            ),
            OBJECTIVES[stage.loss](job, index, model),
            stage.changed_learning_rate,
            _on_policy(job, index),
            train_dataset=job.data[index].sequences.select([row for batch in order for row in batch]),
            # TRL gives it a padding token, which must not reach the saved tokenizer.
            processing_class=copy.deepcopy(job.tokenizer),
            callbacks=[monitor],
        )
        trainer.objective.prepare(trainer.first_step())
        if checkpoint:
            monitor.resume(checkpoint)
            if trainer.on_policy is not None:
                trainer.on_policy.resume(checkpoint)
            advance(done)
        trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
        state = trainer.trained_state()
        trainer.accelerator.free_memory()
    if job.process.is_main_process:
        _write_weights(job, index, state, monitor.best, len(order))
    return monitor


def _on_policy(job: Job, index: int) -> OnPolicy | None:
    """What writes responses in a stage, with weights as they are saved; None where the data has all of them."""
    stage, recipe = job.stages[index], job.recipe
    share = recipe.train.on_policy_of(stage)
    if not share:
        return None
    writer = load_after(job, index).requires_grad_(False)
    return OnPolicy(
        writer,
        job.tokenizer,
        recipe.synthesis,
        stage,
        job.process,
        share=share,
        length=recipe.train.max_length,
        steps=job.steps(index),
        seed=recipe.seed + index,
    )


def _validate(job: Job) -> Callable[[PreTrainedModel], float] | None:
    """Measures the loss on the job's validation rows; None where there are none."""
    rows = job.validation
    if rows is None:
        return None
    size = min(job.recipe.evaluation.batch_size, job.recipe.train.micro_batch_size)
    return lambda model: validation_loss(model, rows, batch_size=size)


def _write_weights(job: Job, index: int, state: dict[str, torch.Tensor], best: Best | None, steps: int) -> None:
    """Writes the weights that the stage ends with: the last ones, the best ones, or none if it ends as it began."""
    stage, folder, kept = job.stages[index], job.folder(index), _kept(job, best, steps)
    if kept == 0:
        state = {}
    elif best is not None and kept != steps:
        state = load_file(folder / best.folder / WEIGHTS)
    if stage.trains == "lora" and state:
        start = load_after(job, index, training=True, device=_cpu())
        state = merged_weights(dict(start.named_parameters()), state, stage.lora)
    save_weights({name: tensor.contiguous() for name, tensor in state.items()}, folder)


def _cpu() -> torch.device:
    import torch

    return torch.device("cpu")


@contextlib.contextmanager
def _tensorboard_folder(path: Path) -> Iterator[None]:
    """Where TensorBoard's files go: beside the log, not into a folder that is removed at the end."""
    before = os.environ.get("TENSORBOARD_LOGGING_DIR")
    os.environ.setdefault("TENSORBOARD_LOGGING_DIR", str(path))
    try:
        yield
    finally:
        if before is None:
            del os.environ["TENSORBOARD_LOGGING_DIR"]


def _finish(job: Job, index: int, result: StageResult) -> None:
    """Marks the stage as finished and removes its checkpoints."""
    job.process.wait_for_everyone()
    if job.process.is_main_process:
        folder = job.folder(index)
        write_json(folder / DONE_FILE, asdict(result))
        for pattern in ("checkpoint-*", "best-*"):
            for other in folder.glob(pattern):
                shutil.rmtree(other)
    job.process.wait_for_everyone()


@contextlib.contextmanager
def quiet_training() -> Iterator[None]:
    """Silences TRL and transformers beside the progress bar; restores what was set before."""
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
