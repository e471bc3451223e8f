"""Masks over the chat templates of several families, written here in their manner: every answer and nothing else."""

from __future__ import annotations

import pytest
from test_data import CHATML, INST, chat_rows, make_tokenizer, pieces, turns, write

from uniattn_cli.data import sequences, splits, templates
from uniattn_cli.data.chat import ChatRenderer
from uniattn_cli.errors import DataError
from uniattn_cli.recipe.schema import DatasetSpec

LLAMA3 = (
    "{{ bos_token }}{% for m in messages %}"
    "{{ '<|start_header_id|>' + m['role'] + '<|end_header_id|>\n\n' + m['content'] | trim + '<|eot_id|>' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}"
)
# What the system says goes into the first turn of the user; the assistant is called model; contents are stripped.
GEMMA = (
    "{{ bos_token }}{% if messages[0]['role'] == 'system' %}{% set first = messages[0]['content'] + '\n\n' %}"
    "{% set rest = messages[1:] %}{% else %}{% set first = '' %}{% set rest = messages %}{% endif %}"
    "{% for m in rest %}{% if (m['role'] == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('roles must alternate') }}{% endif %}"
    "{{ '<start_of_turn>' + ('model' if m['role'] == 'assistant' else m['role']) + '\n' }}"
    "{{ (first if loop.first else '') + m['content'] | trim + '<end_of_turn>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<start_of_turn>model\n' }}{% endif %}"
)
ZEPHYR = (
    "{% for m in messages %}{{ '<|' + m['role'] + '|>\n' + m['content'] + eos_token + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% endif %}"
)
# Every template with the end of a turn and whether it takes a system turn.
FAMILIES = {
    "chatml": (CHATML, "<|im_end|>", True),
    "llama3": (LLAMA3, "<|eot_id|>", True),
    "gemma": (GEMMA, "<end_of_turn>", True),
    "mistral": (INST, "<|im_end|>", False),
    "zephyr": (ZEPHYR, "<|im_end|>", True),
}
# What reasoning models do: thoughts of earlier answers are dropped, those of the last one are kept.
DROPS_THOUGHTS = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' }}"
    "{% if m['role'] == 'assistant' and not loop.last %}{{ m['content'].split('</think>')[-1] }}"
    "{% else %}{{ m['content'] }}{% endif %}{{ '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
# The prompt of a generation opens a thought that a finished turn does not have.
OPENS_THOUGHT = CHATML.replace("assistant\n' }}", "assistant\n<think>' }}")
# No prompt, and contents that are not found in the turn.
SHOUTS = "{% for m in messages %}{{ m['role'] + ': ' + m['content'] | upper + eos_token }}{% endfor %}"


def tokenised(template: str, *conversations, loss: str = "responses", length: int = 900):
    tokenizer = make_tokenizer(template)
    return tokenizer, sequences.tokenize(chat_rows(*conversations), tokenizer, max_length=length, loss=loss)


@pytest.mark.parametrize("name", FAMILIES)
def test_every_answer_is_learned_with_its_end_and_nothing_else(name):
    template, end, system = FAMILIES[name]
    answers = ["First: a b", "Second ä€\n- with a list", "Third."]
    words = ["One?", answers[0], "Two, a?", answers[1], "Three?", answers[2]]
    row = turns("Be brief.", *words, first="system") if system else turns(*words)
    tokenizer, result = tokenised(template, row)
    runs = pieces(tokenizer, result)
    assert [text.lstrip(" ") for text, learned in runs if learned] == [answer + end for answer in answers]
    rendered = tokenizer.apply_chat_template(row, tokenize=True, return_dict=True)["input_ids"]
    assert result.dataset[0]["input_ids"] == rendered and (result.counts.used, result.counts.split) == (1, 0)
    masked = "".join(text for text, learned in runs if not learned)
    for asked in ("One?", "Two, a?", "Three?", *(["Be brief."] if system else [])):
        assert asked in masked


