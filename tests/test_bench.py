"""The bench: what it measures, what it counts, and what it says where something does not fit."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import tiny
import torch
from tiny_run import make_model

from uniattn_cli.commands.bench import BenchSpec, bench
from uniattn_cli.errors import LayoutError, StageError, UsageError
from uniattn_cli.inference import measurement
from uniattn_cli.inference.engine import Engine
from uniattn_cli.inference.measurement import Measurement, largest_batch, measure_shape
from uniattn_cli.inference.roofline import copy_bandwidth, step_bytes
from uniattn_cli.modeling.configuration_uniattn import attention_shape
from uniattn_cli.models.building import build_converted
from uniattn_cli.models.costs import count_parameters, kv_bytes_per_token
from uniattn_cli.models.device import Series
from uniattn_cli.options import RunOptions
from uniattn_cli.reporting.bench import conclusions, tables

ROOT = Path(__file__).resolve().parent.parent
QUICK = BenchSpec(batches=(1, 2), contexts=(24,), new=2, repeats=2, dtype="float32")


@pytest.fixture(scope="module")
def result(tmp_path_factory):
    out = tmp_path_factory.mktemp("bench") / "bench"
    groups = ["every:4", "kv@every:4", "linear@every:4"]
    return bench(shape="tiny", groups=groups, compensation=8, layers=4, spec=QUICK, out=out)


def test_every_model_is_measured_at_every_shape(result):
    names = ["base", "every:4", "kv@every:4", "linear@every:4"]
    engine = [(one.model, one.batch) for one in result.measurements if one.path == "engine"]
    assert engine == [(name, batch) for batch in (1, 2) for name in names]
    stock = [(one.model, one.path) for one in result.measurements if one.path != "engine"]
    assert stock == [("base", "transformers dynamic")] * 2
    for one in result.measurements:
        assert one.fits
        assert len(one.step.values) == len(one.first.values) == 2
        assert 0 < one.step.median < one.first.median * 100
        assert one.tokens_per_second == one.batch / one.step.median


def test_models_run_by_transformers_are_compared_with_the_first_one_run_so():
    def series(seconds):
        return Series((seconds, seconds, seconds))

    measured = [
        Measurement(name, path, 1, context, step=series(step * context), first=series(first * context))
        for context in (16, 32)
        for name, path, step, first in (
            ("base", "engine", 1, 10),
            ("paper", "engine", 0.5, 8),
            ("base", "transformers dynamic", 4, 20),
            ("paper", "transformers dynamic", 3.8 + context / 160, 19),
        )
    ]
    assert conclusions(measured) == [
        "paper decodes 2.00 times as many tokens per second as base.",
        "Run by transformers dynamic, paper takes 0.97 to 1.00 times as long as base per token, and 0.95 times as long "
        "to the first token.",
    ]
    decoding, prompts = tables(measured)
    place = ["paper", "engine", "1", "16"]
    assert [row[decoding.columns.index("× first")] for row in decoding.rows if row[:4] == place] == ["2.00"]
    assert [row[prompts.columns.index("× first")] for row in prompts.rows if row[:4] == place] == ["1.25"]


def test_all_models_take_turns_with_transformers(tmp_path):
    spec = BenchSpec(batches=(1,), contexts=(8,), new=1, repeats=2, stock="all", dtype="float32")
    result = bench(shape="tiny", groups=["every:4"], layers=4, spec=spec, out=tmp_path / "bench")
    stock = [one for one in result.measurements if one.path == "transformers dynamic"]
    assert [(one.model, len(one.step.values)) for one in stock] == [("base", 2), ("every:4", 2)]
    assert any(note.startswith("Run by transformers dynamic, every:4 takes ") for note in result.notes)


def test_all_figures_are_written(result):
    content = json.loads((result.directory / "results.json").read_text())
    assert content["copy_bandwidth"] == result.bandwidth > 1e8
    assert len(content["measurements"]) == len(result.measurements)
    assert content["measurements"][1]["step"]["values"] == list(result.measurements[1].step.values)
    assert content["settings"]["models"]["every:4"]["kinds"] == {"own": 1, "softmax": 3}
    assert content["settings"]["ops"]["base"] == "torch"
    assert (result.directory / "bench.png").stat().st_size > 5000
    report = (result.directory / "report.md").read_text()
    assert all(one.model in report for one in result.measurements)


@pytest.mark.parametrize("name", tiny.LAYOUTS)
def test_the_floor_counts_weights_and_what_layers_look_at(name):
    base = tiny.make_base(tiny.FAMILIES[0])
    model = build_converted(base, tiny.make_layout(name))
    program = Engine(model, check=False).program
    shape = attention_shape(model.config)
    counted = step_bytes(program, batch=3, context=10)
    norms = sum(parameter.numel() for key, parameter in model.named_parameters() if "norm" in key)
    embedding = model.config.vocab_size * model.config.hidden_size
    every = count_parameters(base.config, program.layout)
    assert counted.weights == 4 * (every - norms - embedding)
    # Stored bytes, and the borrowed ones that are read again.
    again = sum({"key": 1, "kv": 2}.get(plan.kind, 0) for plan in program.layout) * shape.kv_heads * shape.head_dim * 4
    assert counted.caches == 3 * 10 * (kv_bytes_per_token(program.layout, shape, 4) + again)
    assert counted.seconds(1000.0) == counted.total / 1000


def test_windows_and_experts_bound_the_floor():
    names = {entry[0]: entry for entry in tiny.FAMILIES}
    windowed = Engine(tiny.make_base(names["mistral"]), check=False).program
    assert step_bytes(windowed, 1, 100).caches == step_bytes(windowed, 1, 5).caches
    experts = Engine(tiny.make_base(names["mixtral"]), check=False).program
    # One row chooses two of four experts, two rows may choose all.
    weights = [step_bytes(experts, batch, 1).weights for batch in (1, 2, 3)]
    assert weights[0] < weights[1] == weights[2]


def test_what_does_not_fit_is_noted_and_the_rest_goes_on(monkeypatch):
    base = tiny.make_base(tiny.FAMILIES[0])
    engines = {"base": Engine(base), "shared": Engine(build_converted(base, tiny.make_layout("leader")))}
    # Room for the smaller cache alone: 128 places, 6 layers of which 3 follow, 3 heads of 8, two kinds, four bytes.
    room = {"base": 128 * 6 * 3 * 8 * 2 * 4}
    monkeypatch.setattr(measurement, "available_bytes", lambda device: room["base"] + measurement.HOST_RESERVE - 1)
    found = measure_shape(engines, 1, 20, new=2, repeats=1, prompts=True, bandwidth=1e9)
    assert [one.fits for one in found] == [False, True]
    assert "KV cache" in found[0].note
    assert found[0].step is None
    assert found[1].step is not None
    monkeypatch.setattr(measurement, "available_bytes", lambda device: 0)
    found = measure_shape(engines, 1, 20, new=2, repeats=1, prompts=True, bandwidth=1e9)
    assert not any(one.fits for one in found)


def test_memory_that_is_short_in_a_later_round_ends_only_that_model(monkeypatch):
    base = tiny.make_base(tiny.FAMILIES[0])
    models = {"base": base, "shared": build_converted(base, tiny.make_layout("leader"))}
    engines = {name: Engine(model) for name, model in models.items()}
    calls = []

    def short(timed):
        def run(*arguments):
            calls.append(arguments)
            # Both models have had their first run, and each its turn in the first round, when it is the first one's.
            if len(calls) == 5:
                raise torch.OutOfMemoryError
            return timed(*arguments)

        return run

    monkeypatch.setattr(measurement, "_time_generate", short(measurement._time_generate))
    monkeypatch.setattr(measurement, "_time_once", short(measurement._time_once))
    finished = []
    prompt = torch.ones(1, 4, dtype=torch.long)
    found = measurement.measure_stock(models, prompt, new=1, repeats=3, static=False, advance=finished.append)
    calls.clear()
    found += measure_shape(engines, 1, 4, new=1, repeats=3, prompts=True, bandwidth=1e9, advance=finished.append)
    assert [(one.fits, one.step and len(one.step.values)) for one in found] == [(False, None), (True, 3)] * 2
    assert sum(finished) == 12


def test_the_largest_batch_is_found_by_running_it(monkeypatch):
    engine = Engine(tiny.make_base(tiny.FAMILIES[0]))
    tried = []

    def session(batch, limit, new, **options):
        tried.append(batch)
        if batch > 11:
            raise torch.OutOfMemoryError
        return Engine.session(engine, batch, limit, new, **options)

    monkeypatch.setattr(engine, "session", session, raising=False)
    assert largest_batch(engine, 8) == 11
    assert {11, 12} <= set(tried)


def test_copies_have_a_bandwidth():
    assert 1e8 < copy_bandwidth(torch.device("cpu")) < 1e13


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"groups": ["paper"]}, UsageError, "--shape"),
        ({"shape": "tiny", "checkpoints": ["x"]}, UsageError, "not both"),
        ({"layers": 2}, UsageError, "--layers needs --shape"),
        ({"shape": "tiny", "compensation": 4}, UsageError, "--compensation needs --groups"),
        ({"shape": "tini"}, UsageError, "did you mean 'tiny'"),
        ({"shape": "tiny", "groups": ["liner@paper"]}, LayoutError, "did you mean 'linear'"),
        ({"shape": "tiny", "groups": ["kv@papr"]}, LayoutError, "papr"),
        ({"shape": "tiny", "groups": ["paper"], "compensation": 4096}, LayoutError, "rank"),
        ({"shape": "tiny", "out": "."}, StageError, "exists"),
    ],
)
def test_impossible_arguments_are_told(arguments, error, message, tmp_path):
    with pytest.raises(error, match=message):
        bench(run_dir=tmp_path, spec=QUICK, **arguments)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("values", [{"batches": ()}, {"contexts": (0,)}, {"new": 0}, {"repeats": 0}, {"stock": "some"}])
def test_impossible_specifications_are_told(values):
    with pytest.raises(UsageError, match=next(iter(values))):
        BenchSpec(**values)


def test_the_command_measures_and_writes(uniattn, tmp_path):
    command = ["bench", "--shape", "tiny", "--layers", "4", "--groups", "every:4"]
    options = ["--batch", "1", "--context", "16", "--new", "2", "--repeats", "1", "--stock", "none"]
    done = uniattn(*command, *options)
    assert done.returncode == 0, done.stderr
    assert "every:4" in done.stdout
    assert (tmp_path / "bench" / "results.json").is_file()
    done = uniattn(*command, *options)
    assert done.returncode == 1
    assert done.stderr.strip().endswith("use --force to replace it, or --out DIR")
    done = uniattn(*command, *options, "--force")
    assert done.returncode == 0, done.stderr
    for wrong in (["--batch", "1,x"], ["--compensation", "0"]):
        done = uniattn(*command, *wrong)
        assert done.returncode == 2
        assert len(done.stderr.splitlines()) == 1


@pytest.mark.parametrize("place", ["mine", ".", "..", "mine/results.json"])
def test_force_replaces_only_what_the_bench_wrote(place, tmp_path):
    run = tmp_path / "run"
    (run / "mine").mkdir(parents=True)
    (run / "mine" / "results.json").write_text("precious")
    with pytest.raises(StageError, match="exists but was not written by `uniattn bench`"):
        bench(shape="tiny", run_dir=run, out=place, options=RunOptions("cpu", force=True))
    assert [path.name for path in run.rglob("*")] == ["mine", "results.json"]


def test_checkpoints_are_compared_with_the_first_one(tmp_path):
    names = [str(make_model(tmp_path / f"model-{seed}", seed)) for seed in (0, 1)]
    spec = BenchSpec(batches=(1,), contexts=(8,), new=1, repeats=1, stock="none", dtype="float32")
    found = bench(names, spec=spec, out=tmp_path / "out", options=RunOptions(device="cpu"))
    assert [one.model for one in found.measurements] == names


BARE = """
import runpy, sys
from importlib.machinery import PathFinder
find = PathFinder.find_spec
missing = {"typer", "rich", "datasets", "trl", "ruamel", "matplotlib", "accelerate"}
PathFinder.find_spec = staticmethod(
    lambda name, *rest: None if name.split(".")[0] in missing else find(name, *rest)
)
sys.argv = sys.argv[1:]
runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)
"""


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("kernels", ["--shapes", "2x128", "--rounds", "1"]),
        ("kernels", ["--parts", "grid"]),
        ("decoding", ["--shape", "tiny", "--layers", "4", "--scale", "512"]),
    ],
)
@pytest.mark.slow
def test_benchmarks_for_the_gpu_run_with_torch_and_transformers_alone(name, options, tmp_path):
    out = tmp_path / "out.json"
    command = [sys.executable, "-c", BARE, f"benchmarks.{name}", "--out", str(out), "--device", "cpu", *options]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    content = json.loads(out.read_text())
    if "grid" in options:
        assert len(content["grid"]) > 5
        assert all(error < 1e-2 for one in content["grid"].values() for error in one["errors"].values())
    elif name == "kernels":
        found = content["shapes"]["2x128"]
        assert found["failures"] == {}
        assert max(found["errors"].values()) < 1e-2
        whats = ("pass", "newest", "early pass", "early newest")
        lending = {f"{what} of {layers}" for what in whats for layers in (2, 4)}
        assert set(found["best"]) == {"leader", "follower", "alone", *lending}
    else:
        assert set(content["parts"]) == {"text", "steps", "stock", "prompts", "capacity", "sweep", "profile"}
        assert content["parts"]["text"]["summary"]["base, float32"]["equal_tokens"] == 256
