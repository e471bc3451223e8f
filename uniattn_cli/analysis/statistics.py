"""How alike the attention maps of all layers and heads are, accumulated one sequence at a time.

Memory is that of one sequence's queries and keys plus a bounded tile of maps, whatever the number of sequences. Rows of
maps are compared one by one (a row is the distribution over keys of one query), and their similarities averaged:

- cosine: <p, q> / (|p| |q|), as the paper (arXiv 2502.00439) argues with, but per row;
- Jensen-Shannon: 1 - JS(p, q) / ln 2, in [0, 1], on a few rows per sequence, since it needs a logarithm per key;
- top-k: share of the k strongest keys that both have, on the same rows.

Each is taken with and without the first key, the attention sink, which alone makes nearly all maps look alike.
"""

from __future__ import annotations

import math

import torch

from uniattn_cli.analysis.capture import LayerStates

# Rows of the first queries have so few keys that they are alike whatever the layers do.
FIRST_ROW = 8
TILE_BYTES = 96 << 20


class SequenceMean:
    """Mean over sequences and its standard error, in float64."""

    def __init__(self) -> None:
        self.count = 0
        self.total: torch.Tensor | None = None
        self.squares: torch.Tensor | None = None

    def add(self, value: torch.Tensor) -> None:
        value = value.double()
        self.count += 1
        self.total = value.clone() if self.total is None else self.total.add_(value)
        self.squares = value.square() if self.squares is None else self.squares.add_(value.square())

    @property
    def mean(self) -> torch.Tensor:
        return self.total / self.count

    @property
    def stderr(self) -> torch.Tensor:
        """NaN for a single sequence, which says nothing about the spread."""
        if self.count < 2:
            return torch.full_like(self.total, float("nan"))
        variance = (self.squares - self.total.square() / self.count) / (self.count - 1)
        return (variance.clamp_min(0) / self.count).sqrt()


def attention_maps(layers: list[LayerStates], rows: torch.Tensor, keys: int) -> torch.Tensor:
    """Materialises rows of the attention maps.

    Args:
        layers: captured states, one per layer.
        rows: query positions [rows].
        keys: number of keys that these rows can see at most.

    Returns:
        float32 [layers, query_heads, rows, keys].
    """
    maps = []
    for state in layers:
        heads, group = state.queries.shape[0], state.queries.shape[0] // state.keys.shape[0]
        queries = state.queries[:, rows].float().unflatten(0, (-1, group)).flatten(1, 2)
        scores = queries @ state.keys[:, :keys].float().transpose(1, 2) * state.scaling
        scores = scores.view(heads, len(rows), keys)
        if state.softcap is not None:
            scores = torch.tanh(scores / state.softcap) * state.softcap
        maps.append(_masked(scores, state.mask, rows, keys).softmax(-1))
    return torch.stack(maps)


def _masked(scores: torch.Tensor, mask: torch.Tensor | None, rows: torch.Tensor, keys: int) -> torch.Tensor:
    if mask is None:
        positions = torch.arange(keys, device=scores.device)
        return scores.masked_fill(positions > rows[:, None], -math.inf)
    mask = mask[0, 0][rows][:, :keys]
    return scores.masked_fill(~mask, -math.inf) if mask.dtype == torch.bool else scores + mask.float()


def drop_sink(maps: torch.Tensor) -> torch.Tensor:
    """The maps without their first key, each row made to sum to 1 again."""
    rest = maps[..., 1:]
    return rest / rest.sum(-1, keepdim=True).clamp_min(1e-12)


def banded(left: torch.Tensor, max_distance: int) -> torch.Tensor:
    """Products of all heads of each layer with all heads of the layers just before it.

    Args:
        left: [layers, heads, features].

    Returns:
        [layers, max_distance, heads, heads]: entry [j, d - 1, h, g] is head h of layer j times head g of layer j - d.
    """
    layers, heads, _ = left.shape
    result = left.new_zeros(layers, max_distance, heads, heads)
    for distance in range(1, min(max_distance, layers - 1) + 1):
        result[distance:, distance - 1] = left[distance:] @ left[:-distance].transpose(1, 2)
    return result


