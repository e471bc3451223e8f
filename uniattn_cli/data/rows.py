"""Brings rows of any column layout into one form, and checks them.

A normalised row is a dict with `messages` (see `conversations`) or `text`; the other key is None.
"""

from __future__ import annotations

import difflib
import itertools
import json
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from typing import Any

from uniattn_cli.data.conversations import MEDIA, Message, conversation, definitions, empty, with_tools
from uniattn_cli.data.readers import Raw, check_text, sound
from uniattn_cli.data.screen import CheckedRow, Screen
from uniattn_cli.data.sources import find
from uniattn_cli.errors import DataError, RowError, suggest
from uniattn_cli.recipe.schema import DatasetSpec

BUILTIN = "builtin"

LOOKED_AT = 100  # first rows that decide on the format: some of them may be broken, or of another

_COLUMNS = {
    "messages": "messages (or conversations)",
    "prompt_completion": "prompt and completion",
    "alpaca": "instruction and output (input is optional), or input and output",
    "text": "text",
}
# Columns beside a conversation that are its own: its system turn, and the definitions of its tools.
SYSTEM = ("system", "system_prompt")
TOOLS = ("tools", "functions")
# Names that each format can use, and those without which it is nothing.
_USED = {
    "messages": {"messages", "conversations"},
    "prompt_completion": {"prompt", "completion"},
    "alpaca": {"instruction", "input", "output"},
    "text": {"text"},
}
# Columns that say which row it is and where it comes from; no one expects them to be learned.
ORIGIN = {"id", "idx", "index", "uuid", "source", "dataset", "url"}
# Everything that each format reads of a row, or needs not.
_READ = {name: columns | ORIGIN | ({*SYSTEM, *TOOLS} if name != "text" else set()) for name, columns in _USED.items()}
_READ["alpaca"] |= {"history"}
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


def read_rows(spec: DatasetSpec, *, whole_text: bool = False, screen: Screen | None = None) -> Iterator[dict[str, Any]]:
    """Yields the normalised rows of a local file or a hub data set as they are read, in order; empty text is skipped.

    Args:
        spec: source, format and limit. Not the built-in source.
        whole_text: a .txt file is one row; otherwise its paragraphs are.
        screen: leaves out and counts rows that cannot be used; None is one that tells nobody.

    Raises:
        DataError: missing, unreadable or empty; the columns of the format are not there; too many rows are bad.
    """
    screen = screen or Screen()
    with screen.counting(spec.source) as tally:
        for row in checked_rows(spec, find(spec).rows(whole_text), screen):
            tally.add(row)
            if row.used:
                yield {"messages": row.messages, "text": row.text}


def checked_rows(spec: DatasetSpec, raw_rows: Iterable[Raw], screen: Screen) -> Iterator[CheckedRow]:
    """Normalises and checks rows up to the limit of their data set; yields one for each that is read.

    Raises:
        DataError: the columns of the format are not there, or the source cannot be read.
    """
    count = 0
    coming = iter(raw_rows)
    first = list(itertools.islice(coming, LOOKED_AT))
    layout = _usual_layout(spec, first)
    for where, raw in itertools.chain(first, coming):
        unused: set[str] = set()
        try:
            raw = _renamed(sound(raw), spec.columns or {}, where)
            layout = layout or _layout(spec, set(raw))
            row = _NORMALISE[layout](raw, where, unused)
            check_text(row["messages"] or row["text"], where)
            screen.check(row["messages"] or [], where, unused)
        except RowError as error:
            yield CheckedRow(fault=_shown(str(error)))
            continue
        unused.update(f"column {name}" for name in raw if name not in _READ[layout] and not empty(raw[name]))
        if row["messages"] is None and not row["text"].strip():
            row = {}
        else:
            count += 1
        yield CheckedRow(**row, unused=tuple(sorted(map(_shown, unused))))
        if count == spec.limit:
            return


def _shown(text: str) -> str:
    """What can be written of a text that names something: names of columns and files may hold half a character, too."""
    return text.encode("utf-8", "replace").decode("utf-8")


def _renamed(raw: dict[str, Any], columns: dict[str, str], where: str) -> dict[str, Any]:
    """The row with the recipe's names for its columns (`columns: {prompt: question}`)."""
    for name, column in columns.items():
        if column not in raw:
            raise RowError(f"{where}: no column '{column}' for {name}{suggest(column, raw)} (it has: {_listed(raw)})")
    taken = set(columns.values()) | set(columns)
    others = {name: value for name, value in raw.items() if name not in taken}
    return others | {name: raw[column] for name, column in columns.items()}


def _usual_layout(spec: DatasetSpec, rows: Iterable[Raw]) -> str | None:
    """The column layout that most of some rows have; None if all of them are broken.

    Raises:
        DataError: none of them has a known one.
    """
    found: Counter[str] = Counter()
    lacking: DataError | None = None
    for where, raw in rows:
        try:
            columns = set(_renamed(sound(raw), spec.columns or {}, where))
        except RowError:
            continue
        try:
            found[_layout(spec, columns)] += 1
        except DataError as error:
            lacking = lacking or error
    if lacking and not found:
        raise lacking
    return found.most_common(1)[0][0] if found else None


