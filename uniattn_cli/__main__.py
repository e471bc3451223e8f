"""Entry point of the console script `uniattn` and of `python -m uniattn_cli`."""

from __future__ import annotations

import atexit
import getpass
import io
import os
import shutil
import sys
import tempfile
from typing import NoReturn


def main() -> None:
    """Runs the command line and exits with its code."""
    try:
        spin_briefly()
        open_streams()
        settle_in()
        from uniattn_cli.cli.app import app

        app(prog_name="uniattn")
    except KeyboardInterrupt:  # commands say more
        _end("interrupted", 130)
    except OSError as error:  # as above; help and versions have only a screen to fail on
        _end(f"cannot print: {error.strerror}", 1)


def _end(what: str, code: int) -> NoReturn:
    print(f"error: {what}", file=sys.stderr)
    # Nothing is left to say; whatever waits for a screen that takes nothing would be told as an error of its own.
    sys.stdout = None
    raise SystemExit(code)


def spin_briefly() -> None:
    """Has PyTorch's OpenMP threads sleep soon at a barrier; must run before PyTorch is loaded.

    They would spin, and beside other work on the same cores a training step takes three times as long. Whoever has set
    how they wait has their way.
    """
    if "OMP_WAIT_POLICY" not in os.environ:
        os.environ.setdefault("GOMP_SPINCOUNT", "1000")


def open_streams() -> None:
    """Has stdout replace what its encoding lacks (ASCII, Latin-1) instead of failing; stderr does so from the start.

    A stdin that is closed becomes one that is empty.
    """
    if sys.stdin is None:
        sys.stdin = open(os.devnull, encoding="utf-8")
    if isinstance(sys.stdout, io.TextIOWrapper) and sys.stdout.errors in ("strict", "surrogateescape"):
        sys.stdout.reconfigure(errors="replace")


def settle_in() -> None:
    """Gives a user that the system does not know, as containers have them, a home and a name while this process runs.

    Libraries ask for both to keep their caches, and fail or write into a folder called `~`; it must run before they are
    loaded. Plots are files here, and matplotlib fails on a name of a backend that it does not know.
    """
    os.environ["MPLBACKEND"] = "agg"
    if os.path.expanduser("~") == "~":
        home = tempfile.mkdtemp(prefix="uniattn-home-")
        atexit.register(shutil.rmtree, home, ignore_errors=True)
        os.environ["HOME"] = home
        if "HF_HOME" not in os.environ:
            print("note: no home directory is known, so downloads are not kept; set HOME or HF_HOME", file=sys.stderr)
    try:
        getpass.getuser()
    except (KeyError, OSError):  # the first before Python 3.13
        os.environ["USER"] = str(os.getuid())


if __name__ == "__main__":
    main()
