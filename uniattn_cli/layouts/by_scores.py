"""The choice of a layout from scores: solutions are converted, scores corrected by that, and the best one is taken."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

from uniattn_cli.errors import LayoutError
from uniattn_cli.layouts.considered import Considered, Validated
from uniattn_cli.layouts.on_demand import ScoresOnDemand
from uniattn_cli.layouts.scores import Score, company_of
from uniattn_cli.layouts.solutions import Solutions, Wish, frontier, kind_sets, loss, options_of, pick, pool, problem_of
from uniattn_cli.layouts.solver import layout_of, total
from uniattn_cli.layouts.speed import TOLERANCE, confirmed, measured_budget
from uniattn_cli.layouts.workbench import Workbench
from uniattn_cli.modeling.layout_uniattn import Layout
from uniattn_cli.run.directory import RunDir

# Where the loss is limited: how often the prediction is corrected, and the parts of it that are aimed at and enough.
ROUNDS = 4
AIM, ENOUGH = 0.95, 0.85


@dataclass(frozen=True)
class Chosen:
    """The best layout for what is asked.

    Attributes:
        considered: what it was chosen from.
        predicted: its loss as scores predict it, in nats per token.
        speed: how many times as fast as the base it decodes, as the engine measured it; None if that is not asked for.
    """

    considered: Considered
    predicted: float
    speed: float | None = None

    @property
    def layout(self) -> Layout:
        return self.considered.chosen


def by_scores(run: RunDir, bench: Workbench, wish: Wish, rank: str | int, load: bool) -> Chosen:
    """The best layout for what is asked.

    Args:
        rank: W_c that is asked for, see `scores.questions`.
        load: whether weights may be loaded; without, the best prediction is taken as it is.

    Raises:
        LayoutError: nothing does what is asked, or a dry run would have to score or to time something.
    """
    spec = bench.recipe.layout
    scores = ScoresOnDemand(run, bench, rank, load=load)
    if spec.speed is None:
        return _chosen(bench, scores, wish, load)
    if not load:
        raise LayoutError("a dry run cannot time decoding steps; run `uniattn group` first, or leave out --speed")
    budget = measured_budget(bench, options_of(scores.known, spec.kinds))
    found = _chosen(bench, scores, wish.with_speed(budget, spec), load)
    ratio = confirmed(bench, found.layout)
    if ratio < budget.limit * (1 - TOLERANCE) and found.layout.changed:
        # Layers save together less than each alone.
        found = _chosen(bench, scores, wish.with_speed(budget.scaled(found.layout, ratio), spec), load)
        ratio = confirmed(bench, found.layout)
    return replace(found, speed=ratio)


def _chosen(bench: Workbench, scores: ScoresOnDemand, wish: Wish, load: bool) -> Chosen:
    spec, shape = bench.recipe.layout, bench.measured.shape
    solutions = scores.settled(lambda scores: pool(scores, spec, shape.layers, wish))
    shortlist: list[Validated] = []
    if load and spec.compared != 1:
        improve = _corrected if wish.max_loss is None else _nearer
        solutions = improve(bench, scores, wish, solutions)
        shortlist = _validated(bench, solutions)
        if spec.trial is not None:
            shortlist = bench.tried(shortlist, spec.trial)
        best = pick(shortlist, wish)
        name, layout = best.name, best.layout
    else:
        name, solution = next(iter(solutions.items()))
        layout = bench.match_heads(layout_of(solution)) if load else layout_of(solution)
    checked = bench.texts.check.numel() if shortlist else 0
    measure = "sum of the layers' scores, nats per token"
    considered = Considered(measure, frontier(scores.known, spec, shape), shortlist, checked, layout, wish.max_loss)
    return Chosen(considered, total(solutions[name], loss))


def _validated(bench: Workbench, solutions: Solutions) -> list[Validated]:
    found = bench.validate({name: layout_of(solution) for name, solution in solutions.items()})
    return [replace(entry, predicted=total(solutions[entry.name], loss)) for entry in found]


def _corrected(bench: Workbench, scores: ScoresOnDemand, wish: Wish, solutions: Solutions) -> Solutions:
    """One more solution, from scores that were corrected by what layers cost in the company of the best so far."""
    spec, best = bench.recipe.layout, _validated(bench, solutions)[0]
    if not best.layout.changed or len(solutions) == spec.compared:
        return solutions
    company = company_of(bench, solutions[best.name])
    name, kinds = next(iter(kind_sets(spec).items()))
    found = _best(bench, scores, wish, {f"{name}, corrected": kinds}, company.corrected)
    forms = [[option.form for option in solution] for solution in solutions.values()]
    return solutions | {
        name: solution for name, solution in found.items() if [option.form for option in solution] not in forms
    }


def _nearer(bench: Workbench, scores: ScoresOnDemand, wish: Wish, solutions: Solutions) -> Solutions:
    """More solutions, whose measured loss comes nearer to what may be lost: sums of scores predict it only roughly."""
    assert wish.max_loss is not None, "the loss is limited"
    spec = bench.recipe.layout
    (name, kinds), *alone = kind_sets(spec).items()
    found, latest, share = {name: solutions[name]}, solutions[name], 1.0
    for _ in range(min(ROUNDS, (spec.compared or 1 + ROUNDS) - 1)):
        (entry,) = _validated(bench, {name: latest})
        if not entry.layout.changed or ENOUGH * wish.max_loss <= entry.divergence <= wish.max_loss:
            break
        share = AIM * total(latest, loss) / entry.divergence
        better = _best(bench, scores, wish, {f"{name}, {share:.2f} of max_loss": kinds}, share=share)
        if all(solution in found.values() for solution in better.values()):
            break
        found |= better
        latest = next(iter(better.values()))
    found |= {name: solutions[name] for name, _ in alone if name in solutions}
    found |= _best(bench, scores, wish, {name: kinds for name, kinds in alone if name in solutions}, share=share)
    return dict(list(found.items())[: spec.compared])


def _best(
    bench: Workbench,
    scores: ScoresOnDemand,
    wish: Wish,
    sets: Mapping[str, Sequence[str]],
    corrected: Callable[[Sequence[Score]], Sequence[Score]] = lambda scores: scores,
    share: float = 1.0,
) -> Solutions:
    """The best solution of each set of kinds, where there is one.

    Args:
        sets: of kinds, by name.
        corrected: what to take scores for.
        share: of `max_loss` that may be lost.
    """
    spec, layers = bench.recipe.layout, bench.measured.shape.layers

    def solve(scores: Sequence[Score]) -> Solutions:
        problems = {name: problem_of(corrected(scores), spec, layers, kinds) for name, kinds in sets.items()}
        found = {name: wish.best(problem, share) for name, problem in problems.items()}
        return {name: solution for name, solution in found.items() if solution is not None}

    return scores.settled(solve)
