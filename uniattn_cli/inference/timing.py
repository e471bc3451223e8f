"""Measures models in turn at one batch and context: time to the first token, and per token after it."""

from __future__ import annotations

import contextlib
import gc
import itertools
import platform
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch

from uniattn_cli.inference.caches import cache_elements, whole_grains
from uniattn_cli.inference.engine import Engine
from uniattn_cli.inference.roofline import clock, step_bytes
from uniattn_cli.inference.session import Session

if TYPE_CHECKING:
    from transformers import PreTrainedModel

WARM_UP_TOKENS = 4


WARM_UP_TOKENS = 4
# Left free on the host, so that measuring does not push it into swap.
HOST_RESERVE = 1 << 29


@dataclass(frozen=True)
class Series:
    """Seconds of repeated measurements.

    Attributes:
        values: in the order in which they were taken.
    """

    values: tuple[float, ...]

    @property
    def median(self) -> float:
        return statistics.median(self.values)

    @property
    def spread(self) -> float:
        """Largest minus smallest, relative to the median."""
        return (max(self.values) - min(self.values)) / self.median


@dataclass(frozen=True)
class Measurement:
    """One model, one way of running it, one batch and context.

    Attributes:
        model: its name.
        path: `engine`, `transformers dynamic` or `transformers static`.
        batch: rows.
        context: tokens per row before the first new one.
        fits: it ran; where not, `note` says why.
        step: seconds per decoding step of the whole batch; None where it was not measured.
        first: seconds from the prompt to the first new token; None where it was not measured.
        weight_bytes, cache_bytes: what a step has to read, see `StepBytes`.
        kv_bytes: what the caches of the batch hold at this context.
        floor: seconds that reading these bytes takes at the measured bandwidth of a copy.
    """

    model: str
    path: str
    batch: int
    context: int
    fits: bool = True
    note: str = ""
    step: Series | None = None
    first: Series | None = None
    weight_bytes: int = 0
    cache_bytes: int = 0
    kv_bytes: int = 0
    floor: float = 0.0

    @property
    def tokens_per_second(self) -> float | None:
        return None if self.step is None else self.batch / self.step.median


class NoRoomError(Exception):
    """What was to be measured does not fit into memory."""


@contextlib.contextmanager
def room(what: str) -> Iterator[None]:
    """Turns the ways in which devices say that memory is short into one.

    Raises:
        NoRoomError: it was.
    """
    try:
        yield
    except (torch.OutOfMemoryError, MemoryError):
        raise NoRoomError(f"{what} does not fit into memory") from None
    except RuntimeError as error:
        # The CPU allocator and MPS raise nothing more special.
        if "allocate memory" not in str(error) and "out of memory" not in str(error):
            raise
        raise NoRoomError(f"{what} does not fit into memory") from None


def measure_shape(
    engines: dict[str, Engine],
    batch: int,
    context: int,
    *,
    new: int,
    repeats: int,
    prompts: bool,
    bandwidth: float,
    advance: Callable[[int], None] = lambda steps: None,
) -> list[Measurement]:
    """Measures all models at one shape, in turn in every round, so that a slow moment hits them all.

    Decoding is timed over caches of random numbers, which all models share: time does not depend on what is in them.

    Args:
        engines: by name.
        new: decoding steps per round.
        repeats: rounds.
        prompts: time the prompt too.
        advance: told the number of finished rounds of one model.
    """
    found = {
        name: replace(Measurement(name, "engine", batch, context), **_costs(engine, batch, context, bandwidth))
        for name, engine in engines.items()
    }
    sessions: dict[str, Session] = {}
    steps: dict[str, list[float]] = {name: [] for name in engines}
    firsts: dict[str, list[float]] = {name: [] for name in engines}
    flat = _shared_memory(engines, batch, context + new + 1, found)
    prompt = random_prompt(next(iter(engines.values())), batch, context)
    for name in [name for name in engines if found[name].fits]:
        try:
            with room("the workspace"):
                session = engines[name].session(batch, context + new + 1, new + 1, flat=flat)
                time_steps(session, context, min(new, WARM_UP_TOKENS))
                if prompts:
                    time_prompt(session, prompt)
            sessions[name] = session
        except NoRoomError as error:
            found[name] = replace(found[name], fits=False, note=str(error))
    for _ in range(repeats):
        for name, session in sessions.items():
            steps[name].append(time_steps(session, context, new))
            if prompts:
                firsts[name].append(time_prompt(session, prompt))
            advance(1)
    del sessions, flat
    release()
    return [
        replace(
            measured,
            step=Series(tuple(steps[name])) if steps[name] else None,
            first=Series(tuple(firsts[name])) if firsts[name] else None,
        )
        for name, measured in found.items()
    ]


