"""`uniattn train` on tiny random models: what changes, what is learned, and that a killed run ends like any other."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from uniattn_cli.checkpoint import build_converted, locate, save_checkpoint
from uniattn_cli.data import IGNORED, Tokenised
from uniattn_cli.errors import DataError, RecipeError, StageError
from uniattn_cli.modeling.layout_uniattn import Layout
from uniattn_cli.options import RunOptions, Silent
from uniattn_cli.recipe import TrainSpec, TrainStage
from uniattn_cli.training.order import accumulation, batches, stage_steps
from uniattn_cli.training.preview import check_share, mark
from uniattn_cli.training.train import Training, train

ROOT = Path(__file__).resolve().parent.parent
LAYOUT = [{}, {"leader": 0}, {}, {"leader": 2, "compensation": 4}]
TEMPLATE = (
    "{% for m in messages %}{% if m['role'] == 'user' %}<|user|>{{ m['content'] }}"
    "{% else %}<|assistant|>{{ m['content'] }}<eos>{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
CPU = RunOptions(device="cpu")


@pytest.fixture(autouse=True)
def _one_thread():
    torch.set_num_threads(1)


def make_tokenizer() -> PreTrainedTokenizerFast:
    """One token per byte, with a chat template."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    specials = ["<pad>", "<eos>", "<|user|>", "<|assistant|>"]
    vocabulary = {token: index for index, token in enumerate([*specials, *alphabet])}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(specials)
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<eos>")
    fast.chat_template = TEMPLATE
    return fast


def make_rows(count: int = 240) -> list[dict]:
    """Prompts whose responses follow from them by a rule that a tiny model learns in a few steps."""
    rows = []
    for number in range(count):
        word = "abcdefgh"[number % 8] * (1 + number % 5)
        prompt = f"{number} {word}?"
        rows.append({"prompt": prompt, "completion": f"it is {word[0].upper()}, so it is."})
    return rows


def make_run(folder: Path, *, layout: list[dict] = LAYOUT, dtype: torch.dtype = torch.float32, rows=None) -> Path:
    """A run directory with `base/`, `converted/`, `data.jsonl` and `recipe.yaml`."""
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer = make_tokenizer()
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=len(layout),
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        max_position_embeddings=128,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=1,
        tie_word_embeddings=False,
        dtype=dtype,
    )
    base = LlamaForCausalLM(config).to(dtype)
    save_checkpoint(base, tokenizer, folder / "base")
    save_checkpoint(build_converted(base, Layout.from_list(layout)), tokenizer, folder / "converted")
    record = {
        "stage": "convert",
        "settings": {"model": {"name": str(folder / "base")}},
        "inputs": {"model": locate(str(folder / "base")).fingerprint},
    }
    (folder / "converted" / "stage.json").write_text(json.dumps(record))
    lines = [json.dumps(row) for row in (make_rows() if rows is None else rows)]
    (folder / "data.jsonl").write_text("\n".join(lines) + "\n")
    (folder / "recipe.yaml").write_text(
        f"model: {{name: {folder / 'base'}}}\n"
        f"data: {{train: [{{source: {folder / 'data.jsonl'}}}], holdout: 0.15}}\n"
        "train:\n"
        "  batch_size: 8\n  micro_batch_size: 4\n  max_length: 64\n  save_steps: 3\n  log_steps: 2\n  warmup: 0\n"
        "  stages:\n"
        "    - {trains: compensation, learning_rate: 0.01, steps: 4}\n"
        "    - {trains: all, learning_rate: 0.003, steps: 8}\n"
        "evaluation: {responses: 16}\n"
    )
    return folder


def stages(*entries: str) -> list[str]:
    return [f"train.stages=[{', '.join('{' + entry + '}' for entry in entries)}]"]


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "model.safetensors")


