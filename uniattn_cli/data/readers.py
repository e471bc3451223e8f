"""Reads data files of any supported type, and data sets of the hub, row by row, so that an error can name the row."""

from __future__ import annotations

import contextlib
import csv
import json
import re
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from uniattn_cli.errors import DataError, RowError
from uniattn_cli.recipe.paths import located
from uniattn_cli.recipe.schema import DatasetSpec
from uniattn_cli.run.files import check_not_pointer

EXTENSIONS = (".json", ".jsonl", ".parquet", ".csv", ".txt")

# Where the row stands, for messages; its columns, or why it has none.
Raw = tuple[str, dict[str, Any] | RowError]


def read_objects(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yields (where, object) for every line of a local .jsonl file.

    Raises:
        DataError: missing, unreadable, not .jsonl, or a line that is not an object.
    """
    if path.suffix.lower() != ".jsonl":
        raise DataError(f"{path} is not a .jsonl file")
    if not path.is_file():
        raise DataError(f"{path} not found (looked for {path.absolute()})")
    with _file_errors(path):
        for where, row in _read_jsonl(path):
            check_text(sound(row), where)
            yield where, sound(row)


def sound(raw: dict[str, Any] | RowError) -> dict[str, Any]:
    """The columns of a row; raises the error that stands in place of a broken one."""
    if isinstance(raw, RowError):
        raise raw
    return raw


def check_text(value: Any, where: str) -> None:
    """Refuses what cannot be written down: half a character, or what is no JSON.

    Raises:
        RowError: with `where`.
    """
    try:
        (value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)).encode("utf-8")
    except UnicodeEncodeError:
        raise RowError(f"{where} has half a surrogate pair, which is no text") from None
    except TypeError as error:
        raise RowError(f"{where} has a value that is no JSON ({error})") from None


def raw_rows(spec: DatasetSpec, whole_text: bool) -> Iterator[Raw]:
    """Yields (where, columns) for every row of a local file or a hub data set; an error in place of a broken row.

    Args:
        spec: the source; not the built-in one.
        whole_text: a .txt file is one row. Otherwise its paragraphs (or its lines, where no blank line separates
            paragraphs) are the rows.

    Raises:
        DataError: missing, unreadable or malformed.
    """
    path = located(spec.source)
    extension = path.suffix.lower()
    if not path.exists():
        # A hub id is `name` or `owner/name`; anything else can only have been meant as a path.
        if extension not in EXTENSIONS and re.fullmatch(r"\w[\w.-]*(/[\w.-]+)?", spec.source):
            yield from _read_hub(spec)
            return
        raise DataError(f"data file {spec.source} not found (looked for {path.absolute()}); check data.* in the recipe")
    if not path.is_file():
        raise DataError(f"{path.absolute()} is not a file; give a file ({' '.join(EXTENSIONS)}) or a hub data set")
    if extension not in EXTENSIONS:
        raise DataError(f"{path} has the unsupported extension '{extension}'; supported are {' '.join(EXTENSIONS)}")
    if spec.split or spec.config:
        raise DataError(f"{path} is a local file; `split` and `config` are for hub data sets, remove them")
    with _file_errors(path):
        yield from _read_txt(path, whole_text) if extension == ".txt" else _READERS[extension](path)


@contextlib.contextmanager
def _file_errors(path: Path) -> Iterator[None]:
    try:
        check_not_pointer(path, DataError)
        yield
    except UnicodeDecodeError as error:
        raise DataError(f"{path} is not UTF-8 text ({error.reason} at byte {error.start}); convert it first") from None
    except OSError as error:
        raise DataError(f"cannot read {path}: {error.strerror or error}") from None


def _read_txt(path: Path, whole_text: bool) -> Iterator[Raw]:
    content = path.read_text(encoding="utf-8-sig")
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
                row = _mapping(json.loads(line), where)
            except ValueError as error:
                row = RowError(f"{where} is not JSON ({error}); a .jsonl file has one object per line")
            yield where, row


def _read_json(path: Path) -> Iterator[Raw]:
    content = path.read_text(encoding="utf-8-sig")
    try:
        rows = json.loads(content) if content.strip() else []
    except ValueError as error:
        raise DataError(f"{path} is not JSON ({error}); one object per line belongs in a .jsonl file") from None
    if not isinstance(rows, list):
        raise DataError(f"{path} must contain a list of objects, not a {type(rows).__name__}")
    for number, row in enumerate(rows, 1):
        where = f"{path}, row {number}"
        yield where, _mapping(row, where)


def _mapping(row: Any, where: str) -> dict[str, Any] | RowError:
    if not isinstance(row, dict):
        return RowError(f"{where} must be an object with named columns, not {json.dumps(row)[:40]}")
    return row


def _read_csv(path: Path) -> Iterator[Raw]:
    csv.field_size_limit(sys.maxsize)
    with path.open(encoding="utf-8-sig", newline="") as stream:
        reader = csv.DictReader(stream, strict=True)
        try:
            for number, row in enumerate(reader, 1):
                where, sound = f"{path}, row {number}", None not in row and None not in row.values()
                fields = ", ".join(reader.fieldnames or ())
                yield where, row if sound else RowError(f"{where} does not have exactly the columns {fields}")
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
                yield f"{path}, row {number}", _without_gaps(row)
    except pyarrow.ArrowException as error:
        raise DataError(f"{path} is not a readable parquet file ({error})") from None


def _read_hub(spec: DatasetSpec) -> Iterator[Raw]:
    import datasets
    from datasets.exceptions import DatasetGenerationError

    split = spec.split or "train"
    name = f"hub data set {spec.source}" + (f" ({spec.config})" if spec.config else "")
    try:
        with _offline_at_once(spec.source):
            rows = datasets.load_dataset(spec.source, spec.config, split=split)
    except ValueError as error:
        # Unknown configuration or split; the message lists the known ones.
        raise DataError(f"{name}, split {split}: {_first_line(error)}") from None
    except (OSError, DatasetGenerationError) as error:
        raise DataError(
            f"'{spec.source}' is not a file (looked for {located(spec.source).absolute()}), and the {name} could not "
            f"be loaded: {_first_line(error)}. Without a network, use a local file ({' '.join(EXTENSIONS)}) in data.*"
        ) from None
    for number, row in enumerate(rows, 1):
        yield f"{name}, row {number}", _without_gaps(row)


def _without_gaps(row: dict[str, Any]) -> dict[str, Any]:
    """A row of a table without the nulls in its objects: there, each has every field that any row has."""
    return {name: _filled(value) for name, value in row.items()}


def _filled(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _filled(field) for name, field in value.items() if field is not None}
    return [_filled(item) for item in value] if isinstance(value, list) else value


@contextlib.contextmanager
def _offline_at_once(name: str) -> Iterator[None]:
    """Lets `datasets` go straight to its cache without a network; left alone it retries for half a minute."""
    import datasets
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, OfflineModeIsEnabled

    from uniattn_cli.models.hub import transport_errors

    offline = datasets.config.HF_HUB_OFFLINE
    try:
        HfApi().dataset_info(name, timeout=10)
    except transport_errors(OfflineModeIsEnabled):
        datasets.config.HF_HUB_OFFLINE = True
    except (HfHubHTTPError, HFValidationError):
        pass  # unknown or gated: load_dataset says so
    except ValueError:
        # A sign-in page or a proxy in the hub's place; it speaks no JSON.
        datasets.config.HF_HUB_OFFLINE = True
    try:
        yield
    finally:
        datasets.config.HF_HUB_OFFLINE = offline


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0].rstrip(".")


_READERS: dict[str, Callable[[Path], Iterator[Raw]]] = {
    ".json": _read_json,
    ".jsonl": _read_jsonl,
    ".csv": _read_csv,
    ".parquet": _read_parquet,
}
