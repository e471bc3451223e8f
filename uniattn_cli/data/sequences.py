"""From rows to sequences of tokens and labels, with a count of everything that was cut, split or left out."""

from __future__ import annotations

import contextlib
import itertools
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, fields
from typing import TYPE_CHECKING

from uniattn_cli.data.chat import ChatRenderer, Messages
from uniattn_cli.data.encoding import add_eos, bos_of, encode, eos_of
from uniattn_cli.errors import DataError
from uniattn_cli.models.losses import IGNORED

if TYPE_CHECKING:
    import datasets
    from transformers import PreTrainedTokenizerBase

_BATCH = 256  # rows tokenised at once

Encoded = tuple[list[int], list[bool]]  # token ids, and whether each is learned


@dataclass
class Counts:
    """What became of rows.

    Attributes:
        rows: rows given.
        split: sequences made beyond one per row, where a template cannot show all turns in one (`chat`).
        divided: sequences made beyond one per row, because texts were longer than the limit.
        used: sequences kept.
        dropped: sequences left out because no token to learn was left.
        unanswered: those of them that had none before they were cut either.
        truncated: sequences longer than the limit, those dropped included.
        tokens: tokens of the sequences kept.
        lost: tokens that were cut off or belonged to a sequence left out.
        supervised: tokens kept that are learned.
        lengths: tokens of each sequence before it was cut, in order.
    """

    rows: int = 0
    split: int = 0
    divided: int = 0
    used: int = 0
    dropped: int = 0
    unanswered: int = 0
    truncated: int = 0
    tokens: int = 0
    lost: int = 0
    supervised: int = 0
    lengths: list[int] = field(default_factory=list)

    @property
    def share(self) -> float:
        """Share of the tokens that are learned, 0 to 1."""
        return self.supervised / self.tokens if self.tokens else 0.0

    @property
    def lost_share(self) -> float:
        """Share of all tokens that were cut off or left out, 0 to 1."""
        return self.lost / (self.tokens + self.lost) if self.lost else 0.0

    @property
    def why_dropped(self) -> str:
        """How many sequences were left out for which reason, and what helps; empty if none was."""
        cut = self.dropped - self.unanswered
        reasons = [f"{cut:,} with a prompt that fills train.max_length"] if cut else []
        reasons += [f"{self.unanswered:,} without an answer to learn"] if self.unanswered else []
        remedy = "raise train.max_length" if cut else "check that the rows have assistant turns"
        return f"{', '.join(reasons)}; {remedy}" if reasons else ""

    def __add__(self, other: Counts) -> Counts:
        return Counts(*(getattr(self, entry.name) + getattr(other, entry.name) for entry in fields(self)))

    def add_row(self, sequences: int, pieces: int) -> None:
        """Counts a row that became so many sequences, and these so many pieces of at most the limit."""
        self.rows += 1
        self.split += sequences - 1
        self.divided += pieces - sequences

    def add_sequence(self, whole: Sequence[bool], limit: int) -> bool:
        """Counts a sequence, of whose tokens `limit` are left; whether it is kept.

        Args:
            whole: for each token whether it is learned.
            limit: most tokens of a sequence.
        """
        length, mask = len(whole), whole[:limit]
        kept = any(mask)
        self.lengths.append(length)
        self.used += kept
        self.dropped += not kept
        self.unanswered += not any(whole)
        self.truncated += length > len(mask)
        self.tokens += len(mask) if kept else 0
        self.lost += length - len(mask) if kept else length
        self.supervised += sum(mask)
        return kept

    def to_dict(self) -> dict[str, int]:
        """The numbers, without the lengths."""
        return {entry.name: getattr(self, entry.name) for entry in fields(self) if entry.name != "lengths"}


@dataclass(frozen=True)
class Tokenised:
    """Tokenised rows.

    Attributes:
        dataset: columns `input_ids` and `labels` (-100 where a token is not learned), lists of equal length.
        counts: what became of all rows.
        sources: the same by data set.
    """

    dataset: datasets.Dataset
    counts: Counts
    sources: dict[str, Counts] = field(default_factory=dict)


