"""The recipe: strict reading with every fault at once, overrides, and the commented file that `analyze` writes."""

from __future__ import annotations

import dataclasses
import typing
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from uniattn_cli.cli import settings
from uniattn_cli.errors import RecipeError
from uniattn_cli.recipe.files import commented_tree, read_tree, write_tree
from uniattn_cli.recipe.schema import DatasetSpec, ModelSpec, Recipe, TrainStage


def faults(text: str, tmp_path: Path, *overrides: str) -> list[str]:
    path = tmp_path / "recipe.yaml"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(RecipeError) as caught:
        Recipe.load(path, overrides)
    return caught.value.faults


def load(text: str, tmp_path: Path, *overrides: str) -> Recipe:
    path = tmp_path / "recipe.yaml"
    path.write_text(text, encoding="utf-8")
    return Recipe.load(path, overrides)


MODEL = "model: {name: some/model}\n"


def test_the_file_that_analyze_writes_reads_back_as_the_defaults(tmp_path):
    path = tmp_path / "recipe.yaml"
    write_tree(commented_tree(Recipe(model=ModelSpec(name="some/model"))), path)
    recipe = Recipe.load(path)
    assert recipe == dataclasses.replace(Recipe(), model=dataclasses.replace(recipe.model, name="some/model"))
    text = path.read_text(encoding="utf-8")
    assert "# calibration tokens" in text, "settings carry their comment"


def test_all_faults_are_reported_at_once_with_line_and_nearest_name(tmp_path):
    text = (
        "model:\n  name: some/model\nanalysis:\n  tokns: 128\n  length: 8\n  top_k: many\nconversion:\n  solve: bth\n"
    )
    found = faults(text, tmp_path)
    assert found == [
        "recipe.yaml, line 4: unknown key 'analysis.tokns' (did you mean 'tokens'?)",
        "recipe.yaml, line 5: analysis.length must be at least 16, not 8",
        "recipe.yaml, line 6: analysis.top_k must be a whole number, not 'many'",
        "recipe.yaml, line 8: conversion.solve must be one of both, compensation, output, none, reference, "
        "not 'bth' (did you mean 'both'?)",
    ]


@pytest.mark.parametrize(
    ("text", "part"),
    [
        ("- a\n- b\n", "the file must be a mapping of settings, not a list"),
        ("model: [\n", "line 2: not valid YAML"),
        ("seed: 1\nseed: 2\n" + MODEL, "not valid YAML"),
        ("model: " + 300 * "[", "not valid YAML"),
        (MODEL + "train: &t {batch_size: 4, <<: *t}\n", "not valid YAML"),
        (MODEL + f"seed: {'9' * 5000}\n", "not valid YAML"),
        ("model: some/model\n", "line 1: model must be a mapping of settings, not 'some/model'"),
        ("", "model.name is missing"),
        (MODEL + "modle: {}\n", "line 2: unknown key 'modle' (did you mean 'model'?)"),
        (MODEL + "format: 2\n", "format must be at most 1, not 2"),
        (MODEL + "seed: true\n", "seed must be a whole number, not True"),
        (MODEL + "seed: 1.5\n", "seed must be a whole number, not 1.5"),
        (MODEL + "seed:\n", "seed must be a whole number, not empty"),
        (MODEL + "layout: {kv: 0}\n", "layout.kv must be greater than 0, not 0"),
        (MODEL + "train: {warmup: .inf}\n", "train.warmup must be a finite number, not inf"),
        (MODEL + f"train: {{warmup: {10**400}}}\n", "train.warmup must be a finite number, not inf"),
        (MODEL + f"seed: {10**400}\n", "seed must be at most"),
        (MODEL + f"train: {{max_length: {10**12}}}\n", "train.max_length must be at most 2147483647, not"),
        (MODEL + f"layout: {{protect: [{-(10**30)}]}}\n", "layout.protect[0] must be at least -2147483648, not"),
        (MODEL + "layout: {kv: 0.5, followers: 3}\n", "only one budget can be given, not followers and kv"),
        (MODEL + "layout: {protect: 3}\n", "layout.protect must be a list, not 3"),
        (MODEL + "layout: {protect: [a]}\n", "layout.protect[0] must be a whole number, not 'a'"),
        (MODEL + "train: {batch_size: 6}\n", "(6) must be a multiple of train.micro_batch_size (4)"),
        (MODEL + "train: {stages: []}\n", "train.stages is empty"),
        (MODEL + "train: {stages: [{trains: all}, {trains: all}]}\n", "two stages have the same name"),
        (MODEL + "train: {stages: [{trains: al}]}\n", "train.stages[0].trains must be one of"),
        (MODEL + "train: {stages: [{lora: {rank: 4}}]}\n", "train.stages[0].lora is only for trains: lora"),
        (MODEL + "synthesis: {temperature: 1e-30}\n", "synthesis.temperature must be 0 or at least 0.001, not 1e-30"),
        (MODEL + "conversion: {rank: half}\n", "conversion.rank must be one of auto, full"),
        (MODEL + "conversion: {rank: 0}\n", "conversion.rank must be at least 1"),
    ],
)
def test_faults(text, part, tmp_path):
    found = faults(text, tmp_path)
    assert any(part in fault for fault in found), found
    assert all(fault.startswith("recipe.yaml") for fault in found), "every fault names the file"


def test_a_contradiction_that_an_override_brings_in_names_the_override(tmp_path):
    kinds = "--set layout.kinds=[erly]: layout.kinds: unknown kind 'erly' (did you mean 'early'?)"
    assert faults(MODEL, tmp_path, "layout.kinds=[erly]") == [kinds], "only that, and nothing of the fast search"
    assert faults(MODEL, tmp_path, "layout.kinds=[]") == [
        "--set layout.kinds=[]: layout.kinds is empty; name at least one kind"
    ]


