"""One process at a time in a run directory, and nothing in the way after one that was killed."""

from __future__ import annotations

import os
import re
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest

import uniattn_cli
from uniattn_cli.errors import StageError, UsageError
from uniattn_cli.run import lock
from uniattn_cli.run.lock import LOCK_FILE, alone, held

WRITES = ["analyze", "group", "convert", "train", "evaluate", "compare", "synthesize", "sweep", "bench"]


@pytest.fixture(autouse=True)
def impatient(monkeypatch):
    monkeypatch.setattr(lock, "PATIENCE", 0)


@pytest.mark.parametrize("name", WRITES)
def test_a_command_leaves_a_directory_alone_in_which_another_process_works(name, tmp_path):
    (tmp_path / "recipe.yaml").write_text("model: {name: m}\n")
    arguments = [["a", "b"]] if name == "compare" else []
    who = rf"process {os.getpid()} on {re.escape(socket.gethostname())}, since \d{{4}}-\d\d-\d\dT\S+\+00:00"
    what = rf"wait until it ends or .* -C DIR, or remove {tmp_path / LOCK_FILE} if it no longer runs"
    with (
        held(tmp_path),
        pytest.raises(StageError, match=rf"^another process \({who}\) is at work in {tmp_path}; {what}$"),
    ):
        getattr(uniattn_cli, name)(*arguments, run_dir=tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["recipe.yaml"]


def test_who_was_killed_is_not_in_the_way(tmp_path):
    code = (
        "import os, signal, sys; from pathlib import Path; from uniattn_cli.run.lock import held\n"
        "with held(Path(sys.argv[1])): os.kill(os.getpid(), signal.SIGKILL)"
    )
    root = os.path.dirname(os.path.dirname(uniattn_cli.__file__))
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path)], cwd=root, check=False)
    assert done.returncode == -signal.SIGKILL and (tmp_path / LOCK_FILE).exists()
    with held(tmp_path):
        assert str(os.getpid()) in (tmp_path / LOCK_FILE).read_text()
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("record", "who"),
    [
        ("123\nelsewhere\n", r"another process \(process 123 on elsewhere, since .*\) is at work"),
        ("123\nelsewhere?pidns-f00\n99\n", r"another process \(process 123 on elsewhere, since .*\) is at work"),
        ("", r"another process is at work"),
    ],
)
def test_whether_a_process_elsewhere_still_runs_is_for_the_user_to_say(record, who, tmp_path):
    (tmp_path / LOCK_FILE).write_text(record)
    with (
        pytest.raises(StageError, match=rf"^{who}.*remove {tmp_path / LOCK_FILE} if it no longer runs$"),
        held(tmp_path),
    ):
        pass
    assert (tmp_path / LOCK_FILE).read_text() == record


def test_a_dry_run_and_the_other_processes_of_a_launcher_go_on(tmp_path, monkeypatch):
    @alone
    def command(*, run_dir, dry_run=False):
        return sorted(path.name for path in run_dir.iterdir())

    assert command(run_dir=tmp_path) == [LOCK_FILE]
    assert command(run_dir=tmp_path, dry_run=True) == []
    with held(tmp_path):
        assert command(run_dir=tmp_path, dry_run=True) == [LOCK_FILE]
        monkeypatch.setenv("RANK", "1")
        assert command(run_dir=tmp_path) == [LOCK_FILE]
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(UsageError, match="command works in one process; start it without a launcher"):
        command(run_dir=tmp_path)


def test_a_directory_that_was_made_goes_again_unless_something_was_written(tmp_path):
    with held(tmp_path / "some" / "run"):
        assert (tmp_path / "some" / "run" / LOCK_FILE).is_file()
    assert not list(tmp_path.iterdir())
    with held(tmp_path / "some" / "run"):
        (tmp_path / "some" / "run" / "recipe.yaml").touch()
    assert [path.name for path in (tmp_path / "some" / "run").iterdir()] == ["recipe.yaml"]


def test_a_file_is_no_run_directory(tmp_path):
    (tmp_path / "run").touch()
    with pytest.raises(StageError, match=r"^cannot write .*run: a file is in the place of a folder; choose another"):
        uniattn_cli.convert(run_dir=tmp_path / "run")


@pytest.mark.skipif(not Path("/proc/self").exists(), reason="this system has no file system that makes nothing")
def test_a_folder_that_takes_no_lock_is_no_run_directory():
    with pytest.raises(StageError, match=r"nothing can be made there; choose another run directory with -C DIR$"):
        uniattn_cli.convert(run_dir="/proc/self/fdinfo")
