"""What is measured on one model before anything is compared; kept as one file per model, so that it can be checked."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from uniattn_cli.data.stored import tokenizer_key
from uniattn_cli.errors import ModelError
from uniattn_cli.evaluation.agreement import Agreement, Reference, base_losses, compare_with_base
from uniattn_cli.evaluation.batches import Batches
from uniattn_cli.evaluation.cache import ScoreStore, device_key, environment_key, model_key
from uniattn_cli.evaluation.cost import Size, measure_size
from uniattn_cli.evaluation.retrieval import RetrievalItem, answer_items
from uniattn_cli.evaluation.tasks import MetricScores, TaskScores, TaskSet, run_task, with_groups
from uniattn_cli.models.losses import RowLosses, Rows, row_losses
from uniattn_cli.models.of_run import Subject
from uniattn_cli.options import Progress
from uniattn_cli.run.files import read_json, write_json

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
        lengths: windows of held-out text by their length, shortest first.
        retrieval: questions of the retrieval probe by length.
    """

    tokenizer: PreTrainedTokenizerBase
    text: Rows
    responses: Rows
    tasks: TaskSet
    lengths: dict[int, Rows] = field(default_factory=dict)
    retrieval: dict[int, list[RetrievalItem]] = field(default_factory=dict)

    def parts(self) -> dict[str, str]:
        """What identifies each part of the material, local task files included."""
        found = {"text": self.text.digest(), "responses": self.responses.digest()}
        found |= {f"length {length}": rows.digest() for length, rows in self.lengths.items()}
        found |= {f"retrieval {length}": _digest(items) for length, items in self.retrieval.items()}
        return found | {f"task {name}": digest for name, digest in self.tasks.digests.items()}

    def digest(self) -> str:
        """Identifies the material."""
        return hashlib.sha256(json.dumps(self.parts(), sort_keys=True).encode()).hexdigest()[:16]


def _digest(items: list[RetrievalItem]) -> str:
    return hashlib.sha256(json.dumps([dataclasses.asdict(item) for item in items]).encode()).hexdigest()[:16]


@dataclass(frozen=True)
class ModelScores:
    """Scores of one model, row by row and item by item, and its size.

    Attributes:
        size: what it takes.
        text: losses on held-out text.
        responses: losses on held-out responses.
        tasks: scores of tasks, and of groups of them.
        lengths: losses on text by the length of its windows.
        agreement: with the base, on the longest windows; None for the base.
        retrieval: by length, 1 or 0 for each question.
    """

    size: Size
    text: RowLosses
    responses: RowLosses
    tasks: TaskScores
    lengths: dict[int, RowLosses] = field(default_factory=dict)
    agreement: Agreement | None = None
    retrieval: dict[int, list[int]] = field(default_factory=dict)

    def write(self, path: Path) -> None:
        """Writes JSON that `read` takes back without a loss of digits."""
        write_json(path, dataclasses.asdict(self))

    @classmethod
    def read(cls, path: Path) -> ModelScores:
        """Reads what `write` wrote.

        Raises:
            StageError: the file is damaged.
        """
        raw = read_json(path, "remove it and run `uniattn eval` again")
        return cls(
            Size(**raw["size"]),
            RowLosses(**raw["text"]),
            RowLosses(**raw["responses"]),
            {task: _as_scores(metrics) for task, metrics in raw["tasks"].items()},
            {int(length): RowLosses(**losses) for length, losses in raw["lengths"].items()},
            raw["agreement"] and Agreement(**raw["agreement"]),
            {int(length): correct for length, correct in raw["retrieval"].items()},
        )


def _as_scores(metrics: dict[str, Any]) -> dict[str, MetricScores]:
    return {metric: MetricScores(**scores) for metric, scores in metrics.items()}


def items_file(folder: Path, index: int, name: str) -> Path:
    """Where the scores of the n-th model are kept."""
    plain = re.sub(r"[^A-Za-z0-9_-]+", "-", name).strip("-") or "model"
    return folder / "items" / f"{index}-{plain[-60:]}.json"


@dataclass(frozen=True)
class Bench:
    """What measures one model after the other.

    Attributes:
        material: what they are tested on.
        batches: finds how many sequences fit into memory.
        store: scores of earlier runs.
        reference: the base on the longest windows; None where there are none.
        base: identifies the base.
        progress: gets one bar for each kind of test.
    """

    material: Material
    batches: Batches
    store: ScoreStore
    reference: Reference | None
    base: str
    progress: Progress


