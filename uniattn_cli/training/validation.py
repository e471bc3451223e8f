"""Loss on validation rows while a model trains, in the precision in which it trains."""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F

from uniattn_cli.models.losses import IGNORED, LOGITS_AT_ONCE, Rows, head_logits

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def validation_loss(model: PreTrainedModel, rows: Rows, *, batch_size: int) -> float:
    """Mean cross-entropy per scored token, in nats; the model's mode is left as it was.

    Args:
        model: prepared by `attach_objective`.
        rows: all processes score the same ones, because a sharded model needs all of them for each.
        batch_size: rows per forward pass.
    """
    device = next(model.parameters()).device
    order = sorted(range(len(rows)), key=lambda index: -len(rows.tokens[index]))
    total = torch.zeros((), dtype=torch.float64)
    count = sum(int((labels[1:] != IGNORED).sum()) for labels in rows.labels)
    pad = functools.partial(torch.nn.utils.rnn.pad_sequence, batch_first=True)
    training = model.training
    model.eval()
    try:
        with torch.no_grad():
            for start in range(0, len(order), batch_size):
                batch = order[start : start + batch_size]
                tokens = pad([rows.tokens[index] for index in batch], padding_value=0).to(device)
                labels = pad([rows.labels[index] for index in batch], padding_value=IGNORED).to(device)
                score = functools.partial(_score, labels=labels)
                total += model(input_ids=tokens, use_cache=False, objective=score).double().cpu()
    finally:
        model.train(training)
    return total.item() / count


def _score(model: PreTrainedModel, inputs: dict[str, Any], *, labels: torch.Tensor) -> torch.Tensor:
    """Summed cross-entropy of the labels, with logits in pieces and only where something is scored."""
    hidden = model.model(**inputs).last_hidden_state[:, :-1]
    scored = labels[:, 1:] != IGNORED
    size = max(1, LOGITS_AT_ONCE // model.config.vocab_size)
    pieces = zip(hidden[scored].split(size), labels[:, 1:][scored].split(size), strict=True)
    losses = [F.cross_entropy(head_logits(model, part).float(), target, reduction="none") for part, target in pieces]
    return torch.stack([loss.double().sum() for loss in losses]).sum()
