"""Reads what every layer gives to the attention backend, whatever the family, and asks the backend again."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from transformers import AttentionInterface
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, AttentionMaskInterface
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from uniattn_cli.errors import ModelError

if TYPE_CHECKING:
    from transformers import PreTrainedModel

BACKEND = "uniattn_capture"
# What families call the projection from the heads to the residual stream.
OUTPUT_PROJECTIONS = ("o_proj", "out_proj", "dense", "wo")
# Options of a call that are about where its tokens stand in a batch; a mask or a causal call says all that matters.
POSITION_OPTIONS = ("position_ids", "cache_position")


@dataclass
class LayerStates:
    """What one layer gave to the attention backend for one sequence, and what it got; padding is left out.

    Attributes:
        queries: [query_heads, tokens, head_dim], after rotary embedding and norms.
        keys: [kv_heads, tokens, head_dim].
        values: [kv_heads, tokens, head_dim].
        mask: None for plain causal attention, else [1, 1 or query_heads, tokens, tokens], boolean or added to scores.
        scaling: factor on the scores.
        softcap: bound of the scores, or None.
        sinks: a score of each query head for no key at all, [query_heads], or None.
        window: a query sees so many keys, itself included, where the mask does not say it; None for all.
        output: [tokens, query_heads, head_dim], what the backend answered.
        inputs: [tokens, hidden], what the attention module received; None if it cannot be told.
        materialises: whether the backend holds whole maps in memory.
        call: the backend: values [n, kv_heads, tokens, head_dim] to outputs [n, tokens, query_heads, head_dim].
    """

    queries: torch.Tensor
    keys: torch.Tensor
    values: torch.Tensor
    mask: torch.Tensor | None
    scaling: float
    softcap: float | None
    sinks: torch.Tensor | None
    window: int | None
    output: torch.Tensor
    inputs: torch.Tensor | None
    materialises: bool
    call: Callable[[LayerStates, torch.Tensor], torch.Tensor] = field(repr=False)

    def attend(self, values: torch.Tensor) -> torch.Tensor:
        """This layer's maps, applied by its own backend to n other sets of values.

        Args:
            values: [n, kv_heads, tokens, head_dim].

        Returns:
            [n, tokens, query_heads, head_dim].
        """
        return self.call(self, values)


@dataclass
class _Call:
    """One call of the attention backend, for a whole batch."""

    module: nn.Module
    query: torch.Tensor
    key: torch.Tensor
    value: torch.Tensor
    mask: torch.Tensor | None
    scaling: float
    softcap: float | None
    options: dict[str, Any]
    backend: Callable
    materialises: bool
    inputs: torch.Tensor | None = None
    output: torch.Tensor | None = None

    def __post_init__(self) -> None:
        if self.softcap is not None:
            self.options["softcap"] = self.softcap

    def run(self) -> tuple:
        result = self.backend(
            self.module, self.query, self.key, self.value, self.mask, scaling=self.scaling, **self.options
        )
        self.output = result[0]
        return result

    def move(self, home: torch.device) -> None:
        """Takes all states of the call home; the mask, which layers share, stays."""
        for name in ("query", "key", "value", "inputs", "output"):
            if (states := getattr(self, name)) is not None:
                setattr(self, name, states.to(home))
        # Sinks are weights, and may be where their layer runs only as long as it does.
        if (sinks := self.options.get("s_aux")) is not None:
            self.options["s_aux"] = sinks.detach().to(home)

    def answered(self) -> torch.Tensor:
        """What the backend gave; only for a call that was run."""
        assert self.output is not None
        return self.output

    def mask_of(self, index: int, keep: torch.Tensor | None) -> torch.Tensor | None:
        """The mask of one sequence of the batch; see `sequence`."""
        mask = self.mask
        if mask is None or mask.dim() != 4:  # one of tokens, as FlashAttention takes it, says nothing without padding
            return None
        mask = mask[index : index + 1] if len(mask) > 1 else mask
        return mask if keep is None else mask[..., keep, :][..., keep]

    def sequence(
        self, index: int, keep: torch.Tensor | None, mask: torch.Tensor | None, device: torch.device | None
    ) -> LayerStates:
        """The states of one sequence of the batch.

        Args:
            keep: the positions of its real tokens, None for all.
            mask: of the sequence.
            device: where they are needed; None for where they are.
        """

        def real(tensor: torch.Tensor, dim: int) -> torch.Tensor:
            return (tensor[index] if keep is None else tensor[index].index_select(dim, keep)).to(device)

        sinks = self.options.get("s_aux")
        return LayerStates(
            queries=real(self.query, 1),
            keys=real(self.key, 1),
            values=real(self.value, 1),
            mask=mask,
            scaling=self.scaling,
            softcap=self.softcap,
            sinks=None if sinks is None else sinks.to(device),
            window=self.options.get("sliding_window") if mask is None else None,
            output=real(self.answered(), 0),
            inputs=None if self.inputs is None else real(self.inputs, 0),
            materialises=self.materialises,
            call=self._attend,
        )

    def _attend(self, states: LayerStates, values: torch.Tensor) -> torch.Tensor:
        options = {name: value for name, value in self.options.items() if name not in POSITION_OPTIONS}
        module: Any = self.module
        if states.sinks is not None:
            options["s_aux"] = states.sinks
            module = _WithSinks(module, states.sinks)
        size = (len(values), -1, -1, -1)
        queries, keys = states.queries.expand(size), states.keys.expand(size)
        return self.backend(module, queries, keys, values, states.mask, scaling=states.scaling, **options)[0]


class _WithSinks:
    """A module of attention whose sinks are here, wherever its weights may be; some backends read them there."""

    def __init__(self, module: nn.Module, sinks: torch.Tensor):
        self._module, self.sinks = module, sinks

    def __getattr__(self, name: str) -> Any:
        return getattr(self._module, name)


@dataclass
class Captured:
    """Calls by layer, replaced by each forward pass.

    Attributes:
        original: the model's own attention backend.
        home: where states wait for the pass to end; None for where layers run.
        projections: output projections by layer, where they are known.
        gated: layers that do something to the backend's answer before they project it.
    """

    original: str
    home: torch.device | None = None
    projections: dict[int, nn.Linear] = field(default_factory=dict)
    gated: set[int] = field(default_factory=set)
    _calls: dict[int, _Call] = field(default_factory=dict)
    _inputs: dict[int, torch.Tensor] = field(default_factory=dict)
    _checked: set[int] = field(default_factory=set)

    def take(
        self, attention_mask: torch.Tensor | None = None, index: int = 0, device: torch.device | None = None
    ) -> list[LayerStates]:
        """The states of one sequence of the last forward pass, one entry per layer, without its padding.

        Args:
            attention_mask: [batch, tokens] of the forward pass, 0 for padding; None if there was none.
            index: row of the batch.
            device: where the states are needed; None for where they are.
        """
        keep = None
        if attention_mask is not None and not attention_mask[index].all():
            keep = attention_mask[index].nonzero().squeeze(1)
        # Layers with the same mask are told by its being the same tensor.
        masks: dict[int, torch.Tensor | None] = {}
        for call in self._calls.values():
            if id(call.mask) not in masks:
                masks[id(call.mask)] = call.mask_of(index, keep)
        calls = [self._calls[layer] for layer in sorted(self._calls)]
        return [call.sequence(index, keep, masks[id(call.mask)], device) for call in calls]

    def clear(self) -> None:
        """Lets go of the last forward pass."""
        self._calls.clear()
        self._inputs.clear()

    def attention(self, module, query, key, value, attention_mask, *, scaling=None, softcap=None, **options):
        """The registered attention function: keeps the call, then lets the original backend answer."""
        eager: Any = getattr(sys.modules[type(module).__module__], "eager_attention_forward", None)
        backend = ALL_ATTENTION_FUNCTIONS.get_interface(self.original, eager)
        scaling = query.shape[-1] ** -0.5 if scaling is None else scaling
        # In float32 no fused kernel of CUDA takes grouped queries, so that SDPA computes them step by step.
        materialises = self.original == "eager" or (query.is_cuda and query.dtype == torch.float32)
        call = _Call(module, query, key, value, attention_mask, scaling, softcap, options, backend, materialises)
        call.inputs = self._inputs.pop(module.layer_idx, None)
        self._calls[module.layer_idx] = call
        result = call.run()
        if self.home is not None:
            call.move(self.home)
        return result

    def hooks(self, model: nn.Module) -> Iterator[torch.utils.hooks.RemovableHandle]:
        """Puts hooks on the attention modules whose output projection has a known name."""
        for module in model.modules():
            layer = getattr(module, "layer_idx", None)
            projection = next((getattr(module, name) for name in OUTPUT_PROJECTIONS if hasattr(module, name)), None)
            if isinstance(layer, int) and isinstance(projection, nn.Linear) and projection.weight.is_floating_point():
                self.projections[layer] = projection
                yield module.register_forward_pre_hook(self._keep_inputs, with_kwargs=True)
                yield projection.register_forward_pre_hook(self._compare_with(layer))

    def _keep_inputs(self, module: Any, args: tuple, kwargs: dict) -> None:
        hidden = kwargs["hidden_states"] if "hidden_states" in kwargs else next(iter(args), None)
        if hidden is not None:
            self._inputs[module.layer_idx] = hidden

    def _compare_with(self, layer: int) -> Callable:
        """Once per layer: is what is projected what the backend answered?"""

        def hook(module: nn.Module, args: tuple) -> None:
            if layer in self._checked or layer not in self._calls:
                return
            self._checked.add(layer)
            output = self._calls[layer].answered().flatten(2).to(args[0].device)
            if output.shape != args[0].shape or not torch.equal(output, args[0]):
                self.gated.add(layer)

        return hook


@contextlib.contextmanager
def capture(model: PreTrainedModel, home: torch.device | None = None) -> Iterator[Captured]:
    """While active, each forward call of the model fills the yielded `Captured`.

    Args:
        home: where states wait for the pass to end; None for where layers run.

    Raises:
        ModelError: the model computes attention by itself, so that nothing can be captured.
    """
    original = model.config._attn_implementation
    if original not in ALL_MASK_ATTENTION_FUNCTIONS:
        raise ModelError(f"attention backend '{original}' cannot be analysed; set model.attention to sdpa or eager")
    captured = Captured(original, home)
    AttentionInterface.register(BACKEND, captured.attention)
    # Without a mask function of its own a registered backend gets no mask at all, and padding would be ignored.
    AttentionMaskInterface.register(BACKEND, ALL_MASK_ATTENTION_FUNCTIONS[original])
    model.config._attn_implementation = BACKEND
    hooks: list[Any] = []
    try:
        hooks.extend(captured.hooks(model))
        yield captured
    finally:
        for hook in hooks:
            hook.remove()
        model.config._attn_implementation = original
        captured.clear()
