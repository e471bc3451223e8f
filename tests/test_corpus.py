"""The built-in corpus: quality, disjoint parts, and the same in every process and under every Python."""

from __future__ import annotations

import glob
import os
import subprocess
import sys
import sysconfig
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import pytest

from uniattn_cli.data import builtin, stdlib_docs
from uniattn_cli.errors import DataError, DataWarning

ROOT = Path(__file__).resolve().parent.parent
STDLIB = Path(sysconfig.get_paths()["stdlib"])


@pytest.fixture
def stdlib(tmp_path):
    """A made-up standard library: a function that writes a module and returns all entries by name."""

    def read(**modules: str) -> dict[str, stdlib_docs.Entry]:
        for name, source in modules.items():
            path = tmp_path / name.replace("__", "/")
            path.parent.mkdir(parents=True, exist_ok=True)
            path.with_suffix(".py").write_text(source, encoding="utf-8")
        return {entry.name: entry for entry in stdlib_docs.distinct(stdlib_docs.documented(tmp_path))}

    return read


@pytest.fixture
def elsewhere(tmp_path, monkeypatch):
    """An empty folder that this Python takes for its standard library."""
    monkeypatch.setattr(sysconfig, "get_paths", lambda: {"stdlib": str(tmp_path)})
    stdlib_docs.entries.cache_clear()
    yield tmp_path
    stdlib_docs.entries.cache_clear()


def function(name: str, doc: str, signature: str = "()") -> str:
    return f"def {name}{signature}:\n    '''{doc}'''\n"


LONG = "Returns the thing that was asked for, in a new list."


def test_public_names_only(stdlib):
    found = stdlib(
        posixpath=function("join", LONG, "(a, *p)"),
        _private=function("hidden", "Not to be seen by anybody who reads this."),
        test__support=function("helper", "Not to be seen by anybody at all, please."),
        broken="def (",
        shapes='"""Shapes."""\nclass Circle:\n    """A round thing that has a centre and a radius."""\n'
        "    def area(self, unit='m'):\n        '''The area of the circle in square units.'''\n"
        "    def _secret(self):\n        '''Not to be seen by anybody who reads this text.'''\n"
        "    @staticmethod\n    def unit(a, /, b: int = 3, *, c):\n"
        "        '''A circle around the origin of radius one.'''\n",
    )
    assert sorted(found) == ["os.path.join", "shapes", "shapes.Circle", "shapes.Circle.area", "shapes.Circle.unit"]
    assert found["os.path.join"].signature == "(a, *p)"
    assert found["os.path.join"].arguments == (("a", None), ("*p", ""))
    assert found["shapes.Circle.area"].signature == "(unit='m')"
    assert found["shapes.Circle.unit"].signature == "(a, /, b=3, *, c)"
    assert found["shapes.Circle.unit"].arguments == (("a", None), ("b", "3"), ("c", None))
    kinds = {name: entry.kind for name, entry in found.items()}
    assert kinds == {
        "os.path.join": "function",
        "shapes": "module",
        "shapes.Circle": "class",
        "shapes.Circle.area": "method",
        "shapes.Circle.unit": "method",
    }


def test_a_docstring_belongs_to_one_name(stdlib):
    found = stdlib(one=function("f", LONG), two=function("g", LONG.replace(" that", "\n    that")))
    assert list(found) == ["one.f"]


def test_names_that_share_a_paragraph_are_in_one_part(stdlib):
    shared = "A long explanation that two related functions have in common. " * 3
    source = "".join(function(f"f{i}", f"Does thing number {i} of many.\n\n    {shared}") for i in range(30))
    own = "".join(function(f"g{i}", f"Does thing number {i} of many others.\n\n    {shared[:90]}") for i in range(30))
    found = stdlib(m=source, n=own)
    assert len({found[f"m.f{i}"].part for i in range(30)}) == 1
    assert {found[f"n.g{i}"].part for i in range(30)} == {"train", "heldout"}


