"""Reads data sets of any supported file type and column layout into one form of row.

A normalised row is a dict with `messages` (a list of `{"role", "content"}`) or `text`; the other key is None. Files are
read row by row, so that an error can name the row. No torch here; parquet and hub data sets import `datasets`.
"""

from __future__ import annotations

import contextlib
import csv
import json
import re
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from uniattn_cli.errors import DataError
from uniattn_cli.recipe import DatasetSpec

BUILTIN = "builtin"
EXTENSIONS = (".json", ".jsonl", ".parquet", ".csv", ".txt")

_ROLES = {
    "system": "system", "user": "user", "human": "user", "assistant": "assistant", "gpt": "assistant", "tool": "tool",
}  # fmt: skip
_COLUMNS = {
    "messages": "messages (or conversations)",
    "prompt_completion": "prompt and completion",
    "alpaca": "instruction and output (input is optional), or input and output",
    "text": "text",
}

Raw = tuple[str, dict[str, Any]]  # where the row stands, for messages; its columns


def read_rows(spec: DatasetSpec, *, whole_text: bool = False) -> Iterator[dict[str, Any]]:
    """Yields the normalised rows of a local file or a hub data set, in order; empty text is skipped.

    Args:
        spec: source, format and limit. Not the built-in source.
        whole_text: a .txt file is one row. Otherwise its paragraphs (or its lines, where no blank line separates
            paragraphs) are the rows.

    Raises:
        DataError: missing, unreadable, empty or malformed; or the columns of the format are not there.
    """
    count = 0
    layout = None
    for where, raw in _raw_rows(spec, whole_text):
        layout = layout or _layout(spec, set(raw))
        row = _NORMALISE[layout](raw, where)
        if row["messages"] is None and not row["text"].strip():
            continue
        yield row
        count += 1
        if count == spec.limit:
            return
    if not count:
        raise DataError(f"{spec.source} has no rows; name a data set with at least one")


def read_objects(path: Path) -> Iterator[Raw]:
    """Yields (where, object) for every line of a local .jsonl file.

    Raises:
        DataError: missing, unreadable, not .jsonl, or a line that is not an object.
    """
    if path.suffix.lower() != ".jsonl":
        raise DataError(f"{path} is not a .jsonl file")
    if not path.is_file():
        raise DataError(f"{path} not found (looked for {path.absolute()})")
    with _file_errors(path):
        yield from _read_jsonl(path)


def _raw_rows(spec: DatasetSpec, whole_text: bool) -> Iterator[Raw]:
    path = Path(spec.source).expanduser()
    extension = path.suffix.lower()
    if not path.exists():
        # A hub id is `name` or `owner/name`; anything else can only have been meant as a path.
        if extension not in EXTENSIONS and re.fullmatch(r"\w[\w.-]*(/[\w.-]+)?", spec.source):
            yield from _read_hub(spec)
            return
        raise DataError(f"data file {spec.source} not found (looked for {path.absolute()}); check data.* in the recipe")
    if not path.is_file():
        raise DataError(f"{path.absolute()} is not a file; name a file ({' '.join(EXTENSIONS)}) or a hub data set")
    if extension not in EXTENSIONS:
        raise DataError(f"{path} has the unsupported extension '{extension}'; supported are {' '.join(EXTENSIONS)}")
    if spec.split or spec.config:
        raise DataError(f"{path} is a local file: `split` and `config` are for hub data sets, remove them")
    with _file_errors(path):
        yield from _read_txt(path, whole_text) if extension == ".txt" else _READERS[extension](path)


@contextlib.contextmanager
def _file_errors(path: Path) -> Iterator[None]:
    try:
        yield
    except UnicodeDecodeError as error:
        raise DataError(f"{path} is not UTF-8 text ({error.reason} at byte {error.start}); convert it first") from None
    except OSError as error:
        raise DataError(f"cannot read {path}: {error.strerror or error}") from None


def _read_txt(path: Path, whole_text: bool) -> Iterator[Raw]:
    content = path.read_text(encoding="utf-8")
    if whole_text:
        yield str(path), {"text": content}
        return
    blocks = re.split(r"\n[ \t]*\n", content)
    blocks = blocks if len(blocks) > 1 else content.split("\n")
    for number, block in enumerate(blocks, 1):
        yield f"{path}, paragraph {number}", {"text": block.strip("\n")}


