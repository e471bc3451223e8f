"""`uniattn bench`: decoding steps and prompts of the engine and of transformers, at one batch and context."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Any, TypeVar, cast

import torch

from uniattn_cli.inference.caches import cache_elements, whole_grains
from uniattn_cli.inference.engine import Engine
from uniattn_cli.inference.roofline import step_bytes
from uniattn_cli.inference.session import Session
from uniattn_cli.inference.timing import WARM_UP_TOKENS
from uniattn_cli.models.device import Series, available_bytes, clock, is_out_of_memory, release_memory, take_turns

if TYPE_CHECKING:
    from transformers import PreTrainedModel

Seconds = TypeVar("Seconds")
# Left free on the host, so that measuring does not push it into swap.
HOST_RESERVE = 1 << 29


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
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        raise NoRoomError(f"{what} does not fit into memory") from None


@contextlib.contextmanager
def _noted(found: dict[str, Measurement], name: str, what: str) -> Iterator[None]:
    """Notes down that something of a model does not fit into memory, and goes on behind the block."""
    try:
        with room(what):
            yield
    except NoRoomError as error:
        found[name] = replace(found[name], fits=False, note=str(error))


def _in_turn(
    calls: Mapping[str, Callable[[], Seconds]],
    found: dict[str, Measurement],
    what: str,
    repeats: int,
    advance: Callable[[int], None],
) -> dict[str, list[Seconds]]:
    """What each model that fits takes in every round; one for which memory is short in a later round fits no more."""

    def call(name: str) -> Seconds | None:
        if found[name].fits:
            with _noted(found, name, what):
                return calls[name]()
        return None

    taken = take_turns({name: partial(call, name) for name in calls}, repeats, advance)
    return {name: [one for one in turns if one is not None] for name, turns in taken.items() if found[name].fits}


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
    flat = _shared_memory(engines, batch, context + new + 1, found)
    if flat is None:
        return list(found.values())
    prompt = random_prompt(next(iter(engines.values())), batch, context)
    timed = prompt if prompts else None
    for name in [name for name in engines if found[name].fits]:
        with _noted(found, name, "the workspace"):
            session = engines[name].session(batch, context + new + 1, new + 1, flat=flat)
            _time_once(session, context, min(new, WARM_UP_TOKENS), timed)
            sessions[name] = session
    calls = {name: partial(_time_once, session, context, new, timed) for name, session in sessions.items()}
    for name, seconds in _in_turn(calls, found, "the workspace", repeats, advance).items():
        steps, firsts = zip(*seconds, strict=True)
        found[name] = replace(found[name], step=Series(steps), first=Series(firsts) if prompts else None)
    del sessions, flat, calls
    release_memory(prompt.device)
    return list(found.values())


def _time_once(session: Session, context: int, new: int, prompt: torch.Tensor | None) -> tuple[float, float | None]:
    """Seconds per decoding step, and to the first token of a prompt where there is one."""
    step = time_steps(session, context, new)
    return step, None if prompt is None else time_prompt(session, prompt)


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
    for name in sorted(needs, key=needs.__getitem__, reverse=True):
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
            release_memory(program.device)
            for other in needs:
                if needs[other] == needs[name]:
                    found[other] = replace(found[other], fits=False, note=str(error))
    return None


def _check_host(device: torch.device, wanted: int) -> None:
    """Refuses what a machine would only swap for; its allocator promises anything."""
    if device.type == "cpu" and wanted + HOST_RESERVE > available_bytes(device):
        raise MemoryError


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
    models: Mapping[str, PreTrainedModel],
    prompt: torch.Tensor,
    *,
    new: int,
    repeats: int,
    static: bool,
    advance: Callable[[int], None] = lambda steps: None,
) -> list[Measurement]:
    """`generate` of transformers, greedily: with a dynamic cache, or with a static one, which it compiles on a GPU.

    The models take turns. The time of a step is that between the first and the last of `new` + 1 tokens.
    """
    path = f"transformers {'static' if static else 'dynamic'}"
    found = {name: Measurement(name, path, *prompt.shape) for name in models}
    calls = {name: partial(_time_generate, model, prompt, new, static) for name, model in models.items()}
    for name, call in calls.items():
        with _noted(found, name, "generate"):
            # The first run compiles, and allocates a cache for just as many tokens.
            for _ in range(2 if static else 1):
                call()
        release_memory(prompt.device)
    for name, seconds in _in_turn(calls, found, "generate", repeats, advance).items():
        firsts, steps = zip(*seconds, strict=True)
        found[name] = replace(found[name], step=Series(steps), first=Series(firsts))
    release_memory(prompt.device)
    return list(found.values())


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
    cast("Any", model).generate(
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
        session: Session | None = None
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
            release_memory(engine.program.device)
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
