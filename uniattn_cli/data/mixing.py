"""How many rows of each data set a mix holds, and which.

Without weights a mix holds every row once. With weights it holds as many rows as the data sets have together, so that
the length of an epoch does not depend on the weights, and each data set gives its share of them: one that has more rows
than its share is sampled, one that has fewer is repeated.
"""

from __future__ import annotations

import json
import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    import datasets


@dataclass(frozen=True)
class Share:
    """What one data set gives to a mix.

    Attributes:
        source: its name.
        rows: rows that it has, held-out ones not counted.
        drawn: rows of the mix that are its own, repeated ones counted each time.
        weight: its weight in the recipe, None where there are none.
    """

    source: str
    rows: int
    drawn: int
    weight: float | None = None

    def __str__(self) -> str:
        if self.drawn == self.rows:
            return f"{self.source}: all {self.rows:,} rows"
        if self.drawn < self.rows:
            return f"{self.source}: a sample of {self.drawn:,} of its {self.rows:,} rows"
        return f"{self.source}: {self.drawn:,} rows, each of its {self.rows:,} about {self.drawn / self.rows:.1f} times"


@dataclass(frozen=True)
class Mix:
    """Rows of one or several data sets in the order in which they are used.

    Attributes:
        sets: all rows of each data set, as `splits.stored_rows` gives them; they stay on disk.
        order: which of them, int64 [rows]: places in all sets, one behind the other.
        shares: what each data set gives.
    """

    sets: Sequence[datasets.Dataset]
    order: np.ndarray
    shares: Sequence[Share]

    @property
    def rows(self) -> datasets.Dataset:
        """Columns `messages` and `text`, one of them None in every row; one that is None everywhere is left out."""
        import datasets

        together = datasets.concatenate_datasets(list(self.sets))
        used = [name for name in ("messages", "text") if together.data.column(name).null_count < len(together)]
        return together.select_columns(used).select(self.order).with_transform(decoded)

    @property
    def chosen(self) -> np.ndarray:
        """The number of the data set that each row is of, int64 [rows]."""
        return np.searchsorted(np.cumsum([len(rows) for rows in self.sets]), self.order, side="right")


def decoded(batch: dict[str, list]) -> dict[str, list]:
    """Stored rows with their conversations as lists of messages."""
    return {
        name: [value and json.loads(value) for value in values] if name == "messages" else values
        for name, values in batch.items()
    }


def shares(sizes: Sequence[int], weights: Sequence[float | None]) -> list[int]:
    """Rows that each data set gives.

    Args:
        sizes: rows of each, at least one.
        weights: of each, in any unit; all None for no weighting.

    Returns:
        Whole numbers whose sum is that of `sizes`, as near to the weights as whole numbers can be, none below 1.

    >>> shares([900, 100], [1, 1])
    [500, 500]
    >>> shares([900, 100], [None, None])
    [900, 100]
    """
    given = [weight for weight in weights if weight is not None]
    if not given:
        return list(sizes)
    if len(given) < len(sizes):
        raise ValueError("either all data sets have a weight or none")
    total = sum(sizes)
    exact = [total * weight / sum(given) for weight in given]
    counts = [int(value) for value in exact]
    by_remainder = sorted(range(len(exact)), key=lambda index: counts[index] - exact[index])
    for index in by_remainder[: total - sum(counts)]:
        counts[index] += 1
    while 0 in counts:
        counts[counts.index(max(counts))] -= 1
        counts[counts.index(0)] += 1
    return counts


def draw(rows: Sequence[Any], count: int, seed: int) -> list[Any]:
    """`count` of the rows: each one equally often, and a sample without repetition for what is left.

    The same sample for the same rows in the same order and the same seed.
    """
    times, rest = divmod(count, len(rows))
    return list(rows) * times + random.Random(seed).sample(list(rows), rest)
