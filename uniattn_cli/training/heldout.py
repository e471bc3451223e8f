"""The loss on held-out responses, before and after training."""

from __future__ import annotations

from typing import TYPE_CHECKING

from uniattn_cli.data import IGNORED, load_rows, tokenize
from uniattn_cli.options import Progress
from uniattn_cli.recipe import Recipe
from uniattn_cli.scoring import Loss, summarise, token_losses

if TYPE_CHECKING:
    import datasets
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


def heldout_rows(recipe: Recipe, tokenizer: PreTrainedTokenizerBase) -> datasets.Dataset:
    """The first `evaluation.responses` held-out rows, tokenised; the same rows that `uniattn eval` scores.

    Raises:
        DataError: there are none.
    """
    rows = load_rows(recipe.data.train, "heldout", holdout=recipe.data.holdout, seed=recipe.seed)
    rows = rows.select(range(min(recipe.evaluation.responses, len(rows))))
    return tokenize(rows, tokenizer, max_length=recipe.train.max_length, loss="responses").dataset


def response_loss(
    model: PreTrainedModel, rows: datasets.Dataset, *, batch_size: int, progress: Progress, what: str
) -> Loss:
    """Mean cross-entropy of the learned tokens of rows, in nats.

    Rows of like length share a batch and are padded on the right, where causal attention never looks.

    Args:
        model: in evaluation mode, on its device.
        rows: columns `input_ids` and `labels`.
        what: names the model beside the progress bar.
    """
    import torch
    from torch.nn.utils.rnn import pad_sequence

    pairs = [tuple(map(torch.tensor, pair)) for pair in zip(rows["input_ids"], rows["labels"], strict=True)]
    pairs.sort(key=lambda pair: -len(pair[0]))
    device = next(model.parameters()).device
    sums, counts = [], []
    with torch.no_grad(), progress.track(f"held-out responses, {what}", len(pairs)) as advance:
        for start in range(0, len(pairs), batch_size):
            inputs, targets = zip(*pairs[start : start + batch_size], strict=True)
            tokens = pad_sequence(list(inputs), batch_first=True).to(device)
            labels = pad_sequence(list(targets), batch_first=True, padding_value=IGNORED).to(device)
            sums.append(token_losses(model, tokens, labels).double().sum(1).cpu())
            counts.append((labels[:, 1:] != IGNORED).sum(1).cpu())
            advance(len(inputs))
    return summarise(torch.cat(sums), torch.cat(counts))
