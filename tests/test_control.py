"""`uniattn train --control`: the base on the same rows in the same order, as a teacher and in the evaluation."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from training_run import CPU, Interrupting, fresh_run, log_of, stages, weights, without_times

from uniattn_cli.commands.evaluate import evaluate
from uniattn_cli.commands.train import train
from uniattn_cli.errors import StageError
from uniattn_cli.evaluation.subjects import find_subjects
from uniattn_cli.modeling.layout_uniattn import Layout
from uniattn_cli.models.hub import locate
from uniattn_cli.models.loading import load_config
from uniattn_cli.options import RunOptions
from uniattn_cli.recipe.schema import DatasetSpec, DistillationSpec, LoraSpec, Recipe, TrainSpec, TrainStage
from uniattn_cli.run.directory import RunDir
from uniattn_cli.training.trained import control_stages, planned_stages
from uniattn_cli.training.trainer import StageTrainer

DISTIL = [
    *stages("trains: all, loss: distillation, steps: 2, learning_rate: 0.0005"),
    "train.distillation={weight: 0.5}",
]


@pytest.fixture(scope="module")
def seen() -> dict[str, list[torch.Tensor]]:
    """Tokens of each micro-batch, by the folder that was trained."""
    return {}


@pytest.fixture(scope="module")
def trained(tmp_path_factory, seen) -> Path:
    """A run with `trained/` and `control/`. Tests only read it."""
    run = fresh_run(tmp_path_factory.mktemp("control") / "run")
    text = "\n\n".join(f"Paragraph {n} says that {n} times {n} is {n * n}." for n in range(100))
    (run / "text.txt").write_text(text + "\n", encoding="utf-8")
    original = StageTrainer.compute_loss
    with pytest.MonkeyPatch.context() as patch:
        for control, name in ((False, "trained"), (True, "control")):
            batches = seen[name] = []

            def compute(self, model, inputs, *args, batches=batches, **kwargs):
                batches.append(inputs["input_ids"].clone())
                return original(self, model, inputs, *args, **kwargs)

            patch.setattr(StageTrainer, "compute_loss", compute)
            train(run_dir=run, control=control, options=CPU)
    return run


@pytest.fixture
def run(trained: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(trained, tmp_path / "run"))


def evaluated(run: Path, *more: str):
    settings = [
        f"data.text={run / 'text.txt'}",
        "evaluation.tokens=512",
        "evaluation.length=64",
        "evaluation.tasks=[]",
        "evaluation.speed.enabled=false",
    ]
    return evaluate(run_dir=run, overrides=[*settings, *more], options=RunOptions(device="cpu", force=True))


def test_the_control_sees_what_the_model_sees(trained, seen):
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
    assert len(seen["trained"]) == 24
    assert all(torch.equal(*pair) for pair in zip(seen["trained"], seen["control"], strict=True))


def test_the_control_is_a_stock_model_of_which_the_same_part_was_trained(trained):
    before, after = weights(trained / "base"), weights(trained / "control")
    assert list(before) == list(after)
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed == {name for name in before if "embed_tokens" not in name and "lm_head" not in name}
    assert json.loads((trained / "control" / "config.json").read_text())["model_type"] == "llama"
    assert not list((trained / "control").glob("modeling_*"))


@pytest.mark.parametrize(
    ("trains", "expected"),
    [
        (["compensation", "all"], ["all", "all"]),
        (["followers", "compensation", "lora"], ["lora", "lora", "lora"]),
        (["attention", "compensation"], ["attention", "attention"]),
        (["compensation"], ["all"]),
        (["everything"], ["everything"]),
    ],
)
def test_what_the_base_trains_where_it_has_nothing_of_that_name(trains, expected):
    rates = [10.0**-index for index in range(3, 3 + len(trains))]
    spec = [
        TrainStage(trains=name, learning_rate=rate, epochs=0.5, loss="distillation")
        for name, rate in zip(trains, rates, strict=True)
    ]
    found = control_stages(spec, TrainSpec())
    assert [stage.trains for stage in found] == expected
    assert [stage.label for stage in found] == trains
    assert {stage.loss for stage in found} == {"cross_entropy"} and {stage.epochs for stage in found} == {0.5}
    own = {stage.trains: stage.learning_rate for stage in spec}
    assert [stage.learning_rate for stage in found] == [own.get(name, TrainStage().learning_rate) for name in expected]
    assert control_stages([TrainStage(changed_learning_rate=1e-3)], TrainSpec())[0].changed_learning_rate is None
    targets = control_stages(
        [TrainStage(trains="lora", lora=LoraSpec(targets=("v_proj", "compensation")))], TrainSpec()
    )
    assert targets[0].lora.targets == ("v_proj",)


def test_the_base_skips_what_only_wins_back_what_it_never_lost():
    own = (DatasetSpec("text.jsonl"),)
    spec = TrainSpec(distillation=DistillationSpec(teacher="base"))
    kept = [
        TrainStage(trains="followers", loss="local", name="local on the training rows"),
        TrainStage(data=own, name="learns from the text"),
        TrainStage(data=own, loss="distillation", distillation=DistillationSpec(), name="from the control, too"),
        TrainStage(loss="distillation", name="on the training rows"),
    ]
    left_out = [
        TrainStage(trains="followers", loss="local", data=own),
        TrainStage(loss="distillation", data=own),
        TrainStage(loss="distillation", data=own, distillation=DistillationSpec(teacher="base", hidden=1.0)),
    ]
    assert [stage.label for stage in control_stages([*left_out, *kept], spec)] == [stage.label for stage in kept]
    with pytest.raises(StageError, match="the base is its own control"):
        control_stages(left_out, spec)


def test_a_stage_that_the_layout_has_nothing_for_is_skipped_by_both(trained):
    config = load_config(locate(str(trained / "converted")), converted=True)
    config.set_layout(Layout.from_list([{}, {"leader": 0, "compensation": "none"}, {}, {}]))
    planned, notes = planned_stages([TrainStage(trains="compensation"), TrainStage(trains="all")], config)
    assert (
        [stage.label for stage in planned] == [stage.label for stage in control_stages(planned, TrainSpec())] == ["all"]
    )
    assert len(notes) == 1 and "'compensation' was skipped" in notes[0]


def test_an_interrupted_control_ends_like_any_other(run, trained, uniattn):
    shutil.rmtree(run / "control")
    with pytest.raises(KeyboardInterrupt):
        train(run_dir=run, control=True, options=RunOptions(device="cpu", progress=Interrupting(9)))
    assert not (run / "control").exists()
    with pytest.raises(StageError, match=r"train\.batch_size: 8 -> 16.*--control --force"):
        train(run_dir=run, control=True, overrides=["train.batch_size=16"], options=CPU)
    done = uniattn("train", "--control", "-C", run, "--device", "cpu", cwd=run)
    assert done.returncode == 0, done.stderr
    assert "resumes after step 3 of 8" in done.stderr and "control" in done.stdout
    one, other = weights(run / "control"), weights(trained / "control")
    assert all(torch.equal(one[name], other[name]) for name in other)
    assert without_times(log_of(run / "control")) == without_times(log_of(trained / "control"))
    with pytest.raises(StageError, match=r"control is complete; use --force"):
        train(run_dir=run, control=True, options=CPU)


def test_the_control_is_a_teacher_once_it_is_there(run):
    shutil.rmtree(run / "trained")
    train(run_dir=run, overrides=DISTIL, options=CPU)
    teacher = json.loads((run / "trained" / "stage.json").read_text())["inputs"]["teacher"]
    assert teacher == locate(str(run / "control")).fingerprint
    shutil.rmtree(run / "control")
    with pytest.raises(StageError, match=r"control is missing; run `uniattn train recipe\.yaml --control` first"):
        train(run_dir=run, overrides=DISTIL, options=RunOptions(device="cpu", force=True))


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
        difference = scores["trained"].difference_to_control.value
        assert difference == pytest.approx(scores["trained"].value - scores["control"].value)
        assert scores["control"].difference_to_control is None
        assert scores["trained"].difference_to_base.value != difference
    assert "Compared with the control" in models["trained"]["verdict"]["sentence"]
    assert "Compared with the control" not in models["converted"]["verdict"]["sentence"]
    assert not any("control/" in note for note in result.notes)
    assert "− control, paired" in (run / "evaluation" / "report.md").read_text()


def change_record(path: Path, **settings) -> None:
    record = json.loads(path.read_text())
    for key, value in settings.items():
        record["settings"]["train" if key == "stages" else "data"][key] = value
    path.write_text(json.dumps(record))


def test_evaluation_says_that_the_control_is_missing_or_unlike(run):
    settings = json.loads((run / "trained" / "stage.json").read_text())["settings"]
    entries, rows = settings["train"]["stages"], settings["data"]["train"]

    def notes() -> list[str]:
        subjects = find_subjects(RunDir(run), Recipe.load(run / "recipe.yaml"), [])
        return [note for note in subjects[1] if "control/" in note]

    assert notes() == []
    change_record(run / "control" / "stage.json", stages=entries[:1])
    (fault,) = notes()
    assert "control/ is not a fair comparison" in fault and "train.stages" in fault
    # What the base wrote is for a model that has a teacher: that the control lacks it is noted, and no fault.
    written = rows[0] | {"source": "synthetic/text.jsonl", "heldout": False}
    change_record(run / "trained" / "stage.json", train=[*rows, written])
    path = run / "trained" / "stage.json"
    record = json.loads(path.read_text())
    record["inputs"]["data"] = "another"
    path.write_text(json.dumps(record))
    (fault,) = notes()
    assert "differ in data.train, train.stages, the training rows)" in fault
    change_record(path, stages=[stage | {"loss": "distillation"} for stage in entries])
    (note, fault) = notes()
    assert "control/ was not trained on synthetic/text.jsonl (heldout: false)" in note
    assert "differ in train.stages)" in fault
    shutil.rmtree(run / "control")
    (note,) = notes()
    assert "control/ is missing" in note and "uniattn train recipe.yaml --control" in note
    shutil.rmtree(run / "trained")
    # Nothing has been trained, so there is nothing to be unfair about.
    assert notes() == []
