"""`uniattn train` on tiny random models: what changes, what is learned, and that a killed run ends like any other."""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import json
import os
import re
import resource
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from tiny_run import make_tokenizer
from training_run import (
    CPU,
    KILLED,
    ROOT,
    Interrupting,
    Recorder,
    fresh_run,
    log_of,
    make_run,
    stages,
    weights,
    without_times,
)

from uniattn_cli.commands.train import Training, train
from uniattn_cli.data.counts import Counts
from uniattn_cli.errors import DataError, RecipeError, StageError, UsageError
from uniattn_cli.models import families
from uniattn_cli.models.hub import locate
from uniattn_cli.models.losses import IGNORED
from uniattn_cli.options import RunOptions
from uniattn_cli.recipe.schema import ModelSpec, Recipe, TrainSpec, TrainStage
from uniattn_cli.run.process import LAUNCHED, join_processes
from uniattn_cli.training import trainer
from uniattn_cli.training.order import GROUPED_STEPS, accumulation, batches, stage_steps
from uniattn_cli.training.preview import check_share, mark
from uniattn_cli.training.trained import freeze_all_but, prepare, trained_names


@pytest.fixture
def run(tmp_path: Path) -> Path:
    return fresh_run(tmp_path / "run")


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> tuple[Path, Training, Recorder]:
    """A run that was never interrupted, its result and its notes. Tests only read it."""
    run = fresh_run(tmp_path_factory.mktemp("whole") / "run")
    said = Recorder()
    return run, train(run_dir=run, options=RunOptions(device="cpu", progress=said)), said


def load(folder: Path, **spec):
    from uniattn_cli.models.loading import load_model

    return load_model(locate(str(folder)), ModelSpec(**spec), torch.device("cpu"))


def test_packing_is_refused_where_a_family_cannot_keep_rows_apart(run, monkeypatch):
    monkeypatch.setitem(families.FAMILIES, "llama", dataclasses.replace(families.FAMILIES["llama"], packs=False))
    with pytest.raises(RecipeError, match=r"train\.packing: .* of type 'llama'; set it to false"):
        train(run_dir=run, overrides=["train.packing=true"], options=CPU)
    assert not (run / "trained").exists()


LINEAR = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
# For each sort of stage, whether it changes a parameter, by its name in the checkpoint.
CHANGED = {
    "trains: compensation": lambda name: ".compensation." in name,
    "trains: followers": lambda name: ".layers.1.self_attn." in name or ".layers.3.self_attn." in name,
    "trains: attention": lambda name: ".self_attn." in name,
    "trains: all": lambda name: "embed_tokens" not in name and "lm_head" not in name,
    "trains: everything": lambda name: True,
    "trains: lora": lambda name: any(part in name for part in (*LINEAR, "compensation")),
    "trains: lora, lora: {targets: [v_proj, down_proj], compensation: full, rank: 2}": lambda name: any(
        part in name for part in ("v_proj", "mlp.down_proj", "compensation")
    ),
    "trains: all, loss: distillation, distillation: {teacher: base}": lambda name: (
        "embed_tokens" not in name and "lm_head" not in name
    ),
}


@pytest.mark.parametrize("stage", CHANGED)
def test_exactly_the_named_parameters_are_trainable(stage, whole):
    recipe = Recipe.from_tree({"model": {"name": "m"}}, overrides=stages(stage))
    model = load(whole[0] / "converted")
    prepare(model, recipe.train.stages[0], None, 0)
    trainable = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    # An adapter changes the weight beside it.
    changed = {re.sub(r"\.(base_layer\.|lora_[AB]\.default\.)", ".", name) for name in trainable}
    names = {name.replace(".base_layer.", ".") for name, _ in model.named_parameters() if ".lora_" not in name}
    assert changed == {name for name in names if CHANGED[stage](name)} and changed
    assert all((".lora_" in name) or ("base_layer" not in name) for name in trainable)


@pytest.mark.slow
@pytest.mark.parametrize("stage", CHANGED)
def test_exactly_the_named_parameters_change(run, stage):
    settings = [*stages(f"{stage}, steps: 3, learning_rate: 0.01"), "train.keep=last"]
    train(run_dir=run, overrides=settings, options=CPU)
    before, after = weights(run / "converted"), weights(run / "trained")
    assert list(before) == list(after)
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed == {name for name in before if CHANGED[stage](name)}
    assert changed


