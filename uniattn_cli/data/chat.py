"""From conversations to tokens and the mask of what is learned.

The mask comes from the chat template itself: what a template adds when an assistant turn is appended to the rendered
prompt is that turn, its end-of-turn token included. A template that changes earlier turns once more follow (which drops
what a reasoning model thought, say) never shows the model all its answers in the form in which it gives them: such a
conversation becomes one sequence per answer, each as the model will see it. Where it cannot be told what the assistant
wrote, an error is raised rather than a wrong mask returned. Messages have the form of `conversations`.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Sequence
from typing import TYPE_CHECKING

from uniattn_cli.data import templates
from uniattn_cli.data.conversations import THOUGHTS, Message
from uniattn_cli.data.encoding import encode
from uniattn_cli.errors import DataError
from uniattn_cli.models.tokenizer import load_tokenizer

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from uniattn_cli.models.hub import Source

Messages = list[Message]
Span = tuple[int, int]
# What a turn may hold that no template writes: where it appears, what the turn says does.
MARK = "\ue000"
# What an expression in a template may raise.
EXPRESSIONS = (ArithmeticError, AttributeError, LookupError, TypeError, ValueError)
# For templates that tell the model the date: with today's, no two days would train on the same tokens. A macro goes
# before the function of that name.
DATE = {"%d": "26", "%b": "Jul", "%B": "July", "%m": "07", "%Y": "2024", "%y": "24", "%A": "Friday", "%a": "Fri"}
SAME_DATE = (
    "{%- macro strftime_now(format) -%}{{ format"
    + "".join(f" | replace('{code}', '{value}')" for code, value in DATE.items())
    + " }}{%- endmacro %}{{ '' }}"
)


def load_chat_tokenizer(source: Source, chat_template: str | None) -> PreTrainedTokenizerBase:
    """The tokenizer that belongs to a model, with the chat template of a recipe.

    Args:
        source: result of `locate`.
        chat_template: `data.chat_template` of the recipe, which replaces the tokenizer's own; None leaves it.

    Raises:
        ModelError: as `load_tokenizer`.
        DataError: there is no such template.
    """
    tokenizer = load_tokenizer(source)
    templates.apply(tokenizer, chat_template)
    return tokenizer


class ChatRenderer:
    """Renders conversations with a tokenizer's chat template and marks the assistant's turns.

    A tokenizer without chat template (a base model) gets the plainest one there is (`templates.PLAIN`): system and user
    turns end with a line end, assistant turns with EOS, nothing else is added: `{user}\\n{assistant}{eos}{user}\\n…`.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase):
        self.tokenizer = tokenizer
        template = tokenizer.get_chat_template() if tokenizer.chat_template else templates.default(tokenizer)
        self.template = (SAME_DATE if "strftime_now" in template else "") + template

    @functools.cached_property
    def _has_generation_prompt(self) -> bool:
        """Whether the template can end with the header of a turn to be written; else the header comes with the turn."""
        if self.template == templates.default(self.tokenizer):
            return True  # a header of no characters
        probe = [{"role": "user", "content": "a"}]
        return self._render(probe, True) != self._render(probe, False)

    def text(self, messages: Messages) -> str:
        """The whole conversation as text."""
        return self._render(messages, False)

    def prompt(self, messages: Messages) -> str:
        """The conversation up to where the assistant begins to write."""
        return self._render(messages, True)

    def turn_end(self) -> int | None:
        """The special token that the template puts behind an answer; None where it is another kind of text."""
        answer = "answer"
        text = self.text([{"role": "user", "content": "question"}, {"role": "assistant", "content": answer}])
        place = text.rfind(answer)
        ids = encode(self.tokenizer, text[place + len(answer) :]) if place >= 0 else []
        known = self.tokenizer.added_tokens_decoder.get(ids[0]) if ids else None
        return ids[0] if known is not None and known.special else None

    def ids(self, messages: Messages) -> list[int]:
        """Token ids of the whole conversation."""
        return encode(self.tokenizer, self.text(messages))

    def sequences(self, messages: Messages) -> list[tuple[list[int], list[bool]]]:
        """Token ids of a conversation, and for each whether it belongs to an assistant turn.

        Returns:
            One pair; or one for each assistant turn, with only that turn marked, if the template changes a turn once
            more turns follow.

        Raises:
            DataError: it cannot be told what the assistant wrote, or the template refuses the conversation.
        """
        return self.masked(self.rendered(messages))

    def rendered(self, messages: Messages) -> list[tuple[str, list[Span]]]:
        """The texts of a conversation and the characters in them that are learned, for `masked`; see `sequences`."""
        text = self._render(messages, False)
        turns = [
            self._turn(messages, index, text) for index in _answers(messages) if messages[index].get("train", True)
        ]
        if all(text.startswith(upto) for upto, _ in turns):
            return [(text, [span for _, span in turns])]
        return [(upto, [span]) for upto, span in turns]

    def hidden(self, messages: Messages) -> tuple[str, list[Span]]:
        """The whole conversation as text, and the characters of its answers that are not to be learned.

        Raises:
            DataError: as `sequences`, also where the template changes an answer once more turns follow.
        """
        text = self._render(messages, False)
        turns = [
            self._turn(messages, index, text) for index in _answers(messages) if not messages[index].get("train", True)
        ]
        if not all(text.startswith(upto) for upto, _ in turns):
            raise DataError(
                "the chat template changes earlier turns, so an answer that is not to be learned cannot be located; "
                "set another data.chat_template, or train.loss: responses"
            )
        return text, [span for _, span in turns]

    def unseen(self, messages: Messages) -> list[str]:
        """The names of what messages hold, but the template does not show: beside text, and whole turns.

        Raises:
            DataError: the template refuses the conversation.
        """
        found = []
        for name in ("tools", "tool_calls", *THOUGHTS):
            places = [index for index, message in enumerate(messages) if name in message]
            if places:
                # Some templates show the thoughts of the last answer only, and each answer is the last once.
                upto = messages if name == "tools" else messages[: places[-1] + 1]
                bare = [{key: value for key, value in message.items() if key != name} for message in upto]
                found += [name] if self._render(upto, False) == self._render(bare, False) else []
        text = self._render(messages, False)
        for role in ("system", "user", "tool"):
            place = next((index for index, message in enumerate(messages) if message["role"] == role), None)
            if place is not None:
                other = [*messages[:place], {**messages[place], "content": MARK}, *messages[place + 1 :]]
                found += [f"{role} turns"] if self._render(other, False) == text else []
        return found

    def masked(self, texts: Sequence[tuple[str, list[Span]]]) -> list[tuple[list[int], list[bool]]]:
        """Token ids and masks of rendered texts; many at once are quicker, as all cores work on them."""
        if not texts:
            return []
        if not self.tokenizer.is_fast:
            return [self._mask_by_prefixes(text, spans) for text, spans in texts]
        encoded = self.tokenizer(
            [text for text, _ in texts], add_special_tokens=False, return_offsets_mapping=True, verbose=False
        )
        found = zip(encoded["input_ids"], encoded["offset_mapping"], texts, strict=True)
        return [(ids, _mask(offsets, spans)) for ids, offsets, (_, spans) in found]

    def _render(self, messages: Messages, prompt: bool) -> str:
        from jinja2 import TemplateError

        if not messages:
            return ""  # nothing is left of a conversation in which only the assistant speaks
        try:
            text = self.tokenizer.apply_chat_template(
                [_handed(message) for message in messages],
                tools=messages[0].get("tools"),
                chat_template=self.template,
                tokenize=False,
                add_generation_prompt=prompt,
            )
            return str(text)
        except (TemplateError, *EXPRESSIONS) as error:
            roles = ", ".join(message["role"] for message in messages)
            raise DataError(f"the chat template rejects a conversation with the roles {roles}: {error}") from None

    def _turn(self, messages: Messages, index: int, whole: str) -> tuple[str, Span]:
        """The conversation up to assistant turn `index`, and the characters of it that this turn wrote.

        They go from the first one after the header to the end-of-turn token. `whole` is the whole conversation.
        """
        before = self._render(messages[:index], True)
        upto = whole if index == len(messages) - 1 else self._render(messages[: index + 1], False)
        turn = upto[len(before) :]
        start = len(before) if upto.startswith(before) else -1
        if start >= 0 and not self._has_generation_prompt:
            skipped = self._header(messages, index, len(before), turn)
            start = start + skipped if skipped >= 0 else -1
        if start < 0:
            raise DataError(
                f"the chat template does not continue its own prompt in turn {index + 1} of a conversation, so the "
                "assistant's text cannot be located; set another data.chat_template, or train.loss: all"
            )
        return upto, (start, len(before) + len(turn.rstrip()))

    def _header(self, messages: Messages, index: int, start: int, turn: str) -> int:
        """How many characters of an answer's turn are not its own, or -1; the turn begins at `start` of the text."""
        if messages[index].keys() <= {"role", "content", "train"}:
            return turn.find(messages[index]["content"].strip())
        # What it begins with, thoughts or a call, is written by the template.
        probe = self._render([*messages[:index], {"role": "assistant", "content": MARK}], False)[start:]
        return sum(1 for _ in itertools.takewhile(lambda pair: pair[0] == pair[1], zip(turn, probe, strict=False)))

    def _mask_by_prefixes(self, text: str, spans: list[Span]) -> tuple[list[int], list[bool]]:
        ids = encode(self.tokenizer, text)
        mask = [False] * len(ids)
        for start, end in spans:
            borders = []
            for border in (start, end):
                prefix = encode(self.tokenizer, text[:border])
                if ids[: len(prefix)] != prefix:
                    raise DataError("this tokenizer merges tokens across turns; use a fast tokenizer (tokenizer.json)")
                borders.append(len(prefix))
            mask[borders[0] : borders[1]] = [True] * (borders[1] - borders[0])
        return ids, mask


def _answers(messages: Messages) -> list[int]:
    return [index for index, message in enumerate(messages) if message["role"] == "assistant"]


def _handed(message: Message) -> Message:
    """A message as a template gets it: with thoughts under any name that templates have for them."""
    kept = {name: value for name, value in message.items() if name not in ("tools", "train")}
    thoughts = next((message[name] for name in THOUGHTS if name in message), None)
    return kept if thoughts is None else kept | dict.fromkeys(THOUGHTS, thoughts)


def _mask(offsets: Sequence[Span], spans: Sequence[Span]) -> list[bool]:
    """Whether each token, given by its characters, has part in one of the spans; both in order."""
    beyond = (offsets[-1][1] + 1,) * 2 if offsets else (0, 0)
    mask = []
    coming = iter(spans)
    start, end = next(coming, beyond)
    for first, last in offsets:
        while first >= end:
            start, end = next(coming, beyond)
        mask.append(first < last and last > start)
    return mask
