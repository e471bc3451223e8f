"""Rows that cannot be used: left out, counted and told by every reader, refused where they are too many."""

from __future__ import annotations

import io
import json
import shutil
from dataclasses import replace

import datasets
import pytest
from rich.console import Console
from test_data import CHATML, INST, make_tokenizer, turns, write

import uniattn_cli
from uniattn_cli.cli.console import RichProgress
from uniattn_cli.commands.view_data import view_data
from uniattn_cli.data import rows, splits, windows
from uniattn_cli.data.heldout import response_rows, text_rows
from uniattn_cli.data.items import load_items
from uniattn_cli.data.screen import Screen
from uniattn_cli.errors import DataError
from uniattn_cli.options import Silent
from uniattn_cli.recipe.schema import DatasetSpec, DataSpec, Recipe, TaskSpec

CHAT = [{"messages": turns(f"What comes after {number}?", f"It is {number + 1}.")} for number in range(200)]
CALL = {"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": {}}}]}


def mixed(places: dict[int, object], good=CHAT) -> list:
    """Good rows with others at these places, counted from one."""
    left = iter(good)
    return [places[number] if number in places else next(left) for number in range(1, len(good) + len(places) + 1)]


def read(path: str, tokenizer=None, **settings) -> tuple[list[dict], list[str]]:
    told: list[str] = []
    screen = Screen(DataSpec(**settings), tokenizer, told.append)
    return list(rows.read_rows(DatasetSpec(source=path), screen=screen)), told


@pytest.mark.parametrize(
    "bad",
    [
        {"messages": None},
        {"text": "a row of another format"},
        {"messages": turns("q", "half a face \ud83d")},
        {"messages": [{"role": "system", "content": "\ude00"}, *turns("q", "a")]},
        {"messages": turns("q", "a"), "images": ["boat.png"]},
        {"messages": [turns("q")[0], {**CALL, "tool_calls": [{"name": "f", "arguments": '{"x": "\\ud83d"}'}]}]},
        [1],
        None,
    ],
)
def test_a_bad_row_is_left_out_and_named(tmp_path, bad):
    path = write(tmp_path / "a.jsonl", *mixed({57: bad}))
    found, [line] = read(path)
    assert [row["messages"] for row in found] == [row["messages"] for row in CHAT]
    assert line.startswith(f"{path}: 1 of 201 rows cannot be used and is left out: {path}, line 57")
    assert "\n" not in line


def test_broken_rows_of_every_type_of_file(tmp_path):
    table = [{"prompt": f"{number}?", "completion": f"it is {number}"} for number in range(300)]
    frame = datasets.Dataset.from_list([*table[:41], {"prompt": "x", "completion": None}, *table[41:]])
    frame.to_parquet(tmp_path / "a.parquet")
    (tmp_path / "a.json").write_text(json.dumps([*table[:41], 3, *table[41:]]))
    lines = [json.dumps(row) for row in table]
    (tmp_path / "a.jsonl").write_text("\n".join([*lines[:41], '{"prompt": "cut o', *lines[41:]]))
    cells = [f"{row['prompt']},{row['completion']}" for row in table]
    (tmp_path / "a.csv").write_text("\n".join(["prompt,completion", *cells[:41], "x", *cells[41:]]))
    for name, place in (("a.parquet", "row"), ("a.json", "row"), ("a.jsonl", "line"), ("a.csv", "row")):
        found, [line] = read(str(tmp_path / name))
        assert len(found) == 300
        assert f"1 of 301 rows cannot be used and is left out: {tmp_path / name}, {place} 42" in line


def test_the_first_three_are_named(tmp_path):
    path = write(tmp_path / "a.jsonl", *mixed({place: {"messages": []} for place in (5, 10, 15, 20)}))
    _, [line] = read(path, max_bad_rows=0.02)
    assert "4 of 204 rows cannot be used and are left out" in line
    assert [f"line {number}:" in line for number in (5, 10, 15, 20)] == [True, True, True, False]


