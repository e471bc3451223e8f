"""Weights of one layer trained by a few hundred steps of Adam, in float32, in models of any dtype."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn

# Of a few hundred steps the second moments of a thousand would see too little.
BETAS = (0.9, 0.95)
WARMUP = 0.1


def parameters_of(*modules: nn.Module) -> list[tuple[nn.Module, str, nn.Parameter]]:
    """The modules' own parameters, each with its module and its name there."""
    return [(module, *item) for module in modules for item in module.named_parameters(recurse=False)]


def put_back(parameters: Sequence[tuple[nn.Module, str, nn.Parameter]]) -> None:
    """Gives modules the parameters that `parameters_of` found."""
    for module, name, parameter in parameters:
        setattr(module, name, parameter)


def gain_of(norm: Any) -> torch.Tensor:
    """What a norm multiplies by, [width]; some families store it less one."""
    return norm(torch.ones_like(norm.weight)).detach()


class TrainedWeights:
    """The parameters of some modules, in float32 while they are trained.

    Args:
        modules: their weights may be shared with the base and are replaced, not changed.
    """

    def __init__(self, *modules: nn.Module):
        self.kept = parameters_of(*modules)
        self.trained = [nn.Parameter(parameter.detach().float().clone()) for _, _, parameter in self.kept]
        for (module, name, _), parameter in zip(self.kept, self.trained, strict=True):
            setattr(module, name, parameter)
        # The units of learning rates.
        sizes = [module.weight if isinstance(module, nn.Linear) else gain_of(module) for module, _, _ in self.kept]
        self.scales = [size.square().mean().sqrt().item() for size in sizes]

    def copy(self) -> list[torch.Tensor]:
        return [parameter.detach().clone() for parameter in self.trained]

    def restore(self, weights: Sequence[torch.Tensor]) -> None:
        for parameter, weight in zip(self.trained, weights, strict=True):
            parameter.copy_(weight)

    def round(self) -> None:
        """Rounds to the model's dtype, as everything that is fitted."""
        for (module, name, parameter), trained in zip(self.kept, self.trained, strict=True):
            new = nn.Parameter(trained.detach().to(parameter.dtype), requires_grad=parameter.requires_grad)
            setattr(module, name, new)

    def train(self, gradients: Callable[[int], Sequence[torch.Tensor]], steps: int, rate: float) -> None:
        """Steps of Adam.

        Args:
            gradients: gives those of a step, in the order of `trained`.
            steps: how many.
            rate: the largest step, in units of the root mean square of the weights.
        """
        groups = [
            {"params": [parameter], "lr": rate * scale}
            for parameter, scale in zip(self.trained, self.scales, strict=True)
        ]
        optimizer = torch.optim.Adam(groups, betas=BETAS)
        scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: _share(step, steps))
        for step in range(steps):
            for parameter, gradient in zip(self.trained, gradients(step), strict=True):
                parameter.grad = gradient
            optimizer.step()
            scheduler.step()


def _share(step: int, steps: int) -> float:
    """Of the largest rate: a short rise, then a cosine down to nothing."""
    rise = max(1, round(WARMUP * steps))
    if step < rise:
        return (step + 1) / rise
    return 0.5 * (1 + math.cos(math.pi * (step - rise) / max(1, steps - rise)))
