"""Fits a converted model to its base, layer by layer, with two hidden-state streams.

Base and converted hidden states of all calibration tokens are carried through the layers side by side, so each layer
runs once or twice over the tokens, whatever the number of changed layers: a changed layer is fitted to inputs that
already contain the errors of the changed layers before it.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from uniattn_cli.conversion.moments import Moments, fit_ridge, reduce_rank
from uniattn_cli.modeling.layout_uniattn import Layout
from uniattn_cli.modeling.sharing_uniattn import LowRankCompensation, SharedStates
from uniattn_cli.recipe import ConversionSpec

if TYPE_CHECKING:
    from transformers import PreTrainedModel


class _ForwardStoppedError(Exception):
    """Ends a layer's forward pass once what is needed has been seen."""


@dataclass(frozen=True)
class LayerFit:
    """How well one changed layer was fitted, on tokens held out from its fit.

    Attributes:
        layer: number of the layer.
        kind: its kind.
        ridge: chosen ridge strength; infinity where the unfitted weights were best.
        error_before: mean squared error of the attention output before the fit, relative to the target's mean square.
        error_after: the same after the fit.
    """

    layer: int
    kind: str
    ridge: float
    error_before: float
    error_after: float


@dataclass
class _Batch:
    """One batch on its way through the layers; `kwargs` is what the base model gives each of its layers."""

    base: torch.Tensor
    converted: torch.Tensor
    kwargs: list[dict[str, Any]]
    shared: SharedStates
    held: bool


@torch.no_grad()
def fit_layers(
    base: PreTrainedModel,
    converted: PreTrainedModel,
    windows: torch.Tensor,
    spec: ConversionSpec,
    *,
    batch_size: int = 8,
    advance: Callable[..., None] = lambda steps=1, text="": None,
) -> list[LayerFit]:
    """Solves W_o and W_c of every changed layer and writes them into `converted`.

    Args:
        base: the stock model.
        converted: result of `checkpoint.build_converted`; its unchanged weights are those of the base.
        windows: [sequences, length] calibration tokens without padding.
        spec: what is solved, the rank, the target and the share of sequences held out for the ridge strength.
        batch_size: sequences that run at once; the result depends on it only by rounding.
        advance: told about each finished layer.

    Returns:
        One `LayerFit` per fitted layer, in order.
    """
    layout: Layout = converted.config.layout
    batches = _start(base, windows, spec.holdout, batch_size)
    fits = []
    diverged = False
    for index, plan in enumerate(layout):
        base_layer, layer = base.model.layers[index], converted.model.layers[index]
        changed = plan.kind != "own"
        if changed and not diverged:
            for batch in batches:
                batch.converted = batch.base
            diverged = True
        if changed and any(_solved_parts(layer.self_attn, spec)):
            problem = _collect(base_layer, layer, index, batches, spec)
            fits.append(_solve(layer.self_attn, index, plan.kind, problem, spec))
        elif diverged:
            for batch in batches:
                batch.base = _run(base_layer, batch.base, batch.kwargs[index])
        for batch in batches:
            stream = batch.converted if diverged else batch.base
            output = _run(layer, stream, batch.kwargs[index], uniattn_shared=batch.shared)
            batch.converted = output
            if not diverged:
                batch.base = output
            _release(batch.shared, layout, index)
        advance(1, f"layer {index}")
    return fits


def _start(base: PreTrainedModel, windows: torch.Tensor, holdout: float, batch_size: int) -> list[_Batch]:
    """Embeds all tokens. Held-out sequences are the last ones, and never share a batch with others."""
    device = next(base.parameters()).device
    held = min(len(windows) - 1, math.ceil(len(windows) * holdout)) if len(windows) > 1 else 0
    parts = [(windows[: len(windows) - held], False), (windows[len(windows) - held :], True)]
    batches = []
    for part, is_held in parts:
        for start in range(0, len(part), batch_size):
            tokens = part[start : start + batch_size].to(device)
            hidden, kwargs = _layer_inputs(base, tokens)
            batches.append(_Batch(hidden, hidden, kwargs, SharedStates(), is_held))
    return batches


