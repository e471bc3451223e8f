"""From rows to sequences of tokens and labels, with a count of everything that was cut, split or left out."""

from __future__ import annotations

import contextlib
import itertools
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal

from uniattn_cli.data.chat import ChatRenderer
from uniattn_cli.data.encoding import add_eos, bos_of, encode, eos_of
from uniattn_cli.errors import DataError
from uniattn_cli.models.losses import IGNORED

if TYPE_CHECKING:
    import datasets
    from transformers import PreTrainedTokenizerBase

_BATCH = 256  # rows tokenised at once
# What is counted of each data set and of all together.
COUNTED = ("rows", "split", "divided", "used", "dropped", "truncated", "tokens", "lost", "supervised")

Encoded = tuple[list[int], list[bool]]  # token ids, and whether each is learned


@dataclass(frozen=True)
class Counts:
    """What became of the rows of one data set.

    Attributes:
        rows: rows given.
        split: sequences made beyond one per row, where a template cannot show all turns in one (`masks`).
        divided: sequences made beyond one per row, because texts were longer than the limit.
        used: sequences kept.
        dropped: sequences left out because no token to learn was left.
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
    truncated: int = 0
    tokens: int = 0
    lost: int = 0
    supervised: int = 0
    lengths: tuple[int, ...] = ()


@dataclass(frozen=True)
class Tokenised:
    """Tokenised rows and what became of them.

    Attributes:
        dataset: columns `input_ids` and `labels` (-100 where a token is not learned), lists of equal length.
        rows: rows given.
        used: rows in `dataset`.
        dropped: rows left out because no supervised token was left.
        truncated: rows longer than the limit, those dropped included.
        tokens: tokens of the rows used.
        supervised: tokens of the rows used that are learned.
        lost: tokens that were cut off, or of rows left out.
        split: rows of `dataset` beyond one per row given, where a conversation became one sequence per answer.
        divided: rows of `dataset` beyond one per row given, where a long text became several.
        sources: the same by data set.
    """

    dataset: datasets.Dataset
    rows: int
    used: int
    dropped: int
    truncated: int
    tokens: int
    supervised: int
    lost: int = 0
    split: int = 0
    divided: int = 0
    sources: dict[str, Counts] = field(default_factory=dict)

    @property
    def share(self) -> float:
        """Share of the tokens that are learned, 0 to 1."""
        return self.supervised / self.tokens if self.tokens else 0.0

    @property
    def lost_share(self) -> float:
        """Share of all tokens that were cut off or left out, 0 to 1."""
        return self.lost / (self.tokens + self.lost) if self.lost else 0.0


class _Tally:
    """Counts of one data set while they are made."""

    def __init__(self) -> None:
        self.numbers = dict.fromkeys(COUNTED[:-1], 0)
        self.supervised = 0
        self.lengths: list[int] = []

    def row(self, sequences: int, pieces: int) -> None:
        self.numbers["rows"] += 1
        self.numbers["split"] += sequences - 1
        self.numbers["divided"] += pieces - sequences

    def sequence(self, length: int, mask: Sequence[bool]) -> bool:
        """Counts a sequence of `length` tokens of which those of `mask` are left; whether it is kept."""
        kept = any(mask)
        self.lengths.append(length)
        self.numbers["used" if kept else "dropped"] += 1
        self.numbers["truncated"] += length > len(mask)
        self.numbers["tokens"] += len(mask) if kept else 0
        self.numbers["lost"] += length - len(mask) if kept else length
        self.supervised += sum(mask)
        return kept

    def counts(self) -> Counts:
        return Counts(**self.numbers, supervised=self.supervised, lengths=tuple(self.lengths))


def tokenize(
    rows: datasets.Dataset,
    tokenizer: PreTrainedTokenizerBase,
    *,
    max_length: int,
    loss: Literal["responses", "all"],
    advance: Callable[[int], None] = lambda rows: None,
    needed: bool = True,
) -> Tokenised:
    """Tokens and labels of normalised rows.

    With `responses` every assistant turn is learned, its end-of-turn token included and everything else masked; text
    rows are learned in full. Conversations are rendered with the tokenizer's chat template (`masks.ChatRenderer`
    tells what happens without one), text rows end with EOS. Longer conversations are cut at `max_length` tokens, longer
    texts divided into sequences of so many.

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

    tallies: dict[str, _Tally] = {}
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
            tally = tallies.setdefault(source or "", _Tally())
            parts = sequences if text is None else list(_divided(sequences, max_length))
            tally.row(len(sequences), len(parts))
            for ids, mask in parts:
                if tally.sequence(len(ids), mask[:max_length]):
                    ids = ids[:max_length]
                    inputs.append(ids)
                    labels.append([token if learned else IGNORED for token, learned in zip(ids, mask, strict=False)])
        tables.append(pyarrow.table([inputs, labels], schema=schema))
        advance(len(next(iter(batch.values()))))
    sources = {source: tally.counts() for source, tally in sorted(tallies.items())}
    total = {name: sum(getattr(counts, name) for counts in sources.values()) for name in COUNTED}
    if needed and not total["used"]:
        raise DataError(
            f"none of the {len(rows)} rows has a token to learn within {max_length} tokens; "
            "raise train.max_length, or check that the rows have assistant turns"
        )
    return Tokenised(dataset=datasets.Dataset(pyarrow.concat_tables(tables)), sources=sources, **total)


class RowEncoder:
    """Token ids and masks of rows, whatever their length.

    Args:
        loss: `responses` or `all`, see `tokenize`.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, loss: str):
        self.tokenizer, self.loss = tokenizer, loss
        self.renderer, self.bos, self.eos = ChatRenderer(tokenizer), bos_of(tokenizer), eos_of(tokenizer)

    def batch(
        self, messages: Sequence[list[dict[str, str]] | None], texts: Sequence[str | None]
    ) -> list[list[Encoded]]:
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

    def _whole(self, messages: list[dict[str, str]] | None, text: str | None) -> Encoded:
        """A row of which everything is learned."""
        if messages is not None:
            ids = self.renderer.ids(messages)
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
