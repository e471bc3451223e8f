"""What is learned, shown before anything is trained."""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from uniattn_cli.data.counts import Counts
from uniattn_cli.data.sequences import runs
from uniattn_cli.errors import CheckpointError, DataError
from uniattn_cli.run.files import read_json
from uniattn_cli.tables import Sample

if TYPE_CHECKING:
    import datasets
    from transformers import PreTrainedTokenizerBase

CHECKED = 200  # rows looked at for the end of an answer
LONGEST = {True: 600, False: 400}  # characters shown of a learned piece and of one that is not


def describe(counts: Counts, max_length: int) -> str:
    """One line: rows, tokens, the learned share, what was split, cut and left out."""
    split = f"{counts.split:,} more from conversations split into one row per answer; " if counts.split else ""
    split += f"{counts.divided:,} more from long texts that were split; " if counts.divided else ""
    return (
        f"training rows: {counts.used:,} with {counts.tokens:,} tokens, {counts.share:.1%} of them in the loss; {split}"
        f"{counts.truncated:,} rows truncated to {max_length} tokens, {counts.dropped:,} dropped without loss tokens"
        + (f" ({counts.why_dropped})" if counts.dropped else "")
        + (f" ({counts.lost_share:.1%} of all tokens lost)" if counts.lost else "")
    )


def pieces(tokenizer: PreTrainedTokenizerBase, ids: Sequence[int], labels: Sequence[int]) -> list[tuple[str, bool]]:
    """The decoded row in pieces that are learned or not; long ones are shortened in their middle."""
    return [(_shorten(str(tokenizer.decode(run)), LONGEST[learned]), learned) for run, learned in runs(ids, labels)]


def mark(tokenizer: PreTrainedTokenizerBase, ids: Sequence[int], labels: Sequence[int]) -> str:
    """The decoded row as one text, learned tokens between ⟦ and ⟧."""
    return Sample("", pieces(tokenizer, ids, labels)).marked


def _shorten(text: str, longest: int) -> str:
    half = longest // 2
    return text if len(text) <= longest else f"{text[:half]} … {text[-half:]}"


def check_share(counts: Counts, loss: str) -> None:
    """Refuses rows in which nothing is learned, or in which prompts are learned although only responses should be.

    Raises:
        DataError: with `loss` `responses`, none or all of the tokens are learned; with `all`, none.
    """
    if counts.supervised == 0:
        raise DataError(f"no token of the training rows counts in the loss: {counts.why_dropped}")
    if loss == "responses" and counts.supervised == counts.tokens:
        raise DataError(
            "every token of the training rows counts in the loss, so they have no prompts; use rows with prompts and "
            "responses, or set train.loss: all for plain text"
        )


def endless(rows: datasets.Dataset, tokenizer: PreTrainedTokenizerBase, model: Path, max_length: int) -> str | None:
    """A warning if most answers end with a token at which generation does not stop, else None.

    Args:
        rows: columns `input_ids` and `labels`.
        model: folder of the model, whose `generation_config.json` may name more such tokens than the tokenizer does.
        max_length: where rows are cut; how a row of this length would have ended is not known.
    """
    stops = {tokenizer.eos_token_id, *_generation_stops(model)}
    ends: Counter[int] = Counter()
    for row in itertools.islice(rows, CHECKED):
        if len(row["input_ids"]) < max_length:
            ends[next(label for label in reversed(row["labels"]) if label >= 0)] += 1
    wrong = Counter({token: count for token, count in ends.items() if token not in stops})
    if not 2 * wrong.total() > ends.total():
        return None
    token = tokenizer.decode([wrong.most_common(1)[0][0]])
    return (
        f"answers end with {token!r}, but generation does not stop at it; add it to eos_token_id in the model's "
        "generation_config.json, or set data.chat_template to a template that ends answers with "
        f"{tokenizer.eos_token!r}"
    )


def _generation_stops(model: Path) -> list[int]:
    path = model / "generation_config.json"
    if not path.is_file():
        return []
    stops = read_json(path, "copy it again from the base model", CheckpointError).get("eos_token_id")
    return stops if isinstance(stops, list) else [] if stops is None else [stops]
