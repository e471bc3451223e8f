"""The benchmarks run, at sizes at which their figures mean nothing; their files can be continued and merged."""

from __future__ import annotations

import argparse
import dataclasses
import importlib.util
import json
import os
import re
import runpy
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from tiny_run import make_model, write_data

from benchmarks import plain, training, training_speed, vllm_steps
from benchmarks.runner import Results, rows_on_lines
from uniattn_cli.errors import StageError
from uniattn_cli.modeling.configuration_uniattn import attention_shape
from uniattn_cli.modeling.layout_uniattn import KINDS
from uniattn_cli.models.random import known_config
from uniattn_cli.options import RunOptions
from uniattn_cli.recipe.schema import Recipe, SynthesisSpec

ROOT = Path(__file__).resolve().parent.parent


def run_benchmark(name: str, *arguments: object) -> subprocess.CompletedProcess:
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", f"benchmarks.{name}", *map(str, arguments)]
    return subprocess.run(command, env=environment, capture_output=True, text=True, check=False, cwd=ROOT)


def squeezed(path: Path) -> str:
    """A table without the spaces that align its columns."""
    return re.sub(" +", " ", path.read_text(encoding="utf-8"))


@pytest.mark.slow
def test_training_benchmark_makes_every_row_once(tmp_path):
    model = make_model(tmp_path / "model")
    write_data(tmp_path)
    pages = [{"text": f"Page {n} says that {n} and {n} are {n + n}, and so on for a while. " * 4} for n in range(60)]
    (tmp_path / "pages.jsonl").write_text("".join(json.dumps(page) + "\n" for page in pages), encoding="utf-8")
    out = tmp_path / "out" / "training.json"
    common = [model, "--train", tmp_path / "rows.jsonl", "--text", tmp_path / "pages.jsonl"]
    common += ["--wikitext", tmp_path / "text.txt", "--out", out, "--work", tmp_path / "work", "--tokens", 2000]
    common += ["--text-tokens", 512, "--device", "cpu", "--seeds", 0, "--layouts", "softmax"]
    settings = ["evaluation.length=64", "evaluation.responses=4", "layout.search=fast", "layout.score_tokens=512"]
    settings += [f"{stage}.{key}" for stage in ("analysis", "conversion") for key in ("length=64", "tokens=1024")]
    settings += ["train.max_length=64", "train.batch_size=8", "train.micro_batch_size=8"]
    common += [f"--set={setting}" for setting in settings]
    done = run_benchmark("training", *common)
    assert done.returncode == 0, done.stderr
    rows = json.loads(out.read_text())["rows"]
    parts = ["converted", "one", "two", "distillation", "control teaches", "control converted", "lora", "equal time"]
    expected = {f"softmax | {part} | seed 0" for part in parts} | {
        f"base | {part} | seed 0" for part in ("base", "control")
    }
    assert set(rows) == expected
    tokens = {key: row["tokens"] for key, row in rows.items()}
    equal = [tokens[f"softmax | {part} | seed 0"] for part in ("one", "two", "distillation", "lora")]
    assert {*equal, tokens["base | control | seed 0"]} == {equal[0]} and 1500 < equal[0] < 2500
    for row in rows.values():
        assert row["score"] == pytest.approx(sum(row[name] for name in ("text", "wikitext", "responses")) / 3, abs=1e-4)
    table = squeezed(out.with_suffix(".md"))
    gap = rows["softmax | one | seed 0"]["score"] - rows["base | control | seed 0"]["score"]
    assert f"| softmax | one | {rows['softmax | one | seed 0']['score']:.3f} | {gap:.3f} |" in table
    assert out.with_suffix(".png").is_file()
    # What is there is not measured again, and nothing of other settings is mixed in.
    before = out.read_text()
    done = run_benchmark("training", *common)
    assert done.returncode == 0 and done.stdout == "" and out.read_text() == before
    done = run_benchmark("training", *common, "--tokens", 3000)
    assert done.returncode == 1 and "rows of other settings" in done.stderr
    # A model's own text is trained on and not held out, and a control of these runs can teach with it.
    (tmp_path / "synthetic").mkdir()
    own = [{"text": f"{n} comes before {n + 1}, and that is all there is to say about {n}."} for n in range(50)]
    (tmp_path / "synthetic" / "text.jsonl").write_text("".join(json.dumps(row) + "\n" for row in own))
    record = {"settings": {"synthesis": dataclasses.asdict(SynthesisSpec(tokens=1000))}}
    (tmp_path / "synthetic" / "stage.json").write_text(json.dumps(record))
    more = ["--synthetic", tmp_path / "synthetic" / "text.jsonl", "--out", tmp_path / "more.json"]
    part = "local*0.3 > broad base teaches*0.2+hidden=1 > control teaches*0.4 > on policy"
    more += ["--work", tmp_path / "more", "--parts", part, "equal time*2", "--broad", tmp_path / "pages.jsonl"]
    more += ["--layouts-from", out]
    done = run_benchmark("training", *common, *more, "--controls", tmp_path / "nowhere")
    assert done.returncode == 1 and "run the part control of that seed" in done.stderr
    done = run_benchmark("training", *common, *more, "--controls", tmp_path / "work")
    assert done.returncode == 0, done.stderr
    content = json.loads((tmp_path / "more.json").read_text())
    teacher = "base | control of other runs | seed 0"
    both = [f"softmax | {name} | seed 0" for name in ("equal time*2", part)]
    assert list(content["rows"]) == [teacher, *both]
    assert content["layouts"] == json.loads(out.read_text())["layouts"]
    # Stages on broad text come on top; what a student writes may be longer than what the data says.
    longer, staged = (content["rows"][key]["tokens"] for key in both)
    assert 3000 < longer < 5000 and 1700 < staged < 4000
    assert content["rows"][teacher]["score"] == rows["base | control | seed 0"]["score"]
    assert "| – |" not in squeezed(tmp_path / "more.md")
    wanted = {"model": "base", "tokens": 1000, "prefix": 32, "temperature": 1.0, "top_p": 1.0}
    assert content["setting"]["comparable"]["synthetic"] == [wanted]
    assert content["setting"]["comparable"]["train"] == ["rows.jsonl", "text.jsonl"]