def measure(subject: Subject, load: Callable[[], PreTrainedModel], bench: Bench, *, is_base: bool) -> ModelScores:
    """Everything about one model but its speed; scores that the store has are taken from there.

    Args:
        subject: names the model in messages.
        load: gives the model.
        bench: what it is tested on, and how.
        is_base: whether it is the base, with which others are compared.

    Raises:
        ModelError: a loss is not a number, or the cache is not what the layout predicts.
    """
    # First: it is quick, and stops everything if a saving would be wrong.
    size = measure_size(subject.name, load(), subject.source.path)
    work = _Work(subject.name, load, size, bench, model_key(subject.source))
    losses = {name: work.losses(name, rows) for name, rows in work.rows().items()}
    lengths = {length: work.losses(f"length {length}", rows) for length, rows in work.shorter().items()}
    agreement = None
    if bench.reference is not None:
        longest = max(bench.material.lengths)
        lengths[longest], agreement = work.longest(longest, is_base)
    retrieval = {length: work.retrieval(length, items) for length, items in bench.material.retrieval.items()}
    tasks = {name: work.task(name) for name in bench.material.tasks.loaded}
    scores = with_groups(bench.material.tasks, tasks)
    return ModelScores(size, losses["text"], losses["responses"], scores, lengths, agreement, retrieval)


@dataclass(frozen=True)
class _Work:
    """One model on the bench, asked for anew by each part: where two models do not fit, the base may take its place."""

    name: str
    load: Callable[[], PreTrainedModel]
    size: Size
    bench: Bench
    fingerprint: str

    def rows(self) -> dict[str, Rows]:
        return {"text": self.bench.material.text, "responses": self.bench.material.responses}

    def shorter(self) -> dict[int, Rows]:
        found = dict(self.bench.material.lengths)
        if self.bench.reference is not None:
            del found[max(found)]
        return found

    def key(self, part: str, **others: Any) -> dict[str, Any]:
        """What the score of a part depends on."""
        material = self.bench.material
        return {
            "part": part,
            "material": material.parts()[part],
            "model": self.fingerprint,
            "dtype": self.size.dtype,
            "attention": self.size.attention,
            "device": device_key(self.bench.batches.device),
            "batch": self.bench.batches.first,
            **environment_key(),
            **others,
        }

    def losses(self, part: str, rows: Rows) -> RowLosses:
        def make() -> dict[str, Any]:
            with self.bench.progress.track(f"{self.name}: loss on {part}", len(rows)) as advance:
                longest = max(map(len, rows.tokens))
                found = self.bench.batches.run(
                    part, longest, lambda size: row_losses(self.load(), rows, batch_size=size, advance=advance)
                )
            return dataclasses.asdict(self._numbers(found))

        return RowLosses(**self.bench.store.get(self.key(part), make))

    def _numbers(self, losses: RowLosses) -> RowLosses:
        if not all(map(math.isfinite, losses.sums)):
            raise ModelError(
                f"{self.name}: the loss is not a number; the checkpoint is damaged, or {self.size.dtype} overflows "
                "(try --set model.dtype=float32)"
            )
        return losses

    def longest(self, length: int, is_base: bool) -> tuple[RowLosses, Agreement | None]:
        """Losses on the longest windows, and agreement with the base there."""
        # A copy of the base is scored like any other model, so that the base's own entry has no part in the key.
        part, rows, reference = f"length {length}", self.bench.material.lengths[length], self.bench.reference
        assert reference is not None, "there are lengths only where there is a base to agree with"

        def make() -> dict[str, Any]:
            with self.bench.progress.track(f"{self.name}: agreement with the base", len(rows)) as advance:
                if is_base:
                    return {"losses": dataclasses.asdict(self._numbers(base_losses(reference, advance)))}
                reference.logits()  # before the model is asked for, which may have to make room for the base
                losses, agreement = self.bench.batches.run(
                    part,
                    length,
                    lambda size: compare_with_base(self.load(), reference, batch_size=size, advance=advance),
                )
            return {"losses": dataclasses.asdict(self._numbers(losses)), "agreement": dataclasses.asdict(agreement)}

        found = self.bench.store.get(self.key(part, base=None if is_base else self.bench.base), make)
        return RowLosses(**found["losses"]), Agreement(**found["agreement"]) if "agreement" in found else None

    def retrieval(self, length: int, items: list[RetrievalItem]) -> list[int]:
        def make() -> list[int]:
            with self.bench.progress.track(f"{self.name}: retrieval from {length} tokens", len(items)) as advance:
                return answer_items(self.load(), items, advance)

        return self.bench.store.get(self.key(f"retrieval {length}"), make)

    def task(self, name: str) -> dict[str, MetricScores]:
        material = self.bench.material

        def make() -> dict[str, Any]:
            with self.bench.progress.track(f"{self.name}: {name}", None) as advance:
                found = self.bench.batches.run(
                    f"task {name}",
                    None,
                    lambda size: run_task(
                        material.tasks, name, self.load(), material.tokenizer, batch_size=size, advance=advance
                    ),
                )
            return {metric: dataclasses.asdict(scores) for metric, scores in found.items()}

        key = self.key(f"task {name}", tokenizer=tokenizer_key(material.tokenizer))
        return _as_scores(self.bench.store.get(key, make))