def _costs(engine: Engine, batch: int, context: int, bandwidth: float) -> dict:
    counted = step_bytes(engine.program, batch, context)
    return {
        "weight_bytes": counted.weights,
        "cache_bytes": counted.caches,
        "kv_bytes": cache_elements(engine.program, batch, context) * engine.program.dtype.itemsize,
        "floor": counted.seconds(bandwidth),
    }


def _shared_memory(
    engines: dict[str, Engine], batch: int, limit: int, found: dict[str, Measurement]
) -> torch.Tensor | None:
    """Memory for the largest caches that there is room for; notes down the models whose caches are larger."""
    capacity = whole_grains(limit)
    needs = {name: cache_elements(engine.program, batch, capacity) for name, engine in engines.items()}
    program = next(iter(engines.values())).program
    for name in sorted(needs, key=needs.get, reverse=True):
        if not found[name].fits:
            continue
        wanted = needs[name] * program.dtype.itemsize
        what = f"a KV cache of {wanted / 1e9:.1f} GB"
        try:
            with room(what):
                _check_host(program.device, wanted)
                flat = torch.empty(needs[name], dtype=program.dtype, device=program.device)
            return flat.normal_()
        except NoRoomError as error:
            release()
            for other in needs:
                if needs[other] == needs[name]:
                    found[other] = replace(found[other], fits=False, note=str(error))
    return None


def _check_host(device: torch.device, wanted: int) -> None:
    """Refuses what a machine would only swap for; its allocator promises anything."""
    if device.type == "cpu" and wanted + HOST_RESERVE > available_bytes():
        raise MemoryError


def available_bytes() -> int:
    """Memory of the host that is free or can be freed; psutil comes with accelerate, but is not always there."""
    try:
        import psutil
    except ImportError:
        import os

        return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return psutil.virtual_memory().available