@pytest.mark.parametrize("value", ["[", 300 * "[", "&t [a, *t]", "[{a: &t {b: 3, <<: *t}}]", "9" * 5000])
def test_a_value_that_cannot_be_parsed_is_one_fault(value, tmp_path):
    assert faults(MODEL, tmp_path, f"data.train={value}") == [f"--set data.train={value}: the value is not valid YAML"]


def test_what_is_no_number_is_one_fault(tmp_path):
    words = "layout.kv must be a finite number, not nan"
    assert faults(MODEL, tmp_path, "layout.kv=nan") == [f"--set layout.kv=nan: {words}"]
    assert faults(MODEL + "layout: {kv: .nan}\n", tmp_path) == [f"recipe.yaml, line 2: {words}"]


def test_values_that_yaml_and_users_write_differently(tmp_path):
    text = MODEL + "train:\n  stages:\n    - {trains: all, learning_rate: 1e-4, epochs: 2}\ndata: {train: rows.jsonl}\n"
    recipe = load(text, tmp_path)
    assert recipe.train.stages == (TrainStage(trains="all", learning_rate=1e-4, epochs=2.0),)
    assert isinstance(recipe.train.stages[0].epochs, float)
    assert recipe.data.train == (DatasetSpec(source="rows.jsonl"),)


def test_overrides_win_over_the_file_and_create_sections(tmp_path):
    recipe = load(
        MODEL + "analysis: {tokens: 128}\n",
        tmp_path,
        "analysis.tokens=256",
        "layout.kv=0.5",
        "train.stages=[{trains: followers, steps: 3}]",
        "evaluation.speed.enabled=false",
    )
    assert recipe.analysis.tokens == 256
    assert recipe.layout.kv == 0.5
    assert recipe.train.stages == (TrainStage(trains="followers", steps=3),)
    assert recipe.evaluation.speed.enabled is False


def test_a_fault_in_an_override_names_the_override_not_a_line(tmp_path):
    found = faults(
        MODEL + "analysis:\n  tokens: 128\n",
        tmp_path,
        "analysis.tokens=3",
        "modl.name=x",
        "train.stages=[{trains: all, steps: 0}]",
    )
    assert found == [
        "--set analysis.tokens=3: analysis.tokens must be at least 64, not 3",
        "--set modl.name=x: unknown key 'modl' (did you mean 'model'?)",
        "--set train.stages=[{trains: all, steps: 0}]: train.stages[0].steps must be at least 1, not 0",
    ]


@pytest.mark.parametrize("override", ["analysis.tokens", "=3", "analysis.tokens=[1", "", "a b"])
def test_an_override_that_cannot_be_read(override, tmp_path):
    (fault,) = faults(MODEL, tmp_path, override)
    assert fault.startswith(f"--set {override}: ")


def test_a_missing_file_says_where_it_was_looked_for_and_how_to_get_one(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(RecipeError) as caught:
        read_tree(Path("recipe.yaml"))
    looked = tmp_path / "recipe.yaml"
    assert str(caught.value) == (
        f"recipe.yaml: no such file (looked for {looked}); `uniattn analyze MODEL` writes a recipe.yaml"
    )


def test_comments_and_order_survive_writing(tmp_path):
    path = tmp_path / "recipe.yaml"
    text = "# mine\nseed: 3  # lucky\n\nmodel:\n  # which\n  name: some/model\n"
    path.write_text(text, encoding="utf-8")
    tree = read_tree(path)
    tree["seed"] = 4
    write_tree(tree, path)
    assert path.read_text(encoding="utf-8") == text.replace("3", "4")


scalars = st.none() | st.booleans() | st.integers(-3, 3) | st.floats(allow_nan=False) | st.text(max_size=5)
names = st.sampled_from(["model", "name", "data", "train", "layout", "stages", "layers", "kv", "tasks", "source", "x"])
trees = st.recursive(
    scalars, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(names, inner, max_size=4), max_leaves=12
)


@given(trees, st.lists(st.tuples(names, names, scalars), max_size=2))
def test_any_tree_is_a_recipe_or_a_recipe_error(tree, settings):
    overrides = [f"{section}.{name}={value!r}" for section, name, value in settings]
    try:
        recipe = Recipe.from_tree(tree, "recipe.yaml", overrides)
    except RecipeError as error:
        assert error.faults
    else:
        assert recipe.model.name


def test_every_setting_is_documented_and_listed():
    listed = {entry.key: entry for entry in settings.settings()}
    assert len(listed) > 60
    assert all(entry.help and entry.allowed for entry in listed.values())
    for key in ("seed", "layout.head_map", "train.stages[].learning_rate", "data.train[].source"):
        assert key in listed
    assert listed["analysis.tokens"].default == str(Recipe().analysis.tokens)
    assert listed["analysis.tokens"].allowed == "whole number, >= 64"
    assert settings.choices("layout.head_map") == ("identity", "grouped", "free")


def test_every_plain_default_is_a_value_that_the_reader_accepts(tmp_path):
    for entry in settings.settings():
        if "[]" in entry.key or entry.key == "model.name":
            continue
        default = entry.default
        recipe = load(MODEL, tmp_path, f"{entry.key}={default}")
        value: typing.Any = recipe
        plain: typing.Any = Recipe()
        for name in entry.key.split("."):
            value, plain = getattr(value, name), getattr(plain, name)
        assert value == plain, entry.key
