"""On-policy distillation: rows whose responses are the student's own, written block by block."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from accelerate.data_loader import BatchSamplerShard
from torch.utils.data import BatchSampler
from training_run import CPU, Interrupting, Recorder, log_of, make_run, stages, torn_run, weights, without_times

from uniattn_cli.commands.train import train
from uniattn_cli.errors import ModelError, RecipeError, StageError
from uniattn_cli.generation import continuing
from uniattn_cli.generation.continuing import Continuer
from uniattn_cli.inference.program import UnsupportedError
from uniattn_cli.models.hub import locate
from uniattn_cli.models.loading import load_model
from uniattn_cli.models.losses import IGNORED
from uniattn_cli.models.tokenizer import load_tokenizer
from uniattn_cli.options import RunOptions
from uniattn_cli.recipe.schema import LoraSpec, ModelSpec, Recipe, SynthesisSpec, TrainStage
from uniattn_cli.training import on_policy
from uniattn_cli.training.on_policy import OnPolicy, prompt_length, take_weights
from uniattn_cli.training.trained import prepare
from uniattn_cli.training.trainer import StageTrainer

ON_POLICY = [
    *stages("trains: all, loss: distillation, steps: 7, learning_rate: 0.01"),
    "train.distillation={teacher: base, tokens: learned, attention: 0, on_policy: 0.75}",
    "train.save_steps=2",
    "train.log_steps=1",
    "train.max_length=40",
    "synthesis={prefix: 6, batch_size: 32}",
]


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """A run directory, its converted model and the tokenizer."""
    run = make_run(tmp_path_factory.mktemp("model") / "run")
    source = locate(str(run / "converted"))
    return load_model(source, ModelSpec(dtype="float32"), torch.device("cpu")), load_tokenizer(source)


@pytest.fixture
def short_blocks(monkeypatch):
    monkeypatch.setattr(on_policy, "STEPS", 3)


SPEC = ("temperature", "engine")


def rows_of(step: int) -> list[dict[str, list[int]]]:
    """The rows of each step: chats and texts, eight of each."""
    chat = {"input_ids": list(range(20, 40)), "labels": [IGNORED] * 12 + list(range(32, 40))}
    text = {"input_ids": list(range(40, 70)), "labels": list(range(40, 70))}
    return [dict(row) for row in [chat, text] * 8]


def make(writer, tokenizer, *, process: int = 0, world: int = 1, **changes) -> OnPolicy:
    settings = {"share": 1.0, "length": 48, "steps": 6, "seed": 0} | changes
    spec = SynthesisSpec(prefix=5, batch_size=8, **{key: settings.pop(key) for key in changes if key in SPEC})
    processes = SimpleNamespace(process_index=process, num_processes=world)
    return OnPolicy(writer, tokenizer, spec, TrainStage(), processes, **settings)


def again(model):
    """The same model once more."""
    return load_model(locate(str(model.name_or_path)), ModelSpec(dtype="float32"), torch.device("cpu"))


@pytest.mark.parametrize(
    ("labels", "expected"),
    [
        ([IGNORED, IGNORED, 5, 6], 2),
        ([IGNORED, IGNORED, 5, IGNORED, IGNORED, 6, IGNORED], 5),  # the last of several answers
        ([4, 5, 6, 7, 8, 9], 4),  # a text
        ([IGNORED, 5, 6, 7, 8, 9], 4),  # a text after a token that begins every text
        ([4, 5, 6], 2),  # a short text, without its end
        ([IGNORED, IGNORED, IGNORED], 0),
        ([4], 0),
    ],
)
def test_what_stays_of_a_row(labels, expected):
    assert prompt_length(labels, 4) == expected


@pytest.mark.parametrize("engine", ["transformers", "engine"])
def test_responses_are_what_the_student_says_now(model, short_blocks, engine):
    student, tokenizer = again(model[0]), model[1]
    rows = rows_of(0)
    own = make(again(student), tokenizer, temperature=0.0, engine=engine)

    def said() -> dict[int, list[int]]:
        """What the student continues each prompt with, by the prompt's length."""
        continuer = Continuer(student, tokenizer, replace(own.continuer.spec, engine="transformers"))
        found = {}
        for row, start in zip(rows[:2], (12, 5), strict=True):
            new = continuer.decode([row["input_ids"][:start]], 48, 0).tokens[0].tolist()[: 48 - start]
            end = continuer.end_of(new)
            found[start] = row["input_ids"][:start] + (new if end is None else new[: end + 1])
        return found

    before = said()
    first = own.rows(0, rows_of, student)
    assert len(first) == len(rows) and [len(row["input_ids"]) for row in first] == sorted(
        (len(row["input_ids"]) for row in first), reverse=True
    )
    for row in first:
        start = 12 if row["input_ids"][0] == 20 else 5
        assert row["input_ids"] == before[start]
        assert row["labels"] == [IGNORED] * start * (start == 12) + row["input_ids"][start * (start == 12) :]
    with torch.no_grad():
        for parameter in student.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    after = said()
    assert after != before
    # Until the block ends, rows are those that were written; then the new weights write.
    assert [row["input_ids"] for row in own.rows(2, rows_of, student)] == [row["input_ids"] for row in first]
    assert {tuple(row["input_ids"]) for row in own.rows(3, rows_of, student)} == {
        tuple(tokens) for tokens in after.values()
    }


def test_a_share_of_the_rows_is_rewritten_and_others_stay(model):
    student, tokenizer = model
    given = {tuple(row["input_ids"]) for row in rows_of(0)}
    found = []
    for _ in range(2):
        own = make(again(student), tokenizer, share=0.5, steps=8)
        rows = [row for step in range(8) for row in own.rows(step, rows_of, student)]
        found.append([tuple(row["input_ids"]) for row in rows])
    assert found[0] == found[1]
    assert 0.35 < sum(row in given for row in found[0]) / len(found[0]) < 0.65
    # Drawn at random, and not the same for the same prompt.
    assert len({row for row in found[0] if row not in given}) > 10


