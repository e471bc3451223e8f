"""Windows of text: of the calibration tokens and of what is held out."""

from __future__ import annotations

import itertools
import math
import random
from collections.abc import Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

from uniattn_cli.data import builtin
from uniattn_cli.data.chat import ChatRenderer
from uniattn_cli.data.encoding import add_eos, bos_of, encode, eos_of
from uniattn_cli.data.rows import BUILTIN, read_rows
from uniattn_cli.data.screen import Screen
from uniattn_cli.data.sources import origins
from uniattn_cli.data.splits import load_mix, shuffled_rows
from uniattn_cli.errors import DataError
from uniattn_cli.recipe.schema import DatasetSpec, DataSpec

if TYPE_CHECKING:
    import datasets
    import torch
    from transformers import PreTrainedTokenizerBase


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
            f"the text has only {total} tokens, fewer than one window of {length}"
            + (f" after the first {skip}" if skip else "")
            + "; add more text in data.*, or use shorter windows"
        )
    packed = torch.tensor(stream[: count * payload], dtype=torch.long).view(count, payload)
    if bos is None:
        return packed
    return torch.cat([torch.full((count, 1), bos, dtype=torch.long), packed], dim=1)


def calibration_windows(
    data: DataSpec,
    tokenizer: PreTrainedTokenizerBase,
    *,
    tokens: int,
    length: int,
    seed: int,
    skip: int = 0,
    screen: Screen | None = None,
) -> torch.Tensor:
    """Windows for analysis and fit, [n, length]: never from held-out rows or held-out text.

    From `data.calibration` if given, else from the training rows, rendered with the chat template. Where these are
    the built-in ones, built-in text and instructions are mixed about 2:1, so that the fit sees both text and chat.
    Weights hold for calibration too, but no row comes twice. Documents are shuffled by the seed. In a share
    `data.repeat` of the windows, evenly spread, the second half repeats the first. For `skip` and errors see `windows`;
    `screen` leaves out rows that cannot be used, None is one that tells nobody.
    """
    screen = screen or Screen(data, tokenizer)
    specs = data.train if data.calibration is None else data.calibration
    if all(spec.source == BUILTIN for spec in specs):
        rows = load_mix(specs, "train", holdout=data.holdout, seed=seed, repeat=False, screen=screen).rows
        text = builtin.text("calibration")
        random.Random(seed).shuffle(text)
        documents: Iterable[str] = _mix(text, _texts(rows, tokenizer))
    elif data.calibration is None:
        rows = load_mix(specs, "train", holdout=data.holdout, seed=seed, repeat=False, screen=screen).rows
        documents = _texts(rows, tokenizer)
    else:
        documents = _texts(shuffled_rows(specs, seed, screen), tokenizer)
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


def heldout_windows(
    data: DataSpec, tokenizer: PreTrainedTokenizerBase, *, tokens: int, length: int, screen: Screen | None = None
) -> torch.Tensor:
    """Windows of `data.text` for perplexity, [n, length], in the order of the source; for errors see `windows`.

    `screen` leaves out rows that cannot be used, None is one that tells nobody.

    Raises:
        DataError: also if `data.text` reads a file or a split of the hub that training or calibration reads.
    """
    others = [spec for spec in (*data.train, *(data.calibration or ())) if spec.source != BUILTIN]
    used = set().union(*map(origins, others))
    for spec in data.text:
        if spec.source != BUILTIN and not used.isdisjoint(origins(spec)):
            raise DataError(f"data.text: {spec.source} is also used for training or calibration; use other text")
    documents = _documents(data.text, tokenizer, screen or Screen(data, tokenizer))
    return windows(documents, tokenizer, tokens=tokens, length=length)


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


def _documents(specs: Sequence[DatasetSpec], tokenizer: PreTrainedTokenizerBase, screen: Screen) -> Iterator[str]:
    """Held-out texts of the sources, no more of which are read than are asked for."""
    for spec in specs:
        if spec.source == BUILTIN:
            yield from builtin.text("heldout")[: spec.limit]
        else:
            yield from _texts(read_rows(spec, whole_text=True, screen=screen), tokenizer)


def _texts(rows: Iterable[str | dict[str, Any]], tokenizer: PreTrainedTokenizerBase) -> Iterator[str]:
    renderer = ChatRenderer(tokenizer)
    for row in rows:
        if isinstance(row, str):
            yield row
        elif row.get("messages"):
            yield renderer.text(row["messages"])
        else:
            yield row["text"]
