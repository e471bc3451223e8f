"""What a choice was made from is written down, and what is taken is the best of what was really converted."""

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

from uniattn_cli.analysis.measured import Measured
from uniattn_cli.commands.group import group
from uniattn_cli.errors import DataError, LayoutError, ModelError, RecipeError, UsageError
from uniattn_cli.fitting import fit
from uniattn_cli.fitting.fit import fit_layers
from uniattn_cli.layouts import shortly, workbench
from uniattn_cli.layouts.budget import Budget
from uniattn_cli.layouts.choose import choose
from uniattn_cli.layouts.considered import Considered, Point, Validated, frontier_table, kinds_in_words, lower_envelope
from uniattn_cli.layouts.fast import frontier
from uniattn_cli.layouts.plots import plot_frontier
from uniattn_cli.layouts.workbench import Workbench
from uniattn_cli.modeling.layout_uniattn import AttentionShape, Layout
from uniattn_cli.models.building import build_converted
from uniattn_cli.models.hub import locate
from uniattn_cli.models.loading import load_config, load_model
from uniattn_cli.options import RunOptions, Silent
from uniattn_cli.recipe.schema import LayoutSpec, Recipe
from uniattn_cli.run.directory import RunDir
from uniattn_cli.tables import NOTHING

CPU = RunOptions(device="cpu")
KINDS = ("softmax", "kv", "linear")
SHAPE = AttentionShape(6, 3, 8, 48, ("full",) * 6)
QUICK = ["layout.score_tokens=256", "conversion.tokens=512"]
SCORED = [
    *("layout.search=scores", "layout.kinds=[softmax, kv, linear]", "layout.kv=0.8", "layout.protect=[1, 2]"),
    *QUICK,
]


@pytest.fixture
def run(tiny_runs, tmp_path, monkeypatch):
    folder = Path(shutil.copytree(tiny_runs / "analysed", tmp_path / "run"))
    monkeypatch.chdir(folder)
    return folder


def overridden(*more):
    """The settings of a quick run, as a user would have them in the recipe, and more."""
    return [entry for entry in settings() if entry.partition("=")[0] not in QUICK_KEYS] + [*QUICK, *more]


QUICK_KEYS = {entry.partition("=")[0] for entry in QUICK}


def bench_of(run, *more, options=CPU):
    recipe = Recipe.load(run / "recipe.yaml", overridden(*more))
    source = locate(recipe.model.name)
    return Workbench(recipe, source, Measured.load(run / "analysis"), options)


def chosen(run, *more):
    recipe = Recipe.load(run / "recipe.yaml", overridden(*more))
    return choose(RunDir(run), recipe, load_config(locate(recipe.model.name)), CPU)


# --- the candidates, by themselves ------------------------------------------------------------------------------------


def layout_of(*kinds):
    """Kinds by initial: o own, s softmax, v kv, l linear, n none."""
    entries = {
        "o": {},
        "s": {"kind": "softmax", "leader": 0},
        "v": {"kind": "kv", "leader": 0},
        "l": {"kind": "linear"},
        "n": {"kind": "none"},
    }
    return Layout.from_list([entries[kind] for kind in kinds])


def test_the_lower_envelope_has_what_nothing_else_beats():
    """Seven points: two are dominated, one costs the same and is worse."""
    sizes = [("oooooo", 0.0), ("osoooo", 0.3), ("ovoooo", 0.2), ("ossooo", 0.5), ("olvooo", 0.4), ("ovvvoo", 0.9)]
    points = [Point(name, layout_of(*name), value) for name, value in sizes]
    kept = lower_envelope([*points, Point("other", layout_of(*"ovoooo"), 0.25)], SHAPE)
    assert [point.series for point in kept] == ["oooooo", "ovoooo", "olvooo", "ovvvoo"]


def considered_of(*validated):
    points = [Point("fast", layout_of(*"oooooo"), 0.0), Point("fast", layout_of(*"osoooo"), math.nan)]
    return Considered(
        "something", points, list(validated), 4096, validated[0].layout if validated else points[1].layout
    )