def _layer_inputs(base: PreTrainedModel, tokens: torch.Tensor) -> tuple[torch.Tensor, list[dict[str, Any]]]:
    """The first layer's hidden states and what the model passes to each layer, without running any layer.

    Masks, rotary embeddings and whatever else a family makes are taken from the model itself, so nothing here knows it.
    """
    recorded: list[dict[str, Any]] = []
    first: list[torch.Tensor] = []
    originals = [layer.forward for layer in base.model.layers]

    def record(hidden_states: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        first.append(hidden_states)
        recorded.append(kwargs)
        return hidden_states

    try:
        for layer in base.model.layers:
            layer.forward = record
        base.model(tokens, use_cache=False)
    finally:
        for layer, original in zip(base.model.layers, originals, strict=True):
            layer.forward = original
    return first[0], recorded


def _run(layer: nn.Module, hidden: torch.Tensor, kwargs: dict[str, Any], **more: Any) -> torch.Tensor:
    output = layer(hidden, **kwargs, **more)
    return output[0] if isinstance(output, tuple) else output


def _release(shared: SharedStates, layout: Layout, index: int) -> None:
    """Forgets what no later layer borrows."""
    for source, last in layout.last_use.items():
        if last <= index:
            for states in (shared.queries, shared.keys, shared.values):
                states.pop(source, None)
    if not any(plan.kind == "kv" for plan in layout):
        shared.values.clear()


@contextlib.contextmanager
def _hooks(*handles: Any) -> Iterator[None]:
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@dataclass
class _Problem:
    """Moments of one layer's fit; features are [heads, x] or a part of it, targets are what is missing."""

    fit: Moments
    held: Moments
    blocks: list[int]
    energy: float


def _collect(
    base_layer: nn.Module, layer: nn.Module, index: int, batches: list[_Batch], spec: ConversionSpec
) -> _Problem:
    """Runs the base layer on all batches and accumulates the converted layer's moments."""
    attention = layer.self_attn
    output = getattr(attention, attention.output_name, None)
    problem: _Problem | None = None
    energy, tokens = 0.0, 0
    for batch in batches:
        before = batch.base
        batch.base, target = _base_step(base_layer, batch.base, batch.kwargs[index])
        normed, heads = _features(layer, batch.converted, batch.kwargs[index], batch.shared)
        if spec.target == "residual":
            target = target.float() + before.float() - batch.converted.float()
        missing = target.float()
        if heads is not None:
            missing = missing - output(heads).float()
        parts = [part for part, solved in zip((heads, normed), _solved_parts(attention, spec), strict=True) if solved]
        features = torch.cat([part.flatten(0, 1).float() for part in parts], dim=1)
        missing = missing.flatten(0, 1)
        if problem is None:
            sizes = (features.shape[1], missing.shape[1], features.device)
            problem = _Problem(Moments(*sizes), Moments(*sizes), [part.shape[-1] for part in parts], 0.0)
        (problem.held if batch.held else problem.fit).add(features, missing)
        if batch.held:
            energy += target.double().square().sum().item()
            tokens += missing.shape[0]
    problem.energy = energy / max(tokens, 1)
    return problem


def _base_step(layer: nn.Module, hidden: torch.Tensor, kwargs: dict[str, Any]) -> tuple[torch.Tensor, torch.Tensor]:
    """The base layer's output and its attention block's output."""
    seen: list[torch.Tensor] = []
    handle = layer.self_attn.register_forward_hook(lambda module, args, output: seen.append(output[0]))
    with _hooks(handle):
        after = _run(layer, hidden, kwargs)
    return after, seen[0]


def _features(
    layer: nn.Module, hidden: torch.Tensor, kwargs: dict[str, Any], shared: SharedStates
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """What the converted layer's projections see: the normed input x and the heads before W_o (None without W_o)."""
    attention = layer.self_attn
    output = getattr(attention, attention.output_name, None)
    seen: dict[str, torch.Tensor] = {}

    def keep_input(module: nn.Module, args: tuple, given: dict[str, Any]) -> None:
        seen["x"] = given["hidden_states"] if "hidden_states" in given else args[0]
        if output is None:
            raise _ForwardStoppedError

    def keep_heads(module: nn.Module, args: tuple) -> None:
        seen["heads"] = args[0]
        raise _ForwardStoppedError

    handles = [attention.register_forward_pre_hook(keep_input, with_kwargs=True)]
    if output is not None:
        handles.append(output.register_forward_pre_hook(keep_heads))
    with _hooks(*handles), contextlib.suppress(_ForwardStoppedError):
        _run(layer, hidden, kwargs, uniattn_shared=shared)
    return seen["x"], seen.get("heads")


def _solved_parts(attention: nn.Module, spec: ConversionSpec) -> tuple[bool, bool]:
    """Whether W_o and whether W_c of a layer are solved; a `linear` layer is nothing without its W_c."""
    output = hasattr(attention, attention.output_name) and spec.solve in ("both", "output")
    compensation = attention.compensation is not None and (
        spec.solve in ("both", "compensation") or attention.plan.kind == "linear"
    )
    return output, compensation


def _solve(attention: nn.Module, index: int, kind: str, problem: _Problem, spec: ConversionSpec) -> LayerFit:
    """Solves one layer's problem and writes the weights."""
    held = problem.held if problem.held.tokens else problem.fit
    result = fit_ridge(problem.fit, held, problem.blocks)
    energy = problem.energy or (held.yy.item() / held.tokens)
    solves_output, solves_compensation = _solved_parts(attention, spec)
    heads = problem.blocks[0] if solves_output else 0
    output, after = result.weights[:heads], result.error_after
    compensation = attention.compensation if solves_compensation else None
    if isinstance(compensation, LowRankCompensation):
        moments = problem.fit.merged(problem.held) if problem.held.tokens else problem.fit
        rank = compensation.down.out_features
        output, down, up = reduce_rank(result.weights, moments, heads, rank, result.strength)
        compensation.down.weight.copy_(down)
        compensation.up.weight.copy_(up)
        after = held.error(torch.cat([output, (up @ down).T]))
    elif compensation is not None:
        compensation.weight.copy_(result.weights[heads:].T)
    if heads:
        projection = getattr(attention, attention.output_name)
        projection.weight.copy_(projection.weight.double() + output.T)
    return LayerFit(index, kind, result.strength, result.error_before / energy, after / energy)
