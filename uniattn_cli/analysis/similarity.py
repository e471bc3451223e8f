"""How alike the attention maps of all layers and heads are, accumulated one sequence at a time.

Memory is that of one sequence's queries and keys plus a bounded tile of maps, whatever the number of sequences. Rows of
maps are compared one by one (a row is the distribution over keys of one query), and their similarities averaged:

- cosine: <p, q> / (|p| |q|), as the paper (arXiv 2502.00439) argues with, but per row, on `COSINE_ROWS` of them;
- Jensen-Shannon: 1 - JS(p, q) / ln 2, in [0, 1], on a few rows per sequence, since it needs a logarithm per key;
- top-k: share of the k strongest keys that both have, on the same rows.

Each is taken with and without the first key, the attention sink, which alone makes nearly all maps look alike.
"""

from __future__ import annotations

import math

import torch

from uniattn_cli.analysis.capture import LayerStates
from uniattn_cli.analysis.maps import SMALLEST, SequenceMaps, drop_sink
from uniattn_cli.models.device import coarse_products

# Rows of the first queries have so few keys that they are alike whatever the layers do.
FIRST_ROW = 8
# Rows of a sequence whose cosines are taken, evenly spread. Neighbouring rows say nearly the same, and the intervals
# that are told are those between sequences.
COSINE_ROWS = 128
TILE_BYTES = 96 << 20
# What picks layers, and perhaps heads.
Index = slice | int | tuple[slice, slice]


class SequenceMean:
    """Mean over sequences and its standard error, in float64."""

    def __init__(self) -> None:
        self.count = 0
        self.total: torch.Tensor
        self.squares: torch.Tensor

    def add(self, value: torch.Tensor) -> None:
        value = value.cpu().double()
        if not self.count:
            self.total, self.squares = torch.zeros_like(value), torch.zeros_like(value)
        self.count += 1
        self.total += value
        self.squares += value.square()

    def merge(self, other: SequenceMean) -> None:
        """Adds the sequences of another one."""
        if not self.count:
            self.total, self.squares = torch.zeros_like(other.total), torch.zeros_like(other.squares)
        self.count += other.count
        self.total += other.total
        self.squares += other.squares

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


def gram(features: torch.Tensor) -> torch.Tensor:
    """Inner products of all maps with all maps.

    One product of all maps at once: products of a pair of layers, a few heads by a very long row of features, would
    leave a GPU nearly idle. There each map row is a product of its own, so that enough of them run at the same time.

    Args:
        features: float32 [maps, rows, keys].

    Returns:
        [maps, maps].
    """
    if features.is_cuda:
        # Means over many tokens: the rounding of single products is far below the intervals that are told.
        with coarse_products():
            return gram_by_rows(features)
    flat = features.flatten(1)
    return flat @ flat.T


