"""Chooses from which heads a changed layer borrows by what its output projection can make of them.

Similar maps are not what counts: a follower's W_o is solved anew, so a borrowed head is worth what it adds, beside the
other borrowed heads and the linear compensation of x, to a linear prediction of the base's attention output. All blocks
of features that the layer could borrow are laid side by side, their second moments taken once over calibration tokens,
and the blocks chosen by coordinate descent on the residual of the joint least-squares problem.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from uniattn_cli.fitting.match_keys import InputMatches, KeyMatches, LayerMatches, matched
from uniattn_cli.fitting.moments import Moments
from uniattn_cli.fitting.stream import Batch, attention_inputs, base_step, positions_of, visit
from uniattn_cli.modeling.layout_uniattn import KINDS, AttentionShape, LayerPlan, Layout
from uniattn_cli.models.building import build_attention
from uniattn_cli.models.device import coarse_products

if TYPE_CHECKING:
    from torch import nn
    from transformers import PreTrainedModel

    from uniattn_cli.fitting.match_maps import Matcher
    from uniattn_cli.modeling.sharing_uniattn import SharedAttentionMixin, SharedStates

RIDGE = 1e-3
# Each sweep looks at every unit once; the descent ends where none changes, mostly after two or three.
SWEEPS = 10


@dataclass(frozen=True)
class Limits:
    """How much is compared for one choice; the problem is not solved here, only blocks of equal size compared.

    Attributes:
        features: width of all candidates together; the most similar ones are kept.
        tokens: calibration tokens.
    """

    features: int
    tokens: int

    @classmethod
    def of(cls, device: torch.device) -> Limits:
        """What takes about a second per choice, for a model of 0.1 billion parameters on a CPU."""
        return cls(2304, 4096) if device.type == "cpu" else cls(16384, 32768)


@dataclass(frozen=True)
class Block:
    """Features that one unit of a layer could borrow together.

    Attributes:
        unit: the borrowing unit: a key/value group, or a query head of a free map.
        source: the layer borrowed from.
        heads: heads borrowed, of queries for `softmax`, of keys and values for `key` and `kv`.
    """

    unit: int
    source: int
    heads: tuple[int, ...]


def candidate_blocks(
    matcher: Matcher,
    layer: int,
    lenders: Sequence[int],
    kind: str,
    features: int,
    *,
    one_source: bool = False,
    matches: KeyMatches | None = None,
) -> list[Block]:
    """The blocks that a layer may choose among, the most similar ones first for each unit.

    Similar are maps, or keys where queries will be matched to them.

    Args:
        lenders: layers that may lend.
        kind: `softmax`, `key` or `kv`.
        features: width of all blocks together, at most; each unit keeps two blocks at least.
        one_source: a choice takes all its blocks from one layer, so that layers are kept or left out as a whole.
        matches: of the layer's keys with those of the lenders, for `key` and `kv`.
    """
    shape = matcher.shape
    units = range(shape.query_heads if matcher.head_map == "free" and KINDS[kind].borrows_maps else shape.kv_heads)
    most = max(2, features // (shape.query_heads * shape.head_dim))
    found = {
        (unit, source): _scored_blocks(matcher, layer, unit, source, kind, matches)
        for unit in units
        for source in lenders
    }
    if one_source:
        best = {source: sum(found[unit, source][0][0] for unit in units) for source in lenders}
        lenders = sorted(lenders, key=lambda source: -best[source])[:most]
        each = max(1, most // len(lenders))
        return [block for unit in units for source in lenders for _, block in found[unit, source][:each]]
    chosen = []
    for unit in units:
        ranked = sorted((entry for source in lenders for entry in found[unit, source]), key=lambda entry: -entry[0])
        chosen += [block for _, block in ranked[:most]]
    return chosen


def _scored_blocks(
    matcher: Matcher, layer: int, unit: int, source: int, kind: str, matches: KeyMatches | None
) -> list[tuple[float, Block]]:
    """(similarity, block) for all blocks that one layer could lend to a unit, the best first."""
    shape, size = matcher.shape, matcher.shape.group_size
    if matches is not None:
        found = [
            (-matches.unexplained(source, head, unit), Block(unit, source, (head,))) for head in range(shape.kv_heads)
        ]
        return sorted(found, key=lambda entry: -entry[0])
    table = matcher.similarity[layer, layer - source - 1]
    if matcher.head_map == "free" and KINDS[kind].borrows_maps:
        found = [(float(table[unit, head]), Block(unit, source, (head,))) for head in range(shape.query_heads)]
    else:
        rows = table[unit * size : (unit + 1) * size].reshape(size, -1, size)
        found = []
        for group, score in enumerate(rows.max(2).sum(0)):
            heads = tuple(range(group * size, (group + 1) * size)) if KINDS[kind].borrows_maps else (group,)
            found.append((float(score), Block(unit, source, heads)))
    return sorted(found, key=lambda entry: -entry[0])


@dataclass(frozen=True)
class Borrowing:
    """The prediction of one layer's attention output from heads that it could borrow.

    Attributes:
        base_layer: the base's layer, for the target.
        layer: the converted model's layer.
        own: the layer's attention module as it is while the layer is `own`.
        index: number of the layer.
        kind: what the layer becomes.
        shape: of the model.
        matches: matches queries to borrowed keys; None leaves them as they are.
        inputs: what the layer's input is in terms of those of layers that it asks early; None asks with theirs.
    """

    base_layer: nn.Module
    layer: nn.Module
    own: SharedAttentionMixin
    index: int
    kind: str
    shape: AttentionShape
    matches: KeyMatches | None = None
    inputs: InputMatches | None = None

    @torch.no_grad()
    def choose(
        self, batches: Sequence[Batch], choices: Sequence[Sequence[Block]], tokens: int, *, one_source: bool = False
    ) -> list[list[Block]]:
        """One block for each unit, so that the joint linear prediction of the base's attention output is best.

        Args:
            batches: both streams where they enter the layer, and the states that earlier layers lend.
            choices: for each answer the blocks to choose among, of `candidate_blocks`.
            tokens: enough to compare blocks on.
            one_source: all blocks of an answer must come from one layer.

        Returns:
            For each choice the chosen blocks, in the order of their units.
        """
        blocks = list(dict.fromkeys(block for choice in choices for block in choice))
        with coarse_products():
            moments = self.moments(batches, blocks, tokens)
        problem = BlockChoice(moments, self.shape.hidden_size, blocks)
        return [problem.best(choice, one_source=one_source) for choice in choices]

    def moments(self, batches: Sequence[Batch], blocks: Sequence[Block], tokens: int) -> Moments:
        """Second moments of [all blocks, x] with the base's attention output."""
        moments: Moments | None = None
        for batch in visit(batches):
            target = batch.target
            if target is None:
                _, target = base_step(self.base_layer, batch.base, batch.kwargs[self.index])
            kwargs = attention_inputs(self.layer, batch.converted, batch.kwargs[self.index], batch.shared)
            inputs = kwargs["hidden_states"].flatten(0, 1).float()
            features = torch.cat([self.features(kwargs, batch.shared, blocks), inputs], dim=1)
            if moments is None:
                moments = Moments(features.shape[1], target.shape[-1], features.device)
            moments.add(features, target.flatten(0, 1))
            if moments.tokens >= tokens:
                break
        assert moments is not None, "there are batches"
        return moments

    def features(self, kwargs: dict[str, Any], shared: SharedStates, blocks: Sequence[Block]) -> torch.Tensor:
        """Attention heads as they come out with each block, float32 [rows * tokens, blocks * width of a block].

        Args:
            kwargs: what the layer's attention module is called with.
            shared: queries, keys and values of the lenders.
        """
        own, group = self.own, self.shape.group_size
        kind = KINDS[self.kind]
        states = own.project(kwargs["hidden_states"], kind.caches if kind.early else kind.projects)
        outputs: dict[tuple[int, int], torch.Tensor] = {}
        features = []
        for block in blocks:
            first = block.heads[0]
            if KINDS[self.kind].borrows_maps:
                # The unit of a free map is a query head, and one head is borrowed at a time.
                offset = block.unit // group if len(block.heads) == 1 else block.unit
                heads = list(block.heads)
            else:
                offset = (first - block.unit) % self.shape.kv_heads
                heads = list(range(first * group, (first + 1) * group))
            key = (block.source, offset)
            if key not in outputs:
                outputs[key] = self._attend(states, shared, *key, kwargs)
            features.append(outputs[key][:, heads].flatten(1))
        return torch.cat(features, dim=1).float()

    def _attend(
        self, states: dict[str, torch.Tensor], shared: SharedStates, source: int, offset: int, kwargs: dict[str, Any]
    ) -> torch.Tensor:
        """Attention [rows * tokens, query_heads, head_dim] of all heads of a source layer at once.

        For `softmax` each map of the source is applied to the values of group `offset`; for `key` and `kv` the own
        queries are rolled by that many groups, so that each group of the source meets one of them.
        """
        device = kwargs["hidden_states"].device
        if KINDS[self.kind].borrows_maps:
            queries = shared.queries[source].to(device)
            values = states["v"][:, offset : offset + 1].expand(-1, self.shape.kv_heads, -1, -1)
        else:
            late = states.get("q")
            queries = self._early_queries(shared, source, device) if late is None else late
            queries = self._queries(queries, source, offset, kwargs)
            borrowed = KINDS[self.kind].borrows_values
            values = shared.values[source].to(device) if borrowed else states["v"].roll(offset, 1)
        own = self.own
        backend = ALL_ATTENTION_FUNCTIONS.get_interface(own.config._attn_implementation, own.eager_attention)
        arguments = {"scaling": own.scaling, "dropout": 0.0, **own.attention_arguments()}
        if own.has_sinks:
            # Sinks belong to query heads, and are rolled like these.
            rolled = own.sinks.roll(offset * self.shape.group_size)
            arguments["s_aux"] = shared.sinks[source][0].to(device) if KINDS[self.kind].borrows_maps else rolled
        mask = kwargs.get("attention_mask")
        keys = shared.keys[source].to(device)
        return backend(own, queries, keys, values, mask, **arguments)[0].flatten(0, 1)

    def _early_queries(self, shared: SharedStates, source: int, device: torch.device) -> torch.Tensor:
        lent = shared.inputs[source].to(device)
        return self.own.project(lent if self.inputs is None else self.inputs.estimate(source, lent), "q")["q"]

    def _queries(self, queries: torch.Tensor, source: int, offset: int, kwargs: dict[str, Any]) -> torch.Tensor:
        """Own queries with positions, rolled so that each group meets the head of the source `offset` places on."""
        units = self.shape.kv_heads
        if self.matches is not None:
            pairs = [(source, (unit + offset) % units) for unit in range(units)]
            queries = matched(queries, self.matches.maps(pairs))
        states = {"q": queries}
        self.own.embed_positions(states, *positions_of(kwargs))
        return states["q"].roll(offset * self.shape.group_size, 1)


