"""What all tests share: no network, quiet libraries, and the installed command as a function."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent

# Before any test imports the libraries that read them.
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
os.environ.setdefault("MPLBACKEND", "Agg")
# Scores of one test are not those of another.
os.environ["UNIATTN_CACHE"] = "off"
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
# Test processes that run side by side are given a narrow terminal, in which tables would be wrapped.
os.environ.pop("COLUMNS", None)


def command() -> list[str]:
    """The installed command, or the module where the project is run from its sources."""
    script = Path(sys.executable).parent / "uniattn"
    return [str(script)] if script.is_file() else [sys.executable, "-m", "uniattn_cli"]


@pytest.fixture(scope="session", autouse=True)
def one_thread() -> None:
    """Tiny matrices gain nothing from more, and test processes share the cores."""
    import torch

    torch.set_num_threads(1)


@pytest.fixture
def uniattn(tmp_path: Path) -> Callable[..., subprocess.CompletedProcess]:
    """`uniattn("convert", "--dry-run", cwd=…, env={…})` runs the command, in an empty folder unless told otherwise."""

    def run(*arguments: str, cwd: Path = tmp_path, env: dict | None = None, timeout: float = 240):
        environment = {**os.environ, "PYTHONPATH": str(ROOT), **(env or {})}
        return subprocess.run(
            [*command(), *map(str, arguments)],
            cwd=cwd,
            env=environment,
            timeout=timeout,
            capture_output=True,
            text=True,
            check=False,
        )

    return run