def test_what_was_considered_is_written_in_full(tmp_path):
    best = Validated("mix", layout_of(*"osvooo"), 0.1234567, 0.01)
    other = Validated("one kind", layout_of(*"ossooo"), 0.2, math.nan, 0.0765433, math.nan)
    considered = considered_of(best, other)
    considered.save(tmp_path, SHAPE)
    content = json.loads((tmp_path / "grouping.json").read_text())
    assert content["schema"] == 1 and content["measure"] == "something" and content["shortlist_tokens"] == 4096
    assert content["chosen"] == best.layout.to_list()
    assert [(p["series"], p["value"], p["changed"]) for p in content["frontier"]] == [("fast", 0, 0), ("fast", None, 1)]
    assert content["frontier"][1]["kv_share"] == round(11 / 12, 6)
    assert [Layout.from_list(p["layers"]) for p in content["frontier"]] == [p.layout for p in considered.frontier]
    first, second = content["shortlist"]
    assert (first["name"], first["divergence"], first["stderr"], first["behind"]) == ("mix", 0.123457, 0.01, 0)
    assert (second["stderr"], second["behind"], second["behind_stderr"]) == (None, 0.0765433, None)
    assert (first["changed"], first["kv_share"]) == (2, 0.75)
    plot_frontier(considered, SHAPE, tmp_path / "frontier.png")
    assert (tmp_path / "frontier.png").stat().st_size > 8000


@pytest.mark.parametrize(("stderr", "words"), [(0.001, "0.2000)"), (0.1, "a difference within noise")])
def test_the_reason_says_by_how_much_and_how_surely(stderr, words):
    best = Validated("mix", layout_of(*"osvooo"), 0.1, 0.02)
    second = Validated("one kind", layout_of(*"ossooo"), 0.2, 0.02, 0.1, stderr)
    reason = considered_of(best, second, replace(second, name="third")).reason()
    assert reason.startswith("'mix' chosen: closest to the base of 3 layouts converted and compared on 4,096 tokens")
    assert "KL 0.1000; 'one kind' 0.2000" in reason and words in reason
    assert considered_of().reason() == "" and considered_of().table(SHAPE, 2) is None


def test_the_table_of_the_shortlist():
    best = Validated("mix", layout_of(*"osvooo"), 0.1, 0.02)
    second = Validated("one kind", layout_of(*"ossooo"), 0.2, 0.02, 0.1, 0.05)
    table = considered_of(best, second, replace(second, stderr=math.nan, behind_stderr=math.nan)).table(SHAPE, 2)
    assert table.rows[0] == ["mix *", "1 softmax, 1 kv", "432 (75%)", "0.1000 ± 0.0392", "-"]
    assert table.rows[1] == ["one kind", "2 softmax", "480 (83%)", "0.2000 ± 0.0392", "+0.1000 ± 0.0980"]
    assert table.rows[2][3:] == ["0.2000", "+0.1000"]
    assert "4,096 tokens" in table.title
    assert kinds_in_words(Layout.own(6)) == "none"


# --- text for fit, search and comparison ------------------------------------------------------------------------------


class Told(Silent):
    def __init__(self):
        self.warnings = []

    def warn(self, text):
        self.warnings.append(text)


def test_fit_search_and_comparison_share_no_text(run):
    told = Told()
    bench = bench_of(run, options=RunOptions(device="cpu", progress=told))
    texts = bench.texts
    assert [len(part) for part in (texts.fit, texts.score, texts.check)] == [8, 4, 4]
    together = torch.cat([texts.fit, texts.score, texts.check])
    assert torch.equal(together, bench.windows(1024)) and torch.equal(texts.fit, bench.windows(512))
    assert len({tuple(row.tolist()) for row in together}) == 16
    assert told.warnings == []


