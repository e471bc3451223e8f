"""Scores are what a conversion of one layer alone loses, are made once, and lead to layouts for any budget."""

from __future__ import annotations

import json
import math
import shutil
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from tiny_run import settings

import uniattn_cli
from uniattn_cli.analysis.measured import Measured
from uniattn_cli.errors import LayoutError, RecipeError, StageError
from uniattn_cli.fitting.fit import fit_layers, for_trials
from uniattn_cli.layouts import by_scores, speed
from uniattn_cli.layouts.alone import Alone
from uniattn_cli.layouts.budget import Budget
from uniattn_cli.layouts.considered import Considered, Validated
from uniattn_cli.layouts.scores import NEAREST, Company, Question, Score, company_of, questions, score_plans
from uniattn_cli.layouts.solutions import DIFFERENT, POOL, Wish, frontier, loss, pick, pool, problem_of
from uniattn_cli.layouts.solver import Option, layout_of, total
from uniattn_cli.layouts.trials import Trials
from uniattn_cli.layouts.workbench import Workbench
from uniattn_cli.modeling.layout_uniattn import AttentionShape, LayerPlan, Layout
from uniattn_cli.models.building import build_converted
from uniattn_cli.models.hub import locate
from uniattn_cli.models.losses import window_divergences
from uniattn_cli.models.placement import Placement
from uniattn_cli.options import RunOptions
from uniattn_cli.recipe.schema import LayoutSpec, Recipe
from uniattn_cli.run.directory import RunDir

CPU = RunOptions(device="cpu")
FEW = settings(conversion__tokens=512, conversion__align=8, layout__score_tokens=256)
# Layers 4 and 5 may change.
TWO = ["layout.protect=[1, 2, 3]"]


@pytest.fixture
def run(tiny_runs, tmp_path, monkeypatch):
    folder = Path(shutil.copytree(tiny_runs / "analysed", tmp_path / "run"))
    monkeypatch.chdir(folder)
    return folder


@pytest.fixture
def tried(monkeypatch):
    """(layer, kind, compensation) of each plan that is really converted."""
    found = []
    convert = Alone.convert

    def recorded(self, plans):
        found.extend((self.index, plan.kind, plan.compensation) for plan in plans)
        return convert(self, plans)

    monkeypatch.setattr(Alone, "convert", recorded)
    return found


def score(*more, **others):
    return uniattn_cli.score(overrides=[*FEW, *more], options=replace(CPU, **others)).scores


def bench_of(*more):
    recipe = Recipe.load("recipe.yaml", [*FEW, "layout.search=scores", *more])
    return Workbench(recipe, locate(recipe.model.name), Measured.load(Path("analysis")), CPU)


# --- what is scored ---------------------------------------------------------------------------------------------------


def test_every_plan_that_is_allowed_is_asked_for(run):
    bench = bench_of("layout.kinds=[softmax, key, linear, none, pooled]", "layout.protect=[2]")
    found = questions(bench, "auto")
    assert {question.layer for question in found} == {1, 3, 4, 5} and len(set(found)) == len(found)
    of_last = [question for question in found if question.layer == 5]
    alone = [(4,), (3,), (2,)]
    assert len(alone) == NEAREST
    for kind in ("softmax", "key"):
        asked = {(q.compensation, q.lenders) for q in of_last if q.kind == kind}
        assert asked == {(w_c, lenders) for w_c in ("none", "full") for lenders in [(4, 3, 2, 1, 0), *alone]}
    assert [q.compensation for q in of_last if q.kind == "linear"] == ["full"]
    assert [q.compensation for q in of_last if q.kind == "none"] == ["none"]
    assert [q.compensation for q in of_last if q.kind == "pooled"] == ["none", "full"]
    # One lender is all lenders.
    assert [q.lenders for q in found if (q.layer, q.kind, q.compensation) == (1, "key", "none")] == [(0,)]


