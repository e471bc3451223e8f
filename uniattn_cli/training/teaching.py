"""Where the teacher of a run comes from, and when it is in memory."""

from __future__ import annotations

import gc
import shutil
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from filelock import SoftFileLock, Timeout

from uniattn_cli.data.sequences import row_key
from uniattn_cli.models.hub import Source
from uniattn_cli.models.loading import load_model
from uniattn_cli.options import Progress
from uniattn_cli.recipe.schema import DistillationSpec, Recipe
from uniattn_cli.run.files import write_json
from uniattn_cli.training.distill import Distillation
from uniattn_cli.training.local import LocalDistillation
from uniattn_cli.training.stored_teacher import FOLDER, META, StoredTeacher, pad_rows, positions, store_key

if TYPE_CHECKING:
    import datasets
    from accelerate import PartialState
    from transformers import PreTrainedModel

    from uniattn_cli.data.sequences import Tokenised
    from uniattn_cli.modeling.layout_uniattn import Layout

# Seconds until a process that waits for another one says so.
PATIENCE = 60.0


@dataclass
class Teaching:
    """Makes what stages with a teacher minimise; one teacher is in memory at a time, once a stage asks for it.

    Attributes:
        recipe: says how teachers are loaded and rows are stored.
        sources: files of the teachers, by `teacher` of `DistillationSpec`.
        root: the run directory, where `teacher/` goes.
    """

    recipe: Recipe
    sources: dict[str, Source]
    root: Path
    process: PartialState
    progress: Progress
    _loaded: tuple[str, PreTrainedModel] | None = field(default=None, init=False)

    def distillation(self, spec: DistillationSpec, rows: Tokenised, student: PreTrainedModel) -> Distillation:
        """For a stage that trains this model on these rows."""
        device = self.process.device
        if spec.precompute:
            return Distillation(spec, None, StoredTeacher(self._stored(spec, rows, device)))
        return Distillation(spec, self._teacher(spec.teacher, student), layers=_compared_layers(student))

    def local(self, student: PreTrainedModel) -> LocalDistillation:
        """For a stage that trains the changed layers of this model, which else is its base."""
        return LocalDistillation(self._teacher("base", student), _compared_layers(student), student.config)

    def _teacher(self, name: str, student: PreTrainedModel) -> PreTrainedModel:
        teacher = self._load(name, self.process.device)
        # Sharded weights are replaced when training begins.
        if not self.recipe.train.fsdp:
            share_weights(teacher, student)
        return teacher

    def _load(self, name: str, device: torch.device) -> PreTrainedModel:
        if self._loaded is None or self._loaded[0] != name:
            self._loaded = None
            model = load_model(self.sources[name], self.recipe.model, device).requires_grad_(False)
            self._loaded = name, model
        return self._loaded[1]

    def _stored(self, spec: DistillationSpec, rows: Tokenised, device: torch.device) -> Path:
        """The folder of the teacher's distributions; one process writes them first if they are not there.

        The others wait for its lock on the disk, however long that takes: a barrier would end them after some minutes.
        """
        settings = self._settings(spec, rows)
        folder = self.root / FOLDER / store_key(settings)
        folder.parent.mkdir(exist_ok=True)
        with self._turn(folder.with_name(f".{folder.name}.lock")):
            if folder.exists():
                self.progress.note(f"teacher's distributions read from {folder}")
                return folder
            distillation = Distillation(spec, self._load(spec.teacher, device))
            with self.progress.track("teacher", len(rows.dataset)) as advance:
                size = self.recipe.train.micro_batch_size
                write_teacher(
                    folder,
                    distillation,
                    rows.dataset,
                    settings=settings,
                    batch_size=size,
                    device=device,
                    advance=advance,
                )
            del distillation
            self._loaded = None
            gc.collect()
            self.progress.note(f"teacher's distributions written to {folder} ({_gigabytes(folder):.2f} GB)")
        return folder

    def _turn(self, path: Path) -> AbstractContextManager[object]:
        """Holds a lock; says every minute that it is still waited for: one of another machine may be left over."""
        while True:
            try:
                return SoftFileLock(path).acquire(timeout=PATIENCE)
            except Timeout:
                self.progress.note(f"waiting for {path}; remove it if no process writes the teacher's distributions")

    def _settings(self, spec: DistillationSpec, rows: Tokenised) -> dict[str, Any]:
        """Everything that the stored distributions depend on."""
        model = self.recipe.model
        return {
            "data": rows.digest,
            "teacher": self.sources[spec.teacher].fingerprint,
            "dtype": model.dtype,
            "attention": model.attention,
            "top_k": spec.top_k,
            "temperature": spec.temperature,
            "tokens": spec.tokens,
        }