def log_of(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def template(tmp_path_factory) -> Path:
    return make_run(tmp_path_factory.mktemp("template") / "run")


@pytest.fixture
def run(template: Path, tmp_path: Path) -> Path:
    """A fresh run directory whose base and data are those of `template`."""
    shutil.copytree(template, tmp_path / "run")
    return tmp_path / "run"


class Recorder(Silent):
    """Keeps what a stage says."""

    def __init__(self):
        self.notes: list[str] = []
        self.warnings: list[str] = []
        self.bars: dict[str, list[str]] = {}

    @contextlib.contextmanager
    def track(self, description, total):
        texts = self.bars.setdefault(description, [])
        yield lambda steps=1, text="": texts.append(text)

    def note(self, text: str) -> None:
        self.notes.append(text)

    def warn(self, text: str) -> None:
        self.warnings.append(text)


@pytest.fixture(scope="module")
def whole(template: Path, tmp_path_factory) -> tuple[Path, Training, Recorder]:
    """A run that was never interrupted, its result and what it said. Tests only read it."""
    torch.set_num_threads(1)
    run = tmp_path_factory.mktemp("whole") / "run"
    shutil.copytree(template, run)
    said = Recorder()
    return run, train(run_dir=run, options=RunOptions(device="cpu", progress=said)), said


CHANGED = {
    "compensation": lambda name: ".compensation." in name,
    "followers": lambda name: ".layers.1.self_attn." in name or ".layers.3.self_attn." in name,
    "attention": lambda name: ".self_attn." in name,
    "all": lambda name: "embed_tokens" not in name and "lm_head" not in name,
    "everything": lambda name: True,
}


@pytest.mark.parametrize("trains", CHANGED)
def test_exactly_the_named_parameters_change(run, trains):
    train(run_dir=run, overrides=stages(f"trains: {trains}, steps: 3, learning_rate: 0.01"), options=CPU)
    before, after = weights(run / "converted"), weights(run / "trained")
    assert list(before) == list(after)
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed == {name for name in before if CHANGED[trains](name)}
    assert changed


def test_training_lowers_the_loss_on_heldout_responses(run):
    result = train(run_dir=run, overrides=stages("trains: everything, steps: 40, learning_rate: 0.02"), options=CPU)
    assert result.heldout["converted"].windows == 16
    assert result.heldout["trained"].mean < result.heldout["converted"].mean - 2
    assert result.stages[0].end_loss < result.stages[0].start_loss
    report = json.loads((run / "trained" / "uniattn_report.json").read_text())
    assert report["heldout_responses"]["trained"]["mean"] == result.heldout["trained"].mean


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
    lines = log_of(trained)
    assert [(line["stage"], line["step"]) for line in lines] == [
        *(("compensation", step) for step in (2, 4)),
        *(("all", step) for step in (2, 4, 6, 8)),
    ]
    assert set(lines[0]) >= {"stage", "step", "loss", "learning_rate", "grad_norm", "tokens_per_second"}
    assert [stage.steps for stage in result.stages] == [4, 8]
    assert any("⟦it is" in text and "<|user|>" in text.split("⟦")[1] for text in said.notes)
    assert any("% of them learned" in text for text in said.notes)
    assert said.warnings == []
    assert len(said.bars["training all"]) == 8
    assert all("loss" in text and "tok/s" in text for text in said.bars["training all"])
    record = json.loads((trained / "stage.json").read_text())
    assert set(record["inputs"]) == {"model", "converted", "data"}
    with pytest.raises(StageError, match="--force"):
        train(run_dir=run, options=CPU)


KILLED = """
import os, signal, sys, torch
from uniattn_cli.options import RunOptions, Silent
from uniattn_cli.training.train import train
import contextlib

class Deadly(Silent):
    @contextlib.contextmanager
    def track(self, description, total):
        done = 0
        def advance(steps=1, text=""):
            nonlocal done
            done += steps
            if description == sys.argv[2] and done == int(sys.argv[3]):
                os.kill(os.getpid(), signal.SIGKILL)
        yield advance

torch.set_num_threads(1)
train(run_dir=sys.argv[1], options=RunOptions(device="cpu", progress=Deadly()))
"""


def test_killed_and_run_again_equals_uninterrupted(run, whole):
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    # Step 5 of the second stage: its checkpoint is of step 3, the log has a line of step 4, and half a line's window.
    command = [sys.executable, "-c", KILLED, str(run), "training all", "5"]
    assert subprocess.run(command, env=environment, check=False).returncode == -9
    assert not (run / "trained").exists()
    work = run / ".trained.partial" / "stages"
    assert (work / "1-compensation" / "done.json").is_file()
    assert (work / "2-all" / "checkpoint-3" / "trainer_state.json").is_file()
    assert all(tensor.dtype is torch.float32 for tensor in weights(work / "2-all" / "checkpoint-3").values())
    (work / "2-all" / "checkpoint-6").mkdir()
    (work / "2-all" / "checkpoint-6" / "trainer_state.json").write_text('{"global_')

    said = Recorder()
    train(run_dir=run, options=RunOptions(device="cpu", progress=said))
    assert any("goes on after step 3 of 8" in text for text in said.notes)
    assert any("'compensation' was finished" in text for text in said.notes)
    timing = ("tokens_per_second", "seconds")
    lines, expected = log_of(run / "trained"), log_of(whole[0] / "trained")
    for line in (*lines, *expected):
        for key in timing:
            assert line.pop(key) > 0
    assert lines == expected
    after, reference = weights(run / "trained"), weights(whole[0] / "trained")
    assert all(torch.equal(after[name], reference[name]) for name in reference)


class Interrupting(Recorder):
    """Stops the training of a stage as Ctrl-C does."""

    @contextlib.contextmanager
    def track(self, description, total):
        def advance(steps=1, text=""):
            if description.startswith("training"):
                raise KeyboardInterrupt

        yield advance


def test_other_settings_start_over_and_say_so(run):
    with pytest.raises(KeyboardInterrupt):
        train(run_dir=run, options=RunOptions(device="cpu", progress=Interrupting()))
    said = Recorder()
    options = RunOptions(device="cpu", progress=said)
    result = train(run_dir=run, overrides=stages("trains: all, steps: 2"), options=options)
    assert any("starts over" in text for text in said.warnings)
    assert [stage.name for stage in result.stages] == ["all"]


def test_a_loss_that_is_no_number_stops_and_keeps_the_last_checkpoint(run, monkeypatch):
    from uniattn_cli.training.sft import StageTrainer

    taken = StageTrainer.take_step_loss

    def poisoned(self):
        loss = taken(self)
        return float("nan") if self.state.global_step == 4 else loss

    monkeypatch.setattr(StageTrainer, "take_step_loss", poisoned)
    with pytest.raises(StageError, match=r"nan at step 5.*learning_rate"):
        train(run_dir=run, overrides=stages("trains: all, steps: 8"), options=CPU)
    assert (run / ".trained.partial" / "stages" / "1-all" / "checkpoint-3" / "trainer_state.json").is_file()
    assert not (run / "trained").exists()


def test_a_full_disk_is_one_clear_line(run, monkeypatch):
    from safetensors import SafetensorError

    from uniattn_cli.training import sft

    def full(*args, **kwargs):
        raise SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")

    monkeypatch.setattr(sft, "save_file", full)
    with pytest.raises(StageError, match="disk is full"):
        train(run_dir=run, overrides=stages("trains: all, steps: 1"), options=CPU)
    assert not (run / "trained").exists()


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


def test_saved_model_loads_anywhere_with_equal_logits(whole, tmp_path):
    run = whole[0]
    from uniattn_cli.checkpoint import load_model
    from uniattn_cli.recipe import ModelSpec

    model = load_model(locate(str(run / "trained")), ModelSpec(), torch.device("cpu"))
    tokens = torch.arange(5, 25)[None]
    with torch.no_grad():
        torch.save({"tokens": tokens, "logits": model(tokens).logits}, tmp_path / "expected.pt")
    script = (
        "import sys, torch; from transformers import AutoModelForCausalLM, AutoTokenizer\n"
        "torch.set_num_threads(1); saved = torch.load(sys.argv[2])\n"
        "model = AutoModelForCausalLM.from_pretrained(sys.argv[1], trust_remote_code=True)\n"
        "assert 'uniattn_cli' not in sys.modules and 'trl' not in sys.modules\n"
        "assert torch.equal(model(saved['tokens']).logits, saved['logits'])\n"
        "assert AutoTokenizer.from_pretrained(sys.argv[1], trust_remote_code=True).chat_template\n"
    )
    command = [sys.executable, "-c", script, str(run / "trained"), str(tmp_path / "expected.pt")]
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    environment["HF_MODULES_CACHE"] = str(tmp_path / "modules")
    subprocess.run(command, cwd=tmp_path, env=environment, check=True)


def make_trainer(run: Path, rows: list[dict], *, packing: bool, attention: str, batch: int):
    """A stage's trainer over these rows, and its model, in float32."""
    import datasets

    from uniattn_cli.checkpoint import load_model
    from uniattn_cli.recipe import ModelSpec
    from uniattn_cli.training.sft import StageTrainer, make_config, pack

    spec = TrainSpec(packing=packing, micro_batch_size=batch, max_length=32)
    model = load_model(locate(str(run / "converted")), ModelSpec(attention=attention), torch.device("cpu"))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "compensation" in name or "q_proj" in name or "k_proj" in name:
                parameter.normal_(std=0.5)
    data = datasets.Dataset.from_list(rows)
    config = make_config(
        spec, folder=run / "w", learning_rate=1e-3, steps=1, accumulation=1, device=torch.device("cpu"), seed=0
    )
    data = pack(data, spec.max_length) if packing else data
    return StageTrainer(model, config, train_dataset=data, processing_class=make_tokenizer()), model


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("packing", [False, True])
def test_rows_never_see_each_other_nor_padding(run, packing, attention):
    from uniattn_cli.scoring import token_losses

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
        together += trainer.compute_loss(model, batch, num_items_in_batch=1).item()
        learned += int((batch["labels"][:, 1:] != IGNORED).sum())
    alone = sum(
        token_losses(model, torch.tensor([row["input_ids"]]), torch.tensor([row["labels"]])).sum().item()
        for row in rows
    )
    assert learned == sum(label != IGNORED for row in rows for label in row["labels"][1:])
    assert together == pytest.approx(alone, rel=1e-6)


def test_packed_training_runs_and_checkpointing_changes_nothing(run):
    setting = [*stages("trains: all, steps: 4, learning_rate: 0.003"), "train.batch_size=4", "train.micro_batch_size=2"]
    losses = {}
    for name, extra in {
        "plain": [],
        "checkpointing": ["train.gradient_checkpointing=true"],
        "packed": ["train.packing=true"],
    }.items():
        options = RunOptions(device="cpu", force=True)
        result = train(run_dir=run, overrides=[*setting, *extra], options=options)
        losses[name] = [line["loss"] for line in log_of(run / "trained")]
        rows, tokens = result.stages[0].rows, result.stages[0].tokens
        assert rows == 16 and (tokens > 700) == (name == "packed")
    assert losses["checkpointing"] == pytest.approx(losses["plain"], rel=1e-5)
    assert losses["packed"][-1] < losses["packed"][0]


def test_weights_in_bfloat16_are_trained_in_float32_and_saved_in_bfloat16(tmp_path):
    run = make_run(tmp_path / "run", dtype=torch.bfloat16)
    # Updates of this size vanish if they are added to bfloat16 weights one by one.
    train(run_dir=run, overrides=stages("trains: followers, steps: 40, learning_rate: 0.00001"), options=CPU)
    before, after = weights(run / "converted"), weights(run / "trained")
    assert {tensor.dtype for tensor in after.values()} == {torch.bfloat16}
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed == {name for name in before if CHANGED["followers"](name)}
    name = "model.layers.1.self_attn.v_proj.weight"
    moved = (before[name].float() - after[name].float()).abs()
    assert moved.mean() > 1e-4
    assert json.loads((run / "trained" / "config.json").read_text())["dtype"] == "bfloat16"


def test_frozen_layers_in_low_precision_change_no_result(template):
    from dataclasses import replace

    from uniattn_cli.checkpoint import load_model
    from uniattn_cli.recipe import ModelSpec
    from uniattn_cli.training.stages import freeze_all_but, trained_names

    losses = []
    tokens = torch.arange(5, 37).view(2, 16)
    for low in (None, torch.bfloat16):
        spec = replace(ModelSpec(), dtype="bfloat16")
        model = load_model(locate(str(template / "converted")), spec, torch.device("cpu")).float()
        freeze_all_but(model, trained_names(model, "compensation"), low)
        assert (model.model.layers[0].mlp.up_proj.weight.dtype is torch.float32) == (low is None)
        assert model.model.embed_tokens.weight.dtype is torch.float32
        with torch.autocast("cpu", torch.bfloat16):
            losses.append(model(tokens, labels=tokens).loss)
    assert torch.equal(*losses)


def test_a_stage_with_nothing_to_train_is_skipped_with_a_note(tmp_path):
    run = make_run(tmp_path / "run", layout=[{}, {"leader": 0, "compensation": "none"}, {}, {}])
    result = train(run_dir=run, options=CPU)
    assert [stage.name for stage in result.stages] == ["all"]
    assert any("'compensation' was skipped" in note for note in result.notes)
    with pytest.raises(StageError, match="nothing that the stages"):
        options = RunOptions(device="cpu", force=True)
        train(run_dir=run, overrides=stages("trains: compensation"), options=options)


def test_refuses_rows_without_prompts(tmp_path):
    run = make_run(tmp_path / "run", rows=[{"text": f"plain text number {index}"} for index in range(40)])
    with pytest.raises(DataError, match=r"train\.loss to all"):
        train(run_dir=run, options=CPU)
    assert not (run / ".trained.partial").exists()
    result = train(run_dir=run, overrides=["train.loss=all", *stages("trains: all, steps: 2")], options=CPU)
    assert result.stages[0].steps == 2


@pytest.mark.parametrize("supervised", [0, 100])
def test_share_of_learned_tokens(supervised):
    data = Tokenised(dataset=None, rows=1, used=1, dropped=0, truncated=0, tokens=100, supervised=supervised)
    with pytest.raises(DataError):
        check_share(data, "responses")


def test_refuses_what_was_converted_from_another_base(run, tmp_path):
    shutil.rmtree(run / "converted" / "nothing", ignore_errors=True)
    other = make_run(tmp_path / "other", layout=[{}, {"leader": 0}, {}])
    with pytest.raises(StageError, match="base") as caught:
        train(run_dir=run, overrides=[f"model.name={other / 'base'}"], options=CPU)
    assert str(other / "base") in str(caught.value) and "uniattn convert" in str(caught.value)
    shutil.rmtree(run / "converted")
    with pytest.raises(StageError, match="uniattn convert"):
        train(run_dir=run, options=CPU)


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
    labels = [IGNORED] * 4 + ids[4:]
    assert mark(tokenizer, ids, labels) == "<|user|>hi<|assistant|>⟦yes<eos>⟧"
    assert len(mark(tokenizer, ids[:1] * 900, [IGNORED] * 900)) < 500