@pytest.mark.parametrize(
    ("more", "rank", "expected"),
    [
        ([], 4, {"none", 4}),
        (["conversion.solve=output"], "none", {"none"}),
        (["conversion.solve=reference"], "full", {"full"}),
    ],
)
def test_w_c_is_what_the_recipe_solves(run, more, rank, expected):
    assert {question.compensation for question in questions(bench_of(*more), rank)} == expected


@pytest.mark.parametrize("more", [[], ["layout.head_map=identity"], ["layout.match=maps", "layout.sources=one"]])
def test_scores_are_those_of_a_conversion_of_the_layer_alone(run, more):
    kinds = ["layout.kinds=[key, linear]", "layout.protect=[1, 2, 3, 4]", *more]
    found = score(*kinds)
    bench = bench_of(*kinds)
    assert [each.question for each in found] == questions(bench, "auto")
    spec = for_trials(bench.recipe.conversion)
    picked = {(each.question.kind, each.question.compensation, len(each.question.lenders)): each for each in found}
    assert len(picked) == 5
    for each in picked.values():
        assert set(each.plan.source_layers) <= set(each.question.lenders)
        layout = Layout.own(6).with_plan(each.question.layer, each.plan)
        model = build_converted(bench.base, layout)
        fit_layers(bench.base, model, bench.texts.fit, spec, batch_size=bench.recipe.evaluation.batch_size)
        rows = window_divergences(bench.base, model, bench.texts.score)
        assert each.divergence == pytest.approx(rows.mean().item(), rel=1e-3)
        assert each.stderr == pytest.approx((rows.std() / len(rows) ** 0.5).item(), rel=1e-2)


# --- the stage --------------------------------------------------------------------------------------------------------


def test_scores_are_kept_extended_and_never_made_twice(run, tried):
    first = score("layout.kinds=[linear]", *TWO)
    assert tried == [(4, "linear", "full"), (5, "linear", "full")]
    record = json.loads(Path("scores/stage.json").read_text())
    name = Recipe.load("recipe.yaml").model.name
    assert record["stage"] == "score" and record["inputs"]["model"] == locate(name).fingerprint
    assert score("layout.kinds=[linear]", *TWO) == first and len(tried) == 2
    # Another kind, and a layer that is no longer protected.
    both = score("layout.kinds=[linear, none]", "layout.protect=[1, 2]")
    assert tried[2:] == [(3, "linear", "full"), (3, "none", "none"), (4, "none", "none"), (5, "none", "none")]
    assert [each for each in both if each in first] == first
    # What is not asked for now is still there.
    assert score("layout.kinds=[none]", *TWO) == [each for each in both if each.question.kind == "none"][1:]
    assert len(json.loads(Path("scores/scores.json").read_text())["scores"]) == 6 and len(tried) == 6


def test_another_w_c_has_the_heads_that_are_known(run, tried, monkeypatch):
    """Matching heads takes longer than what follows."""
    kinds = ["layout.kinds=[kv]", "layout.protect=[1, 2, 3, 4]"]
    plain = score(*kinds, "conversion.rank=full")
    monkeypatch.setattr(Workbench, "chooser", lambda *arguments: pytest.fail("heads were matched"))
    with_rank = score(*kinds, "conversion.rank=4")
    assert tried[-4:] == [(5, "kv", 4)] * 4
    heads = {each.question.lenders: each.plan.heads for each in plain}
    assert all(each.plan.heads == heads[each.question.lenders] for each in with_rank)


def test_an_interrupted_run_goes_on(run, tried, monkeypatch):
    kinds = ["layout.kinds=[linear, none]", *TWO]
    whole = score(*kinds)
    shutil.rmtree("scores")
    tried.clear()
    recorded = Alone.convert

    def interrupted(self, plans):
        if self.index == 5:
            raise KeyboardInterrupt
        return recorded(self, plans)

    with monkeypatch.context() as patch:
        patch.setattr(Alone, "convert", interrupted)
        with pytest.raises(KeyboardInterrupt):
            score(*kinds)
    assert not Path("scores").exists() and {layer for layer, *_ in tried} == {4}
    left = Path(".scores.partial/scores.json")
    whole_file = left.read_bytes()
    tried.clear()
    assert score(*kinds) == whole and {layer for layer, *_ in tried} == {5}
    assert not left.parent.exists()
    # What is left damaged starts over.
    shutil.copytree("scores", left.parent)
    shutil.move(left.parent / "stage.json", left.parent / "started.json")
    left.write_bytes(whole_file[:99])
    shutil.rmtree("scores")
    tried.clear()
    assert score(*kinds) == whole and {layer for layer, *_ in tried} == {4, 5}


