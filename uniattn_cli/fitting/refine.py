"""All that a changed layer still projects, trained on its attention output.

Least squares gives a layer the best W_o and W_c for the heads that it has. Those come of weights that were made for
other maps (W_v) or fitted to reproduce the base's maps (W_q, `fitting.align_queries`), while what counts is the output.
It is linear in W_v and in W_o, but not in both, and not in W_q. So all of them take steps of Adam on its squared error,
from where alignment and least squares have brought them.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from uniattn_cli.fitting.adam import TrainedWeights
from uniattn_cli.fitting.rows import Rows, in_turn, masked, rows_per_step, scores, single_rows
from uniattn_cli.fitting.stream import Batch, attention_inputs
from uniattn_cli.modeling.sharing_uniattn import SharedAttentionMixin, SharedStates

# Largest step of Adam, in units of the root mean square of the weights.
RATE = 0.03
LENT = {"q": "queries", "k": "keys", "v": "values"}


@torch.no_grad()
def refine(layer: Any, index: int, batches: Sequence[Batch], steps: int) -> None:
    """Trains the projections of a converted layer on rows that are not held out; see the head of this file.

    Args:
        layer: the converted model's, of a kind that attends.
        index: its number.
        batches: the converted stream where it enters the layer, what earlier layers lend, and the target.
        steps: of Adam, each on the next rows.
    """
    attention = layer.self_attn
    count = rows_per_step(batches[0].converted.shape[1])
    learned = single_rows(batches, functools.partial(_prepare, layer, index), False, steps * count)
    energy = sum(row["target"].float().square().sum(-1).mean().item() for row in learned) / len(learned)
    weights = TrainedWeights(*projections(attention))
    gradients = functools.partial(_gradients, weights.trained, attention, max(energy, 1e-30))
    weights.train(in_turn(learned, min(count, len(learned)), gradients), steps, RATE)
    weights.round()


def projections(attention: SharedAttentionMixin) -> list[nn.Module]:
    """What a layer has beside W_c: its projections, and norms of queries and keys."""
    return [module for name, module in attention.named_children() if name != "compensation"]


def _prepare(layer: Any, index: int, batch: Batch) -> Rows:
    attention = layer.self_attn
    kwargs = attention_inputs(layer, batch.converted, batch.kwargs[index], batch.shared)
    inputs: torch.Tensor = kwargs["hidden_states"]
    target: Any = batch.target
    if attention.compensation is not None:
        target = target.float() - attention.compensation(inputs).float()
    states: dict[Any, torch.Tensor] = {"input": inputs, "target": target}
    traits = attention.plan.traits
    names = [LENT[letter] for letter in traits.borrows] + ["inputs"] * traits.early
    names += ["sinks"] * (attention.has_sinks and traits.borrows_maps)
    for name in names:
        lent = getattr(batch.shared, name)
        for source in attention.plan.source_layers:
            states[name, source] = lent[source].to(inputs.device).expand(len(inputs), *lent[source].shape[1:])
    return Rows.of(attention, states, kwargs)


def _gradients(
    trained: Sequence[nn.Parameter], attention: SharedAttentionMixin, energy: float, rows: Rows
) -> tuple[torch.Tensor, ...]:
    """Of the squared error of the attention output, relative to the target's mean square."""
    with torch.enable_grad():
        missing = rows["target"].float() - _output(attention, rows)
        error = missing.square().sum(-1).mean() / energy
    # Not `backward`: weights that are not trained may be those of the base.
    return torch.autograd.grad(error, trained)


def _output(attention: SharedAttentionMixin, rows: Rows) -> torch.Tensor:
    """The attention output without W_c, in float32, [rows, tokens, hidden]."""
    shared = SharedStates()
    for name in rows.states:
        if isinstance(name, tuple):
            getattr(shared, name[0])[name[1]] = rows[name].float()
    queries, keys, values = attention.states(rows["input"].float(), rows.positions, None, shared)
    maps = masked(attention, scores(attention, queries, keys), rows.mask, shared).softmax(-1)[..., : keys.shape[2]]
    # All heads that weigh the same values in one product.
    heads = maps.unflatten(1, (values.shape[1], -1)).flatten(2, 3) @ values
    heads = heads.unflatten(2, (-1, maps.shape[-1])).flatten(1, 2).transpose(1, 2).flatten(2)
    return getattr(attention, attention.output_name)(heads)
