"""Scores that were found once, kept so that no run finds them again.

An entry is a file named by the hash of its key. The key holds everything that a score depends on: the bytes of the
model, what was asked and how, the versions of the libraries, this package's own code, dtype, attention backend and
device. What is not in the key cannot change a score; where anything in it changes, the entry is simply not found.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import json
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from uniattn_cli.errors import StageError
from uniattn_cli.models.hub import Source
from uniattn_cli.recipe.paths import at_home
from uniattn_cli.run.directory import REPORT_FILE, STAGE_FILE
from uniattn_cli.run.files import content_hash, read_json, versions, write_json

# A directory in place of the usual one, or `off`.
VARIABLE = "UNIATTN_CACHE"
OFF = ("off", "0", "")
SUFFIXES = (".json", ".safetensors", ".bin", ".gguf", ".py")
IGNORED_FILES = (STAGE_FILE, REPORT_FILE)


def cache_directory() -> Path | None:
    """Where scores are kept for all runs of a user; None where the user wants none or has no home.

    `$UNIATTN_CACHE`, or `uniattn/scores` in `$XDG_CACHE_HOME`, or in `~/.cache`.
    """
    chosen = os.environ.get(VARIABLE)
    if chosen is not None:
        return None if chosen.strip().lower() in OFF else at_home(chosen) / "scores"
    home = at_home(os.environ.get("XDG_CACHE_HOME") or "~/.cache")
    return home / "uniattn" / "scores" if home.is_absolute() else None


class ScoreStore:
    """Entries in one or several folders; the first is written to first, all are looked into.

    Args:
        folders: such as one of the run and one of the user; a folder that cannot be written to is left alone.

    Attributes:
        found: entries that were taken from a folder.
        made: entries that had to be made.
    """

    def __init__(self, folders: Sequence[Path]):
        self.folders = list(folders)
        self.found = self.made = 0

    def get(self, key: dict[str, Any], make: Callable[[], Any]) -> Any:
        """The value of a key, made and kept if no folder has it.

        Args:
            key: JSON; see the module.
            make: gives a value that JSON can hold without loss.
        """
        text = json.dumps(key, sort_keys=True)
        name = hashlib.sha256(text.encode()).hexdigest()[:40] + ".json"
        for folder in self.folders:
            value = _read(folder / name, text)
            if value is not None:
                self.found += 1
                self._write(name, text, value)
                return value
        value = make()
        self.made += 1
        self._write(name, text, value)
        return value

    def _write(self, name: str, text: str, value: Any) -> None:
        for folder in self.folders:
            if (folder / name).exists() and _read(folder / name, text) is not None:
                continue
            # A store that cannot be written to costs time, not results.
            with contextlib.suppress(OSError):
                folder.mkdir(parents=True, exist_ok=True)
                write_json(folder / name, {"key": text, "value": value})


def _read(path: Path, text: str) -> Any:
    """The value of an entry; None where it is not there, damaged, or of another key."""
    try:
        entry = read_json(path, "it is made again")
    except StageError:
        return None
    return entry.get("value") if entry.get("key") == text else None


def model_key(source: Source) -> str:
    """Identifies a model by every byte of its files; one on the hub by its commit."""
    return f"commit {source.fingerprint}" if source.on_hub else _content_hash(source.path.resolve())


def _content_hash(folder: Path) -> str:
    files = [path for path in sorted(folder.iterdir()) if path.is_file() and path.suffix in SUFFIXES]
    found = hashlib.sha256()
    for path in files:
        if path.name not in IGNORED_FILES:
            found.update(f"{path.name}:{content_hash(path)};".encode())
    return found.hexdigest()


@functools.cache
def environment_key() -> dict[str, Any]:
    """Versions of the libraries, and a hash of this package's code."""
    package = Path(__file__).resolve().parent.parent
    code = hashlib.sha256()
    for path in sorted(package.rglob("*.py")):
        code.update(f"{path.relative_to(package)};".encode() + path.read_bytes())
    return {"versions": versions(), "code": code.hexdigest()[:16]}


def device_key(device: Any) -> str:
    """The device as far as it decides the last digits: its type, and the model of a GPU."""
    import torch

    name = f" {torch.cuda.get_device_name(device)}" if device.type == "cuda" else ""
    return f"{device.type}{name}, {torch.get_num_threads() if device.type == 'cpu' else 0} threads"
