"""A retrieval probe without any data: one of several codes, told at random depths of a long text, is asked for.

All codes stand in the text, so that none is likelier than another by itself, and the model has to look up the right
one. An answer is right if its code is the likeliest of them; guessing is right once in `FACTS` times.
"""

from __future__ import annotations

import copy
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from uniattn_cli.data.encoding import bos_of, encode

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

FACTS = 4
BOXES = ("red", "blue", "green", "yellow", "black", "white", "brown", "grey")
FACT, QUESTION, ANSWER = "\n\nThe code of the {box} box is {code}.\n\n", "\n\nThe code of the {box} box is", " {code}"


@dataclass(frozen=True)
class RetrievalItem:
    """One question.

    Attributes:
        prompt: token ids of the text and the question.
        answers: token ids of each code.
        gold: index of the right one.
    """

    prompt: list[int]
    answers: list[list[int]]
    gold: int


def retrieval_items(
    tokenizer: PreTrainedTokenizerBase, text: Sequence[int], *, length: int, count: int, seed: int = 0
) -> list[RetrievalItem]:
    """Questions whose text and answer fill exactly `length` tokens; none if they do not fit.

    Args:
        tokenizer: of the base.
        text: tokens of the held-out text, in which the facts are hidden; each item begins at another place of it.
        length: tokens of text, question and longest answer together.
        count: questions; the right fact stands at evenly spread depths.
        seed: of codes, filler and order; the same for every model.
    """
    found = []
    for index in range(count):
        # Of this item alone, so that a larger probe begins with the same items.
        rng = random.Random(f"{seed} {length} {index}")
        item = _item(tokenizer, text, length, (index + 0.5) / count, rng)
        if item is None:
            return []
        found.append(item)
    return found


def _item(
    tokenizer: PreTrainedTokenizerBase, text: Sequence[int], length: int, depth: float, rng: random.Random
) -> RetrievalItem | None:
    boxes = rng.sample(BOXES, FACTS)
    codes = rng.sample(range(10000, 100000), FACTS)
    facts = [encode(tokenizer, FACT.format(box=box, code=code)) for box, code in zip(boxes, codes, strict=True)]
    answers = [encode(tokenizer, ANSWER.format(code=code)) for code in codes]
    gold = rng.randrange(FACTS)
    bos = bos_of(tokenizer)
    start = [] if bos is None else [bos]
    question = encode(tokenizer, QUESTION.format(box=boxes[gold]))
    room = length - len(start) - len(question) - sum(map(len, facts)) - max(map(len, answers))
    if room < 0:
        return None
    begin = rng.randrange(len(text))
    filler = [text[(begin + index) % len(text)] for index in range(room)]
    # The asked fact stands at its depth, the others anywhere.
    places = [depth if index == gold else rng.random() for index in range(FACTS)]
    told, done = [], 0
    for place, fact in sorted(zip(places, facts, strict=True)):
        end = round(place * room)
        told += filler[done:end] + fact
        done = end
    return RetrievalItem(start + told + filler[done:] + question, answers, gold)


def answer_items(
    model: PreTrainedModel, items: Sequence[RetrievalItem], advance: Callable[[int], None] = lambda steps: None
) -> list[int]:
    """For each question 1 if the right code is the likeliest, else 0."""
    found = []
    for item in items:
        scores = _log_likelihoods(model, item)
        found.append(int(max(range(FACTS), key=scores.__getitem__) == item.gold))
        advance(1)
    return found


def _log_likelihoods(model: PreTrainedModel, item: RetrievalItem) -> list[float]:
    """Log-likelihood of each answer after the prompt, which is read once."""
    import torch
    from transformers import DynamicCache

    device = next(model.parameters()).device
    found = []
    with torch.no_grad():
        read = DynamicCache(config=model.config)
        prompt = torch.tensor([item.prompt], device=device)
        first = model(prompt, past_key_values=read, use_cache=True, logits_to_keep=1).logits[0]
        for answer in item.answers:
            ids, logits = torch.tensor(answer, device=device), first
            if len(answer) > 1:
                # A copy, because not every cache can be cut back: sliding layers have forgotten what they dropped.
                rest = model(ids[None, :-1], past_key_values=copy.deepcopy(read), use_cache=True).logits[0]
                logits = torch.cat([first, rest])
            chosen = logits.float().log_softmax(-1).gather(-1, ids[:, None])
            found.append(chosen.cpu().double().sum().item())
    return found
