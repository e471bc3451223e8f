"""Changed layers that learn on the base's own hidden states, all of them in one forward pass."""

from __future__ import annotations

import copy
import json
import shutil
from pathlib import Path

import pytest
import torch
from tiny import FAMILIES, TYPICAL, make_base, make_layout
from training_run import CPU, Recorder, fresh_run, log_of, losses_of, make_run, stages, torn_run

from uniattn_cli.commands.train import train
from uniattn_cli.errors import DataError, RecipeError
from uniattn_cli.evaluation.subjects import find_subjects
from uniattn_cli.modeling.layout_uniattn import Layout
from uniattn_cli.models.building import build_converted
from uniattn_cli.models.losses import IGNORED
from uniattn_cli.options import RunOptions
from uniattn_cli.recipe.schema import Recipe, TrainStage
from uniattn_cli.run.directory import RunDir
from uniattn_cli.training.local import LocalDistillation
from uniattn_cli.training.objective import attach_objective
from uniattn_cli.training.teaching import share_weights
from uniattn_cli.training.trained import freeze_all_but, trained_names

LOCAL = [
    *stages(
        "trains: followers, loss: local, steps: 6, learning_rate: 0.01", "trains: all, steps: 2, learning_rate: 0.0001"
    ),
    "train.log_steps=1",
    "train.save_steps=100",
    "train.keep=last",
]


def perturbed(base, layout):
    """A converted model, with weights of its own, whose changed layers' attention is not the base's."""
    model = copy.deepcopy(build_converted(base, layout))
    torch.manual_seed(3)
    for index in layout.changed:
        for parameter in model.model.layers[index].self_attn.parameters():
            parameter.data += 0.05 * torch.randn_like(parameter)
    return model


def attention_output(model, layer, inputs):
    """[batch, tokens, hidden], of an ordinary forward pass."""
    kept = []
    handle = model.model.layers[layer].self_attn.register_forward_hook(lambda m, i, output: kept.append(output[0]))
    model(**inputs, use_cache=False)
    handle.remove()
    return kept[0]


CASES = [
    pytest.param(entry, name, id=f"{entry[0]}-{name}", marks=[] if entry[0] in TYPICAL else [pytest.mark.slow])
    for entry in FAMILIES
    for name in ("early", "others")
]


@pytest.mark.parametrize(("entry", "name"), CASES)
def test_each_layer_learns_as_if_it_alone_were_changed(entry, name):
    base = make_base(entry).eval()
    layout = make_layout(name, base.config)
    student = perturbed(base, layout)
    layers = [i for i in layout.changed if layout[i].kind != "none"]
    objective = LocalDistillation(base, layers, student.config)
    tokens = torch.arange(40).view(2, 20) * 7 % 80 + 5
    mask = torch.ones_like(tokens)
    mask[1, 15:] = 0
    inputs = {"input_ids": tokens, "attention_mask": mask}
    batch = inputs | {"labels": torch.full_like(tokens, IGNORED)}
    objective.prepare([batch])
    attach_objective(student)
    freeze_all_but(student, trained_names(student, TrainStage(trains="followers")), None)
    targets, count = objective.targets(batch), objective.counts(batch)["attention"]
    loss = student(
        **inputs, use_cache=False, objective=lambda model, given: objective.loss_sums(model, given, targets)
    )["attention"]
    loss.backward()
    places = mask[:, 1:].bool()
    assert count == places.sum()
    expected = []
    for layer in layers:
        alone = copy.deepcopy(build_converted(base, Layout.own(len(layout)).with_plan(layer, layout[layer])))
        alone.model.layers[layer].self_attn.load_state_dict(student.model.layers[layer].self_attn.state_dict())
        ours, theirs = (attention_output(model, layer, inputs)[:, :-1][places] for model in (alone, base))
        expected.append((ours - theirs).square().sum() / theirs.square().sum())
        expected[-1].backward()
        for key, parameter in alone.model.layers[layer].self_attn.named_parameters():
            found = student.model.layers[layer].self_attn.get_parameter(key).grad
            wanted = parameter.grad * count / len(layers)
            assert (found - wanted).abs().max() <= 1e-4 * wanted.abs().max() + 1e-6, (layer, key)
    assert loss.item() == pytest.approx(count.item() * torch.stack(expected).mean().item(), rel=1e-4)
    assert not any(layer.self_attn._forward_hooks for layer in student.model.layers)


