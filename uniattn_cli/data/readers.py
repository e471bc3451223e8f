"""Reads data files of any supported type row by row, so that an error can name the row."""

from __future__ import annotations

import bz2
import contextlib
import csv
import gzip
import importlib
import io
import json
import lzma
import re
import sys
import zipfile
import zlib
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import IO, Any

from uniattn_cli.errors import DataError, RowError
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
    with reading(path):
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
    except (TypeError, RecursionError) as error:
        raise RowError(f"{where} has a value that is no JSON ({error})") from None


def extension(path: Path) -> str:
    """The type of a file, that of a compressed one included: `.jsonl` of `rows.jsonl.gz`."""
    return Path(path.stem if path.suffix.lower() in _OPENERS else path.name).suffix.lower()


def read_file(path: Path, whole_text: bool) -> Iterator[Raw]:
    """Yields (where, columns) for every row of a file; an error in place of a broken row.

    Args:
        path: a file of one of `EXTENSIONS`, perhaps compressed.
        whole_text: a .txt file is one row. Otherwise its paragraphs (or its lines, where no blank line separates
            paragraphs) are the rows.

    Raises:
        DataError: unreadable or malformed.
    """
    kind = extension(path)
    with reading(path):
        yield from _read_txt(path, whole_text) if kind == ".txt" else _READERS[kind](path)


def _opened(path: Path, newline: str | None = None) -> IO[str]:
    """A text file, uncompressed as it is read."""
    open_bytes = _OPENERS.get(path.suffix.lower(), lambda path: path.open("rb"))
    return io.TextIOWrapper(open_bytes(path), encoding="utf-8-sig", newline=newline)


def _open_zip(path: Path) -> IO[bytes]:
    archive = zipfile.ZipFile(path)
    files = [entry for entry in archive.infolist() if not entry.is_dir() and not entry.filename.startswith("__MACOSX/")]
    if len(files) != 1:
        raise DataError(
            f"{path} holds {len(files)} files instead of one; unpack it and give a pattern such as rows/*.jsonl"
        )
    if files[0].flag_bits & 1:
        raise DataError(f"{path} is encrypted; unpack it and give the file in it")
    try:
        return archive.open(files[0])
    except NotImplementedError as error:
        raise DataError(f"{path} cannot be unpacked here ({error}); unpack it and give the file in it") from None


def _open_zst(path: Path) -> IO[bytes]:
    zstd = _zstd()
    if zstd is None:
        raise DataError(f"{path} needs a package that is missing here; run `pip install backports.zstd`")
    stream: IO[bytes] = zstd.ZstdFile(path)
    return stream


def _zstd() -> ModuleType | None:
    """Python's own module for zstd or its backport; `zstandard` would take a file that was cut off for a whole one."""
    try:
        return importlib.import_module("compression.zstd" if sys.version_info >= (3, 14) else "backports.zstd")
    except ImportError:
        return None


def _damage() -> tuple[type[Exception], ...]:
    """What is raised where a compressed file is damaged."""
    zstd = _zstd()
    return (EOFError, lzma.LZMAError, zipfile.BadZipFile, zlib.error, *([zstd.ZstdError] if zstd else []))


_OPENERS: dict[str, Callable[[Path], Any]] = {
    ".gz": gzip.open,
    ".bz2": bz2.open,
    ".xz": lzma.open,
    ".zst": _open_zst,
    ".zip": _open_zip,
}


@contextlib.contextmanager
def reading(path: Path) -> Iterator[None]:
    """Turns what is wrong with a file as a whole into one clear line.

    Raises:
        DataError: a pointer of Git LFS, not UTF-8, damaged, or not to be read.
    """
    try:
        check_not_pointer(path, DataError)
        yield
    except UnicodeDecodeError as error:
        raise DataError(f"{path} is not UTF-8 text ({error.reason} at byte {error.start}); convert it first") from None
    except OSError as error:
        raise DataError(f"cannot read {path}: {error.strerror or error}") from None
    except _damage() as error:
        raise DataError(f"{path} is damaged or not compressed as its name says: {error}") from None


def _read_txt(path: Path, whole_text: bool) -> Iterator[Raw]:
    with _opened(path) as stream:
        content = stream.read()
    if whole_text:
        yield str(path), {"text": content}
        return
    blocks = re.split(r"\n[ \t]*\n", content)
    blocks = blocks if len(blocks) > 1 else content.split("\n")
    for number, block in enumerate(blocks, 1):
        yield f"{path}, paragraph {number}", {"text": block.strip("\n")}


def _read_jsonl(path: Path) -> Iterator[Raw]:
    with _opened(path) as stream:
        for number, line in enumerate(stream, 1):
            if not line.strip():
                continue
            where = f"{path}, line {number}"
            try:
                row = _mapping(json.loads(line), where)
            except (ValueError, RecursionError) as error:
                row = RowError(f"{where} is not JSON ({error}); a .jsonl file has one object per line")
            yield where, row


def _read_json(path: Path) -> Iterator[Raw]:
    with _opened(path) as stream:
        content = stream.read()
    try:
        rows = json.loads(content) if content.strip() else []
    except (ValueError, RecursionError) as error:
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
    with _opened(path, newline="") as stream:
        reader = csv.DictReader(stream, strict=True)
        try:
            twice = sorted(name for name, count in Counter(reader.fieldnames or ()).items() if count > 1)
            if twice:
                raise DataError(f"{path} has more than one column '{twice[0]}'; rename the others")
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
                yield f"{path}, row {number}", without_gaps(row)
    except pyarrow.ArrowException as error:
        raise DataError(f"{path} is not a readable parquet file ({error})") from None


def without_gaps(row: dict[str, Any]) -> dict[str, Any]:
    """A row of a table without the nulls in its objects: there, each has every field that any row has."""
    return {name: _filled(value) for name, value in row.items()}


def _filled(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _filled(field) for name, field in value.items() if field is not None}
    return [_filled(item) for item in value] if isinstance(value, list) else value


_READERS: dict[str, Callable[[Path], Iterator[Raw]]] = {
    ".json": _read_json,
    ".jsonl": _read_jsonl,
    ".csv": _read_csv,
    ".parquet": _read_parquet,
}
