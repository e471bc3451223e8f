"""`uniattn compare`: what may be put side by side, what is refused, and the Pareto front."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from test_evaluation import make_model, make_run, make_tokenizer

from uniattn_cli.commands import evaluate
from uniattn_cli.commands.compare import compare
from uniattn_cli.errors import ModelError, StageError
from uniattn_cli.evaluation import cache, comparison, figures
from uniattn_cli.models import building
from uniattn_cli.options import RunOptions

NO_SPEED = "evaluation.speed.enabled=false"
SETTINGS = ("evaluation.tokens=192", "evaluation.lengths=[64]", "evaluation.length_tokens=128", NO_SPEED)
IGNORED = shutil.ignore_patterns("evaluation", "comparison")


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> Path:
    """Two run directories of one base, evaluated alike, and a checkpoint of its own."""
    root = tmp_path_factory.mktemp("runs")
    (root / "one").mkdir()
    make_run(root / "one")
    shutil.copytree(root / "one", root / "two")
    other = make_model()
    with torch.no_grad():
        other.lm_head.weight.add_(torch.randn_like(other.lm_head.weight) * 0.3)
    building.save_checkpoint(other, make_tokenizer(), root / "damaged")
    for name in ("one", "two"):
        evaluate.evaluate(run_dir=root / name, overrides=SETTINGS)
    return root


def test_results_of_two_runs(runs, tmp_path):
    found = compare([str(runs / "one"), str(runs / "two/evaluation/results.json")], run_dir=tmp_path)
    assert list(found.merged.models) == ["base", "one/converted", "two/converted"]
    written = json.loads((tmp_path / "comparison/comparison.json").read_text())
    one = json.loads((runs / "one/evaluation/results.json").read_text())
    assert written["models"]["one/converted"] == one["models"]["converted"] and written["schema"] == figures.SCHEMA
    assert (tmp_path / "comparison/pareto.png").read_bytes().startswith(b"\x89PNG")
    text = (tmp_path / "comparison/comparison.md").read_text()
    assert "two/converted" in text and "uniattn compare" in text
    assert any("Speed is not compared" in note for note in found.notes)
    with pytest.raises(StageError, match="--force"):
        compare([str(runs / "one")], run_dir=tmp_path)


def test_checkpoints_are_evaluated_alike_and_join_results(runs, monkeypatch, tmp_path):
    monkeypatch.setenv(cache.VARIABLE, str(tmp_path))
    inputs = [str(runs / "damaged"), str(runs / "two")]
    options = RunOptions(force=True)
    found = compare(inputs, run_dir=runs / "one", overrides=SETTINGS, options=options)
    assert list(found.merged.models) == ["base", str(runs / "damaged"), "two/converted"]
    assert found.merged.models[str(runs / "damaged")]["verdict"]["quality"] == "worse"
    assert (found.directory / "evaluation/items").is_dir()
    with pytest.raises(StageError, match="differ in length 64"):
        compare(inputs, run_dir=runs / "one", overrides=[*SETTINGS, "evaluation.length_tokens=192"], options=options)
    assert found.directory.is_dir(), "what stood there before a refusal is kept"


def test_what_was_scored_otherwise_is_refused(runs, tmp_path):
    shutil.copytree(runs / "one", tmp_path / "three", ignore=IGNORED)
    evaluate.evaluate(run_dir=tmp_path / "three", overrides=[*SETTINGS, "evaluation.limit=5"])
    with pytest.raises(StageError, match="differ in task choose"):
        compare([str(runs / "one"), str(tmp_path / "three")], run_dir=tmp_path)
    results = json.loads((runs / "one/evaluation/results.json").read_text())
    results["identity"]["quality"]["base"] = "another"
    (tmp_path / "other.json").write_text(json.dumps(results))
    with pytest.raises(StageError, match="bases differ"):
        compare([str(runs / "one"), str(tmp_path / "other.json")], run_dir=tmp_path)
    for schema, words in ((1, "has schema 1"), (None, "not the result")):
        content = {**results, "schema": schema} if schema else {"models": {}}
        (tmp_path / "old.json").write_text(json.dumps(content))
        with pytest.raises(StageError, match=words):
            compare([str(tmp_path / "old.json")], run_dir=tmp_path)
    assert not (tmp_path / "comparison").exists()


def test_what_is_nothing_to_compare_is_told(runs, tmp_path):
    (tmp_path / "empty").mkdir()
    with pytest.raises(StageError, match="neither a checkpoint"):
        compare([str(tmp_path / "empty")], run_dir=runs / "one", overrides=SETTINGS)
    shutil.copy(runs / "one/recipe.yaml", tmp_path / "empty")
    with pytest.raises(StageError, match="has not been evaluated"):
        compare([str(tmp_path / "empty")], run_dir=runs / "one", overrides=SETTINGS)
    with pytest.raises(ModelError, match="the base itself"):
        compare([str(runs / "one/base")], run_dir=runs / "one", overrides=SETTINGS, options=RunOptions(force=True))
    with pytest.raises(StageError, match=r"missing\.json is missing"):
        compare([str(tmp_path / "missing.json")], run_dir=tmp_path)


def model(perplexity: float, kv: float, speed: float | None = None, **settings) -> dict:
    cost = {"kv_bytes_per_token": figures.Figure(kv, "bytes per token", "lower")}
    if speed is not None:
        cost["tokens_per_second"] = figures.Figure(9.0, "tokens per second", "higher", ratio_to_base=speed)
    quality = {"perplexity": figures.Figure(perplexity, "perplexity", "lower")}
    return {"role": "given", "quality": quality, "cost": cost, "verdict": None, **settings}


def test_the_pareto_front_holds_models_that_no_other_beats():
    models = {
        "base": model(10.0, 100.0, 1.0, role="base"),
        "good": model(11.0, 80.0, 1.1),
        "worse": model(12.0, 80.0, 1.2),
        "twin": model(11.0, 80.0, 1.0),
        "small": model(20.0, 50.0, 0.9),
        "untimed": model(9.0, 70.0),
    }
    assert comparison.pareto({name: one for name, one in models.items() if name != "untimed"}, "perplexity", "kv") == [
        "base", "good", "twin", "small",
    ]  # fmt: skip
    assert comparison.pareto(models, "perplexity", "kv") == ["small", "untimed"]
    assert comparison.pareto(models, "perplexity", "speed") == ["base", "good", "worse"]


def test_speeds_of_different_backends_are_not_compared():
    def part(label: str, **speed) -> comparison.Part:
        identity = {"quality": {"base": "b"}, "speed": {"device": "cpu", "attention": "sdpa", **speed}}
        models = {"base": model(10.0, 100.0, 1.0, role="base"), "converted": model(11.0, 80.0, 1.1)}
        return comparison.Part(label, {"models": models, "tasks": [], "notes": [], "identity": identity}, label)

    alike = comparison.merge([part("a"), part("b")])
    assert set(alike.fronts) == {"perplexity/kv", "perplexity/speed"} and comparison.APART in alike.notes
    assert list(alike.models) == ["base", "a/converted", "b/converted"]
    differ = comparison.merge([part("a"), part("b", attention="eager")])
    assert set(differ.fronts) == {"perplexity/kv"}
    assert any("attention sdpa and eager" in note for note in differ.notes)


def test_the_command(runs, tmp_path, uniattn):
    done = uniattn("compare", runs / "one", runs / "two", "-C", tmp_path)
    assert done.returncode == 0, done.stderr
    assert "3 models compared" in done.stdout and "two/converted" in done.stdout
    done = uniattn("compare", runs / "one", tmp_path / "nothing.json", "-C", tmp_path, "--force")
    assert done.returncode == 1 and done.stderr.startswith("error: ") and "Traceback" not in done.stderr
