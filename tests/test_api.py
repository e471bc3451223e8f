"""The package as a library: what it exports, and how its functions are called."""

from __future__ import annotations

import hashlib
import inspect
import json
import pickle
import shutil
from pathlib import Path

import pytest
from tiny_run import TEMPLATE, make_model, settings, write_data
from typer.testing import CliRunner

import uniattn_cli
from uniattn_cli.cli import guard
from uniattn_cli.cli.app import app
from uniattn_cli.commands.sweep import _begin
from uniattn_cli.errors import ModelError
from uniattn_cli.models.hub import locate
from uniattn_cli.options import RunOptions
from uniattn_cli.recipe.paths import located
from uniattn_cli.recipe.schema import Recipe
from uniattn_cli.run.directory import RunDir

PACKAGE = Path(uniattn_cli.__file__).parent
COMMANDS = [path.stem for path in sorted((PACKAGE / "commands").glob("[!_]*.py"))]


def test_every_command_is_exported():
    assert set(uniattn_cli.__all__) == {*COMMANDS, "__version__", "Recipe", "RunOptions", "UniAttnError", "load"}
    for name in uniattn_cli.__all__:
        assert getattr(uniattn_cli, name) is not None
    with pytest.raises(AttributeError, match="no attribute 'anlyze'"):
        _ = uniattn_cli.anlyze


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_has_the_same_order_of_arguments(name):
    """Inputs, and by keyword: run directory, recipe, what only this command has, overrides, options."""
    parameters = inspect.signature(getattr(uniattn_cli, name)).parameters.values()
    by_keyword = [each.name for each in parameters if each.kind is each.KEYWORD_ONLY]
    place = {"run_dir": 0, "recipe": 1, "overrides": 3, "options": 4}
    assert by_keyword == sorted(by_keyword, key=lambda key: place.get(key, 2))
    assert not set(place) & {each.name for each in parameters if each.kind is not each.KEYWORD_ONLY}


# --- paths ------------------------------------------------------------------------------------------------------------

RECIPE = """
model: {name: ../model}
data: {train: rows.jsonl, text: [text.txt], chat_template: chat.jinja}
layout: {groups: layout.yaml}
evaluation: {tasks: [items.jsonl, {source: text.txt, name: words}]}
"""
LAYOUT = "- {kind: own}\n- {kind: softmax, leader: 0}\n" + 4 * "- {kind: own}\n"
ITEM = {"query": "After 1 comes", "choices": ["2", "7"], "gold": 0}
# The files of `RECIPE` are not overridden; the folder of scores and reports is small.
SMALL = [one for one in settings() if one.partition("=")[0] not in ("data.train", "data.text", "evaluation.tasks")]


def make_run(root: Path) -> Path:
    """`model/`, and `run/` with a recipe that names it, data, template, layout and tasks by relative paths."""
    run = root / "run"
    run.mkdir(parents=True)
    make_model(root / "model")
    write_data(run)
    (run / "recipe.yaml").write_text(RECIPE, encoding="utf-8")
    (run / "chat.jinja").write_text(TEMPLATE, encoding="utf-8")
    (run / "layout.yaml").write_text(LAYOUT, encoding="utf-8")
    (run / "items.jsonl").write_text(2 * (json.dumps(ITEM) + "\n"), encoding="utf-8")
    return run


@pytest.fixture(scope="module")
def fresh(tmp_path_factory):
    return make_run(tmp_path_factory.mktemp("fresh"))


def outcome(run: Path) -> dict:
    """What must not depend on where a run was started."""
    results = json.loads((run / "evaluation" / "results.json").read_text(encoding="utf-8"))
    records = [json.loads((run / name / "stage.json").read_text(encoding="utf-8")) for name in ("converted", "trained")]
    return {
        "recipe": (run / "recipe.yaml").read_text(encoding="utf-8"),
        "settings": [record["settings"] for record in records],
        "inputs": [record["inputs"] for record in records],
        "weights": hashlib.sha256((run / "trained" / "model.safetensors").read_bytes()).hexdigest(),
        "scores": {name: (model["quality"], model["tasks"]) for name, model in results["models"].items()},
        "data": results["settings"],
    }


