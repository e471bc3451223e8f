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
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from uniattn_cli.data import builtin
from uniattn_cli.data.chat import ChatRenderer, add_eos, bos_of, encode, eos_of
from uniattn_cli.data.mixing import Share, draw, shares
from uniattn_cli.data.rows import BUILTIN, read_choices, read_rows
from uniattn_cli.data.sequences import IGNORED, Tokenised, tokenize
from uniattn_cli.errors import DataError
from uniattn_cli.recipe.schema import DatasetSpec, DataSpec

if TYPE_CHECKING:
    import datasets
    import torch
    from transformers import PreTrainedTokenizerBase

__all__ = [
    "IGNORED", "Tokenised", "calibration_windows", "heldout_windows", "load_choices", "load_mix", "load_rows",
    "repeat_passages", "source_counts", "tokenize", "windows",
]  # fmt: skip


def load_rows(
    specs: Sequence[DatasetSpec], part: Literal["train", "heldout"], *, holdout: float, seed: int, repeat: bool = True
) -> datasets.Dataset:
    """The training or the held-out rows of one or several sources, normalised; `load_mix` without its counts."""
    return load_mix(specs, part, holdout=holdout, seed=seed, repeat=repeat)[0]


def load_mix(
    specs: Sequence[DatasetSpec], part: Literal["train", "heldout"], *, holdout: float, seed: int, repeat: bool = True
) -> tuple[datasets.Dataset, list[Share]]:
    """The training or the held-out rows of one or several sources, normalised, and what each source gave.

    A row is held out if a hash of its content falls below `holdout`: duplicates never straddle, the two parts are
    disjoint, and neither the seed nor other rows change the side of a row. Built-in rows have a held-out part of
    their own; of a source with `heldout: false` every row is a training row that no other source holds out. The seed
    shuffles training rows; held-out rows come in the order of their hashes, so that any first few are the same sample
    in every run. Weights mix training rows (see `mixing`) and leave held-out ones alone, so that losses of other mixes
    stay comparable.

    Args:
        repeat: whether a source with fewer rows than its share gives them several times; otherwise each row comes
            once, and such a source runs out before the end.

    Returns:
        Columns `messages` (list of role and content) and `text`, one of them None per row (a column that is None
        everywhere is left out), and `source`.

    Raises:
        DataError: a source cannot be read, or no row is left in the part.
    """
    heldout = part == "heldout"
    specs = [spec for spec in specs if spec.heldout or not heldout]
    kept_back: set[str] = set()
    # In the order of hashes, so that the order of a file decides nothing.
    read = [sorted(_part_rows(spec, heldout, holdout, kept_back), key=_first) for spec in specs]
    if not heldout and not all(spec.heldout for spec in specs):
        read = [[pair for pair in rows if pair[0] not in kept_back] for rows in read]
    names = [label(spec) for spec in specs]
    weights = [None if heldout else spec.weight for spec in specs]
    empty = [name for name, rows, weight in zip(names, read, weights, strict=True) if weight and not rows]
    if empty or not any(read):
        hint = "raise data.holdout or name more rows" if heldout else "name more rows"
        raise DataError(
            f"{', '.join(empty or names)}: no {'held-out' if heldout else 'training'} row at data.holdout {holdout}; "
            f"{hint}"
        )
    drawn = shares([len(rows) for rows in read], weights)
    mixed = [Share(*parts) for parts in zip(names, map(len, read), drawn, weights, strict=True)]
    found = [pair for rows, count in zip(read, drawn, strict=True) if rows for pair in draw(rows, count, seed)]
    found.sort(key=_first)
    if not heldout:
        random.Random(seed).shuffle(found)
    if not repeat:
        found = list({id(row): (digest, row) for digest, row in found}.values())
    return _dataset([row for _, row in found]), mixed


def _dataset(rows: Sequence[dict[str, Any]]) -> datasets.Dataset:
    import datasets

    columns: dict[str, list] = {key: [row[key] for row in rows] for key in ("messages", "text", "source")}
    features = {
        "messages": datasets.List({"role": datasets.Value("string"), "content": datasets.Value("string")}),
        "text": datasets.Value("string"),
        "source": datasets.Value("string"),
    }
    used = {key: values for key, values in columns.items() if any(value is not None for value in values)}
    return datasets.Dataset.from_dict(used, features=datasets.Features({key: features[key] for key in used}))


def _first(pair: tuple[str, Any]) -> str:
    return pair[0]


def label(spec: DatasetSpec) -> str:
    """The name of a data set in counts: its source, and what else tells it from others of that source."""
    details = [detail for detail in (spec.config, spec.split) if detail]
    return spec.source + (f" ({', '.join(details)})" if details else "")


def source_counts(rows: datasets.Dataset) -> dict[str, int]:
    """Rows per source, in the order of the names; for printing and for the record of a stage."""
    names = list(rows["source"])
    return {name: names.count(name) for name in sorted(set(names))}


def _hash(row: dict[str, Any]) -> str:
    content = json.dumps([row["messages"], row["text"]], ensure_ascii=False, sort_keys=True)
    return hashlib.sha256(content.encode("utf-8", "surrogatepass")).hexdigest()


def _part_rows(
    spec: DatasetSpec, heldout: bool, holdout: float, kept_back: set[str]
) -> Iterator[tuple[str, dict[str, Any]]]:
    """Hash and row of those in the part; `kept_back` gets the hashes of rows that the source holds out."""
    if spec.source == BUILTIN:
        for row in _builtin_rows(spec, "heldout" if heldout else "train"):
            yield _hash(row), row
        return
    for row in read_rows(spec):
        digest = _hash(row)
        held = spec.heldout and int(digest[:13], 16) / 16**13 < holdout
        if held:
            kept_back.add(digest)
        if held == heldout:
            yield digest, {**row, "source": label(spec)}


def _builtin_rows(spec: DatasetSpec, part: str) -> Iterator[dict[str, Any]]:
    """Rows of the built-in corpus: instructions, or its text where the format says so."""
    if spec.split or spec.config or spec.columns or spec.format not in ("auto", "messages", "text"):
        raise DataError("the built-in data has no split, config or columns, and only the formats messages and text")
    if spec.format == "text":
        rows = [{"messages": None, "text": text} for text in builtin.text(part)]
    else:
        rows = [{"messages": row["messages"], "text": None} for row in builtin.instructions(part)]
    for row in rows[: spec.limit]:
        yield {**row, "source": BUILTIN}


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
    Weights hold for calibration too, but no row comes twice. Documents are shuffled by the seed. In a share
    `data.repeat` of the windows, evenly spread, the second half repeats the first. For `skip` and errors see `windows`.
    """
    specs = data.train if data.calibration is None else data.calibration
    if all(spec.source == BUILTIN for spec in specs):
        rows = load_rows(specs, "train", holdout=data.holdout, seed=seed, repeat=False)
        text = builtin.text("calibration")
        random.Random(seed).shuffle(text)
        documents: Iterable[str] = _mix(text, _texts(rows, tokenizer))
    elif data.calibration is None:
        rows = load_rows(specs, "train", holdout=data.holdout, seed=seed, repeat=False)
        documents = _texts(rows, tokenizer)
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
            yield from builtin.text(part)[: spec.limit]
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
        return builtin.multiple_choice(name.removeprefix(f"{BUILTIN}:"))
    return read_choices(Path(name))
