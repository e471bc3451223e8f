"""One answer of one model: token by token, with its time and what its cache holds."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, cast

from uniattn_cli.errors import DataError, ModelError, UsageError
from uniattn_cli.models.costs import cache_bytes
from uniattn_cli.models.hub import context_window
from uniattn_cli.recipe.schema import LOWEST_TEMPERATURE

if TYPE_CHECKING:
    import torch
    from transformers import DynamicCache, GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase


@dataclass(frozen=True)
class Decoding:
    """How tokens are chosen.

    Attributes:
        max_new_tokens: the answer is cut there.
        temperature: 0 takes the likeliest token (greedy); otherwise logits are divided by it.
        top_p: sample from the likeliest tokens that together have this probability.
        seed: of the sampling.
    """

    max_new_tokens: int = 256
    temperature: float = 0.0
    top_p: float = 1.0
    seed: int = 0

    def __post_init__(self) -> None:
        """Raises UsageError for values that make no sense."""
        if self.max_new_tokens < 1:
            raise UsageError(f"--max-new-tokens must be at least 1, not {self.max_new_tokens}")
        if self.temperature != 0 and not LOWEST_TEMPERATURE <= self.temperature < float("inf"):
            raise UsageError(f"--temperature must be 0 or at least {LOWEST_TEMPERATURE:g}, not {self.temperature:g}")
        if not 0 < self.top_p <= 1:
            raise UsageError(f"--top-p must be above 0 and at most 1, not {self.top_p:g}")


@dataclass(frozen=True)
class Answer:
    """What a model said.

    Attributes:
        text: without special tokens.
        tokens: ids of the new tokens, the end-of-text token included.
        prompt: tokens of the prompt.
        reused: of these, how many were in the cache already.
        first: seconds to the first token.
        rest: seconds for all further tokens.
        cached: tokens in the cache at the end.
        kv_bytes: bytes of the cache at the end.
        ended: `stop` (the model ended), `length` (`max_new_tokens`) or `window` (the model's window is full).
        path: what ran the model, `engine` or `transformers`.
        reason: why it was not the engine, where that should have been tried.
    """

    text: str
    tokens: tuple[int, ...]
    prompt: int
    reused: int
    first: float
    rest: float
    cached: int
    kv_bytes: int
    ended: str
    path: str = "transformers"
    reason: str = ""

    @property
    def tokens_per_second(self) -> float | None:
        """Rate after the first token; None for an answer of one token."""
        return (len(self.tokens) - 1) / self.rest if len(self.tokens) > 1 and self.rest > 0 else None


class Streamer:
    """Receives tokens from `generate`, tells the text as soon as it is certain, and keeps the time."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, on_text: Callable[[str], None]):
        self.tokenizer = tokenizer
        self.on_text = on_text
        self.tokens: list[int] = []
        self.times: list[float] = []
        self._prompt = True
        self._told = ""

    def put(self, value: Any) -> None:
        """Called by transformers: once with the prompt, then with each new token."""
        if self._prompt:
            self._prompt = False
            return
        self.times.append(time.perf_counter())
        self.tokens.extend(value.flatten().tolist())
        self._tell(self.text())

    def end(self) -> None:
        """Called by transformers after the last token."""
        self._tell(self.text(), whole=True)

    def text(self) -> str:
        """All that was said."""
        return str(self.tokenizer.decode(self.tokens, skip_special_tokens=True, clean_up_tokenization_spaces=False))

    def _tell(self, text: str, *, whole: bool = False) -> None:
        # A character of several bytes may still lack some of them, and a tokenizer may change its last word.
        if not whole and (text.endswith("�") or not text.startswith(self._told)):
            return
        if len(text) > len(self._told):
            self.on_text(text[len(self._told) :])
            self._told = text


def answer(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    ids: Sequence[int],
    decoding: Decoding,
    *,
    on_text: Callable[[str], None] = lambda piece: None,
    cache: DynamicCache | None = None,
    engine: str = "transformers",
) -> Answer:
    """Continues a prompt.

    Args:
        model: base or converted.
        tokenizer: its tokenizer.
        ids: the whole prompt.
        decoding: how tokens are chosen. Nothing else of the model's own generation settings than its end tokens counts,
            so that two models answer under the same rules.
        on_text: gets the text piece by piece.
        cache: of the first tokens of the prompt, which are not computed again; it is extended. None makes a new one.
        engine: `transformers`; `engine` insists on this package's engine, which takes no cache; `auto` takes it on a
            GPU where it can run the model.

    Raises:
        DataError: the prompt is empty, or does not leave room for a token in the model's window.
        ModelError: the engine was insisted on and cannot run the model.
    """
    import torch
    from transformers import DynamicCache

    from uniattn_cli.inference.engine import engine_wanted
    from uniattn_cli.inference.program import UnsupportedError

    if not ids:
        raise DataError("the prompt is empty; enter some text")
    window = context_window(model.config)
    if window is not None and len(ids) >= window:
        raise DataError(f"the prompt has {len(ids):,} tokens, but the model's context window is {window:,}; shorten it")
    room = decoding.max_new_tokens if window is None else min(decoding.max_new_tokens, window - len(ids))
    tokens = torch.tensor([list(ids)], device=model.device)
    settings = generation_config(model, tokenizer, decoding, room)
    reused, held, reason = 0, None, ""
    if cache is None and engine_wanted(engine, model.device):
        streamer = Streamer(tokenizer, on_text)
        try:
            started, held = _run_engine(model, tokens, settings, decoding, streamer)
        except UnsupportedError as error:
            if engine == "engine":
                raise ModelError(f"the engine cannot run this: {error}; remove --engine") from None
            reason = str(error)
    path = "transformers" if held is None else "engine"
    if held is None:
        cache = DynamicCache(config=model.config) if cache is None else cache
        reused = cache.get_seq_length()
        streamer, started = Streamer(tokenizer, on_text), time.perf_counter()
        torch.manual_seed(decoding.seed)
        with torch.inference_mode(), _only(model, settings):
            cast("Any", model).generate(
                tokens,
                attention_mask=torch.ones_like(tokens),
                past_key_values=cache,
                generation_config=settings,
                streamer=streamer,
            )
        held = cache_bytes(cache)
    stopped = streamer.tokens[-1] in settings.eos_token_id
    return Answer(
        text=streamer.text(),
        tokens=tuple(streamer.tokens),
        prompt=len(ids),
        reused=reused,
        first=streamer.times[0] - started,
        rest=streamer.times[-1] - streamer.times[0],
        cached=len(ids) + len(streamer.tokens) - 1,
        kv_bytes=held,
        ended="stop" if stopped else "length" if room == decoding.max_new_tokens else "window",
        path=path,
        reason=reason,
    )


def _run_engine(
    model: PreTrainedModel, tokens: torch.Tensor, settings: GenerationConfig, decoding: Decoding, streamer: Streamer
) -> tuple[float, int]:
    """Does what `generate` does, but for the random numbers of sampling.

    Returns:
        When it began, the engine being ready; bytes that the cached tokens take.

    Raises:
        UnsupportedError: the engine cannot run this model, or not for so many tokens.
    """
    from uniattn_cli.inference.caches import cache_elements
    from uniattn_cli.inference.engine import decode, engine_for
    from uniattn_cli.inference.sampling import Sampling

    engine, new = engine_for(model), settings.max_new_tokens
    sampling = Sampling(decoding.temperature, decoding.top_p, decoding.seed)
    stop, pad = settings.eos_token_id, settings.pad_token_id
    engine.warm_up(1, tokens.shape[1] + new, new, sampling=sampling, stop=stop, pad=pad)
    started = time.perf_counter()
    streamer.put(tokens)
    decode(
        model,
        tokens,
        max_new_tokens=new,
        eos_token_id=stop,
        pad_token_id=pad,
        temperature=sampling.temperature,
        top_p=sampling.top_p,
        seed=sampling.seed,
        engine="engine",
        on_tokens=streamer.put,
    )
    streamer.end()
    program, cached = engine.program, tokens.shape[1] + len(streamer.tokens) - 1
    return started, cache_elements(program, 1, cached) * program.dtype.itemsize


@contextlib.contextmanager
def _only(model: PreTrainedModel, settings: GenerationConfig) -> Iterator[None]:
    """Puts the model's own settings aside, from which `generate` takes whatever it is not told."""
    own, model.generation_config = model.generation_config, settings
    try:
        yield
    finally:
        model.generation_config = own


def generation_config(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, decoding: Decoding, new: int
) -> GenerationConfig:
    """Settings for `generate` that hold nothing but `decoding` and the end tokens of model and tokenizer."""
    from transformers import GenerationConfig

    own = model.generation_config.eos_token_id
    ends = {*([] if own is None else [own] if isinstance(own, int) else own), tokenizer.eos_token_id} - {None}
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else min(ends, default=0)
    sampling = {"temperature": decoding.temperature, "top_p": decoding.top_p, "top_k": 0}
    greedy = decoding.temperature == 0
    return GenerationConfig(
        max_new_tokens=new,
        eos_token_id=sorted(ends),
        pad_token_id=pad,
        do_sample=not greedy,
        **({} if greedy else sampling),
    )
