"""`uniattn train --control`: the base on the same rows in the same order, and what evaluation makes of it."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from training_run import CPU, Interrupting, Recorder, log_of, make_run, stages, weights, without_times

from uniattn_cli.commands.evaluate import evaluate
from uniattn_cli.commands.train import train
from uniattn_cli.errors import StageError
from uniattn_cli.options import RunOptions
from uniattn_cli.recipe.schema import LoraSpec, TrainStage
from uniattn_cli.training.trained import control_stages


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> Path:
    """A run with `trained/` and `control/`. Tests only read it."""
    run = make_run(tmp_path_factory.mktemp("control") / "run")
    text = "\n\n".join(f"Paragraph {n} says that {n} times {n} is {n * n}." for n in range(100))
    (run / "text.txt").write_text(text + "\n", encoding="utf-8")
    train(run_dir=run, options=CPU)
    train(run_dir=run, control=True, options=CPU)
    return run


@pytest.fixture
def run(trained: Path, tmp_path: Path) -> Path:
    shutil.copytree(trained, tmp_path / "run")
    return tmp_path / "run"


def evaluated(run: Path, *more: str):
    settings = [
        f"data.text={run / 'text.txt'}",
        "evaluation.tokens=512",
        "evaluation.length=64",
        "evaluation.tasks=[]",
        "evaluation.speed.enabled=false",
    ]
    return evaluate(run_dir=run, overrides=[*settings, *more], options=RunOptions(device="cpu", force=True))


def test_the_control_sees_what_the_model_sees(trained, monkeypatch):
    records = [json.loads((trained / name / "stage.json").read_text()) for name in ("trained", "control")]
    assert records[0]["inputs"]["data"] == records[1]["inputs"]["data"]
    assert records[0]["seed"] == records[1]["seed"]
    logs = [log_of(trained / name) for name in ("trained", "control")]
    for key in ("stage", "step", "tokens"):
        assert [line.get(key) for line in logs[0]] == [line.get(key) for line in logs[1]]
    reports = [json.loads((trained / name / "uniattn_report.json").read_text()) for name in ("trained", "control")]
    assert [each["rows"] for each in reports[0]["stages"]] == [each["rows"] for each in reports[1]["stages"]]
    assert set(reports[1]["heldout_responses"]) == {"base", "control"}
    assert (trained / "control" / "loss.png").is_file()


def test_the_control_is_a_stock_model_of_which_the_same_part_was_trained(trained):
    before, after = weights(trained / "base"), weights(trained / "control")
    assert list(before) == list(after)
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed == {name for name in before if "embed_tokens" not in name and "lm_head" not in name}
    assert json.loads((trained / "control" / "config.json").read_text())["model_type"] == "llama"
    assert not list((trained / "control").glob("modeling_*"))


def test_rows_come_in_the_same_order(trained, tmp_path, monkeypatch):
    from uniattn_cli.training.trainer import StageTrainer

    seen = []

    def compute(self, model, inputs, *args, **kwargs):
        seen[-1].append(inputs["input_ids"].clone())
        return original(self, model, inputs, *args, **kwargs)

    original = StageTrainer.compute_loss
    monkeypatch.setattr(StageTrainer, "compute_loss", compute)
    shutil.copytree(trained, tmp_path / "run")
    for control in (False, True):
        seen.append([])
        train(run_dir=tmp_path / "run", control=control, options=RunOptions(device="cpu", force=True))
    assert len(seen[0]) == 24 and all(torch.equal(*pair) for pair in zip(*seen, strict=True))


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        (["compensation", "all"], ["all", "all"]),
        (["followers", "compensation", "lora"], ["lora", "lora", "lora"]),
        (["attention", "compensation"], ["attention", "attention"]),
        (["compensation"], ["all"]),
        (["everything"], ["everything"]),
    ],
)
def test_what_the_base_trains_where_it_has_nothing_of_that_name(given, expected):
    rates = [10.0**-index for index in range(3, 3 + len(given))]
    spec = [
        TrainStage(trains=name, learning_rate=rate, epochs=0.5, loss="distillation")
        for name, rate in zip(given, rates, strict=True)
    ]
    found = control_stages(spec)
    assert [stage.trains for stage in found] == expected
    assert [stage.label for stage in found] == given
    assert {stage.loss for stage in found} == {"cross_entropy"} and {stage.epochs for stage in found} == {0.5}
    own = {stage.trains: stage.learning_rate for stage in spec}
    assert [stage.learning_rate for stage in found] == [own.get(name, TrainStage().learning_rate) for name in expected]
    targets = control_stages([TrainStage(trains="lora", lora=LoraSpec(targets=("v_proj", "compensation")))])
    assert targets[0].lora.targets == ("v_proj",)


def test_a_stage_that_the_layout_has_nothing_for_is_skipped_by_both(tmp_path):
    run = make_run(tmp_path / "run", layout=[{}, {"leader": 0, "compensation": "none"}, {}, {}])
    results = [train(run_dir=run, control=control, options=CPU) for control in (False, True)]
    assert [[stage.name for stage in result.stages] for result in results] == [["all"], ["all"]]


def test_an_interrupted_control_ends_like_any_other(run, trained):
    shutil.rmtree(run / "control")
    with pytest.raises(KeyboardInterrupt):
        train(run_dir=run, control=True, options=RunOptions(device="cpu", progress=Interrupting(9)))
    assert not (run / "control").exists()
    with pytest.raises(StageError, match=r"train\.batch_size: 8 -> 16.*--control --force"):
        train(run_dir=run, control=True, overrides=["train.batch_size=16"], options=CPU)
    said = Recorder()
    train(run_dir=run, control=True, options=RunOptions(device="cpu", progress=said))
    assert any("goes on after step 3 of 8" in text for text in said.notes)
    one, other = weights(run / "control"), weights(trained / "control")
    assert all(torch.equal(one[name], other[name]) for name in other)
    assert without_times(log_of(run / "control")) == without_times(log_of(trained / "control"))
    with pytest.raises(StageError, match=r"control is complete; use --force"):
        train(run_dir=run, control=True, options=CPU)


def test_evaluation_compares_with_the_control(run):
    result = evaluated(run)
    assert list(result.results["models"]) == ["base", "control", "converted", "trained"]
    table = result.tables[0]
    assert table.columns == ["", "base", "control", "converted", "trained"]
    rows = {row[0]: row[1:] for row in table.rows}
    assert rows["  − control, paired"][:2] == ["", ""] and all(rows["  − control, paired"][2:])
    models = result.results["models"]
    for key in ("response_loss", "text_loss"):
        scores = {name: models[name]["quality"][key] for name in models}
        difference = scores["trained"]["difference_to_control"]["value"]
        assert difference == pytest.approx(scores["trained"]["value"] - scores["control"]["value"])
        assert scores["control"]["difference_to_control"] is None
        assert scores["trained"]["difference_to_base"]["value"] != difference
    assert "Against the control" in models["trained"]["verdict"]["sentence"]
    assert "Against the control" not in models["converted"]["verdict"]["sentence"]
    assert not any("control/" in note for note in result.notes)
    assert "− control, paired" in (run / "evaluation" / "report.md").read_text()


def test_evaluation_says_that_the_control_is_missing_or_unlike(run):
    train(
        run_dir=run,
        control=True,
        overrides=stages("trains: all, steps: 2"),
        options=RunOptions(device="cpu", force=True),
    )
    notes = evaluated(run).notes
    assert any("control/ is no fair comparison" in note and "train.stages" in note for note in notes)
    # What the base wrote is for a model that has a teacher: that the control lacks it is told, and no fault.
    path = run / "trained" / "stage.json"
    record = json.loads(path.read_text())
    rows = record["settings"]["data"]["train"]
    rows.append(rows[0] | {"source": "synthetic/text.jsonl", "heldout": False})
    record["inputs"]["data"] = "another"
    path.write_text(json.dumps(record))
    (fault,) = (note for note in evaluated(run).notes if "control/" in note)
    assert "differ in data.train, train.stages, the training rows)" in fault
    for stage in record["settings"]["train"]["stages"]:
        stage["loss"] = "distillation"
    path.write_text(json.dumps(record))
    (told, fault) = (note for note in evaluated(run).notes if "control/" in note)
    assert "control/ did not see synthetic/text.jsonl (heldout: false)" in told
    assert "differ in train.stages)" in fault
    shutil.rmtree(run / "control")
    notes = evaluated(run).notes
    assert any("control/ is missing" in note and "uniattn train recipe.yaml --control" in note for note in notes)
    shutil.rmtree(run / "trained")
    # Nothing has been trained, so there is nothing to be unfair about.
    assert not any("control/" in note for note in evaluated(run).notes)


def test_the_command_writes_control(run, uniattn):
    shutil.rmtree(run / "control")
    done = uniattn("train", "--control", "-C", run, "--device", "cpu", cwd=run)
    assert done.returncode == 0, done.stderr
    assert (run / "control" / "stage.json").is_file() and "control" in done.stdout
