"""From rows to sequences of tokens and labels."""

from __future__ import annotations

import contextlib
import functools
import hashlib
import itertools
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np

from uniattn_cli.data.chat import ChatRenderer, Messages
from uniattn_cli.data.counts import Counts
from uniattn_cli.data.encoding import add_eos, bos_of, encode, eos_of
from uniattn_cli.data.mixing import Mix, decoded
from uniattn_cli.data.stored import parts_of, stored, tokenizer_key, usual_workers
from uniattn_cli.errors import DataError
from uniattn_cli.models.losses import IGNORED

if TYPE_CHECKING:
    import datasets
    from transformers import PreTrainedTokenizerBase

_BATCH = 256  # rows tokenised at once
_COUNTED = ("text", "length", "learned", "answered", "key")  # columns that are read of all sequences
Part = tuple[str, int, int, int]  # see `stored.parts_of`

Encoded = tuple[list[int], list[bool]]  # token ids, and whether each is learned


@dataclass(frozen=True)
class Tokenised:
    """Tokenised rows.

    Attributes:
        dataset: columns `input_ids` and `labels` (-100 where a token is not learned), lists of equal length.
        lengths: of those lists.
        digest: identifies them all in their order.
        counts: what became of all rows.
        sources: the same by data set.
    """

    dataset: datasets.Dataset
    lengths: list[int]
    digest: str
    counts: Counts
    sources: dict[str, Counts]


def tokenize(
    rows: Mix | Sequence[dict[str, Any]],
    tokenizer: PreTrainedTokenizerBase,
    *,
    max_length: int,
    loss: str,
    workers: int | None = None,
    needed: bool = True,
) -> Tokenised:
    """Tokens and labels of normalised rows.

    With `responses` every assistant turn is learned, its end-of-turn token included and everything else masked; text
    rows are learned in full. Answers marked `train: False` are never learned. Conversations are rendered with the
    tokenizer's chat template (`chat.ChatRenderer` tells what happens without one), text rows end with EOS. Longer
    conversations are cut at `max_length` tokens, longer texts divided into sequences of so many.

    Args:
        rows: a mix, whose data sets are tokenised as wholes, whatever it holds of them, and kept on disk; or a few rows
            in memory, with `messages` and `text`, one of them None or missing.
        max_length: most tokens of a sequence.
        loss: which tokens are learned.
        workers: most processes that share the work (`data.workers`).
        needed: refuse rows of which none has anything to learn.

    Raises:
        DataError: the chat template cannot be masked reliably, or no row has anything to learn.
    """
    import datasets

    encoder = RowEncoder(tokenizer, loss)
    if isinstance(rows, Mix):
        # A template of which no conversation can be masked is told before all of them are tried.
        top = replace(rows, order=rows.order[:1]).rows[0]
        encoder.batch([top.get("messages")], [top.get("text")])
        parts = [_stored_sequences(part, encoder, max_length, workers or usual_workers()) for part in rows.sets]
        sizes, order, chosen = [len(part) for part in rows.sets], rows.order, rows.chosen
        names = [share.source for share in rows.shares]
    else:
        made = list(_encode(rows, 0, encoder, max_length))
        parts = [datasets.Dataset.from_list(made, features=datasets.Features(_features()))]
        sizes, order, chosen, names = [len(rows)], np.arange(len(rows)), np.zeros(len(rows), np.int64), [""]
    first, number = _places(parts, sizes)
    sequences = datasets.concatenate_datasets(parts)
    kept = _spread(first[order], number[order])
    _check_faults(sequences, kept)
    columns = {name: sequences.data.column(name).to_numpy() for name in _COUNTED}
    sources: dict[str, Counts] = {}
    for name, some in ((name, order[chosen == index]) for index, name in enumerate(names)):
        if len(some):
            counted = _counted(first[some], number[some], columns, max_length)
            sources[name] = sources.get(name, Counts()) + counted
    together = sum(sources.values(), Counts())
    if needed and not together.used:
        raise DataError(
            f"none of the {len(order)} rows has a loss token within its first {max_length} tokens: "
            f"{together.why_dropped}"
        )
    kept = kept[columns["learned"][kept] > 0]
    return Tokenised(
        sequences.select_columns(["input_ids", "labels"]).select(kept),
        np.minimum(columns["length"][kept], max_length).tolist(),
        hashlib.sha256(columns["key"][kept].tobytes()).hexdigest()[:16],
        together,
        dict(sorted(sources.items())),
    )


def _check_faults(sequences: datasets.Dataset, places: np.ndarray) -> None:
    """Raises what one of some rows stopped the work with; others, held out or not drawn, may be as they are."""
    faults = sequences.data.column("fault")
    if faults.null_count < len(faults):
        told = faults.take(places).drop_null()
        if len(told):
            raise DataError(told[0].as_py())


def _counted(first: np.ndarray, number: np.ndarray, columns: dict[str, np.ndarray], limit: int) -> Counts:
    """What became of rows, given where their sequences begin and how many they are."""
    more, texts = number - 1, columns["text"][first]
    beyond = int(more[~texts].sum()), int(more[texts].sum())
    places = _spread(first, number)
    return Counts.of(len(first), beyond, {name: column[places] for name, column in columns.items()}, limit)


