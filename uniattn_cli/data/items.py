"""Items of local tasks: multiple choice, questions with a short answer, last words, and plain text."""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from uniattn_cli.data import builtin
from uniattn_cli.data.readers import read_file, read_objects, sound
from uniattn_cli.data.rows import BUILTIN
from uniattn_cli.errors import DataError
from uniattn_cli.recipe.paths import located
from uniattn_cli.recipe.schema import TaskSpec

# Columns that an item of each shape must have, in the order in which they are looked for.
SHAPES = {
    "choices": ("query", "choices", "gold"),
    "generate": ("question", "target"),
    "last_word": ("query", "target"),
    "perplexity": ("text",),
}
# Paragraphs are joined to documents of about this many characters: alone they would be read without any context.
DOCUMENT = 2000


def is_local(source: str) -> bool:
    """Whether a task of the recipe comes from the built-in corpus or from a file."""
    return source.startswith(f"{BUILTIN}:") or source.endswith((".jsonl", ".json", ".txt")) or located(source).is_file()


def load_items(task: TaskSpec) -> tuple[str, list[dict[str, Any]]]:
    """The shape of a local task and its items.

    Returns:
        The shape, and rows with the columns of `SHAPES` for it; of `generate` also `answer`, the worked answer that
        stands in solved examples (the target where the file has none).

    Raises:
        DataError: unknown built-in task, missing or empty file, or a row that is not such an item.
    """
    if task.source.startswith(f"{BUILTIN}:"):
        shape, items = builtin.task_items(task.source.removeprefix(f"{BUILTIN}:"))
        if task.shape not in ("auto", shape):
            raise DataError(f"{task.source} has the shape {shape}; remove `shape: {task.shape}`")
        return shape, items
    path = located(task.source)
    if path.suffix.lower() == ".txt":
        if task.shape not in ("auto", "perplexity"):
            raise DataError(f"{path} is plain text, which supports only `shape: perplexity`, not {task.shape}")
        return "perplexity", _documents(path)
    shape = _shape_of(path) if task.shape == "auto" else task.shape
    if shape == "choices":
        return shape, read_choices(path)
    items = [_item(shape, raw, where) for where, raw in read_objects(path)]
    if not items:
        raise DataError(f"{path} has no items")
    return shape, items


def _shape_of(path: Path) -> str:
    for where, raw in read_objects(path):
        for shape, columns in SHAPES.items():
            if set(columns) <= set(raw):
                return shape
        # A file of queries that lacks something else is most likely meant as multiple choice.
        if "query" in raw and {"choices", "gold"} & set(raw):
            return "choices"
        forms = "; ".join(f"{shape}: {', '.join(columns)}" for shape, columns in SHAPES.items())
        raise DataError(f"{where} fits no known shape (it has: {', '.join(sorted(raw))}). Known shapes: {forms}")
    raise DataError(f"{path} has no items")


def _item(shape: str, raw: dict[str, Any], where: str) -> dict[str, Any]:
    """One checked item; a question may also stand in `query`."""
    if shape == "generate" and "question" not in raw and "query" in raw:
        raw = {**raw, "question": raw["query"]}
    columns = SHAPES[shape]
    missing = [name for name in columns if name not in raw]
    if missing:
        raise DataError(f"{where} lacks {', '.join(missing)} (it has: {', '.join(sorted(raw))})")
    item = {name: raw[name] for name in columns}
    target = item.get("target")
    if isinstance(target, (int, float)) and not isinstance(target, bool) and math.isfinite(target):
        item["target"] = str(target)
    for name, value in item.items():
        if not isinstance(value, str) or not value.strip():
            raise DataError(f"{where}: {name} must be text")
    if shape == "generate":
        answer = raw.get("answer", item["target"])
        item["answer"] = answer if isinstance(answer, str) and answer.strip() else item["target"]
    return item


def _documents(path: Path) -> list[dict[str, Any]]:
    return [{"text": text} for text in _joined(sound(raw)["text"] for _, raw in read_file(path, False))]


def _joined(paragraphs: Iterator[str]) -> list[str]:
    documents, open_ = [], ""
    for paragraph in filter(str.strip, paragraphs):
        open_ = f"{open_}\n\n{paragraph}" if open_ else paragraph
        if len(open_) >= DOCUMENT:
            documents.append(open_)
            open_ = ""
    if open_:
        documents.append(open_)
    if not documents:
        raise DataError("a text file in evaluation.tasks is empty")
    return documents


def read_choices(path: Path) -> list[dict[str, Any]]:
    """Reads and checks the multiple-choice items of a .jsonl file.

    Returns:
        Rows with `id`, `query` (the prompt), `choices` (each scored as its continuation after one blank) and `gold`
        (index of the right one).

    Raises:
        DataError: missing file, no items, or a row that is not an item.
    """
    items: list[dict[str, Any]] = []
    for where, raw in read_objects(path):
        missing = [key for key in ("query", "choices", "gold") if key not in raw]
        if missing:
            raise DataError(f"{where} lacks {', '.join(missing)} (it has: {', '.join(sorted(raw))})")
        query, choices, gold = raw["query"], raw["choices"], raw["gold"]
        if not isinstance(query, str) or not query.strip():
            raise DataError(f"{where}: query must be text")
        if not isinstance(choices, list) or len(choices) < 2 or not all(isinstance(c, str) and c for c in choices):
            raise DataError(f"{where}: choices must be a list of at least two strings")
        if not isinstance(gold, int) or isinstance(gold, bool) or not 0 <= gold < len(choices):
            raise DataError(f"{where}: gold must be a whole number from 0 to {len(choices) - 1}, not {gold!r}")
        items.append({"id": str(raw.get("id", len(items))), "query": query, "choices": choices, "gold": gold})
    if not items:
        raise DataError(f"{path} has no items")
    return items
