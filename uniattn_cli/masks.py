"""From conversations to tokens and the mask of what is learned.

The mask comes from the chat template itself: what a template adds when an assistant turn is appended to the rendered
prompt is that turn, its end-of-turn token included. Where a template does not render prefixes consistently that cannot
be told, and an error is raised rather than a wrong mask returned.
"""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING

from uniattn_cli.errors import DataError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Messages = list[dict[str, str]]
Span = tuple[int, int]


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


class ChatRenderer:
    """Renders conversations with a tokenizer's chat template and marks the assistant's turns.

    A tokenizer without chat template (a base model) gets the plainest one there is: system and user turns end with a
    line end, assistant turns with EOS, nothing else is added: `{user}\\n{assistant}{eos}{user}\\n…`.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase):
        self.tokenizer = tokenizer
        self.plain = not tokenizer.chat_template

    @functools.cached_property
    def _has_generation_prompt(self) -> bool:
        """Whether the template can end with the header of a turn to be written; else the header comes with the turn."""
        if self.plain:
            return True
        probe = [{"role": "user", "content": "a"}]
        return self._render(probe, True) != self._render(probe, False)

    def text(self, messages: Messages) -> str:
        """The whole conversation as text."""
        return self._render(messages, False)

    def tokens(self, messages: Messages) -> tuple[list[int], list[bool]]:
        """Token ids of a conversation, and for each whether it belongs to an assistant turn.

        Raises:
            DataError: the template does not render prefixes consistently, or refuses the conversation.
        """
        text = self._render(messages, False)
        spans = [self._span(messages, i, text) for i, m in enumerate(messages) if m["role"] == "assistant"]
        if self.tokenizer.is_fast:
            ids, mask = self._mask_by_offsets(text, spans)
        else:
            ids, mask = self._mask_by_prefixes(text, spans)
        bos = bos_of(self.tokenizer) if self.plain else None  # a chat template writes its own
        if bos is not None and ids[:1] != [bos]:
            ids, mask = [bos, *ids], [False, *mask]
        return ids, mask

    def _render(self, messages: Messages, prompt: bool) -> str:
        if self.plain:
            end = {"assistant": self.tokenizer.eos_token or ""}
            return "".join(message["content"] + end.get(message["role"], "\n") for message in messages)
        from jinja2 import TemplateError

        try:
            return self.tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=prompt)
        except TemplateError as error:
            roles = ", ".join(message["role"] for message in messages)
            raise DataError(f"the chat template refuses a conversation of the roles {roles}: {error}") from None

    def _span(self, messages: Messages, index: int, text: str) -> Span:
        """Characters of `text` that assistant turn `index` wrote, from its first one to its end-of-turn token."""
        before = self._render(messages[:index], True)
        after = self._render(messages[: index + 1], False)
        if not (after.startswith(before) and text.startswith(after)):
            raise DataError(
                f"the tokenizer's chat template renders turn {index + 1} of a conversation differently once more "
                "turns follow, so what the assistant wrote cannot be told; use single-turn rows, loss: all, or a "
                "tokenizer with another chat template"
            )
        turn = after[len(before) :]
        start = len(before)
        if not self._has_generation_prompt:
            start += max(turn.find(messages[index]["content"].strip()), 0)
        return start, len(before) + len(turn.rstrip())

    def _mask_by_offsets(self, text: str, spans: list[Span]) -> tuple[list[int], list[bool]]:
        encoded = self.tokenizer(text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
        mask = [False] * len(encoded["input_ids"])
        spans = iter(spans)
        start, end = next(spans, (len(text) + 1, len(text) + 1))
        for position, (first, last) in enumerate(encoded["offset_mapping"]):
            while first >= end:
                start, end = next(spans, (len(text) + 1, len(text) + 1))
            mask[position] = first < last and last > start
        return encoded["input_ids"], mask

    def _mask_by_prefixes(self, text: str, spans: list[Span]) -> tuple[list[int], list[bool]]:
        ids = encode(self.tokenizer, text)
        mask = [False] * len(ids)
        for start, end in spans:
            borders = []
            for border in (start, end):
                prefix = encode(self.tokenizer, text[:border])
                if ids[: len(prefix)] != prefix:
                    raise DataError("this tokenizer merges tokens across turns; use its fast version (tokenizer.json)")
                borders.append(len(prefix))
            mask[borders[0] : borders[1]] = [True] * (borders[1] - borders[0])
        return ids, mask