@pytest.mark.parametrize(
    ("part", "control", "stages"),
    [
        ("one@2e-4", False, [("all", 100, "learning_rate: 0.0002")]),
        ("equal time*2", False, [("all", 200, "")]),
        ("local*0.1 > one", False, [("followers", 10, "loss: local"), ("all", 90, "")]),
        ("base teaches*0.5+hidden=1 > one", False, [("all", 50, "{teacher: base, hidden: 1}"), ("all", 50, "")]),
        ("control teaches*0.9@1e-4 > on policy", True, [("all", 90, "{teacher: control}"), ("all", 10, "5e-05")]),
    ],
)
def test_parts_are_stages_of_a_recipe_that_share_the_tokens(part, control, stages):
    bench: Any = object.__new__(training.Bench)
    bench.steps = 100
    overrides = bench.recipe_of(training.part_named(part))
    recipe = Recipe.from_tree({"model": {"name": "m"}}, overrides=overrides)
    assert [(stage.trains, stage.steps) for stage in recipe.train.stages] == [stage[:2] for stage in stages]
    entries = re.findall(r"\{(?:[^{}]|\{[^{}]*\})*\}", overrides[0].partition("=")[2])
    assert all(text in entry for entry, (*_, text) in zip(entries, stages, strict=True))
    assert training.asks_control(part) == control
    assert recipe.train.distillation.on_policy == ("on policy" in part)


@pytest.mark.parametrize(
    ("part", "says"),
    [("once", "unknown part"), ("one*2", "SHARE"), ("local > one", "each with"), ("two*0.1 > one", "unknown stage")],
)
def test_parts_that_are_unknown(part, says):
    with pytest.raises(argparse.ArgumentTypeError, match=says):
        training.part_named(part)


