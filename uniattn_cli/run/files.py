"""Files of a run: errors of the disk, times and versions."""

from __future__ import annotations

import contextlib
import datetime
import errno
import platform
import re
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path

from safetensors import SafetensorError

from uniattn_cli.errors import StageError

VERSIONED = ("uniattn", "torch", "transformers", "trl", "datasets", "accelerate", "lm_eval", "peft")


@contextlib.contextmanager
def file_errors(root: Path) -> Iterator[None]:
    """Turns the file-system errors that a user can mend into one clear line.

    Raises:
        StageError: what could not be written, why, and the next step.
    """
    reasons = {
        errno.ENOSPC: "the disk is full; free some space and run the same command again",
        errno.EDQUOT: "the disk quota is used up; free some space and run the same command again",
        errno.EROFS: "the file system is read-only; choose another run directory with -C DIR",
        errno.EACCES: "permission denied; choose another run directory with -C DIR",
        errno.EPERM: "permission denied; choose another run directory with -C DIR",
        errno.ENOTDIR: "the run directory is not a directory",
    }
    try:
        yield
    except (OSError, SafetensorError) as error:
        number = _errno(error)
        if number not in reasons:
            raise
        place = getattr(error, "filename", None) or root.absolute()
        raise StageError(f"cannot write {place}: {reasons[number]}") from error


def _errno(error: OSError | SafetensorError) -> int | None:
    """The system's error number; safetensors writes files itself and tells it in words only."""
    if isinstance(error, OSError):
        return error.errno
    found = re.search(r"\(os error (\d+)\)", str(error))
    return int(found[1]) if found else None


def now() -> str:
    """The time in UTC, to the second, in ISO 8601."""
    return datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds")


def versions() -> dict[str, str]:
    """Versions of Python and of the packages that decide results."""
    found = {"python": platform.python_version()}
    for name in VERSIONED:
        with contextlib.suppress(metadata.PackageNotFoundError):
            found[name] = metadata.version(name)
    return found