def test_too_many_bad_rows_are_refused(tmp_path):
    path = write(tmp_path / "a.jsonl", *mixed({2: {"messages": None}, 4: {"messages": None}}, CHAT[:98]))
    with pytest.raises(DataError) as caught:
        read(path)
    assert str(caught.value) == (
        f"{path}: 2 of 100 rows cannot be used (2.0%, data.max_bad_rows allows 1.0%); "
        f"the first: {path}, line 2: column 'messages' is null"
    )
    found, _ = read(path, max_bad_rows=0.02)
    assert len(found) == 98
    with pytest.raises(DataError, match="1 of 1 rows cannot be used"):
        read(write(tmp_path / "b.jsonl", {"messages": None}), max_bad_rows=1.0)


def test_what_the_template_refuses_is_left_out(tmp_path):
    system = [{"role": "system", "content": "Be brief."}, *turns("q", "a")]
    path = write(tmp_path / "a.jsonl", *mixed({9: {"messages": system}}))
    found, [line] = read(path, make_tokenizer(INST))
    assert len(found) == 200 and "line 9: the chat template rejects a conversation with the roles system" in line
    assert read(path, make_tokenizer(CHATML))[1] == []
    path = write(tmp_path / "b.jsonl", *mixed({9: {"messages": [turns("q")[0], CALL, *turns("r", "a")]}}))
    for template in (CHATML, None):
        _, [line] = read(path, make_tokenizer(template))
        assert "line 9: the chat template does not show its tool calls" in line


@pytest.mark.parametrize("expression", ["1 / 0", "[].index(1)", "range(10 ** 9)", "nothing.at.all", "none + 1"])
def test_what_an_expression_in_a_template_raises_is_no_traceback(expression, tmp_path):
    path = write(tmp_path / "a.jsonl", *mixed({9: {"messages": turns("odd", "a", "b", "c")}}))
    odd = CHATML + "{% if messages[2] %}{{ " + expression + " }}{% endif %}"
    found, [line] = read(path, make_tokenizer(odd))
    assert len(found) == 200 and "line 9: the chat template rejects a conversation with the roles user" in line


@pytest.mark.parametrize("first", [{}, {"version": 1}, {"text": "of another format"}, "[", "[" * 100_000])
def test_the_first_row_may_be_bad_like_any_other(first, tmp_path):
    path = tmp_path / "a.jsonl"
    lines = [first if isinstance(first, str) else json.dumps(first), *map(json.dumps, CHAT)]
    path.write_text("\n".join(lines) + "\n")
    found, [line] = read(str(path))
    assert len(found) == 200 and f"1 of 201 rows cannot be used and is left out: {path}, line 1" in line


def test_some_first_rows_may_be_bad_like_any_others(tmp_path):
    good = [{"prompt": f"What comes after {number}?", "completion": str(number + 1)} for number in range(2000)]
    found, [line] = read(write(tmp_path / "a.jsonl", *[{"version": 1}] * 15, *good))
    assert len(found) == 2000 and "15 of 2,015 rows cannot be used and are left out" in line


def test_rows_none_of_which_has_known_columns_are_refused_with_the_setting_as_yaml_reads_it(tmp_path):
    path = tmp_path / "a.csv"
    path.write_text("prompt, completion\nq,a\n")
    with pytest.raises(DataError, match=r"add `columns: \{completion: \" completion\"\}` to the data set"):
        read(str(path))


def test_a_column_that_is_there_twice_is_refused(tmp_path):
    path = tmp_path / "a.csv"
    path.write_text("prompt,completion,completion\nq,a,b\n")
    with pytest.raises(DataError, match=rf"^{path} has more than one column 'completion'; rename the others$"):
        read(str(path))


