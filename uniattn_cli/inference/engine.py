"""The public face of the package: an engine around a model, and `decode`, which falls back to transformers."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, cast

import torch

from uniattn_cli.errors import UsageError
from uniattn_cli.inference.ops import TorchOps
from uniattn_cli.inference.program import Program, UnsupportedError
from uniattn_cli.inference.reading import read_program
from uniattn_cli.inference.sampling import Sampling, choose
from uniattn_cli.inference.session import Session
from uniattn_cli.recipe.schema import ENGINES

if TYPE_CHECKING:
    from transformers import PreTrainedModel

# Steps between two looks at whether every row has ended; a look makes the host wait for the device.
STEPS_PER_LOOK = 16
# Largest relative difference of logits between engine and transformers on the model itself, by dtype.
TOLERANCES = {torch.float64: 1e-5, torch.float32: 1e-3, torch.float16: 3e-2, torch.bfloat16: 6e-2}
CHECK_TOKENS = 10
# Room of a session that is kept for later calls is a multiple of this.
KEPT_ROOM = 1024
CHECK_STEPS = 3


@dataclass(frozen=True)
class Decoded:
    """Text of a batch.

    Attributes:
        tokens: [batch, new], as far as the longest row goes; shorter rows end in the padding token.
        sequences: [batch, prompt + new].
        path: `engine` or `transformers`.
        reason: why it was transformers; empty otherwise.
    """

    tokens: torch.Tensor
    sequences: torch.Tensor
    path: str
    reason: str = ""


class Engine:
    """Decodes with a stock or converted model, whose weights it uses as they are.

    Args:
        model: in evaluation mode, on one device. Its parameters become views of fused ones, with the same values.
        ops: `auto`, `torch` or `triton`.
        check: compare with transformers on a few tokens first.

    Raises:
        UnsupportedError: the engine cannot run the model, or gives other numbers than transformers.
    """

    def __init__(self, model: PreTrainedModel, *, ops: str = "auto", check: bool = True):
        self.program: Program = read_program(model)
        self.ops = choose_ops(self.program, ops)
        # Data-dependent shapes of experts cannot be captured.
        self.graphs = self.program.device.type == "cuda" and self.program.dense
        self.difference = self._compare(model) if check else None
        self._kept: tuple[tuple, Session] | None = None

    def session(self, batch: int, limit: int, new: int, *, graph: bool | None = None, **options) -> Session:
        """A session of its own, see `Session`; graphs are used where they can be."""
        graph = self.graphs if graph is None else graph and self.graphs
        return Session(self.program, batch, limit, new, ops=self.ops, graph=graph, **options)

    def borrow(self, batch: int, limit: int, new: int, *, sampling: Sampling, stop: Sequence[int], pad: int) -> Session:
        """A session with room for at least so much; the last one again where it fits, since capturing takes a while."""
        if not self.graphs:
            return self.session(batch, limit, new, sampling=sampling, stop=stop, pad=pad)
        room = -(-limit // KEPT_ROOM) * KEPT_ROOM
        width = 1 << (new - 1).bit_length()
        key = (batch, room, width, replace(sampling, seed=0), tuple(stop), pad)
        if self._kept is None or self._kept[0] != key:
            # Gone before the next one asks for memory.
            self._kept = None
            self._kept = key, self.session(batch, room, width, sampling=sampling, stop=stop, pad=pad)
        session = self._kept[1]
        session.sampling = sampling
        return session

    def release(self) -> None:
        """Lets go of the session that `borrow` keeps, and of its caches."""
        self._kept = None

    def warm_up(self, batch: int, limit: int, new: int, **settings: Any) -> None:
        """Captures the step of the session that `borrow` will give for the same arguments, where steps are captured.

        It takes seconds where kernels have to be compiled, which the time of a first answer should not contain.
        """
        if self.graphs and new > 1:
            session = self.borrow(batch, limit, new, **settings)
            session.prefill(torch.zeros(batch, 1, dtype=torch.int64, device=self.program.device), new=2)
            session.advance()

    @torch.inference_mode()
    def _compare(self, model: PreTrainedModel) -> float:
        """Largest relative difference of logits to transformers, over a padded batch and a few steps."""
        vocabulary = self.program.head.shape[0]
        generator = torch.Generator().manual_seed(0)
        tokens = torch.randint(0, vocabulary, (2, CHECK_TOKENS + CHECK_STEPS), generator=generator)
        tokens = tokens.to(self.program.device)
        mask = torch.ones_like(tokens)
        mask[1, : CHECK_TOKENS // 3] = 0
        positions = (mask.cumsum(-1) - 1).clamp(min=0)
        wanted = model(tokens, attention_mask=mask, position_ids=positions, use_cache=False).logits
        session = self.session(2, tokens.shape[1] + 1, CHECK_STEPS + 1, graph=False)
        worst = 0.0
        session.prefill(tokens[:, :CHECK_TOKENS], mask[:, :CHECK_TOKENS].sum(-1))
        for place in range(CHECK_TOKENS, tokens.shape[1] + 1):
            expected = wanted[:, place - 1].double()
            worst = max(worst, ((session.logits.double() - expected).norm() / expected.norm()).item())
            if place < tokens.shape[1]:
                session.state.token.copy_(tokens[:, place])
                session.advance()
        if not worst <= TOLERANCES[self.program.dtype]:
            raise UnsupportedError(f"its logits differ from transformers' by {worst:.1e}")
        return worst


def choose_ops(program: Program, name: str) -> type[TorchOps]:
    """The class of operations for a model.

    Raises:
        UnsupportedError: `triton` was asked for and cannot be used.
        UsageError: the name is unknown.
    """
    if name not in ("auto", "torch", "triton"):
        raise UsageError(f"ops must be auto, torch or triton, not '{name}'")
    if name == "torch":
        return TorchOps
    problem = _triton_problem(program)
    if problem is None:
        from uniattn_cli.inference.triton_ops import TritonOps

        return TritonOps
    if name == "triton":
        raise UnsupportedError(problem)
    return TorchOps


def _triton_problem(program: Program) -> str | None:
    """Why the kernels cannot be used; the plain operations give the same numbers."""
    try:
        from triton import knobs
    except ImportError:
        return "triton is not installed"
    if program.device.type != "cuda" and not knobs.runtime.interpret:
        return "the kernels need a CUDA device"
    if program.dtype not in (torch.float16, torch.bfloat16, torch.float32):
        return f"the kernels do not support {program.dtype}"
    if program.shape.head_dim > 256:
        return f"the kernels support head sizes up to 256, not {program.shape.head_dim}"
    return None


# By model: where its weights were, and the engine made for it, or why there is none.
_ENGINES: weakref.WeakKeyDictionary[PreTrainedModel, tuple[int, Engine | str]] = weakref.WeakKeyDictionary()


def engine_for(model: PreTrainedModel) -> Engine:
    """The engine of a model, made once and again when its weights have moved.

    Raises:
        UnsupportedError: as `Engine`.
    """
    head = getattr(model, "lm_head", None)
    address = 0 if head is None else head.weight.data_ptr()
    found = _ENGINES.get(model)
    if found is None or found[0] != address:
        try:
            found = address, Engine(model)
        except UnsupportedError as error:
            found = address, str(error)
        _ENGINES[model] = found
    if isinstance(found[1], str):
        raise UnsupportedError(found[1])
    return found[1]


def engine_wanted(choice: str, device: torch.device) -> bool:
    """Whether the engine is to be tried: where it is asked for, and by itself on a GPU, where it is much faster."""
    return choice == "engine" or (choice == "auto" and device.type == "cuda")


def decode(
    model: PreTrainedModel,
    input_ids: torch.Tensor,
    attention_mask: torch.Tensor | None = None,
    *,
    max_new_tokens: int,
    eos_token_id: int | Sequence[int] | None = None,
    pad_token_id: int | None = None,
    temperature: float = 0.0,
    top_p: float = 1.0,
    seed: int = 0,
    engine: str = "auto",
    on_tokens: Callable[[torch.Tensor], None] | None = None,
) -> Decoded:
    """Continues a batch of prompts with a stock or converted model.

    Args:
        model: a transformers causal LM in evaluation mode.
        input_ids: [batch, prompt], padded on the left.
        attention_mask: [batch, prompt], 0 for padding.
        max_new_tokens: most new tokens per row.
        eos_token_id: tokens that end a row; None goes on to the end.
        pad_token_id: what follows the end of a row; default: the first end-of-sequence token, or 0.
        temperature, top_p, seed: see `Sampling`.
        engine: `auto` takes this package's engine where it can, `engine` insists, `transformers` avoids it.
        on_tokens: called with each step's tokens [batch]; makes the host wait for every step.

    Raises:
        UnsupportedError: `engine` was insisted on and cannot run the model.
        UsageError: impossible arguments.
    """
    if engine not in ENGINES:
        raise UsageError(f"engine must be auto, engine or transformers, not '{engine}'")
    if max_new_tokens < 1:
        raise UsageError(f"max_new_tokens must be at least 1, not {max_new_tokens}")
    stop = [] if eos_token_id is None else [eos_token_id] if isinstance(eos_token_id, int) else list(eos_token_id)
    pad = pad_token_id if pad_token_id is not None else stop[0] if stop else 0
    sampling = Sampling(temperature, top_p, seed)
    lengths = _row_lengths(input_ids, attention_mask)
    reason = "it was requested"
    if engine != "transformers":
        try:
            session = engine_for(model).borrow(
                input_ids.shape[0],
                input_ids.shape[1] + max_new_tokens,
                max_new_tokens,
                sampling=sampling,
                stop=stop,
                pad=pad,
            )
            tokens = _generate(session, input_ids, lengths, max_new_tokens, on_tokens)
            return Decoded(tokens, torch.cat([input_ids.to(tokens.device), tokens], dim=1), "engine")
        except UnsupportedError as error:
            if engine == "engine":
                raise
            reason = str(error)
    tokens = _transformers(model, input_ids, attention_mask, max_new_tokens, sampling, stop, pad, on_tokens)
    return Decoded(tokens, torch.cat([input_ids.to(tokens.device), tokens], dim=1), "transformers", reason)


def _row_lengths(input_ids: torch.Tensor, attention_mask: torch.Tensor | None) -> torch.Tensor | None:
    """Tokens of each row, None without padding.

    Raises:
        UsageError: padding that is not on the left, or a row of nothing else.
    """
    if input_ids.ndim != 2 or not input_ids.numel():
        raise UsageError(f"input_ids must be [batch, tokens] and not empty, not {list(input_ids.shape)}")
    if attention_mask is None or bool(attention_mask.bool().all()):
        return None
    if attention_mask.shape != input_ids.shape:
        raise UsageError(f"attention_mask is {list(attention_mask.shape)}, input_ids {list(input_ids.shape)}")
    mask = attention_mask.bool()
    if not bool(mask[:, -1].all()) or bool((mask[:, :-1] & ~mask[:, 1:]).any()):
        raise UsageError("rows must be padded on the left only, with at least one token")
    return mask.sum(-1).to(torch.int32)


def _generate(
    session: Session,
    input_ids: torch.Tensor,
    lengths: torch.Tensor | None,
    new: int,
    on_tokens: Callable[[torch.Tensor], None] | None,
) -> torch.Tensor:
    """[batch, new] up to the end of the longest row."""
    session.prefill(input_ids, lengths if lengths is None else lengths.to(session.program.device), new=new)
    state = session.state
    on_host = session.program.device.type == "cpu"
    for count in range(1, new + 1):
        if on_tokens is not None:
            on_tokens(state.token)
        if len(session.stop) and (on_host or on_tokens or count % STEPS_PER_LOOK == 0) and bool(state.finished.all()):
            break
        if count < new:
            session.advance()
    tokens = state.output[:, :count]
    if len(session.stop):
        ended = torch.isin(tokens, session.stop)
        used = torch.where(ended.any(-1), ended.int().argmax(-1) + 1, count)
        tokens = tokens[:, : int(used.max())]
    return tokens.clone()


def _transformers(
    model: PreTrainedModel,
    input_ids: torch.Tensor,
    attention_mask: torch.Tensor | None,
    new: int,
    sampling: Sampling,
    stop: list[int],
    pad: int,
    on_tokens: Callable[[torch.Tensor], None] | None,
) -> torch.Tensor:
    """`generate`, which chooses tokens by the engine's rule and noise; [batch, new]."""
    device, batch = model.device, len(input_ids)
    noise = sampling.noise(new, batch).to(device)
    ends, finished = torch.tensor(stop, device=device), torch.zeros(batch, dtype=torch.bool, device=device)
    count = 0

    def pick(tokens: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        nonlocal count
        token = torch.where(finished, pad, choose(scores, sampling, noise[count]))
        count += 1
        if stop:
            finished.logical_or_(torch.isin(token, ends))
        if on_tokens is not None:
            on_tokens(token)
        # Greedy search among these takes the chosen one.
        return torch.full_like(scores, float("-inf")).scatter_(1, token[:, None], 0.0)

    tokens = cast("Any", model).generate(
        input_ids.to(device),
        attention_mask=torch.ones_like(input_ids) if attention_mask is None else attention_mask.to(device),
        max_new_tokens=new,
        do_sample=False,
        num_beams=1,
        repetition_penalty=1.0,
        eos_token_id=stop or None,
        pad_token_id=pad,
        logits_processor=[pick],
    )
    return tokens[:, input_ids.shape[1] :]
