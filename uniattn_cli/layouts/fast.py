"""The fast search: the layout of largest total similarity under a budget, by exact dynamic programming."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from uniattn_cli.fitting.match_maps import Matcher
from uniattn_cli.layouts.plans import plan_of
from uniattn_cli.modeling.layout_uniattn import LayerPlan, Layout
from uniattn_cli.models.costs import count_parameters, kv_bytes_per_token
from uniattn_cli.tables import Table


@dataclass(frozen=True)
class Choice:
    """One layout of the frontier.

    Attributes:
        changed: how many layers borrow.
        layout: the layout.
        scores: similarity of each borrowing layer's borrowed maps to its own, by layer.
    """

    changed: int
    layout: Layout
    scores: dict[int, float]

    @property
    def mean_score(self) -> float:
        return sum(self.scores.values()) / max(len(self.scores), 1)


def frontier(
    matcher: Matcher,
    *,
    protect: Iterable[int] = (),
    max_group: int | None = None,
    compensation: str | int = "auto",
    kind: str = "softmax",
) -> list[Choice]:
    """The best layout for every possible number of borrowing layers, from 0 up.

    The layers are walked once. A state remembers which of the last `max_distance` layers can still lend, because
    nothing else decides what a later layer may borrow; for each state and number of borrowers only the best way to
    reach it is kept. The result is exact: the sum over borrowers of 1 - score is the smallest possible.

    Args:
        matcher: scores of borrowing.
        protect: layers that must stay as they are.
        max_group: largest number of borrowers of one layer; only with one source layer for each of them.
        compensation: W_c that is asked for, see `Kind.compensation_for`.
        kind: one that borrows. Where maps are alike, so are keys, up to a linear map.
    """
    matcher = matcher.for_kind(kind)
    assert max_group is None or not matcher.several, "recipes with both are refused"
    protected = set(protect)
    # States: per layer of the window, nearest first, how many more layers it may lend to (0: none, or not `own`).
    unlimited = max_group or 1
    states: dict[tuple[int, ...], dict[int, tuple[float, tuple | None]]] = {(): {0: (0.0, None)}}
    for layer in range(matcher.shape.layers):
        following: dict[tuple[int, ...], dict[int, tuple[float, tuple | None]]] = {}
        for window, reached in states.items():
            moves = [((unlimited, *window)[: matcher.max_distance], 0.0, None)]
            if layer not in protected:
                moves += _borrowing_moves(matcher, layer, window, limited=max_group is not None)
            for state, cost, match in moves:
                best = following.setdefault(state, {})
                for count, (total, path) in reached.items():
                    number = count + (match is not None)
                    if number not in best or total + cost < best[number][0]:
                        best[number] = (total + cost, (layer, match, path) if match else path)
        states = following
    finals: dict[int, tuple[float, tuple | None]] = {}
    for reached in states.values():
        for count, entry in reached.items():
            if count not in finals or entry[0] < finals[count][0]:
                finals[count] = entry
    return [_choice(matcher, count, path, compensation, kind) for count, (_, path) in sorted(finals.items())]


def _borrowing_moves(matcher: Matcher, layer: int, window: tuple[int, ...], limited: bool):
    """Ways in which a layer can borrow: (next state, cost, match)."""
    admissible = set(matcher.candidates(layer))
    lenders = [layer - 1 - index for index, left in enumerate(window) if left and layer - 1 - index in admissible]
    if not lenders:
        return []
    if not limited:
        match = matcher.match(layer, lenders)
        assert match is not None, "there are lenders"
        return [((0, *window)[: matcher.max_distance], 1 - match.score, match)]
    moves = []
    for lender in lenders:
        match = matcher.match(layer, [lender])
        assert match is not None, "there is a lender"
        index = layer - 1 - lender
        after = (*window[:index], window[index] - 1, *window[index + 1 :])
        moves.append(((0, *after)[: matcher.max_distance], 1 - match.score, match))
    return moves


def _choice(matcher: Matcher, count: int, path: tuple | None, compensation: str | int, kind: str) -> Choice:
    plans = [LayerPlan()] * matcher.shape.layers
    scores = {}
    while path is not None:
        layer, match, path = path
        plans[layer] = plan_of(match, compensation, kind, matcher.shape.group_size)
        scores[layer] = match.score
    return Choice(count, Layout(tuple(plans)), dict(sorted(scores.items())))


def parameter_counts(config: Any, choices: Sequence[Choice]) -> dict[int, int]:
    """Parameters by number of changed layers; those of one kind save alike, so two counts are enough."""
    own = count_parameters(config, choices[0].layout)
    if len(choices) == 1:
        return {0: own}
    saved = own - count_parameters(config, choices[1].layout)
    return {choice.changed: own - choice.changed * saved for choice in choices}


def candidates_table(
    choices: list[Choice], shape: Any, element_size: int, counts: dict[int, int], chosen: Choice | None = None
) -> Table:
    """The candidate layouts at a handful of budgets."""
    steps = max(1, math.ceil((len(choices) - 1) / 8))
    shown = [choice for choice in choices if choice.changed % steps == 0 or choice is chosen]
    own_kv = kv_bytes_per_token(choices[0].layout, shape, element_size)
    rows = []
    for choice in shown:
        kv = kv_bytes_per_token(choice.layout, shape, element_size)
        worst = min(choice.scores.items(), key=lambda item: item[1], default=None)
        rows.append(
            [
                f"{choice.changed}{' *' if choice is chosen else ''}",
                f"{choice.mean_score:.3f}" if choice.scores else "-",
                f"{worst[1]:.3f} (layer {worst[0]})" if worst else "-",
                f"{kv:,} ({kv / own_kv:.0%})",
                f"{counts[choice.changed] / counts[0]:.1%}",
            ]
        )
    columns = ["changed", "similarity", "least similar", "KV bytes/token", "parameters"]
    return Table("candidate layouts" + (" (* chosen)" if chosen else ""), columns, rows)
