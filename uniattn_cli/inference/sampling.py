"""Choosing the next token on the device, without asking the host."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from uniattn_cli.errors import UsageError


@dataclass(frozen=True)
class Sampling:
    """How tokens are chosen.

    Attributes:
        temperature: 0 takes the most likely token; else logits are divided by it.
        top_p: only the most likely tokens that together reach this probability.
        seed: the same seed gives the same text, on any device as far as its logits agree.
    """

    temperature: float = 0.0
    top_p: float = 1.0
    seed: int = 0

    def __post_init__(self) -> None:
        if self.temperature < 0:
            raise UsageError(f"temperature must be 0 (the most likely token) or more, not {self.temperature:g}")
        if not 0 < self.top_p <= 1:
            raise UsageError(f"top_p must be above 0 and at most 1, not {self.top_p:g}")

    @property
    def greedy(self) -> bool:
        return self.temperature == 0

    def noise(self, steps: int, batch: int) -> torch.Tensor:
        """Uniform numbers for a whole generation, [steps, batch]; made on the CPU, so equal on all devices."""
        generator = torch.Generator().manual_seed(self.seed)
        return torch.rand(steps, batch, generator=generator)


# A row is searched in so many parts: one program per row, as in `argmax`, takes 37 microseconds for 128k tokens.
PARTS = 64


def most_likely(logits: torch.Tensor) -> torch.Tensor:
    """[batch, vocabulary] to [batch]: `argmax`, the first of equals, fast where rows are few and long."""
    batch, vocabulary = logits.shape
    if vocabulary % PARTS:
        return logits.argmax(-1)
    values, places = logits.view(batch, PARTS, -1).max(-1)
    part = values.argmax(-1, keepdim=True)
    return (part * (vocabulary // PARTS) + places.gather(-1, part))[:, 0]


def choose(logits: torch.Tensor, sampling: Sampling, noise: torch.Tensor) -> torch.Tensor:
    """The next token of each row.

    Args:
        logits: [batch, vocabulary].
        noise: [batch], uniform in [0, 1); picks from the cumulative distribution.

    Returns:
        [batch] int64.
    """
    if sampling.greedy:
        return most_likely(logits)
    weights = torch.softmax(logits.float() / sampling.temperature, dim=-1)
    order = None
    if sampling.top_p < 1:
        weights, order = weights.sort(dim=-1, descending=True)
        # A token stays if those before it do not reach top_p yet: the first one always does.
        weights = weights.masked_fill(weights.cumsum(-1) - weights >= sampling.top_p, 0.0)
    totals = weights.cumsum(-1)
    picked = torch.searchsorted(totals, noise[:, None] * totals[:, -1:], right=True)
    # Rounding must not lead past the last token that has any weight.
    last = (weights > 0).to(torch.int64).mul(torch.arange(weights.shape[-1], device=weights.device)).amax(-1)
    picked = torch.minimum(picked[:, 0], last)
    return picked if order is None else order.gather(-1, picked[:, None])[:, 0]
