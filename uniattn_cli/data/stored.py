"""What is made of a data set once and kept on disk, in `datasets`' own cache (`HF_DATASETS_CACHE`), memory-mapped.

It is found again by a hash of everything that it depends on: the bytes of the files, the settings, the tokenizer, and
the code of this folder. Where any of it changes, it is made anew; what is older stays until its folder is removed.
"""

from __future__ import annotations

import atexit
import functools
import hashlib
import json
import os
import re
import shutil
import tempfile
import warnings
from collections.abc import Callable, Iterator, Sequence
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

from uniattn_cli.data.chat import ChatRenderer
from uniattn_cli.errors import DataError, DataWarning, UniAttnError

if TYPE_CHECKING:
    import datasets
    from transformers import PreTrainedTokenizerBase

PART = 10_000  # rows that one process takes at a time
MOST_PROCESSES = 16


def stored(
    key: Sequence[Any],
    generate: Callable[..., Iterator[dict[str, Any]]],
    features: dict[str, Any],
    *,
    parts: Sequence[Any] = (),
    workers: int = 1,
) -> datasets.Dataset:
    """The rows that `generate` yields, from disk if any process has made them before.

    Of several processes that ask at the same time one makes them, and the others wait for its lock on the disk, however
    long that takes: a barrier of torch would end them after some minutes. Where it fails, the next one tries.

    Args:
        key: everything that the rows depend on, as JSON; the code of this folder is added.
        generate: called without arguments, or with `parts`, a list of one of them, for each.
        features: of the columns.
        parts: what `workers` processes share.
        workers: at most so many processes; 1 is this one.

    Raises:
        DataError: the disk is full, or a process was ended; or as `generate` in this process.
    """
    import datasets
    from datasets.exceptions import DatasetGenerationError

    digest = hashlib.sha256(json.dumps([_rules(), *key]).encode()).hexdigest()[:32]
    folder = _writable(Path(datasets.config.HF_DATASETS_CACHE) / "uniattn")
    workers = min(workers, len(parts))
    try:
        return datasets.Dataset.from_generator(
            generate,
            features=datasets.Features(features),
            cache_dir=str(folder),
            gen_kwargs={"parts": list(parts)} if parts else {},
            num_proc=workers if workers > 1 else None,
            fingerprint=digest,
        )
    except (DatasetGenerationError, OSError) as error:
        told = _in_words(error, folder)
        if told is None:
            raise
        raise told from None
    except RuntimeError as error:
        if "abruptly died" not in str(error):
            raise
        raise DataError(
            f"a process that prepares rows was ended, perhaps for want of memory; set data.workers below {workers}"
        ) from None


@functools.cache
def _writable(folder: Path) -> Path:
    """The folder, or one that lasts as long as this process where nothing can be written there."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if os.access(folder, os.W_OK):
            return folder
    except OSError:
        pass  # said below
    warnings.warn(
        DataWarning(f"{folder} cannot be written to, so prepared rows are not kept; set HF_DATASETS_CACHE"),
        stacklevel=2,
    )
    made = tempfile.mkdtemp(prefix="uniattn-rows-")
    atexit.register(shutil.rmtree, made, ignore_errors=True)
    return Path(made)


def _in_words(error: Exception, folder: Path) -> UniAttnError | None:
    """What a user can do about an error while rows were made; None where that is nothing."""
    cause = error.__cause__ if isinstance(error.__cause__, Exception) else error
    if isinstance(cause, UniAttnError):
        return cause
    # Another process hands over no more than the text of its error.
    number = cause.errno if isinstance(cause, OSError) else next(iter(re.findall(r"\[Errno (\d+)\]", str(cause))), None)
    if number is None:
        return None
    return DataError(
        f"cannot write prepared rows into {folder}: {os.strerror(int(number))}; make room there, or set "
        "HF_DATASETS_CACHE to another folder"
    )


def parts_of(rows: datasets.Dataset) -> list[tuple[str, int, int, int]]:
    """Stored rows in parts: a file, the number of its first row in `rows`, and where in it the part begins and ends."""
    import datasets

    parts, before = [], 0
    for file in rows.cache_files:
        count = len(datasets.Dataset.from_file(file["filename"]))
        parts += [(file["filename"], before, start, min(start + PART, count)) for start in range(0, count, PART)]
        before += count
    return parts


def usual_workers() -> int:
    """Processes where the recipe leaves their number open: one for each core that this one may use."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return min(cores, MOST_PROCESSES)


def tokenizer_key(tokenizer: PreTrainedTokenizerBase) -> list[str]:
    """Identifies what a tokenizer makes of conversations: its template, its special tokens and everything it knows."""
    from datasets.fingerprint import Hasher

    known: Any = tokenizer
    if tokenizer.is_fast:
        # How the last call was cut and padded is there too, and says nothing of the next one.
        known = json.dumps(json.loads(tokenizer.backend_tokenizer.to_str()) | {"truncation": None, "padding": None})
    # The setting below is the one that the backend does not write down.
    names = [type(tokenizer).__name__, str(tokenizer.special_tokens_map), str(tokenizer.split_special_tokens)]
    versions = [metadata.version(name) for name in ("tokenizers", "transformers")]
    return [*versions, *names, ChatRenderer(tokenizer).template, Hasher.hash(known)]


@functools.cache
def _rules() -> str:
    """A hash of the code that decides what becomes of a row."""
    code = hashlib.sha256()
    for path in sorted(Path(__file__).parent.glob("*.py")):
        code.update(f"{path.name};".encode() + path.read_bytes())
    return code.hexdigest()
