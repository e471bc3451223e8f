"""Queries of a layer that borrows keys, fitted to the maps that the base has there.

A layer that borrows keys but no maps keeps its own W_q, which was made for other keys, and where it asks early for
another input: so used, its map has nothing to do with the base's, and what it attends to is noise to W_o. So W_q is
matched in closed form (`fitting.match_keys`) and then trained, alone and layer by layer, on the divergence
KL(base's map || map with borrowed keys), the mean over heads and positions. Training it on the error of the attention
output instead hardly moves it.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from uniattn_cli.fitting.adam import TrainedWeights, gain_of
from uniattn_cli.fitting.match_keys import InputMatches, LayerMatches, query_projection
from uniattn_cli.fitting.rows import Rows, in_turn, masked, rows_per_step, scores, single_rows
from uniattn_cli.fitting.stream import Batch, attention_inputs, positions_of
from uniattn_cli.modeling.sharing_uniattn import SharedAttentionMixin, gather_heads

# Largest step of Adam, in units of the root mean square of the weights.
RATE = 0.1
# Rows on which alignments are validated.
VALIDATION_ROWS = 16
# Stands for the logarithm of zero.
LOWEST = -100.0


@torch.no_grad()
def align_queries(layer: Any, matches: LayerMatches, steps: int) -> tuple[float, float]:
    """Matches and trains W_q of a converted layer that borrows keys; see the head of this file.

    Args:
        layer: the converted model's, of a kind that borrows keys and has queries of its own.
        matches: of the layer with those that it borrows from.
        steps: of Adam, each on the next rows that are not held out.

    Returns:
        The divergence before and after, in nats, on held-out tokens where there are some. What makes it larger there
        is not kept.
    """
    attention, own, batches = layer.self_attn, matches.own, matches.batches
    count = rows_per_step(batches[0].converted.shape[1])
    prepare = functools.partial(_prepare, matches.base_layer, layer, own, matches.index)
    rows = lambda held, most: single_rows(batches, prepare, held, most)  # noqa: E731
    learned = rows(False, max(1, steps) * count) or rows(True, max(1, steps) * count)
    validation = rows(True, VALIDATION_ROWS) or learned[:VALIDATION_ROWS]
    weights = _Queries(attention)
    gradients = functools.partial(_gradients, weights.trained, attention, own)
    inputs = matches.inputs if attention.plan.traits.early else None
    before = best = _mean(attention, own, validation)
    for change in (
        lambda: weights.match(matches.keys.maps(attention.key_sources), inputs),
        lambda: weights.train(in_turn(learned, min(count, len(learned)), gradients), steps, RATE),
    ):
        kept = weights.copy()
        change()
        found = _mean(attention, own, validation)
        if found < best:
            best = found
        else:
            weights.restore(kept)
    weights.round()
    return before, best


def query_modules(attention: SharedAttentionMixin) -> list[nn.Module]:
    """The modules whose weights are aligned."""
    return [*filter(None, (query_projection(attention), getattr(attention, "q_norm", None)))]


class _Queries(TrainedWeights):
    """The parameters that queries come from.

    Args:
        attention: of the converted layer.
    """

    def __init__(self, attention: SharedAttentionMixin):
        self.attention = attention
        self.norm: Any = getattr(attention, "q_norm", None)
        super().__init__(*query_modules(attention))

    def match(self, maps: torch.Tensor, inputs: InputMatches | None) -> None:
        """Puts `B q` in the place of each query q, up to its length where queries are normed.

        Args:
            maps: [units, dim, dim] of `KeyMatches`.
            inputs: of a layer that asks early: what its input is in terms of its sources'.
        """
        dim = self.attention.head_dim
        heads = self.attention.config.num_attention_heads
        matrices = maps.repeat_interleave(heads // len(maps), dim=0)
        if self.norm is not None:
            gain = gain_of(self.norm).view(-1, dim)
            inverse = gain / (gain.square() + 1e-4 * gain.square().mean())
            matrices = inverse.unsqueeze(-1) * matrices * gain.unsqueeze(-2)
        # Where queries, keys and values are one matrix, queries come first.
        parts = [p for (module, _, _), p in zip(self.kept, self.trained, strict=True) if module is not self.norm]
        rows = matrices @ torch.cat([part[: heads * dim].view(heads, dim, -1) for part in parts], dim=-1)
        if inputs is not None:
            units = rows.unflatten(0, (len(maps), -1))
            sources = [source for source, _ in self.attention.key_sources]
            asked = [unit @ inputs.map(source).to(unit).mT for unit, source in zip(units, sources, strict=True)]
            rows = torch.cat(asked)
        for part, found in zip(parts, rows.split([part[0].numel() for part in parts], dim=-1), strict=True):
            part[: heads * dim] = found.reshape(part[: heads * dim].shape)


def _gradients(
    trained: Sequence[nn.Parameter], attention: SharedAttentionMixin, own: SharedAttentionMixin, rows: Rows
) -> tuple[torch.Tensor, ...]:
    """Of `_divergence`, whose gradient with respect to scores is the difference of the maps.

    So written it takes a third of the time that autograd needs, most of which goes by in passes over scores.
    """
    target = masked(own, scores(own, rows["queries"], rows["base_keys"]), rows.mask).softmax(-1)
    with torch.enable_grad():
        found = scores(attention, _positioned_queries(attention, rows), rows["keys"])
    slopes = masked(attention, found.detach(), rows.mask).softmax(-1).sub_(target)
    # Sinks are not fitted.
    slopes = slopes[..., : found.shape[-1]] / slopes[..., 0].numel()
    # Not `backward`: weights that are not trained may be those of the base.
    return torch.autograd.grad(found, trained, slopes)


def _prepare(base_layer: nn.Module, layer: Any, own: SharedAttentionMixin, index: int, batch: Batch) -> Rows:
    base = attention_inputs(base_layer, batch.base, batch.kwargs[index])
    kwargs = attention_inputs(layer, batch.converted, batch.kwargs[index], batch.shared)
    own_states = own.project(base["hidden_states"], "qk")
    own.embed_positions(own_states, *positions_of(base))
    attention, device = layer.self_attn, batch.converted.device
    states: dict[Any, torch.Tensor] = {"queries": own_states["q"], "base_keys": own_states["k"]}
    states["keys"] = gather_heads(batch.shared.keys, attention.key_runs, device)
    # Inputs are the converted stream's own, or for a layer that asks early those of its sources.
    if attention.plan.traits.early:
        states |= {source: batch.shared.inputs[source].to(device) for source, _ in attention.key_sources}
    else:
        states["input"] = kwargs["hidden_states"]
    return Rows.of(attention, states, kwargs)


def _divergence(attention: SharedAttentionMixin, own: SharedAttentionMixin, rows: Rows) -> torch.Tensor:
    """KL(base's map || the layer's), mean over rows, heads and positions, float32 []."""
    target = masked(own, scores(own, rows["queries"], rows["base_keys"]), rows.mask).log_softmax(-1)
    queries = _positioned_queries(attention, rows)
    found = masked(attention, scores(attention, queries, rows["keys"]), rows.mask).log_softmax(-1)
    return (target.exp() * (target.clamp(min=LOWEST) - found.clamp(min=LOWEST))).sum(-1).mean()


def _mean(attention: SharedAttentionMixin, own: SharedAttentionMixin, rows: Sequence[Rows]) -> float:
    found = [_divergence(attention, own, piece) * len(piece) for piece in Rows.together(rows)]
    return torch.stack(found).sum().item() / len(rows)


def _positioned_queries(attention: SharedAttentionMixin, rows: Rows) -> torch.Tensor:
    """The layer's queries with positions, float32."""
    if attention.plan.traits.early:
        inputs = {source: rows[source].float() for source, _ in attention.key_sources}
        states = {"q": attention.early_queries(inputs, rows["queries"].device)}
    else:
        states = attention.project(rows["input"].float(), "q")
    attention.embed_positions(states, *rows.positions)
    return states["q"]
