"""What every model says to the same held-out prompts, greedily, for a reader of the report."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from uniattn_cli.data.chat import ChatRenderer
from uniattn_cli.data.encoding import encode
from uniattn_cli.data.screen import Screen
from uniattn_cli.data.splits import load_mix
from uniattn_cli.generation.decode import Decoding, answer
from uniattn_cli.generation.prompts import plain_ids
from uniattn_cli.models.of_run import Subject
from uniattn_cli.models.pool import ModelPool
from uniattn_cli.options import Progress
from uniattn_cli.recipe.schema import Recipe
from uniattn_cli.run.files import read_json, write_json

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# Words of a plain text that are given; the model goes on from there.
GIVEN_WORDS = 24


@dataclass(frozen=True)
class Prompt:
    """A prompt of a held-out row.

    Attributes:
        shown: what a reader sees: the last thing that the user says, or the beginning of a text.
        reference: what the row says next.
        ids: tokens that the models get.
    """

    shown: str
    reference: str
    ids: tuple[int, ...]


def find_prompts(recipe: Recipe, tokenizer: PreTrainedTokenizerBase, window: int | None) -> list[Prompt]:
    """The first held-out rows whose prompts leave room for an answer.

    Raises:
        DataError: there are no held-out rows, or the chat template refuses one.
    """
    spec = recipe.evaluation
    if not spec.samples:
        return []
    found: list[Prompt] = []
    screen = Screen(recipe.data, tokenizer)  # the responses are rows of the same sets, and were told of
    mix = load_mix(recipe.data.train, "heldout", holdout=recipe.data.holdout, seed=recipe.seed, screen=screen)
    for row in mix.rows:
        prompt = _prompt(row, tokenizer)
        if prompt is not None and (window is None or len(prompt.ids) + spec.sample_tokens <= window):
            found.append(prompt)
        if len(found) == spec.samples:
            break
    return found


def _prompt(row: dict[str, Any], tokenizer: PreTrainedTokenizerBase) -> Prompt | None:
    if row["messages"] is None:
        words = row["text"].split(" ")
        given, rest = " ".join(words[:GIVEN_WORDS]), " ".join(words[GIVEN_WORDS:])
        return Prompt(given, rest, tuple(plain_ids(tokenizer, given))) if rest.strip() else None
    turns = row["messages"]
    first = next((index for index, turn in enumerate(turns) if turn["role"] == "assistant" and turn["content"]), None)
    if not first:
        return None
    ids = encode(tokenizer, ChatRenderer(tokenizer).prompt(turns[:first]))
    return Prompt(turns[first - 1]["content"], turns[first]["content"], tuple(ids))


def sample_all(
    folder: Path,
    subjects: Sequence[Subject],
    pool: ModelPool,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Prompt],
    new: int,
    progress: Progress,
) -> list[dict[str, Any]]:
    """Greedy text of all models; what an interrupted run made is read back.

    Args:
        folder: of the evaluation; one file per model goes to `samples/`.
        subjects: the models, the base first.
        pool: gives them.
        tokenizer: of the base.
        prompts: from `find_prompts`.
        new: tokens of an answer at most.

    Returns:
        For each prompt `prompt`, `reference` and `texts` by model, as in `results.json`.
    """
    texts: dict[str, list[str]] = {}
    with progress.track("samples", len(subjects) * len(prompts)) as advance:
        for index, subject in enumerate(subjects if prompts else ()):
            path = folder / "samples" / f"{index}-{_key(subject, prompts, new)}.json"
            if not path.is_file():
                model = pool.get(subject)
                said = []
                for prompt in prompts:
                    said.append(answer(model, tokenizer, prompt.ids, Decoding(max_new_tokens=new)).text)
                    advance(1)
                # Nothing may hold a model that the pool has to drop before the next one fits.
                del model
                path.parent.mkdir(exist_ok=True)
                write_json(path, {"texts": said})
            texts[subject.name] = read_json(path, "remove it and run `uniattn eval` again")["texts"]
    return [
        {
            "prompt": prompt.shown,
            "reference": prompt.reference,
            "texts": {name: said[index] for name, said in texts.items()},
        }
        for index, prompt in enumerate(prompts)
    ]


def _key(subject: Subject, prompts: Sequence[Prompt], new: int) -> str:
    """Identifies what was asked of which weights."""
    asked = json.dumps({"model": subject.source.fingerprint, "new": new, "prompts": [each.ids for each in prompts]})
    return hashlib.sha256(asked.encode()).hexdigest()[:12]
