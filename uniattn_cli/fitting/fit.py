"""Fits a converted model to its base, layer by layer, with two hidden-state streams.

Base and converted hidden states of all calibration tokens are carried through the layers side by side, so each layer
runs once or twice over the tokens, whatever the number of changed layers: a changed layer is fitted to inputs that
already contain the errors of the changed layers before it.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from uniattn_cli.errors import ModelError
from uniattn_cli.fitting.align_queries import align_queries
from uniattn_cli.fitting.match_outputs import SourceChooser
from uniattn_cli.fitting.moments import Moments, PositionSums, RidgeFit, fit_ridge, reduce_rank
from uniattn_cli.fitting.stream import Batch, attention_features, base_step, release, resident, run_layer, start_batches
from uniattn_cli.modeling.layout_uniattn import Layout
from uniattn_cli.modeling.sharing_uniattn import LowRankCompensation, SharedAttentionMixin
from uniattn_cli.models.building import build_attention
from uniattn_cli.recipe.schema import ConversionSpec

if TYPE_CHECKING:
    from transformers import PreTrainedModel


# Of the steps: a candidate of the search, or a layer whose heads are being matched, has most of the gain early.
TRIAL_SHARE = 0.25


def for_trials(spec: ConversionSpec) -> ConversionSpec:
    """The same fit with fewer steps, for candidates of a search and for matching heads.

    Not where whole layouts are compared: there layers with borrowed keys would look worse than they will be.
    """
    return replace(spec, align=math.ceil(spec.align * TRIAL_SHARE))


@dataclass(frozen=True)
class LayerFit:
    """How well one layer was fitted, on tokens held out from its fit (on its own, of a single sequence).

    Attributes:
        layer: number of the layer.
        kind: its kind.
        ridge: chosen ridge strength; infinity where the unfitted weights were best.
        error_before: mean squared error of the attention output before the fit, relative to the target's mean square.
        error_after: the same after the fit.
        divergence: of its map from the base's, in nats, before and after its queries were aligned; None if not done.
    """

    layer: int
    kind: str
    ridge: float
    error_before: float
    error_after: float
    divergence: tuple[float, float] | None = None


@torch.no_grad()
def fit_layers(
    base: PreTrainedModel,
    converted: PreTrainedModel,
    windows: torch.Tensor,
    spec: ConversionSpec,
    *,
    chooser: SourceChooser | None = None,
    device: torch.device | None = None,
    batch_size: int = 8,
    advance: Callable[..., None] = lambda steps=1, text="": None,
) -> list[LayerFit]:
    """Solves W_o and W_c of every changed layer and writes them into `converted`; first W_q where keys are borrowed.

    Args:
        base: the stock model.
        converted: result of `checkpoint.build_converted`; its unchanged weights are those of the base.
        windows: [sequences, length] calibration tokens without padding.
        spec: what is solved, the rank, the target and the share of sequences held out for the ridge strength.
        chooser: chooses the sources of borrowing layers anew, and changes the layout of `converted`.
        device: where layers run, one at a time, while the models stay where they are; None: all where the base is.
        batch_size: sequences that run at once; the result depends on it only by rounding.
        advance: told about each finished layer.

    Returns:
        One `LayerFit` per fitted layer, in order.

    Raises:
        ModelError: hidden states are not finite.
    """
    layout: Layout = converted.config.layout
    batches = start_batches(base, windows, spec.holdout, batch_size, device)
    if chooser is not None:
        for layer in converted.model.layers:
            layer.self_attn.lend_to(None)
    fits = []
    diverged = False
    for index, plan in enumerate(layout):
        base_layer, layer = base.model.layers[index], converted.model.layers[index]
        if plan.kind != "own" and not diverged:
            for batch in batches:
                batch.converted = batch.base
            diverged = True
        with resident(device, base_layer, layer):
            if chooser is not None and plan.kind != "own":
                layout = layout.with_plan(index, chooser.plan(layout, index, base, converted, batches))
                layer.self_attn = build_attention(base, layout, index)
            if not diverged:
                for batch in batches:
                    batch.base = run_layer(layer, batch.base, batch.kwargs[index], uniattn_shared=batch.shared)
            else:
                fits += fit_layer(base, converted, index, batches, spec)
        for batch in batches:
            release(batch.shared, layout, index, chooser.max_distance if chooser else None)
        advance(1, f"layer {index}")
    if chooser is not None:
        converted.config.set_layout(layout)
        for layer in converted.model.layers:
            layer.self_attn.lend_to(layout)
    return fits


def fit_layer(
    base: PreTrainedModel, converted: PreTrainedModel, index: int, batches: list[Batch], spec: ConversionSpec
) -> list[LayerFit]:
    """Aligns the queries of a layer that borrows keys, fits the layer and moves both streams through it."""
    base_layer, layer = base.model.layers[index], converted.model.layers[index]
    divergence = None
    if spec.align and layer.self_attn.plan.traits.aligns_queries:
        own = build_attention(base, Layout.own(len(base.model.layers)), index)
        divergence = align_queries(base_layer, layer, own, index, batches, spec.align)
    return [replace(fit, divergence=divergence) for fit in step_layer(base_layer, layer, index, batches, spec)]


def step_layer(
    base_layer: nn.Module, layer: Any, index: int, batches: list[Batch], spec: ConversionSpec
) -> list[LayerFit]:
    """Fits one layer and moves both streams through it."""
    attention = layer.self_attn
    fits = []
    problem: _Problem | None = None
    solved = solved_parts(attention, spec)
    for batch in batches:
        before = batch.base
        batch.base, target = base_step(base_layer, batch.base, batch.kwargs[index])
        if any(solved):
            if spec.aim == "residual":
                target = target.float() + before.float() - batch.converted.float()
            problem = _add(problem, layer, index, batch, target, solved, spec.solve == "reference")
    if problem is not None:
        fits.append(_solve(attention, index, problem, solved))
    for batch in batches:
        batch.converted = run_layer(layer, batch.converted, batch.kwargs[index], uniattn_shared=batch.shared)
    return fits


@dataclass
class _Problem:
    """Moments of one layer's fit; features are [heads, x] or a part of it, targets are what is missing.

    `positions` are the sums over sequences from which the paper's initialisation is computed, where it is asked for.
    """

    fit: Moments
    held: Moments
    blocks: list[int]
    energies: dict[bool, float] = field(default_factory=lambda: {True: 0.0, False: 0.0})
    positions: PositionSums | None = None

    def add(self, features: torch.Tensor, missing: torch.Tensor, target: torch.Tensor, held: bool) -> None:
        """Adds tokens: features [rows, length, p], missing and target [rows, length, d]."""
        (self.held if held else self.fit).add(features.flatten(0, 1), missing.flatten(0, 1))
        self.energies[held] += target.double().square().sum().item()
        if self.positions is not None:
            self.positions.add(features, missing)

    @property
    def energy(self) -> float:
        """Mean square of the target on the tokens of `validation`."""
        return self.energies[self.held.tokens > 0] / self.validation.tokens

    @property
    def validation(self) -> Moments:
        """The tokens that choose the ridge strength: held-out ones, where there are any."""
        return self.held if self.held.tokens else self.fit

    @classmethod
    def like(cls, features: torch.Tensor, missing: torch.Tensor, blocks: list[int], reference: bool) -> _Problem:
        sizes = (features.shape[-1], missing.shape[-1], features.device)
        return cls(Moments(*sizes), Moments(*sizes), blocks, positions=PositionSums() if reference else None)


def _add(
    problem: _Problem | None,
    layer: Any,
    index: int,
    batch: Batch,
    target: torch.Tensor,
    solved: tuple[bool, bool],
    reference: bool,
) -> _Problem:
    attention = layer.self_attn
    normed, heads = attention_features(layer, batch.converted, batch.kwargs[index], batch.shared)
    missing = target.float()
    if heads is not None:
        missing = missing - getattr(attention, attention.output_name)(heads).float()
    parts = [part for part, is_solved in zip((heads, normed), solved, strict=True) if is_solved and part is not None]
    features = torch.cat([part.float() for part in parts], dim=-1)
    if problem is None:
        problem = _Problem.like(features, missing, [part.shape[-1] for part in parts], reference)
    problem.add(features, missing, target, batch.held)
    return problem


def solved_parts(attention: SharedAttentionMixin, spec: ConversionSpec) -> tuple[bool, bool]:
    """Whether W_o and whether W_c of a layer are solved; a `linear` layer is nothing without its W_c."""
    changed = attention.plan.kind != "own"
    output = changed and hasattr(attention, attention.output_name) and spec.solve in ("both", "output")
    compensation = attention.compensation is not None and (
        spec.solve in ("both", "compensation", "reference") or attention.plan.traits.compensation == "required"
    )
    return output, compensation


def _solve(attention: SharedAttentionMixin, index: int, problem: _Problem, solved: tuple[bool, bool]) -> LayerFit:
    """Solves one layer's problem and writes the weights."""
    validation = problem.validation
    if not (problem.fit.ff.isfinite().all() and problem.fit.fy.isfinite().all() and validation.yy.isfinite()):
        raise ModelError(
            f"cannot fit layer {index}: hidden states overflow in {_dtype(attention)}; set model.dtype to "
            "bfloat16 or float32"
        )
    if problem.positions is not None:
        weights = problem.positions.solve()
        result = RidgeFit(weights, 0.0, validation.yy.item() / validation.tokens, validation.error(weights))
    else:
        result = fit_ridge(problem.fit, validation, problem.blocks)
    heads = problem.blocks[0] if solved[0] else 0
    output, after = result.weights[:heads], result.error_after
    compensation = attention.compensation if solved[1] else None
    if isinstance(compensation, LowRankCompensation):
        moments = problem.fit.merged(problem.held)
        rank = compensation.down.out_features
        output, down, up = reduce_rank(result.weights, moments, heads, rank, result.strength)
        compensation.down.weight.copy_(down)
        compensation.up.weight.copy_(up)
        after = validation.error(torch.cat([output, (up @ down).T]))
    elif compensation is not None:
        compensation.weight.copy_(result.weights[heads:].T)
    if heads:
        _correct(getattr(attention, attention.output_name), output)
    energy = max(problem.energy, 1e-30)
    return LayerFit(index, attention.plan.kind, result.strength, result.error_before / energy, after / energy)


def _dtype(module: nn.Module) -> str:
    return str(next(module.parameters()).dtype).removeprefix("torch.")


def _correct(projection: nn.Linear, correction: torch.Tensor) -> None:
    """Adds a correction [in, out] to a projection, whose weight may be shared with the base and is replaced."""
    weight = (projection.weight.double() + correction.T).to(projection.weight.dtype)
    projection.weight = nn.Parameter(weight, requires_grad=projection.weight.requires_grad)