def gram_by_rows(features: torch.Tensor) -> torch.Tensor:
    """`gram`, row by row; the products of the rows take no more than a tile at a time."""
    maps = len(features)
    result = features.new_zeros(maps, maps)
    for part in features.transpose(0, 1).split(max(1, TILE_BYTES // (4 * maps * maps))):
        result += (part @ part.transpose(1, 2)).sum(0)
    return result


def banded(products: torch.Tensor, max_distance: int) -> torch.Tensor:
    """Products of all heads of each layer with all heads of the layers just before it.

    Args:
        products: [layers, heads, layers, heads].

    Returns:
        [layers, max_distance, heads, heads]: entry [j, d - 1, h, g] is head h of layer j times head g of layer j - d.
    """
    layers, heads = products.shape[:2]
    result = products.new_zeros(layers, max_distance, heads, heads)
    for distance in range(1, min(max_distance, layers - 1) + 1):
        result[distance:, distance - 1] = products.diagonal(-distance, 0, 2).permute(2, 0, 1)
    return result


def same_heads(products: torch.Tensor) -> torch.Tensor:
    """[layers, layers] from [layers, heads, layers, heads]: same head of both layers, averaged over heads."""
    return products.diagonal(0, 1, 3).mean(-1)


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
        """Adds one sequence. One with fewer than `FIRST_ROW` + 2 tokens has no rows to compare and is passed over."""
        maps = SequenceMaps(layers)
        if maps.tokens < FIRST_ROW + 2:
            return
        sums: dict[str, torch.Tensor] = {}
        count = min(maps.tokens - FIRST_ROW, COSINE_ROWS)
        spread = torch.linspace(FIRST_ROW, maps.tokens - 1, count).round().long()
        step = max(1, TILE_BYTES // (4 * len(layers) * maps.heads * maps.tokens))
        for rows in spread.split(step):
            _add_cosines(sums, maps.rows(rows.to(maps.device), int(rows[-1]) + 1))
        self.sink.add(sums.pop("sink") / count)
        for name, total in sums.items():
            self._store(name, total / count)
        self._add_sampled(maps)

    def merge(self, other: MapStatistics) -> None:
        """Adds the sequences of another one."""
        self.sink.merge(other.sink)
        for mine, others in ((self.heads, other.heads), (self.layers, other.layers)):
            for name, mean in others.items():
                mine.setdefault(name, SequenceMean()).merge(mean)

    def _add_sampled(self, maps: SequenceMaps) -> None:
        """Jensen-Shannon similarity and top-k overlap on evenly spread rows."""
        rows = torch.linspace(FIRST_ROW, maps.tokens - 1, self.rows, device=maps.device).long()
        part = maps.rows(rows, maps.tokens)
        for suffix in ("", "_no_sink"):
            part = drop_sink(part) if suffix else part
            heads, layers = js_similarities(part, self.max_distance)
            self.heads.setdefault("js" + suffix, SequenceMean()).add(heads)
            self.layers.setdefault("js" + suffix, SequenceMean()).add(layers)
            chosen = torch.zeros_like(part).scatter_(-1, part.topk(min(self.top_k, part.shape[-1])).indices, 1.0)
            # Early rows see fewer than k keys; what they cannot see is no match.
            chosen = chosen.mul_(part > 0).flatten(0, 1)
            scale = chosen.sum((1, 2)).clamp_min(1).rsqrt()
            overlap = gram(chosen) * scale[:, None] * scale
            self._store("top_k" + suffix, overlap.view(*part.shape[:2], *part.shape[:2]))

    def _store(self, name: str, products: torch.Tensor) -> None:
        """Keeps products [layers, heads, layers, heads] by head and by layer, or [layers, layers] as it is."""
        if products.dim() == 4:
            self.heads.setdefault(name, SequenceMean()).add(banded(products, self.max_distance))
            products = same_heads(products)
        self.layers.setdefault(name, SequenceMean()).add(products)


def _add_cosines(sums: dict[str, torch.Tensor], maps: torch.Tensor) -> None:
    """Adds the rows of a tile of maps [layers, heads, rows, keys], which it overwrites, to the sums.

    Both variants are scalings of the same tile, row by row; one buffer beside it is all that is needed.
    """
    sink, rest = maps[..., 0].clone(), maps[..., 1:]
    _accumulate(sums, "sink", sink.sum(2).mean(1))
    weight = rest.sum(-1).clamp_min_(SMALLEST)
    # Not from the norm with the first key, of which a strong sink leaves nothing but rounding.
    norm = torch.linalg.vector_norm(rest, dim=-1).clamp_min_(SMALLEST)
    _accumulate(sums, "averaged_cosine", _averaged(maps))
    scaled = maps * torch.hypot(norm, sink).reciprocal_()[..., None]
    _accumulate(sums, "cosine", _products(scaled))
    maps[..., 0] = 0
    _accumulate(sums, "averaged_cosine_no_sink", _averaged(torch.mul(maps, (1 / weight)[..., None], out=scaled)))
    _accumulate(sums, "cosine_no_sink", _products(maps.mul_((1 / norm)[..., None])))


def _products(unit: torch.Tensor) -> torch.Tensor:
    """[layers, heads, layers, heads] from [layers, heads, rows, keys]."""
    return gram(unit.flatten(0, 1)).view(*unit.shape[:2], *unit.shape[:2])


def _averaged(maps: torch.Tensor) -> torch.Tensor:
    """Cosines [layers, layers] of maps averaged over heads."""
    mean = maps.mean(1)
    return gram(mean.div_(torch.linalg.vector_norm(mean, dim=-1, keepdim=True).clamp_min_(SMALLEST)))


def js_similarities(maps: torch.Tensor, max_distance: int) -> tuple[torch.Tensor, torch.Tensor]:
    """1 - JS / ln 2, averaged over rows.

    With s = p + q and H the entropy, JS = H(s / 2) - (H(p) + H(q)) / 2 takes one logarithm per key and pair: H(s / 2)
    follows from the sum of -s ln s, and H(p) is computed once per map.

    Args:
        maps: [layers, heads, rows, keys].

    Returns:
        Head pairs as in `banded` [layers, max_distance, heads, heads], and same heads averaged [layers, layers].
    """
    layers, heads, rows, keys = maps.shape
    alone = torch.special.entr(maps).sum(-1) / (2 * math.log(2)) - maps.sum(-1) / 2
    pairs = max(1, TILE_BYTES // (4 * rows * keys))

    def similarity(left: Index, right: Index, dim: int, other: int) -> torch.Tensor:
        both = maps[left].unsqueeze(dim) + maps[right].unsqueeze(other)
        mixed = torch.special.entr(both, out=both).sum(-1) / (2 * math.log(2))
        return (alone[left].unsqueeze(dim) + alone[right].unsqueeze(other) - mixed).mean(-1) + 1

    by_head = maps.new_zeros(layers, max_distance, heads, heads)
    some_heads, some_layers = min(heads, max(1, pairs // heads)), max(1, pairs // heads**2)
    for distance in range(1, min(max_distance, layers - 1) + 1):
        for first in range(distance, layers, some_layers):
            last = min(first + some_layers, layers)
            for head in range(0, heads, some_heads):
                left = (slice(first, last), slice(head, head + some_heads))
                right = slice(first - distance, last - distance)
                by_head[first:last, distance - 1, head : head + some_heads] = similarity(left, right, 2, 1)
    by_layer = maps.new_zeros(layers, layers)
    some_layers = max(1, pairs // (layers * heads))
    for first in range(0, layers, some_layers):
        by_layer[first : first + some_layers] = similarity(slice(first, first + some_layers), slice(None), 1, 0).mean(
            -1
        )
    return by_head, by_layer


def _accumulate(sums: dict[str, torch.Tensor], name: str, value: torch.Tensor) -> None:
    sums[name] = sums[name] + value if name in sums else value
