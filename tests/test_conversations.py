"""Conversations as people bring them: tool calls, thoughts, parts, other roles, answers that are not learned."""

from __future__ import annotations

import json

import datasets
import pytest
from test_data import CHATML, INST, make_tokenizer, pieces, turns, write

from uniattn_cli.data import sequences, splits
from uniattn_cli.data.chat import ChatRenderer
from uniattn_cli.data.rows import read_rows
from uniattn_cli.data.screen import Screen
from uniattn_cli.errors import DataError
from uniattn_cli.recipe.schema import DatasetSpec

TOOL = {"type": "function", "function": {"name": "look", "parameters": {}}}
CALL = {"type": "function", "function": {"name": "look", "arguments": {"window": 2}}}
ASKED = {"role": "user", "content": "weather?"}
CALLED = {"role": "assistant", "content": "", "tool_calls": [CALL]}
TOLD = {"role": "tool", "content": "rain"}
SAID = {"role": "assistant", "content": "It rains."}
# Shows everything that a message may hold.
FULL = (
    "{% if tools %}TOOLS {{ tools | tojson }}\n{% endif %}{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' }}"
    "{% if m.thinking %}<think>{{ m.thinking }}</think>{% endif %}{{ m.content }}"
    "{% for c in m.tool_calls or [] %}<call>{{ c.function.name }} {{ c.function.arguments | tojson }}</call>"
    "{% endfor %}"
    "{{ '<|im_end|>\n' }}{% endfor %}"
)
PROMPTED = FULL + "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"


def load(tmp_path, *raw, **settings):
    spec = DatasetSpec(source=write(tmp_path / "rows.jsonl", *raw), **settings)
    return splits.load_mix((spec,), "train", holdout=1e-9, seed=0).rows


def chat(tmp_path, *messages, **columns):
    return load(tmp_path, {"messages": list(messages), **columns})[0]["messages"]


def learned(tokenizer, rows, loss="responses") -> list[str]:
    result = sequences.tokenize(rows, tokenizer, max_length=900, loss=loss)
    return [text for row in range(len(result.dataset)) for text, kept in pieces(tokenizer, result, row) if kept]


@pytest.mark.parametrize(
    "call",
    [
        CALL,
        CALL["function"],
        {"function": {"name": "look", "arguments": '{"window": 2}'}},
        {"name": "look", "parameters": {"window": 2}},
    ],
)
def test_tool_calls_of_any_form_are_one_form(tmp_path, call):
    expected = [ASKED, CALLED, TOLD, SAID]
    for content in ({"content": None}, {"content": ""}, {}):
        assert chat(tmp_path, ASKED, {"role": "assistant", "tool_calls": [call], **content}, TOLD, SAID) == expected
    legacy = {"role": "assistant", "content": None, "function_call": call}
    assert chat(tmp_path, ASKED, legacy, {**TOLD, "role": "function"}, SAID) == expected
    talk = [("human", "weather?"), ("function_call", json.dumps(call)), ("observation", "rain"), ("gpt", "It rains.")]
    shared = {"conversations": [{"from": name, "value": text} for name, text in talk]}
    assert load(tmp_path, shared)[0]["messages"] == expected


@pytest.mark.parametrize(
    "call",
    [
        {"function": {"arguments": {}}},
        {"name": "f", "arguments": "no JSON"},
        {"name": "f", "arguments": "[" * 100_000},
        "f",
        [3],
    ],
)
def test_a_call_that_is_none_is_told(tmp_path, call):
    with pytest.raises(DataError, match="message 2 of 'messages' has a tool call"):
        chat(tmp_path, ASKED, {"role": "assistant", "tool_calls": call}, TOLD, SAID)


@pytest.mark.parametrize("template", [FULL, PROMPTED])
def test_calls_and_thoughts_are_learned_and_results_are_not(tmp_path, template):
    tokenizer = make_tokenizer(template)
    rows = load(tmp_path, {"messages": [ASKED, CALLED, TOLD, {**SAID, "reasoning_content": "wet"}], "tools": [TOOL]})
    call = '<call>look {"window": 2}</call><|im_end|>'
    assert learned(tokenizer, rows) == [call, "<think>wet</think>It rains.<|im_end|>"]
    assert (
        ChatRenderer(tokenizer).text(rows[0]["messages"]).startswith('TOOLS [{"type": "function", "function": {"name"')
    )