def test_stages_must_leave_tokens_for_the_part():
    bench: Any = object.__new__(training.Bench)
    bench.steps = 100
    with pytest.raises(SystemExit, match=r"leave no tokens for the part: local\*1 > one"):
        bench.recipe_of("local*1 > one")


def test_an_interrupted_row_goes_on_and_no_other_does(tmp_path, monkeypatch):
    bench: Any = object.__new__(training.Bench)
    bench.options, bench.settings, bench.recipe_of = RunOptions(force=True), lambda seed: [], lambda *part: []
    forced = []

    def train(*, options, **others):
        forced.append(options.force)
        return SimpleNamespace(stages=[], directory=tmp_path)

    monkeypatch.setattr(training, "train", train)
    for part in ("one", "one", "lora"):
        bench._train(tmp_path, part, 0)
    (tmp_path / "trained").mkdir()
    bench._train(tmp_path, "lora", 0)
    assert forced == [True, False, True, True]


@pytest.mark.slow
def test_search_benchmark_measures_what_scores_predict(tmp_path):
    model = make_model(tmp_path / "model")
    write_data(tmp_path)
    out = tmp_path / "out" / "search.json"
    small = {"analysis.tokens": 1024, "analysis.length": 64, "conversion.tokens": 512, "conversion.length": 64}
    small |= {"conversion.align": 4, "conversion.refine": 2, "layout.score_tokens": 256, "layout.protect": "[1,2]"}
    common = [model, "--calibration", tmp_path / "rows.jsonl", "--work", tmp_path / "work", "--out", out]
    common += ["--kinds", "key", "linear", "--budgets", 0.9, 0.8, "--losses", 0.01, "--speeds", "1@1x64"]
    common += ["--device", "cpu", "--set", *(f"{key}={value}" for key, value in small.items())]
    done = run_benchmark("search", *common)
    assert done.returncode == 0, done.stderr
    content = json.loads(out.read_text())
    assert set(content["times"]) == {"scores"}
    rows = content["rows"]
    found = {f"kv {kv} | {by}" for kv in (0.9, 0.8) for by in ("scores", "scores, corrected")}
    assert found | {"max_loss 0.01", "speed 1@1x64"} <= set(rows)
    for key, row in rows.items():
        assert row["divergence"] >= 0 and row["predicted"] >= 0
        assert not key.startswith("kv") or row["kv_share"] <= float(key.split()[1])
    assert squeezed(out.with_suffix(".md")).count("| kv 0.9 |") >= 3 and out.with_suffix(".png").is_file()
    before = out.read_text()
    done = run_benchmark("search", *common)
    assert done.returncode == 0 and out.read_text() == before, done.stderr


@pytest.mark.slow
def test_speed_benchmark_alternates_base_and_converted(tmp_path):
    out = tmp_path / "speed.json"
    size = ["--shape", "tiny", "--layers", 4]
    run = ["--batch", 2, "--length", 16, "--steps", 2, "--warm-up", 1, "--rounds", 2, "--device", "cpu"]
    # Whole layers take minutes to compile.
    tried = list(training_speed.CASES)[:-1]
    done = run_benchmark("training_speed", "--out", out, *size, *run, "--cases", *tried)
    assert done.returncode == 0, done.stderr
    cases = json.loads(out.read_text())["cases"]
    assert list(cases) == tried
    for row in cases.values():
        assert len(row["ratios"]) == 2 and row["ratio"] > 0
        assert row["base"]["tokens_per_second"] > 0 and row["converted"]["peak_gib"] is None
        assert row["converted"]["operators"]["mm"] > 20
    # Without gradient checkpointing, and with norms and MLPs compiled, there is less to launch.
    calls = {name: sum(row["converted"]["operators"].values()) for name, row in cases.items()}
    early = "all, early layers"
    assert calls[f"{early}, parts compiled"] < calls[early] < calls[f"{early}, gradient checkpointing"]
    assert squeezed(out.with_suffix(".md")).count("× |") == len(cases)


