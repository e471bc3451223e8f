"""What is learned, shown before anything is trained."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import TYPE_CHECKING

from uniattn_cli.data import IGNORED, Tokenised
from uniattn_cli.errors import DataError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

OPEN, CLOSE = "⟦", "⟧"
LONGEST = {True: 600, False: 400}  # characters shown of a learned piece and of one that is not


def describe(data: Tokenised, max_length: int) -> str:
    """One line: rows, tokens, the learned share, what was cut and left out."""
    return (
        f"training rows: {data.used:,} with {data.tokens:,} tokens, {data.share:.1%} of them learned; "
        f"{data.truncated:,} rows cut at {max_length} tokens, {data.dropped:,} left out with nothing to learn"
    )


def mark(tokenizer: PreTrainedTokenizerBase, ids: Sequence[int], labels: Sequence[int]) -> str:
    """The decoded row, learned tokens between ⟦ and ⟧; long pieces are shortened in their middle."""
    pieces = []
    pairs = zip(ids, labels, strict=True)
    for learned, run in itertools.groupby(pairs, key=lambda pair: pair[1] != IGNORED):
        text = _shorten(tokenizer.decode([token for token, _ in run]), LONGEST[learned])
        pieces.append(f"{OPEN}{text}{CLOSE}" if learned else text)
    return "".join(pieces)


def _shorten(text: str, longest: int) -> str:
    half = longest // 2
    return text if len(text) <= longest else f"{text[:half]} … {text[-half:]}"


def check_share(data: Tokenised, loss: str) -> None:
    """Refuses rows in which nothing is learned, or in which prompts are learned although only responses should be.

    Raises:
        DataError: with `loss` `responses`, none or all of the tokens are learned; with `all`, none.
    """
    if data.supervised == 0:
        raise DataError("no token of the training rows would be learned; check that the rows have assistant turns")
    if loss == "responses" and data.supervised == data.tokens:
        raise DataError(
            "every token of the training rows would be learned, so they hold no prompts; give rows with prompts and "
            "responses, or set train.loss to all to learn plain text"
        )
