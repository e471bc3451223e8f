"""The model and the texts of the benchmarks that measure losses."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from uniattn_cli.data.encoding import encode

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

TEXT_TOKENS, WIKITEXT_TOKENS = 30 * 1024, 64 * 1024


def add_options(parser: argparse.ArgumentParser, seeds: Sequence[int] = ()) -> None:
    """Options for the model, the texts and, where there are several, the seeds."""
    parser.add_argument("model", help="directory or hub id")
    parser.add_argument("--text", type=Path, required=True, help="JSONL with a column `text`")
    parser.add_argument("--wikitext", type=Path, required=True, help="plain text")
    if seeds:
        parser.add_argument("--seeds", nargs="*", type=int, default=list(seeds))


def split_pages(
    tokenizer: PreTrainedTokenizerBase, path: Path, rest: Path, *, tokens: int, length: int
) -> torch.Tensor:
    """Evaluation windows, [windows, length], from the first pages of a JSONL file; the other pages go into `rest`.

    Raises:
        SystemExit: the file has fewer tokens.
    """
    pages = iter([json.loads(line)["text"] for line in path.read_text(encoding="utf-8").splitlines()])
    ids: list[int] = []
    for page in pages:
        ids += [*encode(tokenizer, page), tokenizer.eos_token_id]
        if len(ids) >= tokens:
            break
    else:
        sys.exit(f"error: {path} has {len(ids):,} tokens, and {tokens:,} are needed")
    rest.write_text("".join(json.dumps({"text": page}) + "\n" for page in pages), encoding="utf-8")
    return _windows(ids[:tokens], length)


def text_windows(tokenizer: PreTrainedTokenizerBase, path: Path, *, tokens: int, length: int) -> torch.Tensor:
    """Evaluation windows, [windows, length], from the start of a text file."""
    return _windows(encode(tokenizer, path.read_text(encoding="utf-8"))[:tokens], length)


def _windows(ids: Sequence[int], length: int) -> torch.Tensor:
    return torch.tensor(ids[: len(ids) // length * length]).view(-1, length)