def _layout(spec: DatasetSpec, columns: set[str]) -> str:
    """The column layout of a row.

    Raises:
        DataError: its columns are of no known one.
    """
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
        f"{spec.source} lacks the needed columns: {needed}. It has: {_listed(columns)}" + _nearest(columns, wanted)
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
            mapping = ", ".join(f"{name}: {_written(column)}" for name, column in found.items() if name != column)
            best = share, f". The closest format is {layout}: add `columns: {{{mapping}}}` to the data set"
    return best[1]


def _written(column: str) -> str:
    """A name as YAML reads it."""
    return column if re.fullmatch(r"[A-Za-z_][\w.-]*", column) else json.dumps(column, ensure_ascii=False)


def _like(name: str, columns: set[str]) -> str | None:
    """The column that seems to hold what the format calls `name`."""
    lower = {column.lower(): column for column in sorted(columns)}
    for candidate in (name, *_ALSO_CALLED[name]):
        if candidate in lower:
            return lower[candidate]
    near = difflib.get_close_matches(name, list(lower), n=1, cutoff=0.8)
    return lower[near[0]] if near else None


def _from_messages(raw: dict[str, Any], where: str, unused: set[str]) -> dict[str, Any]:
    names = [name for name in ("messages", "conversations") if name in raw]
    filled = [name for name in names if not empty(raw[name])]
    column = [*filled, *names, "messages"][0]
    # The same conversation in both forms is common; which of two is learned should be known.
    unused.update(f"column {name}" for name in filled[1:])
    return _row(conversation(_given(raw, column, where), where, column, unused), raw, where, unused)


def _from_prompt(raw: dict[str, Any], where: str, unused: set[str]) -> dict[str, Any]:
    turns = []
    for column, role in (("prompt", "user"), ("completion", "assistant")):
        value = _given(raw, column, where)
        if isinstance(value, str):
            turns.append({"role": role, "content": value if role == "user" else _answer(raw, column, where)})
        else:
            turns.extend(conversation(value, where, column, unused))
    return _row(turns, raw, where, unused)


def _from_alpaca(raw: dict[str, Any], where: str, unused: set[str]) -> dict[str, Any]:
    prompt = "\n\n".join(_text(raw, key, where) for key in ("instruction", "input") if not empty(raw.get(key)))
    if not prompt:
        raise RowError(f"{where}: instruction and input are both empty")
    history = [] if empty(raw.get("history")) else raw["history"]
    if not isinstance(history, list) or not all(_is_exchange(pair) for pair in history):
        raise RowError(f"{where}: column 'history' must be a list of pairs of question and answer")
    said = [*itertools.chain(*history), prompt, _answer(raw, "output", where)]
    roles = itertools.cycle(("user", "assistant"))
    turns = [{"role": role, "content": text} for role, text in zip(roles, said, strict=False)]
    return _row(turns, raw, where, unused)


def _is_exchange(pair: Any) -> bool:
    return isinstance(pair, list) and len(pair) == 2 and all(isinstance(text, str) for text in pair)


def _from_text(raw: dict[str, Any], where: str, unused: set[str]) -> dict[str, Any]:
    return {"messages": None, "text": _text(raw, "text", where)}


_NORMALISE: dict[str, Callable[[dict[str, Any], str, set[str]], dict[str, Any]]] = {
    "messages": _from_messages,
    "prompt_completion": _from_prompt,
    "alpaca": _from_alpaca,
    "text": _from_text,
}


def _listed(columns: Iterable[str]) -> str:
    return ", ".join(sorted(columns)) or "none"


def _given(raw: dict[str, Any], column: str, where: str) -> Any:
    if column not in raw:
        raise RowError(f"{where}: no column '{column}' (it has: {_listed(raw)})")
    return raw[column]


def _text(raw: dict[str, Any], column: str, where: str) -> str:
    value = _given(raw, column, where)
    if not isinstance(value, str):
        kind = "null" if value is None else f"{type(value).__name__}, not text"
        raise RowError(f"{where}: column '{column}' is {kind} (it has: {_listed(raw)})")
    return value


def _answer(raw: dict[str, Any], column: str, where: str) -> str:
    answer = _text(raw, column, where)
    if not answer.strip():
        raise RowError(f"{where}: column '{column}' is empty, so there is no answer")
    return answer


def _row(messages: list[Message], raw: dict[str, Any], where: str, unused: set[str]) -> dict[str, Any]:
    """The row of a conversation, with what other columns say of it."""
    media = [name for name in MEDIA if not empty(raw.get(name))]
    if media:
        raise RowError(f"{where} has {media[0]} beside its conversation; only text is supported")
    # Shared conversations often begin with the model's greeting; chat templates expect the user first.
    first = next((i for i, message in enumerate(messages) if message["role"] != "assistant"), len(messages))
    messages = messages[first:]
    for column in SYSTEM:
        if empty(raw.get(column)):
            continue
        if messages[:1] and messages[0]["role"] == "system":
            unused.update({column} if raw[column] != messages[0]["content"] else ())
        else:
            messages = [{"role": "system", "content": _text(raw, column, where)}, *messages]
    for column in TOOLS:
        messages = with_tools(messages, definitions(raw.get(column), where))
    return {"messages": messages, "text": None}