@pytest.mark.parametrize("name", FAMILIES)
def test_tool_results_and_empty_answers(name):
    template, end, _ = FAMILIES[name]
    tokenizer, result = tokenised(template, turns("One?", "", "Two?", "yes"))
    assert [text.lstrip(" ") for text, learned in pieces(tokenizer, result) if learned] == [end, "yes" + end]
    row = [*turns("One?", "Calling."), {"role": "tool", "content": "42"}, {"role": "assistant", "content": "It is 42."}]
    if name in ("gemma", "mistral"):
        with pytest.raises(DataError, match="user, assistant, tool, assistant"):
            tokenised(template, row)
        return
    tokenizer, result = tokenised(template, row)
    assert [text for text, learned in pieces(tokenizer, result) if learned] == ["Calling." + end, "It is 42." + end]


@pytest.mark.parametrize("name", FAMILIES)
def test_a_conversation_of_the_assistant_alone_is_left_out(name, tmp_path):
    alone = {"messages": [{"role": "assistant", "content": "Hello"}]}
    rows = load(write(tmp_path / "a.jsonl", alone, {"messages": turns("One?", "x")}))
    result = sequences.tokenize(rows, make_tokenizer(FAMILIES[name][0]), max_length=400, loss="responses")
    assert (result.counts.rows, result.counts.used, result.counts.dropped) == (2, 1, 1)


def test_thoughts_that_are_dropped_later_are_learned_where_they_are_seen():
    first, second = "<think>hm</think>four", "<think>well</think>six"
    row = turns("2 + 2?", first, "3 + 3?", second)
    tokenizer, result = tokenised(DROPS_THOUGHTS, row)
    assert (result.counts.rows, result.counts.split, result.counts.used) == (1, 1, 2)
    learned = [[text for text, learned in pieces(tokenizer, result, index) if learned] for index in (0, 1)]
    assert learned == [[first + "<|im_end|>"], [second + "<|im_end|>"]]
    # The second answer's context is the very one in which the model will give it.
    context = tokenizer.apply_chat_template(row[:3], tokenize=True, add_generation_prompt=True, return_dict=True)
    ids, labels = result.dataset[1]["input_ids"], result.dataset[1]["labels"]
    assert ids[: len(context["input_ids"])] == context["input_ids"] and "hm" not in tokenizer.decode(ids)
    assert all(label == -100 for label in labels[: len(context["input_ids"])])


@pytest.mark.parametrize("template", [OPENS_THOUGHT, SHOUTS])
def test_a_template_whose_answers_cannot_be_told_is_refused_and_can_be_learned_whole(template):
    with pytest.raises(DataError, match=r"does not continue its own prompt in turn 2 .* data\.chat_template"):
        tokenised(template, turns("One?", "x"))
    _, whole = tokenised(template, turns("One?", "x"), loss="all")
    assert whole.counts.share == 1.0


def test_the_date_in_a_template_is_always_the_same():
    dated = "{% if strftime_now is defined %}{{ strftime_now('%d %b %Y') }}{% endif %}" + CHATML
    tokenizer, result = tokenised(dated, turns("One?", "x"))
    assert tokenizer.decode(result.dataset[0]["input_ids"]).startswith("26 Jul 2024")


# Templates by name


@pytest.mark.parametrize("bos", [False, True])
@pytest.mark.parametrize("name", templates.BUILTIN)
def test_every_named_template_masks_and_ends_where_generation_stops(name, bos):
    tokenizer = make_tokenizer(None, bos=bos, eos="<|im_end|>")
    templates.apply(tokenizer, name)
    row = turns("Be brief.", "One?", "x y", "Two?", "z", first="system")
    result = sequences.tokenize(chat_rows(row), tokenizer, max_length=500, loss="responses")
    assert [text for text, learned in pieces(tokenizer, result) if learned] == ["x y<|im_end|>", "z<|im_end|>"]
    ids = result.dataset[0]["input_ids"]
    assert (ids[0] == tokenizer.bos_token_id) == bos and ids.count(tokenizer.bos_token_id) == bos
    asked = tokenizer.apply_chat_template(row[:2], tokenize=False, add_generation_prompt=True)
    assert tokenizer.decode(ids).startswith(asked + "x y")


