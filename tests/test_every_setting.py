"""No setting of analysis, layout and conversion is read and then forgotten: each of them changes what comes out."""

from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from tiny_run import settings

import uniattn_cli
from uniattn_cli.layouts import speed
from uniattn_cli.layouts.choose import choose
from uniattn_cli.models import placement
from uniattn_cli.models.hub import locate
from uniattn_cli.models.loading import load_config
from uniattn_cli.options import RunOptions
from uniattn_cli.recipe.schema import AnalysisSpec, ConversionSpec, LayoutSpec, Recipe
from uniattn_cli.run.directory import RunDir

CPU = RunOptions(device="cpu")
FEW = {"analysis.tokens": 256, "conversion.tokens": 512, "layout.score_tokens": 128, "layout.kv": 0.8}
SEARCHED = {"layout.search": "scores", "layout.kv": 0.9, "layout.match": "maps", "layout.protect": "[1, 2]"}
LIMITED = {"layout.search": "scores", "layout.kinds": "[linear, none]", "layout.kv": "null", "layout.max_loss": 0.005}
PLAIN = {"layout.layers": "[{}, {}, {leader: 1}, {}, {kind: key, leader: 3}, {}]"}

# By setting: what it is changed to, and what else holds before and after.
ANALYSIS = {"tokens": 512, "length": 32, "max_distance": 2, "rows": 2, "top_k": 3}
LAYOUT = {
    "groups": ("every:2", {}),
    "followers": (1, {"layout.kv": "null"}),
    "kv": (0.9, {}),
    "params": (0.97, {"layout.kv": "null", "layout.kinds": "[softmax]"}),
    "max_loss": (0.002, LIMITED),
    "save": ("params", LIMITED),
    "speed": ("1.1@2x64", LIMITED | {"layout.max_loss": "null", "layout.speed": "1@2x64"}),
    "search": ("scores", {key: value for key, value in SEARCHED.items() if key != "layout.search"}),
    "kinds": ("[linear]", SEARCHED),
    "score_tokens": (256, SEARCHED),
    "head_map": ("free", {"layout.kinds": "[softmax]"}),
    "match": ("maps", {}),
    "shortlist": (1, SEARCHED | {"layout.kinds": "[softmax, kv]"}),
    "trial": (1024, SEARCHED | {"layout.kinds": "[softmax, kv]"}),
    "sources": ("one", {"layout.match": "maps"}),
    "max_group": (1, {"layout.sources": "one", "layout.kv": 0.75}),
    "protect": ("[2, 3]", {"layout.kv": 0.75}),
}
CONVERSION = {
    "tokens": (256, PLAIN),
    "length": (32, PLAIN),
    "solve": ("output", PLAIN),
    "rank": (4, PLAIN),
    "align": (5, PLAIN),
    "refine": (0, PLAIN),
    "target": ("residual", PLAIN),
    "holdout": (0.5, PLAIN),
}


@pytest.fixture
def run(tiny_runs, tmp_path, monkeypatch):
    folder = Path(shutil.copytree(tiny_runs / "analysed", tmp_path / "run"))
    monkeypatch.chdir(folder)
    return folder


def overrides(more):
    quick = dict(entry.split("=", 1) for entry in settings()) | FEW
    if "layout.layers" in more:  # any other setting of the layout would ask for another one
        quick = {key: value for key, value in quick.items() if not key.startswith("layout.")}
    return [f"{key}={value}" for key, value in (quick | more).items()]


def test_every_setting_is_tried():
    tried = {
        AnalysisSpec: ANALYSIS,
        LayoutSpec: LAYOUT | {"layers": None},
        ConversionSpec: CONVERSION | {"offload": None},
    }
    for spec, table in tried.items():
        assert {entry.name for entry in dataclasses.fields(spec)} == set(table)


USUAL = {}


def usual(outcome, more):
    """What comes out without a change; asked for in a run directory, computed once."""
    key = (outcome.__name__, tuple(more.items()))
    if key not in USUAL:
        USUAL[key] = outcome(more)
    return USUAL[key]


def measured(more):
    analysis = uniattn_cli.analyze(overrides=overrides(more), options=RunOptions(device="cpu", force=True)).measured
    content = dataclasses.asdict(analysis)
    for key in ("seconds", "forward_ratio"):
        content.pop(key)
    return json.dumps(content, default=lambda array: array.tolist())


@pytest.mark.parametrize("key", ANALYSIS)
def test_settings_of_the_analysis(key, run):
    assert usual(measured, {}) != measured({f"analysis.{key}": ANALYSIS[key]})


def chosen(more):
    recipe = Recipe.load("recipe.yaml", overrides(more))
    grouping = choose(RunDir("."), recipe, load_config(locate(recipe.model.name)), CPU)
    considered = grouping.considered
    layouts = [grouping.layout.to_list()]
    if considered is None:
        return layouts
    points = [(point.series, point.layout.to_list(), point.value) for point in considered.frontier]
    return [*layouts, points, [(entry.name, entry.divergence, entry.trained) for entry in considered.shortlist]]


@pytest.mark.parametrize("key", LAYOUT)
def test_settings_of_the_layout(key, run, monkeypatch):
    value, more = LAYOUT[key]
    # What layers save on a busy machine is anything.
    monkeypatch.setattr(speed, "speed_of", lambda bench, layout, *size: 1 + 0.1 * len(layout.changed))
    assert usual(chosen, more) != chosen(more | {f"layout.{key}": value})


@pytest.mark.parametrize("more", [{}, SEARCHED], ids=["fast", "scores"])
def test_the_same_settings_choose_the_same_layout(more, run):
    assert usual(chosen, more) == chosen(more)


def weights(more):
    uniattn_cli.convert(overrides=overrides(more), options=RunOptions(device="cpu", force=True))
    return load_file("converted/model.safetensors")


@pytest.mark.parametrize("key", CONVERSION)
def test_settings_of_the_conversion(key, run):
    value, more = CONVERSION[key]
    before, after = usual(weights, PLAIN), weights(more | {f"conversion.{key}": value})
    assert set(before) != set(after) or any(not torch.equal(before[name], after[name]) for name in before)


def test_a_layout_in_the_recipe_is_the_one_converted(run):
    layouts = [uniattn_cli.convert(overrides=overrides(more), dry_run=True).layout for more in (PLAIN, {})]
    assert layouts[0].changed == [2, 4] and layouts[0] != layouts[1]


def test_offloading_is_asked_for_where_models_are_loaded(run, monkeypatch):
    asked = []
    place = placement.placement
    said = lambda offload, *rest, **more: asked.append(offload) or place(offload, *rest, **more)  # noqa: E731
    monkeypatch.setattr(placement, "placement", said)
    uniattn_cli.convert(overrides=overrides({"conversion.offload": "never"}), options=CPU)
    assert asked == ["never", "never"], "where heads are matched, and where the model is fitted"