def test_packed_rows_learn_what_each_learns_alone():
    base = make_base(FAMILIES[0]).eval()
    layout = make_layout("early", base.config)
    student = perturbed(base, layout)
    objective = LocalDistillation(base, layout.changed, student.config)
    rows = [torch.arange(5, 25)[None], torch.arange(40, 52)[None]]
    places = [torch.arange(row.shape[1])[None] for row in rows]
    packed = {"input_ids": torch.cat(rows, 1), "position_ids": torch.cat(places, 1)}
    alone = [{"input_ids": row, "attention_mask": torch.ones_like(row)} for row in rows]
    objective.prepare([packed | {"labels": packed["input_ids"]}])

    def loss(inputs):
        targets = objective.targets(inputs | {"labels": inputs["input_ids"]})
        return objective.loss_sums(student, inputs | {"use_cache": False}, targets)["attention"].item()

    assert loss(packed) == pytest.approx(sum(map(loss, alone)), rel=1e-4)


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    """A run whose changed layers are not what they should be, trained. Tests only read it."""
    run = torn_run(tmp_path_factory.mktemp("local") / "run")
    train(run_dir=run, overrides=LOCAL, options=CPU)
    return run


def test_a_local_stage_learns_and_a_stage_of_another_sort_follows(run):
    lines = [line for line in log_of(run / "trained") if "loss" in line]
    assert [line["stage"] for line in lines] == ["followers"] * 6 + ["all"] * 2
    assert lines[5]["loss"] < 0.5 * lines[0]["loss"]
    record = json.loads((run / "trained" / "stage.json").read_text())
    assert record["inputs"]["teacher"] == record["inputs"]["model"]


@pytest.mark.parametrize(
    "changes",
    [
        ["train.micro_batch_size=1", "train.gradient_checkpointing=true"],
        pytest.param(["train.micro_batch_size=8", "model.attention=sdpa"], marks=pytest.mark.slow),
    ],
)
def test_how_a_step_is_computed_changes_no_loss(run, tmp_path, changes):
    again = Path(shutil.copytree(run, tmp_path / "run", ignore=shutil.ignore_patterns("trained")))
    train(run_dir=again, overrides=[*LOCAL, *changes], options=CPU)
    assert losses_of(again / "trained") == pytest.approx(losses_of(run / "trained"), rel=3e-3)


@pytest.mark.parametrize("trains", ["followers", "lora"])
def test_a_teacher_shares_what_its_student_does_not_train(trains):
    from uniattn_cli.training.trained import prepare

    base = make_base(FAMILIES[0]).eval()
    layout = make_layout("early", base.config)
    student = perturbed(base, layout)
    teacher = copy.deepcopy(base)
    prepare(student, TrainStage(trains=trains), None, seed=0)
    share_weights(teacher, student)
    tokens = torch.arange(5, 25)[None]
    assert torch.equal(teacher(tokens).logits, base(tokens).logits)
    ours = {parameter.data_ptr() for parameter in student.parameters()}
    apart = {name for name, parameter in teacher.named_parameters() if parameter.data_ptr() not in ours}
    assert apart and all(int(name.split(".")[2]) in layout.changed and ".self_attn." in name for name in apart)


