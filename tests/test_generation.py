"""`uniattn generate` and `uniattn chat` on tiny models: what is said, what is cached, and what is refused."""

from __future__ import annotations

import json
import re
import sys
from types import SimpleNamespace

import pytest
import torch
from conftest import run_here
from tiny import make_layout, randomise_compensation
from tiny_run import make_model, make_tokenizer

import uniattn_cli
from uniattn_cli.cli import talk
from uniattn_cli.commands.generate import Chat, Conversation, SilentListener, Speaker, generate, load_speakers
from uniattn_cli.errors import DataError, ModelError, StageError, UsageError
from uniattn_cli.generation.decode import Decoding, Streamer, answer
from uniattn_cli.generation.prompts import chat_ids, plain_ids
from uniattn_cli.modeling.configuration_uniattn import attention_shape
from uniattn_cli.models import building, hub, loading
from uniattn_cli.models.costs import kv_bytes_per_token
from uniattn_cli.options import RunOptions
from uniattn_cli.recipe.schema import ModelSpec
from uniattn_cli.run.directory import RunDir

CPU = torch.device("cpu")
PROMPT = "What comes after 7?"
FEW = Decoding(max_new_tokens=6)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run directory with a recipe, `converted/` and `trained/`; `base` is its base model."""
    root = tmp_path_factory.mktemp("talk")
    base = make_model(root / "base-model")
    folder = root / "run"
    folder.mkdir()
    (folder / "recipe.yaml").write_text(f"model: {{name: {base}}}\n", encoding="utf-8")
    loaded = loading.load_model(hub.locate(str(base)), ModelSpec(name=str(base)), CPU)
    for stage, scale, finished in (("convert", 0.1, "2026-01-01T10:00:00"), ("train", 0.3, "2026-01-01T11:00:00")):
        converted = randomise_compensation(building.build_converted(loaded, make_layout("mixed")), scale)
        output = RunDir(folder).output(stage)
        building.save_checkpoint(converted, make_tokenizer(), output)
        record = {"stage": stage, "inputs": {}, "finished": finished}
        (output / "stage.json").write_text(json.dumps(record), encoding="utf-8")
    return SimpleNamespace(folder=folder, base=base)


@pytest.fixture(scope="module")
def speaker(run):
    (found,) = load_speakers(RunDir(run.folder), str(run.folder / "converted"), None, (), RunOptions(device="cpu"))
    return found


def expected(speaker: Speaker, ids: list[int], new: int) -> str:
    """Greedy text without a cache, by taking the likeliest token again and again."""
    ids = list(ids)
    start = len(ids)
    with torch.no_grad():
        for _ in range(new):
            ids.append(speaker.model(torch.tensor([ids]), use_cache=False).logits[0, -1].argmax().item())
            if ids[-1] == speaker.tokenizer.eos_token_id:
                break
    return speaker.tokenizer.decode(ids[start:], skip_special_tokens=True)


class Ears(SilentListener):
    def __init__(self):
        self.heard: dict[str, str] = {}

    def begin(self, name):
        self.heard[name] = ""

    def text(self, piece):
        self.heard[list(self.heard)[-1]] += piece


# --- one answer -------------------------------------------------------------------------------------------------------


def test_an_answer_is_the_greedy_text_of_the_rendered_prompt(speaker):
    ids = chat_ids(speaker.tokenizer, [{"role": "user", "content": PROMPT}])
    assert speaker.tokenizer.decode(ids) == f"<|user|>{PROMPT}<|assistant|>"
    pieces = []
    found = answer(speaker.model, speaker.tokenizer, ids, FEW, on_text=pieces.append)
    assert found.text == expected(speaker, ids, 6) == "".join(pieces)
    assert found.prompt == len(ids) and found.reused == 0 and found.ended in ("length", "stop")


def test_the_cache_has_the_bytes_that_the_layout_predicts(speaker):
    config = speaker.model.config
    found = answer(speaker.model, speaker.tokenizer, plain_ids(speaker.tokenizer, PROMPT), FEW)
    assert found.cached == found.prompt + len(found.tokens) - 1
    assert found.kv_bytes == found.cached * kv_bytes_per_token(config.layout, attention_shape(config), 4)


@pytest.mark.parametrize("settings", [{}, {"temperature": 0.8, "top_p": 0.9, "seed": 3}])
def test_the_engine_streams_an_answer_too(speaker, settings):
    ids, decoding, pieces = plain_ids(speaker.tokenizer, PROMPT), Decoding(max_new_tokens=6, **settings), []
    found = answer(speaker.model, speaker.tokenizer, ids, decoding, on_text=pieces.append, engine="engine")
    plain = answer(speaker.model, speaker.tokenizer, ids, decoding)
    assert found.path == "engine" and plain.path == "transformers" and found.text == "".join(pieces)
    assert found.cached == found.prompt + len(found.tokens) - 1
    layout, shape = speaker.model.config.layout, attention_shape(speaker.model.config)
    assert found.kv_bytes == found.cached * kv_bytes_per_token(layout, shape, 4)
    if settings:
        again = answer(speaker.model, speaker.tokenizer, ids, decoding, engine="engine")
        assert again.tokens == found.tokens, "a seed decides"
    else:
        assert (found.tokens, found.kv_bytes, found.ended) == (plain.tokens, plain.kv_bytes, plain.ended)


def test_a_model_that_the_engine_cannot_run(speaker, monkeypatch):
    from uniattn_cli.inference import engine
    from uniattn_cli.inference.program import UnsupportedError

    def refuse(model):
        raise UnsupportedError("its norms are unknown")

    monkeypatch.setattr(engine, "engine_for", refuse)
    monkeypatch.setattr(engine, "engine_wanted", lambda choice, device: choice != "transformers")
    ids = plain_ids(speaker.tokenizer, PROMPT)
    with pytest.raises(ModelError, match="the engine cannot run this: its norms are unknown"):
        answer(speaker.model, speaker.tokenizer, ids, FEW, engine="engine")
    found = answer(speaker.model, speaker.tokenizer, ids, FEW, engine="auto")
    assert (found.path, found.reason) == ("transformers", "its norms are unknown")
    assert found.tokens == answer(speaker.model, speaker.tokenizer, ids, FEW).tokens


def test_only_what_is_asked_for_decides_the_answer(speaker):
    ids = plain_ids(speaker.tokenizer, PROMPT)
    before = answer(speaker.model, speaker.tokenizer, ids, FEW)
    own = speaker.model.generation_config
    kept = own.to_dict()
    try:
        own.repetition_penalty, own.do_sample, own.temperature, own.min_new_tokens = 50.0, True, 5.0, 6
        after = answer(speaker.model, speaker.tokenizer, ids, FEW)
        assert speaker.model.generation_config is own and own.repetition_penalty == 50.0
    finally:
        own.update(**kept)
    assert after.tokens == before.tokens


def test_sampling_follows_its_seed(speaker):
    ids = plain_ids(speaker.tokenizer, PROMPT)

    def tokens(**settings):
        return answer(speaker.model, speaker.tokenizer, ids, Decoding(max_new_tokens=8, **settings)).tokens

    hot = {"temperature": 3.0}
    assert tokens(**hot, seed=1) == tokens(**hot, seed=1)
    assert len({tokens(**hot, seed=seed) for seed in range(4)}) > 1
    assert tokens(temperature=1.0, top_p=1e-6, seed=1) == tokens()
    # No limit to the fifty likeliest tokens, which transformers has by default.
    drawn = {tokens(temperature=1e4, seed=seed)[0] for seed in range(20)}
    with torch.no_grad():
        likeliest = speaker.model(torch.tensor([ids])).logits[0, -1].topk(50).indices.tolist()
    assert drawn - set(likeliest)


def test_an_end_token_ends_the_answer(speaker):
    ids = plain_ids(speaker.tokenizer, PROMPT)
    first = answer(speaker.model, speaker.tokenizer, ids, FEW).tokens[0]
    own = speaker.model.generation_config
    before, own.eos_token_id = own.eos_token_id, [first]
    try:
        found = answer(speaker.model, speaker.tokenizer, ids, FEW)
    finally:
        own.eos_token_id = before
    assert (found.tokens, found.ended, found.tokens_per_second) == ((first,), "stop", None)


def test_characters_of_several_bytes_come_whole():
    tokenizer = make_tokenizer()
    pieces = []
    streamer = Streamer(tokenizer, pieces.append)
    streamer.put(torch.tensor([[1, 2]]))
    ids = tokenizer("né€ 🙂!", add_special_tokens=False)["input_ids"]
    for token in ids:
        streamer.put(torch.tensor([token]))
    streamer.end()
    assert "".join(pieces) == "né€ 🙂!" and "�" not in "".join(pieces)
    assert len(pieces) > 3 and streamer.tokens == ids


@pytest.mark.parametrize("prompt", ["caf\udce9", "half \ud83d"])
def test_a_prompt_that_is_no_text_is_told(prompt, speaker):
    with pytest.raises(DataError, match="the prompt is not UTF-8 text"):
        plain_ids(speaker.tokenizer, prompt)
    with pytest.raises(DataError, match="the prompt is not UTF-8 text"):
        chat_ids(speaker.tokenizer, [{"role": "user", "content": prompt}])


def test_prompts_that_leave_no_room(speaker):
    window = speaker.model.config.max_position_embeddings
    ids = [5] * (window - 2)
    found = answer(speaker.model, speaker.tokenizer, ids, Decoding(max_new_tokens=50))
    assert (len(found.tokens), found.ended) == (2, "window") or found.ended == "stop"
    with pytest.raises(DataError, match=f"has 1,024 tokens, but the model's context window is {window:,}"):
        answer(speaker.model, speaker.tokenizer, [5] * window, FEW)
    with pytest.raises(DataError, match="is empty"):
        answer(speaker.model, speaker.tokenizer, [], FEW)


def test_two_models_answer_as_each_does_alone(run):
    ears = Ears()
    both = generate(PROMPT, beside="base", decoding=FEW, run_dir=run.folder, listener=ears, options=RunOptions("cpu"))
    assert list(both.answers) == ["base", str(run.folder / "trained")]
    for name, said in both.answers.items():
        alone = generate(PROMPT, name, decoding=FEW, run_dir=run.folder, options=RunOptions("cpu"))
        assert alone.answers[name].tokens == said.tokens
        assert ears.heard[name] == said.text


# --- which model ------------------------------------------------------------------------------------------------------


def test_load_opens_a_base_a_checkpoint_and_a_run(run, tmp_path):
    for place, wanted in ((run.base, run.base), (run.folder / "converted", None), (run.folder, run.folder / "trained")):
        model, tokenizer = uniattn_cli.load(place, device="cpu")
        assert not model.training and model.device == CPU and tokenizer.chat_template
        assert model.config._name_or_path == str(wanted or place)
    assert uniattn_cli.load(str(run.base), dtype="bfloat16", device="cpu")[0].dtype == torch.bfloat16
    with pytest.raises(StageError, match="has neither trained/ nor converted/"):
        uniattn_cli.load(tmp_path)
    with pytest.raises(UsageError, match=r"dtype 'bfloat61'.* \(did you mean 'bfloat16'\?\)"):
        uniattn_cli.load(run.base, dtype="bfloat61")
    with pytest.raises(ModelError, match="no such directory"):
        uniattn_cli.load("./nowhere")


# --- conversations ----------------------------------------------------------------------------------------------------


def test_turns_with_a_cache_are_those_without(speaker):
    conversation = Conversation(speaker)
    said, reused = [], 0
    for text in ("Hello there.", "And what is next?", "Why?"):
        messages = [*conversation.messages, {"role": "user", "content": text}]
        ids = chat_ids(speaker.tokenizer, messages)
        found = conversation.say(text, FEW, lambda piece: None)
        assert found.text == expected(speaker, ids, 6)
        assert found.prompt == len(ids)
        said.append(found.text)
        reused += found.reused
    assert [turn["content"] for turn in conversation.messages[1::2]] == said
    conversation.reset()
    assert conversation.say("Hello there.", FEW, lambda piece: None).text == said[0]


def test_earlier_turns_are_not_computed_again(speaker):
    # The one new token of a turn is not fed any more, so that the cache holds just the prompt, the start of the next.
    conversation = Conversation(speaker)
    lengths = []
    for text in ("One.", "Two.", "Three."):
        found = conversation.say(text, Decoding(max_new_tokens=1), lambda piece: None)
        assert found.reused == (lengths[-1] if lengths else 0)
        lengths.append(found.prompt)


def test_a_template_that_changes_earlier_turns_is_followed(speaker):
    tokenizer = make_tokenizer()
    tokenizer.chat_template = "{{ messages | length }}:" + tokenizer.chat_template
    changed = Speaker("changed", speaker.model, tokenizer)
    conversation = Conversation(changed)
    for turn, text in enumerate(("One.", "Two.")):
        found = conversation.say(text, Decoding(max_new_tokens=1), lambda piece: None)
        assert found.reused == 0
        assert tokenizer.decode(chat_ids(tokenizer, conversation.messages[:-1])).startswith(f"{2 * turn + 1}:")


def test_each_model_has_its_own_history(run):
    chat = Chat.open(beside="base", decoding=FEW, run_dir=run.folder, options=RunOptions("cpu"))
    for text in ("Hello.", "Again."):
        found = chat.say(text, SilentListener())
    for conversation in chat.conversations:
        alone = Conversation(conversation.speaker)
        alone.say("Hello.", FEW, lambda piece: None)
        assert alone.say("Again.", FEW, lambda piece: None).text == found[conversation.speaker.name].text
        assert alone.messages == conversation.messages


def test_a_turn_that_fails_has_not_happened(speaker):
    chat = Chat([speaker, Speaker("other", speaker.model, speaker.tokenizer)], FEW)
    chat.say("Hello.", SilentListener())
    before = [list(conversation.messages) for conversation in chat.conversations]
    with pytest.raises(DataError, match="window"):
        chat.say("a b" * 2000, SilentListener())

    class Impatient(SilentListener):
        def finish(self, name, answer):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        chat.say("Stop.", Impatient())
    assert [conversation.messages for conversation in chat.conversations] == before
    ids = chat_ids(speaker.tokenizer, [*before[0], {"role": "user", "content": "Go on."}])
    assert chat.say("Go on.", SilentListener())[speaker.name].text == expected(speaker, ids, 6)


# --- the command line -------------------------------------------------------------------------------------------------


def test_the_command_prints_the_answer_and_nothing_else(run):
    done = run_here("generate", PROMPT, "--max-new-tokens", "6", "--stats", "--device", "cpu", cwd=run.folder)
    assert done.returncode == 0, done.stderr
    (trained,) = load_speakers(RunDir(run.folder), None, None, (), RunOptions("cpu"))
    ids = chat_ids(trained.tokenizer, [{"role": "user", "content": PROMPT}])
    assert done.stdout == expected(trained, ids, 6) + "\n"
    figures = re.search(r"\(trained: (\d) tokens; .* tokens/s .*; KV cache ([\d,]+) B for (\d+) tokens", done.stderr)
    config = trained.model.config
    each = kv_bytes_per_token(config.layout, attention_shape(config), 4)
    assert int(figures[2].replace(",", "")) == int(figures[3]) * each
    # A directory alone is the model, and the prompt comes from stdin; a stock model needs no run directory.
    words = ("generate", run.base, "--raw", "--max-new-tokens", "6", "--device", "cpu")
    piped = run_here(*words, cwd=run.folder.parent, stdin=PROMPT + "\n")
    (base,) = load_speakers(RunDir(run.folder), "base", None, (), RunOptions("cpu"))
    assert piped.stdout == expected(base, plain_ids(base.tokenizer, PROMPT), 6) + "\n"


def test_a_chat_through_a_pipe(run):
    lines = "Hello.\n\nAgain.\n/what\n/reset\nHello.\n" + "x y" * 2000 + "\n/exit\nnever said\n"
    words = ("chat", "converted", "--max-new-tokens", "4", "--beside", "base", "--stats", "--device", "cpu")
    done = run_here(*words, cwd=run.folder, stdin=lines)
    assert done.returncode == 0, done.stderr
    chat = Chat.open(str(run.folder / "converted"), beside="base", decoding=Decoding(max_new_tokens=4),
                     run_dir=run.folder, options=RunOptions("cpu"))  # fmt: skip
    wanted = ""
    for text in ("Hello.", "Again.", None, "Hello."):
        if text is None:
            chat.reset()
            continue
        first, second = (said.text for said in chat.say(text, SilentListener()).values())
        wanted += f"[base]\n{first}\n\n[converted]\n{second}\n\n"
    assert done.stdout == wanted + "[base]\n"
    assert "unknown command /what; /reset resets the conversation" in done.stderr
    assert "window is 1,024; shorten it; this turn was discarded" in done.stderr
    assert len(re.findall(r"KV cache [\d,]+ B", done.stderr)) == 6


def test_without_a_chat_template_the_text_is_plain_and_said_so(run, tmp_path):
    folder = tmp_path / "plain"
    make_model(folder)
    (folder / "chat_template.jinja").unlink()
    done = run_here("generate", "plain", PROMPT, "--max-new-tokens", "4", "--device", "cpu", cwd=tmp_path)
    assert "plain has no chat template; the prompt is used as plain text" in done.stderr
    (plain,) = load_speakers(RunDir(tmp_path), str(folder), None, (), RunOptions("cpu"))
    assert done.stdout == expected(plain, plain_ids(plain.tokenizer, PROMPT), 4) + "\n"
    # In a conversation, turns are told apart as in training.
    turns = [{"role": role, "content": role} for role in ("user", "assistant", "user")]
    assert plain.tokenizer.decode(chat_ids(plain.tokenizer, turns)) == "user\nassistant<eos>user\n"


@pytest.mark.parametrize(
    ("arguments", "code", "line"),
    [
        (["generate", "hi"], 1, "error: {folder} has neither trained/ nor converted/; give a checkpoint"),
        (["chat", "./nowhere"], 1, "error: ./nowhere: no such directory"),
        (["generate", "./nowhere", "hi", "--beside", "base"], 1, "error: 'base' is the model of recipe.yaml"),
        (
            ["generate", "a", "b", "c"],
            2,
            "error: got 3 arguments, expected at most [CHECKPOINT] PROMPT; quote the",
        ),
        (["generate", "hi", "--greedy", "--top-p", "0.9"], 2, "error: --greedy excludes sampling; remove"),
        (["generate", "hi", "--top-p", "1.5"], 2, "error: --top-p must be above 0 and at most 1, not 1.5"),
        (["generate", "hi", "--temperature", "-1"], 2, "error: --temperature must be 0 or at least 0.001, not -1"),
        (["chat", "--temperature", "1e-300"], 2, "error: --temperature must be 0 or at least 0.001, not 1e-300"),
        (["chat", "--max-new-tokens", "0"], 2, "error: --max-new-tokens must be at least 1, not 0"),
    ],
)
def test_mistakes_are_one_line(arguments, code, line, tmp_path):
    done = run_here(*arguments, "--device", "cpu", cwd=tmp_path)
    assert (done.returncode, done.stdout) == (code, "")
    assert done.stderr.startswith(line.format(folder=tmp_path)) and done.stderr.count("\n") == 1
    assert not list(tmp_path.iterdir())


def test_a_terminal_without_a_prompt_is_told_how(monkeypatch):
    monkeypatch.setattr(sys, "stdin", SimpleNamespace(isatty=lambda: True))
    with pytest.raises(UsageError, match="no prompt; give one in quotes"):
        talk.split_arguments([])
    assert talk.split_arguments(["hi"]) == (None, "hi")
    for words in ([""], ["trained", ""]):
        with pytest.raises(UsageError, match="no prompt; give one in quotes"):
            talk.split_arguments(words)
    assert talk.split_arguments(["a", "b"]) == ("a", "b")
