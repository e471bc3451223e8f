"""`uniattn synthesize`: rows that a model writes, from the training rows alone, and of use in training."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from tiny_run import make_model, make_tokenizer, settings, write_data

import uniattn_cli
from uniattn_cli.data import splits
from uniattn_cli.data.chat import ChatRenderer
from uniattn_cli.errors import DataError, RecipeError, StageError
from uniattn_cli.generation.prompts import chat_ids, plain_ids
from uniattn_cli.generation.writer import Writer, _asked, _passage, _whole_sentences
from uniattn_cli.inference.engine import Decoded
from uniattn_cli.models.hub import locate
from uniattn_cli.models.loading import load_model
from uniattn_cli.models.tokenizer import load_tokenizer
from uniattn_cli.options import RunOptions
from uniattn_cli.recipe.files import commented_tree, write_tree
from uniattn_cli.recipe.schema import ModelSpec, Recipe, SynthesisSpec
from uniattn_cli.run.directory import RunDir

CPU, AGAIN = RunOptions(device="cpu"), RunOptions(device="cpu", force=True)
BOTH = "[rows.jsonl, {source: text.txt, format: text}]"


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A run directory with recipe and data, and the model that the recipe names."""
    folder = tmp_path_factory.mktemp("synthesis")
    run = folder / "run"
    run.mkdir()
    write_data(run)
    model = make_model(folder / "model")
    # So many tokens end an answer that random ones often do.
    (model / "generation_config.json").write_text(json.dumps({"eos_token_id": [1, *range(100, 106)]}))
    write_tree(commented_tree(Recipe(model=ModelSpec(name=str(model)))), run / "recipe.yaml")
    return run


@pytest.fixture
def run(made, monkeypatch):
    monkeypatch.chdir(made)
    return made


def overrides(**changes) -> list[str]:
    quick = {"data__train": BOTH, "synthesis__tokens": 3000, "synthesis__prefix": 8, "synthesis__batch_size": 16}
    return settings(**quick | changes)


def synthesize(**changes):
    return uniattn_cli.synthesize(overrides=overrides(**changes), options=AGAIN)


@pytest.fixture(scope="module")
def usual(made) -> SimpleNamespace:
    """What is written with the usual settings."""
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(made)
        return SimpleNamespace(result=synthesize(), texts=written("text.jsonl"), chats=written("chats.jsonl"))


def written(name: str) -> list[dict]:
    path = Path("synthetic") / name
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def loaded(**spec):
    source = locate(Recipe.load("recipe.yaml").model.name)
    model, tokenizer = load_model(source, ModelSpec(dtype="float32"), torch.device("cpu")), load_tokenizer(source)
    return model, tokenizer, Writer(model, tokenizer, SynthesisSpec(**spec), 64, 0)


def training_rows(part="train", train=BOTH):
    recipe = Recipe.load("recipe.yaml", overrides(data__train=train))
    return splits.load_mix(recipe.data.train, part, holdout=recipe.data.holdout, seed=0).rows


def test_rows_go_on_from_training_rows_and_from_no_others(run, usual):
    rows = usual.result.rows
    assert rows == {"text": len(usual.texts), "messages": len(usual.chats)} and min(rows.values()) > 3
    train, heldout = training_rows(), training_rows("heldout")
    asked = {row["messages"][0]["content"] for row in train if row["messages"]}
    kept_back = {row["messages"][0]["content"] for row in heldout if row["messages"]}
    assert kept_back and not kept_back & asked
    for row in usual.chats:
        question, answer = row["messages"]
        assert question["content"] in asked and answer["role"] == "assistant" and answer["content"]
    passages = [row["text"] for row in train if row["text"]]
    tokenizer = make_tokenizer()
    for row in usual.texts:
        start = tokenizer.decode(tokenizer(row["text"])["input_ids"][:4])
        assert any(start in passage for passage in passages)