@pytest.mark.parametrize(
    ("entries", "says"),
    [
        (["trains: all, loss: local"], r"train\.stages\[0\]\.loss: local is for changed layers alone"),
        (["trains: all", "trains: followers, loss: local"], r"stages\[1\]\.loss: .* which stage 'all' changes"),
        (["distillation: {weight: 1}"], r"stages\[0\]\.distillation is only for loss: distillation"),
        (["data: []"], r"stages\[0\]\.data is empty"),
        (["data: [{source: a, heldout: false}]"], r"stages\[0\]\.data\[0\]\.heldout: only rows of data\.train"),
        (
            ["loss: distillation, distillation: {weight: 0, attention: 0}"],
            r"stages\[0\]\.distillation: weight, attention and hidden",
        ),
    ],
)
def test_stages_that_cannot_be(entries, says):
    with pytest.raises(RecipeError, match=says):
        Recipe.from_tree({"model": {"name": "m"}}, overrides=stages(*entries))


def test_rows_of_a_stage_that_are_not_there_are_told_before_any_are_read(tmp_path, monkeypatch):
    monkeypatch.setattr("uniattn_cli.commands.train._stage_data", lambda *_: pytest.fail("rows were read"))
    run = make_run(tmp_path / "run")
    with pytest.raises(DataError, match=r"data file nowhere\.jsonl not found"):
        train(run_dir=run, overrides=stages("trains: all", "name: more, data: nowhere.jsonl"), options=CPU)


def test_a_sharded_model_cannot_learn_locally():
    # A layer's weights would be put together where gradients reach its output, which they never do.
    tree = {"model": {"name": "m"}, "train": {"fsdp": True}}
    with pytest.raises(RecipeError, match=r"stages\[0\]\.loss: train\.fsdp cannot shard"):
        Recipe.from_tree(tree, overrides=LOCAL[:1])


RECOVERY = [
    *stages(
        "name: text, trains: followers, loss: local, data: TEXT, steps: 1",
        "name: recover, loss: distillation, data: DATA, steps: 3, distillation: {teacher: base, attention: 0}",
        "trains: all, steps: 2",
    ),
    "train.log_steps=1",
    "train.keep=last",
]


def test_a_stage_has_rows_and_a_teacher_of_its_own(tmp_path):
    run = fresh_run(tmp_path / "run")
    texts = [{"text": f"{n} and {n} are {n + n}, and so on, for a while"} for n in range(60)]
    (run / "text.jsonl").write_text("".join(json.dumps(row) + "\n" for row in texts))
    own = f"[{run / 'text.jsonl'}, {run / 'data.jsonl'}]"
    settings = [RECOVERY[0].replace("DATA", own).replace("TEXT", str(run / "text.jsonl")), *RECOVERY[1:]]
    said = Recorder()
    found = train(run_dir=run, overrides=settings, options=RunOptions(device="cpu", progress=said))
    assert [(stage.name, stage.steps) for stage in found.stages] == [("text", 1), ("recover", 3), ("all", 2)]
    usual, texts, more = (
        int(note.split()[2].replace(",", "")) for note in said.notes if note.startswith("training rows:")
    )
    # Rows that are held out are nowhere trained on, and of other rows the same share is left out.
    assert 40 <= texts == more - usual < 60
    lines = [line for line in log_of(run / "trained") if "loss" in line]
    assert ["divergence" in line for line in lines] == [False] + [True] * 3 + [False] * 2
    inputs = json.loads((run / "trained" / "stage.json").read_text())["inputs"]
    assert inputs["teacher"] == inputs["model"] and inputs["stage_data"] != inputs["data"]
    # The base has nothing to win back, and sees the rows that the other stage saw.
    control = train(run_dir=run, control=True, overrides=settings, options=CPU)
    assert [(stage.name, stage.tokens) for stage in control.stages] == [("all", found.stages[2].tokens)]
    recipe = Recipe.load(run / "recipe.yaml", settings)
    assert not any("control/" in note for note in find_subjects(RunDir(run), recipe, [])[1])