def test_a_file_of_json_that_nests_too_deep_is_one_line(tmp_path):
    path = tmp_path / "a.json"
    path.write_text("[" * 100_000)
    with pytest.raises(DataError, match="is not JSON"):
        read(str(path))


def test_names_with_half_a_character_can_be_told(tmp_path):
    half = '"half \\ud83d"'
    odd = [f'{{"messages": [{{"role": "user", "content": "q", {half}: 1}}], {half}: 2}}', f"{{{half}: 3}}"]
    path = tmp_path / "a.jsonl"
    path.write_text("\n".join([*map(json.dumps, CHAT), *odd]) + "\n")
    told: list[str] = []
    spec = DatasetSpec(source=str(path))
    assert len(splits.load_mix((spec,), "train", holdout=1e-9, seed=0, screen=Screen(tell=told.append)).rows) == 201
    assert "line 202: no column 'messages' (it has: half ?)" in told[0]
    assert "column half ? in 1 of 202 rows; half ? of messages in 1 of 202 rows: not used" in told[1]


def test_what_is_not_used_is_named_once(tmp_path):
    thought = [turns("q")[0], {"role": "assistant", "content": "a", "thinking": "b", "weight": 0.5, "stars": 5}]
    path = write(tmp_path / "a.jsonl", {"messages": thought, "stage": 3, "id": 4}, *CHAT)
    told: list[str] = []
    screen = Screen(tokenizer=make_tokenizer(CHATML), tell=told.append)
    for _ in range(2):
        assert len(list(rows.read_rows(DatasetSpec(source=path), screen=screen))) == 201
    [line] = told
    assert line.startswith(f"{path}: ") and line.endswith(": not used")
    for name in (
        "thinking, which the chat template does not show,",
        "weight of messages",
        "stars of messages",
        "column stage",
    ):
        assert f"{name} in 1 of 201 rows" in line
    assert "column id" not in line


def test_of_two_conversations_the_one_that_is_not_used_is_named(tmp_path):
    row = {
        "messages": turns("q", "a"),
        "conversations": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "b"}],
    }
    path = write(tmp_path / "a.jsonl", row, {**row, "conversations": []}, {**row, "messages": []})
    found, told = read(path)
    assert [row["messages"][1]["content"] for row in found] == ["a", "a", "b"]
    assert told == [f"{path}: column conversations in 1 of 3 rows: not used"]


def test_a_reader_that_has_enough_tells_what_it_left_out(tmp_path):
    path = write(tmp_path / "a.jsonl", *mixed({3: {"text": None}}, [{"text": f"text number {n}"} for n in range(300)]))
    told: list[str] = []
    data = DataSpec(text=(DatasetSpec(source=path),))
    tokenizer = make_tokenizer()
    windows.heldout_windows(data, tokenizer, tokens=64, length=32, screen=Screen(data, tokenizer, told.append))
    [line] = told
    assert f"{path}, line 3: column 'text' is null" in line and " of 302 rows" not in line


def test_every_reader_leaves_out_the_same_rows(tmp_path):
    tokenizer = make_tokenizer(INST)
    system = {"messages": [{"role": "system", "content": "x"}, *turns("q", "a")]}
    path = write(tmp_path / "a.jsonl", *mixed({3: {"messages": None}, 7: system}))
    text = write(tmp_path / "t.jsonl", *mixed({3: {"text": 3}}, [{"text": f"text number {n}"} for n in range(200)]))
    recipe = Recipe.from_tree(
        {
            "model": {"name": "m"},
            "data": {"train": [path], "text": [text], "calibration": None, "holdout": 0.2},
            "evaluation": {"tokens": 64, "length": 32},
        }
    )
    data = recipe.data
    named = replace(data, calibration=data.train)
    specs = {"holdout": 0.2, "seed": 0}
    few = {"tokens": 64, "length": 32, "seed": 0}
    readers = {
        "train": lambda screen: splits.load_mix(data.train, "train", screen=screen, **specs).rows,
        "heldout": lambda screen: response_rows(recipe, tokenizer, screen=screen),
        "mixed": lambda screen: windows.calibration_windows(data, tokenizer, screen=screen, **few),
        "named": lambda screen: windows.calibration_windows(named, tokenizer, screen=screen, **few),
    }
    lines = set()
    for read_all in readers.values():
        told: list[str] = []
        read_all(Screen(data, tokenizer, told.append))
        lines.update(told)
    [line] = lines
    assert "2 of 202 rows" in line and "line 3:" in line and "line 7:" in line
    told = []
    text_rows(recipe, tokenizer, Screen(data, tokenizer, told.append))
    assert len(told) == 1 and f"{text}, line 3" in told[0]