def test_there_are_as_many_tokens_as_asked_for_in_rows_that_fit(run, usual):
    assert 3000 <= usual.result.tokens < 3000 + 64
    sizes = [size for batch in loaded(tokens=2000, batch_size=16)[2].batches(training_rows()) for *_, size in batch]
    assert max(sizes) <= 64 and 2000 <= sum(sizes) < 2000 + 64


def test_the_likeliest_text_is_that_of_generate(run):
    model, tokenizer, writer = loaded(temperature=0.0, top_p=1.0, prefix=8, batch_size=8, tokens=700)
    entries = [entry for batch in writer.batches(training_rows()) for entry in batch]
    assert {kind for kind, *_ in entries} == {"text", "messages"}
    for kind, row, size in entries:
        ids = chat_ids(tokenizer, row[:-1]) if kind == "messages" else plain_ids(tokenizer, row)[:8]
        new = 64 - len(ids) + (16 if kind == "messages" else -1)
        tokens = torch.tensor([ids])
        whole = model.generate(tokens, attention_mask=torch.ones_like(tokens), do_sample=False, max_new_tokens=new)[0]
        ended = whole[-1] in writer.continuer.ends
        whole = whole[:-1] if ended else whole
        said = tokenizer.decode(whole if kind == "text" else whole[len(ids) :], skip_special_tokens=True)
        if kind == "messages":
            assert row[-1]["content"] == said.strip()
            assert size == min(len(whole), 64)
            # What was not finished is longer than a row, so that no end of the turn is learned.
            assert ended or len(ChatRenderer(tokenizer).ids(row)) > 64
        else:
            assert said.startswith(row) and 2 * len(row) > len(said)


def test_the_same_seed_writes_the_same_whatever_runs_the_model(run):
    rows = training_rows()
    once = [list(loaded(tokens=1000, batch_size=8, engine=engine)[2].batches(rows)) for engine in ("engine", "auto")]
    assert once[0] == once[1]
    model, tokenizer, _ = loaded()
    other = Writer(model, tokenizer, SynthesisSpec(tokens=1000, batch_size=8), 64, 1)
    assert list(other.batches(rows)) != once[0]


@pytest.mark.parametrize(
    ("key", "value"),
    [("temperature", 0.3), ("top_p", 0.2), ("prefix", 20), ("tokens", 400), ("batch_size", 8), ("model", "other")],
)
def test_settings_change_what_is_written(key, value, run, usual):
    if value == "other":
        make_model(run / "other", seed=1)
    synthesize(**{f"synthesis__{key}": value})
    assert written("text.jsonl") != usual.texts


def test_rows_of_a_model_are_trained_on_and_never_held_out(run, usual):
    synthesize()
    files = "{source: synthetic/text.jsonl, heldout: false}, {source: synthetic/chats.jsonl, heldout: false}"
    more = f"[rows.jsonl, {{source: text.txt, format: text}}, {files}]"
    assert [*training_rows("heldout", more)] == [*training_rows("heldout")]
    count = len(written("text.jsonl")) + len(written("chats.jsonl"))
    assert len(training_rows("train", more)) == len(training_rows()) + count
    # And they are not continued once more.
    synthesize(data__train=more)
    assert written("text.jsonl") == usual.texts


def asking(words: str) -> dict:
    return {"messages": [{"role": "user", "content": words}, {"role": "assistant", "content": "x"}], "text": None}


def test_what_cannot_be_used_is_counted(run):
    writer = loaded(tokens=10_000, temperature=0.0, batch_size=16)[2]
    questions = [
        asking("Why? " * 30),
        *(asking(f"Go on with {number}.") for number in range(8)),
        asking("Go on with 1."),
    ]
    rows = [row for batch in writer.batches(questions) for row in batch]
    # A second pass gave nothing new, and what the first gave is kept.
    assert len(rows) == 8 - (writer.left_out["empty"] + writer.left_out["unfinished"]) // 2
    assert writer.left_out["long"] == 1 and writer.left_out["again"] == len(rows) + 2
    writer = loaded(batch_size=16)[2]
    with pytest.raises(DataError, match=r"gave nothing \(1 conversations with a prompt too long to answer\)"):
        list(writer.batches(questions[:1]))


