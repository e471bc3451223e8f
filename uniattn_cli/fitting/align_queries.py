"""Queries of a layer that borrows keys, fitted to the maps that the base has there.

A layer that borrows keys but no maps keeps its own W_q, which was made for other keys, and where it asks early for
another input: so used, its map has nothing to do with the base's, and what it attends to is noise to W_o. So W_q is
matched in closed form (`fitting.match_keys`) and then trained, alone and layer by layer, on the divergence
KL(base's map || map with borrowed keys), the mean over heads and positions. Training it on the error of the attention
output instead hardly moves it.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn

from uniattn_cli.fitting.match_keys import InputMatches, KeyMatches, query_projection
from uniattn_cli.fitting.stream import Batch, attention_inputs
from uniattn_cli.modeling.sharing_uniattn import SharedAttentionMixin, gather_heads
from uniattn_cli.recipe.schema import ConversionSpec

# Largest step of Adam, in units of the root mean square of the weights; of a few hundred steps the second moments of a
# thousand would see too little.
RATE = 0.1
BETAS = (0.9, 0.95)
WARMUP = 0.1
# Rows on which alignments are validated.
VALIDATION_ROWS = 16
# Enough for regressions of one head's width.
MATCH_TOKENS = 1 << 15
# Tokens of one step, in whole rows: a fifth of a second for a model of 0.1 billion parameters on two CPU cores.
STEP_TOKENS = 2048
# Of the steps: a candidate of the search, or a layer whose heads are being matched, has most of the gain early.
TRIAL_SHARE = 0.25
# Scores that are alive at once, 256 MiB in float32; a few tensors of that size are.
MOST_SCORES = 1 << 26
# Stands for the logarithm of zero.
LOWEST = -100.0


def for_trials(spec: ConversionSpec) -> ConversionSpec:
    """The same fit with fewer steps, for candidates of a search and for matching heads.

    Not where whole layouts are compared: there layers with borrowed keys would look worse than they will be.
    """
    return replace(spec, align=math.ceil(spec.align * TRIAL_SHARE))


@dataclass(frozen=True)
class _Material:
    """What rows give: what queries are projected from, the base's queries and keys, the keys that are borrowed.

    Rows have no padding and equal length, so that positions and mask are those of one row. Inputs are the converted
    stream's own, or for a layer that asks early those of its sources, in the order of `_asked`.
    """

    inputs: tuple[torch.Tensor, ...]
    queries: torch.Tensor
    base_keys: torch.Tensor
    keys: torch.Tensor
    positions: tuple[torch.Tensor, torch.Tensor]
    mask: torch.Tensor | None

    @property
    def states(self) -> tuple[torch.Tensor, ...]:
        return (*self.inputs, self.queries, self.base_keys, self.keys)

    @classmethod
    def of(cls, states: Sequence[torch.Tensor], like: _Material) -> _Material:
        """From tensors in the order of `states`."""
        *inputs, queries, base_keys, keys = states
        return cls(tuple(inputs), queries, base_keys, keys, like.positions, like.mask)

    def rows(self) -> list[_Material]:
        """Each row by itself."""
        return [_Material.of(each, self) for each in zip(*(s.split(1) for s in self.states), strict=True)]

    @classmethod
    def together(cls, rows: Sequence[_Material]) -> list[_Material]:
        """As many rows in one piece as memory allows."""
        heads, length = rows[0].queries.shape[1], rows[0].queries.shape[2]
        count = max(1, MOST_SCORES // (heads * length * length))
        pieces = [rows[start : start + count] for start in range(0, len(rows), count)]
        return [
            cls.of([torch.cat(each) for each in zip(*(row.states for row in piece), strict=True)], rows[0])
            for piece in pieces
        ]


@torch.no_grad()
def align_queries(
    base_layer: nn.Module, layer: Any, own: SharedAttentionMixin, index: int, batches: Sequence[Batch], steps: int
) -> tuple[float, float]:
    """Matches and trains W_q of a converted layer that borrows keys; see the head of this file.

    Args:
        base_layer: the base's layer.
        layer: the converted model's, of a kind that borrows keys and has queries of its own.
        own: the layer's attention module as a layer of kind `own` has it, with the base's weights.
        batches: both streams where they enter the layer, and the states that earlier layers lend.
        steps: of Adam, each on the next rows that are not held out.

    Returns:
        The divergence before and after, in nats, on held-out tokens where there are some. What makes it larger there
        is not kept.
    """
    attention = layer.self_attn
    length = batches[0].converted.shape[1]
    count = max(1, STEP_TOKENS // length)
    prepared = lambda held, most: _rows(base_layer, layer, own, index, batches, held, most)  # noqa: E731
    learned = prepared(False, max(1, steps) * count) or prepared(True, max(1, steps) * count)
    validation = prepared(True, VALIDATION_ROWS) or learned[:VALIDATION_ROWS]
    sources = sorted({source for source, _ in attention.key_sources})
    matches = KeyMatches.of(base_layer, own, index, batches, sources, MATCH_TOKENS)
    weights = _Queries(attention)
    inputs = None
    if attention.plan.traits.early:
        inputs = InputMatches.of(base_layer, own, index, batches, sources, MATCH_TOKENS)
    before = best = _mean(attention, own, validation)
    for change in (
        lambda: weights.match(matches.maps(attention.key_sources), inputs),
        lambda: _train(weights, own, learned, steps, min(count, len(learned))),
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


class _Queries:
    """The parameters that queries come from, in float32 while they are trained.

    Args:
        attention: of the converted layer; its weights may be shared with the base and are replaced, not changed.
    """

    def __init__(self, attention: SharedAttentionMixin):
        self.attention = attention
        projection = query_projection(attention)
        self.norm: Any = getattr(attention, "q_norm", None)
        modules = [projection] if self.norm is None else [projection, self.norm]
        self.kept = [(module, *item) for module in modules for item in module.named_parameters(recurse=False)]
        self.trained = [nn.Parameter(parameter.detach().float().clone()) for _, _, parameter in self.kept]
        for (module, name, _), parameter in zip(self.kept, self.trained, strict=True):
            setattr(module, name, parameter)
        self.scales = [
            (self.gain() if module is self.norm else projection.weight).square().mean().sqrt().item()
            for module, _, _ in self.kept
        ]

    def gain(self) -> torch.Tensor:
        """What the norm of queries multiplies by, [1 or heads, dim]; some families store it less one."""
        width = self.norm.weight.shape[-1]
        return self.norm(self.norm.weight.new_ones(width)).detach().view(-1, self.attention.head_dim)

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
            gain = self.gain()
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


def _train(weights: _Queries, own: SharedAttentionMixin, learned: Sequence[_Material], steps: int, count: int) -> None:
    groups = [
        {"params": [parameter], "lr": RATE * scale}
        for parameter, scale in zip(weights.trained, weights.scales, strict=True)
    ]
    optimizer = torch.optim.Adam(groups, betas=BETAS)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: _share(step, steps))
    for step in range(steps):
        rows = [learned[(step * count + place) % len(learned)] for place in range(count)]
        optimizer.zero_grad()
        for piece in _Material.together(rows):
            found = _gradients(weights.trained, weights.attention, own, piece)
            for parameter, gradient in zip(weights.trained, found, strict=True):
                gradient = gradient * (len(piece.queries) / count)
                parameter.grad = gradient if parameter.grad is None else parameter.grad + gradient
        optimizer.step()
        scheduler.step()


def _gradients(
    trained: Sequence[nn.Parameter], attention: SharedAttentionMixin, own: SharedAttentionMixin, material: _Material
) -> tuple[torch.Tensor, ...]:
    """Of `_divergence`, whose gradient with respect to scores is the difference of the maps.

    So written it takes a third of the time that autograd needs, most of which goes by in passes over scores.
    """
    target = _masked(own, _scores(own, material.queries, material.base_keys), material.mask).softmax(-1)
    with torch.enable_grad():
        scores = _scores(attention, _positioned_queries(attention, material), material.keys)
    slopes = _masked(attention, scores.detach(), material.mask).softmax(-1).sub_(target)
    slopes /= slopes[..., 0].numel()
    # Not `backward`: weights that are not trained may be those of the base.
    return torch.autograd.grad(scores, trained, slopes)


def _share(step: int, steps: int) -> float:
    """Of the largest rate: a short rise, then a cosine down to nothing."""
    rise = max(1, round(WARMUP * steps))
    if step < rise:
        return (step + 1) / rise
    return 0.5 * (1 + math.cos(math.pi * (step - rise) / max(1, steps - rise)))


def _rows(
    base_layer: nn.Module,
    layer: Any,
    own: SharedAttentionMixin,
    index: int,
    batches: Sequence[Batch],
    held: bool,
    most: int,
) -> list[_Material]:
    """So many single rows, held out or not."""
    rows: list[_Material] = []
    for batch in batches:
        if batch.held is held and len(rows) < most:
            rows += _prepare(base_layer, layer, own, index, batch).rows()
    return rows[:most]


def _prepare(base_layer: nn.Module, layer: Any, own: SharedAttentionMixin, index: int, batch: Batch) -> _Material:
    base = attention_inputs(base_layer, batch.base, batch.kwargs[index])
    kwargs = attention_inputs(layer, batch.converted, batch.kwargs[index], batch.shared)
    states = own.project(base["hidden_states"], "qk")
    own.embed_positions(states, base["position_embeddings"])
    attention = layer.self_attn
    keys = gather_heads(batch.shared.keys, attention.key_runs, batch.converted.device)
    mask = kwargs.get("attention_mask")
    # No mask, or one that only a backend can read: without padding it says nothing that is not known.
    mask = mask[:1] if isinstance(mask, torch.Tensor) else None
    positions = tuple(each[:1] for each in kwargs["position_embeddings"])
    inputs = [kwargs["hidden_states"]]
    if attention.plan.traits.early:
        inputs = [batch.shared.inputs[source].to(batch.converted.device) for source in _asked(attention)]
    return _Material(tuple(inputs), states["q"], states["k"], keys, positions, mask)


def _asked(attention: SharedAttentionMixin) -> list[int]:
    """The layers that an early layer asks, each once."""
    return list(dict.fromkeys(source for source, _ in attention.key_sources))


def _divergence(attention: SharedAttentionMixin, own: SharedAttentionMixin, material: _Material) -> torch.Tensor:
    """KL(base's map || the layer's), mean over rows, heads and positions."""
    target = _masked(own, _scores(own, material.queries, material.base_keys), material.mask).log_softmax(-1)
    queries = _positioned_queries(attention, material)
    found = _masked(attention, _scores(attention, queries, material.keys), material.mask).log_softmax(-1)
    return (target.exp() * (target.clamp(min=LOWEST) - found.clamp(min=LOWEST))).sum(-1).mean()


def _mean(attention: SharedAttentionMixin, own: SharedAttentionMixin, rows: Sequence[_Material]) -> float:
    return sum(_divergence(attention, own, row).item() for row in rows) / len(rows)


def _positioned_queries(attention: SharedAttentionMixin, material: _Material) -> torch.Tensor:
    """The layer's queries with positions, float32."""
    inputs = [states.float() for states in material.inputs]
    if attention.plan.traits.early:
        states = {"q": attention.early_queries(dict(zip(_asked(attention), inputs, strict=True)), inputs[0].device)}
    else:
        states = attention.project(inputs[0], "q")
    attention.embed_positions(states, tuple(each.float() for each in material.positions))
    return states["q"]


def _scores(attention: SharedAttentionMixin, queries: torch.Tensor, keys: torch.Tensor) -> torch.Tensor:
    """Scores of all pairs of tokens, float32 [rows, heads, tokens, tokens]."""
    keys = keys.float().repeat_interleave(queries.shape[1] // keys.shape[1], dim=1)
    scores = (queries.float() * attention.scaling) @ keys.transpose(-1, -2)
    cap = attention.attention_arguments().get("softcap")
    return scores if cap is None else cap * torch.tanh(scores / cap)


def _masked(attention: SharedAttentionMixin, scores: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
    """Scores where a token sees another, minus infinity elsewhere."""
    if mask is None:
        window = attention.attention_arguments().get("sliding_window")
        hidden = torch.ones(scores.shape[-2:], dtype=torch.bool, device=scores.device).triu(1)
        if window is not None:
            hidden |= torch.ones_like(hidden).tril(-window)
        return scores.masked_fill(hidden, -torch.inf)
    if mask.dtype is torch.bool:
        return scores.masked_fill(~mask, -torch.inf)
    return scores + mask[..., : scores.shape[-1]].float()
