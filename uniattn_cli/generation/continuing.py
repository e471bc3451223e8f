"""Prompts in batches, each continued by a model up to a row's length."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

import torch

from uniattn_cli.data.chat import ChatRenderer
from uniattn_cli.errors import ModelError
from uniattn_cli.generation.decode import Decoding, generation_config
from uniattn_cli.inference.engine import Decoded, decode, engine_for, engine_wanted
from uniattn_cli.inference.program import UnsupportedError
from uniattn_cli.models.hub import context_window

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from uniattn_cli.recipe.schema import SynthesisSpec


def check_engine(model: PreTrainedModel, spec: SynthesisSpec) -> None:
    """Finds out whether the engine can run a model, if the recipe insists on it.

    Raises:
        ModelError: it cannot.
    """
    if spec.engine == "engine":
        with _engine_errors():
            engine_for(model)


@contextlib.contextmanager
def _engine_errors() -> Iterator[None]:
    try:
        yield
    except UnsupportedError as error:
        raise ModelError(f"the engine cannot run this: {error}; remove synthesis.engine") from None


class Continuer:
    """Lets a model go on with prompts, as `synthesis` says.

    Attributes:
        ends: tokens that end a text or a turn.
        tries_engine: whether the engine is asked first.
    """

    def __init__(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, spec: SynthesisSpec):
        settings = generation_config(model, tokenizer, Decoding(temperature=spec.temperature), 1)
        self.model, self.spec = model, spec
        # A base model's own end is that of a text; its template may end turns otherwise.
        self.ends = sorted({*settings.eos_token_id, ChatRenderer(tokenizer).turn_end()} - {None})
        self.pad = settings.pad_token_id
        self.window = context_window(model.config)
        self.tries_engine = engine_wanted(spec.engine, model.device)

    def decode(self, prompts: Sequence[Sequence[int]], length: int, seed: int) -> Decoded:
        """Continues a batch.

        Args:
            prompts: token ids, of any lengths, none empty.
            length: tokens that the shortest prompt may become; the others may become longer.
            seed: of the sampling.

        Raises:
            ModelError: the recipe insists on the engine, which cannot run the model.
        """
        longest, shortest = max(map(len, prompts)), min(map(len, prompts))
        room = length - shortest
        if self.window is not None:
            room = min(room, self.window - longest)
        tokens = torch.full((len(prompts), longest), self.pad)
        mask = torch.zeros_like(tokens)
        for place, prompt in enumerate(prompts):
            tokens[place, longest - len(prompt) :] = torch.tensor(prompt)
            mask[place, longest - len(prompt) :] = 1
        with _engine_errors():
            return decode(
                self.model,
                tokens,
                mask,
                max_new_tokens=room,
                eos_token_id=self.ends,
                pad_token_id=self.pad,
                temperature=self.spec.temperature,
                top_p=self.spec.top_p,
                seed=seed,
                engine=self.spec.engine if self.tries_engine else "transformers",
            )

    def end_of(self, new: Sequence[int]) -> int | None:
        """The place of the first token that ends a text or a turn; None where there is none."""
        return next((place for place, token in enumerate(new) if token in self.ends), None)
