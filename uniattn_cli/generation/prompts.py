"""From what a user says to the tokens that a model gets."""

from __future__ import annotations

from typing import TYPE_CHECKING

from uniattn_cli.data.chat import EXPRESSIONS, Messages
from uniattn_cli.data.encoding import bos_of, encode
from uniattn_cli.errors import DataError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def chat_ids(tokenizer: PreTrainedTokenizerBase, messages: Messages) -> list[int]:
    """Tokens of a conversation up to where the assistant begins to speak.

    A tokenizer without chat template gets the plain form that training uses for it (see `data.chat.ChatRenderer`).

    Raises:
        DataError: the template refuses the conversation, or it is no text.
    """
    if not tokenizer.chat_template:
        end = {"assistant": tokenizer.eos_token or ""}
        return plain_ids(tokenizer, "".join(turn["content"] + end.get(turn["role"], "\n") for turn in messages))
    from jinja2 import TemplateError

    try:
        text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    except (TemplateError, *EXPRESSIONS) as error:
        roles = ", ".join(turn["role"] for turn in messages)
        raise DataError(f"the chat template rejects a conversation with the roles {roles}: {error}") from None
    return _ids(tokenizer, str(text))


def plain_ids(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    """Tokens of a text to be continued, with the token in front that the tokenizer puts before every text.

    Raises:
        DataError: it is no text.
    """
    ids, bos = _ids(tokenizer, text), bos_of(tokenizer)
    return ids if bos is None or ids[:1] == [bos] else [bos, *ids]


def _ids(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:  # what Python makes of bytes on the command line that are no characters
        raise DataError("the prompt is not UTF-8 text") from None
    return encode(tokenizer, text)
