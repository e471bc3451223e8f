"""Data of every stage: training rows with their masks, calibration and held-out windows, multiple-choice items.

Rows come from `rows` (files, hub) or `corpus` (built in). Held-out rows are chosen by a hash of their content, so that
a row is on the same side in every stage, with every seed, and whatever rows are added around it. torch, transformers
and datasets are imported where they are used.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import math
import random
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from uniattn_cli import corpus
from uniattn_cli.errors import DataError
from uniattn_cli.masks import ChatRenderer, add_eos, bos_of, encode, eos_of
from uniattn_cli.recipe import DatasetSpec, DataSpec
from uniattn_cli.rows import BUILTIN, read_choices, read_rows

if TYPE_CHECKING:
    import datasets
    import torch
    from transformers import PreTrainedTokenizerBase

IGNORED = -100  # label of a token that is not learned
_BATCH = 256  # rows tokenised at once


def load_rows(
    specs: Sequence[DatasetSpec], part: Literal["train", "heldout"], *, holdout: float, seed: int
) -> datasets.Dataset:
    """The training or the held-out rows of one or several sources, normalised.

    A row is held out if a hash of its content falls below `holdout`: duplicates never straddle, the two parts are
    disjoint, and neither the seed nor other rows change the side of a row. Built-in rows have a held-out part of
    their own. The seed shuffles training rows; held-out rows come in the order of their hashes, so that any first
    few are the same sample in every run.

    Returns:
        Columns `messages` (list of role and content) and `text`, one of them None per row (a column that is None
        everywhere is left out), and `source`.

    Raises:
        DataError: a source cannot be read, or no row is left in the part.
    """
    import datasets

    heldout = part == "heldout"
    found = [(_hash(row), row) for spec in specs for row in _part_rows(spec, heldout, holdout)]
    if not found:
        names = ", ".join(spec.source for spec in specs)
        hint = "raise data.holdout or name more rows" if heldout else "name more rows"
        raise DataError(f"{names}: no {'held-out' if heldout else 'training'} row at data.holdout {holdout}; {hint}")
    found.sort(key=lambda pair: pair[0])
    if not heldout:
        random.Random(seed).shuffle(found)
    columns: dict[str, list] = {key: [row[key] for _, row in found] for key in ("messages", "text", "source")}
    features = {
        "messages": datasets.List({"role": datasets.Value("string"), "content": datasets.Value("string")}),
        "text": datasets.Value("string"),
        "source": datasets.Value("string"),
    }
    used = {key: values for key, values in columns.items() if any(value is not None for value in values)}
    return datasets.Dataset.from_dict(used, features=datasets.Features({key: features[key] for key in used}))


def source_counts(rows: datasets.Dataset) -> dict[str, int]:
    """Rows per source, in the order of the names; for printing and for the record of a stage."""
    names = list(rows["source"])
    return {name: names.count(name) for name in sorted(set(names))}


def _hash(row: dict[str, Any]) -> str:
    content = json.dumps([row["messages"], row["text"]], ensure_ascii=False, sort_keys=True)
    return hashlib.sha256(content.encode("utf-8", "surrogatepass")).hexdigest()


def _part_rows(spec: DatasetSpec, heldout: bool, holdout: float) -> Iterator[dict[str, Any]]:
    if spec.source == BUILTIN:
        yield from _builtin_rows(spec, "heldout" if heldout else "train")
        return
    for row in read_rows(spec):
        if (int(_hash(row)[:13], 16) / 16**13 < holdout) == heldout:
            yield {**row, "source": spec.source}


def _builtin_rows(spec: DatasetSpec, part: str) -> Iterator[dict[str, Any]]:
    """Rows of the built-in corpus: instructions, or its text where the format says so."""
    if spec.split or spec.config or spec.format not in ("auto", "messages", "text"):
        raise DataError("the built-in data has no split or config, and only the formats messages and text")
    if spec.format == "text":
        rows = [{"messages": None, "text": text} for text in corpus.text(part)]
    else:
        rows = [{"messages": row["messages"], "text": None} for row in corpus.instructions(part)]
    for row in rows[: spec.limit]:
        yield {**row, "source": BUILTIN}


# Training rows


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
    """

    dataset: datasets.Dataset
    rows: int
    used: int
    dropped: int
    truncated: int
    tokens: int
    supervised: int

    @property
    def share(self) -> float:
        """Share of the tokens that are learned, 0 to 1."""
        return self.supervised / self.tokens if self.tokens else 0.0