def tokenize(
    rows: datasets.Dataset,
    tokenizer: PreTrainedTokenizerBase,
    *,
    max_length: int,
    loss: str,
    advance: Callable[[int], None] = lambda rows: None,
    needed: bool = True,
) -> Tokenised:
    """Tokens and labels of normalised rows.

    With `responses` every assistant turn is learned, its end-of-turn token included and everything else masked; text
    rows are learned in full. Answers marked `train: False` are never learned. Conversations are rendered with the
    tokenizer's chat template (`chat.ChatRenderer` tells what happens without one), text rows end with EOS. Longer
    conversations are cut at `max_length` tokens, longer texts divided into sequences of so many.

    Args:
        rows: columns `messages` and `text`, one of them None per row (or missing); `source` where known.
        max_length: most tokens of a sequence.
        loss: which tokens are learned.
        advance: told the number of finished rows.
        needed: refuse rows of which none has anything to learn.

    Raises:
        DataError: the chat template cannot be masked reliably, or no row has anything to learn.
    """
    import datasets
    import pyarrow

    sources: dict[str, Counts] = {}
    integers = pyarrow.list_(pyarrow.int32())
    schema = pyarrow.schema([("input_ids", integers), ("labels", integers)])
    tables = [schema.empty_table()]
    encoder = RowEncoder(tokenizer, loss)
    for start in range(0, len(rows), _BATCH):
        batch = rows[start : start + _BATCH]
        inputs, labels = [], []
        with all_cores():
            encoded = encoder.batch(_column(batch, "messages"), _column(batch, "text"))
        columns = _column(batch, "text"), _column(batch, "source")
        for sequences, text, source in zip(encoded, *columns, strict=True):
            counts = sources.setdefault(source or "", Counts())
            parts = sequences if text is None else list(_divided(sequences, max_length))
            counts.add_row(len(sequences), len(parts))
            for ids, mask in parts:
                if counts.add_sequence(mask, max_length):
                    ids = ids[:max_length]
                    inputs.append(ids)
                    labels.append([token if learned else IGNORED for token, learned in zip(ids, mask, strict=False)])
        tables.append(pyarrow.table([inputs, labels], schema=schema))
        advance(len(next(iter(batch.values()))))
    together = sum(sources.values(), Counts())
    if needed and not together.used:
        raise DataError(
            f"none of the {len(rows)} rows has a loss token within its first {max_length} tokens: "
            f"{together.why_dropped}"
        )
    return Tokenised(datasets.Dataset(pyarrow.concat_tables(tables)), together, dict(sorted(sources.items())))


class RowEncoder:
    """Token ids and masks of rows, whatever their length.

    Args:
        loss: `responses` or `all`, see `tokenize`.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, loss: str):
        self.tokenizer, self.loss = tokenizer, loss
        self.renderer, self.bos, self.eos = ChatRenderer(tokenizer), bos_of(tokenizer), eos_of(tokenizer)

    def batch(self, messages: Sequence[Messages | None], texts: Sequence[str | None]) -> list[list[Encoded]]:
        """The sequences of each row: one, or one per answer where the template asks for it.

        Args:
            messages: conversation of each row, None where it is text.
            texts: text of each row, None where it is a conversation.
        """
        if self.loss != "responses":
            return [[self._whole(*row)] for row in zip(messages, texts, strict=True)]
        rendered = [[] if row is None else self.renderer.rendered(row) for row in messages]
        masked = iter(self.renderer.masked([text for row in rendered for text in row]))
        return [
            [self._whole(None, text)] if row is None else list(itertools.islice(masked, len(parts)))
            for row, text, parts in zip(messages, texts, rendered, strict=True)
        ]

    def _whole(self, messages: Messages | None, text: str | None) -> Encoded:
        """A row of which everything is learned, but for answers that are marked."""
        if text is None and any("train" in message for message in messages or ()):
            [(ids, hidden)] = self.renderer.masked([self.renderer.hidden(messages or [])])
            return ids, [not token for token in hidden]
        if text is None:
            ids = self.renderer.ids(messages or [])
        else:
            ids = add_eos(encode(self.tokenizer, text), self.eos)
            ids = ids if self.bos is None or ids[:1] == [self.bos] else [self.bos, *ids]
        return ids, [True] * len(ids)


def _divided(sequences: Sequence[Encoded], limit: int) -> Iterator[Encoded]:
    """Pieces of at most `limit` tokens; none of one token alone, which has nothing to predict."""
    for ids, mask in sequences:
        starts = list(range(0, len(ids), limit))
        if len(ids) > limit > 2 and len(ids) % limit == 1:
            starts[-1] -= 1
        for start, end in itertools.pairwise([*starts, len(ids)]):
            yield ids[start:end], mask[start:end]


@contextlib.contextmanager
def all_cores() -> Iterator[None]:
    """Lets tokenizers work on many texts at once; elsewhere it is told not to, so that processes can be forked."""
    name = "TOKENIZERS_PARALLELISM"
    before = os.environ.get(name)
    os.environ[name] = "true"
    try:
        yield
    finally:
        if before is None:
            del os.environ[name]
        else:
            os.environ[name] = before


def _column(batch: dict[str, list], name: str) -> list:
    return batch.get(name) or [None] * len(next(iter(batch.values())))


def runs(ids: Sequence[int], labels: Sequence[int]) -> Iterator[tuple[list[int], bool]]:
    """The tokens of a sequence in runs that are learned or not."""
    for learned, run in itertools.groupby(zip(ids, labels, strict=True), key=lambda pair: pair[1] != IGNORED):
        yield [token for token, _ in run], learned