@pytest.mark.parametrize(
    ("more", "what"),
    [
        ("conversion.align=9", "another fit;"),
        ("conversion.tokens=640", "another text;"),
        ("layout.sources=one", "another head matching;"),
    ],
)
def test_scores_of_something_else_are_refused(run, tried, more, what):
    kinds = ["layout.kinds=[linear]", "layout.protect=[1, 2, 3, 4]"]
    score(*kinds)
    with pytest.raises(StageError, match=rf"scores is of {what} run `uniattn score --force`"):
        score(*kinds, more)
    assert len(tried) == 1
    score(*kinds, more, force=True)
    assert len(tried) == 2
    score(*kinds, more)
    assert len(tried) == 2


@pytest.mark.parametrize(
    "content",
    [
        "{",
        "[]",
        "{}",
        '{"scores": [3]}',
        '{"scores": [{"layer": 4, "lenders": [], "plan": {"kind": 3}}]}',
        '{"scores": [{"layer": 4, "lenders": [], "plan": {"kind": "linear"}, "divergence": NaN, "stderr": 0.1}]}',
    ],
)
def test_damaged_scores_are_one_line(run, content):
    kinds = ["layout.kinds=[linear]", "layout.protect=[1, 2, 3, 4]"]
    score(*kinds)
    Path("scores/scores.json").write_text(content)
    with pytest.raises(StageError, match=r"scores\.json is damaged .*; run `uniattn score --force`$"):
        score(*kinds)


def test_what_uniattn_did_not_write_is_left_alone(run):
    Path("scores").mkdir()
    Path("scores/mine.txt").write_text("mine")
    with pytest.raises(StageError, match="scores exists but was not written by uniattn; use --force"):
        score("layout.kinds=[linear]")
    assert Path("scores/mine.txt").read_text() == "mine"


def test_nothing_to_score_and_too_large_a_rank(run):
    with pytest.raises(LayoutError, match=r"no layer can be changed; see layout\.protect"):
        score("layout.protect=[1, 2, 3, 4, 5]")
    with pytest.raises(LayoutError, match=r"conversion\.rank is 99, but the hidden size is only 48"):
        score("conversion.rank=99")


def test_scores_need_the_whole_model_in_one_place(run, monkeypatch):
    monkeypatch.setattr(Workbench, "placement", Placement(torch.device("cpu"), torch.device("cpu")))
    with pytest.raises(LayoutError, match="scores need the whole model in the memory of its device"):
        score("layout.kinds=[linear]")
    assert not Path("scores").exists()


def test_scores_are_read_as_they_were_written():
    plan = LayerPlan("key", heads=((3, 0), (2, 1), (3, 2)), compensation=4)
    for divergence, stderr in ((0.1, 0.01), (math.inf, math.nan)):
        written = Score(Question(4, "key", 4, (3, 2)), plan, divergence, stderr)
        again = Score.from_dict(json.loads(json.dumps(written.to_dict(), allow_nan=False)))
        assert (again.question, again.plan, again.divergence) == (written.question, plan, divergence)
        assert again.stderr == pytest.approx(stderr, nan_ok=True)