@pytest.mark.parametrize("name", ["reasoning_content", "thinking", "reasoning"])
def test_thoughts_reach_a_template_under_its_own_name(tmp_path, name):
    rows = load(tmp_path, {"messages": [ASKED, {**SAID, name: "wet"}]})
    assert learned(make_tokenizer(PROMPTED), rows) == ["<think>wet</think>It rains.<|im_end|>"]
    parts = [{"type": "thinking", "thinking": "wet"}, {"type": "text", "text": "It rains."}]
    rows = load(tmp_path, {"messages": [ASKED, {"role": "assistant", "content": parts}]})
    assert learned(make_tokenizer(PROMPTED), rows) == ["<think>wet</think>It rains.<|im_end|>"]


def test_what_a_template_does_not_show_is_known(tmp_path):
    row = chat(tmp_path, ASKED, CALLED, TOLD, {**SAID, "thinking": "wet"}, tools=json.dumps([TOOL["function"]]))
    assert row[0]["tools"] == [TOOL]
    assert ChatRenderer(make_tokenizer(FULL)).unseen(row) == []
    for template in (CHATML, None):
        assert ChatRenderer(make_tokenizer(template)).unseen(row) == ["tools", "tool_calls", "thinking"]


def test_turns_that_a_template_does_not_show_are_known(tmp_path):
    system = {"role": "system", "content": "Be brief."}
    row = chat(tmp_path, system, ASKED, CALLED, TOLD, SAID)
    for roles in (["system"], ["tool"], ["system", "tool"]):
        passed = FULL.replace("{% for m in messages %}", f"{{% for m in messages if m.role not in {roles} %}}")
        assert passed != FULL
        assert ChatRenderer(make_tokenizer(passed)).unseen(row) == [f"{role} turns" for role in roles]
    told: list[str] = []
    path = write(tmp_path / "rows.jsonl", *[{"messages": [system, ASKED, SAID]}] * 3)
    screen = Screen(tokenizer=make_tokenizer(passed), tell=told.append)
    assert len(list(read_rows(DatasetSpec(source=path), screen=screen))) == 3
    assert told == [f"{path}: system turns, which the chat template does not show, in 3 of 3 rows: not used"]


def test_thoughts_of_every_answer_count_as_shown_where_only_the_last_are(tmp_path):
    last = FULL.replace("{% if m.thinking %}", "{% if m.thinking and loop.last %}")
    row = chat(tmp_path, ASKED, {**SAID, "thinking": "wet"}, ASKED, SAID)
    assert ChatRenderer(make_tokenizer(last)).unseen(row) == []


def test_rows_of_a_table_have_no_fields_of_others(tmp_path):
    other = {"type": "function", "function": {"name": "go", "arguments": {"place": "home"}}}
    rows = [{"messages": [ASKED, {**CALLED, "tool_calls": [call]}, TOLD, SAID]} for call in (CALL, other)]
    datasets.Dataset.from_list(rows).to_parquet(tmp_path / "rows.parquet")
    found = splits.load_mix((DatasetSpec(source=str(tmp_path / "rows.parquet")),), "train", holdout=1e-9, seed=0).rows
    assert sorted(found["messages"], key=str) == sorted((row["messages"] for row in rows), key=str)


@pytest.mark.parametrize(
    ("role", "expected"),
    [
        ("developer", "system"),
        ("User", "user"),
        ("Human", "user"),
        ("ASSISTANT", "assistant"),
        ("model", "assistant"),
        ("function", "tool"),
        ("Observation", "tool"),
        ("ipython", "tool"),
    ],
)
def test_roles_of_others(tmp_path, role, expected):
    assert chat(tmp_path, ASKED, {"role": role, "content": "x"}, SAID)[1]["role"] == expected
    assert chat(tmp_path, ASKED, {"from": role, "value": "x", "role": None}, SAID)[1]["role"] == expected


def test_a_system_turn_may_say_nothing(tmp_path):
    system = {"role": "system", "content": ""}
    assert chat(tmp_path, system, ASKED, SAID) == [system, ASKED, SAID]


def test_a_table_of_text_holds_conversations_as_json(tmp_path):
    assert load(tmp_path, {"messages": json.dumps([ASKED, SAID])})[0]["messages"] == [ASKED, SAID]


@pytest.mark.parametrize("nothing", ["null", "[]", "{}", " ", "", None, [], {}])
def test_a_table_of_text_says_in_many_ways_that_there_are_no_tools(tmp_path, nothing):
    assert chat(tmp_path, ASKED, {**SAID, "tool_calls": nothing}, tools=nothing) == [ASKED, SAID]