def tokenize(
    rows: datasets.Dataset,
    tokenizer: PreTrainedTokenizerBase,
    *,
    max_length: int,
    loss: Literal["responses", "all"],
) -> Tokenised:
    """Tokens and labels of normalised rows.

    With `responses` every assistant turn is learned, its end-of-turn token included and everything else masked; text
    rows are learned in full. Conversations are rendered with the tokenizer's chat template (`masks.ChatRenderer`
    tells what happens without one), text rows end with EOS. Longer rows are cut at `max_length` tokens.

    Raises:
        DataError: the chat template cannot be masked reliably, or no row has anything to learn.
    """
    import datasets

    renderer, bos, eos = ChatRenderer(tokenizer), bos_of(tokenizer), eos_of(tokenizer)
    inputs, labels, truncated = [], [], 0
    for start in range(0, len(rows), _BATCH):
        batch = rows[start : start + _BATCH]
        for messages, text in zip(_column(batch, "messages"), _column(batch, "text"), strict=True):
            if messages is None:
                ids = add_eos(encode(tokenizer, text), eos)
                ids = ids if bos is None or ids[:1] == [bos] else [bos, *ids]
                mask = [True] * len(ids)
            else:
                ids, mask = renderer.tokens(messages)
                mask = mask if loss == "responses" else [True] * len(ids)
            truncated += len(ids) > max_length
            ids, mask = ids[:max_length], mask[:max_length]
            if any(mask):
                inputs.append(ids)
                labels.append([token if learned else IGNORED for token, learned in zip(ids, mask, strict=True)])
    if not inputs:
        raise DataError(
            f"none of the {len(rows)} rows has a token to learn within {max_length} tokens; "
            "raise train.max_length, or check that the rows have assistant turns"
        )
    integers = datasets.Features({key: datasets.List(datasets.Value("int32")) for key in ("input_ids", "labels")})
    return Tokenised(
        dataset=datasets.Dataset.from_dict({"input_ids": inputs, "labels": labels}, features=integers),
        rows=len(rows),
        used=len(inputs),
        dropped=len(rows) - len(inputs),
        truncated=truncated,
        tokens=sum(map(len, inputs)),
        supervised=sum(label != IGNORED for row in labels for label in row),
    )


def _column(batch: dict[str, list], name: str) -> list:
    return batch.get(name) or [None] * len(next(iter(batch.values())))


# Windows of text


