"""A teacher's distributions on disk: computed once for all rows, read in every epoch and every run with them."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from uniattn_cli.data.splits import IGNORED
from uniattn_cli.errors import StageError
from uniattn_cli.training.divergence import TopK

if TYPE_CHECKING:
    import datasets

    from uniattn_cli.training.distill import Distiller

FOLDER = "teacher"
META = "teacher.json"


def store_key(settings: dict[str, Any]) -> str:
    """Name of the folder for what these settings (data, teacher, top_k, temperature, dtype) determine."""
    return hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:16]


def row_key(tokens: Sequence[int], labels: Sequence[int]) -> int:
    """Identifies a row by its content, so that it is found again in any batch, order or packed sequence.

    The first label is left out: nothing is before it that could predict it, and packing removes it.
    """
    content = np.asarray([*tokens, *labels[1:]], dtype=np.int64).tobytes()
    return int.from_bytes(hashlib.blake2b(content, digest_size=8).digest(), "little", signed=True)


class StoredTeacher:
    """Reads what `write_teacher` wrote.

    Files: `ids.npy` int32 and `logprobs.npy` float32 [positions, k], `rest.npy` float32 [positions] (see `TopK`),
    `rows.npy` int64 [rows, 2] with each row's key and its first position; `teacher.json` says what it was made from.
    """

    def __init__(self, folder: Path):
        self.folder = folder
        load = lambda name: np.load(folder / f"{name}.npy", mmap_mode="r")  # noqa: E731
        self.ids, self.logprobs, self.rest = load("ids"), load("logprobs"), load("rest")
        self.starts = {int(key): int(start) for key, start in load("rows")}

    def lookup(self, inputs: dict[str, torch.Tensor], labels: torch.Tensor, tokens: str) -> TopK:
        """The teacher's distributions at the compared positions of a micro-batch, padded or packed.

        Args:
            tokens: which positions those are, as they were written.

        Raises:
            StageError: a row was not among those written.
        """
        found = []
        for row, targets in documents(inputs, labels):
            start = self.starts.get(row_key(row, targets))
            if start is None:
                raise StageError(f"{self.folder} lacks a row of the training data; remove the folder and run again")
            found.append(np.arange(start, start + positions(targets, tokens)))
        places = np.concatenate(found)
        device = labels.device
        return TopK(
            torch.from_numpy(self.ids[places].astype(np.int64)).to(device),
            torch.from_numpy(self.logprobs[places]).to(device),
            torch.from_numpy(self.rest[places]).to(device),
        )


def positions(labels: Sequence[int], tokens: str) -> int:
    """How many positions of a row are compared; `tokens` as `train.distillation.tokens`."""
    return len(labels) - 1 if tokens == "all" else sum(label != IGNORED for label in labels[1:])


def documents(inputs: dict[str, torch.Tensor], labels: torch.Tensor) -> list[tuple[list[int], list[int]]]:
    """Tokens and labels of each row in a micro-batch: padding is cut off, packed sequences are taken apart."""
    ids, targets = inputs["input_ids"].tolist(), labels.tolist()
    if "attention_mask" in inputs:
        lengths = inputs["attention_mask"].sum(1).tolist()
        return [(row[:length], target[:length]) for row, target, length in zip(ids, targets, lengths, strict=True)]
    found = []
    for row, target, positions in zip(ids, targets, inputs["position_ids"].tolist(), strict=True):
        starts = [index for index, position in enumerate(positions) if position == 0]
        for start, end in zip(starts, [*starts[1:], len(row)], strict=True):
            found.append((row[start:end], target[start:end]))
    return found


def write_teacher(
    folder: Path,
    distiller: Distiller,
    rows: datasets.Dataset,
    *,
    settings: dict[str, Any],
    batch_size: int,
    device: torch.device,
    advance: Callable[[int], None] = lambda steps: None,
) -> None:
    """Computes and writes the distributions at all compared positions, as a whole or not at all.

    Args:
        folder: made; what an interruption left of an earlier try is replaced.
        distiller: has the teacher.
        rows: columns `input_ids` and `labels`.
        settings: what `store_key` was given.
        batch_size: rows per forward pass.
        advance: told the number of finished rows.
    """
    counts = [positions(labels, distiller.spec.tokens) for labels in rows["labels"]]
    starts = np.concatenate([[0], np.cumsum(counts)]).astype(np.int64)
    keys = [row_key(tokens, labels) for tokens, labels in zip(rows["input_ids"], rows["labels"], strict=True)]
    partial = folder.with_name(f".{folder.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    width = min(distiller.spec.top_k, distiller.teacher.config.vocab_size)
    total = int(starts[-1])
    make = lambda name, dtype, shape: np.lib.format.open_memmap(partial / f"{name}.npy", "w+", dtype, shape)  # noqa: E731
    ids, logprobs = make("ids", np.int32, (total, width)), make("logprobs", np.float32, (total, width))
    rest = make("rest", np.float32, (total,))
    # Rows of like length share a forward pass.
    order = sorted(range(len(rows)), key=lambda index: -len(rows[index]["input_ids"]))
    for first in range(0, len(order), batch_size):
        chosen = order[first : first + batch_size]
        batch = pad_rows([rows[index] for index in chosen], device)
        found = distiller.top_k_of(batch)
        places = np.concatenate([np.arange(starts[index], starts[index + 1]) for index in chosen])
        ids[places] = found.ids.cpu().numpy()
        logprobs[places], rest[places] = found.logprobs.cpu().numpy(), found.rest.cpu().numpy()
        advance(len(chosen))
    for array in (ids, logprobs, rest):
        array.flush()
    np.save(partial / "rows.npy", np.stack([np.asarray(keys, dtype=np.int64), starts[:-1]], axis=1))
    (partial / META).write_text(json.dumps(settings, indent=1) + "\n", encoding="utf-8")
    partial.rename(folder)


def pad_rows(rows: Sequence[dict[str, list[int]]], device: torch.device) -> dict[str, torch.Tensor]:
    """Rows as one micro-batch: `input_ids`, `labels` and `attention_mask`, all [rows, longest], padded on the right."""
    pad = lambda values, value: torch.nn.utils.rnn.pad_sequence(  # noqa: E731
        [torch.tensor(each, dtype=torch.long) for each in values], batch_first=True, padding_value=value
    ).to(device)
    tokens = [row["input_ids"] for row in rows]
    return {
        "input_ids": pad(tokens, 0),
        "labels": pad([row["labels"] for row in rows], IGNORED),
        "attention_mask": pad([[1] * len(row) for row in tokens], 0),
    }
