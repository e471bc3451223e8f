"""A tiny random model with a byte-level tokenizer, and data for it: what a run of the real commands starts from."""

from __future__ import annotations

import json
import os
from pathlib import Path

from tiny import FAMILIES, make_base
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

SPECIALS = ["<pad>", "<eos>", "<|user|>", "<|assistant|>"]
TEMPLATE = (
    "{% for m in messages %}{% if m['role'] == 'user' %}<|user|>{{ m['content'] }}"
    "{% else %}<|assistant|>{{ m['content'] }}<eos>{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
# Settings with which every stage takes a second or two on a tiny model.
QUICK = {
    "data.train": "rows.jsonl",
    "data.text": "text.txt",
    "analysis.tokens": 1024,
    "analysis.length": 64,
    "conversion.tokens": 1024,
    "conversion.length": 64,
    "train.stages": "[{trains: all, learning_rate: 0.01, steps: 4}]",
    "train.max_length": 64,
    "train.batch_size": 8,
    "evaluation.tokens": 512,
    "evaluation.length": 64,
    "evaluation.responses": 8,
    "evaluation.tasks": "[]",
    "evaluation.samples": 1,
    "evaluation.sample_tokens": 4,
    "evaluation.speed.enabled": "false",
}


def settings(**changes) -> list[str]:
    """`QUICK` as overrides; `section__name=value` changes one, or adds it."""
    changed = QUICK | {name.replace("__", "."): value for name, value in changes.items()}
    return [f"{key}={value}" for key, value in changed.items()]


def make_tokenizer() -> PreTrainedTokenizerFast:
    """Bytes and some pairs of them, so that no text has unknown tokens; with a chat template."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(
        vocab_size=300, special_tokens=SPECIALS, initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator([__doc__, TEMPLATE, Path(__file__).read_text(encoding="utf-8")], trainer)
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<eos>", pad_token="<pad>")
    fast.chat_template = TEMPLATE
    return fast


def make_model(directory: Path, seed: int = 0, family: str = "llama") -> Path:
    """Saves a random model of a family, by default a six-layer Llama, and its tokenizer, as an ordinary directory."""
    tokenizer = make_tokenizer()
    _, make_config, model_class = next(entry for entry in FAMILIES if entry[0] == family)

    def config():
        fields = make_config().to_dict()
        fields |= {"vocab_size": len(tokenizer), "max_position_embeddings": 1024, "bos_token_id": 1, "eos_token_id": 1}
        return type(make_config())(**fields)

    make_base(("tiny", config, model_class), seed).save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    return directory


def write_data(folder: Path) -> None:
    """Writes `rows.jsonl`, instructions with responses, and `text.txt`, other text."""
    rows = [
        {"prompt": f"What comes after {n}?", "completion": f"After {n} comes {n + 1}, and then {n + 2}."}
        for n in range(200)
    ]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    paragraphs = [f"Paragraph {n} says that {n} times {n} is {n * n}." for n in range(200)]
    (folder / "text.txt").write_text("\n\n".join(paragraphs) + "\n", encoding="utf-8")


def make_analysed(folder: Path) -> Path:
    """A run directory `folder/run` with data, a recipe of the defaults and an analysis of `folder/model`."""
    import uniattn_cli
    from uniattn_cli.options import RunOptions

    model, run = make_model(folder / "model"), folder / "run"
    run.mkdir()
    write_data(run)
    before = Path.cwd()
    os.chdir(run)  # from where data are named
    try:
        uniattn_cli.analyze(str(model), overrides=settings(), options=RunOptions(device="cpu"))
    finally:
        os.chdir(before)
    return run
