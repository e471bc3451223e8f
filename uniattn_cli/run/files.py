"""Files of a run: whole or not at all when written, checked when read; errors of the disk, times and versions."""

from __future__ import annotations

import contextlib
import dataclasses
import datetime
import errno
import functools
import hashlib
import json
import os
import platform
import re
import shutil
from collections.abc import Callable, Iterator
from importlib import metadata
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from uniattn_cli.errors import StageError, UniAttnError
from uniattn_cli.recipe.files import write_whole

# A clone without Git LFS has such a text in the place of each large file.
LFS_POINTER = b"version https://git-lfs.github.com/spec/"
BLOCK = 1 << 22
VERSIONED = ("uniattn", "torch", "transformers", "trl", "datasets", "accelerate", "lm_eval", "peft")


@contextlib.contextmanager
def file_errors(
    root: Path, *, making: bool = False, instead: str = "choose another run directory with -C DIR"
) -> Iterator[None]:
    """Turns file-system errors that a user can fix into one clear line.

    Args:
        root: what the line names where the error names nothing.
        making: nothing is read inside, so that a missing file is one that the file system does not let be made.
        instead: where else it could be written; ends the line.

    Raises:
        StageError: what could not be read or written, why, and the next step.
    """
    anywhere = {
        errno.ENAMETOOLONG: "a name this long is no path here",
        errno.EISDIR: "a folder is in the place of a file; move it away and run the same command again",
        errno.EMFILE: "too many open files; raise the limit (ulimit -n) and run the same command again",
        errno.EEXIST: "something else has this name; move it away and run the same command again",
        errno.ELOOP: "a link leads back to itself; remove it and run the same command again",
        errno.EIO: "the device reports an error; look at the disk or the mount and run the same command again",
    }
    reasons = {
        errno.ENOSPC: "the disk is full; free some space and run the same command again",
        errno.EDQUOT: "the disk quota is exceeded; free some space and run the same command again",
        errno.EFBIG: "files may not be that large here; raise the limit (ulimit -f) and run the same command again",
        errno.EROFS: f"the file system is read-only; {instead}",
        errno.EACCES: f"permission denied; {instead}",
        errno.EPERM: f"permission denied; {instead}",
        errno.ENOTDIR: f"a file is in the place of a folder; {instead}",
    }
    if making:
        reasons[errno.ENOENT] = f"nothing can be made there; {instead}"
    try:
        yield
    except (OSError, SafetensorError) as error:
        number = _errno(error)
        place = getattr(error, "filename", None) or root.absolute()
        if number in reasons:
            raise StageError(f"cannot write {place}: {reasons[number]}") from error
        if number in anywhere:
            raise StageError(f"{place}: {anywhere[number]}") from error
        raise


def _errno(error: OSError | SafetensorError) -> int | None:
    """The system's error number; safetensors writes files itself and tells it in words only."""
    if isinstance(error, OSError):
        return error.errno
    found = re.search(r"\(os error (\d+)\)", str(error))
    return int(found[1]) if found else None


@contextlib.contextmanager
def made(folder: Path) -> Iterator[None]:
    """Makes a folder if it is missing; what was made is removed again if nothing was written into it.

    Raises:
        OSError: it cannot be made, or is a file.
    """
    if folder.is_file():
        raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR), str(folder))
    missing = [each for each in (folder, *folder.parents) if not each.exists()]
    if missing:
        folder.mkdir(parents=True, exist_ok=True)
    try:
        yield
    finally:
        with contextlib.suppress(OSError):
            for each in missing:
                each.rmdir()


def taken(path: Path) -> bool:
    """Whether something has this name, be it a link that leads nowhere."""
    return path.exists() or path.is_symlink()