def _compared_layers(student: PreTrainedModel) -> list[int]:
    """Changed layers but those without any attention, which give zeros that nothing can train."""
    layout: Layout = student.config.layout
    return [i for i in layout.changed if layout[i].traits.attends or layout[i].compensation != "none"]


def share_weights(teacher: PreTrainedModel, student: PreTrainedModel) -> None:
    """Lets a teacher read what the student has too and does not train, so that it is in memory once.

    Args:
        teacher: on the student's device; weights of its that are equal to frozen ones of the student are let go.
        student: prepared for its stage.
    """
    # Adapters put the weights that they are for one level down.
    frozen = {
        name.replace(".base_layer.", "."): parameter
        for name, parameter in student.named_parameters()
        if not parameter.requires_grad
    }
    for name, parameter in teacher.named_parameters():
        other = frozen.get(name)
        if other is not None and other.dtype is parameter.dtype and torch.equal(other, parameter):
            parameter.data = other.data


def _gigabytes(folder: Path) -> float:
    return sum(path.stat().st_size for path in folder.iterdir()) / 1e9


def write_teacher(
    folder: Path,
    distillation: Distillation,
    rows: datasets.Dataset,
    *,
    settings: dict[str, Any],
    batch_size: int,
    device: torch.device,
    advance: Callable[[int], None] = lambda steps: None,
) -> None:
    """Computes and writes the distributions at all compared positions, as a whole or not at all.

    Args:
        folder: made; what an interruption left of an earlier try is replaced.
        distillation: has the teacher.
        rows: columns `input_ids` and `labels`.
        settings: those of `store_key`.
        batch_size: rows per forward pass.
        advance: called with the number of finished rows.
    """
    counts = [positions(labels, distillation.spec.tokens) for labels in rows["labels"]]
    starts = np.concatenate([[0], np.cumsum(counts)]).astype(np.int64)
    keys = [row_key(tokens, labels) for tokens, labels in zip(rows["input_ids"], rows["labels"], strict=True)]
    partial = folder.with_name(f".{folder.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    width = min(distillation.spec.top_k, distillation.loaded().config.vocab_size)
    total = int(starts[-1])
    make = lambda name, dtype, shape: np.lib.format.open_memmap(partial / f"{name}.npy", "w+", dtype, shape)  # noqa: E731
    ids, logprobs = make("ids", np.int32, (total, width)), make("logprobs", np.float32, (total, width))
    rest = make("rest", np.float32, (total,))
    # Rows of like length share a forward pass.
    order = sorted(range(len(rows)), key=lambda index: -len(rows[index]["input_ids"]))
    for first in range(0, len(order), batch_size):
        chosen = order[first : first + batch_size]
        batch = pad_rows([rows[index] for index in chosen], device)
        distributions = distillation.top_k_of(batch)
        places = np.concatenate([np.arange(starts[index], starts[index + 1]) for index in chosen])
        ids[places] = distributions.ids.cpu().numpy()
        logprobs[places], rest[places] = distributions.logprobs.cpu().numpy(), distributions.rest.cpu().numpy()
        advance(len(chosen))
    for array in (ids, logprobs, rest):
        array.flush()
    np.save(partial / "rows.npy", np.stack([np.asarray(keys, dtype=np.int64), starts[:-1]], axis=1))
    write_json(partial / META, settings)
    partial.rename(folder)