@pytest.mark.parametrize("stage", [TrainStage(), TrainStage(trains="lora", lora=LoraSpec(rank=2))])
def test_the_writer_is_the_student(model, stage):
    pytest.importorskip("peft")
    student, writer = again(model[0]), again(model[0])
    prepare(student, stage, None, 0)
    with torch.no_grad():
        for parameter in student.parameters():
            if parameter.requires_grad:
                parameter.add_(0.05 * torch.randn_like(parameter))
    tokens = torch.arange(2, 42).view(2, 20)
    assert not torch.allclose(student.eval()(tokens).logits, writer(tokens).logits, atol=1e-3)
    take_weights(writer, student, stage)
    assert torch.allclose(student(tokens).logits, writer(tokens).logits, atol=1e-4)


@pytest.mark.parametrize("world", [1, 2, 3])
def test_rows_are_those_that_a_process_is_given(world):
    sampler = BatchSampler(range(world * 24), batch_size=4, drop_last=False)
    for process in range(world):
        given = list(BatchSamplerShard(sampler, world, process))
        arguments = SimpleNamespace(per_device_train_batch_size=4, gradient_accumulation_steps=2)
        accelerator = SimpleNamespace(process_index=process, num_processes=world)
        trainer = SimpleNamespace(args=arguments, accelerator=accelerator, train_dataset=range(world * 24))
        for step in range(3):
            assert StageTrainer.rows_of(trainer, step) == [*given[2 * step], *given[2 * step + 1]]


def test_a_block_is_resumed_by_as_many_processes(model, tmp_path):
    student, tokenizer = model
    own = make(again(student), tokenizer)
    rows = own.rows(1, rows_of, student)
    own.save(tmp_path)
    other = make(own.writer, tokenizer)
    other.resume(tmp_path)
    assert other.block == own.block and other.rows(1, rows_of, student) == rows
    with pytest.raises(StageError, match="was written by 1 processes; resume with the number"):
        make(own.writer, tokenizer, world=2).resume(tmp_path)
    with pytest.raises(StageError, match=r"on_policy_1\.json is missing; resume with the number"):
        make(own.writer, tokenizer, process=1, world=2).resume(tmp_path)


def test_an_interrupted_stage_ends_like_any_other(tmp_path, short_blocks, monkeypatch):
    run = torn_run(tmp_path / "run")
    other = Path(shutil.copytree(run, tmp_path / "other"))
    seen, rows_of_step = [], OnPolicy.rows

    def watched(self, *arguments):
        rows = rows_of_step(self, *arguments)
        seen.append(sum(len(row["input_ids"]) for row in rows))
        return rows

    with monkeypatch.context() as patch:
        patch.setattr(OnPolicy, "rows", watched)
        result = train(run_dir=run, overrides=ON_POLICY, options=CPU)
    lines = [line for line in log_of(run / "trained") if "loss" in line]
    assert lines[-1]["divergence"] < lines[0]["divergence"]
    # Tokens are those that were seen, not those of the data.
    assert result.stages[0].tokens == sum(seen) and lines[2]["tokens"] == sum(seen[:3])
    # Step 4 is inside the second block, which the weights of step 3 have written.
    with pytest.raises(KeyboardInterrupt):
        train(run_dir=other, overrides=ON_POLICY, options=RunOptions(device="cpu", progress=Interrupting(5)))
    said = Recorder()
    resumed = train(run_dir=other, overrides=ON_POLICY, options=RunOptions(device="cpu", progress=said))
    assert any("resumes after step 4 of 7" in text for text in said.notes)
    assert without_times(log_of(other / "trained")) == without_times(log_of(run / "trained"))
    assert replace(resumed.stages[0], seconds=0) == replace(result.stages[0], seconds=0)
    after, reference = weights(other / "trained"), weights(run / "trained")
    assert all(torch.equal(after[name], reference[name]) for name in reference)


def test_an_engine_that_cannot_run_the_student_is_told_before_the_first_stage(tmp_path, monkeypatch):
    def engine_for(model):
        raise UnsupportedError("its output layer has a bias")

    monkeypatch.setattr(continuing, "engine_for", engine_for)
    run = make_run(tmp_path / "run")
    last = "name: own, loss: distillation, steps: 1, distillation: {teacher: base, on_policy: 1}"
    with pytest.raises(ModelError, match=r"its output layer has a bias; remove synthesis\.engine"):
        train(run_dir=run, overrides=[*stages("trains: all, steps: 1", last), "synthesis.engine=engine"], options=CPU)
    assert not (run / ".trained.partial" / "stages").exists()


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        (["train.distillation={on_policy: 0.5, weight: 0.5}"], "set train.distillation.weight to 1"),
        (
            ["train.distillation={on_policy: 0.5, attention: 0, precompute: true}"],
            "train.distillation.on_policy makes new text, of which precompute stores nothing",
        ),
        (["train.distillation={on_policy: 0.5}", "train.packing=true"], "train.packing is impossible"),
        (["train.distillation={on_policy: 0.5}", "train.fsdp=true"], "train.fsdp is impossible"),
    ],
)
def test_settings_that_cannot_be_had_together(settings, says):
    tree = {"model": {"name": "m"}}
    with pytest.raises(RecipeError) as caught:
        Recipe.from_tree(tree, overrides=[*stages("trains: all, loss: distillation"), *settings])
    assert says in str(caught.value)
