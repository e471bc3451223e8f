"""Per-token losses and divergences of causal LMs, computed in windows."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Callable

    import torch
    from transformers import PreTrainedModel

IGNORED = -100  # label of a token that is not learned
# Logits computed at once, 256 MiB in float32.
LOGITS_AT_ONCE = 1 << 26


@dataclass(frozen=True)
class Loss:
    """A mean loss in nats per token.

    Attributes:
        mean: over all scored tokens.
        stderr: standard error of the mean over windows (rows), which are nearly independent while tokens are not.
        tokens: number of scored tokens.
        windows: number of windows or rows.
    """

    mean: float
    stderr: float
    tokens: int
    windows: int

    @property
    def perplexity(self) -> float:
        return math.exp(self.mean)


def summarise(sums: torch.Tensor, counts: torch.Tensor) -> Loss:
    """Makes a `Loss` from per-row sums and token counts, both [rows].

    The standard error is that of a ratio of means (linearised), so that rows may differ in length.
    """
    total = counts.sum()
    mean = (sums.sum() / total).item()
    rows = int(counts.numel())
    residuals = sums - mean * counts
    stderr = (residuals.square().sum() * rows / max(rows - 1, 1)).sqrt().item() / total.item()
    return Loss(mean, stderr if rows > 1 else float("nan"), int(total.item()), rows)


def head_logits(model: PreTrainedModel, hidden: torch.Tensor) -> torch.Tensor:
    """Logits from last hidden states, as the model's own class makes them.

    What families do to them (Gemma caps them, Granite divides them) is in their `forward` and nowhere else, so that is
    what runs, around a backbone that has nothing left to do.

    Args:
        model: causal LM; inside DDP or FSDP, this is called in its forward, where its head has weights.
        hidden: [positions, hidden], after the last norm.

    Returns:
        [positions, vocabulary].
    """
    return type(model).forward(_Head(model, hidden[None]), use_cache=False, output_router_logits=False).logits[0]


class _Head:
    """A causal LM whose backbone gives hidden states that are there already; all else is the model's."""

    def __init__(self, model: PreTrainedModel, hidden: torch.Tensor):
        self._model, self._hidden = model, hidden

    def __getattr__(self, name: str) -> Any:
        return getattr(self._model, name)

    def model(self, **inputs: Any) -> Any:
        from transformers.modeling_outputs import MoeModelOutputWithPast

        return MoeModelOutputWithPast(last_hidden_state=self._hidden)


def token_losses(model: PreTrainedModel, tokens: torch.Tensor, labels: torch.Tensor | None = None) -> torch.Tensor:
    """Cross-entropy of each next token.

    Args:
        model: causal LM.
        tokens: [batch, length] on the model's device.
        labels: [batch, length] with -100 where nothing is scored; `tokens` if None.

    Returns:
        float32 [batch, length - 1]; zero where nothing is scored.
    """
    import torch.nn.functional as F

    logits = model(tokens, use_cache=False).logits[:, :-1]
    targets = (tokens if labels is None else labels)[:, 1:]
    # In slices: float32 logits of a whole batch would be the largest tensor of all.
    rows = [
        F.cross_entropy(logit.float(), target, reduction="none", ignore_index=-100)
        for logit, target in zip(logits, targets, strict=True)
    ]
    import torch

    return torch.stack(rows)


def window_loss(
    model: PreTrainedModel,
    windows: torch.Tensor,
    *,
    batch_size: int = 8,
    advance: Callable[[int], None] = lambda steps: None,
) -> Loss:
    """Loss on windows of equal length; every token but the first of a window is scored.

    Args:
        windows: [rows, length] token ids.
        advance: told the number of finished windows.
    """
    import torch

    sums = []
    device = next(model.parameters()).device
    with torch.no_grad():
        for start in range(0, len(windows), batch_size):
            losses = token_losses(model, windows[start : start + batch_size].to(device))
            sums.append(losses.double().sum(1).cpu())
            advance(len(losses))
    total = torch.cat(sums)
    return summarise(total, torch.full_like(total, windows.shape[1] - 1))


def window_divergences(
    base: PreTrainedModel, model: PreTrainedModel, windows: torch.Tensor, *, batch_size: int = 8
) -> torch.Tensor:
    """KL(base || model) of the next-token distributions, in nats per token, averaged within each window.

    Args:
        windows: [rows, length] token ids.

    Returns:
        float64 [rows], on the CPU.
    """
    import torch

    device = next(base.parameters()).device
    found = []
    with torch.no_grad():
        for start in range(0, len(windows), batch_size):
            tokens = windows[start : start + batch_size].to(device)
            pair = (base(tokens, use_cache=False).logits, model(tokens, use_cache=False).logits)
            found += [kl_divergence(base_row, row).mean() for base_row, row in zip(*pair, strict=True)]
    return torch.stack(found).double().cpu()


def kl_divergence(base_logits: torch.Tensor, logits: torch.Tensor) -> torch.Tensor:
    """KL(base || model) along the last dimension, float32, of logits [..., vocabulary]."""
    base_logp, logp = base_logits.float().log_softmax(-1), logits.float().log_softmax(-1)
    return (base_logp.exp() * (base_logp - logp)).sum(-1)


@dataclass(frozen=True)
class Rows:
    """Rows to score.

    Attributes:
        tokens: token ids of each row, LongTensor [length of the row].
        labels: the same with -100 where nothing is scored.
    """

    tokens: list[torch.Tensor]
    labels: list[torch.Tensor]

    def __len__(self) -> int:
        return len(self.tokens)

    def digest(self) -> str:
        """Identifies the rows, so that scores of other rows are never taken for theirs."""
        found = hashlib.sha256()
        for row in (*self.tokens, *self.labels):
            found.update(row.numpy().tobytes() + b";")
        return found.hexdigest()[:16]


@dataclass(frozen=True)
class RowLosses:
    """Scores of one model on rows.

    Attributes:
        sums: cross-entropy of each row in nats, summed over its scored tokens.
        counts: scored tokens of each row.
    """

    sums: list[float]
    counts: list[int]

    def summary(self) -> Loss:
        """Mean over all scored tokens, with its standard error over rows."""
        import torch

        return summarise(torch.tensor(self.sums, dtype=torch.float64), torch.tensor(self.counts))


def row_losses(
    model: PreTrainedModel,
    rows: Rows,
    *,
    batch_size: int,
    advance: Callable[[int], None] = lambda steps: None,
) -> RowLosses:
    """Scores rows of any lengths.

    Rows of similar length share a batch and are padded on the right, where causal attention never looks, so that the
    result does not depend on the batch.

    Args:
        advance: told the number of finished rows.
    """
    import torch

    device = next(model.parameters()).device
    order = sorted(range(len(rows)), key=lambda index: -len(rows.tokens[index]))
    sums = [0.0] * len(rows)
    counts = [int((labels[1:] != IGNORED).sum()) for labels in rows.labels]
    with torch.no_grad():
        for start in range(0, len(order), batch_size):
            batch = order[start : start + batch_size]
            tokens = _padded([rows.tokens[index] for index in batch], 0)
            labels = _padded([rows.labels[index] for index in batch], IGNORED)
            losses = token_losses(model, tokens.to(device), labels.to(device)).double().sum(1)
            for index, total in zip(batch, losses.tolist(), strict=True):
                sums[index] = total
            advance(len(batch))
    return RowLosses(sums, counts)


def _padded(rows: Sequence[torch.Tensor], value: int) -> torch.Tensor:
    import torch

    return torch.nn.utils.rnn.pad_sequence(list(rows), batch_first=True, padding_value=value)
