"""`uniattn generate` and `uniattn chat`: answers of one model, or of two for comparison."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from uniattn_cli.generation.decode import Answer, Decoding, answer
from uniattn_cli.generation.prompts import chat_ids, plain_ids
from uniattn_cli.models.loading import load_model
from uniattn_cli.models.of_run import find, newest
from uniattn_cli.models.tokenizer import load_tokenizer
from uniattn_cli.options import RunOptions
from uniattn_cli.recipe.schema import ModelSpec, Recipe
from uniattn_cli.run.directory import RunDir

if TYPE_CHECKING:
    from transformers import DynamicCache, PreTrainedModel, PreTrainedTokenizerBase


@dataclass(frozen=True)
class Speaker:
    """A loaded model that answers.

    Attributes:
        name: as the user knows it.
        model, tokenizer: in evaluation mode, on the device.
    """

    name: str
    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase


def load_speakers(
    run: RunDir, checkpoint: str | None, beside: str | None, overrides: Sequence[str], options: RunOptions
) -> list[Speaker]:
    """Loads the asked model, and the one beside it if there is one, which comes first.

    Args:
        run: the run directory.
        checkpoint: see `of_run.find`; None is what the last finished of `train` and `convert` left.
        beside: another of these, to compare with.
        overrides: `model.dtype=…` and `model.attention=…` in place of the recipe's.
        options: device and progress.

    Raises:
        StageError: there is no model in the run directory, or no recipe that names the base.
        ModelError, CheckpointError, RecipeError: see `loading.load_model`.
    """
    names = ([] if beside is None else [beside]) + [str(newest(run)) if checkpoint is None else checkpoint]
    # All faults of names are told before any weights are read.
    sources = {name: find(run, name) for name in names}
    spec = _model_spec(run, overrides)
    device = options.torch_device()
    speakers = []
    for name, source in sources.items():
        options.progress.note(f"loading {name} on {device}")
        speakers.append(Speaker(name, load_model(source, spec, device), load_tokenizer(source)))
    return speakers


def _model_spec(run: RunDir, overrides: Sequence[str]) -> ModelSpec:
    """Dtype and attention backend: the recipe's where there is one."""
    if run.recipe.is_file():
        return Recipe.load(run.recipe, overrides).model
    return Recipe.from_tree({"model": {"name": "given on the command line"}}, "--set", overrides).model


class Listener(Protocol):
    """Receives answers as they are generated; the command line prints them, a notebook may ignore them."""

    def begin(self, name: str) -> None:
        """A model starts its answer."""
        ...

    def text(self, piece: str) -> None:
        """The next piece of its text."""
        ...

    def finish(self, name: str, answer: Answer) -> None:
        """The answer is complete."""
        ...


class SilentListener:
    """Ignores the answers."""

    def begin(self, name: str) -> None:
        pass

    def text(self, piece: str) -> None:
        pass

    def finish(self, name: str, answer: Answer) -> None:
        pass


@dataclass(frozen=True)
class Generation:
    """Answers to one prompt.

    Attributes:
        answers: by the models' names, the one to compare with first.
        notes: limits of the comparison.
    """

    answers: dict[str, Answer]
    notes: list[str] = field(default_factory=list)


def generate(
    prompt: str,
    checkpoint: str | None = None,
    *,
    run_dir: Path | str = ".",
    beside: str | None = None,
    raw: bool = False,
    decoding: Decoding = Decoding(),
    engine: str = "auto",
    listener: Listener | None = None,
    overrides: Sequence[str] = (),
    options: RunOptions = RunOptions(),
) -> Generation:
    """Answers a prompt with one model, or with two for comparison.

    Args:
        prompt: the user's message, or with `raw` a text to continue.
        checkpoint: see `load_speakers`.
        run_dir: where the models of a run and its recipe are.
        beside: another model that answers the same prompt first.
        raw: do not apply the chat template.
        decoding: how tokens are chosen.
        engine: what runs the models, see `decode.answer`.
        listener: receives the answers as they are generated.
        overrides: settings of `model` in place of the recipe's.
        options: device and progress.

    Raises:
        UniAttnError: one of its subclasses, with one clear line.
    """
    listener = listener or SilentListener()
    speakers = load_speakers(RunDir(run_dir), checkpoint, beside, overrides, options)
    notes = [] if raw else template_notes(speakers)
    for note in notes:
        options.progress.note(note)
    answers = {}
    for speaker in speakers:
        tokenizer = speaker.tokenizer
        as_text = raw or not tokenizer.chat_template
        ids = plain_ids(tokenizer, prompt) if as_text else chat_ids(tokenizer, [{"role": "user", "content": prompt}])
        listener.begin(speaker.name)
        answers[speaker.name] = answer(speaker.model, tokenizer, ids, decoding, on_text=listener.text, engine=engine)
        listener.finish(speaker.name, answers[speaker.name])
    return Generation(answers, notes)


