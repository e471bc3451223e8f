"""A server of vLLM that runs while something is measured, in a process of its own on a free port of this machine."""

from __future__ import annotations

import contextlib
import os
import re
import shlex
import signal
import socket
import subprocess
import time
import urllib.request
from collections.abc import Iterator, Sequence
from pathlib import Path

from uniattn_cli.errors import StageError

START_SECONDS = 1200
STOP_SECONDS = 60


@contextlib.contextmanager
def running(command: Sequence[str], log: Path) -> Iterator[str]:
    """Starts a server, waits until it is healthy, gives its address, and ends it and all that it started.

    Args:
        command: the server's command line, to which host and port are added.
        log: file for its output.

    Raises:
        StageError: it ended or did not become healthy in time, for the reason that its log gives.
    """
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    with log.open("wb") as output:
        process = subprocess.Popen(
            [*command, "--host=127.0.0.1", f"--port={port}"],
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    try:
        address = f"http://127.0.0.1:{port}"
        _wait(process, command, address, log)
        yield address
    finally:
        _stop(process)


def cache_of(log: Path) -> tuple[int, float]:
    """Tokens that the cache holds, and how many requests of full length at once, as vLLM logged them."""
    found = re.search(r"cache size: ([\d,]+) tokens, Maximum concurrency .*: ([\d.]+)x", _read(log))
    if found is None:
        raise StageError(f"{log}: vLLM did not say how many tokens its cache holds")
    return int(found[1].replace(",", "")), float(found[2])


def _wait(process: subprocess.Popen, command: Sequence[str], address: str, log: Path) -> None:
    deadline = time.monotonic() + START_SECONDS
    while time.monotonic() < deadline and process.poll() is None:
        try:
            with urllib.request.urlopen(f"{address}/health", timeout=5):
                return
        except OSError:
            time.sleep(0.5)
    what = f"did not start within {START_SECONDS} seconds" if process.poll() is None else "could not start"
    raise StageError(f"vLLM {what}: {reason(_read(log))}; to see all that it says, run {shlex.join(command)}")


def reason(text: str) -> str:
    """Of a program's output, the last line that names an error, or the last one."""
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    errors = [line for line in lines if re.search(r"\w*Error: ", line)]
    # Of what vLLM prints before the message, the process and the place in its code say nothing here.
    return re.sub(r"^.*?(\w*Error: )", r"\1", (errors or lines or ["no output"])[-1])[:300]


def _read(log: Path) -> str:
    return log.read_text(encoding="utf-8", errors="replace")


def _stop(process: subprocess.Popen) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGTERM)
    try:
        process.wait(STOP_SECONDS)
    except subprocess.TimeoutExpired:
        pass
    # Processes of its own that it left behind, too.
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()
