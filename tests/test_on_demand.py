"""Plans with farther lenders are scored when a layout takes them, so that any layout that is legal can be found."""

from __future__ import annotations

import itertools
import random
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest

from uniattn_cli.fitting.match_maps import Matcher
from uniattn_cli.layouts import on_demand
from uniattn_cli.layouts.budget import Budget
from uniattn_cli.layouts.fast import frontier
from uniattn_cli.layouts.on_demand import ScoresOnDemand
from uniattn_cli.layouts.plans import plan_alone, proposal
from uniattn_cli.layouts.scores import Score, questions
from uniattn_cli.layouts.solutions import Wish, pool
from uniattn_cli.layouts.solver import layout_of
from uniattn_cli.modeling.layout_uniattn import CHANGED_KINDS, KINDS, AttentionShape, LayerPlan, Layout
from uniattn_cli.recipe.schema import LayoutSpec, Recipe


class Oracle:
    """Stands for `score_plans`, and has made up what each plan costs."""

    def __init__(self, bench, loss):
        self.bench, self.loss = bench, loss
        self.allowed = questions(bench, "auto", None)
        self.made = set(questions(bench, "auto"))

    def __call__(self, run, bench, compensation, *, more=(), **others):
        self.made |= set(more)
        return [self.score_of(question) for question in self.allowed if question in self.made]

    def score_of(self, question):
        matcher = self.bench.matcher.for_kind(question.kind)
        plan = proposal(matcher, question.layer, question.kind, question.compensation, question.lenders)
        return Score(question, plan, self.loss(question), 0.0)


def bench_of(shape, spec, reach, seed=0):
    similarity = np.random.default_rng(seed).random((shape.layers, reach, shape.query_heads, shape.query_heads))
    matcher = Matcher(similarity, shape, "grouped", spec.sources)
    return SimpleNamespace(matcher=matcher, recipe=SimpleNamespace(layout=spec, conversion=Recipe().conversion))


def layouts_of_kind(shape, kind, spec, reach):
    """Every legal layout whose changed layers are of one kind and have one lender, which is not too far."""

    def plans(layer):
        yield LayerPlan()
        if layer in spec.protect:
            return
        if not KINDS[kind].borrows:
            yield plan_alone(kind, shape, "auto")
            return
        for lender in range(max(0, layer - reach), layer):
            yield LayerPlan(kind, lender, compensation=KINDS[kind].compensation_for("auto"))

    for entries in itertools.product(*map(plans, range(shape.layers))):
        leaders = [plan.leader for plan in entries if plan.leader is not None]
        if spec.max_group is not None and any(leaders.count(leader) > spec.max_group for leader in leaders):
            continue
        layout = Layout(entries)
        if not layout.problems(shape):
            yield layout


FULL, MIXED = ("full",) * 7, ("sliding", "full") * 3 + ("sliding",)


@pytest.mark.parametrize("kind", CHANGED_KINDS)
@pytest.mark.parametrize(
    ("types", "reach", "max_group", "protect"),
    [
        (FULL, 6, None, ()),
        (FULL, 6, None, (4,)),
        (FULL, 6, 3, ()),
        (FULL, 5, None, (1,)),
        (FULL, 2, None, ()),
        (MIXED, 6, None, (3,)),
    ],
)
def test_the_solver_reaches_whatever_a_kind_can_reach(monkeypatch, kind, types, reach, max_group, protect):
    """Nothing in the layout is guessed then."""
    shape, generator = AttentionShape(6, 3, 8, 48, types), random.Random(reach)
    sources = "several" if max_group is None else "one"
    spec = LayoutSpec(
        search="scores", kinds=(kind,), protect=protect, max_group=max_group, sources=sources, shortlist=1
    )
    bench = bench_of(shape, spec, reach)
    monkeypatch.setattr(on_demand, "score_plans", Oracle(bench, lambda question: generator.expovariate(50)))
    budget = Budget("kv", 1.0, "", shape, None)
    most = max(map(budget.saved, layouts_of_kind(shape, kind, spec, reach)))
    scores = ScoresOnDemand(None, bench, "auto")
    wish = Wish([replace(budget, limit=1 - most / budget.whole)], budget)
    (solution,) = scores.settled(lambda scores: pool(scores, spec, 7, wish)).values()
    layout = layout_of(solution)
    assert layout.problems(shape) == [] and budget.saved(layout) == most
    known = {(score.question.layer, score.plan) for score in scores.known}
    assert {(index, layout[index]) for index in layout.changed} <= known
    # No layout of this kind that the fast search finds saves more.
    if KINDS[kind].borrows:
        found = frontier(bench.matcher, protect=spec.protect, max_group=spec.max_group, kind=kind)
        assert max(budget.saved(choice.layout) for choice in found) <= most


def test_only_what_a_layout_takes_is_scored(monkeypatch):
    """Of twelve layers with all others as lenders, at a budget that near lenders meet, and one that they do not."""
    shape = AttentionShape(6, 3, 8, 48, ("full",) * 12)
    spec = LayoutSpec(search="scores", kinds=("key",), shortlist=1)
    bench = bench_of(shape, spec, 11)
    # The farther, the worse, as it is in models.
    oracle = Oracle(bench, lambda question: 0.01 * (question.layer - question.lenders[0]))
    monkeypatch.setattr(on_demand, "score_plans", oracle)
    scores = ScoresOnDemand(None, bench, "auto")
    near = set(oracle.made)
    for kv, more in ((0.9, 0), (13 / 24, 16)):
        wish = Wish.of(replace(spec, kv=kv), shape, None)
        (solution,) = scores.settled(lambda scores, wish=wish: pool(scores, spec, 12, wish)).values()
        assert wish.budgets[0].met(layout_of(solution)) and len(oracle.made - near) == more
    assert {option.plan.source_layers for option in solution[1:]} == {(0,)}
    # Nothing may be scored: what is not known is taken to cost as much as what is.
    oracle.made = set(near)
    dry = ScoresOnDemand(None, bench, "auto", load=False)
    (solution,) = dry.settled(lambda scores: pool(scores, spec, 12, wish)).values()
    assert wish.budgets[0].met(layout_of(solution)) and oracle.made == near