@pytest.mark.parametrize(
    ("doc", "answer"),
    [
        (LONG, LONG),
        (LONG[:-1], LONG),
        ("Short.", ""),
        ("returns the thing that was asked for, as a list.", ""),
        (f"f(a, b) -> list\n\n    {LONG}", LONG),
        (
            "Calls :meth:`~x.y` with\n    ``self`` and\n    whatever else there is.",
            "Calls `x.y` with `self` and whatever else there is.",
        ),
        (f"{LONG}\n\n    More of it.", f"{LONG}\n\nMore of it."),
        (f"{LONG}\n\n    >>> f()\n    3\n\n    More.", LONG),
        (f"{LONG}\n\n    Arguments:\n    a -- the a", LONG),
        (f"{LONG}\n\n    For example:\n\n        f()", LONG),
    ],
)
def test_answers_are_the_leading_prose(stdlib, doc, answer):
    assert stdlib(m=function("f", doc))["m.f"].answer == answer


def test_what_releases_say_differently_is_left_out(elsewhere):
    source = (STDLIB / "heapq.py").read_text(encoding="utf-8")
    changed = source.replace("Merge multiple sorted inputs", "Merge several sorted inputs")
    (elsewhere / "heapq.py").write_text(changed + function("added", LONG), encoding="utf-8")
    count = sum(map(len, stdlib_docs.shared().docstrings.values()))
    left = {f"heapq{rest}" for rest in stdlib_docs.shared().docstrings["heapq"]} - {"heapq.merge"}
    message = rf"lacks {count - len(left)} of the {count} docstrings of the built-in corpus: scores on it differ"
    with pytest.warns(DataWarning, match=message):
        assert {entry.name for entry in stdlib_docs.entries()} == left


def test_paragraphs_that_this_python_lacks_are_told(monkeypatch):
    paragraphs = [f"Paragraph {i} of the language reference." for i in range(3)]
    topics = SimpleNamespace(topics={"a": "\n\n".join(paragraphs[:2]) + "  \n\nAnother."})
    listed = stdlib_docs.Shared({}, {"b": [stdlib_docs.short_hash(paragraph) for paragraph in paragraphs]})
    monkeypatch.setitem(sys.modules, "pydoc_data.topics", topics)
    monkeypatch.setattr(builtin, "shared", lambda: listed)
    monkeypatch.setattr(builtin, "entries", tuple)
    with pytest.warns(DataWarning, match="lacks 1 of the 3 paragraphs"):
        assert [page for part in builtin.PARTS for page in builtin.text(part)] == ["\n\n".join(paragraphs[:2])]


def test_missing_sources_name_the_next_step(elsewhere):
    with pytest.raises(DataError, match=r"has none; set data\.train"):
        builtin.instructions("train")


def test_missing_topics_name_the_next_step(monkeypatch):
    monkeypatch.setitem(sys.modules, "pydoc_data.topics", None)
    with pytest.raises(DataError, match=r"pydoc_data.*local files"):
        builtin.text("heldout")


def test_unknown_names_are_told():
    with pytest.raises(DataError, match=r"no part 'held-out' \(did you mean 'heldout'"):
        builtin.text("held-out")
    with pytest.raises(DataError, match=r"no task 'x'; known: name_the_function, .*, count_the_coins"):
        builtin.task_items("x")


def paragraphs(part: str) -> set[str]:
    blocks = (" ".join(block.split()) for page in builtin.text(part) for block in page.split("\n\n"))
    return {block for block in blocks if len(block) >= 200}


def test_parts_are_disjoint_and_large():
    blocks = {part: paragraphs(part) for part in builtin.PARTS}
    rows = {part: builtin.instructions(part) for part in builtin.PARTS}
    docs = {part: {" ".join(e.doc.split()) for e in stdlib_docs.entries() if e.part == part} for part in builtin.PARTS}
    assert sum(map(len, docs.values())) == len(set.union(*docs.values()))
    for part, other in (("calibration", "heldout"), ("train", "heldout"), ("calibration", "train")):
        shared = blocks[part] & blocks[other]
        assert not shared, sorted(shared)[:3]
        for position in (0, 1):
            both = [{row["messages"][position]["content"] for row in rows[name]} for name in (part, other)]
            assert not both[0] & both[1]
    characters = {part: sum(map(len, builtin.text(part))) for part in builtin.PARTS}
    # The ready recipes measure perplexity on 65,536 held-out tokens.
    assert characters["calibration"] > 240_000 and characters["heldout"] > 4.2 * 65_536
    assert len(rows["train"]) > 2000 and len(rows["heldout"]) > 1000


