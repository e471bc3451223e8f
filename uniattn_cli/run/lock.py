"""One process at a time in a run directory: a file there names the one at work.

Only one process can create the file, on network file systems too; filelock takes it over from a process that has died.
"""

from __future__ import annotations

import contextlib
import datetime
import functools
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import ParamSpec, TypeVar

from filelock import SoftFileLock, Timeout

from uniattn_cli.errors import StageError, UsageError
from uniattn_cli.run.files import file_errors, made

LOCK_FILE = ".uniattn.lock"
# Seconds: filelock watches a damaged file for two of them before it removes it, and a process may just be ending.
PATIENCE = 3.0

# Commands that the processes of a launcher share.
SHARED = ("analyze", "score", "train", "evaluate")

Parameters = ParamSpec("Parameters")
Answer = TypeVar("Answer")


def alone(command: Callable[Parameters, Answer]) -> Callable[Parameters, Answer]:
    """Decorates a command that writes into its `run_dir`: from reading its inputs on, no other one works there.

    A dry run writes nothing. Of the processes that a launcher starts, the main one stands for all; commands that share
    nothing refuse to run in several.
    """

    @functools.wraps(command)
    def locked(*args: Parameters.args, **kwargs: Parameters.kwargs) -> Answer:
        if command.__name__ not in SHARED and "RANK" in os.environ and os.environ.get("WORLD_SIZE", "1") != "1":
            raise UsageError(
                f"{command.__name__} works in one process; start it without a launcher ({', '.join(SHARED)} share work)"
            )
        if kwargs.get("dry_run") or os.environ.get("RANK", "0") != "0":
            return command(*args, **kwargs)
        with held(Path(str(kwargs.get("run_dir", ".")))):
            return command(*args, **kwargs)

    return locked


@contextlib.contextmanager
def held(root: Path) -> Iterator[None]:
    """Holds a run directory, which is made if it is missing.

    Raises:
        StageError: another process holds it, or it cannot be written to.
    """
    path = root.absolute() / LOCK_FILE
    with contextlib.ExitStack() as stack:
        with file_errors(root, making=True):
            stack.enter_context(made(root))
            try:
                stack.enter_context(SoftFileLock(path, timeout=PATIENCE))
            except (Timeout, PermissionError):
                # Permission is also denied where the file is another user's.
                if not path.exists():
                    raise
                raise StageError(_occupied(path)) from None
        yield


def _occupied(path: Path) -> str:
    """Who holds a run directory, and what to do about it."""
    who = "another process"
    with contextlib.suppress(OSError, ValueError):
        process, host, *_ = path.read_text(encoding="utf-8").splitlines()
        since = datetime.datetime.fromtimestamp(path.stat().st_mtime, datetime.timezone.utc)
        # filelock adds the namespace of the process where that is a container's.
        who += f" (process {int(process)} on {host.partition('?')[0]}, since {since.isoformat(timespec='seconds')})"
    return (
        f"{who} is at work in {path.parent}; wait until it ends or choose another run directory with -C DIR, or remove "
        f"{path} if it no longer runs"
    )