def test_a_profile_says_how_long_a_device_was_busy_and_how_often_it_was_waited_for():
    kernel = {"cat": "kernel", "name": "norm"}
    trace = [
        {"cat": "cpu_op", "name": "aten::mul"},
        {"cat": "cpu_op", "name": "aten::mul"},
        {"cat": "cpu_op", "name": "aten::view"},
        {"cat": "cuda_runtime", "name": "cudaStreamSynchronize"},
        {"cat": "cuda_runtime", "name": "cudaLaunchKernel"},
        # Two of them at the same time, after a pause.
        kernel | {"ts": 3000, "dur": 4000},
        kernel | {"ts": 0, "dur": 1000},
        {"cat": "gpu_memcpy", "name": "copy", "ts": 4000, "dur": 1000},
        {"cat": "gpu_user_annotation", "name": "step", "ts": 0, "dur": 9000},
        {"name": "process_name"},
    ]
    kernels = {"norm": [2, 5.0], "copy": [1, 1.0]}
    seen = {"busy_ms": 5.0, "launches": 3, "waits": 1, "kernels": kernels}
    assert training_speed.summary(trace) == {"operators": {"mul": 2}, **seen}
    assert training_speed.summary(trace[:3]) == {"operators": {"mul": 2}}


@pytest.mark.slow
def test_quantised_benchmark_compares_each_model_with_itself(tmp_path):
    model = make_model(tmp_path / "model")
    pages = [{"text": f"Page {n} says that {n} and {n} are {n + n}, and so on for a while. " * 4} for n in range(30)]
    (tmp_path / "pages.jsonl").write_text("".join(json.dumps(page) + "\n" for page in pages), encoding="utf-8")
    write_data(tmp_path)
    out = tmp_path / "out" / "quantised.json"
    common = [model, "--text", tmp_path / "pages.jsonl", "--wikitext", tmp_path / "text.txt", "--out", out]
    common += ["--tokens", 128, "--fit-tokens", 1024, "--length", 64, "--refine", 0, "--device", "cpu"]
    schemes = ["cache of 4 bits (quanto)", "int4 in tiles (torchao)"]
    done = run_benchmark("quantised", *common, "--layouts", "every:2", "early@every:3", "--schemes", *schemes)
    assert done.returncode == 0, done.stderr
    assert "left out: int4 in tiles (torchao) (needs a GPU)" in done.stdout
    rows = json.loads(out.read_text())["rows"]
    names = ["base", "every:2", "early@every:3"]
    assert [name for name in names if rows[f"{name} | not quantised"]["ratio"] == {"c4": 1.0, "wt": 1.0}] == names
    whole = [rows[f"{name} | not quantised"]["kv_bytes_per_token"] for name in names]
    assert whole[1] == whole[0] * 3 / 4 and whole[2] == whole[0] * 4 / 6
    if importlib.util.find_spec("optimum"):
        # Four bits, and two floats for each group of 64 numbers.
        for name, bytes_whole in zip(names, whole, strict=True):
            cached = rows[f"{name} | cache of 4 bits (quanto)"]
            assert cached["kv_bytes_per_token"] == pytest.approx(bytes_whole * (4 + 2 * 32 / 64) / 32, rel=0.02)
    assert "| not quantised |" in squeezed(out.with_suffix(".md"))


def test_plain_benchmark_has_every_kind_by_itself():
    parser = argparse.ArgumentParser()
    plain.add_options(parser)
    layouts = plain.chosen_layouts(parser.parse_args([]), attention_shape(known_config("smollm2-135m")))
    assert {each.kind for layout in layouts.values() for each in layout} == set(KINDS)


