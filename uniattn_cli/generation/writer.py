"""`uniattn synthesize`: training rows that a model writes itself, for training that has too few.

A model continues passages of the recipe's texts and answers the questions of its conversations. What it has to say
about them is what a converted model has lost, and there is no end of it: distillation on a model's own text needs no
data of others (Liu et al., LLM-QAT, arXiv 2305.17888). Cross-entropy is another matter: of its own text, drawn at
temperature 1, a model can learn nothing, and drawn more greedily, only to be greedier.
"""

from __future__ import annotations

import itertools
import json
import random
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from uniattn_cli.data.chat import ChatRenderer
from uniattn_cli.data.encoding import encode
from uniattn_cli.errors import DataError
from uniattn_cli.recipe.schema import SynthesisSpec

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

# Prompts are sorted by length within so many batches, so that little is padded.
SORTED_BATCHES = 8
# An answer has room for at least so many tokens, or is not asked for.
LEAST_ROOM = 32
# Characters in which the first tokens of a passage are looked for, each; longer tokens are rare.
CHARACTERS_PER_TOKEN = 16
# And of a usual token.
CHARACTERS_USUAL = 4
# A sentence's end that a text cut by its length is shortened to.
SENTENCE_END = re.compile(r"[.!?…。！？][\"'”’)\]]*(?=\s)|\n")
# An answer that is not finished goes on for so many tokens behind a row's length: training cuts it there, and no end of
# the turn is learned. Some, because the same text is often fewer tokens when it is read than when it was drawn.
BEYOND = 16
LEFT_OUT = {
    "long": "conversations with a prompt too long to answer",
    "empty": "passages and questions with empty answers",
    "unfinished": "unfinished answers that would count as finished in training",
    "unlike": "answers that the chat template would change",
    "again": "duplicate rows",
}


@dataclass(frozen=True)
class WritingPrompt:
    """What a model is asked to go on with.

    Attributes:
        ids: its tokens.
        messages: the conversation that it renders; None for a passage of text.
    """

    ids: list[int]
    messages: list[dict[str, str]] | None = None