class MapStatistics:
    """Accumulates all similarities.

    After `add` for every sequence, `heads[name]` is a `SequenceMean` of shape [layers, max_distance, heads, heads] (see
    `banded`), `layers[name]` one of shape [layers, layers], for the names `cosine`, `js`, `top_k` and the same with
    `_no_sink`. Layer entries compare the same head of both layers and average over heads; `averaged_cosine` and
    `averaged_cosine_no_sink` compare the maps averaged over heads; `sink` [layers] is the mean weight of the first key.
    """

    def __init__(self, max_distance: int, rows: int, top_k: int):
        self.max_distance = max_distance
        self.rows = rows
        self.top_k = top_k
        self.heads: dict[str, SequenceMean] = {}
        self.layers: dict[str, SequenceMean] = {}
        self.sink = SequenceMean()

    def add(self, layers: list[LayerStates]) -> None:
        """Adds one sequence of at least `FIRST_ROW` + 2 tokens."""
        tokens = layers[0].queries.shape[1]
        device = layers[0].queries.device
        sums: dict[tuple[str, str], torch.Tensor] = {}
        count, sink = 0, 0.0
        heads = sum(state.queries.shape[0] for state in layers)
        step = max(1, TILE_BYTES // (4 * heads * tokens))
        for start in range(FIRST_ROW, tokens, step):
            rows = torch.arange(start, min(start + step, tokens), device=device)
            maps = attention_maps(layers, rows, int(rows[-1]) + 1)
            count += len(rows)
            sink = sink + maps[..., 0].sum(2).mean(1)
            for suffix, part in (("", maps), ("_no_sink", drop_sink(maps))):
                self._add_cosines(sums, suffix, part)
        self.sink.add((sink / count).cpu())
        for (level, name), total in sums.items():
            self._store(level, name, total / count)
        self._add_sampled(layers, tokens, device)

    def _add_cosines(self, sums: dict, suffix: str, maps: torch.Tensor) -> None:
        unit = torch.nn.functional.normalize(maps, dim=-1).flatten(2)
        _accumulate(sums, ("heads", "cosine" + suffix), banded(unit, self.max_distance))
        by_head = unit.transpose(0, 1)
        _accumulate(sums, ("layers", "cosine" + suffix), (by_head @ by_head.transpose(1, 2)).mean(0))
        averaged = torch.nn.functional.normalize(maps.mean(1), dim=-1).flatten(1)
        _accumulate(sums, ("layers", "averaged_cosine" + suffix), averaged @ averaged.T)

    def _add_sampled(self, layers: list[LayerStates], tokens: int, device: torch.device) -> None:
        """Jensen-Shannon similarity and top-k overlap on evenly spread rows."""
        rows = torch.linspace(FIRST_ROW, tokens - 1, self.rows, device=device).long()
        maps = attention_maps(layers, rows, tokens)
        for suffix, part in (("", maps), ("_no_sink", drop_sink(maps))):
            self._store("heads", "js" + suffix, self._js_heads(part))
            same = [self._js(part, part[layer : layer + 1]) for layer in range(len(part))]
            self._store("layers", "js" + suffix, torch.stack(same, 1).mean(-1).mean(-1))
            chosen = torch.zeros_like(part).scatter_(-1, part.topk(min(self.top_k, part.shape[-1])).indices, 1.0)
            # Early rows see fewer than k keys; what they cannot see is no match.
            chosen = (chosen * (part > 0)).flatten(2)
            size = chosen.sum(-1).clamp_min(1)
            scale = size.unflatten(1, (-1,))
            overlap = banded(chosen / scale.sqrt()[..., None], self.max_distance)
            self._store("heads", "top_k" + suffix, overlap)
            by_head = (chosen / scale.sqrt()[..., None]).transpose(0, 1)
            self._store("layers", "top_k" + suffix, (by_head @ by_head.transpose(1, 2)).mean(0))

    @staticmethod
    def _js(left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
        """1 - JS / ln 2 of distributions along the last dimension, broadcast over the others."""
        entropy = torch.special.entr
        mixed = entropy((left + right) / 2).sum(-1)
        divergence = mixed - (entropy(left).sum(-1) + entropy(right).sum(-1)) / 2
        return 1 - divergence / math.log(2)

    def _js_heads(self, maps: torch.Tensor) -> torch.Tensor:
        layers, heads = maps.shape[:2]
        result = maps.new_zeros(layers, self.max_distance, heads, heads)
        for layer in range(1, layers):
            first = max(0, layer - self.max_distance)
            # [earlier layers, heads of the later layer, heads of the earlier layer, rows]
            similarity = self._js(maps[layer][None, :, None], maps[first:layer, None]).mean(-1)
            result[layer, : layer - first] = similarity.flip(0)
        return result

    def _store(self, level: str, name: str, value: torch.Tensor) -> None:
        getattr(self, level).setdefault(name, SequenceMean()).add(value.cpu())


def _accumulate(sums: dict, key: tuple[str, str], value: torch.Tensor) -> None:
    sums[key] = sums[key] + value if key in sums else value