@pytest.mark.slow
def test_plain_benchmark_compares_with_the_base_of_the_same_round(tmp_path):
    out = tmp_path / "out" / "plain.json"
    common = ["--shape", "tiny", "--shapes", "2x8", "--new", 2, "--repeats", 3, "--device", "cpu", "--out", out]
    done = run_benchmark("plain", *common, "--layouts", "early@every:2", "paper", "--ways", "dynamic", "static")
    assert done.returncode == 0, done.stderr
    rows = json.loads(out.read_text())["rows"]
    names = ["base", "early@every:2", "paper"]
    assert list(rows) == [f"2x8 | {way} | {name}" for way in ("dynamic", "static") for name in names]
    for way in ("dynamic", "static"):
        base, *converted = (rows[f"2x8 | {way} | {name}"] for name in names)
        assert base["first_ratio"] == base["token_ratio"] == 1.0
        for row in converted:
            ratios = sorted(mine / its for mine, its in zip(row["token"], base["token"], strict=True))
            assert row["token_ratio"] == ratios[1] and row["launches"] < base["launches"]
    assert "| 2x8 | static | paper | " in squeezed(out.with_suffix(".md"))


@pytest.mark.slow
def test_data_benchmark_finds_the_second_time_what_it_made(tmp_path):
    out = tmp_path / "out" / "data.json"
    done = run_benchmark("data", "--rows", 60, "--processes", 1, 2, "--out", out, "--work", tmp_path)
    assert done.returncode == 0, done.stderr
    one, two = (json.loads(out.read_text())["starts"][name] for name in ("60 x 1", "60 x 2"))
    assert "first" not in two and one["cache_megabytes"] == two["cache_megabytes"]
    for start in (one["first"], one["second"], two["second"]):
        assert start["seconds"] > 0 and start["peak_mib"] > start["own_mib"] > 100
    assert "| 60 | 2 | second |" in squeezed(out.with_suffix(".md"))


def test_steps_in_vllm_are_shown_beside_the_base_and_an_engine_that_fails_stops_no_other(tmp_path, monkeypatch):
    def measure(name: str, directory: Path, options: dict[str, Any]) -> dict[str, Any]:
        # 4 x (8 + 6 + 1) tokens, rounded up for each, and one more block, of 2 x 4 layers x 4 heads x 16 numbers.
        assert options["cache_bytes"] == (4 * 128 + 128) * 2 * 4 * 4 * 16 * 4
        config = json.loads((directory / "config.json").read_text())
        assert ("uniattn" in config) == (name != "base") and not list(directory.glob("*.safetensors"))
        if name == "paper, fused":
            raise EOFError
        step, prefill = (2.0, 0.5) if name == "base" else (1.6, 0.4)
        return {"step_ms": [step, 9.0, step], "prefill_s": prefill, "cache_tokens": 640}

    out = tmp_path / "steps.json"
    arguments = ["vllm_steps", "--out", str(out), "--shape", "tiny", "--layers", "4", "--rows", "4", "--context", "8"]
    monkeypatch.setattr(
        sys, "argv", [*arguments, "--new", "6", "--device", "cpu", "--models", "base", "paper, fused", "every:4, fused"]
    )
    monkeypatch.setattr(vllm_steps, "measure", measure)
    with pytest.raises(SystemExit, match="engines that ended without an answer: paper, fused; see"):
        vllm_steps.main()
    assert list(json.loads(out.read_text())["models"]) == ["base", "every:4, fused"]
    table = squeezed(out.with_suffix(".md"))
    assert "| base | 640 | 2.00 | 2,000 | 1.00 | 64 | 1.00 |" in table
    assert "| every:4, fused | 640 | 1.60 | 2,500 | 1.25 | 80 | 1.25 |" in table