def test_a_layout_of_the_smallest_cache_is_scored_and_found(run, tried):
    """One layer lends to all others, the farthest included."""
    kinds = ["layout.kinds=[key]", "conversion.solve=output", "layout.match=maps"]
    found = score(*kinds)
    assert {each.question.lenders for each in found if each.question.layer == 5} == {
        *[(4, 3, 2, 1, 0), (4,), (3,), (2,)],
        (0,),
    }
    asked = [*FEW, "layout.search=scores", *kinds]
    grouping = uniattn_cli.group(overrides=[*asked, "layout.kv=0.59"], options=CPU)
    assert [plan.source_layers for plan in grouping.layout] == [(), *[(0,)] * 5]
    assert len(tried) == len(found)
    with pytest.raises(LayoutError, match=r"kv 0\.58 is not possible, 0\.5834 is"):
        uniattn_cli.group(overrides=[*asked, "layout.kv=0.58"], options=CPU)


# --- layouts from scores ----------------------------------------------------------------------------------------------

SHAPE = AttentionShape(6, 3, 8, 48, ("full",) * 6)
KINDS = ("key", "linear")


def made_up(layer, kind, divergence, leader=None):
    plan = LayerPlan(kind, leader, compensation="full" if kind == "linear" else "none")
    lenders = () if leader is None else (leader,)
    return Score(Question(layer, kind, plan.compensation, lenders), plan, divergence, 0.0)


SCORES = [
    *(made_up(layer, "key", 0.001 * layer, layer - 1) for layer in range(1, 6)),
    *(made_up(layer, "key", 0.0015 * layer, 0) for layer in range(2, 6)),
    *(made_up(layer, "linear", 0.002 * (7 - layer)) for layer in range(1, 6)),
    made_up(1, "linear", math.inf),
]
WEIGHTS = {(): 1000, ("key", "none", None): 10, ("linear", "full", None): 30}


def wish_of(spec):
    wish = Wish.of(spec, SHAPE, None)
    budgets = [replace(budget, _weights=WEIGHTS) for budget in wish.budgets]
    return replace(wish, budgets=budgets, save=replace(wish.save, _weights=WEIGHTS))


def spec_of(**fields):
    return LayoutSpec(search="scores", kinds=KINDS, **fields)


@pytest.mark.parametrize("fields", [{"kv": 0.8}, {"kv": 0.9, "params": 0.95}, {"followers": 2, "params": 0.97}])
def test_the_pool_has_different_solutions_and_each_kind_alone(fields):
    spec = spec_of(**fields)
    wish = wish_of(spec)
    found = pool(SCORES, spec, 6, wish)
    layouts = {name: layout_of(solution) for name, solution in found.items()}
    for layout in layouts.values():
        assert layout.problems(SHAPE) == [] and all(budget.met(layout) for budget in wish.budgets)
    mixes = [solution for name, solution in found.items() if name.startswith("scores, key + linear")]
    assert 1 < len(mixes) <= POOL
    losses = [total(solution, loss) for solution in mixes]
    assert losses == sorted(losses)
    for number, solution in enumerate(mixes):
        for other in mixes[:number]:
            assert sum(a.form != b.form for a, b in zip(solution, other, strict=True)) >= DIFFERENT
    for kind in KINDS:
        alone = [set(map(lambda plan: plan.kind, layout)) - {"own"} for layout in layouts.values()]
        assert {kind} in alone


def test_as_much_as_the_loss_allows_is_saved():
    for fields in ({"max_loss": 0.02}, {"max_loss": 0.02, "save": "params"}, {"max_loss": 0.02, "kv": 0.8}):
        spec = spec_of(**fields)
        wish = wish_of(spec)
        assert len(wish.budgets) == len(fields) - ("save" in fields) - 1
        first = pool(SCORES, spec, 6, wish)["scores, key + linear"]
        assert total(first, loss) <= 0.02
        problem = problem_of(SCORES, spec, 6, KINDS)
        saved = [wish.save.saved(layout_of(wish.best(problem, share))) for share in (0.6, 1.0, 2.0)]
        assert saved == sorted(set(saved)) and saved[1] == wish.save.saved(layout_of(first))


class Made:
    """Scores that are all made."""

    known = SCORES

    def __init__(self, *arguments, **others):
        pass

    def settled(self, solve):
        return solve(self.known)


