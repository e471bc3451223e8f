"""The four commands one after the other, each reading what the one before wrote; and the same from Python."""

from __future__ import annotations

import json
import os
import re
import shutil
import struct
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from conftest import ROOT, run_here
from safetensors.torch import load_file
from tiny_run import make_model, settings, write_data

import uniattn_cli
from uniattn_cli.analysis.measured import Measured
from uniattn_cli.models import hub, loading
from uniattn_cli.models.fingerprint import fingerprint
from uniattn_cli.models.tokenizer import load_tokenizer
from uniattn_cli.recipe.files import read_tree, write_tree
from uniattn_cli.recipe.schema import ModelSpec, Recipe
from uniattn_cli.run.directory import RunDir

CPU = torch.device("cpu")
FORCE = uniattn_cli.RunOptions(device="cpu", force=True)
REMARK = "# as few as will do"


def uniattn(folder: Path, *arguments: object) -> str:
    """Runs the command in a folder; returns what it printed."""
    done = run_here(*arguments, cwd=folder)
    assert done.returncode == 0, done.stderr
    return done.stdout


def shrink(recipe: Path) -> None:
    """Edits a recipe as a user would: small settings, a remark, and lines in an order of their own."""
    tree = read_tree(recipe)
    tree["conversion"].update(tokens=1024, length=128, align=10, refine=5)
    tree["conversion"].yaml_add_eol_comment(REMARK, "tokens")
    tree["train"]["stages"] = [
        {"trains": "compensation", "steps": 2, "learning_rate": 0.01},
        {"trains": "all", "steps": 3, "learning_rate": 0.01},
    ]
    tree["evaluation"].update(tokens=2048, length=256, responses=8, limit=4)
    tree["evaluation"].update(lengths=[512], length_tokens=1024, retrieval=1, sample_tokens=8)
    tree["evaluation"]["speed"].update(prompt=16, new=4, repeats=2)
    write_tree(tree, recipe)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A run directory after the four commands, and what they printed."""
    folder = tmp_path_factory.mktemp("whole")
    model = make_model(folder / "model")
    run = folder / "run"
    run.mkdir()
    printed = {"analyze": uniattn(run, "analyze", "../model", "--tokens", "2048")}
    written = (run / "recipe.yaml").read_text()
    shrink(run / "recipe.yaml")
    printed["convert"] = uniattn(run, "convert", "--groups", "auto")
    printed["train"] = uniattn(run, "train", "recipe.yaml")
    printed["eval"] = uniattn(run, "eval")
    return SimpleNamespace(model=model, run=run, printed=printed, written=written)


# --- the four commands ------------------------------------------------------------------------------------------------


def test_each_stage_leaves_its_directory_and_nothing_else(whole):
    found = {path.name for path in whole.run.iterdir()}
    assert found == {"recipe.yaml", "analysis", "grouping", "converted", "trained", "evaluation"}


def test_each_stage_records_what_it_read(whole):
    run = RunDir(whole.run)
    base, converted = fingerprint(whole.model), fingerprint(run.output("convert"))
    records = {stage: run.record(stage) for stage in ("analyze", "convert", "train", "eval")}
    assert {record["inputs"]["model"] for record in records.values()} == {base}
    assert records["train"]["inputs"]["converted"] == converted
    models = {"base": base, "converted": converted, "trained": fingerprint(run.output("train"))}
    assert records["eval"]["inputs"]["models"] == models
    for stage, record in records.items():
        assert record["stage"] == stage
        assert record["settings"]["model"]["name"] == str(whole.model)
        assert record["finished"] >= record["started"]
        assert {"python", "torch", "transformers"} <= set(record["versions"])


def test_the_analysis_is_as_documented(whole):
    folder = whole.run / "analysis"
    content = json.loads((folder / "analysis.json").read_text())
    documented = {
        *("schema", "model", "fingerprint", "model_type", "shape", "element_size", "tokens", "sequences", "length"),
        *("max_distance", "seconds", "forward_ratio", "layers", "sink", "output_error", "neighbours", "candidates"),
    }
    assert set(content) == documented
    assert (content["tokens"], content["length"], content["shape"]["query_heads"]) == (2048, 512, 6)
    measured = Measured.load(folder)
    assert measured.score.shape == (6, 5, 6, 6)
    assert [row["layers"] for row in content["neighbours"]] == ["0, 1", "1, 2", "2, 3", "3, 4", "4, 5"]
    assert [row["changed"] for row in content["candidates"]] == list("012345")
    for row in (*content["neighbours"], *content["candidates"]):
        for cell in row.values():
            assert cell in whole.printed["analyze"]


@pytest.mark.parametrize(
    "name",
    ["analysis/similarity.png", "analysis/depth.png", "trained/loss.png", "evaluation/quality_vs_kv.png"],
)
def test_pictures(name, whole):
    data = (whole.run / name).read_bytes()
    assert data.startswith(b"\x89PNG\r\n\x1a\n") and data.endswith(b"IEND\xaeB`\x82")
    width, height = struct.unpack(">II", data[16:24])
    assert width >= 600 and height >= 300
    # A picture of one colour would be a few hundred bytes.
    assert len(data) > 8000


def test_the_recipe_keeps_comments_and_order(whole):
    text = (whole.run / "recipe.yaml").read_text()
    assert REMARK in text
    kept = [line for line in whole.written.splitlines() if line.lstrip().startswith("#")]
    assert [line for line in text.splitlines() if line.lstrip().startswith("#")] == kept
    tops = re.findall(r"^\w+", whole.written, re.MULTILINE)
    assert re.findall(r"^\w+", text, re.MULTILINE) == tops
    recipe = Recipe.load(whole.run / "recipe.yaml")
    assert recipe.model.name == str(whole.model)
    assert len(recipe.layout.layers) == 6


def test_converted_and_trained_load_and_differ_where_they_should(whole):
    models = {}
    for name in ("converted", "trained"):
        source = hub.locate(str(whole.run / name))
        models[name] = loading.load_model(source, ModelSpec(), CPU)
        assert len(load_tokenizer(source)) == 300
    layout = models["converted"].config.layout
    assert layout == models["trained"].config.layout
    # 0.8 of the KV bytes of six layers is met with three layers.
    assert len(layout.changed) == 3
    weights = {name: model.state_dict() for name, model in models.items()}
    assert set(weights["converted"]) == set(weights["trained"])
    for layer in layout.changed:
        assert not any(f"layers.{layer}.self_attn.k_proj" in key for key in weights["trained"])
    changed = {key for key, value in weights["converted"].items() if not torch.equal(value, weights["trained"][key])}
    assert changed == {key for key in weights["converted"] if "embed_tokens" not in key and "lm_head" not in key}


def test_the_evaluation_compares_all_three(whole):
    results = json.loads((whole.run / "evaluation" / "results.json").read_text())
    assert list(results["models"]) == ["base", "converted", "trained"]
    printed, report = whole.printed["eval"], (whole.run / "evaluation" / "report.md").read_text()
    for name in results["models"]:
        assert name in printed and name in report
    cost = {name: model["cost"]["kv_bytes_per_token"]["value"] for name, model in results["models"].items()}
    # Six layers, three KV heads of eight float32 values; the changed ones lack their keys.
    assert cost == {"base": 6 * 2 * 3 * 8 * 4, "converted": 9 * 3 * 8 * 4, "trained": 9 * 3 * 8 * 4}
    text = {name: model["quality"]["perplexity"]["value"] for name, model in results["models"].items()}
    assert text["trained"] < text["converted"]


def test_every_command_says_what_comes_next(whole):
    for verb, following in (("analyze", "convert --groups auto"), ("convert", "train recipe.yaml"), ("train", "eval")):
        assert f"next: uniattn {following}" in whole.printed[verb]
    for words in (
        "parameters",
        "bytes of weights",
        "KV bytes per token",
        "perplexity, not fitted",
        "perplexity, fitted",
    ):
        assert words in whole.printed["convert"]


def test_a_finished_stage_is_left_alone(whole):
    run = RunDir(whole.run)
    for stage, call in (("analyze", uniattn_cli.analyze), ("convert", uniattn_cli.convert)):
        with pytest.raises(uniattn_cli.errors.StageError, match="is complete; use --force"):
            call(run_dir=run.root)
        assert run.is_complete(stage)


# --- one stage at a time, and from elsewhere --------------------------------------------------------------------------


@pytest.fixture
def run(tiny_runs, tmp_path):
    """A run directory with data, analysis and a recipe of small settings."""
    return Path(shutil.copytree(tiny_runs / "analysed", tmp_path / "run"))


def test_the_candidates_are_what_the_recipe_would_convert(run):
    """The first kind that borrows, with the W_c that is solved for."""
    solved = ["conversion.solve=output"]
    mix = ["layout.search=scores", "layout.kinds=[linear, kv]", *solved]
    row = uniattn_cli.analyze(run_dir=run, overrides=mix, options=FORCE).tables[1].rows[1]
    alone = ["layout.kinds=[kv]", "layout.followers=1", *solved]
    costs = uniattn_cli.convert(run_dir=run, dry_run=True, overrides=alone).costs
    parameters, kv = (after / before for before, after in (costs.parameters, costs.kv_bytes))
    assert row[-1] == f"{parameters:.1%}" and row[-2].endswith(f"({kv:.0%})")


def test_convert_uses_what_group_chose(run, tmp_path):
    """All from another folder than the run directory, whose relative paths hold nevertheless."""
    recipe = run / "recipe.yaml"
    recipe.write_text(recipe.read_text().replace("\nlayout:", f"\n{REMARK}\nlayout:"))
    printed = uniattn(tmp_path, "group", "--followers", "2", "-C", "run")
    assert "2 early layers: budget followers 2" in printed
    assert REMARK in recipe.read_text()
    before = recipe.read_text()
    stored = Recipe.load(recipe).layout
    assert (stored.followers, stored.groups, len(stored.layers)) == (2, "auto", 6)
    printed = uniattn(tmp_path, "convert", "-C", "run")
    assert "layout of the recipe, 2 layers changed" in printed
    assert recipe.read_text() == before
    config = loading.load_config(hub.locate(str(run / "converted")), converted=True)
    kinds = [entry["kind"] for entry in stored.layers]
    assert [plan.kind for plan in config.layout] == kinds
    assert kinds.count("early") == 2
    assert sorted(path.name for path in tmp_path.iterdir()) == ["run"]


def test_python_does_what_the_command_does(tiny_runs, tmp_path, monkeypatch):
    model, run, mine = str(tiny_runs / "model"), tmp_path / "run", tmp_path / "mine"
    for folder in (run, mine):
        folder.mkdir()
        write_data(folder)
    uniattn(tmp_path, "analyze", model, "-C", "run", *(word for one in settings() for word in ("--set", one)))
    uniattn(tmp_path, "group", "--kv", "0.7", "-C", "run")
    uniattn(tmp_path, "convert", "-C", "run")
    monkeypatch.chdir(mine)
    analysis = uniattn_cli.analyze(model, overrides=settings())
    grouping = uniattn_cli.group(overrides=["layout.kv=0.7"])
    conversion = uniattn_cli.convert()
    assert analysis.directory.absolute() == mine / "analysis"
    contents = [json.loads((folder / "analysis" / "analysis.json").read_text()) for folder in (run, mine)]
    for content in contents:
        assert content.pop("seconds") > 0 and content.pop("forward_ratio") > 0
    assert contents[0] == contents[1]
    assert (mine / "recipe.yaml").read_text() == (run / "recipe.yaml").read_text()
    assert conversion.layout == grouping.layout
    # What is better for a random model's predictions is chance.
    assert conversion.losses["converted"].mean != conversion.losses["uncompensated"].mean
    ours, theirs = (load_file(folder / "converted" / "model.safetensors") for folder in (mine, run))
    assert set(ours) == set(theirs)
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


def test_a_layout_without_followers_is_the_base(run, tmp_path):
    printed = uniattn(tmp_path, "convert", "--followers", "0", "-C", "run")
    assert "0 early layers: budget followers 0" in printed
    source = hub.locate(str(run / "converted"))
    converted = loading.load_model(source, ModelSpec(), CPU)
    base = loading.load_model(hub.locate(Recipe.load(run / "recipe.yaml").model.name), ModelSpec(), CPU)
    assert converted.config.layout.changed == []
    tokens = torch.arange(3, 40)[None]
    assert torch.equal(converted(tokens).logits, base(tokens).logits)
    report = json.loads((run / "converted" / "uniattn_report.json").read_text())
    assert report["fits"] == [] and report["losses"]["base"] == report["losses"]["converted"]
    assert all(pair["base"] == pair["converted"] for pair in report["costs"].values())


def test_rows_of_all_lengths_are_packed_without_padding(tiny_runs, tmp_path, monkeypatch):
    """Rows of one word and of many; neither analysis nor fit sees a padding token."""
    from uniattn_cli.data import windows

    seen = []
    packed = windows.calibration_windows
    monkeypatch.setattr(windows, "calibration_windows", lambda *a, **k: seen.append(packed(*a, **k)) or seen[-1])
    monkeypatch.chdir(tmp_path)
    write_data(tmp_path)
    rows = [{"text": " ".join(f"word {n}" for n in range(length))} for length in (1, 60, 2, 30, 7, 90, 11) * 12]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    analysis = uniattn_cli.analyze(str(tiny_runs / "model"), overrides=settings())
    conversion = uniattn_cli.convert()
    assert analysis.measured.tokens == 1024 and analysis.measured.sequences == 16
    assert all(fit.error_after <= fit.error_before for fit in conversion.fits) and conversion.fits
    tokenizer = load_tokenizer(hub.locate(str(tiny_runs / "model")))
    assert len(seen) >= 2 and all(windows.shape[1] == 64 for windows in seen)
    assert not any((windows == tokenizer.pad_token_id).any() for windows in seen)
    assert any((windows == tokenizer.eos_token_id).any() for windows in seen)


def test_one_calibration_sequence_is_told(tiny_runs, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_data(tmp_path)
    analysis = uniattn_cli.analyze(str(tiny_runs / "model"), overrides=settings(analysis__tokens=64))
    assert analysis.measured.sequences == 1
    conversion = uniattn_cli.convert(overrides=["conversion.tokens=64"])
    assert len(conversion.fits) == 3
    assert any("one calibration sequence: nothing is held out" in note for note in conversion.notes)


# --- other families ---------------------------------------------------------------------------------------------------

OTHERS = ("gemma2", "phi3", "gemma3_text", "smollm3", "mixtral", "glm4", "exaone4", "cohere2", "ministral3", "gpt_oss")


@pytest.mark.slow
@pytest.mark.parametrize("family", OTHERS)
def test_the_stages_on_other_families(family, tmp_path, monkeypatch):
    """Windows, capped scores, fused projections, layers without positions, experts, scaled queries, sinks."""
    make_model(tmp_path / "model", family=family)
    (tmp_path / "run").mkdir()
    monkeypatch.chdir(tmp_path / "run")
    write_data(tmp_path / "run")
    uniattn_cli.analyze("../model", overrides=settings())
    conversion = uniattn_cli.convert(overrides=["layout.kv=0.75"])
    windowed = family in ("gemma2", "gemma3_text", "exaone4", "cohere2", "gpt_oss")
    assert len(conversion.layout.changed) >= 3
    assert all(fit.error_after <= fit.error_before for fit in conversion.fits)
    assert any("cache at most 5 tokens" in note for note in conversion.notes) == windowed
    uniattn_cli.train()
    uniattn_cli.evaluate()
    models = json.loads(Path("evaluation/results.json").read_text())["models"]
    assert list(models) == ["base", "converted", "trained"]
    cost = {name: model["cost"]["kv_bytes_per_token"]["value"] for name, model in models.items()}
    assert cost["trained"] == cost["converted"] <= 0.75 * cost["base"]
    quality = {name: model["quality"]["response_loss"]["value"] for name, model in models.items()}
    assert quality["trained"] < quality["converted"]


# --- a real model -----------------------------------------------------------------------------------------------------


def find_real_model(name: str) -> Path:
    path = Path(os.environ.get("UNIATTN_TEST_MODELS", ROOT / "demo")) / name
    if not (path / "config.json").is_file():
        pytest.skip(f"{path} is not there: scripts/fetch_demo_model.py makes it; UNIATTN_TEST_MODELS names its folder")
    return path.absolute()


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize(("name", "learning_rate"), [("SmolLM2-135M-Instruct", 3e-4), ("gemma-3-270m", 2e-5)])
def test_the_four_commands_on_a_real_model(name, learning_rate, tmp_path):
    real_model = find_real_model(name)
    uniattn(tmp_path, "analyze", real_model, "--tokens", "1024", "--length", "128")
    tree = read_tree(tmp_path / "recipe.yaml")
    tree["conversion"].update(tokens=3072, length=128)
    tree["train"].update(batch_size=4, max_length=128)
    tree["train"]["stages"] = [{"trains": "all", "steps": 5, "learning_rate": learning_rate}]
    tree["evaluation"].update(tokens=1024, length=128, responses=8, limit=4)
    tree["evaluation"]["speed"].update(prompt=32, new=8, repeats=2)
    write_tree(tree, tmp_path / "recipe.yaml")
    uniattn(tmp_path, "convert", "--groups", "auto")
    uniattn(tmp_path, "train", "recipe.yaml")
    uniattn(tmp_path, "eval")
    report = json.loads((tmp_path / "converted" / "uniattn_report.json").read_text())
    losses = {name: entry["mean"] for name, entry in report["losses"].items()}
    assert losses["base"] < losses["converted"] < losses["uncompensated"]
    models = json.loads((tmp_path / "evaluation" / "results.json").read_text())["models"]
    assert list(models) == ["base", "converted", "trained"]
    cost = {name: model["cost"]["kv_bytes_per_token"]["value"] for name, model in models.items()}
    assert cost["trained"] == cost["converted"] <= 0.8 * cost["base"]
    responses = {name: model["quality"]["response_loss"]["value"] for name, model in models.items()}
    assert responses["trained"] < responses["converted"]
