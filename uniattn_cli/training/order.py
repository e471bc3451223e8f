"""Which rows each optimiser step sees. Pure, so that every device count, resume and rerun sees the same."""

from __future__ import annotations

import random
from collections.abc import Sequence

from uniattn_cli.errors import RecipeError
from uniattn_cli.recipe import TrainSpec, TrainStage


def stage_steps(stage: TrainStage, rows: int, batch_size: int) -> int:
    """Optimiser steps of a stage: as given, or the whole number nearest to its epochs, at least one."""
    return stage.steps or max(1, round(stage.epochs * rows / batch_size))


def batches(lengths: Sequence[int], *, batch_size: int, first: int, steps: int, seed: int) -> list[list[int]]:
    """The rows of `steps` optimiser steps.

    Rows come from one endless stream, reshuffled for each pass over the data; a later stage goes on where the one
    before it stopped. Within a step the longest rows come first: the loss of a step is one mean over its tokens, so
    the order changes no result, but rows of like length share a forward pass and little padding is computed.

    Args:
        lengths: tokens of each row.
        batch_size: rows per step.
        first: number of steps that earlier stages have taken from the stream.
        seed: of the shuffling.

    Returns:
        `steps` lists of `batch_size` indices into `lengths`.
    """
    rows = len(lengths)
    passes: dict[int, list[int]] = {}

    def row(position: int) -> int:
        number, offset = divmod(position, rows)
        if number not in passes:
            passes[number] = random.Random(f"{seed}/{number}").sample(range(rows), rows)
        return passes[number][offset]

    chosen = []
    for step in range(first, first + steps):
        batch = [row(position) for position in range(step * batch_size, (step + 1) * batch_size)]
        chosen.append(sorted(batch, key=lambda index: -lengths[index]))
    return chosen


def accumulation(spec: TrainSpec, world: int) -> int:
    """Forward passes per optimiser step on each of `world` devices, so that the batch is the same on any number.

    Raises:
        RecipeError: the batch cannot be divided evenly.
    """
    if spec.batch_size % (spec.micro_batch_size * world):
        raise RecipeError(
            f"train.batch_size ({spec.batch_size}) must be a multiple of train.micro_batch_size "
            f"({spec.micro_batch_size}) times the number of processes ({world})"
        )
    return spec.batch_size // (spec.micro_batch_size * world)