class FakeBench:
    """Measures what the sum of scores says, off by a factor, and remembers what it was asked for."""

    def __init__(self, spec, factor):
        self.recipe, self.measured, self.factor = SimpleNamespace(layout=spec), SimpleNamespace(shape=SHAPE), factor
        self.texts, self.asked = SimpleNamespace(check=torch.zeros(4, 64)), []
        self.base, self.options = SimpleNamespace(config=None), CPU
        self.loss = {(s.question.layer, s.plan): s.divergence for s in reversed(SCORES)}

    def validate(self, layouts):
        self.asked += [layout for layout in layouts.values() if layout not in self.asked]
        lost = {
            name: self.factor * sum(self.loss[index, layout[index]] for index in layout.changed)
            for name, layout in layouts.items()
        }
        found = [Validated(name, layout, lost[name], 0.001) for name, layout in layouts.items()]
        return sorted(found, key=lambda entry: entry.divergence)


@pytest.mark.parametrize("factor", [0.6, 1.0, 1.7])
def test_the_measured_loss_comes_near_to_the_limit(monkeypatch, factor):
    """Whatever the sum of scores is off by; the layout saves as much as one that knew."""
    monkeypatch.setattr(by_scores, "ScoresOnDemand", Made)
    spec = spec_of(max_loss=0.03)
    wish, bench = wish_of(spec), FakeBench(spec, factor)
    found = by_scores.by_scores(None, bench, wish, "auto", True)
    considered, predicted = found.considered, found.predicted
    taken = next(entry for entry in considered.shortlist if entry.layout == considered.chosen)
    assert 0.75 * 0.03 <= taken.divergence <= 0.03 and predicted == pytest.approx(taken.divergence / factor)
    ideal = wish.best(problem_of(SCORES, spec, 6, KINDS), 0.9 / factor)
    assert wish.save.saved(considered.chosen) >= wish.save.saved(layout_of(ideal))
    assert len(bench.asked) <= 1 + by_scores.ROUNDS + len(KINDS)


@pytest.mark.parametrize(("together", "changed"), [(1.0, 2), (0.5, 4)])
def test_decoding_is_as_fast_as_was_asked(monkeypatch, together, changed):
    """Also where layers save together only a part of what each saves alone."""
    alone, timed = {"key": 0.01, "linear": 0.05}, []

    def speed_of(bench, layout, batch, context):
        assert (batch, context) == (64, 8192)
        timed.append(layout)
        factor = 1.0 if len(timed) <= len(alone) else together
        return 1 / (1 - factor * sum(alone[layout[index].kind] for index in layout.changed))

    monkeypatch.setattr(by_scores, "ScoresOnDemand", Made)
    monkeypatch.setattr(by_scores, "company_of", lambda bench, solution: Company({}, 1.0))
    monkeypatch.setattr(speed, "speed_of", speed_of)
    monkeypatch.setattr(speed, "layer_windows", lambda config: [None] * 6)
    spec = spec_of(speed="1.1@64x8192")
    bench = FakeBench(spec, 1.0)
    assert Wish.of(spec, SHAPE, None).budgets == []
    found = by_scores.by_scores(None, bench, Wish.of(spec, SHAPE, None), "auto", True)
    assert found.speed >= 1.1 * (1 - speed.TOLERANCE) and found.speed == speed_of(bench, found.layout, 64, 8192)
    assert len(found.layout.changed) == changed
    with pytest.raises(LayoutError, match="a dry run cannot time decoding steps"):
        by_scores.by_scores(None, bench, Wish.of(spec, SHAPE, None), "auto", False)
    impossible = spec_of(speed="2@64x8192")
    with pytest.raises(LayoutError, match=r"budget speed 2@64x8192 is not possible, 1\.\d+ is"):
        by_scores.by_scores(None, FakeBench(impossible, 1.0), Wish.of(impossible, SHAPE, None), "auto", True)


