"""What is measured on one model before anything is compared; kept as one file per model, so that it can be checked."""

from __future__ import annotations

import dataclasses
import json
import math
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from uniattn_cli.errors import ModelError
from uniattn_cli.evaluation.cost import Size, measure_size
from uniattn_cli.evaluation.subjects import Subject
from uniattn_cli.evaluation.tasks import MetricScores, TaskScores, TaskSet, run_tasks
from uniattn_cli.heldout import RowLosses, Rows, row_losses
from uniattn_cli.options import Progress
from uniattn_cli.recipe import EvaluationSpec

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


@dataclass(frozen=True)
class Material:
    """What every model is tested on.

    Attributes:
        tokenizer: of the base.
        text: windows of held-out text.
        responses: held-out rows of the training data.
        tasks: multiple choice and others.
    """

    tokenizer: PreTrainedTokenizerBase
    text: Rows
    responses: Rows
    tasks: TaskSet

    def digest(self) -> str:
        """Identifies the material, local task files included."""
        return "-".join((self.text.digest(), self.responses.digest(), self.tasks.digest))


@dataclass(frozen=True)
class Measured:
    """Scores of one model, row by row and item by item, and its size."""

    size: Size
    text: RowLosses
    responses: RowLosses
    tasks: TaskScores

    def write(self, path: Path) -> None:
        """Writes JSON that `read` takes back without a loss of digits."""
        partial = path.with_suffix(".partial")
        partial.write_text(json.dumps(dataclasses.asdict(self), allow_nan=False) + "\n", encoding="utf-8")
        partial.replace(path)

    @classmethod
    def read(cls, path: Path) -> Measured:
        """Reads what `write` wrote."""
        raw = json.loads(path.read_text(encoding="utf-8"))
        tasks = {
            task: {metric: MetricScores(**scores) for metric, scores in metrics.items()}
            for task, metrics in raw["tasks"].items()
        }
        return cls(Size(**raw["size"]), RowLosses(**raw["text"]), RowLosses(**raw["responses"]), tasks)


def items_file(folder: Path, index: int, name: str) -> Path:
    """Where the scores of the n-th model are kept."""
    plain = re.sub(r"[^A-Za-z0-9_-]+", "-", name).strip("-") or "model"
    return folder / "items" / f"{index}-{plain[-60:]}.json"


def measure(
    subject: Subject, load: Callable[[], PreTrainedModel], material: Material, spec: EvaluationSpec, progress: Progress
) -> Measured:
    """Everything about one model but its speed.

    Args:
        subject: names the model in messages.
        load: gives the model.
        material: what it is tested on.
        spec: batch size and limit.
        progress: gets one bar for each kind of test.

    Raises:
        ModelError: a loss is not a number, or the cache is not what the layout predicts.
    """
    model = load()
    # First: it is quick, and stops everything if a saving would be wrong.
    size = measure_size(subject.name, model, subject.source.path)
    losses = {}
    for what, rows in (("perplexity", material.text), ("loss on responses", material.responses)):
        with progress.track(f"{subject.name}: {what}", len(rows)) as advance:
            losses[what] = row_losses(model, rows, batch_size=spec.batch_size, advance=advance)
        if not all(map(math.isfinite, losses[what].sums)):
            raise ModelError(
                f"{subject.name}: the loss is not a number; the checkpoint is damaged, or {size.dtype} overflows "
                "(try --set model.dtype=float32)"
            )
    with progress.track(f"{subject.name}: tasks", None) as advance:
        tasks = run_tasks(
            material.tasks,
            model,
            material.tokenizer,
            batch_size=spec.batch_size,
            limit=spec.limit,
            advance=advance,
        )
    return Measured(size, losses["perplexity"], losses["loss on responses"], tasks)
