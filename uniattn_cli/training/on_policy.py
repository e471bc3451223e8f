"""On-policy distillation: the student goes on with prompts of the data, and the teacher corrects what it wrote.

On given text a model is never asked what it does after mistakes of its own, of which text that it writes is full
(Agarwal et al., arXiv 2306.13649). So a share of the rows keep their prompts, and the student writes their responses
before it learns from its teacher on them. It writes those of `STEPS` optimiser steps at once, with the weights that it
has at the first of them: a step at a time would take far longer than to learn from it.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from uniattn_cli.errors import StageError
from uniattn_cli.generation.continuing import Continuer
from uniattn_cli.models.losses import IGNORED
from uniattn_cli.recipe.schema import SynthesisSpec, TrainStage
from uniattn_cli.run.files import read_json, write_json
from uniattn_cli.training.lora import merged_weights

if TYPE_CHECKING:
    from accelerate import PartialState
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

# Optimiser steps whose rows are written at once.
STEPS = 16
Row = dict[str, list[int]]  # `input_ids` and `labels`


def prompt_length(labels: Sequence[int], prefix: int) -> int:
    """Tokens of a row that stay: all before its last response, or the first `prefix` of a text; 0 without either."""
    start = next((place for place in reversed(range(len(labels))) if labels[place] != IGNORED), None)
    if start is None:
        return 0
    while start and labels[start - 1] != IGNORED:
        start -= 1
    # A token that begins every text is no prompt.
    return start if start > 1 else min(prefix, len(labels) - 1)


@torch.no_grad()
def take_weights(writer: PreTrainedModel, student: PreTrainedModel, stage: TrainStage) -> None:
    """Gives a writer the weights of a student that is in training, adapters merged.

    Args:
        writer: has all weights that the stage does not train, in any dtype.
        student: prepared for its stage, not sharded.
    """
    named = {name: parameter.detach() for name, parameter in student.named_parameters()}
    trained = {name: named[name] for name, parameter in student.named_parameters() if parameter.requires_grad}
    if stage.trains == "lora":
        start = {name.replace(".base_layer.", "."): tensor for name, tensor in named.items()}
        trained = merged_weights(start, trained, stage.lora)
    own = dict(writer.named_parameters())
    for name, tensor in trained.items():
        own[name].copy_(tensor)


class OnPolicy:
    """Rewrites the rows of a stage, block by block.

    Args:
        writer: the student as it is saved; its weights are replaced in each block.
        tokenizer: its tokenizer.
        spec: how text is drawn, and how much of a text is a prompt.
        stage: what is trained.
        process: one of those that share the rows.
        share: of rows that are rewritten.
        length: most tokens of a row.
        steps: of the stage.
        seed: of the choice of rows and of the sampling.
    """

    def __init__(
        self,
        writer: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        spec: SynthesisSpec,
        stage: TrainStage,
        process: PartialState,
        *,
        share: float,
        length: int,
        steps: int,
        seed: int,
    ):
        self.writer, self.stage, self.process = writer, stage, process
        self.share, self.steps, self.seed = share, steps, seed
        self.continuer = Continuer(writer, tokenizer, spec)
        self.length = min(length, self.continuer.window or length)
        self.block = -1
        self.written: list[list[Row]] = []  # of each step of the block

    def rows(self, step: int, rows_of: Callable[[int], list[Row]], student: PreTrainedModel) -> list[Row]:
        """The rows of an optimiser step that this process sees, the longest first.

        Args:
            step: of the stage, from 0.
            rows_of: gives the same rows of any step as they are in the data.
            student: with the weights before the step.
        """
        if self.block != step // STEPS:
            self.block = step // STEPS
            steps = range(self.block * STEPS, min((self.block + 1) * STEPS, self.steps))
            self.written = [rows_of(each) for each in steps]
            take_weights(self.writer, student, self.stage)
            self._rewrite(f"{self.seed}/{self.block}/{self.process.process_index}")
        return self.written[step % STEPS]

    def _rewrite(self, seed: str) -> None:
        """Replaces responses in the rows of the block."""
        chance, spec = random.Random(seed), self.continuer.spec
        chosen = []
        for row in (row for rows in self.written for row in rows):
            start = prompt_length(row["labels"], spec.prefix)
            if chance.random() < self.share and 0 < start < self.length:
                chosen.append((start, row))
        # Prompts of like length share a batch.
        chosen.sort(key=lambda each: each[0])
        size = min(spec.batch_size, sum(map(len, self.written)))
        for first in range(0, len(chosen), size):
            batch = chosen[first : first + size]
            prompts = [row["input_ids"][:start] for start, row in batch]
            # The engine is quick with as many rows as last time; what the additional ones say is not used.
            prompts += prompts[-1:] * (size - len(batch))
            decoded = self.continuer.decode(prompts, self.length, chance.getrandbits(31))
            for (start, row), new in zip(batch, decoded.tokens.tolist(), strict=False):
                new = new[: self.length - start]
                end = self.continuer.end_of(new)
                new = new if end is None else new[: end + 1]
                row["input_ids"] = row["input_ids"][:start] + new
                row["labels"] = row["labels"][:start] + new
        for rows in self.written:
            rows.sort(key=lambda row: -len(row["input_ids"]))

    def save(self, checkpoint: Path) -> None:
        """Writes the block into a checkpoint, for the weights that wrote it are gone."""
        content: dict[str, Any] = {"processes": self.process.num_processes, "block": self.block, "rows": self.written}
        write_json(self._file(checkpoint), content)

    def resume(self, checkpoint: Path) -> None:
        """Goes on with the block of a checkpoint.

        Raises:
            StageError: it was written by another number of processes.
        """
        again = "resume with the number of processes that it was written by, or start over with --force"
        kept = read_json(self._file(checkpoint), again)
        if kept["processes"] != self.process.num_processes:
            raise StageError(f"{checkpoint} was written by {kept['processes']} processes; {again}")
        self.block, self.written = kept["block"], kept["rows"]

    def _file(self, checkpoint: Path) -> Path:
        return checkpoint / f"on_policy_{self.process.process_index}.json"
