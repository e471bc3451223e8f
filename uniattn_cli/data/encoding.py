"""From text to token ids, with the special tokens where they belong."""

from __future__ import annotations

from typing import TYPE_CHECKING

from uniattn_cli.errors import DataError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def encode(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    """Token ids of a text, without the special tokens that the tokenizer would put around it."""
    return tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]


def bos_of(tokenizer: PreTrainedTokenizerBase) -> int | None:
    """Id of BOS if the tokenizer puts one in front of a text, else None."""
    ids = tokenizer("a", verbose=False)["input_ids"]
    return ids[0] if ids and ids[0] == tokenizer.bos_token_id else None


def eos_of(tokenizer: PreTrainedTokenizerBase) -> int:
    """Id of the end-of-text token.

    Raises:
        DataError: the tokenizer has none.
    """
    if tokenizer.eos_token_id is None:
        raise DataError("the tokenizer has no end-of-text token; set eos_token in its tokenizer_config.json")
    return tokenizer.eos_token_id


def add_eos(ids: list[int], eos: int) -> list[int]:
    """Appends EOS unless a chat template already ended the document with one (perhaps before a line end)."""
    return ids if eos in ids[-2:] else [*ids, eos]