def _read_jsonl(path: Path) -> Iterator[Raw]:
    with path.open(encoding="utf-8-sig") as stream:
        for number, line in enumerate(stream, 1):
            if not line.strip():
                continue
            where = f"{path}, line {number}"
            try:
                row = json.loads(line)
            except ValueError as error:
                raise DataError(f"{where} is not JSON ({error}); a .jsonl file holds one object per line") from None
            yield where, _mapping(row, where)


def _read_json(path: Path) -> Iterator[Raw]:
    content = path.read_text(encoding="utf-8-sig")
    try:
        rows = json.loads(content) if content.strip() else []
    except ValueError as error:
        raise DataError(f"{path} is not JSON ({error}); one object per line belongs in a .jsonl file") from None
    if not isinstance(rows, list):
        raise DataError(f"{path} must hold a list of objects, not one {type(rows).__name__}")
    for number, row in enumerate(rows, 1):
        where = f"{path}, row {number}"
        yield where, _mapping(row, where)


def _mapping(row: Any, where: str) -> dict[str, Any]:
    if not isinstance(row, dict):
        raise DataError(f"{where} must be an object with named columns, not {json.dumps(row)[:40]}")
    return row


def _read_csv(path: Path) -> Iterator[Raw]:
    csv.field_size_limit(sys.maxsize)
    with path.open(encoding="utf-8-sig", newline="") as stream:
        reader = csv.DictReader(stream, strict=True)
        try:
            for number, row in enumerate(reader, 1):
                if None in row or None in row.values():
                    fields = ", ".join(reader.fieldnames or ())
                    raise DataError(f"{path}, row {number} does not have exactly the columns {fields}")
                yield f"{path}, row {number}", row
        except csv.Error as error:
            raise DataError(f"{path}, line {reader.line_num} is not CSV ({error})") from None


def _read_parquet(path: Path) -> Iterator[Raw]:
    import pyarrow
    import pyarrow.parquet

    number = 0
    try:
        for batch in pyarrow.parquet.ParquetFile(path).iter_batches(batch_size=1024):
            for row in batch.to_pylist():
                number += 1
                yield f"{path}, row {number}", row
    except pyarrow.ArrowException as error:
        raise DataError(f"{path} is not a readable parquet file ({error})") from None


def _read_hub(spec: DatasetSpec) -> Iterator[Raw]:
    import datasets
    from datasets.exceptions import DatasetGenerationError

    split = spec.split or "train"
    name = f"hub data set {spec.source}" + (f" ({spec.config})" if spec.config else "")
    try:
        rows = datasets.load_dataset(spec.source, spec.config, split=split)
    except ValueError as error:
        # Unknown configuration or split; the message lists the known ones.
        raise DataError(f"{name}, split {split}: {_first_line(error)}") from None
    except (OSError, DatasetGenerationError) as error:
        raise DataError(
            f"'{spec.source}' is no file here (looked for {Path(spec.source).absolute()}), and the {name} could not be "
            f"loaded: {_first_line(error)}. Without network, name a local file ({' '.join(EXTENSIONS)}) in data.*"
        ) from None
    for number, row in enumerate(rows, 1):
        yield f"{name}, row {number}", row


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0].rstrip(".")


_READERS: dict[str, Callable[[Path], Iterator[Raw]]] = {
    ".json": _read_json,
    ".jsonl": _read_jsonl,
    ".csv": _read_csv,
    ".parquet": _read_parquet,
}


# Columns


def _layout(spec: DatasetSpec, columns: set[str]) -> str:
    """The column layout of a data set, from its first row."""
    fits = {
        "messages": bool({"messages", "conversations"} & columns),
        "prompt_completion": {"prompt", "completion"} <= columns,
        "alpaca": "output" in columns and bool({"instruction", "input"} & columns),
        "text": "text" in columns,
    }
    wanted = list(fits) if spec.format == "auto" else [spec.format]
    for layout in wanted:
        if fits[layout]:
            return layout
    needed = "; or ".join(_COLUMNS[layout] for layout in wanted)
    raise DataError(f"{spec.source} lacks the needed columns: {needed}. It has: {', '.join(sorted(columns)) or 'none'}")


def _from_messages(raw: dict[str, Any], where: str) -> dict[str, Any]:
    column = "messages" if raw.get("messages") is not None else "conversations"
    return _row(_messages(raw.get(column), where, column))


def _from_prompt(raw: dict[str, Any], where: str) -> dict[str, Any]:
    turns = []
    for column, role in (("prompt", "user"), ("completion", "assistant")):
        value = raw.get(column)
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
        if not isinstance(content, str):
            raise DataError(f"{here} has no text content (only text can be trained on)")
        messages.append({"role": _ROLES[role], "content": content})
    return messages