class SourceChooser:
    """Gives borrowing layers the heads from which their attention output can be predicted best.

    Args:
        matcher: limits and orders the candidates; layers with an `identity` map keep what they have.
        lenders: the layers that may lend to a layer of a layout.
        limits: how many candidates are compared, on how many tokens.
        match_keys: whether queries will be matched to borrowed keys (`conversion.align`).
    """

    def __init__(
        self,
        matcher: Matcher,
        lenders: Callable[[Layout, int], list[int]],
        limits: Limits,
        *,
        match_keys: bool = True,
    ):
        self.matcher, self.lenders, self.limits, self.match_keys = matcher, lenders, limits, match_keys

    @property
    def max_distance(self) -> int:
        return self.matcher.max_distance

    def plan(
        self, layout: Layout, index: int, base: PreTrainedModel, converted: PreTrainedModel, batches: Sequence[Batch]
    ) -> LayerPlan:
        """The layer's plan with new sources.

        Args:
            layout: of the converted model.
            index: the layer; both streams of `batches` stand before it.
        """
        plan = layout[index]
        if not plan.traits.borrows or self.matcher.head_map == "identity":
            return plan
        lenders = self.lenders(layout, index)
        if not lenders:
            return plan
        own = build_attention(base, Layout.own(self.matcher.shape.layers), index)
        layers = base.model.layers[index], converted.model.layers[index]
        matches = LayerMatches(layers[0], own, index, batches, lenders, self.limits.tokens)
        return self.plans(plan, layers[1], matches, [lenders])[0]

    def plans(
        self, plan: LayerPlan, layer: nn.Module, matches: LayerMatches, choices: Sequence[Sequence[int]]
    ) -> list[LayerPlan]:
        """A borrowing layer's plan with new sources, for each choice of lenders.

        Args:
            plan: of the layer.
            layer: the converted model's.
            matches: of the layer with all lenders; both streams of its batches stand before the layer.
            choices: layers that may lend, for each answer.
        """
        one_source, index, batches = not self.matcher.several, matches.index, matches.batches
        keys = inputs = None
        if self.match_keys and not plan.traits.borrows_maps:
            keys = matches.keys
            inputs = matches.inputs if plan.traits.early else None
        blocks = [
            candidate_blocks(
                self.matcher, index, lenders, plan.kind, self.limits.features, one_source=one_source, matches=keys
            )
            for lenders in choices
        ]
        problem = Borrowing(matches.base_layer, layer, matches.own, index, plan.kind, self.matcher.shape, keys, inputs)
        found: list[LayerPlan] = []
        for together in self._together(blocks):
            chosen = problem.choose(batches, together, self.limits.tokens, one_source=one_source)
            found += [replace(plan, leader=None, heads=self._heads(index, each)) for each in chosen]
        return found

    def _together(self, choices: Sequence[list[Block]]) -> list[list[list[Block]]]:
        """Choices whose blocks have their moments taken at once, as far as they are not too many."""
        shape = self.matcher.shape
        groups: list[list[list[Block]]] = []
        for choice in choices:
            if groups:
                blocks = {block for other in (*groups[-1], choice) for block in other}
                units = len({block.unit for block in blocks})
                if len(blocks) * shape.query_heads * shape.head_dim <= units * self.limits.features:
                    groups[-1].append(choice)
                    continue
            groups.append([choice])
        return groups

    def _heads(self, layer: int, blocks: Sequence[Block]) -> tuple[tuple[int, int], ...]:
        """A head map; within a block, query heads get the heads whose maps are most like their own, each once."""
        heads = []
        for block in blocks:
            if len(block.heads) == 1:
                heads += [(block.source, head) for head in block.heads]
                continue
            size = len(block.heads)
            first = block.heads[0]
            table = self.matcher.similarity[layer, layer - block.source - 1]
            table = table[block.unit * size : (block.unit + 1) * size, first : first + size].copy()
            order = [0] * size
            for _ in range(size):
                row, column = np.unravel_index(table.argmax(), table.shape)
                order[row] = first + int(column)
                table[row, :] = table[:, column] = -np.inf
            heads += [(block.source, head) for head in order]
        return tuple(heads)


