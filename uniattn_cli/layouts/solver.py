"""The layout with the smallest cost under any number of limits, exactly, by integer programming.

Every layer takes one of several plans, each with a score and with what it saves in any unit; costs of a layout are
sums over its layers. Nothing here knows where scores come from.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from uniattn_cli.modeling.layout_uniattn import LayerPlan, Layout

if TYPE_CHECKING:
    import numpy as np


@dataclass(frozen=True)
class Option:
    """One plan that a layer may have.

    Attributes:
        layer: the layer.
        plan: its plan; the layers that it borrows from have to stay `own`.
        loss: what it adds to the loss, in nats per token.
    """

    layer: int
    plan: LayerPlan
    loss: float = 0.0

    @property
    def form(self) -> tuple:
        """What makes plans different, whatever heads they borrow."""
        return self.plan.kind, self.plan.compensation, self.plan.kv_heads


@dataclass(frozen=True)
class Limit:
    """The least that the options of a layout have to amount to, taken together.

    Attributes:
        words: the limit, such as `kv 0.8`.
        amount: of one option, such as the cached heads that it saves.
        least: of a layout.
        said: a limit that a layout with this amount meets, in the words of the user, such as `0.734`.
    """

    words: str
    amount: Callable[[Option], float]
    least: float
    said: Callable[[float], str]


class Problem:
    """All plans of all layers of one model.

    Args:
        layers: number of layers; each may stay as it is.
        options: further plans.
        max_group: largest number of layers that may borrow from one.
    """

    def __init__(self, layers: int, options: Sequence[Option], max_group: int | None = None):
        self.layers = layers
        # The first ones leave their layers as they are.
        self.options = [*(Option(layer, LayerPlan()) for layer in range(layers)), *options]
        self.max_group = max_group

    def best(
        self,
        cost: Callable[[Option], float],
        limits: Sequence[Limit] = (),
        others: Sequence[Sequence[Option]] = (),
        different: int = 1,
    ) -> list[Option] | None:
        """One option for each layer, with the smallest sum of costs within the limits; None if there is no such layout.

        Args:
            cost: of an option.
            limits: all have to be met.
            others: solutions from each of which this one has to differ in kind or compensation ...
            different: ... in so many layers.
        """
        import numpy as np
        from scipy.optimize import Bounds, LinearConstraint, milp
        from scipy.sparse import csr_array

        rows = [*self._rules(), *self._limits(limits), *self._differences(others, different)]
        columns = np.concatenate([np.asarray(list(row.terms), dtype=int) for row in rows])
        values = np.concatenate([np.asarray(list(row.terms.values()), dtype=float) for row in rows])
        starts = np.cumsum([0, *(len(row.terms) for row in rows)])
        matrix = csr_array((values, columns, starts), shape=(len(rows), len(self.options)))
        # The solver stops at an absolute gap, which is to be small beside any cost.
        costs = np.array([cost(option) for option in self.options])
        costs = costs * (1e4 / max(np.abs(costs).max(), 1e-300))
        found = milp(
            costs,
            integrality=np.ones(len(costs)),
            bounds=Bounds(0, 1),
            constraints=LinearConstraint(matrix, [row.low for row in rows], [row.high for row in rows]),
            options={"mip_rel_gap": 0.0},
        )
        return None if found.x is None else self._taken(found.x)

    def _taken(self, values: np.ndarray) -> list[Option]:
        taken = [option for option, value in zip(self.options, values, strict=True) if value > 0.5]
        return sorted(taken, key=lambda option: option.layer)

    def _rules(self) -> Iterator[_Row]:
        """One plan for each layer, from layers that stay, which do not lend to too many."""
        borrowers: dict[int, list[int]] = {}
        of_layer: dict[int, list[int]] = {}
        for number, option in enumerate(self.options):
            of_layer.setdefault(option.layer, []).append(number)
            for source in option.plan.source_layers:
                borrowers.setdefault(source, []).append(number)
                yield _Row({source: 1, number: -1}, low=0)
        for numbers in of_layer.values():
            yield _Row(dict.fromkeys(numbers, 1), low=1, high=1)
        if self.max_group is not None:
            for numbers in borrowers.values():
                yield _Row(dict.fromkeys(numbers, 1), high=self.max_group)

    def _limits(self, limits: Sequence[Limit]) -> Iterator[_Row]:
        for limit in limits:
            terms = {number: amount for number, option in enumerate(self.options) if (amount := limit.amount(option))}
            # In small numbers the solver's tolerance is none.
            whole = all(isinstance(amount, int) for amount in terms.values())
            unit = math.gcd(*map(int, terms.values())) if whole else max(map(abs, terms.values()))
            least = limit.least / (unit or 1)
            yield _Row(
                {number: amount / unit for number, amount in terms.items()}, low=math.ceil(least) if whole else least
            )

    def _differences(self, others: Sequence[Sequence[Option]], different: int) -> Iterator[_Row]:
        for other in others:
            forms = {option.layer: option.form for option in other}
            same = [number for number, option in enumerate(self.options) if option.form == forms[option.layer]]
            yield _Row(dict.fromkeys(same, 1), high=self.layers - different)


@dataclass(frozen=True)
class _Row:
    """One linear constraint, by number of option."""

    terms: dict[int, Any]
    low: float = -math.inf
    high: float = math.inf


def layout_of(solution: Sequence[Option]) -> Layout:
    """The layout that a solution is."""
    return Layout(tuple(option.plan for option in solution))


def total(solution: Sequence[Option], amount: Callable[[Option], float]) -> float:
    """What the options of a solution amount to."""
    return sum(amount(option) for option in solution)


def impossible(problem: Problem, limits: Sequence[Limit]) -> str:
    """Why no layout meets the limits: the fewest that contradict one another, and the nearest possible to each of them.

    Args:
        limits: that no layout meets together.
    """
    for size in range(1, len(limits) + 1):
        for group in itertools.combinations(limits, size):
            if problem.best(lambda option: 0.0, group) is None:
                return "; ".join(
                    _nearest(problem, limit, [each for each in group if each is not limit]) for limit in group
                )
    raise ValueError("a layout meets all limits")


def _nearest(problem: Problem, limit: Limit, others: Sequence[Limit]) -> str:
    best = problem.best(lambda option: -limit.amount(option), others)
    assert best is not None, "fewer limits can be met"
    beside = f" with {' and '.join(other.words for other in others)}" if others else ""
    return f"{limit.words} is not possible{beside}, {limit.said(total(best, limit.amount))} is"
