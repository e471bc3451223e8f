"""A short training of converted models, because those that are alike before it need not be so after it.

What changed layers have, their projections, norms and W_c, is trained on the divergence of next-token distributions
from the base's; everything else stays. That is less than a stage of training does, and the same for all candidates.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
from torch import nn

from uniattn_cli.fitting.adam import TrainedWeights
from uniattn_cli.fitting.rows import rows_per_step
from uniattn_cli.modeling.layout_uniattn import Layout
from uniattn_cli.models.losses import LOGITS_AT_ONCE, kl_divergence

if TYPE_CHECKING:
    from transformers import PreTrainedModel

# Largest step of Adam, in units of the root mean square of the weights: what 6e-5 is in SmolLM2. Eight early layers of
# it came nearer to the base on 6,144 tokens, and with three times as large steps farther from it.
RATE = 0.0003


def train_shortly(
    base: PreTrainedModel,
    model: PreTrainedModel,
    windows: torch.Tensor,
    tokens: int,
    advance: Callable[[int], None] = lambda steps: None,
) -> None:
    """Trains the changed layers of a converted model.

    Args:
        base: what it was converted from; may share weights with it, which are replaced and not changed.
        model: is trained.
        windows: LongTensor [n, length], used over and over.
        tokens: to train on, in whole steps.
        advance: told about each step.
    """
    # Weights that are trained are new ones.
    model.requires_grad_(False)
    weights = TrainedWeights(*_trained(model))
    count = rows_per_step(windows.shape[1])

    def gradients(step: int) -> list[torch.Tensor]:
        rows = torch.arange(step * count, (step + 1) * count) % len(windows)
        found = _gradients(base, model, windows[rows].to(base.device), weights)
        advance(1)
        return found

    weights.train(gradients, steps_of(tokens, windows.shape[1]), RATE)
    weights.round()


def steps_of(tokens: int, length: int) -> int:
    """Steps that train on so many tokens, in windows of a length."""
    return max(1, tokens // (rows_per_step(length) * length))


def _trained(model: PreTrainedModel) -> list[nn.Module]:
    layout: Layout = model.config.layout
    attention = [model.model.layers[index].self_attn for index in layout.changed]
    # Modules with weights of their own.
    return [module for each in attention for module in each.modules() if module._parameters and module is not each]


def _gradients(
    base: PreTrainedModel, model: PreTrainedModel, tokens: torch.Tensor, weights: TrainedWeights
) -> list[torch.Tensor]:
    """Of the mean divergence over all tokens, in pieces whose logits fit into memory."""
    rows = max(1, LOGITS_AT_ONCE // (tokens.shape[1] * model.config.vocab_size))
    found = [torch.zeros_like(parameter) for parameter in weights.trained]
    for piece in tokens.split(rows):
        with torch.no_grad():
            wanted = base(piece, use_cache=False).logits
        # Weights are in float32 while they are trained.
        with torch.enable_grad(), torch.autocast(piece.device.type, base.dtype, enabled=base.dtype != torch.float32):
            logits = model(piece, use_cache=False).logits
        with torch.enable_grad():
            loss = kl_divergence(wanted, logits).mean() * (len(piece) / len(tokens))
            parts = torch.autograd.grad(loss, weights.trained, allow_unused=True)
        found = [total if part is None else total + part for total, part in zip(found, parts, strict=True)]
    return found