def template_notes(speakers: Sequence[Speaker]) -> list[str]:
    """Says which models have no chat template."""
    return [
        f"{speaker.name} has no chat template; the prompt is used as plain text" for speaker in speakers
        if not speaker.tokenizer.chat_template
    ]  # fmt: skip


class Conversation:
    """A conversation with one model, whose cache is kept from turn to turn.

    Each turn renders the whole conversation with the chat template. If the cached tokens are a prefix of it, only the
    rest is computed; if the template changes earlier turns, everything is recomputed. So the answers are those of a
    conversation without cache.
    """

    def __init__(self, speaker: Speaker):
        self.speaker = speaker
        self.reset()

    def reset(self) -> None:
        """Forgets everything."""
        self.messages: list[dict[str, str]] = []
        self._cache: DynamicCache | None = None
        self._cached: list[int] = []

    def say(self, text: str, decoding: Decoding, on_text: Callable[[str], None]) -> Answer:
        """Says something and gets the answer; after an error or an interruption the turn has not happened.

        Raises:
            DataError: the conversation has become longer than the model's window.
        """
        from transformers import DynamicCache

        messages = [*self.messages, {"role": "user", "content": text}]
        model, tokenizer = self.speaker.model, self.speaker.tokenizer
        ids = chat_ids(tokenizer, messages)
        kept = self._cache if self._cached and ids[: len(self._cached)] == self._cached else None
        if kept is not None and len(self._cached) >= len(ids):
            kept = None
        cache = kept if kept is not None else DynamicCache(config=model.config)
        # Until the answer is there, the cache is in between.
        self._cache, self._cached = None, []
        found = answer(model, tokenizer, ids, decoding, on_text=on_text, cache=cache)
        self.messages = [*messages, {"role": "assistant", "content": found.text}]
        self._cache, self._cached = cache, [*ids, *found.tokens][: found.cached]
        return found


class Chat:
    """The same conversation with one or two models, each with its own answers in its own history."""

    def __init__(self, speakers: Sequence[Speaker], decoding: Decoding = Decoding()):
        self.conversations = [Conversation(speaker) for speaker in speakers]
        self.decoding = decoding
        self.turns = 0

    @classmethod
    def open(
        cls,
        checkpoint: str | None = None,
        *,
        beside: str | None = None,
        decoding: Decoding = Decoding(),
        run_dir: Path | str = ".",
        overrides: Sequence[str] = (),
        options: RunOptions = RunOptions(),
    ) -> Chat:
        """Loads the models; arguments and errors as in `generate`."""
        speakers = load_speakers(RunDir(run_dir), checkpoint, beside, overrides, options)
        for note in template_notes(speakers):
            options.progress.note(note)
        return cls(speakers, decoding)

    def reset(self) -> None:
        """Begins anew."""
        self.turns = 0
        for conversation in self.conversations:
            conversation.reset()

    def say(self, text: str, listener: Listener) -> dict[str, Answer]:
        """One turn with every model; all of them have it in their history, or after an error none.

        Raises:
            DataError: the conversation has become longer than a model's window.
        """
        decoding = dataclasses.replace(self.decoding, seed=self.decoding.seed + self.turns)
        answers = {}
        before = [list(conversation.messages) for conversation in self.conversations]
        try:
            for conversation in self.conversations:
                name = conversation.speaker.name
                listener.begin(name)
                answers[name] = conversation.say(text, decoding, listener.text)
                listener.finish(name, answers[name])
        except BaseException:
            for conversation, messages in zip(self.conversations, before, strict=True):
                conversation.messages = messages
            raise
        self.turns += 1
        return answers
