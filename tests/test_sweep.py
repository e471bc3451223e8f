"""`uniattn sweep` on a tiny model: every point, none twice, and the impossible ones named."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from tiny_run import settings

import uniattn_cli
import uniattn_cli.commands.sweep as module
from uniattn_cli.commands.sweep import SweepPoint, sweep
from uniattn_cli.errors import RecipeError, StageError
from uniattn_cli.evaluation import cache, scores
from uniattn_cli.layouts.alone import Alone
from uniattn_cli.models.of_run import base_of
from uniattn_cli.options import RunOptions
from uniattn_cli.recipe.schema import Recipe
from uniattn_cli.run.directory import RunDir

CPU = RunOptions(device="cpu")
SETTINGS = settings()
BUDGETS = {"kv": [0.8, 0.3], "solve": ["both", "output"]}


@pytest.fixture
def run(tiny_runs, tmp_path, monkeypatch) -> Path:
    """An analysed run directory, in which the test works; scores are kept below `sweep/` only."""
    monkeypatch.chdir(tmp_path)
    return Path(shutil.copytree(tiny_runs / "analysed", tmp_path, dirs_exist_ok=True))


def test_every_point_is_scored_once(run, monkeypatch):
    """Interrupted in its second point, the sweep goes on there; run again, it does nothing."""
    scored, converted = [], []
    for name in ("row_losses", "base_losses", "compare_with_base", "answer_items"):
        real = getattr(scores, name)
        monkeypatch.setattr(scores, name, lambda *a, name=name, real=real, **k: scored.append(name) or real(*a, **k))
    real = module.convert

    def convert(*, run_dir, **others):
        if len(converted) == 1 and "interrupted" not in converted:
            converted.append("interrupted")
            raise KeyboardInterrupt
        converted.append(run_dir.name)
        return real(run_dir=run_dir, **others)

    monkeypatch.setattr(module, "convert", convert)
    with pytest.raises(KeyboardInterrupt):
        sweep(run_dir=run, **BUDGETS, overrides=SETTINGS)
    found = sweep(run_dir=run, **BUDGETS, overrides=SETTINGS)
    points = ["kv0.8-early-both", "kv0.8-early-output"]
    assert [name for name in converted if name in points] == points
    assert list(found.skipped) == ["kv0.3-early-both", "kv0.3-early-output"]
    assert all("0.3" in reason for reason in found.skipped.values())
    assert scored.count("base_losses") == 1, "the base is scored once for all points"
    assert scored.count("compare_with_base") == len(points)
    before = len(scored), len(converted)
    again = sweep(run_dir=run, **BUDGETS, overrides=SETTINGS)
    assert (len(scored), len(converted)) == before and again.tables == found.tables
    rows = [row[0] for row in found.tables[0].rows]
    assert rows == ["base", *points]
    results = json.loads((run / "sweep/comparison.json").read_text())
    assert list(results["models"]) == rows and set(results["pareto"]["perplexity/kv"]) <= set(rows)
    shares = [results["models"][name]["cost"]["kv_bytes_per_token"]["ratio_to_base"] for name in points]
    assert all(share <= 0.8 for share in shares)
    summary = json.loads((run / "sweep/sweep.json").read_text())
    assert [point["impossible"] is None for point in summary["points"]] == [True, False] * 2
    assert (run / "sweep/pareto.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.slow
def test_other_settings_make_a_point_anew_and_weights_may_go(run):
    sweep(run_dir=run, followers=[2], discard=True, overrides=SETTINGS)
    place = RunDir(run / "sweep/followers2-early-both")
    assert place.is_complete("eval") and not place.output("convert").exists()
    first = json.loads((place.output("eval") / "results.json").read_text())
    sweep(run_dir=run, followers=[2], discard=True, overrides=SETTINGS)
    assert json.loads((place.output("eval") / "results.json").read_text()) == first
    sweep(run_dir=run, followers=[2], overrides=[*SETTINGS, "evaluation.tokens=256"])
    second = json.loads((place.output("eval") / "results.json").read_text())
    assert second["settings"]["text"]["windows"] != first["settings"]["text"]["windows"]
    assert place.is_complete("convert")


def test_faults_are_told_before_anything_is_done(run):
    with pytest.raises(RecipeError, match="unknown kind 'sotfmax'"):
        sweep(run_dir=run, kv=[0.9], kinds=[["softmax"], ["sotfmax"]], overrides=SETTINGS)
    with pytest.raises(RecipeError, match=r"layout\.kv must be at most 1"):
        sweep(run_dir=run, kv=[0.9, 1.5], overrides=SETTINGS)
    with pytest.raises(StageError, match="no point of the sweep is possible"):
        sweep(run_dir=run, kv=[0.1], overrides=SETTINGS)
    (run / "analysis/stage.json").unlink()
    with pytest.raises(StageError, match="analyze"):
        sweep(run_dir=run, kv=[0.9], overrides=SETTINGS, options=RunOptions(force=True))


def test_force_replaces_whatever_has_the_name_but_not_what_a_link_leads_to(run):
    (run / "elsewhere").mkdir()
    (run / "elsewhere" / "dear").write_text("x")
    (run / "sweep").symlink_to("elsewhere")
    with pytest.raises(StageError, match="no point of the sweep is possible"):
        sweep(run_dir=run, kv=[0.1], overrides=SETTINGS, options=RunOptions(force=True))
    assert not (run / "sweep").is_symlink() and (run / "elsewhere" / "dear").exists()


@pytest.mark.parametrize(
    ("kinds", "search"), [("softmax", "fast"), ("key", "fast"), ("linear", "scores"), ("softmax kv", "scores")]
)
def test_what_maps_alone_cannot_find_is_searched_by_scores(kinds, search):
    point = SweepPoint("kv", 0.8, tuple(kinds.split()), "both")
    assert f"layout.search={search}" in point.overrides("fast")
    assert "layout.search=scores" in point.overrides("scores")


def test_plans_are_scored_once_for_all_points_of_a_fit(run, monkeypatch):
    """Those of the run among them; what a point adds is there for the next."""
    tried, convert = [], Alone.convert

    def recorded(self, plans):
        tried.extend((plan.kind, plan.compensation) for plan in plans)
        return convert(self, plans)

    monkeypatch.setattr(Alone, "convert", recorded)
    few = [*SETTINGS, "conversion.tokens=256", "layout.score_tokens=128", "layout.protect=[1, 2, 3]"]
    few += ["layout.shortlist=1", "layout.search=scores"]
    uniattn_cli.score(run_dir=run, overrides=[*few, "layout.kinds=[linear]"], options=CPU)
    assert tried == [("linear", "full")] * 2
    found = {}
    for name, kinds, solve in (
        ("one", "linear", "both"),
        ("two", "linear, none", "both"),
        ("three", "none, linear", "both"),
        ("other", "linear", "compensation"),
    ):
        recipe = Recipe.load(run / "recipe.yaml", [*few, f"layout.kinds=[{kinds}]", f"conversion.solve={solve}"])
        place = RunDir(run / "sweep" / name)
        module._begin(RunDir(run), place, recipe, {})
        with module._scores_shared(RunDir(run), place, recipe, base_of(recipe), CPU):
            uniattn_cli.group(run_dir=place.root, options=CPU)
        found[name] = place.output("score").resolve(), len(tried)
    added = run / "sweep" / "plans"
    # Another fit has others.
    assert [count for _, count in found.values()] == [2, 4, 4, 6] and len(list(added.iterdir())) == 2
    assert found["one"][0] == run / "scores" and found["two"][0] == found["three"][0]
    assert {folder.parent.parent for folder, _ in list(found.values())[1:]} == {added}


@pytest.mark.slow
def test_kinds_are_searched_by_scores(run):
    found = sweep(run_dir=run, kv=[0.8], kinds=[["softmax"], ["softmax", "kv"]], overrides=SETTINGS)
    assert [row[0] for row in found.tables[0].rows][1:] == ["kv0.8-softmax-both", "kv0.8-softmax+kv-both"]
    recipe = (run / "sweep/kv0.8-softmax+kv-both/recipe.yaml").read_text()
    assert "search: scores" in recipe


def test_the_command(run, uniattn):
    words = [word for setting in SETTINGS for word in ("--set", setting)]
    done = uniattn("sweep", "--kv", "0.8,0.2", "--device", "cpu", *words, cwd=run)
    assert done.returncode == 0, done.stderr
    assert "1 of 2 points scored" in done.stdout and "kv0.2-early-both" in done.stdout
    assert "Traceback" not in done.stderr
    done = uniattn("sweep", "--kv", "much", cwd=run)
    assert done.returncode == 2 and "not a list of numbers" in done.stderr
    assert cache.cache_directory() is None
