"""Where the teacher of a run comes from, and when it is in memory."""

from __future__ import annotations

import gc
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from uniattn_cli.models.loading import Source, load_model
from uniattn_cli.options import Progress
from uniattn_cli.recipe.schema import Recipe
from uniattn_cli.training.distill import Distiller
from uniattn_cli.training.process import Process
from uniattn_cli.training.stored_teacher import FOLDER, StoredTeacher, store_key, write_teacher

if TYPE_CHECKING:
    import datasets
    import torch
    from transformers import PreTrainedModel

    from uniattn_cli.modeling.layout_uniattn import Layout


@dataclass
class Teaching:
    """Gives each stage that distils its `Distiller`; the teacher is loaded when the first one asks.

    Attributes:
        recipe: says who teaches and how.
        source: the teacher's files; None where nothing is distilled.
        rows: columns `input_ids` and `labels`, not packed.
        data: identifies them.
        root: the run directory, where `teacher/` goes.
    """

    recipe: Recipe
    source: Source | None
    rows: datasets.Dataset
    data: str
    root: Path
    process: Process
    progress: Progress
    _teacher: PreTrainedModel | None = field(default=None, init=False)

    def distiller(self, layout: Layout, device: torch.device) -> Distiller:
        """For a stage of a model with this layout."""
        spec = self.recipe.train.distillation
        if spec.precompute:
            return Distiller(spec, None, StoredTeacher(self._stored(device)))
        # A layer without attention gives zeros, which nothing can train.
        layers = [index for index, plan in enumerate(layout) if plan.kind not in ("own", "none")]
        return Distiller(spec, self._load(device), layers=layers)

    def _load(self, device: torch.device) -> PreTrainedModel:
        if self._teacher is None:
            self._teacher = load_model(self.source, self.recipe.model, device).requires_grad_(False)
        return self._teacher

    def _stored(self, device: torch.device) -> Path:
        """The folder of the teacher's distributions; written first if it is not there."""
        settings = self._settings()
        folder = self.root / FOLDER / store_key(settings)
        if self.process.is_main and not folder.exists():
            distiller = Distiller(self.recipe.train.distillation, self._load(device))
            with self.progress.track("teacher", len(self.rows)) as advance:
                size = self.recipe.train.micro_batch_size
                write_teacher(
                    folder, distiller, self.rows, settings=settings, batch_size=size, device=device, advance=advance
                )
            del distiller
            self._teacher = None
            gc.collect()
            self.progress.note(f"teacher's distributions: {folder} ({_gigabytes(folder):.2f} GB)")
        elif self.process.is_main:
            self.progress.note(f"teacher's distributions are read from {folder}")
        self.process.wait()
        return folder

    def _settings(self) -> dict[str, Any]:
        """Everything that the stored distributions depend on."""
        spec, model = self.recipe.train.distillation, self.recipe.model
        return {
            "data": self.data,
            "teacher": self.source.fingerprint,
            "dtype": model.dtype,
            "attention": model.attention,
            "top_k": spec.top_k,
            "temperature": spec.temperature,
            "tokens": spec.tokens,
        }


def _gigabytes(folder: Path) -> float:
    return sum(path.stat().st_size for path in folder.iterdir()) / 1e9