class Recorder(Silent):
    def __init__(self):
        self.told: list[str] = []

    def warn(self, text: str) -> None:
        self.told.append(text)


def test_every_command_says_what_it_left_out(tiny_runs, tmp_path, monkeypatch):
    run = shutil.copytree(tiny_runs / "finished", tmp_path / "run")
    monkeypatch.chdir(run)
    with (run / "rows.jsonl").open("a") as file:
        file.write('{"prompt": "x", "completion": null}\n')
    few = "train.stages=[{trains: compensation, steps: 1}]"
    commands = {
        "analyze": lambda **shared: uniattn_cli.analyze(**shared),
        "convert": lambda **shared: uniattn_cli.convert(**shared, groups="every:3"),
        "train": lambda **shared: uniattn_cli.train(**shared, overrides=[few]),
        "evaluate": lambda **shared: uniattn_cli.evaluate(**shared),
        "synthesize": lambda **shared: uniattn_cli.synthesize(**shared, overrides=["synthesis.tokens=100"]),
    }
    for name, command in commands.items():
        recorder = Recorder()
        result = command(options=uniattn_cli.RunOptions("cpu", force=True, progress=recorder))
        [line] = {line for line in [*recorder.told, *result.notes] if "cannot be used and is left out" in line}
        assert "1 of 201 rows" in line and "rows.jsonl, line 201" in line, name


def test_a_warning_is_on_the_screen_once():
    file = io.StringIO()
    console = Console(file=file, width=80)
    progress = RichProgress(console)
    for text in ("one", "two", "one"):
        progress.warn(text)
    assert file.getvalue() == "warning: one\nwarning: two\n"


def test_items_of_an_evaluation_are_refused_not_left_out(tmp_path):
    item = {"query": "one and one is", "choices": ["two", "three"], "gold": 0}
    path = write(tmp_path / "a.jsonl", *[item] * 200, {**item, "query": "one \ud83d and"})
    with pytest.raises(DataError, match=r"a\.jsonl, line 201 has half a surrogate pair"):
        load_items(TaskSpec(source=path))


def test_data_is_shown_without_a_recipe(tiny_runs, tmp_path, monkeypatch, uniattn):
    monkeypatch.chdir(tmp_path)
    write(tmp_path / "rows.jsonl", *mixed({57: {"messages": None}}))
    view = view_data(model=str(tiny_runs / "model"), train=["rows.jsonl"], samples=2)
    assert view.shares[0].source == "rows.jsonl" and len(view.samples) == 2
    assert any("1 of 201 rows cannot be used and is left out: rows.jsonl, line 57" in note for note in view.notes)
    done = uniattn("data", "--model", tiny_runs / "model", "--train", "rows.jsonl", "--samples", 1)
    assert done.returncode == 0 and "rows.jsonl, line 57: column 'messages' is null" in done.stdout
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "mine.yaml").write_text(
        "model: {name: no/such}\ndata: {train: [none.jsonl], holdout: 0.5}\n"
    )
    other = view_data(recipe="elsewhere/mine.yaml", model=str(tiny_runs / "model"), train=["rows.jsonl"], samples=0)
    assert view.shares[0].rows > 150 > other.shares[0].rows
