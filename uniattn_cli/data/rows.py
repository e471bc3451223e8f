"""Brings rows of any column layout into one form, and checks them.

A normalised row is a dict with `messages` (a list of `{"role", "content"}`) or `text`; the other key is None.
"""

from __future__ import annotations

import difflib
from collections.abc import Callable, Iterator
from typing import Any

from uniattn_cli.data.readers import raw_rows
from uniattn_cli.errors import DataError, suggest
from uniattn_cli.recipe.schema import DatasetSpec

BUILTIN = "builtin"

_ROLES = {
    "system": "system", "user": "user", "human": "user", "assistant": "assistant", "gpt": "assistant", "tool": "tool",
}  # fmt: skip
_COLUMNS = {
    "messages": "messages (or conversations)",
    "prompt_completion": "prompt and completion",
    "alpaca": "instruction and output (input is optional), or input and output",
    "text": "text",
}
# Names that each format can use, and those without which it is nothing.
_USED = {
    "messages": {"messages", "conversations"},
    "prompt_completion": {"prompt", "completion"},
    "alpaca": {"instruction", "input", "output"},
    "text": {"text"},
}
_NEEDED = {
    "messages": ("messages",),
    "prompt_completion": ("prompt", "completion"),
    "alpaca": ("instruction", "output"),
    "text": ("text",),
}
# What the same things are called elsewhere; only to suggest a mapping, never to guess one.
_ALSO_CALLED = {
    "messages": ("conversation", "dialog", "dialogue", "chat", "turns"),
    "prompt": ("question", "query", "problem", "user", "input"),
    "completion": ("answer", "response", "solution", "reply", "target", "assistant", "output"),
    "instruction": ("task",),
    "output": (),
    "text": ("content", "document", "body", "article", "passage"),
}


def read_rows(spec: DatasetSpec, *, whole_text: bool = False) -> Iterator[dict[str, Any]]:
    """Yields the normalised rows of a local file or a hub data set, in order; empty text is skipped.

    Args:
        spec: source, format and limit. Not the built-in source.
        whole_text: a .txt file is one row; otherwise its paragraphs are.

    Raises:
        DataError: missing, unreadable, empty or malformed; or the columns of the format are not there.
    """
    count = 0
    layout = None
    for where, raw in raw_rows(spec, whole_text):
        raw = _renamed(raw, spec.columns, where) if spec.columns else raw
        layout = layout or _layout(spec, set(raw))
        row = _NORMALISE[layout](raw, where)
        if row["messages"] is None and not row["text"].strip():
            continue
        yield row
        count += 1
        if count == spec.limit:
            return
    if not count:
        raise DataError(f"{spec.source} has no rows; use a data set with at least one")


def _renamed(raw: dict[str, Any], columns: dict[str, str], where: str) -> dict[str, Any]:
    """The row with the recipe's names for its columns (`columns: {prompt: question}`)."""
    for name, column in columns.items():
        if column not in raw:
            have = ", ".join(sorted(raw)) or "none"
            raise DataError(f"{where}: no column '{column}' for {name}{suggest(column, raw)} (it has: {have})")
    taken = set(columns.values()) | set(columns)
    others = {name: value for name, value in raw.items() if name not in taken}
    return others | {name: raw[column] for name, column in columns.items()}


def _layout(spec: DatasetSpec, columns: set[str]) -> str:
    """The column layout of a data set, from its first row."""
    fits = {
        "messages": bool({"messages", "conversations"} & columns),
        "prompt_completion": {"prompt", "completion"} <= columns,
        "alpaca": "output" in columns and bool({"instruction", "input"} & columns),
        "text": "text" in columns,
    }
    # Columns that the recipe names are there to be used.
    auto = [layout for layout in fits if not spec.columns or _USED[layout] & set(spec.columns)]
    wanted = auto if spec.format == "auto" else [spec.format]
    for layout in wanted:
        if fits[layout]:
            return layout
    needed = "; or ".join(_COLUMNS[layout] for layout in wanted)
    raise DataError(
        f"{spec.source} lacks the needed columns: {needed}. It has: {', '.join(sorted(columns)) or 'none'}"
        + _nearest(columns, wanted)
    )