def test_the_default_for_a_base_model_is_what_it_is_trained_with():
    tokenizer = make_tokenizer(None, bos=True)
    row = turns("One?", "x", "Two?", " y")
    before = ChatRenderer(tokenizer).sequences(row)
    note = templates.complete(tokenizer)
    assert "no chat template" in note and "data.chat_template" in note
    assert ChatRenderer(tokenizer).sequences(row) == before
    assert tokenizer.apply_chat_template(row, tokenize=True, return_dict=True)["input_ids"] == before[0][0]


def test_a_template_may_be_a_file(tmp_path):
    tokenizer = make_tokenizer(None)
    for encoding in ("utf-8", "utf-8-sig"):
        (tmp_path / "mine.jinja").write_text(ZEPHYR, encoding=encoding)
        templates.apply(tokenizer, str(tmp_path / "mine.jinja"))
        assert tokenizer.chat_template == ZEPHYR
    (tmp_path / "marked.jinja").write_text("{% for m in messages %}{%- generation -%}x{% endgeneration %}{% endfor %}")
    templates.apply(tokenizer, str(tmp_path / "marked.jinja"))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{% for m in messages %}", "line 1: Unexpected end of template"),
        ("hello", "it does not use `messages`"),
        ("version https://git-lfs.github.com/spec/v1\n", "is a pointer of Git LFS"),
        (b"\xff\xfe", "cannot be read"),
        (None, r"'.*t\.jinja' is neither a file .* nor one of plain, chatml"),
    ],
)
def test_wrong_template_files_are_told(tmp_path, content, message):
    path = tmp_path / "t.jinja"
    if content is not None:
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(DataError, match=message) as caught:
        templates.apply(make_tokenizer(), str(path))
    assert "\n" not in str(caught.value)


def test_a_mistyped_template_name_is_told():
    with pytest.raises(DataError, match="did you mean 'chatml'"):
        templates.apply(make_tokenizer(), "chatlm")


# Columns


def load(path: str, **settings):
    return splits.load_mix((DatasetSpec(source=path, **settings),), "train", holdout=1e-9, seed=0).rows


@pytest.mark.parametrize(
    ("raw", "columns"),
    [
        ({"question": "Why?", "answer": "Because."}, {"prompt": "question", "completion": "answer"}),
        ({"Q": "Why?", "output": "Because."}, {"instruction": "Q"}),
        ({"dialog": turns("Why?", "Because.")}, {"messages": "dialog"}),
        # Exchanged names, and a column that would be taken otherwise.
        ({"completion": "Why?", "prompt": "Because."}, {"prompt": "completion", "completion": "prompt"}),
        ({"question": "Why?", "answer": "Because.", "text": "x"}, {"prompt": "question", "completion": "answer"}),
        (
            {"question": "Why?", "answer": "Because.", "messages": [{"role": "user", "content": "x"}]},
            {"prompt": "question", "completion": "answer"},
        ),
    ],
)
def test_columns_may_have_other_names(tmp_path, raw, columns):
    rows = load(write(tmp_path / "a.jsonl", raw), columns=columns)
    assert rows[0]["messages"] == turns("Why?", "Because.")


@pytest.mark.parametrize(
    ("raw", "message"),
    [
        ({"question": "q", "answer": "a"}, r"add `columns: \{prompt: question, completion: answer\}`"),
        (
            {"instructions": "q", "outputs": "a"},
            r"format is alpaca: add `columns: \{instruction: instructions, output: ",
        ),
        ({"dialogue": []}, r"format is messages: add `columns: \{messages: dialogue\}`"),
        ({"prompt": "q", "x": "a"}, "format is prompt_completion, which also needs completion"),
        ({"Content": "q"}, r"format is text: add `columns: \{text: Content\}`"),
        ({"a": 1}, r"It has: a$"),
    ],
)
def test_unknown_columns_name_the_nearest_format(tmp_path, raw, message):
    with pytest.raises(DataError, match=message):
        load(write(tmp_path / "a.jsonl", raw))


def test_a_named_column_that_is_missing_is_told(tmp_path):
    path = write(tmp_path / "a.jsonl", {"question": "q", "answer": "a"})
    with pytest.raises(DataError, match=r"line 1: no column 'questoin' for prompt \(did you mean 'question'\?\)"):
        load(path, columns={"prompt": "questoin", "completion": "answer"})