def test_training_lowers_the_loss_on_heldout_responses(whole):
    run, result, _ = whole
    assert result.heldout["converted"].windows == 16
    assert result.heldout["trained"].mean < result.heldout["converted"].mean - 0.2
    assert all(stage.end_loss < stage.start_loss for stage in result.stages)
    report = json.loads((run / "trained" / "uniattn_report.json").read_text())
    assert report["heldout_responses"]["trained"]["mean"] == result.heldout["trained"].mean


@pytest.mark.slow
def test_forty_steps_learn_most_of_the_rule(run):
    result = train(run_dir=run, overrides=stages("trains: everything, steps: 40, learning_rate: 0.02"), options=CPU)
    assert result.heldout["trained"].mean < result.heldout["converted"].mean - 2


def test_output_is_complete_and_clean(whole):
    run, result, said = whole
    trained = run / "trained"
    names = {path.name for path in trained.iterdir()}
    wanted = {"config.json", "tokenizer.json", "chat_template.jinja", "stage.json", "log.jsonl", "loss.png"}
    assert wanted <= names and "modeling_uniattn_llama.py" in names
    assert not any("checkpoint" in name or name.startswith(".") for name in names) and "stages" not in names
    assert [entry.name for entry in run.glob(".*")] == []
    for name in ("config.json", "generation_config.json", "tokenizer.json", "chat_template.jinja"):
        assert (trained / name).read_text() == (run / "converted" / name).read_text(), name
    assert not json.loads((trained / "tokenizer_config.json").read_text()).get("pad_token")
    assert not torch.is_autocast_enabled("cpu")
    before, after = weights(run / "converted"), weights(trained)
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert list(before) == list(after) and changed == {name for name in before if CHANGED["trains: all"](name)}
    lines = log_of(trained)
    assert [(line["stage"], line["step"]) for line in lines if "loss" in line] == [
        *(("compensation", step) for step in (2, 4)),
        *(("all", step) for step in (2, 4, 6, 8)),
    ]
    measured = [(line["stage"], line["step"]) for line in lines if "validation_loss" in line]
    assert measured == [("compensation", 0), ("compensation", 4), ("all", 0), ("all", 8)]
    trained_lines = [line for line in lines if "loss" in line]
    keys = {"stage", "step", "loss", "learning_rate", "grad_norm", "tokens", "tokens_per_second", "seconds"}
    assert all(set(line) == keys for line in trained_lines)
    assert [stage.steps for stage in result.stages] == [4, 8]
    assert any("⟦it is" in text and "<|user|>" in text.split("⟦")[1] for text in said.notes)
    assert any("% of them in the loss" in text for text in said.notes)
    assert said.warnings == []
    assert len(said.bars["training all"]) == 8
    assert all("loss" in text and "tok/s" in text for text in said.bars["training all"])
    record = json.loads((trained / "stage.json").read_text())
    assert set(record["inputs"]) == {"model", "converted", "data"}
    with pytest.raises(StageError, match="--force"):
        train(run_dir=run, options=CPU)


def test_killed_and_run_again_equals_uninterrupted(run, whole):
    # Step 5 of the second stage: its checkpoint is of step 3, the log has a line of step 4, and half a line's window.
    command = [sys.executable, "-c", KILLED, str(run), "training all", "5"]
    assert subprocess.run(command, env={**os.environ, "PYTHONPATH": str(ROOT)}, check=False).returncode == -9
    assert not (run / "trained").exists()
    work = run / ".trained.partial" / "stages"
    assert (work / "1-compensation" / "done.json").is_file()
    assert (work / "2-all" / "checkpoint-3" / "trainer_state.json").is_file()
    assert all(tensor.dtype is torch.float32 for tensor in weights(work / "2-all" / "checkpoint-3").values())
    (work / "2-all" / "checkpoint-6").mkdir()
    (work / "2-all" / "checkpoint-6" / "trainer_state.json").write_text('{"global_')

    said = Recorder()
    train(run_dir=run, options=RunOptions(device="cpu", progress=said))
    assert any("resumes after step 3 of 8" in text for text in said.notes)
    assert any("'compensation' was already finished" in text for text in said.notes)
    assert without_times(log_of(run / "trained")) == without_times(log_of(whole[0] / "trained"))
    after, reference = weights(run / "trained"), weights(whole[0] / "trained")
    assert all(torch.equal(after[name], reference[name]) for name in reference)


