"""Which models a run has, and what a name means there."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from uniattn_cli.errors import ModelError, StageError
from uniattn_cli.models.of_run import find, newest, own_models, with_given
from uniattn_cli.recipe.schema import Recipe
from uniattn_cli.run.directory import RunDir


def make(folder: Path, finished: str | None = None) -> Path:
    folder.mkdir(parents=True)
    (folder / "config.json").write_text("{}", encoding="utf-8")
    if finished is not None:
        (folder / "stage.json").write_text(json.dumps({"inputs": {}, "finished": finished}), encoding="utf-8")
    return folder


@pytest.fixture
def run(tmp_path) -> RunDir:
    make(tmp_path / "model")
    run = RunDir(tmp_path / "run")
    make(run.output("convert"), "2026-01-01T12:00:00")
    make(run.output("train"), "2026-01-01T11:00:00")
    run.recipe.write_text(f"model: {{name: {tmp_path / 'model'}}}\n", encoding="utf-8")
    return run


def test_names_of_a_run_mean_its_models_wherever_one_stands(run, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    make(tmp_path / "trained")
    make(tmp_path / "base")
    assert find(run, "base").path == tmp_path / "model"
    assert find(run, "./base").path == Path("base")
    assert find(run, "trained").path == run.output("train")
    assert find(run, "./trained").path == Path("trained")


def test_what_is_not_there_is_told(run, tmp_path):
    with pytest.raises(StageError, match=r"control is missing; run `uniattn train recipe\.yaml --control` first"):
        find(run, "control")
    with pytest.raises(StageError, match=r"'base' is the model of recipe\.yaml, which does not exist here"):
        find(RunDir(tmp_path), "base")
    with pytest.raises(ModelError, match="no such directory"):
        find(run, "./nowhere")


def test_the_newest_model_is_that_of_the_stage_that_finished_last(run, tmp_path):
    assert newest(run) == run.output("convert")
    make(run.output("control"), "2026-01-01T13:00:00")
    assert newest(run) == run.output("convert"), "a control is no result"
    (run.output("convert") / "stage.json").unlink()
    assert newest(run) == run.output("train")
    with pytest.raises(StageError, match=r"has neither trained/ nor converted/; give a checkpoint, or run"):
        newest(RunDir(tmp_path))


def test_models_have_one_name_and_one_role_each(run, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    own = own_models(run, Recipe.load(run.recipe))
    assert [(model.name, model.role) for model in own] == [(name, name) for name in ("base", "converted", "trained")]
    make(tmp_path / "base")
    models, notes = with_given(own, ["base", "run/converted", "model"])
    assert [(model.name, model.role) for model in models[3:]] == [("./base", "given")]
    assert notes == [f"{name} is already included and counted once." for name in ("run/converted", "model")]