def test_as_much_time_is_saved_as_the_loss_allows(monkeypatch):
    monkeypatch.setattr(by_scores, "ScoresOnDemand", Made)
    monkeypatch.setattr(speed, "layer_windows", lambda config: [None] * 6)
    kinds = {"key": 1.0, "linear": 1.3}  # those that save the most time
    monkeypatch.setattr(speed, "speed_of", lambda bench, layout, *size: kinds[layout[layout.changed[0]].kind])
    spec = spec_of(speed="1@4x64", save="time", max_loss=0.03)
    found = by_scores.by_scores(None, FakeBench(spec, 1.0), Wish.of(spec, SHAPE, None), "auto", True)
    assert {found.layout[index].kind for index in found.layout.changed} == {"linear"}
    taken = next(entry for entry in found.considered.shortlist if entry.layout == found.layout)
    assert taken.divergence <= 0.03


def test_the_engine_times_decoding_steps_of_layouts(run):
    bench = bench_of("layout.kinds=[key, linear]", "layout.speed=1.01@2x32", "layout.protect=[1, 2, 3]")
    options = [Option(layer, LayerPlan("linear", compensation="full")) for layer in (4, 5)]
    options.append(Option(5, LayerPlan("key", heads=((4, 0), (4, 1), (4, 2)))))
    budget = speed.measured_budget(bench, options)
    assert {form[0] for form in budget.shares} == {"linear", "key"}
    assert all(-3 < share < 1 for share in budget.shares.values()) and budget.limit == 1.01
    assert speed.confirmed(bench, Layout.own(6)) > 0
    with pytest.raises(LayoutError, match=r"--speed at a batch of 9999999 .* a KV cache of .* GB.*; give smaller ones"):
        speed.speed_of(bench, Layout.own(6), 9_999_999, 32_768)


def test_a_short_shortlist_stays_short(monkeypatch):
    monkeypatch.setattr(by_scores, "ScoresOnDemand", Made)
    spec = spec_of(max_loss=0.03, shortlist=2)
    bench = FakeBench(spec, 1.7)
    by_scores.by_scores(None, bench, wish_of(spec), "auto", True)
    assert len(bench.asked) == 2


def test_a_solution_is_solved_for_again_with_scores_of_its_company(monkeypatch):
    """A layer that costs more beside the others than alone is left out in the end."""
    monkeypatch.setattr(by_scores, "ScoresOnDemand", Made)
    spec = spec_of(kv=0.9, shortlist=3)
    wish, bench, seen = wish_of(spec), FakeBench(spec, 1.0), []

    def company_of(bench, solution):
        seen.append(layout_of(solution))
        return Company({seen[0].changed[0]: 999.0}, 1.0)

    monkeypatch.setattr(by_scores, "company_of", company_of)
    monkeypatch.setattr(by_scores, "pool", lambda *arguments: dict(list(pool(*arguments).items())[:1]))
    considered = by_scores.by_scores(None, bench, wish, "auto", True).considered
    corrected = next(entry for entry in considered.shortlist if entry.name.endswith(", corrected"))
    assert seen[0].changed[0] not in corrected.layout.changed and all(b.met(corrected.layout) for b in wish.budgets)


def test_scores_of_a_company_sum_up_to_its_loss(run):
    """All that is changed costs together what a conversion of all of it costs."""
    bench = bench_of("layout.kinds=[key, linear]", "layout.protect=[1, 2]")
    scores = score_plans(RunDir("."), bench, "auto")
    problem = problem_of(scores, bench.recipe.layout, 6, ("key", "linear"))
    solution = Wish.of(replace(bench.recipe.layout, followers=2), SHAPE, None).best(problem)
    corrected = {(s.question.layer, s.plan): s.divergence for s in company_of(bench, solution).corrected(scores)}
    changed = [option for option in solution if option.plan.kind != "own"]
    together = sum(corrected[option.layer, option.plan] for option in changed)
    trials = Trials(bench.base, bench.texts.fit, bench.texts.score, bench.recipe.conversion)
    whole = trials.convert(layout_of(solution), bench.chooser(bench.lenders)).divergence
    assert together == pytest.approx(whole, rel=1e-3) and len(changed) == 2
    # Other plans of a layer cost more or less by the factor of that layer.
    for option in changed:
        factors = {
            corrected[s.question.layer, s.plan] / s.divergence for s in scores if s.question.layer == option.layer
        }
        assert max(factors) == pytest.approx(min(factors))


