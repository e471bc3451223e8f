"""Hidden states of calibration tokens on their way through a model's layers, one layer at a time.

Nothing here knows a family: masks, rotary embeddings and whatever else a layer is given are recorded from the model's
own forward call.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from accelerate.utils import send_to_device
from torch import nn

from uniattn_cli.modeling.layout_uniattn import Layout
from uniattn_cli.modeling.sharing_uniattn import SharedStates
from uniattn_cli.models.losses import Loss, summarise, token_losses
from uniattn_cli.models.residence import hooked, outside, resident

if TYPE_CHECKING:
    from transformers import PreTrainedModel


class _ForwardStoppedError(Exception):
    """Ends a layer's forward pass once what is needed has been seen."""


@dataclass
class Batch:
    """Some sequences and what the base model gives each of its layers for them.

    Attributes:
        base: hidden states of the base, [rows, length, hidden].
        converted: hidden states of the converted model.
        kwargs: keyword arguments of each layer.
        shared: what layers of the converted model hand over.
        held: whether the tokens are held out from fits.
        home: where its states wait while other batches run.
        place: where layers run.
        target: what a layer's attention output is to be, [rows, length, hidden], while the layer is fitted.
    """

    base: torch.Tensor
    converted: torch.Tensor
    kwargs: list[dict[str, Any]]
    shared: SharedStates
    held: bool
    home: torch.device
    place: torch.device
    target: torch.Tensor | None = None

    @contextlib.contextmanager
    def visiting(self) -> Iterator[None]:
        """Keeps hidden states and target on the device where layers run for a while.

        What layers lend there comes back, too, and is taken along again by who borrows it.
        """
        # By identity, because both streams may be the same tensor: it and its copy.
        moved: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}

        def there(state: torch.Tensor) -> torch.Tensor:
            if id(state) not in moved:
                moved[id(state)] = (state, state.to(self.place))
            return moved[id(state)][1]

        def back(state: torch.Tensor) -> torch.Tensor:
            if id(state) not in at_home:
                at_home[id(state)] = state.to(self.home)
            return at_home[id(state)]

        self._move(there)
        try:
            yield
        finally:
            # What has not changed has never left.
            at_home = {id(visitor): state for state, visitor in moved.values()}
            self._move(back)
            for lent in vars(self.shared).values():
                lent.update({layer: back(state) for layer, state in lent.items()})

    def _move(self, move: Callable[[torch.Tensor], torch.Tensor]) -> None:
        self.base, self.converted = move(self.base), move(self.converted)
        self.target = None if self.target is None else move(self.target)


def visit(batches: Iterable[Batch]) -> Iterator[Batch]:
    """Each batch in turn, its states on the device where layers run.

    Where a model is larger than that device's memory, so may be the states of all calibration tokens together.
    """
    for batch in batches:
        with contextlib.nullcontext() if batch.home == batch.place else batch.visiting():
            yield batch


def start_batches(
    base: PreTrainedModel,
    windows: torch.Tensor,
    holdout: float,
    batch_size: int,
    device: torch.device | None = None,
) -> list[Batch]:
    """Embeds all tokens.

    Args:
        base: the stock model.
        windows: [sequences, length] token ids.
        holdout: share of the sequences, the last ones, that are held out; they never share a batch with others.
        batch_size: sequences per batch.
        device: where the layers will run; None if that is where the model is.
    """
    home = next(base.parameters()).device
    held = min(len(windows) - 1, math.ceil(len(windows) * holdout)) if len(windows) > 1 else 0
    parts = [(windows[: len(windows) - held], False), (windows[len(windows) - held :], True)]
    batches = []
    for part, is_held in parts:
        for start in range(0, len(part), batch_size):
            hidden, kwargs = layer_inputs(base, part[start : start + batch_size].to(home))
            if device is not None:
                kwargs = send_to_device(kwargs, device)
            batches.append(Batch(hidden, hidden, kwargs, SharedStates(), is_held, home, device or home))
    return batches


class Passage:
    """Windows on their way through the layers of a model, one layer at a time, and the losses at the end.

    Args:
        batches: result of `start_batches`; several passages can begin with the same.
    """

    def __init__(self, batches: Sequence[Batch]):
        self.batches = [replace(batch, shared=SharedStates()) for batch in batches]

    def step(self, layer: nn.Module, index: int, layout: Layout | None = None) -> None:
        """Runs a layer, which is where layers run.

        Args:
            layout: of a converted model; None for the base.
        """
        for batch in visit(self.batches):
            more = {} if layout is None else {"uniattn_shared": batch.shared}
            batch.converted = run_layer(layer, batch.converted, batch.kwargs[index], **more)
            if layout is not None:
                release(batch.shared, layout, index)

    def loss(self, model: PreTrainedModel, windows: torch.Tensor) -> Loss:
        """What `window_loss` gives, with nothing of the model but what is outside of its layers.

        Args:
            windows: those that the batches were made of.
        """
        rows = windows.split([len(batch.converted) for batch in self.batches])
        place = self.batches[0].place
        with resident(place, *outside(model)):
            sums = []
            for batch, tokens in zip(visit(self.batches), rows, strict=True):
                with _layers_calling(model, lambda *args, _hidden=batch.converted, **kwargs: _hidden):
                    sums.append(token_losses(model, tokens.to(place)).double().sum(1).cpu())
        total = torch.cat(sums)
        return summarise(total, torch.full_like(total, windows.shape[1] - 1))