class Writer:
    """Makes rows with one model.

    Attributes:
        left_out: what was written and not kept.
        path, reason: see `inference.engine.Decoded`, of the last batch.
    """

    def __init__(
        self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, spec: SynthesisSpec, length: int, seed: int
    ):
        from uniattn_cli.generation.continuing import Continuer

        self.tokenizer, self.spec, self.length, self.seed = tokenizer, spec, length, seed
        self.renderer = ChatRenderer(tokenizer)
        self.continuer = Continuer(model, tokenizer, spec)
        self.left_out: Counter[str] = Counter()
        self.path = self.reason = ""

    def batches(self, rows: Sequence[dict[str, Any]]) -> Iterator[list[tuple[str, Any, int]]]:
        """Batch by batch (kind, row, tokens), until there are `synthesis.tokens` or a whole pass gives nothing new.

        Raises:
            DataError: the first pass gave nothing.
        """
        wanted, made, seen = self.spec.tokens, 0, set()
        for number in itertools.count():
            before = made
            for index, prompts in enumerate(self._grouped(self.prompts(rows, number), number)):
                kept = []
                for kind, row, size in self._write(prompts, self.seed + index + (number << 20)):
                    # Only its hash: there may be gigabytes of rows.
                    key = hash(json.dumps(row, sort_keys=True))
                    if key in seen:
                        self.left_out["again"] += 1
                    elif made < wanted:
                        seen.add(key)
                        made += size
                        kept.append((kind, row, size))
                yield kept
                if made >= wanted:
                    return
            if not made:
                reasons = ", ".join(f"{count:,} {LEFT_OUT[name]}" for name, count in self.left_out.items())
                raise DataError(
                    f"a whole pass over the training rows gave nothing ({reasons or 'no usable rows'}); raise "
                    "train.max_length, or use other rows or another model"
                )
            if made == before:
                return

    def prompts(self, rows: Sequence[dict[str, Any]], number: int) -> Iterator[WritingPrompt]:
        """Prompts of one pass over the rows: of a conversation all but its last answer, of texts random passages.

        Long texts have as many passages as they have rows' lengths, so that each part of a text is as likely as any.
        """
        from uniattn_cli.generation.prompts import plain_ids

        chance = random.Random(f"{self.seed} {number}")
        places: list[int] = []
        for index, row in enumerate(rows):
            text = row.get("text")
            places += [index] * max(1, 0 if text is None else len(text) // (CHARACTERS_USUAL * self.length))
        chance.shuffle(places)
        for index in places:
            text = rows[index].get("text")
            if text is None:
                turns = _asked(rows[index]["messages"])
                if turns is None:
                    continue
                ids = encode(self.tokenizer, self.renderer.prompt(turns))
                if len(ids) + LEAST_ROOM <= self.length:
                    yield WritingPrompt(ids, turns)
                else:
                    self.left_out["long"] += number == 0
            else:
                ids = plain_ids(self.tokenizer, _passage(text, self.spec.prefix * CHARACTERS_PER_TOKEN, chance))
                yield WritingPrompt(ids[: self.spec.prefix])

    def _grouped(self, prompts: Iterator[WritingPrompt], number: int) -> Iterator[list[WritingPrompt]]:
        """Batches of about equal length, in random order: wherever the writing stops, short ones are not preferred."""
        size, chance = self.spec.batch_size, random.Random(f"{self.seed} {number} batches")
        while some := list(itertools.islice(prompts, SORTED_BATCHES * size)):
            some.sort(key=lambda prompt: len(prompt.ids))
            batches = [some[first : first + size] for first in range(0, len(some), size)]
            chance.shuffle(batches)
            yield from batches

    def _write(self, prompts: list[WritingPrompt], seed: int) -> Iterator[tuple[str, Any, int]]:
        """What became of a batch of prompts."""
        decoded = self.continuer.decode([prompt.ids for prompt in prompts], self.length + BEYOND, seed)
        self.path, self.reason = decoded.path, decoded.reason if self.continuer.tries_engine else ""
        for prompt, row in zip(prompts, decoded.tokens.tolist(), strict=True):
            # A text leaves one place for the end-of-text token that training puts behind it.
            row = row[: self.length - len(prompt.ids) + (-1 if prompt.messages is None else BEYOND)]
            end = self.continuer.end_of(row)
            new = row[:end]
            size = min(len(prompt.ids) + len(new), self.length)
            said = self._text(new).strip()
            if not said:
                self.left_out["empty"] += 1
            elif prompt.messages is None:
                text = self._text([*prompt.ids, *new])
                yield "text", text if end is not None else _whole_sentences(text), size
            else:
                messages = [*prompt.messages, {"role": "assistant", "content": said}]
                fault = self._fault(messages, finished=end is not None)
                if fault:
                    self.left_out[fault] += 1
                else:
                    yield "messages", messages, size

    def _fault(self, messages: list[dict[str, str]], *, finished: bool) -> str | None:
        """Why training would not see what was said; one of `LEFT_OUT`."""
        *asked, answer = messages
        text = self.renderer.text(messages)
        if not text.startswith(self.renderer.prompt(asked) + answer["content"]):
            return "unlike"
        return None if finished or len(encode(self.tokenizer, text)) > self.length else "unfinished"

    def _text(self, ids: list[int]) -> str:
        return str(self.tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False))


def _asked(messages: Sequence[dict[str, str]]) -> list[dict[str, str]] | None:
    """A conversation up to what its last answer answers; None if it has no answer."""
    answers = [index for index, message in enumerate(messages) if message["role"] == "assistant"]
    if not answers or not answers[-1]:
        return None
    return list(messages[: answers[-1]])


def _passage(text: str, characters: int, chance: random.Random) -> str:
    """Some of a text, from the beginning of a word."""
    start = chance.randrange(max(1, len(text) - characters))
    if start:
        following = re.search(r"(?<=\s)\S", text[start:])
        start = start + following.start() if following else 0
    return text[start : start + characters]


def _whole_sentences(text: str) -> str:
    """The text up to its last sentence that is whole, if that is most of it."""
    ends = [match.end() for match in SENTENCE_END.finditer(text)]
    return text[: ends[-1]].rstrip() if ends and 2 * ends[-1] > len(text) else text
