"""The built-in corpus: text, instructions and test items made on the spot from what every Python installation carries.

Text comes from the language reference in `pydoc_data.topics` and from the docstrings of the standard library's public
modules, classes and functions (`stdlib_docs`), as far as the supported Python releases say it in the same words: all of
them give the same corpus. Every piece belongs to one of three disjoint parts, decided by a hash of its text. The
reference and long docstrings go to calibration, shorter ones make good answers and go to training, and about a third of
all is held out.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Iterator
from typing import Any

from uniattn_cli.data.stdlib_docs import (
    Entry,
    digest,
    entries,
    number,
    paragraphs,
    part_of,
    shared,
    short_hash,
    tell_missing,
)
from uniattn_cli.errors import DataError, suggest

PARTS = ("calibration", "train", "heldout")
PAGE = 4000  # characters of one document, about; keeps any sample of documents mixed


def text(part: str) -> list[str]:
    """Documents of plain text, each up to about `PAGE` characters, in an order fixed by their hashes.

    Args:
        part: calibration, train or heldout; the parts share no docstring and no section of the reference.

    Raises:
        DataError: this installation has no standard-library sources or no `pydoc_data`.
    """
    _check(part, PARTS, "part")
    documents = [page for page in _topic_pages() if part_of(page, long=True) == part]
    pages: dict[str, list[str]] = {}
    for entry in entries():
        if entry.part == part:
            pages.setdefault(entry.module, []).append(f"{entry.name}{entry.signature}\n\n{entry.doc}")
    for blocks in pages.values():
        documents.extend(_pages(blocks))
    return sorted(documents, key=digest)


def _check(value: str, known: Iterable[str], what: str) -> None:
    if value not in known:
        raise DataError(
            f"the built-in corpus has no {what} '{value}'{suggest(value, known)}; known: {', '.join(known)}"
        )


# The language reference


def _topic_pages() -> list[str]:
    """The language reference in pages, every paragraph at most once (topics repeat one another)."""
    try:
        from pydoc_data.topics import topics
    except ImportError:
        raise DataError(
            "the built-in corpus needs the module pydoc_data, which this Python lacks (some systems package it "
            "separately); set data.train, data.calibration and data.text to local files"
        ) from None
    known = {short_hash(paragraph): paragraph for text in topics.values() for paragraph in paragraphs(text)}
    wanted = shared().topics.values()
    missing = [key for keys in wanted for key in keys if key not in known]
    tell_missing(len(missing), sum(map(len, wanted)), "paragraphs")
    return [page for keys in wanted for page in _pages(known[key] for key in keys if key in known)]


def _pages(blocks: Iterable[str]) -> Iterator[str]:
    """Joins blocks, in order, into documents of about `PAGE` characters."""
    page: list[str] = []
    for block in blocks:
        if page and sum(map(len, page)) + len(block) > PAGE:
            yield "\n\n".join(page)
            page = []
        page.append(block)
    if page:
        yield "\n\n".join(page)


# Instructions

_DESCRIBE = (
    "What does `{name}` do?",
    "What is `{name}` for?",
    "Explain what the {kind} `{name}` of Python's standard library does.",
    "I came across `{name}` in Python code. What does it do?",
    "Describe `{name}` in a few words.",
)
_ARGUMENTS = (
    "Which arguments does `{name}` take?",
    "What can I pass to the {kind} `{name}`?",
    "How do I call `{name}`?",
)
_NAME = (
    "Which {kind} of Python's `{module}` module does this? {summary}",
    "I am looking for a {kind} in `{module}`. What it should do: {summary}",
)


def instructions(part: str) -> list[dict]:
    """Questions about the standard library with their answers, as single-turn conversations.

    Asks what a name does, which arguments it takes, or which name fits a description. No two rows of any parts have
    the same answer.

    Args:
        part: calibration, train or heldout; calibration has few rows, being mostly text.

    Returns:
        Rows `{"messages": [{"role": "user", …}, {"role": "assistant", …}]}` in an order fixed by their hashes.

    Raises:
        DataError: this installation has no standard-library sources.
    """
    _check(part, PARTS, "part")
    once = _summaries_used_once()
    pairs = [pair for entry in entries() if entry.part == part for pair in _questions(entry, once)]
    rows = [
        {"messages": [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]}
        for question, answer in pairs
    ]
    return sorted(rows, key=lambda row: digest(row["messages"][0]["content"]))


def _summaries_used_once() -> set[str]:
    """Descriptions that fit one name only, of all parts."""
    seen = Counter(_summary(entry) for entry in entries() if entry.answer)
    return {summary for summary, count in seen.items() if count == 1}


def _questions(entry: Entry, once: set[str]) -> Iterator[tuple[str, str]]:
    """Question and answer pairs about one name; `once` holds the descriptions that name it."""

    def ask(templates: tuple[str, ...]) -> str:
        template = templates[number(entry.name + templates[0], len(templates))]
        return template.format(name=entry.name, kind=entry.kind, module=entry.module, summary=_summary(entry))

    if entry.answer:
        yield ask(_DESCRIBE), entry.answer
    if entry.arguments is not None and len(entry.arguments) > 1:
        yield ask(_ARGUMENTS), _describe_arguments(entry)
    if entry.kind != "class" and number(entry.name, 3) == 0 and _summary(entry) in once and _describes(entry):
        yield ask(_NAME), f"That is `{entry.name}`; call it as `{_short(entry)}{entry.signature}`."


def _describe_arguments(entry: Entry) -> str:
    arguments = entry.arguments or ()
    required = [f"`{name}`" for name, default in arguments if default is None]
    optional = [
        f"`{name}`" + (f" (default `{default}`)" if default else "")
        for name, default in arguments
        if default is not None
    ]
    answer = f"`{entry.name}{entry.signature}`."
    if required:
        answer += f" Required: {', '.join(required)}."
    if optional:
        answer += f" Optional: {', '.join(optional)}."
    return answer


def _short(entry: Entry) -> str:
    """The last part of the name: as a method is called on its object."""
    return entry.name.rpartition(".")[2]


def _summary(entry: Entry) -> str:
    """The first sentence of the answer."""
    # A stop ends a sentence where a capital or a mark follows, and not in "e.g. CPython".
    return re.split(r"(?<=[.!?])(?<!e\.g\.)(?<!i\.e\.)\s(?=[^a-z])", entry.answer.split("\n\n")[0], maxsplit=1)[0]


def _describes(entry: Entry) -> bool:
    """Whether the summary can stand alone and does not give the name away."""
    summary = _summary(entry)
    if not 30 <= len(summary) <= 160 or len(summary.split()) < 5 or "::" in summary:
        return False
    words = {word for word in re.split(r"[^a-z]+", summary.lower()) if word}
    parts = {part for part in re.split(r"[^a-z]+", re.sub(r"(?<=[a-z])(?=[A-Z])", "_", _short(entry)).lower()) if part}
    whole = _short(entry).lower()
    return whole not in summary.lower().replace(" ", "") and not (parts and parts <= words)


# Multiple choice

CHOICES = 4


def _name_the_function(entry: Entry) -> tuple[str, str]:
    query = f"Question: Which Python function does this? {_summary(entry)}\nAnswer:"
    return query, f"`{_short(entry)}{entry.signature}`"


def _describe_the_function(entry: Entry) -> tuple[str, str]:
    return f"Question: What does the Python function `{entry.name}{entry.signature}` do?\nAnswer:", _summary(entry)


_TASKS = {"name_the_function": _name_the_function, "describe_the_function": _describe_the_function}
TASKS = tuple(_TASKS)
# Of which the answer is generated.
COINS = "count_the_coins"


def multiple_choice(task: str) -> list[dict]:
    """Held-out multiple-choice items about functions and methods of the standard library.

    Args:
        task: `name_the_function` (which of four does what is described) or `describe_the_function` (which of four
            descriptions fits the name). The wrong choices are other held-out functions, of the same module where it
            has enough; no right description contains the name.

    Returns:
        Rows `id`, `query`, `choices` and `gold`, in an order fixed by their hashes; the right choice is in each
        position equally often.

    Raises:
        DataError: this installation has no standard-library sources.
    """
    make = _TASKS[task]
    pool = _choice_pool()
    rows: list[dict[str, Any]] = []
    for entry in pool:
        query, right = make(entry)
        choices = [make(other)[1] for other in _distractors(entry, pool)]
        gold = len(rows) % CHOICES
        choices.insert(gold, right)
        if len(set(choices)) == CHOICES:
            rows.append({"id": entry.name, "query": query, "choices": choices, "gold": gold})
    return rows


def _choice_pool() -> list[Entry]:
    """Held-out functions that one sentence describes, and no other name of any part in the same words."""
    once = _summaries_used_once()
    pool = [
        entry
        for entry in entries()
        if entry.part == "heldout" and entry.arguments is not None and _summary(entry) in once and _describes(entry)
    ]
    return sorted(pool, key=lambda entry: digest(entry.name))


def _distractors(entry: Entry, pool: list[Entry]) -> list[Entry]:
    """Other functions, those of the same module first, then of the same package, each by hash."""

    def distance(other: Entry) -> tuple[int, str]:
        mine, theirs = entry.module.split("."), other.module.split(".")
        shared = 2 if mine == theirs else int(mine[0] == theirs[0])
        return -shared, digest(entry.name + other.name)

    others = [other for other in pool if _short(other) != _short(entry)]
    return sorted(others, key=distance)[: CHOICES - 1]


# Questions with a short answer

QUESTIONS = 1000
_OWNERS = ("Anna", "Ben", "Carla", "David", "Emma", "Felix", "Grace", "Henry", "Irene", "Jack")


def count_the_coins() -> list[dict]:
    """Questions about three numbers in a sentence, by turns for one of them (looking up) and for the sum of two.

    Returns:
        Rows `question`, `target` and `answer`, both the number, below 100.
    """
    rows = []
    for index in range(QUESTIONS):
        first = number(f"owners {index}", len(_OWNERS))
        owners = [_OWNERS[(first + step) % len(_OWNERS)] for step in (0, 3, 7)]
        coins = [11 + number(f"coins {index} {owner}", 39) for owner in owners]
        left_out = number(f"left out {index}", 3)
        told = ", ".join(f"{owner} has {count} coins" for owner, count in zip(owners, coins, strict=True))
        if index % 2:
            pair = " and ".join(owner for place, owner in enumerate(owners) if place != left_out)
            question, target = f"How many coins do {pair} have together?", sum(coins) - coins[left_out]
        else:
            question, target = f"How many coins does {owners[left_out]} have?", coins[left_out]
        rows.append({"question": f"{told}. {question}", "target": str(target), "answer": str(target)})
    return rows


def task_items(task: str) -> tuple[str, list[dict]]:
    """Shape and items of a built-in task.

    Raises:
        DataError: unknown task, or this installation has no standard-library sources.
    """
    _check(task, (*TASKS, COINS), "task")
    return ("generate", count_the_coins()) if task == COINS else ("choices", multiple_choice(task))