def test_other_settings_are_refused_and_nothing_is_lost_unless_forced(run, tmp_path):
    # What an interruption leaves before the first checkpoint is not worth keeping, and stops nobody.
    with pytest.raises(KeyboardInterrupt):
        train(run_dir=run, options=RunOptions(device="cpu", progress=Interrupting(1)))
    overrides = stages("trains: all, steps: 5")
    with pytest.raises(KeyboardInterrupt):
        train(run_dir=run, overrides=overrides, options=RunOptions(device="cpu", progress=Interrupting(4)))
    checkpoint = run / ".trained.partial" / "stages" / "1-all" / "checkpoint-3"
    changed = [*stages("trains: all, steps: 2"), "seed=1"]
    with pytest.raises(StageError) as caught:
        train(run_dir=run, overrides=changed, options=CPU)
    for words in ("seed: 0 -> 1", "train.stages[0].steps: 5 -> 2", "--force"):
        assert words in str(caught.value)
    assert "learning_rate" not in str(caught.value) and checkpoint.is_dir()
    forced = shutil.copytree(run, tmp_path / "forced")
    result = train(run_dir=forced, overrides=changed, options=RunOptions(device="cpu", force=True))
    assert [stage.steps for stage in result.stages] == [2]
    # A setting that only evaluation reads is no reason; those that it reads are not written into the weights.
    said = Recorder()
    other = [*overrides, "evaluation.limit=3"]
    train(run_dir=run, overrides=other, options=RunOptions(device="cpu", progress=said))
    assert any("resumes after step 3 of 5" in text for text in said.notes)


def test_a_loss_that_is_no_number_stops_and_keeps_the_last_checkpoint(run, monkeypatch):
    from uniattn_cli.training.trainer import StageTrainer

    taken = StageTrainer.take_step_losses

    def poisoned(self):
        losses = taken(self)
        return losses | {"loss": float("nan")} if self.state.global_step == 4 else losses

    monkeypatch.setattr(StageTrainer, "take_step_losses", poisoned)
    with pytest.raises(StageError, match=r"nan at step 5.*learning_rate"):
        train(run_dir=run, overrides=stages("trains: all, steps: 5"), options=CPU)
    assert (run / ".trained.partial" / "stages" / "1-all" / "checkpoint-3" / "trainer_state.json").is_file()
    assert not (run / "trained").exists()


def test_a_full_disk_is_one_clear_line(run, monkeypatch):
    from safetensors import SafetensorError

    def full(*args, **kwargs):
        raise SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")

    monkeypatch.setattr(trainer, "save_file", full)
    with pytest.raises(StageError, match="disk is full"):
        train(run_dir=run, overrides=stages("trains: all, steps: 1"), options=CPU)
    assert not (run / "trained").exists()


