"""W_o and W_c of one layer by least squares on calibration tokens."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from uniattn_cli.errors import ModelError
from uniattn_cli.fitting.moments import Moments, PositionSums, RidgeFit, fit_ridge, reduce_rank
from uniattn_cli.fitting.stream import Batch, attention_features, visit
from uniattn_cli.modeling.sharing_uniattn import LowRankCompensation, SharedAttentionMixin
from uniattn_cli.recipe.schema import ConversionSpec


def solved_parts(attention: SharedAttentionMixin, spec: ConversionSpec) -> tuple[bool, bool]:
    """Whether W_o and whether W_c of a layer are solved; a `linear` layer is nothing without its W_c."""
    changed = attention.plan.kind != "own"
    output = changed and hasattr(attention, attention.output_name) and spec.solve in ("both", "output")
    compensation = attention.compensation is not None and (
        spec.solve in ("both", "compensation", "reference") or attention.plan.traits.compensation == "required"
    )
    return output, compensation


@dataclass
class Problem:
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
    def like(cls, features: torch.Tensor, missing: torch.Tensor, blocks: list[int], reference: bool) -> Problem:
        sizes = (features.shape[-1], missing.shape[-1], features.device)
        return cls(Moments(*sizes), Moments(*sizes), blocks, positions=PositionSums() if reference else None)

    def of_heads(self) -> Problem:
        """The same without x, for a layer without W_c."""
        fit, held = (moments.first(self.blocks[0]) for moments in (self.fit, self.held))
        return Problem(fit, held, self.blocks[:1], self.energies)


@dataclass(frozen=True)
class Change:
    """What a solution changes in a layer.

    Attributes:
        output: what is added to W_o, [heads, d].
        compensation: the parameters of W_c, if it is solved: itself, or `down` and `up`.
    """

    output: torch.Tensor
    compensation: tuple[torch.Tensor, ...]

    @property
    def weights(self) -> torch.Tensor:
        """As a solution of the problem, [p, d]."""
        if not self.compensation:
            return self.output
        return torch.cat([self.output, functools.reduce(torch.matmul, self.compensation[::-1]).T])

    def write(self, attention: SharedAttentionMixin) -> None:
        """Adds it to a layer's weights, of which W_o may be shared with the base and is replaced."""
        if attention.compensation is not None and self.compensation:
            for parameter, found in zip(attention.compensation.parameters(), self.compensation, strict=True):
                parameter.copy_(found)
        if len(self.output):
            _correct(getattr(attention, attention.output_name), self.output)


@dataclass(frozen=True)
class Solution:
    """A solved problem.

    Attributes:
        partial: solved for without the held-out tokens.
        whole: solved for with all tokens.
        strength: chosen ridge strength; infinity where no change was better than any.
        error_before: mean squared error of the attention output on held-out tokens before the change, without W_c,
            relative to the target's mean square.
        error_after: the same after `partial`.
    """

    partial: Change
    whole: Change
    strength: float
    error_before: float
    error_after: float


def solve(layer: Any, index: int, batches: Sequence[Batch], spec: ConversionSpec) -> Solution:
    """Solves W_o and W_c of a layer by least squares, without writing them.

    Args:
        layer: the converted model's.
        index: its number.
        batches: the converted stream where it enters the layer, what earlier layers lend, and the target.
        spec: what is solved, and how.

    Raises:
        ModelError: hidden states are not finite.
    """
    return solution(problem_of(layer, index, batches, spec), layer.self_attn, spec)


def solution(problem: Problem, attention: SharedAttentionMixin, spec: ConversionSpec) -> Solution:
    """Solves the problem of a layer for one of its attention modules, which may have less W_c than the problem."""
    has_output, has_compensation = solved_parts(attention, spec)
    if has_output and not has_compensation:
        problem = problem.of_heads()
    validation = problem.validation
    if problem.positions is not None:
        weights = problem.positions.solve()
        result = RidgeFit(weights, weights, 0.0, validation.yy.item() / validation.tokens, validation.error(weights))
    else:
        result = fit_ridge(problem.fit, validation, problem.blocks)
    heads = problem.blocks[0] if has_output else 0

    def change(weights: torch.Tensor, *moments: Moments) -> Change:
        if has_compensation and isinstance(attention.compensation, LowRankCompensation):
            rank = attention.compensation.down.out_features
            output, *factors = reduce_rank(
                weights, functools.reduce(Moments.merged, moments), heads, rank, result.strength
            )
            return Change(output, tuple(factors))
        return Change(weights[:heads], (weights[heads:].T,) if has_compensation else ())

    partial = change(result.partial, problem.fit)
    whole = change(result.weights, problem.fit, problem.held)
    energy = max(problem.energy, 1e-30)
    after = validation.error(partial.weights)
    return Solution(partial, whole, result.strength, result.error_before / energy, after / energy)


def problem_of(layer: Any, index: int, batches: Sequence[Batch], spec: ConversionSpec) -> Problem:
    """Sums over calibration tokens from which W_o and W_c of a layer are solved; arguments as `solve`.

    Raises:
        ModelError: hidden states are not finite.
    """
    attention, reference = layer.self_attn, spec.solve == "reference"
    solved = solved_parts(attention, spec)
    problem: Problem | None = None
    for batch in visit(batches):
        normed, heads = attention_features(layer, batch.converted, batch.kwargs[index], batch.shared)
        target: Any = batch.target
        missing = target.float()
        if heads is not None:
            missing = missing - getattr(attention, attention.output_name)(heads).float()
        parts = [
            part for part, is_solved in zip((heads, normed), solved, strict=True) if is_solved and part is not None
        ]
        features = torch.cat([part.float() for part in parts], dim=-1)
        if problem is None:
            problem = Problem.like(features, missing, [part.shape[-1] for part in parts], reference)
        problem.add(features, missing, target, batch.held)
    assert problem is not None, "there are tokens"
    sums = (problem.fit.ff, problem.fit.fy, problem.validation.yy)
    if not all(each.isfinite().all() for each in sums):
        raise ModelError(
            f"cannot fit layer {index}: hidden states overflow in {_dtype(attention)}; set model.dtype to "
            "bfloat16 or float32"
        )
    return problem


def _dtype(module: nn.Module) -> str:
    return str(next(module.parameters()).dtype).removeprefix("torch.")


def _correct(projection: nn.Linear, correction: torch.Tensor) -> None:
    """Adds a correction [in, out] to a projection, whose weight may be shared with the base and is replaced."""
    weight = (projection.weight.double() + correction.T).to(projection.weight.dtype)
    projection.weight = nn.Parameter(weight, requires_grad=projection.weight.requires_grad)
