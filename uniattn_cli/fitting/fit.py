"""Fits a converted model to its base, layer by layer, with two hidden-state streams.

Base and converted hidden states of all calibration tokens are carried through the layers side by side, so each layer
runs once or twice over the tokens, whatever the number of changed layers: a changed layer is fitted to inputs that
already contain the errors of the changed layers before it.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from uniattn_cli.fitting.adam import parameters_of, put_back
from uniattn_cli.fitting.align_queries import align_queries
from uniattn_cli.fitting.match_keys import LayerMatches
from uniattn_cli.fitting.match_outputs import SourceChooser
from uniattn_cli.fitting.refine import refine
from uniattn_cli.fitting.solve import solve, solved_parts
from uniattn_cli.fitting.stream import Batch, base_step, release, run_layer, start_batches, visit
from uniattn_cli.modeling.layout_uniattn import Layout
from uniattn_cli.models.building import build_attention
from uniattn_cli.models.on_disk import is_on_disk
from uniattn_cli.models.residence import resident
from uniattn_cli.recipe.schema import ConversionSpec

if TYPE_CHECKING:
    from transformers import PreTrainedModel


# Of the steps: a candidate of the search, or a layer whose heads are being matched, has most of the gain early.
TRIAL_SHARE = 0.25


def for_trials(spec: ConversionSpec) -> ConversionSpec:
    """The same fit with fewer steps, for candidates of a search and for matching heads; nothing is refined.

    Not where whole layouts are compared: there each is to look as good as it will be.
    """
    return replace(spec, align=math.ceil(spec.align * TRIAL_SHARE), refine=0)


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
        refined: `error_after` before and after all that it projects was trained, which is kept where it is smaller;
            None if not done.
    """

    layer: int
    kind: str
    ridge: float
    error_before: float
    error_after: float
    divergence: tuple[float, float] | None = None
    refined: tuple[float, float] | None = None


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
    watch: Callable[[int, Any, Any, bool], None] = lambda index, base_layer, layer, fitted: None,
) -> list[LayerFit]:
    """Fits every changed layer of `converted`: W_q where keys are borrowed, W_o and W_c, then all of it together.

    Args:
        base: the stock model.
        converted: result of `models.building.build_converted`; its unchanged weights are those of the base.
        windows: [sequences, length] calibration tokens without padding.
        spec: what is solved, the rank, the target and the share of sequences held out for the ridge strength.
        chooser: chooses the sources of borrowing layers anew, and changes the layout of `converted`.
        device: where layers run, one at a time and on one batch after another, while the models and all states stay
            where the base is; None: all there.
        batch_size: sequences that run at once; the result depends on it only by rounding.
        advance: told about each finished layer.
        watch: called with each layer's number, the base's layer and the converted one, before it is fitted (False) and
            after that (True), while both are where layers run.

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
    diverged, late = False, is_on_disk(base)
    for index, plan in enumerate(layout):
        base_layer, layer = base.model.layers[index], converted.model.layers[index]
        if plan.kind != "own" and not diverged:
            for batch in batches:
                batch.converted = batch.base
            diverged = True
        with resident(device, base_layer, layer):
            if chooser is not None and plan.kind != "own":
                layout = layout.with_plan(index, chooser.plan(layout, index, base, converted, batches))
            if plan.kind != "own" and (late or chooser is not None):
                layer.self_attn = build_attention(base, layout, index)
            watch(index, base_layer, layer, False)
            if not diverged:
                for batch in visit(batches):
                    batch.base = run_layer(layer, batch.base, batch.kwargs[index], uniattn_shared=batch.shared)
            else:
                fits += fit_layer(base, converted, index, batches, spec)
            watch(index, base_layer, layer, True)
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
    """Aligns the queries of a layer that borrows keys, fits the rest and moves both streams through the layer."""
    base_layer, layer = base.model.layers[index], converted.model.layers[index]
    divergence = None
    if spec.align and layer.self_attn.plan.traits.aligns_queries:
        own = build_attention(base, Layout.own(len(base.model.layers)), index)
        sources = sorted({source for source, _ in layer.self_attn.key_sources})
        divergence = align_queries(layer, LayerMatches(base_layer, own, index, batches, sources), spec.align)
    return [replace(fit, divergence=divergence) for fit in step_layer(base_layer, layer, index, batches, spec)]


def step_layer(
    base_layer: nn.Module, layer: Any, index: int, batches: list[Batch], spec: ConversionSpec
) -> list[LayerFit]:
    """Fits one layer and moves both streams through it."""
    solved = any(solved_parts(layer.self_attn, spec))
    for batch in visit(batches):
        before = batch.base
        batch.base, target = base_step(base_layer, batch.base, batch.kwargs[index])
        batch.target = target.float() + before.float() - batch.converted.float() if spec.aim == "residual" else target
    fits = [_fit(layer, index, batches, spec)] if solved else []
    for batch in visit(batches):
        batch.converted = run_layer(layer, batch.converted, batch.kwargs[index], uniattn_shared=batch.shared)
        batch.target = None
    return fits


def _fit(layer: Any, index: int, batches: list[Batch], spec: ConversionSpec) -> LayerFit:
    """Solves W_o and W_c; where projections are refined, again with the new ones, and keeps what is better."""
    attention = layer.self_attn
    best = solve(layer, index, batches, spec)
    before, refined = best.error_before, None
    if spec.refine and solved_parts(attention, spec)[0]:
        first, kept = best, parameters_of(*attention.modules())
        # Held-out tokens decide in the end, so the start is without them.
        first.partial.write(attention)
        refine(layer, index, batches, spec.refine)
        best = solve(layer, index, batches, spec)
        if best.error_after >= first.error_after:
            put_back(kept)
            best = first
        refined = (first.error_after, best.error_after)
    best.whole.write(attention)
    return LayerFit(index, attention.plan.kind, best.strength, before, best.error_after, refined=refined)
