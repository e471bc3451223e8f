"""The ready recipes: each one valid and explained, listed, shown, copied, usable by name, and installed."""

from __future__ import annotations

import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from uniattn_cli.data.templates import BUILTIN
from uniattn_cli.errors import RecipeError, StageError, UsageError
from uniattn_cli.recipe import ready
from uniattn_cli.recipe.schema import DistillationSpec, Recipe

ROOT = Path(__file__).resolve().parent.parent
EXPECTED = {
    "distilled", "gemma-3-1b", "gemma-3-270m", "llama-3.1-8b-pmc", "llama-3.1-8b-tulu3", "memory", "quick",
    "qwen3-0.6b", "qwen3-1.7b", "qwen3-4b", "qwen3-8b",
}  # fmt: skip
FILES = sorted((ROOT / "recipes").rglob("*.yaml"))


def test_all_expected_recipes_are_there():
    assert set(ready.names()) >= EXPECTED
    assert {path.stem for path in FILES} == set(ready.names()), "a recipe in a folder would never be found"


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_every_ready_recipe_is_valid_and_explains_itself(path):
    entry = ready.load(path.stem)
    recipe = entry.recipe
    assert recipe == Recipe.load(path)
    assert recipe.model.name.count("/") == 1, "a hub id"
    text = path.read_text(encoding="utf-8")
    assert 20 < len(entry.purpose) < 100 and text.startswith("# ")
    assert f"uniattn analyze --recipe {path.stem}" in text
    assert text.count(" # ") >= 3, "the choices are explained"
    assert recipe.data.chat_template in (None, *BUILTIN)
    # Base models have no template of their own.
    assert (recipe.data.chat_template is None) == ("Llama-3.1-8B" not in recipe.model.name)
    if "gemma" in recipe.model.name:
        assert all(stage.learning_rate <= 2e-5 for stage in recipe.train.stages)


def test_the_data_of_the_paper_is_used():
    sources = {name: ready.load(name).recipe.data.train[0].source for name in EXPECTED}
    assert sources["llama-3.1-8b-pmc"] == "axiong/pmc_llama_instructions"
    assert sources["llama-3.1-8b-tulu3"] == "allenai/tulu-3-sft-mixture"


def test_ready_recipes_are_what_recovered_most():
    """Of no recipe's kind or stages was another ahead in docs/benchmarks/training/refined.json and training.json.

    `memory` and the first look are for the least loss, whatever the time; all others save time.
    """
    recipes = {name: ready.load(name).recipe for name in EXPECTED}
    assert {name: recipe.layout.kinds for name, recipe in recipes.items() if recipe.layout.kinds != ("early",)} == {
        "memory": ("key",),
        "quick": ("key",),
    }
    assert all(len(recipe.train.stages) == 1 for recipe in recipes.values())
    for name in ("distilled", "memory"):
        assert recipes[name].train.distillation == DistillationSpec()
        assert [stage.loss for stage in recipes[name].train.stages] == ["distillation"]