def test_a_shortlist_of_one_has_the_best_prediction_only():
    spec = spec_of(kv=0.8, shortlist=1)
    assert list(pool(SCORES, spec, 6, wish_of(spec))) == ["scores, key + linear"]


def test_a_short_shortlist_has_each_kind_alone_before_further_mixes():
    spec = spec_of(kv=0.8, shortlist=3)
    names = ["scores, key + linear", "scores, key", "scores, linear"]
    assert list(pool(SCORES, spec, 6, wish_of(spec))) == names


def test_nothing_to_save_is_one_layout():
    spec = spec_of(followers=0)
    assert [layout_of(each) for each in pool(SCORES, spec, 6, wish_of(spec)).values()] == [Layout.own(6)]


@pytest.mark.parametrize(
    ("fields", "nearest"),
    [
        ({"kv": 0.1}, "budget kv 0.1 is not possible, 0.1667 is"),
        ({"params": 0.5, "kv": 0.9}, "budget params 0.5 is not possible, 0.85 is"),
        ({"followers": 9}, "budget followers 9 is not possible, 5 is"),
        (
            {"kv": 0.2, "max_loss": 0.02},
            "budget kv 0.2 is not possible with max_loss 0.02, 0.4167 is; "
            "max_loss 0.02 is not possible with budget kv 0.2, 0.04 is",
        ),
    ],
)
def test_what_is_impossible_is_one_line_with_the_nearest(fields, nearest):
    spec = spec_of(**fields)
    with pytest.raises(LayoutError) as told:
        pool(SCORES, spec, 6, wish_of(spec))
    assert str(told.value) == f"no layout does what is asked: {nearest}"


def test_the_frontier_falls_to_the_smallest_cache():
    points = frontier(SCORES, spec_of(), SHAPE)
    for series in {point.series for point in points}:
        values = [point.value for point in points if point.series == series]
        assert values[0] == 0 and values == sorted(values) and values[-1] > 0
    assert {point.series for point in points} == {"scores, key + linear", "scores, key", "scores, linear"}


def validated(name, divergence, *layers):
    layout = Layout.own(6)
    for layer in layers:
        layout = layout.with_plan(layer, LayerPlan("linear", compensation="full"))
    return Validated(name, layout, divergence, 0.001, predicted=divergence / 2)


def test_of_those_that_lose_no_more_than_they_may_the_one_that_saves_most_is_taken():
    shortlist = [validated("small", 0.01, 1), validated("good", 0.02, 1, 2), validated("large", 0.05, 1, 2, 3)]
    limited, wide, narrow, none = (
        replace(wish_of(spec_of(kv=0.9)), max_loss=max_loss) for max_loss in (0.03, 0.06, 0.001, None)
    )
    assert [pick(shortlist, wish).name for wish in (limited, wide, narrow, none)] == [
        "good",
        "large",
        "small",
        "small",
    ]
    for wish, words in (
        (limited, "'good' chosen: saves most of those that lose at most 0.03 (KL 0.0200); 3 layouts converted"),
        (narrow, "'small' chosen: none loses at most 0.001, and it loses least (KL 0.0100); 3 layouts converted"),
    ):
        best = pick(shortlist, wish)
        considered = Considered("", [], shortlist, 4096, best.layout, wish.max_loss)
        assert considered.reason().startswith(words)
        table = considered.table(SHAPE, 2)
        assert [row[0].endswith("*") for row in table.rows] == [entry is best for entry in shortlist]
        assert table.columns[3] == "predicted" and table.rows[2][3:5] == ["0.0250", "0.0500 ± 0.0020"]


# --- the search -------------------------------------------------------------------------------------------------------


