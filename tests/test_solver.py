"""The solver finds what trying every layout finds, and says what is nearest to what is impossible."""

from __future__ import annotations

import itertools
import random
import re

import pytest
from tiny import FAMILIES

from uniattn_cli.layouts.budget import Budget
from uniattn_cli.layouts.solver import Limit, Option, Problem, impossible, layout_of, total
from uniattn_cli.modeling.configuration_uniattn import attention_shape
from uniattn_cli.modeling.layout_uniattn import AttentionShape, LayerPlan, Layout
from uniattn_cli.recipe.schema import LayoutSpec

LAYERS = 5
SAVED = {"own": 0, "key": 3, "kv": 6, "linear": 6, "none": 6}


def random_problem(seed: int) -> tuple[random.Random, Problem]:
    generator = random.Random(seed)
    options = []
    for layer in range(1, LAYERS):
        for kind in generator.sample(sorted(set(SAVED) - {"own"}), 2):
            for compensation in ("none", "full")[: generator.randint(1, 2)]:
                sources = generator.sample(range(layer), min(layer, generator.randint(1, 2)))
                heads = tuple((source, 0) for source in sources) if kind in ("key", "kv") else None
                plan = LayerPlan(kind, heads=heads, compensation=compensation)
                options.append(Option(layer, plan, generator.expovariate(50)))
    return generator, Problem(LAYERS, options, generator.choice([None, 1, 2]))


def saved(option):
    return SAVED[option.plan.kind]


def weights(option):
    """Like parameters: large numbers with a common divisor, negative ones among them."""
    return (
        0 if option.plan.kind == "own" else 1152 * (SAVED[option.plan.kind] - 5 * (option.plan.compensation == "full"))
    )


def lost(option):
    return option.loss


def random_limits(generator: random.Random, count: int) -> list[Limit]:
    limits = [
        Limit("kv", saved, generator.randint(0, 20), lambda amount: f"<{amount:.9g}>"),
        Limit("params", weights, 1152 * generator.randint(-5, 12) + 0.5, lambda amount: f"<{amount:.9g}>"),
        Limit("max_loss", lambda option: -option.loss, -generator.expovariate(20), lambda amount: f"<{amount:.9g}>"),
    ]
    return generator.sample(limits, count)


def all_solutions(problem, limits=(), others=(), different=1):
    """Every legal layout within the limits."""
    by_layer = [[option for option in problem.options if option.layer == layer] for layer in range(LAYERS)]
    for solution in itertools.product(*by_layer):
        sources = [source for option in solution for source in option.plan.source_layers]
        if any(solution[source].plan.kind != "own" for source in sources):
            continue
        if problem.max_group is not None and any(sources.count(source) > problem.max_group for source in sources):
            continue
        if any(total(solution, limit.amount) < limit.least for limit in limits):
            continue
        if all(sum(a.form != b.form for a, b in zip(solution, other, strict=True)) >= different for other in others):
            yield solution


@pytest.mark.parametrize("seed", range(40))
def test_the_solver_finds_the_best_of_all_layouts(seed):
    generator, problem = random_problem(seed)
    limits = random_limits(generator, generator.randint(0, 3))
    others: list = []
    different = generator.randint(1, 3)
    for _ in range(3):
        possible = [total(each, lost) for each in all_solutions(problem, limits, others, different)]
        found = problem.best(lost, limits, others, different)
        if not possible:
            assert found is None
            break
        assert found is not None and [option.layer for option in found] == list(range(LAYERS))
        assert tuple(found) in set(all_solutions(problem, limits, others, different))
        assert total(found, lost) == pytest.approx(min(possible), abs=1e-9)
        others.append(found)


@pytest.mark.parametrize("seed", range(40))
def test_what_is_impossible_is_told_with_the_nearest_possible(seed):
    generator, problem = random_problem(seed)
    limits = random_limits(generator, 3)
    if any(True for _ in all_solutions(problem, limits)):
        with pytest.raises(ValueError, match="a layout meets all limits"):
            impossible(problem, limits)
        return
    said = impossible(problem, limits)
    assert "\n" not in said
    named = {limit.words: limit for limit in limits}
    clauses = [
        re.fullmatch(r"(\w+) is not possible(?: with (\w+)(?: and (\w+))?)?, <(.+)> is", each)
        for each in said.split("; ")
    ]
    group = [named[clause[1]] for clause in clauses]
    assert not any(True for _ in all_solutions(problem, group)), "these contradict one another"
    for clause, limit in zip(clauses, group, strict=True):
        others = [named[word] for word in clause.groups()[1:3] if word]
        assert {other.words for other in others} == {other.words for other in group if other is not limit}
        best = max(total(each, limit.amount) for each in all_solutions(problem, others))
        assert float(clause[4]) == pytest.approx(best, rel=1e-6, abs=1e-8)


def test_a_layout_is_the_plans_of_a_solution():
    plan = LayerPlan("linear", compensation="full")
    found = Problem(3, [Option(1, plan, 0.1)]).best(lost, [Limit("kv", saved, 1, str)])
    assert layout_of(found).changed == [1] and layout_of(found)[1] is plan


@pytest.mark.parametrize(("unit", "limit"), [("kv", 0.7), ("kv", 0.5), ("params", 0.9), ("followers", 7)])
def test_what_a_budget_needs_is_what_meets_it(unit, limit):
    budget = Budget(unit, limit, "", AttentionShape(9, 3, 64, 576, ("full",) * 30), None, {(): 134_515_008})
    assert budget.whole - budget.needed <= limit * budget.whole + 1e-6 or unit == "followers"
    assert budget.nearest(budget.needed) == f"{limit:g}"


def test_a_share_that_is_no_binary_fraction_is_met_exactly():
    """0.7 * 180 is a little less than 126 in floating point."""
    budget = Budget.of(LayoutSpec(kv=0.7), AttentionShape(9, 3, 64, 576, ("full",) * 30), None)
    assert (budget.whole, budget.needed) == (180, 54)


@pytest.mark.parametrize(
    ("spec", "entries"),
    [
        (LayoutSpec(followers=2), [{}, {"leader": 0}, {"leader": 0}, {}, {}, {}]),
        (LayoutSpec(kv=0.75), [{}, {"leader": 0}, {"leader": 0}, {"leader": 0}, {}, {}]),
        (LayoutSpec(kv=0.75), [{}, {"leader": 0}, {"kind": "linear"}, {}, {}, {}]),
        (LayoutSpec(params=0.97), [{}, {"kind": "none"}, {}, {}, {}, {}]),
    ],
)
def test_budgets_are_met_exactly_when_they_are(spec, entries):
    config = FAMILIES[0][1]()
    met = Budget.of(spec, attention_shape(config), config).met
    assert met(Layout.from_list(entries))
    last = max(index for index, entry in enumerate(entries) if entry)
    assert not met(Layout.from_list([{} if index == last else entry for index, entry in enumerate(entries)]))
