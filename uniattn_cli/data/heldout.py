"""Losses row by row, on held-out text and on held-out responses, so that models can be compared on the same rows."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from uniattn_cli.data.splits import IGNORED, heldout_windows, load_rows, tokenize
from uniattn_cli.errors import DataError
from uniattn_cli.models.costs import context_window
from uniattn_cli.models.losses import Loss, summarise, token_losses
from uniattn_cli.recipe.schema import Recipe

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


@dataclass(frozen=True)
class Rows:
    """Rows to score.

    Attributes:
        tokens: token ids of each row, LongTensor [length of the row].
        labels: the same with -100 where nothing is scored.
    """

    tokens: list[torch.Tensor]
    labels: list[torch.Tensor]

    def __len__(self) -> int:
        return len(self.tokens)

    def digest(self) -> str:
        """Identifies the rows, so that scores of other rows are never taken for theirs."""
        found = hashlib.sha256()
        for row in (*self.tokens, *self.labels):
            found.update(row.numpy().tobytes() + b";")
        return found.hexdigest()[:16]


@dataclass(frozen=True)
class RowLosses:
    """Scores of one model on rows.

    Attributes:
        sums: cross-entropy of each row in nats, summed over its scored tokens.
        counts: scored tokens of each row.
    """

    sums: list[float]
    counts: list[int]

    def summary(self) -> Loss:
        """Mean over all scored tokens, with its standard error over rows."""
        import torch

        return summarise(torch.tensor(self.sums, dtype=torch.float64), torch.tensor(self.counts))


def text_rows(recipe: Recipe, tokenizer: PreTrainedTokenizerBase) -> Rows:
    """Windows of held-out text; every token but the first of a window is scored.

    Raises:
        DataError: there is not enough text.
    """
    spec = recipe.evaluation
    windows = list(heldout_windows(recipe.data, tokenizer, tokens=spec.tokens, length=spec.length))
    return Rows(windows, windows)


# Lengths that are taken where the recipe names none.
LENGTHS = (256, 1024)


def length_rows(recipe: Recipe, tokenizer: PreTrainedTokenizerBase, config: Any, notes: list[str]) -> dict[int, Rows]:
    """The same held-out text in windows of several lengths, shortest first.

    Args:
        config: of the base, whose window no length exceeds.
        notes: gets a line for each usual length that the text is too short for.

    Raises:
        DataError: there is not enough text for a length that the recipe names.
    """
    spec = recipe.evaluation
    window = context_window(config) or max(LENGTHS)
    found = {}
    for length in sorted(set(LENGTHS if spec.lengths is None else spec.lengths)):
        if spec.lengths is None and length > window:
            continue
        try:
            windows = list(heldout_windows(recipe.data, tokenizer, tokens=spec.length_tokens, length=length))
        except DataError as error:
            if spec.lengths is not None:
                raise
            notes.append(f"Nothing is measured at {length} tokens: {error}.")
            continue
        found[length] = Rows(windows, windows)
    return found


def response_rows(recipe: Recipe, tokenizer: PreTrainedTokenizerBase, *, skip: int = 0) -> Rows:
    """Held-out rows of the training data; only the responses are scored.

    Args:
        skip: leave out this many of the rows; the rows then are others than those of `skip=0`.

    Raises:
        DataError: there are no such rows.
    """
    import torch

    rows = load_rows(recipe.data.train, "heldout", holdout=recipe.data.holdout, seed=recipe.seed)
    if len(rows) <= skip:
        raise DataError(f"only {len(rows)} rows are held out")
    rows = rows.select(range(skip, min(skip + recipe.evaluation.responses, len(rows))))
    dataset = tokenize(rows, tokenizer, max_length=recipe.train.max_length, loss="responses").dataset
    return Rows(
        [torch.tensor(row, dtype=torch.long) for row in dataset["input_ids"]],
        [torch.tensor(row, dtype=torch.long) for row in dataset["labels"]],
    )


def row_losses(
    model: PreTrainedModel,
    rows: Rows,
    *,
    batch_size: int,
    advance: Callable[[int], None] = lambda steps: None,
) -> RowLosses:
    """Scores rows of any lengths.

    Rows of similar length share a batch and are padded on the right, where causal attention never looks, so that the
    result does not depend on the batch.

    Args:
        advance: told the number of finished rows.
    """
    import torch

    device = next(model.parameters()).device
    order = sorted(range(len(rows)), key=lambda index: -len(rows.tokens[index]))
    sums = [0.0] * len(rows)
    counts = [int((labels[1:] != IGNORED).sum()) for labels in rows.labels]
    with torch.no_grad():
        for start in range(0, len(order), batch_size):
            batch = order[start : start + batch_size]
            tokens = _padded([rows.tokens[index] for index in batch], 0)
            labels = _padded([rows.labels[index] for index in batch], IGNORED)
            losses = token_losses(model, tokens.to(device), labels.to(device)).double().sum(1)
            for index, total in zip(batch, losses.tolist(), strict=True):
                sums[index] = total
            advance(len(batch))
    return RowLosses(sums, counts)


def _padded(rows: Sequence[torch.Tensor], value: int) -> torch.Tensor:
    import torch

    return torch.nn.utils.rnn.pad_sequence(list(rows), batch_first=True, padding_value=value)