def remove(path: Path) -> None:
    """Removes a file or a folder; of a link, only the link."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink()


@contextlib.contextmanager
def written(
    folder: Path,
    errors: Callable[..., contextlib.AbstractContextManager[None]],
    *,
    resume: bool = False,
    keep: Callable[[Path], bool] = lambda partial: False,
) -> Iterator[Path]:
    """Gives a hidden folder to fill; on success it becomes `folder`, and what was there is replaced.

    Args:
        folder: its parent is made, too, and removed again if nothing comes into it.
        errors: `file_errors` for this place; called with `making=True` where nothing is read.
        resume: go on with what an earlier failure left in the hidden folder.
        keep: after a failure, whether what is in the hidden folder is worth keeping.

    Raises:
        StageError: the folder cannot be made or filled, as `errors` says.
    """
    partial = hidden(folder)
    with contextlib.ExitStack() as stack:
        with errors(making=True):
            stack.enter_context(made(folder.parent))
            if taken(partial) and not resume:
                remove(partial)
            partial.mkdir(exist_ok=True)
        try:
            with errors():
                yield partial
            with errors(making=True):
                if taken(folder):
                    remove(folder)
                partial.rename(folder)
        finally:
            # It is still there only after a failure.
            if not keep(partial):
                shutil.rmtree(partial, ignore_errors=True)


def hidden(folder: Path) -> Path:
    """Where `written` has a folder until it is whole."""
    return folder.with_name(f".{folder.name}.partial")


def write_json(path: Path, content: Any, *, finite: bool = True) -> None:
    """Writes a JSON file as a whole or not at all.

    Args:
        content: what JSON knows, and dataclasses, which become objects.
        finite: refuse NaN and infinity, which JSON does not have; without, Python alone can read them.

    Raises:
        ValueError: there is such a number.
    """
    text = json.dumps(content, indent=1, ensure_ascii=False, allow_nan=not finite, default=dataclasses.asdict)
    write_whole(path, text + "\n")


def check_not_pointer(path: Path, error: type[UniAttnError]) -> None:
    """Refuses a file that Git LFS has not fetched yet, that the user may not read, or that is a link to none.

    Args:
        path: a file that exists, or a link.
        error: class of the error.

    Raises:
        UniAttnError: of the class `error`; names the file, and the command that fetches it.
    """
    try:
        with path.open("rb") as stream:
            start = stream.read(len(LFS_POINTER))
    except PermissionError:
        raise error(f"{path} cannot be read: permission denied") from None
    except FileNotFoundError:
        if not path.is_symlink():
            raise
        raise error(f"{path} is a link to a file that is missing ({path.readlink()}); copy both again") from None
    if start == LFS_POINTER:
        raise error(f"{path} is a pointer of Git LFS, not the file itself; run `git lfs pull` in {path.parent}")


def read_json(path: Path, next_step: str, error: type[UniAttnError] = StageError) -> dict[str, Any]:
    """The object that a JSON file holds.

    Args:
        next_step: what the user can do where it cannot be read; ends the message.
        error: class of the error.

    Raises:
        UniAttnError: of the class `error`; the file is missing, unreadable, or holds something else.
    """
    try:
        check_not_pointer(path, error)
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise error(f"{path} is missing; {next_step}") from None
    except (OSError, ValueError, RecursionError) as reason:
        raise error(f"{path} is damaged ({reason}); {next_step}") from None
    if not isinstance(content, dict):
        raise error(f"{path} is damaged (a {type(content).__name__}, not an object); {next_step}")
    return content


def content_hash(path: Path) -> str:
    """Identifies the bytes of a file; they are read again whenever its size, time or inode has changed."""
    state = path.stat()
    return _hash_file(path.resolve(), (state.st_size, state.st_mtime_ns, state.st_ino))


@functools.lru_cache(maxsize=256)
def _hash_file(path: Path, state: tuple[int, int, int]) -> str:
    # Kept for this process only: one file is asked for many times.
    found = hashlib.blake2b(digest_size=20)
    with path.open("rb") as stream:
        while block := stream.read(BLOCK):
            found.update(block)
    return found.hexdigest()


def read_lines(path: Path) -> list[dict[str, Any]]:
    """The objects of a file with one in each line; what is none, as a line that was cut off, is left out."""
    found = []
    for line in path.read_bytes().splitlines():
        with contextlib.suppress(ValueError, RecursionError):
            found.append(json.loads(line))
    return [entry for entry in found if isinstance(entry, dict)]


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