def decoded(row: torch.Tensor):
    """In place of `Continuer.decode`: the same tokens, [1, new], for every prompt."""
    return lambda prompts, length, seed: Decoded(row.repeat(len(prompts), 1), row, "engine")


@pytest.mark.parametrize("more", [[], [{"messages": None, "text": "A passage of text to go on with."}]])
def test_conversations_without_a_question_are_left_alone(more, run):
    alone = {"messages": [], "text": None}
    rows = [alone, asking("Well?"), *more]
    kinds = [kind for batch in loaded(tokens=60)[2].batches(rows) for kind, *_ in batch]
    assert kinds and set(kinds) <= {"messages", "text"}


def test_a_model_with_nothing_to_add_gives_no_copy(run, monkeypatch):
    writer = loaded(tokens=100, batch_size=4)[2]
    monkeypatch.setattr(writer.continuer, "decode", decoded(torch.full((1, 5), writer.continuer.ends[0])))
    with pytest.raises(DataError, match="2 passages and questions with empty answers"):
        list(writer.batches([asking("Well?"), {"messages": None, "text": "A heading"}]))


def test_an_answer_that_a_small_window_cuts_is_not_taken_for_finished(run, monkeypatch):
    _, tokenizer, writer = loaded(tokens=100, batch_size=4)
    said = torch.tensor([tokenizer("I do not know what to say" * 4)["input_ids"]])
    answered = [decoded(said[:, :width]) for width in (10, said.shape[1])]
    prompt = len(tokenizer.apply_chat_template(asking("Well?")["messages"][:1], add_generation_prompt=True).input_ids)
    assert prompt + 10 < 64 < prompt + said.shape[1]
    monkeypatch.setattr(writer.continuer, "decode", answered[0])
    with pytest.raises(DataError, match="1 unfinished answers"):
        list(writer.batches([asking("Well?")]))
    monkeypatch.setattr(writer.continuer, "decode", answered[1])
    ((kept,),) = [batch for batch in writer.batches([asking("Well?")]) if batch]
    assert kept[2] == 64


