"""A tiny random model with a byte-level tokenizer, and data for it: what a run of the real commands starts from."""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from pathlib import Path

from tiny import FAMILIES, make_base
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

import uniattn_cli
from uniattn_cli import RunOptions
from uniattn_cli.commands.convert import Conversion
from uniattn_cli.run.directory import REPORT_FILE
from uniattn_cli.run.files import read_json

CPU = RunOptions(device="cpu")
SPECIALS = ["<pad>", "<eos>", "<|user|>", "<|assistant|>"]
TEMPLATE = (
    "{% for m in messages %}{% if m['role'] == 'user' %}<|user|>{{ m['content'] }}"
    "{% else %}<|assistant|>{{ m['content'] }}<eos>{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
# In order of precedence.
MERGES = [
    *("Ġ Ġ", "Ċ ĠĠ", "e n", "e r", "ĊĠĠ Ġ", "i n", 'Ġ "', "a t", "o n", "t o", "k en", "a n", "r e", "a l", "to ken"),
    *("d e", "i z", "o r", "Ġ m", "t e", "Ġ f", "iz er", "r o", "Ġ =", '" :', "r a", "Ġ t", '" "', "i on", "s t"),
    *("token izer", "m p", "Ġ a", "Ġ i", "e s", "u n", "ra in", "% }", "( )", "d i"),
]
# Settings with which every stage takes a second or two on a tiny model.
QUICK = {
    "data.train": "rows.jsonl",
    "data.text": "text.txt",
    "analysis.tokens": 1024,
    "analysis.length": 64,
    "conversion.tokens": 1024,
    "conversion.length": 64,
    "conversion.align": 10,
    "conversion.refine": 5,
    "train.stages": "[{trains: all, learning_rate: 0.01, steps: 4}]",
    "train.max_length": 64,
    "train.batch_size": 8,
    "evaluation.tokens": 512,
    "evaluation.length": 64,
    "evaluation.lengths": "[64]",
    "evaluation.length_tokens": 128,
    "evaluation.responses": 8,
    "evaluation.tasks": "[]",
    "evaluation.samples": 1,
    "evaluation.sample_tokens": 4,
    "evaluation.speed.enabled": "false",
}
TWO_STAGES = "[{trains: compensation, steps: 2, learning_rate: 0.003}, {trains: all, steps: 2, learning_rate: 0.001}]"


def settings(**changes) -> list[str]:
    """`QUICK` as overrides; `section__name=value` changes one, or adds it."""
    changed = QUICK | {name.replace("__", "."): value for name, value in changes.items()}
    return [f"{key}={value}" for key, value in changed.items()]


def byte_tokenizer(
    specials: Sequence[str], template: str | None, *, merges: Sequence[str] = (), bos_first: bool = False, **names: str
) -> PreTrainedTokenizerFast:
    """Special tokens, bytes and what they are merged to, so that no text has unknown tokens.

    Args:
        specials: the first tokens.
        template: for chats.
        merges: pairs of tokens, in order of precedence; a blank is `Ġ`, a new line `Ċ`.
        bos_first: put `bos_token` in front of every text, as Llama does.
        names: roles of special tokens, such as `eos_token`.
    """
    pairs = [tuple(merge.split()) for merge in merges]
    tokens = [*specials, *sorted(pre_tokenizers.ByteLevel.alphabet()), *map("".join, pairs)]
    vocabulary = {token: index for index, token in enumerate(tokens)}
    tokenizer = Tokenizer(models.BPE(vocabulary, pairs))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(list(specials))
    if bos_first:
        bos = names["bos_token"]
        tokenizer.post_processor = processors.TemplateProcessing(
            single=f"{bos} $A", special_tokens=[(bos, vocabulary[bos])]
        )
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, chat_template=template, **names)


def make_tokenizer() -> PreTrainedTokenizerFast:
    """The tokenizer of `make_model`: 300 tokens and a chat template."""
    return byte_tokenizer(SPECIALS, TEMPLATE, merges=MERGES, eos_token="<eos>", pad_token="<pad>")


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


def make_runs(folder: Path) -> None:
    """Run directories of one model, `folder/model`: `analysed/`, and `finished/`, the same after all four stages."""
    model, analysed = make_model(folder / "model"), folder / "analysed"
    analysed.mkdir()
    write_data(analysed)
    uniattn_cli.analyze(str(model), run_dir=analysed, overrides=settings(), options=CPU)
    # A base with a card and terms of its own.
    card = "---\nlicense: other\nlicense_name: tiny\nlicense_link: https://x.org/t\n---\nHi\n"
    (folder / "model" / "README.md").write_text(card, encoding="utf-8")
    (folder / "model" / "LICENSE").write_text("Do as you like.\n", encoding="utf-8")
    run = shutil.copytree(analysed, folder / "finished")
    uniattn_cli.convert(run_dir=run, groups="every:3", options=CPU)
    uniattn_cli.train(run_dir=run, overrides=[f"train.stages={TWO_STAGES}"], options=CPU)
    uniattn_cli.evaluate(run_dir=run, options=CPU)


def convert_layers(analysed: Path, folder: Path, layers: str) -> tuple[Conversion, list[dict]]:
    """Converts given layers in a copy of an analysed run.

    Args:
        analysed: the run directory.
        folder: becomes the copy.
        layers: `layout.layers`, one entry for each.

    Returns:
        The result, and what was fitted in each changed layer.
    """
    run = shutil.copytree(analysed, folder)
    result = uniattn_cli.convert(run_dir=run, overrides=settings(layout__layers=layers), options=CPU)
    return result, read_json(result.directory / REPORT_FILE, "")["fits"]
