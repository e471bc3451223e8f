"""What turns queries made for a layer's own keys and input into queries for borrowed ones, in closed form.

Keys of neighbouring layers are nearly linear functions of one another. With own keys k, borrowed keys s (rows, both
before rotary embedding) and the regression k ~ s B + c, scores are q k^T ~ (q B^T) s^T, but for q c^T, which is the
same for all keys of a query and does not change its map. Rotary embedding stands between, so that this is exact only
for nearby tokens: `fitting.align_queries` starts from it and trains the rest.

A layer that asks early has the lender's input z in place of its own x. Neighbouring residual streams are nearly linear
functions of one another, too: with x ~ z P, queries W_q x become W_q Pᵀ z.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from uniattn_cli.fitting.stream import Batch, attention_inputs, visit

if TYPE_CHECKING:
    from uniattn_cli.modeling.sharing_uniattn import SharedAttentionMixin, SharedStates

RIDGE = 1e-4
# Enough for regressions of one head's width.
MATCH_TOKENS = 1 << 15


class KeyMatches:
    """Regressions of a layer's own keys on those that other layers lend.

    Args:
        own: the layer's attention module as it is while the layer is `own`, with the base's weights.
        sources: layers that lend.
    """

    def __init__(self, own: SharedAttentionMixin, sources: Sequence[int]):
        self.own = own
        self.sources = list(sources)
        self.tokens = 0
        self._sums: dict[Any, torch.Tensor] = {}

    @classmethod
    @torch.no_grad()
    def of(
        cls,
        base_layer: nn.Module,
        own: SharedAttentionMixin,
        index: int,
        batches: Sequence[Batch],
        sources: Sequence[int],
        tokens: int | None = None,
    ) -> KeyMatches:
        """Regressions over calibration tokens.

        Args:
            base_layer: the base's layer, whose keys are to be met.
            own: see the class.
            index: number of the layer.
            batches: streams where they enter the layer, and what earlier layers lend; those held out are not used.
            sources: layers that lend.
            tokens: enough to regress on; None takes all.
        """
        found = cls(own, sources)
        for batch in visit([batch for batch in batches if not batch.held] or batches):
            kwargs = attention_inputs(base_layer, batch.base, batch.kwargs[index])
            found.add(kwargs, batch.shared)
            if tokens is not None and found.tokens >= tokens:
                break
        return found

    def add(self, kwargs: dict[str, Any], shared: SharedStates) -> None:
        """Adds tokens: what the base's attention module is called with, and what the sources lend for it."""
        states = self.own.project(kwargs["hidden_states"], "qk")
        heads = states["k"].shape[1]
        # All query heads that read a unit's keys.
        queries = states["q"].float().unflatten(1, (heads, -1)).transpose(0, 1).flatten(1, 3)
        own = states["k"].float().transpose(0, 1).flatten(1, 2)
        self.tokens += own.shape[1]
        within = queries.mT @ queries / queries.shape[1] * own.shape[1]
        sums: dict[Any, torch.Tensor] = {"qq": within, "kk": own.mT @ own, "k": own.sum(1)}
        for source in self.sources:
            lent = unrotated(self.own, shared.keys[source].to(own.device), kwargs["position_embeddings"])
            lent = lent.transpose(0, 1).flatten(1, 2)
            sums |= {("ss", source): lent.mT @ lent, ("sk", source): lent.mT.unsqueeze(1) @ own}
            sums["s", source] = lent.sum(1)
        for name, product in sums.items():
            # In float64 between batches: what is unexplained is a small difference of large sums.
            self._sums[name] = self._sums.get(name, 0) + product.double()

    @functools.cached_property
    def _solution(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Maps [sources, heads, units, dim, dim] and unexplained shares [sources, heads, units]."""
        sums = {name: value / self.tokens for name, value in self._sums.items()}
        of_sources = lambda name: torch.stack([sums[name, source] for source in self.sources])  # noqa: E731
        own, lent = sums["k"], of_sources("s")
        within = of_sources("ss") - lent.unsqueeze(-1) * lent.unsqueeze(-2)
        across = of_sources("sk") - lent[:, :, None, :, None] * own[None, None, :, None, :]
        covariance = sums["kk"] - own.unsqueeze(-1) * own.unsqueeze(-2)
        ridge = RIDGE * within.diagonal(dim1=-2, dim2=-1).mean(-1)
        # Keys that never change are met by any map.
        ridge = torch.where(ridge > 0, ridge, 1.0)
        within = within + ridge[..., None, None] * torch.eye(within.shape[-1], device=within.device)
        maps = torch.linalg.solve(within.unsqueeze(2), across)
        residual = covariance - across.mT @ maps
        weights = sums["qq"]
        energy = (weights * covariance.mT).sum((-2, -1)).clamp(min=1e-30)
        # Shares are read number by number.
        return maps.float(), ((weights * residual.mT).sum((-2, -1)) / energy).cpu()

    def unexplained(self, source: int, head: int, unit: int) -> float:
        """Share of the energy of a unit's scores that a lent head does not give, queries and keys taken apart."""
        return self._solution[1][self.sources.index(source), head, unit].item()

    def maps(self, pairs: Sequence[tuple[int, int]]) -> torch.Tensor:
        """B for each unit, [units, dim, dim].

        Args:
            pairs: (source, head) that each unit borrows.
        """
        maps, _ = self._solution
        found = [maps[self.sources.index(source), head, unit] for unit, (source, head) in enumerate(pairs)]
        return torch.stack(found)


class InputMatches:
    """Regressions of a layer's input on the inputs of layers that it asks early.

    Args:
        attention: the layer's. With a bias of its query projection, regressions have a constant, which goes there.
    """

    def __init__(self, attention: SharedAttentionMixin):
        self.affine = query_projection(attention).bias is not None
        self._maps: dict[int, torch.Tensor] = {}

    @classmethod
    @torch.no_grad()
    def of(
        cls,
        base_layer: nn.Module,
        attention: SharedAttentionMixin,
        index: int,
        batches: Sequence[Batch],
        sources: Sequence[int],
        tokens: int,
    ) -> InputMatches:
        """Regressions over calibration tokens; arguments as `KeyMatches.of`."""
        found = cls(attention)
        sums: dict[int, list[Any]] = {}
        seen = 0
        for batch in visit([batch for batch in batches if not batch.held] or batches):
            own = attention_inputs(base_layer, batch.base, batch.kwargs[index])["hidden_states"]
            own = found._with_constant(own.flatten(0, 1).float())
            for source in sources:
                lent = found._with_constant(batch.shared.inputs[source].to(own.device).flatten(0, 1).float())
                products = [(lent.mT @ lent).double(), (lent.mT @ own).double()]
                sums[source] = [old + new for old, new in zip(sums.get(source, [0, 0]), products, strict=True)]
            seen += len(own)
            if seen >= tokens:
                break
        for source, (within, across) in sums.items():
            ridge = RIDGE * within.diagonal().mean()
            within.diagonal().add_(torch.where(ridge > 0, ridge, 1.0))
            found._maps[source] = torch.linalg.solve(within, across).float()
        return found

    def _with_constant(self, states: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.pad(states, (0, 1), value=1.0) if self.affine else states

    def map(self, source: int) -> torch.Tensor:
        """P, [hidden, hidden]; with a constant one more of both, the last."""
        return self._maps[source]

    def estimate(self, source: int, lent: torch.Tensor) -> torch.Tensor:
        """The layer's input as it follows from a source's, [..., hidden]."""
        found = self._with_constant(lent.float()) @ self._maps[source]
        return (found[..., :-1] if self.affine else found).to(lent.dtype)


@dataclass(frozen=True)
class LayerMatches:
    """How a layer's keys and input follow from those of others; each is found when it is first needed.

    Attributes:
        base_layer: the base's layer.
        own: the layer's attention module as it is while the layer is `own`, with the base's weights.
        index: number of the layer.
        batches: streams where they enter the layer, and what earlier layers lend.
        sources: layers that lend.
        tokens: enough to regress on.
    """

    base_layer: nn.Module
    own: SharedAttentionMixin
    index: int
    batches: Sequence[Batch]
    sources: Sequence[int]
    tokens: int = MATCH_TOKENS

    @functools.cached_property
    def keys(self) -> KeyMatches:
        return KeyMatches.of(self.base_layer, self.own, self.index, self.batches, self.sources, self.tokens)

    @functools.cached_property
    def inputs(self) -> InputMatches:
        return InputMatches.of(self.base_layer, self.own, self.index, self.batches, self.sources, self.tokens)


def query_projection(attention: SharedAttentionMixin) -> nn.Linear:
    """What queries come out of; where queries, keys and values are one matrix, that one."""
    return getattr(attention, "q_proj", None) or attention.qkv_proj


def matched(queries: torch.Tensor, maps: torch.Tensor) -> torch.Tensor:
    """Queries [rows, heads, tokens, dim] before rotary embedding, for borrowed keys; `maps` as `KeyMatches.maps`."""
    each = maps.repeat_interleave(queries.shape[1] // len(maps), dim=0)
    return queries @ each.mT.to(queries.dtype)


def unrotated(attention: SharedAttentionMixin, keys: torch.Tensor, position_embeddings: Any) -> torch.Tensor:
    """Keys [rows, heads, tokens, dim] as they were before rotary embedding."""
    cos, sin = (each.float() for each in position_embeddings)
    # One, but where rotary embedding scales too (arXiv 2309.00071).
    scale = cos.square() + sin.square()
    states = {"k": keys.float()}
    attention.embed_positions(states, (cos / scale, -sin / scale), None)
    return states["k"]