def test_names_resolve_and_files_win(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert ready.resolve("qwen3-0.6b") == ROOT / "recipes" / "qwen3-0.6b.yaml"
    assert ready.resolve("recipe.yaml") == Path("recipe.yaml")
    assert ready.resolve("folder/quick") == Path("folder/quick")
    Path("quick").write_text("seed: 1\n")
    assert ready.resolve("quick") == Path("quick")
    with pytest.raises(UsageError, match=r"no ready recipe 'qwen3-06b' \(did you mean 'qwen3-0.6b'\?\)"):
        ready.resolve("qwen3-06b")


def test_an_installation_without_recipes_says_so(tmp_path, monkeypatch):
    monkeypatch.setattr(ready, "PACKAGE", tmp_path / "site-packages" / "uniattn_cli")
    other = tmp_path / "site-packages" / "recipes"
    other.mkdir(parents=True)
    (other / "soup.yaml").write_text("water: 1\n")  # another package's
    with pytest.raises(RecipeError, match="no ready recipes"):
        ready.names()


def test_list_show_and_copy(uniattn, tmp_path):
    listed = uniattn("recipes")
    assert listed.returncode == 0, listed.stderr
    for name in EXPECTED:
        assert name in listed.stdout and ready.load(name).recipe.model.name in listed.stdout
    source = (ROOT / "recipes" / "quick.yaml").read_text(encoding="utf-8")
    assert uniattn("recipes", "show", "quick").stdout == source
    copied = uniattn("recipes", "copy", "quick")
    assert copied.returncode == 0 and "uniattn analyze" in copied.stdout
    recipe = tmp_path / "recipe.yaml"
    assert recipe.read_text(encoding="utf-8") == source
    recipe.write_text("mine\n")
    refused = uniattn("recipes", "copy", "quick")
    assert refused.returncode == 1 and "--force" in refused.stderr and recipe.read_text() == "mine\n"
    assert uniattn("recipes", "copy", "quick", "--force").returncode == 0
    assert recipe.read_text(encoding="utf-8") == source
    assert uniattn("recipe", "--check", "recipe.yaml").returncode == 0
    missing = uniattn("recipes", "copy", "quick", "no/such/a.yaml")
    assert missing.returncode == 1 and "no such directory" in missing.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["recipe.yaml"]


def test_copies_go_into_folders_too(tmp_path):
    assert ready.copy("quick", tmp_path) == tmp_path / "recipe.yaml"
    assert ready.copy("quick", tmp_path / "other.yaml").is_file()
    with pytest.raises(StageError, match=r"recipe\.yaml exists"):
        ready.copy("quick", tmp_path)


@pytest.mark.parametrize("command", [["recipes", "show"], ["recipes", "copy"], ["analyze", "--recipe"], ["data"]])
def test_unknown_names_are_usage_errors_and_nothing_is_written(command, uniattn, tmp_path):
    done = uniattn(*command, "quik")
    assert done.returncode == 2 and "did you mean 'quick'?" in done.stderr and "Traceback" not in done.stderr
    assert not list(tmp_path.iterdir())


def test_the_two_commands_point_at_each_other(uniattn):
    assert "`uniattn recipes`" in uniattn("recipe", "--help").stdout
    assert "`uniattn recipe`" in uniattn("recipes", "--help").stdout


def test_analyze_starts_from_a_ready_recipe(tmp_path, monkeypatch):
    from tiny_run import make_model, settings, write_data

    from uniattn_cli import RunOptions, analyze

    make_model(tmp_path / "model")
    write_data(tmp_path)
    monkeypatch.chdir(tmp_path)
    quick = [entry for entry in settings() if entry.startswith(("data.", "analysis."))]
    analyze("model", recipe="quick", overrides=quick, options=RunOptions(device="cpu"))
    written = Recipe.load("recipe.yaml")
    assert written.train == ready.load("quick").recipe.train and written.model.name == str(tmp_path / "model")
    assert "five minutes on two CPU cores" in (tmp_path / "recipe.yaml").read_text(encoding="utf-8")


def test_all_packages_are_listed_for_installation():
    if sys.version_info < (3, 11):
        pytest.skip("tomllib")
    import tomllib

    settings = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["tool"]["setuptools"]
    folders = {path.parent for path in (ROOT / "uniattn_cli").rglob("*.py")}
    packages = {".".join(folder.relative_to(ROOT).parts) for folder in folders}
    assert set(settings["packages"]) == packages | {"uniattn_cli.recipes"}
    files = [
        path.relative_to(ROOT) for path in (ROOT / "uniattn_cli").rglob("*.*") if path.suffix not in (".py", ".pyc")
    ]
    given = {(package, pattern) for package, patterns in settings["package-data"].items() for pattern in patterns}
    assert given == {(".".join(file.parent.parts), file.name) for file in files} | {("uniattn_cli.recipes", "*.yaml")}


@pytest.mark.slow
def test_a_wheel_holds_every_recipe_the_template_of_the_card_and_the_list_of_the_corpus(tmp_path):
    """Needs setuptools in this environment, since nothing may be downloaded."""
    pytest.importorskip("setuptools", minversion="77")
    code = f"import setuptools.build_meta as b; print(b.build_wheel({str(tmp_path)!r}))"
    # In a copy, because building leaves folders behind.
    source = tmp_path / "source"
    tracked = subprocess.run(
        ["git", "ls-files", "-co", "--exclude-standard"], cwd=ROOT, capture_output=True, text=True, check=True
    ).stdout.splitlines()
    for name in tracked:
        if (ROOT / name).is_file():
            (source / name).parent.mkdir(parents=True, exist_ok=True)
            (source / name).write_bytes((ROOT / name).read_bytes())
    done = subprocess.run([sys.executable, "-c", code], cwd=source, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    wheel = zipfile.ZipFile(next(tmp_path.glob("*.whl")))
    names = set(wheel.namelist())
    assert {f"uniattn_cli/recipes/{name}.yaml" for name in ready.names()} <= names
    assert not any(name.startswith("recipes/") for name in names)
    assert {"uniattn_cli/publishing/model_card.md", "uniattn_cli/data/shared_docs.json"} <= names
    wheel.extractall(tmp_path / "installed")
    code = "import uniattn_cli.recipe.ready as r; print(r.folder(), len(r.names()))"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path / "installed", capture_output=True, text=True, check=True
    )
    assert done.stdout.split() == [str(tmp_path / "installed/uniattn_cli/recipes"), str(len(ready.names()))]
