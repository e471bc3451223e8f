"""Losses row by row, on held-out text and on held-out responses, so that models can be compared on the same rows."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from uniattn_cli.data.screen import Screen
from uniattn_cli.data.sequences import tokenize
from uniattn_cli.data.splits import load_mix
from uniattn_cli.data.windows import heldout_windows
from uniattn_cli.errors import DataError
from uniattn_cli.models.hub import context_window
from uniattn_cli.models.losses import Rows
from uniattn_cli.recipe.schema import Recipe

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def text_rows(recipe: Recipe, tokenizer: PreTrainedTokenizerBase, screen: Screen | None = None) -> Rows:
    """Windows of held-out text; every token but the first of a window is scored.

    Args:
        screen: leaves out rows that cannot be used; None is one that tells nobody.

    Raises:
        DataError: there is not enough text.
    """
    spec = recipe.evaluation
    windows = list(heldout_windows(recipe.data, tokenizer, tokens=spec.tokens, length=spec.length, screen=screen))
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


def response_rows(
    recipe: Recipe, tokenizer: PreTrainedTokenizerBase, *, skip: int = 0, screen: Screen | None = None
) -> Rows:
    """Held-out rows of the training data; only the responses are scored.

    Args:
        skip: leave out this many of the rows; the rows then are others than those of `skip=0`.
        screen: leaves out rows that cannot be used; None is one that tells nobody.

    Raises:
        DataError: there are no such rows.
    """
    import torch

    screen = screen or Screen(recipe.data, tokenizer)
    rows = load_mix(recipe.data.train, "heldout", holdout=recipe.data.holdout, seed=recipe.seed, screen=screen).rows
    if len(rows) <= skip:
        raise DataError(f"only {len(rows)} rows are held out; raise data.holdout or add more rows")
    some = [rows[place] for place in range(skip, min(skip + recipe.evaluation.responses, len(rows)))]
    dataset = tokenize(some, tokenizer, max_length=recipe.train.max_length, loss="responses").dataset
    return Rows(
        [torch.tensor(row, dtype=torch.long) for row in dataset["input_ids"]],
        [torch.tensor(row, dtype=torch.long) for row in dataset["labels"]],
    )