@pytest.mark.slow
def test_a_run_is_the_same_from_its_folder_in_python_and_from_elsewhere_with_c(fresh, tmp_path, monkeypatch):
    monkeypatch.setattr(guard, "quiet_libraries", lambda warn: None)
    options = RunOptions(device="cpu")
    outcomes = []
    for way in ("python", "-C"):
        shutil.copytree(fresh.parent, tmp_path / way)
        if way == "python":
            monkeypatch.chdir(tmp_path / way / "run")
            for stage in (uniattn_cli.analyze, uniattn_cli.convert, uniattn_cli.train, uniattn_cli.evaluate):
                stage(overrides=SMALL, options=options)
        else:
            monkeypatch.chdir(tmp_path / way)
            flags = ["-C", "run", "--device", "cpu", *(word for one in SMALL for word in ("--set", one))]
            for name in ("analyze", "convert", "train", "eval"):
                done = CliRunner().invoke(app, [name, *flags])
                assert done.exit_code == 0, done.output
        outcomes.append(outcome(tmp_path / way / "run"))
    assert outcomes[0] == outcomes[1]


def test_what_was_written_stays_and_is_looked_for_beside_the_recipe(fresh, monkeypatch):
    run = RunDir(fresh)
    recipe = Recipe.load(run.recipe)
    assert (recipe.model.name, recipe.data.train[0].source, recipe.layout.groups) == (
        "../model",
        "rows.jsonl",
        "layout.yaml",
    )
    assert locate(recipe.model.name).path == fresh / ".." / "model"
    assert located(pickle.loads(pickle.dumps(recipe)).data.chat_template) == fresh / "chat.jinja"
    # OWNER/NAME is on the hub, unless there is such a directory beside the recipe.
    owned = Recipe.load(run.recipe, ["model.name=owner/name"]).model.name
    with pytest.raises(ModelError, match="owner/name is neither a directory nor"):
        locate(owned)
    shutil.copytree(fresh / ".." / "model", fresh / "owner" / "name")
    assert locate(owned).path == fresh / "owner" / "name"
    # An interrupted run goes on from any folder.
    record = json.loads(json.dumps({"settings": recipe.to_dict(), "inputs": {}}))
    run.partial("train").mkdir()
    (run.partial("train") / "started.json").write_text(json.dumps(record), encoding="utf-8")
    monkeypatch.chdir(fresh)
    assert RunDir(".").changes("train", Recipe.load("recipe.yaml"), {}) == []


def test_a_recipe_that_is_written_elsewhere_takes_its_paths_along(fresh, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    analysis = uniattn_cli.analyze(
        run_dir="a/b", recipe=fresh / "recipe.yaml", overrides=SMALL, options=RunOptions(device="cpu")
    )
    assert analysis.directory == Path("a/b/analysis")
    written = Recipe.load("a/b/recipe.yaml")
    names = (written.model.name, written.data.train[0].source, written.data.chat_template, written.layout.groups)
    files = (fresh.parent / "model", fresh / "rows.jsonl", fresh / "chat.jinja", fresh / "layout.yaml")
    for name, file in zip(names, files, strict=True):
        assert not Path(name).is_absolute() and located(name).resolve() == file.resolve()
    assert uniattn_cli.convert(run_dir="a/b", dry_run=True).layout.followers == [1]


def test_a_layout_file_is_an_argument_and_then_a_path_of_the_recipe(fresh, tmp_path, monkeypatch):
    shutil.copytree(fresh.parent, tmp_path / "copy")
    monkeypatch.chdir(tmp_path)
    Path("mine.yaml").write_text(LAYOUT, encoding="utf-8")
    uniattn_cli.group(run_dir="copy/run", groups="mine.yaml", overrides=["layout.head_map=identity"])
    assert Recipe.load("copy/run/recipe.yaml").layout.groups == "../../mine.yaml"


def test_a_point_of_a_sweep_finds_the_files_of_the_run(fresh):
    run, point = RunDir(fresh), RunDir(fresh / "sweep" / "point")
    _begin(run, point, Recipe.load(run.recipe), {})
    settings = Recipe.load(point.recipe)
    assert located(settings.model.name).resolve() == fresh.parent / "model"
    assert located(settings.data.train[0].source).resolve() == fresh / "rows.jsonl"
    assert located(settings.evaluation.tasks[1].source).resolve() == fresh / "text.txt"