# Drops what stands before the end of a thought, and ends turns with a token that ends no text.
THOUGHTS = (
    "{% for m in messages %}{% if m['role'] == 'user' %}<|user|>{{ m['content'] }}{% else %}<|assistant|>"
    "{{ m['content'].split('9')[-1] }}<pad>{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


def test_answers_are_what_training_will_render(run):
    model, tokenizer, _ = loaded()
    tokenizer.chat_template = THOUGHTS
    writer = Writer(model, tokenizer, SynthesisSpec(tokens=3000, batch_size=16), 64, 0)
    assert tokenizer.pad_token_id in writer.continuer.ends and writer.continuer.ends != [tokenizer.pad_token_id]
    rows = [row for batch in writer.batches(training_rows(train="rows.jsonl")) for _, row, _ in batch]
    assert rows and not any("9" in row[-1]["content"] for row in rows)
    assert writer.left_out["unlike"] > 0


def test_trained_models_write_too(run):
    options = overrides(layout__layers="[{}, {}, {leader: 1}, {}, {}, {}]", data__train="rows.jsonl")
    uniattn_cli.convert(overrides=options, options=AGAIN)
    result = synthesize(synthesis__model="converted", synthesis__tokens=300)
    assert result.tokens >= 300
    record = json.loads(Path("synthetic/stage.json").read_text())
    assert record["inputs"]["model"] == locate("converted").fingerprint
    synthesize(synthesis__model="converted", synthesis__tokens=300, train__max_length=1024, synthesis__batch_size=2)
    with pytest.raises(RecipeError, match=r"train.max_length is 1100, but the model's context window is 1024"):
        synthesize(synthesis__model="converted", train__max_length=1100)


def test_rows_that_are_held_out_stay_so_when_named_again(run):
    again = "[rows.jsonl, {source: rows.jsonl, heldout: false}]"
    heldout = {json.dumps(row["messages"]) for row in training_rows("heldout", "rows.jsonl")}
    assert heldout and not heldout & {json.dumps(row["messages"]) for row in training_rows("train", again)}


def test_the_lines_for_the_recipe_hold_what_it_has(run):
    found = synthesize(synthesis__tokens=200, data__train="[{source: rows.jsonl, weight: 3, limit: 100}]").notes
    wanted = (
        "[{source: rows.jsonl, limit: 100, weight: 3.0}, {source: synthetic/chats.jsonl, weight: 1.0, heldout: false}]"
    )
    assert any(note.endswith(f"data.train: {wanted}") for note in found)
    recipe = Recipe.load("recipe.yaml", overrides(data__train=wanted))
    mix = splits.load_mix(recipe.data.train, "train", holdout=recipe.data.holdout, seed=0)
    assert [share.source for share in mix.shares] == ["rows.jsonl", "synthetic/chats.jsonl"]


def test_an_answer_to_the_last_question_is_asked_for():
    turns = [{"role": role, "content": role} for role in ("user", "assistant", "user", "assistant", "user")]
    assert _asked(turns) == turns[:3]
    assert _asked(turns[:1]) is None and _asked(turns[1:2]) is None


def test_passages_begin_with_words_and_reach_every_part():
    import random

    text = " ".join(f"word{number}" for number in range(200))
    found = [_passage(text, 40, random.Random(seed)) for seed in range(300)]
    assert all(passage.startswith("word") and len(passage) <= 40 for passage in found)
    assert {passage.split()[0] for passage in found} > {"word0", "word100", "word190"} or len(set(found)) > 150
    assert _passage("short", 40, random.Random(0)) == "short"
    assert _passage("x" * 100, 40, random.Random(3)) == "x" * 40


def test_texts_end_with_a_sentence_where_most_of_them_is_kept():
    assert _whole_sentences("One. Two 3.5 is said. And th") == "One. Two 3.5 is said."
    assert _whole_sentences('He said "go." Then') == 'He said "go."'
    assert _whole_sentences("Yes. But then a very long sentence that does not e") == (
        "Yes. But then a very long sentence that does not e"
    )
    assert _whole_sentences("no end at all") == "no end at all"


def test_mistakes_are_told_before_anything_is_written(run):
    synthesize(synthesis__tokens=100)
    with pytest.raises(StageError, match="use --force"):
        uniattn_cli.synthesize(overrides=overrides(), options=CPU)
    with pytest.raises(DataError, match=r"synthesis.prefix is 40 tokens, but rows have 64"):
        synthesize(synthesis__prefix=40)
    with pytest.raises(StageError, match=r"trained is missing; run `uniattn train recipe.yaml` first"):
        synthesize(synthesis__model="trained")
    assert written("chats.jsonl") and not RunDir(".").partial("synthesize").exists()


def test_the_command_writes_rows_that_the_next_one_reads(made, uniattn, tmp_path):
    for name in ("rows.jsonl", "text.txt", "recipe.yaml"):
        (tmp_path / name).write_text((made / name).read_text())
    options = [word for entry in overrides(synthesis__tokens=900, synthesis__batch_size=4) for word in ("--set", entry)]
    done = uniattn("synthesize", "--device", "cpu", *options, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "{source: synthetic/text.jsonl, heldout: false}" in " ".join(done.stdout.split())
    more = "data.train=[rows.jsonl, {source: synthetic/text.jsonl, heldout: false}]"
    shown = uniattn("data", "--set", more, "--set", "train.max_length=64", cwd=tmp_path)
    assert shown.returncode == 0 and "synthetic/text.jsonl" in shown.stdout
    again = uniattn("synthesize", "--device", "cpu", *options, cwd=tmp_path)
    assert again.returncode != 0 and "use --force to replace it" in again.stderr
