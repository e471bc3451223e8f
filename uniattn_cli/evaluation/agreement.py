"""How far a model agrees with the base, token by token: divergence of next-token distributions, equal greedy tokens."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from uniattn_cli.models.losses import RowLosses, kl_divergence

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel

FIRST_EDGE, GROWTH = 16, 4
# Positions whose logits are turned into float32 at once.
CHUNK = 256


@dataclass(frozen=True)
class Agreement:
    """A model beside the base on the same windows of text.

    Attributes:
        kl: KL(base || model) in nats per token, mean over each window.
        top1: share of each window's positions at which both would go on with the same token.
        edges: positions at which buckets begin, and the length of the windows at the end; position p has seen p + 1
            tokens.
        kl_by_position: mean KL of each bucket, over all windows.
        top1_by_position: share of equal tokens of each bucket.
    """

    kl: list[float]
    top1: list[float]
    edges: list[int]
    kl_by_position: list[float]
    top1_by_position: list[float]


class Reference:
    """The base's logits on windows of text, computed when they are first needed and kept in memory.

    Args:
        load: gives the base.
        windows: LongTensor [rows, length].
        batch_size: rows per forward pass.
    """

    def __init__(self, load: Callable[[], PreTrainedModel], windows: torch.Tensor, batch_size: int):
        self.load = load
        self.windows = windows
        self.batch_size = batch_size
        self._logits: list[torch.Tensor] | None = None

    def logits(self) -> list[torch.Tensor]:
        """For each window [length, vocabulary], in the base's dtype, on the CPU."""
        if self._logits is None:
            self._logits = [each.cpu() for each in _window_logits(self.load(), self.windows, self.batch_size)]
        return self._logits


def _window_logits(model: PreTrainedModel, windows: torch.Tensor, batch_size: int):
    import torch

    with torch.no_grad():
        for start in range(0, len(windows), batch_size):
            batch = windows[start : start + batch_size].to(next(model.parameters()).device)
            yield from model(batch, use_cache=False).logits


def base_losses(reference: Reference, advance: Callable[[int], None] = lambda steps: None) -> RowLosses:
    """The base's loss on the windows."""
    found = RowLosses([], [])
    for logits, window in zip(reference.logits(), reference.windows, strict=True):
        _add_loss(found, logits, window)
        advance(1)
    return found


def compare_with_base(
    model: PreTrainedModel,
    reference: Reference,
    *,
    batch_size: int,
    advance: Callable[[int], None] = lambda steps: None,
) -> tuple[RowLosses, Agreement]:
    """Loss of a model on the windows and its agreement with the base there, from one forward pass."""
    import torch

    losses, divergences, equal = RowLosses([], []), [], []
    own = _window_logits(model, reference.windows, batch_size)
    for base_logits, logits, window in zip(reference.logits(), own, reference.windows, strict=True):
        _add_loss(losses, logits, window)
        base_logits = base_logits.to(logits.device)
        divergences.append(_in_chunks(lambda base, own: kl_divergence(base, own), base_logits, logits))
        equal.append(_in_chunks(lambda base, own: (base.argmax(-1) == own.argmax(-1)).float(), base_logits, logits))
        advance(1)
    # A divergence is not negative; rounding makes it so where it is all but zero.
    table = torch.stack(divergences).clamp_min(0), torch.stack(equal)
    edges = position_edges(table[0].shape[1])
    buckets = [[part[:, start:end].mean().item() for start, end in itertools.pairwise(edges)] for part in table]
    return losses, Agreement(table[0].mean(1).tolist(), table[1].mean(1).tolist(), edges, *buckets)


def _in_chunks(
    of: Callable[[torch.Tensor, torch.Tensor], torch.Tensor], base: torch.Tensor, own: torch.Tensor
) -> torch.Tensor:
    import torch

    return torch.cat([of(*pair).cpu().double() for pair in zip(base.split(CHUNK), own.split(CHUNK), strict=True)])


def _add_loss(found: RowLosses, logits: torch.Tensor, window: torch.Tensor) -> None:
    import torch.nn.functional as F

    pairs = zip(logits[:-1].split(CHUNK), window[1:].to(logits.device).split(CHUNK), strict=True)
    found.sums.append(sum(F.cross_entropy(part.float(), ids, reduction="sum").item() for part, ids in pairs))
    found.counts.append(len(window) - 1)


def position_edges(length: int) -> list[int]:
    """Beginnings of the buckets of positions, each four times as far as the one before, and the end.

    >>> position_edges(1000)
    [0, 16, 64, 256, 1000]
    """
    edges, edge = [0], FIRST_EDGE
    while edge < length:
        edges.append(edge)
        edge *= GROWTH
    return [*edges, length]