@contextlib.contextmanager
def _layers_calling(model: PreTrainedModel, call: Callable[..., torch.Tensor]) -> Iterator[None]:
    """Puts a function in the place of each layer."""
    originals = [layer.forward for layer in model.model.layers]
    try:
        for layer in model.model.layers:
            layer.forward = call
        yield
    finally:
        for layer, original in zip(model.model.layers, originals, strict=True):
            layer.forward = original


def layer_inputs(base: PreTrainedModel, tokens: torch.Tensor) -> tuple[torch.Tensor, list[dict[str, Any]]]:
    """The first layer's hidden states and what the model passes to each layer, without running any layer."""
    recorded: list[dict[str, Any]] = []
    first: list[torch.Tensor] = []

    def record(hidden_states: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        first.append(hidden_states)
        recorded.append(kwargs)
        return hidden_states

    with _layers_calling(base, record):
        base.model(tokens, use_cache=False)
    return first[0], recorded


def run_layer(layer: nn.Module, hidden: torch.Tensor, kwargs: dict[str, Any], **more: Any) -> torch.Tensor:
    """One decoder layer's output, [rows, length, hidden]."""
    output = layer(hidden, **kwargs, **more)
    return output[0] if isinstance(output, tuple) else output


def base_step(layer: Any, hidden: torch.Tensor, kwargs: dict[str, Any]) -> tuple[torch.Tensor, torch.Tensor]:
    """A base layer's output and its attention block's output."""
    seen: list[torch.Tensor] = []
    handle = layer.self_attn.register_forward_hook(lambda module, args, output: seen.append(output[0]))
    with hooked(handle):
        after = run_layer(layer, hidden, kwargs)
    return after, seen[0]


def attention_features(
    layer: Any, hidden: torch.Tensor, kwargs: dict[str, Any], shared: SharedStates
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """What a converted layer's projections see: the normed input x and the heads before W_o (None without W_o)."""
    attention = layer.self_attn
    output = getattr(attention, attention.output_name, None)
    seen: dict[str, torch.Tensor] = {}

    def keep_input(module: nn.Module, args: tuple, arguments: dict[str, Any]) -> None:
        seen["x"] = arguments["hidden_states"] if "hidden_states" in arguments else args[0]
        if output is None:
            raise _ForwardStoppedError

    def keep_heads(module: nn.Module, args: tuple) -> None:
        seen["heads"] = args[0]
        raise _ForwardStoppedError

    handles = [attention.register_forward_pre_hook(keep_input, with_kwargs=True)]
    if output is not None:
        handles.append(output.register_forward_pre_hook(keep_heads))
    with hooked(*handles), contextlib.suppress(_ForwardStoppedError):
        run_layer(layer, hidden, kwargs, uniattn_shared=shared)
    return seen["x"], seen.get("heads")


def attention_inputs(
    layer: Any, hidden: torch.Tensor, kwargs: dict[str, Any], shared: SharedStates | None = None
) -> dict[str, Any]:
    """The keyword arguments with which a layer calls its attention module, `hidden_states` among them.

    Args:
        shared: what earlier layers lend to a converted layer; None for one of the base.
    """
    more = {} if shared is None else {"uniattn_shared": shared}
    seen: dict[str, Any] = {}

    def keep(module: nn.Module, args: tuple, arguments: dict[str, Any]) -> None:
        seen.update(arguments)
        if args:
            seen["hidden_states"] = args[0]
        raise _ForwardStoppedError

    with hooked(layer.self_attn.register_forward_pre_hook(keep, with_kwargs=True)):
        with contextlib.suppress(_ForwardStoppedError):
            run_layer(layer, hidden, kwargs, **more)
    return seen


def positions_of(kwargs: dict[str, Any]) -> tuple[Any, torch.Tensor | None]:
    """What `embed_positions` is given beside states, of what an attention module is called with."""
    return kwargs["position_embeddings"], kwargs.get("position_ids")


def release(shared: SharedStates, layout: Layout, index: int, max_distance: int | None = None) -> None:
    """Forgets what no layer after `index` borrows.

    Args:
        max_distance: the layout may still change, so that each of so many layers after a layer may borrow from it.
    """
    last_use = layout.last_use
    for source in list(shared.queries):
        last = max(last_use.get(source, -1), -1 if max_distance is None else source + max_distance)
        if last <= index:
            shared.forget(source)
    if not any(plan.traits.borrows_values for plan in layout):
        shared.values.clear()