def test_files_of_several_processes_are_merged(tmp_path, monkeypatch):
    def merge(*paths: Path) -> None:
        monkeypatch.setattr(sys, "argv", ["layouts", "--out", str(out), "--merge", *map(str, paths)])
        runpy.run_module("benchmarks.layouts", run_name="__main__")

    row = {"changed": 2, "kv_share": 0.8, "parameter_share": 1.01, "fit_tokens": 1024}
    setting = {"model": "m", "dtype": "float32", "device": "CPU", "window": 64}
    files = []
    for name, ratio in (("key", 1.25), ("kv", 1.5)):
        measured = {"ratio": {"c4": ratio, "wt": 2.0}, "perplexity": {"c4": 10 * ratio, "wt": 60.0}}
        content = {
            "setting": setting,
            "layouts": {name: {"steps": []}},
            "rows": {f"{name} alone | seed 0": row | measured},
        }
        files.append(tmp_path / f"{name}.json")
        files[-1].write_text(json.dumps(content))
    out = tmp_path / "all.json"
    merge(*files)
    assert list(json.loads(out.read_text())["layouts"]) == ["key", "kv"]
    table = squeezed(out.with_suffix(".md"))
    assert "(c4 10.0, wt 30.0)" in table and "| kv alone | 2 | 80.0% | 101.0% | 1,024 | 1.500 | 2.000 | 1 |" in table
    # A search is kept before anything is converted; there is no table of it yet.
    files[0].write_text(json.dumps({"setting": setting, "layouts": {"key": {"steps": []}}, "rows": {}}))
    out.with_suffix(".md").unlink()
    merge(files[0])
    assert not out.with_suffix(".md").exists()
    files[1].write_text(json.dumps({"setting": setting | {"window": 128}, "layouts": {}, "rows": {}}))
    with pytest.raises(SystemExit, match="different settings"):
        merge(*files)
    files[1].write_text(json.dumps({"rows": []}))
    with pytest.raises(SystemExit, match="not written by this version"):
        merge(*files)


def test_rows_on_different_layouts_of_one_name_are_not_merged(tmp_path):
    files = [tmp_path / "one.json", tmp_path / "two.json"]
    for file, compensation in zip(files, ("none", "full"), strict=True):
        layout = [{}, {"kind": "early", "leader": 0, "compensation": compensation}]
        file.write_text(json.dumps({"setting": {}, "layouts": {"early": layout}, "rows": {}}))
    results = Results(tmp_path / "all.json", training.TABLES, fixed=("layouts",))
    with pytest.raises(SystemExit, match=r"two\.json has other layouts of the name 'early' than a file before it"):
        results.merge(files)
    results.merge(files[:1] * 2)


def test_a_file_is_continued_has_one_row_on_each_line_and_mixes_no_settings(tmp_path):
    out = tmp_path / "folder" / "results.json"
    rows = {"a": {"seconds": [1.5, 2.0]}, "b": {"seconds": [], "layers": [{"kind": "own"}]}}

    def results(**more) -> Results:
        return Results(out, ("rows",), markdown=lambda content: ", ".join(content["rows"]), **more)

    first = results()
    first.begin({"device": "cpu", "window": 64})
    for key in first.missing("rows", rows):
        first.add("rows", key, rows[key])
    lines = out.read_text(encoding="utf-8").splitlines()
    assert all(
        f"  {json.dumps(key)}: {json.dumps(row)}" in [line.rstrip(",") for line in lines] for key, row in rows.items()
    )
    assert json.loads(out.read_text())["rows"] == rows and out.with_suffix(".md").read_text() == "a, b"
    assert [path.name for path in out.parent.iterdir() if path.suffix == ".partial"] == []
    again = results()
    again.begin({"device": "cpu", "window": 64})
    assert again.missing("rows", ["b", "c"]) == ["c"]
    # Times depend on the device, losses do not.
    with pytest.raises(SystemExit, match="other settings"):
        results().begin({"device": "cuda", "window": 64})
    results(portable=True).begin({"device": "cuda", "window": 64})
    with pytest.raises(SystemExit, match="other settings"):
        results(portable=True).begin({"device": "cpu", "window": 128})


@pytest.mark.parametrize("path", sorted((ROOT / "docs" / "benchmarks").rglob("*.json")), ids=lambda path: path.stem)
def test_published_files_have_one_row_on_each_line(path):
    text = path.read_text(encoding="utf-8")
    assert rows_on_lines(json.loads(text)) == text


def test_a_file_that_cannot_be_written_is_told_before_anything_is_measured(tmp_path):
    (tmp_path / "file").touch()
    results = Results(tmp_path / "file" / "results.json", ("rows",))
    with pytest.raises(StageError, match="something else has this name; move it away"):
        results.begin({"device": "cpu"})
