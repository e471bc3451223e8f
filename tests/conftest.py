"""What all tests share: no network, quiet libraries, and the command as a function, here or in a process of its own."""

from __future__ import annotations

import contextlib
import gc
import io
import logging
import os
import subprocess
import sys
import tempfile
import warnings
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest
from filelock import FileLock

from uniattn_cli.__main__ import main, spin_briefly
from uniattn_cli.cli.guard import QUIET_ENVIRONMENT

ROOT = Path(__file__).resolve().parent.parent

# Before any test imports the libraries that read them.
spin_briefly()
for name, value in {**QUIET_ENVIRONMENT, "HF_HUB_OFFLINE": "1", "MPLBACKEND": "Agg"}.items():
    os.environ.setdefault(name, value)
# Scores of one test are not those of another.
os.environ["UNIATTN_CACHE"] = "off"
# Nor is what is made of their rows left on the machine.
_PREPARED = tempfile.TemporaryDirectory(prefix="uniattn-tests-")
os.environ["HF_DATASETS_CACHE"] = _PREPARED.name
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
# Test processes that run side by side are given a narrow terminal, in which tables would be wrapped.
os.environ.pop("COLUMNS", None)


# Files whose tests train, convert or evaluate.
LONG_FILES = {
    *("test_training", "test_distillation", "test_validation", "test_control", "test_synthesize", "test_every_setting"),
    *("test_pipeline", "test_evaluation", "test_quality", "test_choice", "test_search", "test_sweep", "test_bad_input"),
    *("test_local", "test_bench", "test_refine", "test_scores"),
}


def command() -> list[str]:
    """The installed command, or the module where the project is run from its sources."""
    script = Path(sys.executable).parent / "uniattn"
    return [str(script)] if script.is_file() else [sys.executable, "-m", "uniattn_cli"]


def run_here(
    *arguments: object, cwd: Path, env: dict[str, str] | None = None, stdin: str = ""
) -> subprocess.CompletedProcess[str]:
    """Runs the command in this process, which has already spent the seconds that the libraries' imports take.

    The entry point is that of the installed command; what it changes in this process is undone.
    """
    out, err = io.StringIO(), io.StringIO()
    before, silenced = dict(os.environ), logging.root.manager.disable
    with (
        pytest.MonkeyPatch.context() as patch,
        warnings.catch_warnings(),
        contextlib.redirect_stdout(out),
        contextlib.redirect_stderr(err),
    ):
        patch.chdir(cwd)
        patch.setattr(sys, "argv", ["uniattn", *map(str, arguments)])
        patch.setattr(sys, "stdin", io.StringIO(stdin))
        os.environ.update(env or {})
        try:
            code = main()
        except SystemExit as end:
            code = end.code
        finally:
            logging.disable(silenced)
            os.environ.clear()
            os.environ.update(before)
    return subprocess.CompletedProcess(arguments, code or 0, out.getvalue(), err.getvalue())


def run_process(
    *arguments: object, cwd: Path, env: dict[str, str] | None = None, stdin: str = ""
) -> subprocess.CompletedProcess[str]:
    """Runs the installed command in a process of its own; takes five seconds more."""
    return subprocess.run(
        [*command(), *map(str, arguments)],
        cwd=cwd,
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", **(env or {})},
        input=stdin,
        timeout=240,
        capture_output=True,
        text=True,
        check=False,
    )


@pytest.hookimpl(tryfirst=True)  # before tests are deselected by their marks
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Leaves to the slow tests what other families show, and sorts the others.

    Files with few tests that take long come first: a process that gets one last works alone while others wait.
    """
    for item in items:
        values = item.callspec.params if hasattr(item, "callspec") else {}
        if "entry" in values:
            from tiny import shown_by_others

            if shown_by_others(values["entry"], values.get("layout", values.get("name"))):
                item.add_marker(pytest.mark.slow)
    counts = Counter(item.path for item in items)
    items.sort(key=lambda item: (item.path.stem not in LONG_FILES, -counts[item.path]))


def pytest_collection_finish() -> None:
    """Spares the garbage collector the libraries, which stay: stages call it often, and it took half a second each."""
    gc.freeze()


@pytest.fixture(scope="session", autouse=True)
def one_thread() -> None:
    """Tiny matrices gain nothing from more, and test processes share the cores."""
    import torch

    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def tiny_runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What `tiny_run.make_runs` makes, once for all processes of a test session; to be read or copied."""
    root = tmp_path_factory.getbasetemp()
    folder = (root.parent if "PYTEST_XDIST_WORKER" in os.environ else root) / "tiny-runs"
    with FileLock(f"{folder}.lock"):
        if not (folder / "made").exists():
            from tiny_run import make_runs

            folder.mkdir()
            make_runs(folder)
            (folder / "made").touch()
    return folder


@pytest.fixture
def uniattn(tmp_path: Path) -> Callable[..., subprocess.CompletedProcess[str]]:
    """`uniattn("convert", "--dry-run", cwd=…, env={…})` runs the command, in an empty folder unless told otherwise."""

    def run(*arguments: object, cwd: Path = tmp_path, **others) -> subprocess.CompletedProcess[str]:
        return run_here(*arguments, cwd=cwd, **others)

    return run