class BlockChoice:
    """Coordinate descent over blocks of equal size; x is always among the features and eliminated beforehand.

    Args:
        moments: of features [all blocks, x] and the target.
        hidden: width of x.
        blocks: what the features are.
    """

    def __init__(self, moments: Moments, hidden: int, blocks: Sequence[Block]):
        self.blocks = blocks
        start = len(moments.ff) - hidden
        self.size = start // len(blocks)
        diagonal = moments.ff.diagonal()
        # What is zero everywhere gets a unit penalty, so that factors exist.
        ridge = [
            torch.where(part > 0, part * RIDGE, 1.0) for part in (diagonal[:start].mean(), diagonal[start:].mean())
        ]
        eye = torch.eye(hidden, dtype=torch.float64, device=diagonal.device)
        factor = torch.linalg.cholesky(moments.ff[start:, start:] + ridge[1] * eye)
        cross = torch.linalg.solve_triangular(factor, moments.ff[start:, :start], upper=False)
        known = torch.linalg.solve_triangular(factor, moments.fy[start:], upper=False)
        self.system = moments.ff[:start, :start] - cross.T @ cross
        self.system.diagonal().add_(ridge[0])
        self.target = moments.fy[:start] - cross.T @ known

    def _places(self, numbers: Sequence[int]) -> torch.Tensor:
        starts = torch.tensor(list(numbers), device=self.system.device) * self.size
        return (starts[:, None] + torch.arange(self.size, device=starts.device)).flatten()

    def gains(self, chosen: Sequence[int], candidates: Sequence[int]) -> torch.Tensor:
        """Explained energy that each candidate adds to x and the chosen blocks, [candidates]."""
        places = self._places(candidates)
        diagonal = places.unflatten(0, (-1, self.size))
        own = self.system[diagonal[:, :, None], diagonal[:, None, :]]
        rest = self.target[places]
        if chosen:
            kept = self._places(chosen)
            factor = torch.linalg.cholesky(self.system[kept][:, kept])
            cross = torch.linalg.solve_triangular(factor, self.system[kept][:, places], upper=False)
            rest = rest - cross.T @ torch.linalg.solve_triangular(factor, self.target[kept], upper=False)
            cross = cross.unflatten(1, (-1, self.size)).transpose(0, 1)
            own = own - cross.transpose(1, 2) @ cross
        # A block that the chosen ones contain already leaves nothing to factor, and adds nothing.
        factors, failed = torch.linalg.cholesky_ex(own)
        explained = torch.linalg.solve_triangular(factors, rest.unflatten(0, (-1, self.size)), upper=False)
        return explained.square().sum((1, 2)).masked_fill(failed > 0, 0.0)

    def explained(self, chosen: Sequence[int]) -> float:
        """Energy of the target that the chosen blocks explain beside x."""
        kept = self._places(chosen)
        factor = torch.linalg.cholesky(self.system[kept][:, kept])
        return torch.linalg.solve_triangular(factor, self.target[kept], upper=False).square().sum().item()

    def best(self, choice: Sequence[Block], *, one_source: bool) -> list[Block]:
        """One block for each unit, of some of the candidates; with `one_source` all of one layer."""
        places = {block: number for number, block in enumerate(self.blocks)}
        if not one_source:
            return self.descend([places[block] for block in choice])[1]
        units = {block.unit for block in choice}
        results = []
        for source in sorted({block.source for block in choice}):
            blocks = [block for block in choice if block.source == source]
            if {block.unit for block in blocks} == units:
                results.append(self.descend([places[block] for block in blocks]))
        return max(results, key=lambda result: result[0])[1]

    def descend(self, numbers: Sequence[int]) -> tuple[float, list[Block]]:
        """(explained energy, one block for each unit) among the candidates with these numbers."""
        by_unit: dict[int, list[int]] = {}
        for number in numbers:
            by_unit.setdefault(self.blocks[number].unit, []).append(number)
        chosen: dict[int, int] = {}
        for _ in range(SWEEPS):
            before = dict(chosen)
            for unit, candidates in by_unit.items():
                others = [number for other, number in chosen.items() if other != unit]
                chosen[unit] = candidates[int(self.gains(others, candidates).argmax())]
            if chosen == before:
                break
        picked = [chosen[unit] for unit in sorted(chosen)]
        return self.explained(picked), [self.blocks[number] for number in picked]
