"""What the tests of training share: a run directory of a tiny random model, and ways to watch and to stop a run."""

from __future__ import annotations

import contextlib
import functools
import json
import shutil
import tempfile
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from tiny_run import make_tokenizer
from transformers import LlamaConfig, LlamaForCausalLM

from uniattn_cli.modeling.layout_uniattn import Layout
from uniattn_cli.models.building import build_converted, save_checkpoint
from uniattn_cli.models.hub import locate
from uniattn_cli.options import RunOptions, Silent

ROOT = Path(__file__).resolve().parent.parent
LAYOUT = [{}, {"leader": 0}, {}, {"leader": 2, "compensation": 4}]
CPU = RunOptions(device="cpu")


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
    # Training needs one of its own, which must not reach what is saved.
    tokenizer.pad_token = None
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


@functools.cache
def _template() -> tempfile.TemporaryDirectory:
    """Holds a run directory, made once per process and removed at its end."""
    folder = tempfile.TemporaryDirectory()
    make_run(Path(folder.name) / "run")
    return folder


def fresh_run(folder: Path) -> Path:
    """A copy of the usual run directory; its recipe names the base and the data of the original."""
    return Path(shutil.copytree(Path(_template().name) / "run", folder))


def stages(*entries: str) -> list[str]:
    return [f"train.stages=[{', '.join('{' + entry + '}' for entry in entries)}]"]


def torn_run(folder: Path) -> Path:
    """A run whose changed layers are not what they should be: without this there would be nothing to win back."""
    run = fresh_run(folder)
    torn = weights(run / "converted")
    torch.manual_seed(0)
    for name, tensor in torn.items():
        if "layers.1.self_attn" in name or "layers.3.self_attn" in name:
            tensor.add_(0.1 * torch.randn_like(tensor))
    save_file(torn, run / "converted" / "model.safetensors", metadata={"format": "pt"})
    return run


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "model.safetensors")


def log_of(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]


def losses_of(folder: Path) -> list[float]:
    """Training losses, as they were logged."""
    return [line["loss"] for line in log_of(folder) if "loss" in line]


def without_times(lines: list[dict]) -> list[dict]:
    """Log lines without what differs from run to run; times must be there."""
    timing = ("tokens_per_second", "seconds")
    assert all(line["seconds"] >= 0 and line.get("tokens_per_second", 1) > 0 for line in lines)
    return [{key: value for key, value in line.items() if key not in timing} for line in lines]


class Recorder(Silent):
    """Keeps the notes, warnings and progress of a stage."""

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


KILLED = """
import os, signal, sys, torch
from uniattn_cli.options import RunOptions, Silent
from uniattn_cli.commands.train import train
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


class Interrupting(Recorder):
    """Stops the training of a stage, after some steps, as Ctrl-C does."""

    def __init__(self, steps: int):
        super().__init__()
        self.left = steps

    @contextlib.contextmanager
    def track(self, description, total):
        def advance(steps=1, text=""):
            if description.startswith("training"):
                self.left -= steps
                if self.left == 0:
                    raise KeyboardInterrupt

        yield advance