def _nearest(columns: set[str], layouts: list[str]) -> str:
    """A sentence with the closest format, and the setting that would make the columns fit."""
    best: tuple[float, str] = (0.0, "")
    for layout in layouts:
        found = {name: column for name in _NEEDED[layout] if (column := _like(name, columns)) is not None}
        lacking = [name for name in _NEEDED[layout] if name not in found]
        share = len(found) / len(_NEEDED[layout])
        if share <= best[0]:
            continue
        if lacking:
            best = share, f". The closest format is {layout}, which also needs {' and '.join(lacking)}"
        else:
            mapping = ", ".join(f"{name}: {column}" for name, column in found.items() if name != column)
            best = share, f". The closest format is {layout}: add `columns: {{{mapping}}}` to the data set"
    return best[1]


def _like(name: str, columns: set[str]) -> str | None:
    """The column that seems to hold what the format calls `name`."""
    lower = {column.lower(): column for column in sorted(columns)}
    for candidate in (name, *_ALSO_CALLED[name]):
        if candidate in lower:
            return lower[candidate]
    near = difflib.get_close_matches(name, list(lower), n=1, cutoff=0.8)
    return lower[near[0]] if near else None


def _from_messages(raw: dict[str, Any], where: str) -> dict[str, Any]:
    column = "messages" if raw.get("messages") is not None else "conversations"
    return _row(_messages(raw.get(column), where, column))


def _from_prompt(raw: dict[str, Any], where: str) -> dict[str, Any]:
    turns = []
    for column, role in (("prompt", "user"), ("completion", "assistant")):
        if column not in raw:
            raise DataError(f"{where}: no column '{column}' (it has: {', '.join(sorted(raw))})")
        value = raw[column]
        if isinstance(value, str):
            turns.append({"role": role, "content": value})
        else:
            turns.extend(_messages(value, where, column))
    return _row(turns)


def _from_alpaca(raw: dict[str, Any], where: str) -> dict[str, Any]:
    prompt = "\n\n".join(raw[key] for key in ("instruction", "input") if _text(raw, key, where, optional=True))
    if not prompt:
        raise DataError(f"{where}: instruction and input are both empty")
    answer = _text(raw, "output", where)
    return _row([{"role": "user", "content": prompt}, {"role": "assistant", "content": answer}])


def _from_text(raw: dict[str, Any], where: str) -> dict[str, Any]:
    return {"messages": None, "text": _text(raw, "text", where)}


_NORMALISE: dict[str, Callable[[dict[str, Any], str], dict[str, Any]]] = {
    "messages": _from_messages,
    "prompt_completion": _from_prompt,
    "alpaca": _from_alpaca,
    "text": _from_text,
}


def _text(raw: dict[str, Any], column: str, where: str, optional: bool = False) -> str:
    value = raw.get(column)
    if optional and value is None:
        return ""
    if not isinstance(value, str):
        have = ", ".join(sorted(raw))
        fault = f"column '{column}' is {type(value).__name__}, not text" if column in raw else f"no column '{column}'"
        raise DataError(f"{where}: {fault} (it has: {have})")
    return value


def _row(messages: list[dict[str, str]]) -> dict[str, Any]:
    # Shared conversations often begin with the model's greeting; chat templates expect the user first.
    first = next((i for i, message in enumerate(messages) if message["role"] != "assistant"), len(messages))
    return {"messages": messages[first:], "text": None}


def _messages(value: Any, where: str, column: str) -> list[dict[str, str]]:
    """Checks a conversation, in the form of OpenAI (role, content) or of ShareGPT (from, value)."""
    if not isinstance(value, list) or not value:
        raise DataError(f"{where}: column '{column}' must be a list of messages")
    messages = []
    for number, message in enumerate(value, 1):
        here = f"{where}, message {number} of '{column}'"
        if not isinstance(message, dict):
            raise DataError(f"{here} must have role and content (or from and value)")
        role = message.get("role", message.get("from"))
        content = message.get("content", message.get("value"))
        if isinstance(content, list) and all(isinstance(part, dict) and part.get("type") == "text" for part in content):
            content = "".join(part["text"] for part in content)
        if role not in _ROLES:
            raise DataError(f"{here}: unknown role {role!r}; known: {', '.join(_ROLES)}")
        if message.get("tool_calls"):
            raise DataError(f"{here} contains tool calls, which are not supported; remove such rows")
        if not isinstance(content, str):
            raise DataError(f"{here} has no text content; only text is supported")
        messages.append({"role": _ROLES[role], "content": content})
    return messages
