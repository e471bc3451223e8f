"""Queries of a layer that borrows keys, taught the maps that the base has there.

A layer of kind `key` or `kv` keeps its own W_q, which was made for other keys: with borrowed ones its map has nothing
to do with the base's, and what it attends to is noise to W_o. So W_q is trained first, alone and layer by layer, on the
divergence KL(base's map || map with borrowed keys), the mean over heads and positions. There is no closed form: rotary
embedding stands between queries and keys. Training it on the error of the attention output instead hardly moves it.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from uniattn_cli.fitting.stream import Batch, attention_inputs
from uniattn_cli.modeling.sharing_uniattn import gather_heads

# Largest step of Adam, in units of the root mean square of the weights.
RATE = 0.03
WARMUP = 0.1
# Scores of one step at most, 256 MiB in float32; a few tensors of that size are alive at a time.
MOST_SCORES = 1 << 26
# Stands for the logarithm of zero.
LOWEST = -100.0


@dataclass
class _Material:
    """What a batch gives: inputs of both attention modules, the base's states, the keys that are borrowed."""

    converted: torch.Tensor
    queries: torch.Tensor
    base_keys: torch.Tensor
    keys: torch.Tensor
    positions: Any
    mask: torch.Tensor | None
    held: bool

    def rows(self, part: slice) -> _Material:
        cut = lambda states: states[part] if states.shape[0] == len(self.converted) else states  # noqa: E731
        positions = tuple(cut(each) for each in self.positions)
        mask = None if self.mask is None else cut(self.mask)
        states = (cut(each) for each in (self.converted, self.queries, self.base_keys, self.keys))
        return _Material(*states, positions, mask, self.held)


@torch.no_grad()
def align_queries(
    base_layer: nn.Module, layer: nn.Module, own: nn.Module, index: int, batches: Sequence[Batch], steps: int
) -> tuple[float, float]:
    """Trains W_q of a converted layer that borrows keys; see the head of this file.

    Args:
        base_layer: the base's layer.
        layer: the converted model's, of kind `key` or `kv`.
        own: the layer's attention module as a layer of kind `own` has it, with the base's weights.
        batches: both streams where they enter the layer, and the states that earlier layers lend.
        steps: of Adam; each sees a batch that is not held out, or as many rows of it as memory allows.

    Returns:
        The divergence before and after, in nats, on held-out tokens where there are some.
    """
    attention = layer.self_attn
    projection = getattr(attention, "q_proj", None) or attention.qkv_proj
    material = [_prepare(base_layer, layer, own, index, batch) for batch in batches]
    judged = [each for each in material if each.held] or material
    before = _mean(attention, own, judged)
    learned = [each for each in material if not each.held] or material
    kept = {name: parameter for name, parameter in projection.named_parameters(recurse=False)}
    trained = {name: nn.Parameter(parameter.detach().float().clone()) for name, parameter in kept.items()}
    for name, parameter in trained.items():
        setattr(projection, name, parameter)
    scale = trained["weight"].square().mean().sqrt().item()
    optimizer = torch.optim.Adam(trained.values(), lr=RATE * scale)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: _share(step, steps))
    for step in range(steps):
        each = learned[step % len(learned)]
        heads, length = each.queries.shape[1], each.converted.shape[1]
        count = max(1, min(len(each.converted), MOST_SCORES // (heads * length * length)))
        first = step // len(learned) * count % len(each.converted)
        with torch.enable_grad():
            loss = _divergence(attention, own, each.rows(slice(first, first + count)))
            gradients = torch.autograd.grad(loss, list(trained.values()))
        for parameter, gradient in zip(trained.values(), gradients, strict=True):
            parameter.grad = gradient
        optimizer.step()
        scheduler.step()
    # Rounded to the model's dtype as everything that is fitted; the weights before may be shared with the base.
    for name, parameter in kept.items():
        new = trained[name].detach().to(parameter.dtype)
        setattr(projection, name, nn.Parameter(new, requires_grad=parameter.requires_grad))
    return before, _mean(attention, own, judged)


def _share(step: int, steps: int) -> float:
    """Of the largest rate: a short rise, then a cosine down to nothing."""
    rise = max(1, round(WARMUP * steps))
    if step < rise:
        return (step + 1) / rise
    return 0.5 * (1 + math.cos(math.pi * (step - rise) / max(1, steps - rise)))


def _prepare(base_layer: nn.Module, layer: nn.Module, own: nn.Module, index: int, batch: Batch) -> _Material:
    base = attention_inputs(base_layer, batch.base, batch.kwargs[index])
    given = attention_inputs(layer, batch.converted, batch.kwargs[index], batch.shared)
    states = own.project(base["hidden_states"], "qk")
    own.embed_positions(states, base["position_embeddings"])
    attention = layer.self_attn
    keys = gather_heads(batch.shared.keys, attention.key_sources, batch.converted.device)
    return _Material(
        given["hidden_states"],
        states["q"],
        states["k"],
        keys,
        given["position_embeddings"],
        given.get("attention_mask"),
        batch.held,
    )


def _divergence(attention: nn.Module, own: nn.Module, material: _Material) -> torch.Tensor:
    """KL(base's map || the layer's), mean over rows, heads and positions."""
    wanted = _log_map(own, material.queries, material.base_keys, material.mask)
    states = attention.project(material.converted.float(), "q")
    attention.embed_positions(states, tuple(each.float() for each in material.positions))
    found = _log_map(attention, states["q"], material.keys, material.mask)
    return (wanted.exp() * (wanted.clamp(min=LOWEST) - found.clamp(min=LOWEST))).sum(-1).mean()


def _mean(attention: nn.Module, own: nn.Module, material: Sequence[_Material]) -> float:
    total = rows = 0
    for each in material:
        for row in range(len(each.converted)):
            total += _divergence(attention, own, each.rows(slice(row, row + 1))).item()
            rows += 1
    return total / rows


def _log_map(
    attention: nn.Module, queries: torch.Tensor, keys: torch.Tensor, mask: torch.Tensor | None
) -> torch.Tensor:
    """Logarithms of the map, float32 [rows, heads, tokens, tokens]."""
    keys = keys.float().repeat_interleave(queries.shape[1] // keys.shape[1], dim=1)
    scores = queries.float() @ keys.transpose(-1, -2) * attention.scaling
    arguments = attention.attention_arguments()
    cap, window = arguments.get("softcap"), arguments.get("sliding_window")
    if cap is not None:
        scores = cap * torch.tanh(scores / cap)
    if not isinstance(mask, torch.Tensor):
        # No mask, or one that only a backend can read: calibration rows have no padding, so it says nothing else.
        hidden = torch.ones(scores.shape[-2:], dtype=torch.bool, device=scores.device).triu(1)
        if window is not None:
            hidden |= torch.ones_like(hidden).tril(-window)
        scores = scores.masked_fill(hidden, -torch.inf)
    elif mask.dtype is torch.bool:
        scores = scores.masked_fill(~mask, -torch.inf)
    else:
        scores = scores + mask[..., : scores.shape[-1]].float()
    return scores.log_softmax(-1)