def _places(parts: Sequence[datasets.Dataset], sizes: Sequence[int]) -> tuple[np.ndarray, np.ndarray]:
    """Where the sequences of each row begin and how many they are, int64 [all rows] each.

    Args:
        parts: sequences of each data set, with `row`.
        sizes: rows of each data set.
    """
    starts = np.cumsum([0, *sizes])
    rows = [part.data.column("row").to_numpy() + start for part, start in zip(parts, starts, strict=False)]
    borders = np.searchsorted(np.concatenate(rows), np.arange(sum(sizes) + 1))
    return borders[:-1], np.diff(borders)


def _spread(first: np.ndarray, number: np.ndarray) -> np.ndarray:
    """The numbers from each of `first` on, as many as `number` says, one after the other.

    >>> _spread(np.array([5, 0]), np.array([2, 3])).tolist()
    [5, 6, 0, 1, 2]
    """
    return np.repeat(first - np.cumsum(number) + number, number) + np.arange(number.sum())


def _features() -> dict[str, Any]:
    """What is kept of a sequence: its row, whether that is text, its tokens before it was cut, how many of the others
    are learned, whether any was before, a hash (`row_key`), why its row cannot be used, and what is left of it.
    """
    import datasets

    number, flag = datasets.Value("int32"), datasets.Value("bool")
    few = {"row": number, "text": flag, "length": number, "learned": number, "answered": flag}
    key = {"key": datasets.Value("int64"), "fault": datasets.Value("string")}
    return few | key | dict.fromkeys(("input_ids", "labels"), datasets.List(number))


def _stored_sequences(rows: datasets.Dataset, encoder: RowEncoder, limit: int, workers: int) -> datasets.Dataset:
    """The sequences of all usable rows of a data set, in their order; kept on disk."""
    key = ["sequences", rows._fingerprint, tokenizer_key(encoder.tokenizer), encoder.loss, limit]
    generate = functools.partial(_encode_parts, encoder=encoder, limit=limit)
    parts = parts_of(rows)
    with _threads(min(workers, len(parts)) == 1):
        return stored(key, generate, _features(), parts=parts, workers=workers)


def _encode_parts(parts: Sequence[Part], encoder: RowEncoder, limit: int) -> Iterator[dict[str, Any]]:
    """Sequences of some of the rows of a data set, read from its files."""
    import datasets

    for file, before, start, end in parts:
        # Opened for each part: what was read through a memory map counts as this process's memory until it is closed.
        rows = datasets.Dataset.from_file(file).select_columns(["messages", "text"])
        for begin in range(start, end, _BATCH):
            batch = decoded(rows[begin : min(begin + _BATCH, end)])
            some = [dict(zip(batch, values, strict=True)) for values in zip(*batch.values(), strict=True)]
            yield from _encode(some, before + begin, encoder, limit)


def _encode(rows: Sequence[dict[str, Any]], first: int, encoder: RowEncoder, limit: int) -> Iterator[dict[str, Any]]:
    """The sequences of rows as `_features` has them: none of unusable rows, an empty one with the fault of others."""
    pairs = [(number, row.get("messages"), row.get("text")) for number, row in enumerate(rows, first)]
    pairs = [pair for pair in pairs if pair[1:] != (None, None)]
    for begin in range(0, len(pairs), _BATCH):
        numbers, messages, texts = zip(*pairs[begin : begin + _BATCH], strict=True)
        for number, text, (whole, fault) in zip(numbers, texts, _tried(encoder, messages, texts), strict=True):
            for ids, mask in whole if text is None or fault else _divided(whole, limit):
                left = ids[:limit] if any(mask[:limit]) else []
                labels = [token if learned else IGNORED for token, learned in zip(left, mask, strict=False)]
                yield {
                    "row": number,
                    "text": text is not None,
                    "length": len(ids),
                    "learned": sum(mask[:limit]),
                    "answered": any(mask),
                    "key": row_key(left, labels),
                    "fault": fault,
                    "input_ids": left,
                    "labels": labels,
                }


def _tried(
    encoder: RowEncoder, messages: Sequence[Messages | None], texts: Sequence[str | None]
) -> list[tuple[list[Encoded], str | None]]:
    """The sequences of each row, and None; or an empty one, and why the row cannot be encoded."""
    try:
        return [(whole, None) for whole in encoder.batch(messages, texts)]
    except DataError as error:
        if len(texts) == 1:
            return [([([], [])], str(error))]
    # One at a time, which tells those apart that can.
    return [_tried(encoder, [message], [text])[0] for message, text in zip(messages, texts, strict=True)]


def row_key(tokens: Sequence[int], labels: Sequence[int]) -> int:
    """Identifies a sequence by its content, so that it is recognised in any batch, order or packed sequence.

    The first label is left out: nothing is before it that could predict it, and packing removes it.
    """
    content = np.asarray([*tokens, *labels[1:]], dtype=np.int64).tobytes()
    return int.from_bytes(hashlib.blake2b(content, digest_size=8).digest(), "little", signed=True)


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
def _threads(wanted: bool) -> Iterator[None]:
    """Lets tokenizers work on many texts at once, or not: they might hang in processes that are forked meanwhile."""
    name = "TOKENIZERS_PARALLELISM"
    before = os.environ.get(name)
    os.environ[name] = str(wanted).lower()
    try:
        yield
    finally:
        if before is None:
            del os.environ[name]
        else:
            os.environ[name] = before


def runs(ids: Sequence[int], labels: Sequence[int]) -> Iterator[tuple[list[int], bool]]:
    """The tokens of a sequence in runs that are learned or not."""
    for learned, run in itertools.groupby(zip(ids, labels, strict=True), key=lambda pair: pair[1] != IGNORED):
        yield [token for token, _ in run], learned
