"""A teacher's distributions on disk: computed once for all rows, read in every epoch and every run with them."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from uniattn_cli.data.sequences import row_key
from uniattn_cli.errors import StageError
from uniattn_cli.models.losses import IGNORED
from uniattn_cli.training.divergence import TopK

FOLDER = "teacher"
META = "teacher.json"


def store_key(settings: dict[str, Any]) -> str:
    """Name of the folder for what these settings (data, teacher, top_k, temperature, dtype) determine."""
    return hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:16]


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
        ranges = []
        for row, targets in documents(inputs, labels):
            start = self.starts.get(row_key(row, targets))
            if start is None:
                raise StageError(f"{self.folder} lacks a row of the training data; remove the folder and run again")
            ranges.append(np.arange(start, start + positions(targets, tokens)))
        places = np.concatenate(ranges)
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
    parts = []
    for row, target, positions in zip(ids, targets, inputs["position_ids"].tolist(), strict=True):
        starts = [index for index, position in enumerate(positions) if position == 0]
        for start, end in zip(starts, [*starts[1:], len(row)], strict=True):
            parts.append((row[start:end], target[start:end]))
    return parts


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