def release() -> None:
    """Gives memory of dropped tensors back to the device."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def random_prompt(engine: Engine, batch: int, context: int) -> torch.Tensor:
    """[batch, context] tokens; which ones makes no difference to time."""
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(0, engine.program.head.shape[0], (batch, context), generator=generator)
    return tokens.to(engine.program.device)


def time_steps(session: Session, context: int, new: int) -> float:
    """Seconds per decoding step, over `new` of them after a context of so many tokens."""
    device = session.program.device
    session.pretend(context)
    if session.use_graph and session.graph is None:
        session.advance()
        session.pretend(context)
    started = clock(device)
    for _ in range(new):
        session.advance()
    return (clock(device) - started) / new


def time_prompt(session: Session, prompt: torch.Tensor) -> float:
    """Seconds until the first new token is chosen."""
    device = session.program.device
    started = clock(device)
    session.prefill(prompt)
    return clock(device) - started


def measure_stock(
    name: str,
    model: PreTrainedModel,
    prompt: torch.Tensor,
    *,
    new: int,
    repeats: int,
    static: bool,
    advance: Callable[[int], None] = lambda steps: None,
) -> Measurement:
    """`generate` of transformers, greedily: with a dynamic cache, or with a static one, which it compiles on a GPU.

    The time of a step is that between the first and the last of `new` + 1 tokens.
    """
    path = f"transformers {'static' if static else 'dynamic'}"
    batch, context = prompt.shape
    blank = Measurement(name, path, batch, context)
    steps, firsts = [], []
    try:
        with room("generate"):
            # The first run compiles, and allocates a cache for just as many tokens.
            for _ in range(2 if static else 1):
                _time_generate(model, prompt, new, static)
            for _ in range(repeats):
                first, step = _time_generate(model, prompt, new, static)
                firsts.append(first)
                steps.append(step)
                advance(1)
    except NoRoomError as error:
        return replace(blank, fits=False, note=str(error))
    finally:
        release()
    return replace(blank, step=Series(tuple(steps)), first=Series(tuple(firsts)))


def _time_generate(model: PreTrainedModel, prompt: torch.Tensor, new: int, static: bool) -> tuple[float, float]:
    """Seconds to the first token, and per token after it."""
    times: list[float] = []

    def note(tokens: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        # Waiting for the device is needed at both ends only.
        if not times or tokens.shape[1] == prompt.shape[1] + new:
            times.append(clock(model.device))
        return scores

    options = {"cache_implementation": "static"} if static else {}
    started = clock(model.device)
    model.generate(
        prompt,
        attention_mask=torch.ones_like(prompt),
        max_new_tokens=new + 1,
        logits_processor=[note],
        do_sample=False,
        eos_token_id=None,
        pad_token_id=0,
        **options,
    )
    return times[0] - started, (times[1] - times[0]) / new


def largest_batch(engine: Engine, context: int, new: int = 2, most: int | None = None) -> int:
    """The most rows that fit at a context, found by allocating and running a step of each size tried.

    Args:
        most: try no more rows than these.
    """

    def runs(batch: int) -> bool:
        try:
            with room("the batch"):
                session = engine.session(batch, context + new, new)
                session.pretend(context)
                session.advance()
                clock(engine.program.device)
        except NoRoomError:
            return False
        finally:
            session = None
            release()
        return True

    low, high = 0, 1
    while (most is None or high <= most) and runs(high):
        low, high = high, high * 2
    if most is not None:
        high = min(high, most + 1)
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if runs(middle) else (low, middle)
    return low


@dataclass(frozen=True)
class Timing:
    """One timed generation.

    Attributes:
        first: seconds from the prompt to its first new token.
        rest: seconds for all further new tokens.
        peak: bytes of memory at the most, the model's own weights included; None where it cannot be measured.
    """

    first: float
    rest: float
    peak: int | None = None


def prompt_tokens(rows: list[torch.Tensor], batch: int, length: int) -> torch.Tensor:
    """A prompt of real text, [batch, length], from the start of the held-out rows, repeated if they are short."""
    import torch

    stream = torch.cat(rows)
    repeats = -(-batch * length // len(stream))
    return stream.repeat(repeats)[: batch * length].view(batch, length)


def measure_speed(
    models: Mapping[str, PreTrainedModel],
    prompt: torch.Tensor,
    *,
    new: int,
    repeats: int,
    engines: Mapping[str, Engine] | None = None,
    advance: Callable[[int], None] = lambda steps: None,
) -> dict[str, list[Timing]]:
    """Generates greedily with each model in turn, again and again, so that a slow moment hits them all.

    The first model comes once more at the end, so that each round of the others has it before and after itself, and a
    machine that grows slower or faster favours nobody.

    Args:
        models: by name, all on one device.
        prompt: [batch, tokens].
        new: tokens generated by each sequence; none stops early.
        repeats: timed rounds; one shorter round before them warms up.
        engines: by name, for all models or for none; without them transformers generates with a dynamic cache.
        advance: told the number of finished generations.

    Returns:
        For each model one `Timing` per round, for the first one of several another at the end; the n-th ones of all
        models belong together.
    """
    found: dict[str, list[Timing]] = {name: [] for name in models}
    peaks: dict[str, int | None] = {}

    def run(name: str, steps: int) -> Timing:
        if not engines:
            return time_generation(models[name], prompt, steps)
        timing = time_engine(models[name], engines[name], prompt, steps, new)
        # An engine keeps its caches for the rounds to come, so only the first run sees them being taken.
        return replace(timing, peak=peaks.setdefault(name, timing.peak))

    # What earlier measurements left would count as in use before this one.
    for engine in (engines or {}).values():
        engine.release()
    for name in models:
        run(name, min(new, WARM_UP_TOKENS))
        advance(1)
    order = list(models) * repeats
    for name in [*order, *(order[:1] if len(models) > 1 else [])]:
        found[name].append(run(name, new))
        advance(1)
    for engine in (engines or {}).values():
        engine.release()
    return found


def ratios(rounds: Sequence[Timing], base: Sequence[Timing], of: Callable[[Timing], float]) -> list[float]:
    """A quantity of each round divided by the base's mean before and after it, or by the base's of the same round."""
    before = [of(timing) for timing in base]
    around = [statistics.fmean(pair) for pair in itertools.pairwise(before)]
    against = around if len(around) == len(rounds) else before
    return [of(timing) / other for timing, other in zip(rounds, against, strict=True)]


def time_generation(model: PreTrainedModel, prompt: torch.Tensor, new: int) -> Timing:
    """Greedy generation of exactly `new` tokens with a dynamic cache; the end-of-sequence token is not obeyed."""
    import torch
    from transformers import DynamicCache

    prompt = prompt.to(model.device)
    before = _reset_peak(model.device)
    with torch.inference_mode():
        cache = DynamicCache(config=model.config)
        start = _clock(model.device)
        token = _next_token(model, prompt, cache)
        first = _clock(model.device)
        for _ in range(new - 1):
            token = _next_token(model, token, cache)
        end = _clock(model.device)
    return Timing(first - start, end - first, _peak(model, before))


def time_engine(model: PreTrainedModel, engine: Engine, prompt: torch.Tensor, steps: int, room: int) -> Timing:
    """The same with static caches that have room for `room` new tokens, and a captured step on CUDA."""
    from uniattn_cli.inference.sampling import Sampling

    prompt = prompt.to(model.device)
    before = _reset_peak(model.device)
    batch, length = prompt.shape
    session = engine.borrow(batch, length + room, room, sampling=Sampling(), stop=(), pad=0)
    start = _clock(model.device)
    session.prefill(prompt, new=room)
    first = _clock(model.device)
    for _ in range(steps - 1):
        session.advance()
    end = _clock(model.device)
    return Timing(first - start, end - first, _peak(model, before))


def _next_token(model: PreTrainedModel, tokens: torch.Tensor, cache: object) -> torch.Tensor:
    output = model(tokens, past_key_values=cache, use_cache=True, logits_to_keep=1)
    return output.logits[:, -1:].argmax(-1)


def _reset_peak(device: torch.device) -> int:
    """Bytes in use now, other models included."""
    import torch

    if device.type != "cuda":
        return 0
    torch.cuda.reset_peak_memory_stats(device)
    return torch.cuda.memory_allocated(device)


def _peak(model: PreTrainedModel, before: int) -> int | None:
    """What the model would have taken alone: its weights, and what was added to the bytes in use.

    Only CUDA counts what PyTorch takes; the size of a process says little about one model in it.
    """
    import torch

    if model.device.type != "cuda":
        return None
    weights = sum(parameter.numel() * parameter.element_size() for parameter in model.parameters())
    return torch.cuda.max_memory_allocated(model.device) - before + weights


def _clock(device: torch.device) -> float:
    """Seconds, after everything queued on an accelerator is done."""
    import torch

    if device.type == "cuda":
        torch.cuda.synchronize(device)
    elif device.type == "mps":
        torch.mps.synchronize()
    return time.perf_counter()


def describe_device(device: torch.device) -> str:
    """The device as a reader knows it, such as `cuda (NVIDIA H100)` or `cpu (x86_64)`."""
    import torch

    if device.type == "cuda":
        return f"cuda ({torch.cuda.get_device_name(device)})"
    return f"{device.type} ({platform.processor() or platform.machine()})"