def test_instructions_are_clean():
    rows = builtin.instructions("train")
    answers = [row["messages"][1]["content"] for row in rows]
    assert len(set(answers)) == len(answers)
    for row in rows:
        assert [message["role"] for message in row["messages"]] == ["user", "assistant"]
        question, answer = (message["content"] for message in row["messages"])
        assert len(answer) >= 20 and answer == answer.strip() and ">>>" not in answer and "  " not in question
        assert "{" not in question.split("`")[0]


@pytest.mark.parametrize("task", builtin.TASKS)
def test_choices_are_fair(task):
    items = builtin.multiple_choice(task)
    assert len(items) >= 300
    assert len({item["id"] for item in items}) == len(items)
    positions = Counter(item["gold"] for item in items)
    assert max(positions.values()) - min(positions.values()) <= 1 and set(positions) == {0, 1, 2, 3}
    known = {entry.name: entry for entry in stdlib_docs.entries()}
    heldout = {" ".join(e.answer.split()) for e in known.values() if e.part == "heldout"}
    for item in items:
        assert known[item["id"]].part == "heldout"
        assert item["query"].endswith("Answer:") and len(set(item["choices"])) == 4
        assert all(choice == choice.strip() and choice for choice in item["choices"])
        name = item["id"].rpartition(".")[2].lower()
        described = item["query"] if task == "name_the_function" else item["choices"][item["gold"]]
        assert name not in described.lower().removeprefix("question: which python function does this?")
        if task == "describe_the_function":
            assert all(any(answer.startswith(choice) for answer in heldout) for choice in item["choices"])


def test_questions_have_the_answers_that_they_ask_for():
    shape, items = builtin.task_items("count_the_coins")
    assert shape == "generate" and len({item["question"] for item in items}) == len(items) == builtin.QUESTIONS
    for item in items:
        told, _, asked = item["question"].partition(". ")
        coins = {part.split()[0]: int(part.split()[2]) for part in told.split(", ")}
        wanted = [count for owner, count in coins.items() if owner in asked]
        assert len(coins) == 3 and len(wanted) == (2 if asked.endswith("together?") else 1)
        assert item["target"] == item["answer"] == str(sum(wanted)) and sum(wanted) < 100
    assert sum("together" in item["question"] for item in items) == len(items) / 2


# Changes with `shared_docs.json`, and wherever the corpus is made differently: then all scores on it change.
CORPUS = "ce41c22da11a937c"
HASHED = """
import hashlib, json
from uniattn_cli.data import builtin
everything = [[builtin.text(part), builtin.instructions(part)] for part in builtin.PARTS]
everything += [builtin.multiple_choice(task) for task in builtin.TASKS]
print(hashlib.sha256(json.dumps(everything).encode()).hexdigest()[:16])
"""
INSTALLED = [
    python
    for pattern in ("/usr/bin", "/usr/local/bin", "~/.pyenv/versions/*/bin", "~/.local/share/uv/python/*/bin")
    for minor in range(10, 15)
    for python in glob.glob(f"{os.path.expanduser(pattern)}/python3.{minor}")
]


def hashed(python: str) -> str:
    environment = {**os.environ, "PYTHONHASHSEED": "12345", "PYTHONPATH": str(ROOT)}
    done = subprocess.run([python, "-c", HASHED], env=environment, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, ""), done.stderr
    return done.stdout.strip()


def test_the_same_everywhere():
    assert hashed(sys.executable) == CORPUS, "scripts/share_docs.py makes shared_docs.json"


@pytest.mark.slow
@pytest.mark.parametrize("python", INSTALLED)
def test_the_same_under_every_python(python):
    assert hashed(python) == CORPUS
