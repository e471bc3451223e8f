"""Which state a stage ends with, when training stops by itself, LoRA's weights, and settings handed to TRL."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from training_run import CPU, Interrupting, Recorder, fresh_run, log_of, stages, weights, without_times

from uniattn_cli.commands.train import train
from uniattn_cli.errors import RecipeError, StageError
from uniattn_cli.models.hub import locate
from uniattn_cli.models.loading import load_model
from uniattn_cli.options import RunOptions
from uniattn_cli.recipe.schema import LoraSpec, ModelSpec, Recipe, TrainSpec, TrainStage
from uniattn_cli.training.monitor import WINDOW, Log, Monitor, Watch
from uniattn_cli.training.trl_config import SCHEDULES, make_config, warmup_steps

# Losses on validation rows as they would be measured: at the start, and after steps 2, 4, 6 and 8.
MEASURED = {"middle": [3.0, 2.5, 2.0, 2.2, 2.4], "start": [3.0, 3.5, 3.4, 3.3, 3.2], "end": [3.0, 2.5, 2.4, 2.3, 2.2]}
KEPT = {"middle": 4, "start": 0, "end": 8}
SETTING = [*stages("trains: all, steps: 8, learning_rate: 0.003"), "train.eval_steps=2"]


@pytest.fixture
def run(tmp_path: Path) -> Path:
    return fresh_run(tmp_path / "run")


def measure(monkeypatch, losses: list[float], states: dict[int, dict[str, torch.Tensor]] | None = None) -> None:
    """Lets validation measure these losses, one after the other, and keeps the weights that it saw."""
    from uniattn_cli.training import stage

    indices = iter(range(len(losses)))

    def validation_loss(model, rows, *, batch_size):
        index = next(indices)
        if states is not None:
            states[2 * index] = {name: tensor.detach().clone() for name, tensor in model.named_parameters()}
        return losses[index]

    monkeypatch.setattr(stage, "validation_loss", validation_loss)


@pytest.mark.parametrize(
    ("case", "trains"),
    [
        ("middle", "lora"),
        ("start", "all"),
        *(
            pytest.param(case, trains, marks=pytest.mark.slow)
            for case, trains in (("middle", "all"), ("start", "lora"), ("end", "all"), ("end", "lora"))
        ),
    ],
)
def test_the_state_of_lowest_validation_loss_is_kept(run, monkeypatch, case, trains):
    states: dict[int, dict[str, torch.Tensor]] = {}
    measure(monkeypatch, MEASURED[case], states)
    setting = [*stages(f"trains: {trains}, steps: 8, learning_rate: 0.003"), "train.eval_steps=2"]
    said = Recorder()
    result = train(run_dir=run, overrides=setting, options=RunOptions(device="cpu", progress=said))
    after = weights(run / "trained")
    expected = states[KEPT[case]]
    for name, tensor in after.items():
        if trains == "lora" and f"{name.removesuffix('.weight')}.base_layer.weight" in expected:
            layer = name.removesuffix(".weight")
            up, down = (expected[f"{layer}.lora_{part}.default.weight"] for part in "BA")
            assert torch.equal(tensor, expected[f"{layer}.base_layer.weight"] + 2 * (up @ down)), name
        else:
            assert torch.equal(tensor, expected[name]), name
    assert result.stages[0].kept_step == KEPT[case]
    assert result.stages[0].validation == (3.0, min(MEASURED[case]))
    loud = [note for note in result.notes if "DID NOT IMPROVE" in note]
    assert bool(loud) == (case == "start") and loud == [text for text in said.warnings if "DID NOT IMPROVE" in text]
    assert any("weights of step 4 of 8" in note for note in result.notes) == (case == "middle")
    report = json.loads((run / "trained" / "uniattn_report.json").read_text())
    assert report["stages"][0]["kept_step"] == KEPT[case]


def test_the_last_state_is_kept_where_the_recipe_wants_it(run, monkeypatch):
    states: dict[int, dict[str, torch.Tensor]] = {}
    measure(monkeypatch, MEASURED["start"], states)
    result = train(run_dir=run, overrides=[*SETTING, "train.keep=last"], options=CPU)
    after = weights(run / "trained")
    assert all(torch.equal(after[name], states[8][name]) for name in after)
    assert result.stages[0].kept_step == 8 and result.stages[0].validation == (3.0, 3.2)


def test_an_interruption_changes_nothing_about_the_state_that_is_kept(run, monkeypatch):
    states: dict[int, dict[str, torch.Tensor]] = {}
    # The best state, of step 4, comes after the checkpoint of step 3.
    measure(monkeypatch, MEASURED["middle"], states)
    with pytest.raises(KeyboardInterrupt):
        train(run_dir=run, overrides=SETTING, options=RunOptions(device="cpu", progress=Interrupting(5)))
    measure(monkeypatch, MEASURED["middle"][2:])
    result = train(run_dir=run, overrides=SETTING, options=CPU)
    after = weights(run / "trained")
    assert result.stages[0].kept_step == 4
    assert all(torch.equal(after[name], states[4][name]) for name in after)
    lines = [(line["step"], line["validation_loss"]) for line in log_of(run / "trained") if "validation_loss" in line]
    assert lines == list(zip((0, 2, 4, 6, 8), MEASURED["middle"], strict=True))


def test_validation_rows_are_others_than_those_of_the_report(run):
    from uniattn_cli.commands.train import _validation
    from uniattn_cli.data.heldout import response_rows

    recipe = Recipe.load(run / "recipe.yaml")
    from uniattn_cli.models.tokenizer import load_tokenizer

    tokenizer = load_tokenizer(locate(str(run / "base")))
    reported = response_rows(recipe, tokenizer)
    said = Recorder()
    rows = _validation(recipe, tokenizer, reported, said)
    as_text = [{tuple(row.tolist()) for row in each.tokens} for each in (reported, rows)]
    assert len(rows) >= 8 and not as_text[0] & as_text[1] and said.notes == []
    recipe = Recipe.load(run / "recipe.yaml", ["evaluation.responses=36"])
    reported = response_rows(recipe, tokenizer)
    assert _validation(recipe, tokenizer, reported, said) is reported
    assert "too few rows are held out" in said.notes[0]


def test_validation_scores_as_the_report_does(run):
    from uniattn_cli.models.losses import Rows, row_losses
    from uniattn_cli.training.objective import attach_objective
    from uniattn_cli.training.validation import validation_loss

    model = load_model(locate(str(run / "converted")), ModelSpec(), torch.device("cpu"))
    torch.manual_seed(0)
    tokens = [torch.randint(4, 200, (length,)) for length in (20, 3, 11, 30)]
    labels = [torch.where(torch.arange(len(row)) < 2, -100, row) for row in tokens]
    rows = Rows(tokens, labels)
    expected = row_losses(model, rows, batch_size=2).summary().mean
    attach_objective(model)
    model.train()
    assert validation_loss(model, rows, batch_size=3) == pytest.approx(expected, rel=1e-6)
    assert model.training


def test_training_that_diverges_stops_and_keeps_the_last_checkpoint(run):
    setting = [*stages("trains: everything, steps: 40, learning_rate: 1.0"), "train.schedule=constant"]
    with pytest.raises(StageError, match=r"diverged: the loss of stage 'everything' has risen to .* learning_rate"):
        train(run_dir=run, overrides=[*setting, "train.max_rise=1.5"], options=CPU)
    checkpoint = next((run / ".trained.partial" / "stages" / "1-everything").glob("checkpoint-*"))
    assert (checkpoint / "trainer_state.json").is_file() and not (run / "trained").exists()


@pytest.mark.parametrize(
    ("loss", "says"),
    [(5.5, r"validation rows has risen to 5\.50, from 3\.00 at step 4"), (float("nan"), "validation rows is nan at")],
)
def test_a_validation_loss_that_diverges_stops(tmp_path, loss, says):
    measured = iter([3.0, 3.5, loss])
    log = Log(tmp_path / "log.jsonl", writes=True)
    monitor = Monitor("all", 8, [1] * 8, log, print, validate=lambda model: next(measured), max_rise=2.0)
    trainer = SimpleNamespace(model=None, report=lambda **figures: None, folder=tmp_path)
    monitor.on_train_begin(None, None, None, trainer=trainer)
    monitor._validate(trainer, 2)
    with pytest.raises(StageError, match=says):
        monitor._validate(trainer, 4)


def test_watching_ignores_single_steps_and_falls():
    watch = Watch(2.0)
    noisy = [6.0, 5.0, 5.5, 9.0, 4.0, 3.0, 8.0, 3.0, 3.0, 2.5, 6.0, 2.0]
    assert all(watch.trouble(loss) == "" for loss in noisy)
    rising = [watch.trouble(2.0 + step) for step in range(WINDOW + 2)]
    assert rising[0] == "" and "has risen to" in rising[-1]
    assert Watch(2.0).trouble(float("inf")) == "is inf"


def test_warm_up_is_never_too_short_unless_it_is_off():
    spec, stage = TrainSpec(warmup=0.05), TrainStage()
    assert [warmup_steps(spec, stage, steps) for steps in (1, 4, 20, 100, 1000)] == [0, 2, 10, 10, 50]
    assert warmup_steps(TrainSpec(warmup=0.0), stage, 100) == 0
    assert warmup_steps(spec, TrainStage(warmup=0.3), 100) == 30


def config_of(spec: TrainSpec, tmp_path: Path, stage: TrainStage | None = None):
    cpu = torch.device("cpu")
    return make_config(spec, stage or TrainStage(), folder=tmp_path, steps=3, accumulation=1, device=cpu, seed=0)


def test_a_stage_has_its_own_schedule(tmp_path):
    kinds = [config_of(TrainSpec(), tmp_path, TrainStage(schedule=each)).lr_scheduler_type for each in SCHEDULES]
    assert [str(getattr(kind, "value", kind)) for kind in kinds] == list(SCHEDULES.values())
    kind = config_of(TrainSpec(schedule="linear"), tmp_path).lr_scheduler_type
    assert getattr(kind, "value", kind) == "linear"


def test_optimizers_of_transformers_are_passed_through(run, tmp_path):
    for name in ("sgd", "adafactor"):
        assert config_of(TrainSpec(optimizer=name), tmp_path).optim == name
    with pytest.raises(RecipeError, match=r"unknown 'adamw_8bits' \(did you mean 'adamw_8bit'\?\)"):
        train(run_dir=run, overrides=["train.optimizer=adamw_8bits"], options=CPU)


@pytest.mark.parametrize(
    ("setting", "says"),
    [
        ("train.optimizer=adamw_8bit", "bitsandbytes"),
        ("train.activation_offloading=true", "needs a CUDA device"),
        ("train.fsdp=true", "needs several processes"),
        ("train.report_to=[tensorboard]", "pip install tensorboard"),
        ("train.report_to=[tensorbord]", "did you mean 'tensorboard'?"),
        ("train.stages=[{trains: lora, lora: {targets: [q_projj]}}]", "did you mean 'q_proj'?"),
        ("train.stages=[{trains: lora}]", "pip install 'uniattn[lora]'"),
    ],
)
def test_what_is_missing_here_is_said_before_anything_begins(run, setting, says, monkeypatch):
    import importlib.util

    missing = ("bitsandbytes", "tensorboard", "tensorboardX", "peft")
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *rest: None if name in missing else find(name, *rest))
    with pytest.raises((RecipeError, StageError)) as caught:
        train(run_dir=run, overrides=[setting], options=CPU)
    assert says in str(caught.value)
    assert not (run / ".trained.partial").exists()


def test_reporters_get_losses_and_write_into_the_output(run, monkeypatch):
    import os

    from transformers import TrainerCallback
    from transformers.integrations import integration_utils

    from uniattn_cli.training import trl_config

    seen = []

    class Reporter(TrainerCallback):
        def on_log(self, args, state, control, logs=None, **kwargs):
            seen.append((os.environ["TENSORBOARD_LOGGING_DIR"], args.run_name, logs))

    monkeypatch.setitem(integration_utils.INTEGRATION_TO_CALLBACK, "tensorboard", Reporter)
    monkeypatch.setattr(trl_config, "check_reporters", lambda names: None)
    setting = [*stages("trains: all, steps: 4"), "train.report_to=[tensorboard]"]
    train(run_dir=run, overrides=setting, options=CPU)
    assert {Path(folder).parent.name for folder, _, _ in seen} == {"tensorboard"}
    assert {name for _, name, _ in seen} == {"run-all"}
    keys = {key for _, _, logs in seen for key in logs}
    assert {"loss", "learning_rate", "grad_norm", "eval_validation_loss"} <= keys
    assert "TENSORBOARD_LOGGING_DIR" not in os.environ


def test_lora_names_only_what_exists_and_leaves_low_rank_compensation_to_itself(run):
    from uniattn_cli.training.lora import adapted_names, directly_trained

    model = load_model(locate(str(run / "converted")), ModelSpec(), torch.device("cpu"))
    names = adapted_names(model, LoraSpec())
    assert "model.layers.1.self_attn.compensation" in names and "model.layers.0.self_attn.q_proj" in names
    assert not any("layers.1.self_attn.q_proj" in name or "layers.3.self_attn.compensation" in name for name in names)
    low_rank = [f"model.layers.3.self_attn.compensation.{part}.weight" for part in ("down", "up")]
    assert directly_trained(model, LoraSpec()) == low_rank
    full = LoraSpec(compensation="full")
    assert directly_trained(model, full) == ["model.layers.1.self_attn.compensation.weight", *low_rank]
    assert "model.layers.1.self_attn.compensation" not in adapted_names(model, full)


@pytest.mark.slow
def test_lora_dropout_resumes_exactly(run):
    setting = stages("trains: lora, steps: 8, learning_rate: 0.003, lora: {dropout: 0.3, rank: 4}")
    result = train(run_dir=run, overrides=setting, options=CPU)
    expected, lines = weights(run / "trained"), log_of(run / "trained")
    assert result.stages[0].parameters < 20000 and set(expected) == set(weights(run / "converted"))
    shutil.rmtree(run / "trained")
    with pytest.raises(KeyboardInterrupt):
        train(run_dir=run, overrides=setting, options=RunOptions(device="cpu", progress=Interrupting(5)))
    train(run_dir=run, overrides=setting, options=CPU)
    after = weights(run / "trained")
    assert all(torch.equal(after[name], expected[name]) for name in expected)
    assert without_times(log_of(run / "trained")) == without_times(lines)