@pytest.mark.parametrize(("limit", "number"), [(50_000, errno.EFBIG), (resource.RLIM_INFINITY, errno.ENOSPC)])
def test_what_torch_could_not_write_whole_has_a_reason(limit, number, tmp_path):
    """A limit on the size of files is met in earnest; a full disk is what else it can be."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    path = tmp_path / "checkpoint-2" / "optimizer.pt"
    path.parent.mkdir()
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, before[1]))
        with pytest.raises(OSError) as caught, trainer.write_errors(tmp_path):
            torch.save(torch.zeros(100_000), path)
            raise RuntimeError("PytorchStreamWriter failed writing file data/0: file write failed")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert (caught.value.errno, caught.value.filename) == (number, str(tmp_path))
    with pytest.raises(RuntimeError, match="shapes"), trainer.write_errors(tmp_path):
        raise RuntimeError("shapes differ")


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("packing", ["false", "true"])
def test_cuda_learns_like_cpu(run, packing):
    setting = [*stages("trains: everything, steps: 20, learning_rate: 0.01"), f"train.packing={packing}"]
    ends = {}
    for device in ("cpu", "cuda"):
        result = train(run_dir=run, overrides=setting, options=RunOptions(device=device, force=True))
        ends[device] = result.heldout["trained"].mean
        assert result.heldout["trained"].mean < result.heldout["converted"].mean - 1
    assert ends["cuda"] == pytest.approx(ends["cpu"], abs=0.2)


def test_a_checkpoint_loads_anywhere_as_its_page_and_its_card_say(whole, tmp_path):
    from uniattn_cli.publishing.card import TEMPLATE

    run = whole[0]
    tokens = torch.arange(5, 25)[None]
    with torch.no_grad():
        torch.save({"tokens": tokens, "logits": load(run / "trained")(tokens).logits}, tmp_path / "expected.pt")
    page = (ROOT / "docs" / "checkpoints.md").read_text(encoding="utf-8")
    card = TEMPLATE.read_text(encoding="utf-8").replace("{{ repo_id }}", "trained")
    script = "import sys, torch\ntorch.set_num_threads(1)\nsaved = torch.load(sys.argv[1])\n"
    for text in (page, card.partition("## Use")[2]):
        script += text.partition("```python\n")[2].partition("```")[0]
        script += "assert tokenizer.chat_template and model.config\n"
    script += (
        "assert torch.equal(model(saved['tokens']).logits, saved['logits'])\n"
        "assert 'uniattn_cli' not in sys.modules and 'trl' not in sys.modules\n"
    )
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    environment["HF_MODULES_CACHE"] = str(tmp_path / "modules")
    command = [sys.executable, "-c", script, str(tmp_path / "expected.pt")]
    # Nobody is there to be asked whether code may be run.
    subprocess.run(command, cwd=run, env=environment, stdin=subprocess.DEVNULL, check=True)


def make_trainer(run: Path, rows: list[dict], *, packing: bool, attention: str, batch: int):
    """A stage's trainer over these rows, and its model, in float32."""
    import datasets

    from uniattn_cli.training.objective import CrossEntropy
    from uniattn_cli.training.trainer import StageTrainer, pack
    from uniattn_cli.training.trl_config import make_config

    spec = TrainSpec(packing=packing, micro_batch_size=batch, max_length=32)
    model = load(run / "converted", attention=attention)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "compensation" in name or "q_proj" in name or "k_proj" in name:
                parameter.normal_(std=0.5)
    data = datasets.Dataset.from_list(rows)
    config = make_config(
        spec, TrainStage(), folder=run / "w", steps=1, accumulation=1, device=torch.device("cpu"), seed=0
    )
    data = pack(data, spec.max_length) if packing else data
    return StageTrainer(model, config, CrossEntropy(), train_dataset=data, processing_class=make_tokenizer()), model


def test_the_attention_of_changed_layers_may_have_a_learning_rate_of_its_own(run):
    rows = [{"input_ids": [1, 2, 3], "labels": [1, 2, 3]}]
    trainer, model = make_trainer(run, rows, packing=False, attention="eager", batch=1)
    trainer.changed_rate = 0.5
    trainer.create_optimizer_and_scheduler(4)
    rates = {id(each): group["lr"] for group in trainer.optimizer.param_groups for each in group["params"]}
    assert len(rates) == len(list(model.parameters()))
    parts = [f"layers.{layer}.self_attn." for layer in model.config.layout.changed]
    changed = {name: any(part in name for part in parts) for name, _ in model.named_parameters()}
    assert any(changed.values()) and not all(changed.values())
    factor = trainer.lr_scheduler.lr_lambdas[0](0)
    for name, parameter in model.named_parameters():
        assert rates[id(parameter)] == factor * (0.5 if changed[name] else TrainStage().learning_rate)
    # The log says the first group's.
    assert trainer._get_learning_rate() == factor * TrainStage().learning_rate


def test_a_learning_rate_that_would_be_the_only_one_is_refused(run):
    setting = stages("trains: followers, steps: 1, changed_learning_rate: 0.001")
    with pytest.raises(RecipeError, match="stage 'followers' trains only changed layers; remove changed_learning_rate"):
        train(run_dir=run, overrides=setting, options=CPU)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("packing", [False, True])