def windows(
    documents: Iterable[str] | datasets.Dataset,
    tokenizer: PreTrainedTokenizerBase,
    *,
    tokens: int,
    length: int,
    skip: int = 0,
) -> torch.Tensor:
    """Packs documents, separated by EOS, into windows of exactly `length` tokens.

    Args:
        documents: texts, or normalised rows (conversations are rendered with the chat template).
        tokenizer: each window begins with BOS if this tokenizer puts one in front of a text.
        tokens: tokens wanted; whole windows within it are returned, at least one, or fewer if the text runs out.
        length: tokens per window.
        skip: tokens of the packed stream to leave out first. Windows asked for with `skip` share nothing with those
            of a call that asked for at most `skip` tokens, whatever the lengths.

    Returns:
        LongTensor [n, length].

    Raises:
        DataError: not even one window can be filled.
    """
    import torch

    bos, eos = bos_of(tokenizer), eos_of(tokenizer)
    payload = length - (bos is not None)
    end = skip + max(1, tokens // length) * payload
    stream: list[int] = []
    for text in _texts(documents, tokenizer):
        ids = add_eos(encode(tokenizer, text), eos)
        stream.extend(ids[1:] if bos is not None and ids[0] == bos else ids)
        if len(stream) >= end:
            break
    total, stream = len(stream), stream[skip:end]
    count = len(stream) // payload
    if not count:
        raise DataError(
            f"the text has {total} tokens, which is less than one window of {length}"
            + (f" after the first {skip}" if skip else "")
            + "; name more text in data.*, or ask for shorter windows"
        )
    packed = torch.tensor(stream[: count * payload], dtype=torch.long).view(count, payload)
    if bos is None:
        return packed
    return torch.cat([torch.full((count, 1), bos, dtype=torch.long), packed], dim=1)


def calibration_windows(
    data: DataSpec, tokenizer: PreTrainedTokenizerBase, *, tokens: int, length: int, seed: int, skip: int = 0
) -> torch.Tensor:
    """Windows for analysis and fit, [n, length]: never from held-out rows or held-out text.

    From `data.calibration` if given, else from the training rows, rendered with the chat template. Where these are
    the built-in ones, built-in text and instructions are mixed about 2:1, so that the fit sees both text and chat.
    Documents are shuffled by the seed. In a share `data.repeat` of the windows, evenly spread, the second half repeats
    the first. For `skip` and errors see `windows`.
    """
    specs = data.train if data.calibration is None else data.calibration
    if all(spec.source == BUILTIN for spec in specs):
        rows = load_rows(specs, "train", holdout=data.holdout, seed=seed)
        text = corpus.text("calibration")
        random.Random(seed).shuffle(text)
        documents: Iterable[str] = _mix(text, _texts(rows, tokenizer))
    elif data.calibration is None:
        documents = _texts(load_rows(specs, "train", holdout=data.holdout, seed=seed), tokenizer)
    else:
        documents = list(_documents(specs, tokenizer, "calibration"))
        random.Random(seed).shuffle(documents)
    return repeat_passages(windows(documents, tokenizer, tokens=tokens, length=length, skip=skip), data.repeat)


def repeat_passages(windows: torch.Tensor, share: float) -> torch.Tensor:
    """Windows [n, length] of which a share, evenly spread, hold their first half twice.

    Heads that copy from earlier text hardly act in short passages, so that their loss would go unnoticed.
    """
    windows = windows.clone()
    half = windows.shape[1] // 2
    for index, window in enumerate(windows):
        if math.floor((index + 1) * share) > math.floor(index * share):
            window[half : 2 * half] = window[:half].clone()
    return windows


def heldout_windows(data: DataSpec, tokenizer: PreTrainedTokenizerBase, *, tokens: int, length: int) -> torch.Tensor:
    """Windows of `data.text` for perplexity, [n, length], in the order of the source; for errors see `windows`.

    Raises:
        DataError: also if a source of `data.text` is one of those of training or calibration.
    """
    used = {(spec.source, spec.config, spec.split) for spec in (*data.train, *(data.calibration or ()))}
    for spec in data.text:
        if spec.source != BUILTIN and (spec.source, spec.config, spec.split) in used:
            raise DataError(f"data.text: {spec.source} is also used for training or calibration; name other text")
    return windows(_documents(data.text, tokenizer, "heldout"), tokenizer, tokens=tokens, length=length)


def _mix(text: Iterable[str], chat: Iterable[str]) -> Iterator[str]:
    """Interleaves documents so that about two thirds of the characters are text, until one kind runs out."""
    given, sources = {"text": 0, "chat": 0}, {"text": iter(text), "chat": iter(chat)}
    while True:
        kind = "text" if given["text"] <= 2 * given["chat"] else "chat"
        document = next(sources[kind], None)
        if document is None:
            yield from itertools.chain(*sources.values())
            return
        given[kind] += len(document)
        yield document


def _documents(specs: Sequence[DatasetSpec], tokenizer: PreTrainedTokenizerBase, part: str) -> Iterator[str]:
    """Texts of all rows of the sources; the built-in source gives its text of the part."""
    for spec in specs:
        if spec.source == BUILTIN:
            yield from corpus.text(part)[: spec.limit]
        else:
            yield from _texts(read_rows(spec, whole_text=True), tokenizer)


def _texts(rows: Iterable[str | dict[str, Any]], tokenizer: PreTrainedTokenizerBase) -> Iterator[str]:
    renderer = ChatRenderer(tokenizer)
    for row in rows:
        if isinstance(row, str):
            yield row
        elif row.get("messages"):
            yield renderer.text(row["messages"])
        else:
            yield row["text"]


# Multiple choice


def load_choices(name: str) -> list[dict[str, Any]]:
    """Multiple-choice items of `builtin:TASK` or of a local .jsonl file.

    Returns:
        Rows with `id`, `query` (the prompt), `choices` (each scored as its continuation after one blank) and `gold`
        (index of the right one).

    Raises:
        DataError: unknown task, missing file, or a row that is not such an item.
    """
    if name.startswith(f"{BUILTIN}:"):
        return corpus.multiple_choice(name.removeprefix(f"{BUILTIN}:"))
    return read_choices(Path(name))