def test_content_in_parts(tmp_path):
    parts = [{"type": "text", "text": "wea"}, {"type": "input_text", "text": "ther"}, "?"]
    assert chat(tmp_path, {"role": "user", "content": parts}, SAID) == [ASKED, SAID]


@pytest.mark.parametrize(
    ("message", "says"),
    [
        ({"content": [{"type": "text"}]}, "part of type 'text' without text"),
        ({"content": [{"type": "text", "text": None}]}, "part of type 'text' without text"),
        ({"content": [{"type": "text", "text": {"value": "x"}}]}, "part of type 'text' without text"),
        ({"content": [{"type": "image"}, {"type": "text", "text": "x"}]}, "part of type 'image'"),
        ({"content": [{"type": "image_url", "image_url": {"url": "x"}}]}, "part of type 'image_url'"),
        ({"content": [{"type": "refusal", "refusal": "no"}]}, "part of type 'refusal'"),
        ({"content": [None]}, "part of type 'NoneType'"),
        ({"content": []}, "has no text content"),
        ({"content": None}, "has no text content"),
        ({"content": 5}, "its content is int"),
        ({"content": {"text": "x"}}, "its content is dict"),
        ({"content": "x", "images": ["a.png"]}, "has images"),
        ({"role": ["user"], "content": "x"}, r"unknown role \['user'\]"),
        ({"role": "assistant", "content": " "}, "is an empty answer"),
    ],
)
def test_messages_that_cannot_be_used(tmp_path, message, says):
    with pytest.raises(DataError, match=f"line 1, message 2 of 'messages'.*{says}"):
        chat(tmp_path, ASKED, {"role": "user", **message}, SAID)


@pytest.mark.parametrize("mark", [{"weight": 0}, {"train": False}, {"loss": False}, {"training": False}])
@pytest.mark.parametrize("loss", ["responses", "all"])
def test_answers_that_are_not_to_be_learned(tmp_path, mark, loss):
    poor = {"role": "assistant", "content": "Who knows?", **mark}
    rows = load(tmp_path, {"messages": [ASKED, poor, {**ASKED, **mark}, {**SAID, "weight": 1}]})
    found = "".join(learned(make_tokenizer(CHATML), rows, loss))
    assert "It rains.<|im_end|>" in found and "Who knows" not in found
    assert ("weather?" in found) == (loss == "all")
    tokenizer = make_tokenizer(INST)
    assert "Who knows" not in "".join(learned(tokenizer, rows, loss))


def test_columns_beside_a_conversation(tmp_path):
    system = {"role": "system", "content": "Be brief."}
    pair = {"instruction": "weather?", "output": "It rains."}
    for raw in ({"messages": [ASKED, SAID]}, {"prompt": "weather?", "completion": "It rains."}, pair):
        for column in ("system", "system_prompt"):
            rows = load(tmp_path, {**raw, column: "Be brief.", "functions": [TOOL["function"]]})
            assert rows[0]["messages"] == [{**system, "tools": [TOOL]}, ASKED, SAID]
    assert chat(tmp_path, system, ASKED, SAID, system="Be long.") == [system, ASKED, SAID]
    assert chat(tmp_path, {**ASKED, "tools": [TOOL]}, SAID) == [{**ASKED, "tools": [TOOL]}, SAID]
    rows = load(tmp_path, {**pair, "history": [["One?", "1"], ["Two?", "2"]]})
    assert rows[0]["messages"] == turns("One?", "1", "Two?", "2", "weather?", "It rains.")


@pytest.mark.parametrize(
    ("raw", "says"),
    [
        ({"messages": None}, "line 1: column 'messages' is null"),
        ({"messages": "no JSON"}, "column 'messages' must be a list"),
        ({"conversations": []}, "column 'conversations' must be a list"),
        ({"prompt": "x", "completion": "  "}, "column 'completion' is empty"),
        ({"instruction": "x", "output": ""}, "column 'output' is empty"),
        ({"instruction": "x", "output": "y", "history": 3}, "column 'history' must be a list of pairs"),
        ({"messages": [ASKED, SAID], "tools": "look"}, "tools must be a list of definitions"),
        ({"messages": [ASKED, SAID], "system": ["x"]}, "column 'system' is list, not text"),
    ],
)
def test_rows_that_cannot_be_used(tmp_path, raw, says):
    with pytest.raises(DataError, match=says):
        load(tmp_path, raw)