def test_rows_never_see_each_other_nor_padding(run, packing, attention):
    from uniattn_cli.models.losses import token_losses

    torch.manual_seed(1)
    rows = []
    for length in (5, 21, 9, 14, 30, 3, 11):
        ids = torch.randint(4, 200, (length,)).tolist()
        rows.append({"input_ids": ids, "labels": [IGNORED] * (length // 3) + ids[length // 3 :]})
    trainer, model = make_trainer(run, rows, packing=packing, attention=attention, batch=7 if not packing else 2)
    model.train()
    together, learned = 0.0, 0
    for batch in trainer.get_train_dataloader():
        assert ("attention_mask" in batch) != packing
        (_, count) = trainer.get_batch_samples(iter([batch]), 1, torch.device("cpu"))
        together += trainer.compute_loss(model, batch).item() * int(count)
        learned += int((batch["labels"][:, 1:] != IGNORED).sum())
    alone = sum(
        token_losses(model, torch.tensor([row["input_ids"]]), torch.tensor([row["labels"]])).sum().item()
        for row in rows
    )
    assert learned == sum(label != IGNORED for row in rows for label in row["labels"][1:])
    assert together == pytest.approx(alone, rel=1e-6)


def test_weights_in_bfloat16_are_trained_in_float32_and_saved_in_bfloat16(tmp_path):
    layout = [{}, {"leader": 0, "compensation": "none"}, {}, {"leader": 2, "compensation": "none"}]
    run = make_run(tmp_path / "run", dtype=torch.bfloat16, layout=layout)
    # Updates of this size vanish if they are added to bfloat16 weights one by one.
    entries = stages("trains: compensation", "trains: followers, steps: 40, learning_rate: 0.00001")
    result = train(run_dir=run, overrides=[*entries, "train.keep=last"], options=CPU)
    before, after = weights(run / "converted"), weights(run / "trained")
    assert {tensor.dtype for tensor in after.values()} == {torch.bfloat16}
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed == {name for name in before if CHANGED["trains: followers"](name)}
    name = "model.layers.1.self_attn.v_proj.weight"
    moved = (before[name].float() - after[name].float()).abs()
    assert moved.mean() > 1e-4
    assert json.loads((run / "trained" / "config.json").read_text())["dtype"] == "bfloat16"
    # The layout has no compensation, so that stage was skipped.
    assert [stage.name for stage in result.stages] == ["followers"]
    assert any("'compensation' was skipped" in note for note in result.notes)
    with pytest.raises(StageError, match="no stage of the recipe"):
        options = RunOptions(device="cpu", force=True)
        train(run_dir=run, overrides=stages("trains: compensation"), options=options)


def test_frozen_layers_in_low_precision_change_no_result(run):
    losses = []
    tokens = torch.arange(5, 37).view(2, 16)
    for low in (None, torch.bfloat16):
        model = load(run / "converted", dtype="bfloat16").float()
        freeze_all_but(model, trained_names(model, TrainStage(trains="compensation")), low)
        assert (model.model.layers[0].mlp.up_proj.weight.dtype is torch.float32) == (low is None)
        assert model.model.embed_tokens.weight.dtype is torch.float32
        with torch.autocast("cpu", torch.bfloat16):
            losses.append(model(tokens, labels=tokens).loss)
    assert torch.equal(*losses)


def test_refuses_rows_without_prompts(run):
    (run / "data.jsonl").write_text("".join(json.dumps({"text": f"plain text {index}"}) + "\n" for index in range(40)))
    setting = [f"data.train=[{{source: {run / 'data.jsonl'}}}]"]
    with pytest.raises(DataError, match=r"train\.loss: all"):
        train(run_dir=run, overrides=setting, options=CPU)
    assert not (run / ".trained.partial").exists()


@pytest.mark.parametrize("supervised", [0, 100])
def test_share_of_learned_tokens(supervised):
    counts = Counts(rows=1, used=1, tokens=100, supervised=supervised)
    with pytest.raises(DataError):
        check_share(counts, "responses")


def test_refuses_what_was_converted_from_another_base(run):
    other = {name: tensor + 1 for name, tensor in weights(run / "base").items()}
    save_file(other, run / "base" / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(StageError, match="base") as caught:
        train(run_dir=run, overrides=[f"model.name={run / 'base'}"], options=CPU)
    assert str(run / "base") in str(caught.value) and "uniattn convert" in str(caught.value)
    shutil.rmtree(run / "converted")
    with pytest.raises(StageError, match="uniattn convert"):
        train(run_dir=run, options=CPU)


def test_every_loss_of_a_recipe_has_its_objective():
    from uniattn_cli.training.stage import OBJECTIVES

    (loss,) = (field for field in dataclasses.fields(TrainStage) if field.name == "loss")
    assert set(OBJECTIVES) == set(loss.metadata["choices"])


def test_order_covers_every_row_once_per_pass_and_goes_on_between_stages():
    lengths = [(7 * index) % 23 + 1 for index in range(20)]
    whole = batches(lengths, batch_size=4, first=0, steps=10, seed=3)
    assert sorted(row for batch in whole[:5] for row in batch) == list(range(20))
    assert sorted(row for batch in whole[5:] for row in batch) == list(range(20))
    assert whole[:5] != whole[5:]
    assert batches(lengths, batch_size=4, first=6, steps=4, seed=3) == whole[6:]
    assert batches(lengths, batch_size=4, first=0, steps=10, seed=4) != whole
    for batch in whole:
        assert [lengths[row] for row in batch] == sorted((lengths[row] for row in batch), reverse=True)
    assert stage_steps(TrainStage(epochs=0.25), 100, 8) == 3
    assert stage_steps(TrainStage(epochs=0.01), 100, 8) == 1
    assert stage_steps(TrainStage(epochs=3, steps=5), 100, 8) == 5


def test_grouped_order_pads_less_and_is_the_same_stream():
    lengths = [(37 * index) % 101 + 1 for index in range(1000)]
    settings = {"batch_size": 8, "seed": 3}
    plain, grouped = (batches(lengths, first=0, steps=125, grouped=grouped, **settings) for grouped in (False, True))
    window = 8 * GROUPED_STEPS
    for begin in range(0, 96, GROUPED_STEPS):
        same = [{row for batch in order[begin : begin + GROUPED_STEPS] for row in batch} for order in (plain, grouped)]
        assert same[0] == same[1] and len(same[0]) == window
    assert batches(lengths, first=50, steps=70, grouped=True, **settings) == grouped[50:120]

    def padded(order: list[list[int]]) -> int:
        return sum(len(batch) * max(lengths[row] for row in batch) for batch in order[:96])

    useful = sum(lengths[row] for batch in plain[:96] for row in batch)
    assert padded(grouped) < 1.05 * useful < 1.5 * useful < padded(plain)
    firsts = [max(lengths[row] for row in batch) for batch in grouped[:GROUPED_STEPS]]
    assert firsts != sorted(firsts) and firsts != sorted(firsts, reverse=True), "steps keep a random order"


def test_batch_is_the_same_on_any_number_of_processes():
    spec = TrainSpec(batch_size=16, micro_batch_size=4)
    assert [accumulation(spec, world) for world in (1, 2, 4)] == [4, 2, 1]
    with pytest.raises(RecipeError, match="number of processes"):
        accumulation(spec, 3)


def test_preview_marks_what_is_learned():
    tokenizer = make_tokenizer()
    ids = tokenizer.apply_chat_template(
        [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "yes"}], return_dict=True
    )["input_ids"]
    start = ids.index(tokenizer.convert_tokens_to_ids("<|assistant|>")) + 1
    labels = [IGNORED] * start + ids[start:]
    assert mark(tokenizer, ids, labels) == "<|user|>hi<|assistant|>⟦yes<eos>⟧"
    assert len(mark(tokenizer, ids[:1] * 900, [IGNORED] * 900)) < 500


@pytest.mark.parametrize(
    ("left", "says"),
    [
        ({"LOCAL_RANK": "0"}, "it has no RANK and WORLD_SIZE and MASTER_ADDR and MASTER_PORT; start with `torchrun`"),
        ({"WORLD_SIZE": "2", "RANK": "0", "LOCAL_RANK": "0"}, "it has no MASTER_ADDR and MASTER_PORT"),
        ({"WORLD_SIZE": "two"}, "WORLD_SIZE=two makes no sense; .* or unset WORLD_SIZE"),
        ({"LOCAL_RANK": "-1"}, "LOCAL_RANK=-1 makes no sense"),
        ({"ACCELERATE_USE_DEEPSPEED": "true"}, "DeepSpeed is not supported; launch without it, and set train.fsdp"),
        ({"RANK": "0", "WORLD_SIZE": "1"}, None),
    ],
)
def test_what_is_left_of_a_launcher_is_told(left, says, monkeypatch):
    for name in LAUNCHED:
        monkeypatch.delenv(name, raising=False)
    for name, value in left.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(UsageError, match=says) if says else contextlib.nullcontext():
        join_processes(RunOptions(device="cpu"))