def test_from_scores_to_a_converted_checkpoint(run, uniattn):
    """On the command line: missing scores are made, two budgets are met, and predictions stand beside measurements."""
    flags = [word for entry in FEW for word in ("--set", entry)]
    done = uniattn("convert", "--dry-run", "--search", "scores", *flags, cwd=run)
    assert done.returncode == 1 and "a dry run cannot score plans; run `uniattn score` first" in done.stderr
    asked = ["--search", "scores", "--kinds", "key,linear", "--kv", "0.9", "--params", "0.99", "--device", "cpu"]
    few = ["--set", "layout.protect=[1, 2, 3]", *flags]
    done = uniattn("convert", *asked, *few, cwd=run)
    assert done.returncode == 0, done.stderr
    assert "predicted" in done.stdout and Path("scores/stage.json").is_file()
    grouping = json.loads(Path("grouping/grouping.json").read_text())
    assert all(entry["predicted"] > 0 and entry["divergence"] > 0 for entry in grouping["shortlist"])
    assert grouping["measure"] == "sum of the layers' scores, nats per token"
    stored = Recipe.load("recipe.yaml")
    assert (stored.layout.search, stored.layout.kv, stored.layout.params) == ("scores", 0.9, 0.99)
    layout = Layout.from_list(stored.layout.layers)
    config = SimpleNamespace(**json.loads(Path("converted/config.json").read_text()))
    assert layout.changed and set(layout.changed) <= {4, 5} and config.uniattn
    assert Budget("kv", 0.9, "", SHAPE, None).met(layout)
    # The scores are there now, for a dry run too, and its heads are those of the scores.
    before = Path("scores/scores.json").read_bytes()
    done = uniattn("convert", "--dry-run", *asked[:-4], "--max-loss", "0.5", *few, cwd=run)
    assert done.returncode == 0 and "max_loss 0.5, saving kv" in done.stdout, done.stderr
    assert Path("scores/scores.json").read_bytes() == before
    done = uniattn("score", "--kinds", "key,linear", "--device", "cpu", *few, cwd=run)
    assert done.returncode == 0 and "± " in done.stdout and Path("scores/scores.json").read_bytes() == before
    assert "Pareto front" in done.stdout and "predicted: the sum of scores" in done.stdout


@pytest.mark.parametrize(
    ("layout", "fault"),
    [
        ({"max_loss": 0.1}, "layout.max_loss needs layout.search: scores"),
        ({"search": "scores", "save": "params"}, "layout.save needs layout.max_loss"),
        ({"speed": "1.1@4x64"}, "layout.speed needs layout.search: scores"),
        ({"search": "scores", "speed": "4x64"}, "write RATIO@BATCHxCONTEXT, such as 1.15@64x8192"),
        ({"search": "scores", "speed": "0.5@4x64"}, "write RATIO@BATCHxCONTEXT"),
        ({"search": "scores", "save": "time", "max_loss": 0.1}, "layout.save: time needs layout.speed"),
        ({"kv": 0.8, "params": 0.9}, "only one budget can be given, not kv and params; set layout"),
        ({"trial": 4096}, "layout.trial chooses from what scores suggest under budgets; set layout.search: scores"),
        ({"search": "scores", "trial": 4096, "max_loss": 0.1}, "and no layout.max_loss"),
        ({"search": "thorough"}, "layout.search must be one of fast, scores, not 'thorough'"),
        ({"search": "scores", "max_loss": 0}, "layout.max_loss"),
    ],
)
def test_budgets_that_make_no_sense_are_faults(layout, fault):
    with pytest.raises(RecipeError, match=fault):
        Recipe.from_tree({"model": {"name": "m"}, "layout": layout})
    Recipe.from_tree(
        {"model": {"name": "m"}, "layout": {"search": "scores", "kv": 0.8, "params": 0.9, "max_loss": 0.1}}
    )


def test_an_analysis_proposes_from_the_scores_that_are_there(run):
    score("layout.kinds=[linear]", *TWO)
    for more, known in (([], True), (["analysis.tokens=512"], False)):
        found = uniattn_cli.analyze(overrides=[*FEW, *more], options=replace(CPU, force=True))
        titles = [table.title for table in found.tables]
        assert any("predicted: the sum of scores" in title for title in titles) == known
        assert found.notes[-1].endswith("--search scores") == known
