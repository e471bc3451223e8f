"""Layouts put together from scores: the best for what a user asks, others that differ from it, and each kind alone."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

from uniattn_cli.errors import LayoutError
from uniattn_cli.layouts.budget import Budget
from uniattn_cli.layouts.considered import Point, Validated
from uniattn_cli.layouts.scores import Score
from uniattn_cli.layouts.solver import Limit, Option, Problem, impossible, layout_of, total
from uniattn_cli.layouts.speed import SpeedBudget
from uniattn_cli.modeling.layout_uniattn import AttentionShape
from uniattn_cli.recipe.schema import LayoutSpec

# Solutions of all kinds together that are converted, and in how many layers each differs from the others: two would be
# one that has another layer changed instead.
POOL = 4
DIFFERENT = 3
# Sizes of the cache for which the frontier has a solution.
FRONTIER = 8

Solutions = dict[str, list[Option]]


def loss(option: Option) -> float:
    """What an option adds to the loss, in nats per token."""
    return option.loss


@dataclass(frozen=True)
class Wish:
    """What a user asks of a layout.

    Attributes:
        budgets: what it has to save.
        save: what to save as much of as the loss allows.
        max_loss: the most that it may lose, in nats per token; None if it is to lose as little as the budgets allow.
    """

    budgets: list[Budget]
    save: Budget
    max_loss: float | None = None

    @classmethod
    def of(cls, spec: LayoutSpec, shape: AttentionShape, config: object) -> Wish:
        """What a recipe asks."""
        # The time of a decoding step takes the place of this one when it has been measured.
        unit = "kv" if spec.save == "time" else spec.save
        save = Budget(unit, 1.0, f"save {unit}", shape, config)
        return cls(Budget.all_of(spec, shape, config), save, spec.max_loss)

    def with_speed(self, budget: SpeedBudget, spec: LayoutSpec) -> Wish:
        """With the budget of decoding time, which may be what to save, too; it replaces an earlier one."""
        others = [each for each in self.budgets if each.unit != budget.unit]
        return replace(self, budgets=[*others, budget], save=budget if spec.save == "time" else self.save)

    @property
    def words(self) -> str:
        """All of it, for notes."""
        limited = [] if self.max_loss is None else [f"max_loss {self.max_loss:g}, saving {self.save.unit}"]
        return ", ".join([*(budget.words for budget in self.budgets), *limited])

    def limits(self, share: float = 1.0) -> list[Limit]:
        """The limits for the solver.

        Args:
            share: of `max_loss` that may be lost.
        """
        found = [limit_of(budget) for budget in self.budgets]
        if self.max_loss is not None:
            found.append(
                Limit(
                    f"max_loss {self.max_loss:g}",
                    lambda option: -option.loss,
                    -self.max_loss * share,
                    lambda amount: f"{math.ceil(-amount * 1e4) / 1e4:g}",
                )
            )
        return found

    def best(
        self, problem: Problem, share: float = 1.0, others: Sequence[Sequence[Option]] = ()
    ) -> list[Option] | None:
        """The best solution that differs from others, or None. `share` is that of `limits`."""
        limits = self.limits(share)
        if self.max_loss is not None:
            saving = limit_of(self.save)
            most = problem.best(lambda option: -saving.amount(option), limits, others, DIFFERENT)
            if most is None:
                return None
            limits.append(Limit("", saving.amount, total(most, saving.amount), saving.said))
        return problem.best(loss, limits, others, DIFFERENT)


def limit_of(budget: Budget) -> Limit:
    """A budget for the solver."""
    return Limit(budget.words, lambda option: budget.saved_by(option.layer, option.plan), budget.needed, budget.nearest)


def problem_of(scores: Sequence[Score], spec: LayoutSpec, layers: int, kinds: Sequence[str]) -> Problem:
    """What a solver chooses from."""
    return Problem(layers, options_of(scores, kinds), spec.max_group)


def options_of(scores: Sequence[Score], kinds: Sequence[str]) -> list[Option]:
    """The plans of some kinds, without those that overflow."""
    return [
        Option(score.question.layer, score.plan, score.divergence)
        for score in scores
        if score.question.kind in kinds and math.isfinite(score.divergence)
    ]


def kind_sets(spec: LayoutSpec) -> dict[str, tuple[str, ...]]:
    """All kinds together and, unless nothing is to be compared, each of them alone, by name."""
    alone = spec.kinds if spec.compared != 1 else ()
    return {f"scores, {' + '.join(kinds)}": kinds for kinds in (spec.kinds, *((kind,) for kind in alone))}


def pool(scores: Sequence[Score], spec: LayoutSpec, layers: int, wish: Wish) -> Solutions:
    """The solutions to convert and compare, by name, the best prediction of all kinds together first.

    Raises:
        LayoutError: no layout does what is asked; says what is the nearest possible.
    """
    (name, kinds), *alone = kind_sets(spec).items()
    problem = problem_of(scores, spec, layers, kinds)
    first = wish.best(problem)
    if first is None:
        raise LayoutError(f"no layout does what is asked: {impossible(problem, wish.limits())}")
    mixes: list[tuple[str, list[Option] | None]] = [(name, first)]
    if wish.max_loss is None and layout_of(first).changed:
        while len(mixes) < POOL and mixes[-1][1] is not None:
            others = [solution for _, solution in mixes if solution is not None]
            mixes.append((f"{name}, {len(mixes) + 1}", wish.best(problem, others=others)))
    # In a short list each kind alone stands before further mixes.
    single = [(each, wish.best(problem_of(scores, spec, layers, only))) for each, only in alone]
    found = [mixes[0], *single, *mixes[1:]]
    chosen: dict[tuple, tuple[str, list[Option]]] = {}
    for label, solution in found:
        if solution is not None:
            # Heads are matched again, so that solutions which differ in nothing else are one.
            chosen.setdefault(tuple(option.form for option in solution), (label, solution))
    return dict(list(chosen.values())[: spec.compared])


def frontier(scores: Sequence[Score], spec: LayoutSpec, shape: AttentionShape) -> list[Point]:
    """The solutions with the smallest predicted loss for sizes of the cache, whatever else is asked."""
    return [
        Point(name, layout_of(solution), total(solution, loss))
        for (name, _), solution in frontier_solutions(scores, spec, shape).items()
    ]


def frontier_solutions(
    scores: Sequence[Score], spec: LayoutSpec, shape: AttentionShape
) -> dict[tuple[str, int], list[Option]]:
    """The solutions of `frontier`, by series and by what they save at least."""
    found = {}
    saving = limit_of(Budget("kv", 1.0, "", shape, None))
    for name, kinds in kind_sets(spec).items():
        problem = problem_of(scores, spec, shape.layers, kinds)
        most = problem.best(lambda option: -saving.amount(option))
        assert most is not None, "nothing is asked"
        end = total(most, saving.amount)
        for saved in sorted({round(end * step / FRONTIER) for step in range(FRONTIER + 1)}):
            solution = problem.best(loss, [Limit("", saving.amount, saved, saving.said)])
            assert solution is not None, "less is asked than is possible"
            found[name, saved] = solution
    return found


def pick(shortlist: Sequence[Validated], wish: Wish) -> Validated:
    """The layout of the shortlist that loses least, or saves most of those that lose no more than they may."""
    within = [entry for entry in shortlist if wish.max_loss is not None and entry.divergence <= wish.max_loss]
    # Of those that save alike, the first loses least.
    return max(within, key=lambda entry: wish.save.saved(entry.layout)) if within else shortlist[0]
