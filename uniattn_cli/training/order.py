"""Which rows each optimiser step sees. Pure, so that every device count, resume and rerun sees the same."""

from __future__ import annotations

import random
from collections.abc import Sequence

from uniattn_cli.errors import RecipeError
from uniattn_cli.recipe.schema import TrainSpec, TrainStage

# Steps whose rows are sorted by length together: enough for little padding, few enough to keep the order random.
GROUPED_STEPS = 32


def stage_steps(stage: TrainStage, rows: int, batch_size: int) -> int:
    """Optimiser steps of a stage: as given, or the whole number nearest to its epochs, at least one."""
    return stage.steps or max(1, round(stage.epochs * rows / batch_size))


def batches(
    lengths: Sequence[int], *, batch_size: int, first: int, steps: int, seed: int, grouped: bool = False
) -> list[list[int]]:
    """The rows of `steps` optimiser steps.

    Rows come from one endless stream, reshuffled for each pass over the data; a later stage goes on where the one
    before it stopped. Within a step the longest rows come first: the loss of a step is one mean over its tokens, so
    the order changes no result, but rows of like length share a forward pass and little padding is computed.

    Args:
        lengths: tokens of each row.
        batch_size: rows per step.
        first: number of steps that earlier stages have taken from the stream.
        seed: of the shuffling.
        grouped: rows of like length share a step, among the rows of `GROUPED_STEPS` steps, which keep a random order.

    Returns:
        `steps` lists of `batch_size` indices into `lengths`.
    """
    count = len(lengths)
    passes: dict[int, list[int]] = {}

    def row(position: int) -> int:
        number, offset = divmod(position, count)
        if number not in passes:
            passes[number] = random.Random(f"{seed}/{number}").sample(range(count), count)
        return passes[number][offset]

    def longest_first(begin: int, end: int) -> list[int]:
        rows = [row(position) for position in range(begin * batch_size, end * batch_size)]
        return sorted(rows, key=lambda index: -lengths[index])

    if not grouped:
        return [longest_first(step, step + 1) for step in range(first, first + steps)]
    windows: dict[int, list[list[int]]] = {}

    def grouped_step(step: int) -> list[int]:
        number, place = divmod(step, GROUPED_STEPS)
        if number not in windows:
            together = longest_first(number * GROUPED_STEPS, (number + 1) * GROUPED_STEPS)
            cut = [together[begin : begin + batch_size] for begin in range(0, len(together), batch_size)]
            windows[number] = random.Random(f"{seed}/steps/{number}").sample(cut, len(cut))
        return windows[number][place]

    return [grouped_step(step) for step in range(first, first + steps)]


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
