"""`uniattn data`: what it shows is what training gets, and it needs neither weights nor an earlier stage."""

from __future__ import annotations

import json

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tiny_run import make_model, settings, write_data

from uniattn_cli.cli.console import make_console, show
from uniattn_cli.commands.view_data import histogram, percentile, view_data
from uniattn_cli.data import sequences, splits
from uniattn_cli.models.hub import locate
from uniattn_cli.models.tokenizer import load_tokenizer
from uniattn_cli.recipe.schema import DatasetSpec, Recipe
from uniattn_cli.tables import Result, Sample


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A model without weights, rows and text, and a recipe for them."""
    folder = tmp_path_factory.mktemp("view")
    make_model(folder / "model")
    for weights in (folder / "model").glob("*.safetensors"):
        weights.unlink()
    write_data(folder)
    (folder / "other.jsonl").write_text(
        "".join(json.dumps({"question": f"Q{n}", "answer": "A" * (n + 1)}) + "\n" for n in range(40))
    )
    (folder / "recipe.yaml").write_text(
        f"model: {{name: {folder / 'model'}}}\n"
        f"data:\n  train:\n    - {{source: {folder / 'rows.jsonl'}}}\n"
        f"    - {{source: {folder / 'other.jsonl'}, columns: {{prompt: question, completion: answer}}}}\n"
        "train: {max_length: 32, batch_size: 8, stages: [{trains: all, epochs: 2}]}\n"
    )
    return folder


def table(view, title: str):
    return next(table for table in view.tables if table.title.startswith(title))


def test_counts_are_those_of_training(folder):
    view = view_data(recipe=folder / "recipe.yaml")
    recipe = Recipe.load(folder / "recipe.yaml")
    rows = splits.load_mix(recipe.data.train, "train", holdout=recipe.data.holdout, seed=recipe.seed)
    tokenizer = load_tokenizer(locate(recipe.model.name))
    expected = sequences.tokenize(rows, tokenizer, max_length=32, loss="responses")
    counts = expected.counts
    assert view.tokenised.dataset.to_dict() == expected.dataset.to_dict()
    assert counts.truncated > 0 and counts.lost > 0
    together = table(view, "rows").rows[-1]
    assert together[0] == "together" and together[1:5] == [
        f"{len(rows.order):,}", f"{len(rows.order):,}", f"{counts.used:,}", f"{counts.tokens:,}"
    ]  # fmt: skip
    assert together[6:] == [
        f"{counts.share:.1%}", f"{counts.truncated:,}", f"{counts.lost_share:.1%}", f"{counts.dropped:,}"
    ]  # fmt: skip
    full = sequences.tokenize(rows, tokenizer, max_length=10**6, loss="responses")
    lengths = [length for part in view.tokenised.sources.values() for length in part.lengths]
    assert sum(lengths) == full.counts.tokens == counts.tokens + counts.lost
    steps = table(view, "one epoch")
    assert steps.title.startswith(f"one epoch: {counts.used} sequences in {counts.used / 8:,.1f} steps of 8")
    assert steps.rows[0][1] == str(round(2 * counts.used / 8))


def test_a_stage_with_rows_of_its_own_is_named_and_not_counted(folder):
    stages = f"train.stages=[{{trains: all}}, {{name: recovery, data: {folder / 'other.jsonl'}}}]"
    view = view_data(recipe=folder / "recipe.yaml", overrides=[stages])
    assert [row[0] for row in table(view, "one epoch").rows] == ["all"]
    assert any(
        "rows of 'recovery' are not among these" in note and "--train FILE shows them" in note for note in view.notes
    )


def test_samples_are_rows_as_they_are_trained_on(folder):
    view = view_data(recipe=folder / "recipe.yaml", samples=6)
    assert len(view.samples) == 6
    assert sum("other.jsonl" in sample.title for sample in view.samples) == 3, "data sets take turns"
    for sample in view.samples:
        assert [learned for _, learned in sample.pieces] == [False, True]
        if "rows.jsonl" in sample.title:
            assert "more truncated" in sample.title and sample.pieces[0][0].startswith("<|user|>What comes after")
    again = view_data(recipe=folder / "recipe.yaml", samples=6)
    other = view_data(recipe=folder / "recipe.yaml", samples=6, seed=5)
    assert again.samples == view.samples != other.samples
    same = other.tokenised.dataset.to_dict() == view.tokenised.dataset.to_dict()
    assert same, "the seed chooses what is shown, no more"


def test_the_heldout_part(folder):
    train = view_data(recipe=folder / "recipe.yaml", samples=0)
    heldout = view_data(recipe=folder / "recipe.yaml", part="heldout", samples=0)
    assert heldout.title.startswith("held-out") and not heldout.samples
    assert heldout.tokenised.counts.rows + train.tokenised.counts.rows == 240 and heldout.tokenised.counts.rows > 0


def test_packed_sequences_are_what_a_step_counts(folder):
    plain, packed = (
        view_data(recipe=folder / "recipe.yaml", overrides=[f"train.packing={on}"]) for on in ("false", "true")
    )
    number = int(table(packed, "one epoch").title.split()[2])
    assert number < plain.tokenised.counts.used and number >= plain.tokenised.counts.tokens / 32
    assert table(packed, "one epoch").rows[0][1] == str(round(2 * number / 8))


def test_a_model_without_template_says_so_and_what_will_be_refused_is_told(folder, tmp_path):
    tokenizer = load_tokenizer(locate(str(folder / "model")))
    tokenizer.chat_template = None
    tokenizer.save_pretrained(tmp_path / "model")
    (tmp_path / "model" / "config.json").write_text((folder / "model" / "config.json").read_text())
    named = [f"model.name={tmp_path / 'model'}"]
    view = view_data(recipe=folder / "recipe.yaml", overrides=named)
    assert any("no chat template" in note for note in view.notes)
    chatml = view_data(
        recipe=folder / "recipe.yaml", overrides=[*named, "data.chat_template=chatml", "train.max_length=512"]
    )
    assert "<|im_start|>user" in chatml.samples[0].pieces[0][0] and not any("no chat" in note for note in chatml.notes)
    short = view_data(recipe=folder / "recipe.yaml", overrides=[*named, "data.chat_template=chatml"])
    counts = short.tokenised.counts
    assert counts.used == 0 and counts.dropped == counts.rows, "the counts show why"
    assert "so it is dropped" in short.samples[0].title
    assert any("`uniattn train` will refuse these rows" in note for note in short.notes)
    text = view_data(recipe=folder / "recipe.yaml", overrides=[f"data.train={folder / 'text.txt'}"])
    assert any("`uniattn train` will refuse these rows" in note for note in text.notes)


def test_answers_at_which_generation_would_not_stop_are_told(folder, tmp_path):
    turn = "{% for m in messages %}<|user|>{{ m['content'] }}{% if m['role'] == 'assistant' %}<|assistant|>{% endif %}"
    (tmp_path / "turn.jinja").write_text(turn + "{% endfor %}{% if add_generation_prompt %}<|user|>{% endif %}")
    named = [f"data.chat_template={tmp_path / 'turn.jinja'}", "train.max_length=512"]
    notes = view_data(recipe=folder / "recipe.yaml", overrides=named).notes
    assert [note for note in notes if "generation does not stop" in note and "'<|assistant|>'" in note]
    assert not any("does not stop" in note for note in view_data(recipe=folder / "recipe.yaml").notes)
    # Until the model's own settings name the token.
    (tmp_path / "model").mkdir()
    for path in (folder / "model").iterdir():
        (tmp_path / "model" / path.name).write_bytes(path.read_bytes())
    stop = load_tokenizer(locate(str(folder / "model"))).convert_tokens_to_ids("<|assistant|>")
    (tmp_path / "model" / "generation_config.json").write_text(json.dumps({"eos_token_id": [1, stop]}))
    view = view_data(recipe=folder / "recipe.yaml", overrides=[*named, f"model.name={tmp_path / 'model'}"])
    assert not any("does not stop" in note for note in view.notes)


def test_the_command_marks_what_is_learned(folder, uniattn):
    done = uniattn("data", "recipe.yaml", "--samples", "2", cwd=folder)
    assert done.returncode == 0, done.stderr
    assert "⟦" in done.stdout and "<eos>⟧" in done.stdout and "one epoch" in done.stdout and "█" in done.stdout
    assert "\x1b[" not in done.stdout
    bad = uniattn("data", "missing.yaml", cwd=folder)
    assert bad.returncode == 1 and "missing.yaml: no such file" in bad.stderr
    assert sorted(path.name for path in folder.iterdir()) == [
        "model", "other.jsonl", "recipe.yaml", "rows.jsonl", "text.txt"
    ]  # fmt: skip


def test_terminals_get_colours_and_no_marks(monkeypatch):
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.delenv("NO_COLOR", raising=False)
    console = make_console()
    with console.capture() as captured:
        show(Result(samples=[SAMPLE]), console)
    assert "\x1b[32myes" in captured.get() and "⟦" not in captured.get()


SAMPLE = Sample("one", [("asked [bold]", False), ("yes", True)])


@given(st.lists(st.integers(1, 5000), min_size=1, max_size=300))
def test_the_histogram_holds_every_sequence_once(lengths):
    ordered = sorted(lengths)
    drawn = histogram(np.array(ordered))
    assert sum(int(row[1].replace(",", "")) for row in drawn.rows) == len(lengths)
    assert len(drawn.rows) <= 13
    for row in drawn.rows:
        first = int(row[0].split("–")[0].split(" ")[0].replace(",", ""))
        last = int(row[0].split("–")[1].replace(",", "")) if "–" in row[0] else 10**9
        assert int(row[1].replace(",", "")) == sum(first <= length <= last for length in lengths)
        assert ("█" in row[2]) == (row[1] != "0")
    assert percentile(np.array(ordered), 1.0) == max(lengths) and percentile(np.array(ordered), 0.0) == min(lengths)


# The template that training uses is the one that inference finds


def test_the_template_of_training_is_saved_and_used_by_inference(tmp_path, monkeypatch):
    from uniattn_cli import RunOptions, analyze, convert, train
    from uniattn_cli.data.sequences import tokenize
    from uniattn_cli.data.splits import load_mix

    make_model(tmp_path / "model")
    tokenizer = load_tokenizer(locate(str(tmp_path / "model")))
    tokenizer.chat_template = None
    tokenizer.save_pretrained(tmp_path / "model")
    (tmp_path / "model" / "chat_template.jinja").unlink(missing_ok=True)
    write_data(tmp_path)
    monkeypatch.chdir(tmp_path)
    quick, options = settings(), RunOptions(device="cpu", force=True)
    analyze("model", overrides=quick, options=options)
    for template in (None, "zephyr"):
        overrides = [*quick, *([f"data.chat_template={template}"] if template else [])]
        convert(groups="every:2", overrides=overrides, options=options)
        train(overrides=overrides, options=options)
        trained = load_tokenizer(locate("trained"))
        rows = load_mix((DatasetSpec(source="rows.jsonl"),), "train", holdout=0.05, seed=0).rows
        learned = tokenize(rows, trained, max_length=500, loss="responses").dataset
        for index in (0, 7):
            rendered = trained.apply_chat_template(rows[index]["messages"], tokenize=True, return_dict=True)
            assert rendered["input_ids"] == learned[index]["input_ids"]
        assert ("'<|' +" in trained.chat_template) == (template == "zephyr")


def test_a_missing_run_directory_is_told(uniattn):
    done = uniattn("data", "-C", "nowhere")
    assert done.returncode == 1 and "no such directory" in done.stderr