def test_a_short_text_is_shared_in_proportion(run, monkeypatch):
    told = Told()
    bench = bench_of(run, options=RunOptions(device="cpu", progress=told))
    held = bench.windows(1024)
    monkeypatch.setattr(Workbench, "windows", lambda self, tokens: held[: min(tokens // 64, 9)])
    texts = bench.texts
    assert [len(part) for part in (texts.fit, texts.score, texts.check)] == [5, 2, 2]
    assert torch.equal(torch.cat([texts.fit, texts.score, texts.check]), held[:9])
    assert told.warnings == [
        "the calibration text has only 576 tokens: 320, 128, 128 of them for fit, search, comparison"
    ]
    monkeypatch.setattr(Workbench, "windows", lambda self, tokens: held[:3])
    with pytest.raises(DataError, match=r"has 3 windows of 64 tokens.*at least 4; add more text"):
        _ = bench_of(run).texts


# --- the fast choice --------------------------------------------------------------------------------------------------


def test_a_fast_choice_compares_nothing_and_says_so(run):
    grouping = group(overrides=overridden("layout.followers=2", "layout.kinds=[softmax]"), options=CPU)
    content = json.loads(Path("grouping/grouping.json").read_text())
    assert content["shortlist"] == [] and content["shortlist_tokens"] == 0
    assert content["measure"] == "sum over changed layers of 1 - similarity"
    stored = Recipe.load("recipe.yaml").layout.layers
    assert content["chosen"] == grouping.layout.to_list() and Layout.from_list(stored) == grouping.layout
    bench = bench_of(run)
    choices = frontier(bench.matcher)
    values = [choice.changed - sum(choice.scores.values()) for choice in choices]
    assert [point["value"] for point in content["frontier"]] == pytest.approx(values, rel=1e-5)
    assert grouping.layout.changed == choices[2].layout.changed
    similar = bench.matcher.similarity_of(grouping.layout)
    assert f"matched by attention output, mean similarity of the borrowed maps {similar:.3f}" in grouping.notes[0]
    assert "next: uniattn convert" in grouping.notes[-1]


def test_heads_matched_by_maps_are_those_of_the_search(run, monkeypatch):
    monkeypatch.setattr(Workbench, "base", property(lambda self: pytest.fail("a model was loaded")))
    grouping = chosen(run, "layout.followers=2", "layout.kinds=[softmax]", "layout.match=maps")
    choice = frontier(bench_of(run).matcher)[2]
    assert grouping.layout == choice.layout
    assert (
        f"matched by similarity of maps, mean similarity of the borrowed maps {choice.mean_score:.3f}"
        in grouping.notes[0]
    )


def test_auto_takes_early_layers_and_the_papers_are_one_word_away(run):
    maps = ("layout.match=maps", "layout.followers=2")
    for override, kind in (("layout.groups=auto", "early"), ("layout.kinds=[softmax]", "softmax")):
        assert [plan.kind for plan in chosen(run, override, *maps).layout if plan.kind != "own"] == [kind] * 2
    for groups in ("paper", "every:3", "2-5:4", "1-2,4-5"):
        assert {plan.kind for plan in chosen(run, f"layout.groups={groups}", *maps).layout} == {"own", "softmax"}


@pytest.mark.parametrize(("kind", "layers"), [("key", 2), ("kv", 1), ("early", 2)])
def test_a_fast_choice_may_be_of_layers_that_borrow_keys(run, kind, layers):
    grouping = chosen(run, f"layout.kinds=[{kind}]", "layout.kv=0.84")
    choice = frontier(bench_of(run).matcher)[layers]
    assert grouping.layout.changed == choice.layout.changed
    assert {grouping.layout[index].kind for index in grouping.layout.changed} == {kind}
    assert grouping.notes == [f"{layers} {kind} layers: budget kv 0.84; heads matched by attention output"]


def test_another_kind_where_groups_are_given(run, monkeypatch):
    steps = []
    plain = fit.align_queries
    monkeypatch.setattr(fit, "align_queries", lambda *arguments: steps.append(arguments[-1]) or plain(*arguments))
    grouping = chosen(run, "layout.groups=key@every:2", "conversion.align=12")
    assert grouping.layout.changed == [1, 3, 5]
    for index in grouping.layout.changed:
        plan = grouping.layout[index]
        # The leaders are given, and the heads are chosen among theirs.
        assert plan.kind == "key" and set(plan.source_layers) == {index - 1}
    # A conversion that is not kept takes a quarter of the steps.
    assert steps == [3, 3, 3]


@pytest.mark.parametrize(
    ("more", "expected"),
    [
        ([], "none"),
        (["conversion.rank=full"], "full"),
        (["conversion.rank=4"], 4),
        (["conversion.solve=reference"], "full"),
        (["conversion.solve=output", "conversion.rank=4"], "none"),
    ],
)
def test_early_layers_are_compensated_where_the_recipe_asks_for_it(run, more, expected):
    found = group(groups="early@every:3", overrides=overridden("layout.match=maps", *more), options=CPU).layout
    assert {found[index].compensation for index in found.changed} == {expected}
    # It follows from the recipe, and does not stand in the layout.
    assert not any("compensation" in entry for entry in Recipe.load("recipe.yaml").layout.layers)


def test_given_groups_of_another_kind_may_be_matched_by_maps(run):
    layout = chosen(run, "layout.groups=kv@every:2", "layout.match=maps", "layout.sources=one").layout
    table = bench_of(run).matcher.similarity
    for index in layout.changed:
        for unit, (source, head) in enumerate(layout[index].heads):
            rows = table[index, index - source - 1][2 * unit : 2 * unit + 2].reshape(2, -1, 2).max(2).sum(0)
            assert source == index - 1 and head == rows.argmax()


def test_kinds_ask_for_a_choice(run):
    group(groups="every:3", overrides=overridden(), options=CPU)
    assert Recipe.load("recipe.yaml").layout.groups == "every:3"
    found = group(overrides=overridden("layout.kinds=[key]", "layout.followers=1"), options=CPU)
    assert [found.layout[index].kind for index in found.layout.changed] == ["key"]
    found = group(overrides=overridden("layout.kinds=[key]", "layout.followers=null"), options=CPU)
    assert Recipe.load("recipe.yaml").layout.groups == "auto"
    with pytest.raises(UsageError, match=r"remove layout\.kinds, or use --groups auto, or KIND@paper"):
        group(groups="paper", overrides=["layout.kinds=[key]"], options=CPU)


@pytest.mark.parametrize("layers", ["layout.kinds=[early]", "layout.groups=key@every:3"])
def test_what_a_free_head_map_means_without_borrowed_maps_is_told(run, layers):
    free = chosen(run, "layout.head_map=free", "layout.match=maps", layers)
    assert "key/value heads as a whole (head_map: free is for softmax layers)" in free.notes[0]
    assert free.layout == chosen(run, "layout.match=maps", layers).layout


def test_a_budget_that_another_kind_cannot_meet_says_why(run):
    with pytest.raises(LayoutError, match=r"budget params 0\.99 cannot be met.* set conversion\.rank"):
        chosen(run, "layout.kinds=[kv]", "layout.params=0.99")


@pytest.mark.parametrize("kinds", ["linear", "softmax, key"])
def test_a_fast_choice_is_of_one_kind_that_borrows(kinds):
    with pytest.raises(RecipeError, match=r"the fast search takes one of softmax, key, .*; set layout"):
        Recipe.from_tree({"model": {"name": "x"}}, overrides=[f"layout.kinds=[{kinds}]"])


def test_nothing_is_loaded_to_share_nothing(run, monkeypatch):
    monkeypatch.setattr(Workbench, "base", property(lambda self: pytest.fail("a model was loaded")))
    grouping = chosen(run, "layout.followers=0")
    assert grouping.layout == Layout.own(6) and grouping.notes == ["0 early layers: budget followers 0"]


def test_a_layout_that_borrows_nothing_needs_no_analysis(run):
    Path("layout.yaml").write_text("[{}, {kind: linear}, {}, {kind: none}, {}, {}]\n")
    shutil.rmtree("analysis")
    assert chosen(run, "layout.groups=layout.yaml").layout.changed == [1, 3]


def test_similarities_propose_layouts_that_are_compared(run, monkeypatch):
    arrays = Measured.load(run / "analysis").heads
    # Similarities that disagree: each of them finds two other layers alike.
    for layers, names in (((1, 2), ("js", "js_no_sink")), ((3, 4), ("cosine_no_sink",))):
        for name in names:
            arrays[name][:] = 0.5 * arrays[name]
            arrays[name][list(layers)] = 1
    arrays["js_no_sink"][[4, 5]] = 1.5
    load = Measured.load
    monkeypatch.setattr(Measured, "load", lambda folder: replace(load(folder), heads=arrays))
    grouping = chosen(run, "layout.followers=2", "layout.shortlist=3")
    shortlist = grouping.considered.shortlist
    names = {"fast", "fast, by cosine without the sink", "fast, by Jensen-Shannon without the sink"}
    assert {entry.name for entry in shortlist} == names
    assert grouping.layout == shortlist[0].layout
    assert len({tuple(entry.layout.changed) for entry in shortlist}) == 3
    starred = any(row[0].endswith("*") for row in grouping.tables[0].rows)
    assert starred == (shortlist[0].name == "fast")
    assert len(chosen(run, "layout.followers=2", "layout.shortlist=2").considered.shortlist) == 2


# --- the choice by scores ---------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def scored(tiny_runs, tmp_path_factory):
    folder = Path(shutil.copytree(tiny_runs / "analysed", tmp_path_factory.mktemp("scored") / "run"))
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        grouping = group(overrides=overridden(*SCORED), options=CPU)
    return SimpleNamespace(run=folder, grouping=grouping, considered=grouping.considered)


def test_each_kind_alone_stands_beside_the_mix(scored):
    names = {point.series for point in scored.considered.frontier}
    assert names == {"scores, softmax + kv + linear", *(f"scores, {kind}" for kind in KINDS)}
    compared = [{plan.kind for plan in entry.layout} - {"own"} for entry in scored.considered.shortlist]
    assert all({kind} in compared for kind in KINDS)
    # One that turns out to be the same is converted once.
    assert len({entry.layout for entry in scored.considered.shortlist}) == len(compared)


def test_the_best_comes_first_and_is_what_is_written(scored):
    values = [entry.divergence for entry in scored.considered.shortlist]
    assert values == sorted(values) and values[0] < values[-1]
    best = scored.considered.shortlist[0]
    assert scored.grouping.layout == scored.considered.chosen == best.layout
    recipe = Recipe.load(scored.run / "recipe.yaml")
    assert Layout.from_list(recipe.layout.layers) == best.layout
    content = json.loads((scored.run / "grouping" / "grouping.json").read_text())
    assert [entry["divergence"] for entry in content["shortlist"]] == pytest.approx(values, rel=1e-5)
    assert content["shortlist"][0]["layers"] == content["chosen"] == best.layout.to_list()
    assert content["shortlist_tokens"] == 256
    assert any(
        note.startswith(f"'{best.name}' chosen: closest to the base of {len(values)}") for note in scored.grouping.notes
    )
    budget = Budget.of(LayoutSpec(kv=0.8), SHAPE, load_config(locate(recipe.model.name)))
    assert all(budget.met(entry.layout) for entry in scored.considered.shortlist)


def test_the_shortlist_is_judged_by_really_converted_models(scored, monkeypatch):
    monkeypatch.chdir(scored.run)
    bench = bench_of(scored.run, *SCORED)
    base = load_model(bench.source, bench.recipe.model, torch.device("cpu"))
    assert len(scored.considered.shortlist) >= 3
    rows = []
    for entry in scored.considered.shortlist:
        model = build_converted(base, entry.layout)
        fit_layers(base, model, bench.texts.fit, bench.recipe.conversion)
        with torch.no_grad():
            base_logp, logp = (m(bench.texts.check).logits.log_softmax(-1) for m in (base, model))
        rows.append((base_logp.exp() * (base_logp - logp)).sum(-1).mean(-1).double())
        assert entry.divergence == pytest.approx(rows[-1].mean().item(), rel=1e-3)
        assert entry.stderr == pytest.approx(rows[-1].std().item() / 2, rel=1e-2)
        assert entry.behind == pytest.approx((rows[-1] - rows[0]).mean().item(), abs=1e-4)
        assert entry.behind_stderr == pytest.approx((rows[-1] - rows[0]).std().item() / 2, abs=1e-4)


def test_the_front_shows_the_best_at_each_size(scored):
    points = scored.considered.frontier
    best = {}
    for point in points:
        for budget in (1.0, 0.95, 0.9, 0.85, 0.8, 0.75, 0.7):
            if Budget.of(LayoutSpec(kv=budget), SHAPE, None).met(point.layout):
                best[budget] = min(best.get(budget, math.inf), point.value)
    kept = lower_envelope(points, SHAPE)
    for budget, value in best.items():
        met = Budget.of(LayoutSpec(kv=budget), SHAPE, None).met
        assert min(point.value for point in kept if met(point.layout)) == value
    assert [row[3] for row in frontier_table(points, SHAPE, 2).rows] == [f"{point.value:.4f}" for point in kept]


def test_a_shortlist_of_one_is_the_best_prediction(scored, monkeypatch):
    monkeypatch.chdir(scored.run)
    grouping = chosen(scored.run, *SCORED, "layout.shortlist=1")
    assert {point.series for point in grouping.considered.frontier} == {"scores, softmax + kv + linear"}
    assert grouping.considered.shortlist == [] and grouping.considered.tokens == 0
    predicted = {entry.name: entry.predicted for entry in scored.considered.shortlist}
    assert f"predicted loss {predicted['scores, softmax + kv + linear']:.4f}" in grouping.notes[0]


def test_the_best_are_trained_and_chosen_by_that(scored, monkeypatch):
    monkeypatch.chdir(scored.run)
    monkeypatch.setattr(workbench, "TRIED", 2)
    # Random models have little to learn.
    monkeypatch.setattr(shortly, "RATE", 0.01)
    bench = bench_of(scored.run, *SCORED)
    before = {name: weight.clone() for name, weight in bench.base.state_dict().items()}
    given = scored.considered.shortlist
    found = bench.tried(given, 16 * 2048)
    trained = [entry.trained for entry in found[:2]]
    assert trained == sorted(trained) and {entry.name for entry in found[:2]} == {entry.name for entry in given[:2]}
    assert all(entry.trained < 0.9 * entry.divergence for entry in found[:2]) and found[2:] == given[2:]
    assert all(torch.equal(weight, before[name]) for name, weight in bench.base.state_dict().items())
    considered = replace(scored.considered, shortlist=found, chosen=found[0].layout)
    table = considered.table(SHAPE, 4)
    assert table.columns[-1] == "trained"
    assert [row[-1] for row in table.rows[:3]] == [*(f"{value:.4f}" for value in trained), NOTHING]
    assert considered.reason().startswith(f"'{found[0].name}' chosen: closest to the base after a short training")


def test_predictions_that_overflow_are_no_choice(run, monkeypatch):
    bench = bench_of(run)
    broken = torch.tensor([math.nan, 1.0], dtype=torch.float64)
    fine = torch.tensor([2.0, 3.0], dtype=torch.float64)
    answers = [broken, fine]
    monkeypatch.setattr("uniattn_cli.models.losses.window_divergences", lambda *a, **k: answers.pop(0))
    found = bench.validate({"broken": layout_of(*"oooool"), "fine": layout_of(*"ooooon")})
    assert [entry.name for entry in found] == ["fine", "broken"]
    answers += [broken, broken]
    with pytest.raises(ModelError, match="no layout in the shortlist gives finite logits in float32"):
        bench_of(run).validate({"broken": layout_of(*"oooool"), "too": layout_of(*"ooooon")})


def test_no_layout_is_converted_twice_to_be_compared(run, monkeypatch):
    bench, converted = bench_of(run), []
    rows = torch.tensor([1.0, 2.0], dtype=torch.float64)
    monkeypatch.setattr("uniattn_cli.models.losses.window_divergences", lambda *a, **k: converted.append(a) or rows)
    bench.validate({"one": layout_of(*"oooool")})
    found = bench.validate({"again": layout_of(*"oooool"), "two": layout_of(*"ooooon")})
    assert len(converted) == 2 and [entry.name for entry in found] == ["again", "two"]


# --- what is stored ---------------------------------------------------------------------------------------------------


def test_the_settings_of_a_choice_are_stored_with_it(scored, run):
    """Otherwise a later choice by other settings would leave a recipe that contradicts itself."""
    shutil.copytree(scored.run / "scores", "scores")
    recipe = Path("recipe.yaml")
    recipe.write_text(recipe.read_text().replace("\nconversion:", "\n# what follows\nconversion:"))
    group(overrides=overridden(*SCORED, "layout.shortlist=2"), options=CPU)
    stored = Recipe.load(recipe).layout
    assert (stored.search, stored.kinds, stored.shortlist, stored.protect) == ("scores", KINDS, 2, (1, 2))
    group(overrides=overridden("layout.search=fast", "layout.kinds=[softmax]", "layout.match=maps"), options=CPU)
    stored = Recipe.load(recipe).layout
    assert (stored.search, stored.kinds, stored.match) == ("fast", ("softmax",), "maps")
    assert "# what follows\nconversion:" in recipe.read_text()


def test_kinds_named_twice_are_a_fault():
    with pytest.raises(RecipeError, match=r"layout\.kinds has a kind twice"):
        Recipe.from_tree({"model": {"name": "m"}, "layout": {"search": "scores", "kinds": ["kv", "kv"]}})
