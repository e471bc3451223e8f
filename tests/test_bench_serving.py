"""`uniattn bench --engine vllm` with a program that answers like vLLM's server, and a package like its benchmark."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
from conftest import run_here

# Serves /health and /metrics, logs what vLLM logs, and holds more tokens of a converted model.
SERVER = """
import http.server, os, pathlib, sys
options = dict(word.partition("=")[::2] for word in sys.argv if word.startswith("--"))
model = sys.argv[sys.argv.index("serve") + 1]
if "broken" in model:
    sys.exit("(EngineCore pid=7) ERROR 12-01 ValueError: no such model")
tokens = 1600 if "converted" in model else 1000
print(f"cache size: {tokens:,} tokens, Maximum concurrency for 200 tokens per request: {tokens / 200:.2f}x", flush=True)
pathlib.Path(os.environ["SEEN"]).open("a").write(" ".join(sys.argv[1:]) + "\\n")

class Handler(http.server.BaseHTTPRequestHandler):
    asked = 0
    def do_GET(self):
        self.send_response(200)
        self.end_headers()
        if self.path == "/metrics":
            Handler.asked += 3
            self.wfile.write(b'vllm:num_preemptions_total{engine="0"} %d.0\\n' % Handler.asked)
    def log_message(self, *arguments):
        pass

http.server.HTTPServer(("127.0.0.1", int(options["--port"])), Handler).serve_forever()
"""
# The part of vLLM's benchmark that is used: more load, more requests per second, up to what the cache holds.
LOADS = """
import os, pathlib, urllib.request

def add_cli_args(parser):
    for name in ("base-url", "model", "dataset-name", "percentile-metrics", "metric-percentiles"):
        parser.add_argument(f"--{name}")
    for name in ("trust-remote-code", "ignore-eos", "disable-tqdm"):
        parser.add_argument(f"--{name}", action="store_true")
    for name in ("random-input-len", "random-output-len", "max-concurrency", "num-prompts", "seed"):
        parser.add_argument(f"--{name}", type=int, required=True)
    for name in ("temperature", "random-range-ratio"):
        parser.add_argument(f"--{name}", type=float)

def main(arguments):
    assert urllib.request.urlopen(arguments.base_url + "/health").status == 200
    pathlib.Path(os.environ["SEEN"]).open("a").write(f"{arguments.num_prompts} {arguments.seed}\\n")
    rate = min(arguments.max_concurrency, 8 if "converted" in arguments.model else 5) / 2
    if "silent" in arguments.model:
        return {"completed": 0}
    return {
        "completed": arguments.num_prompts, "failed": 0, "request_throughput": rate,
        "output_throughput": rate * arguments.random_output_len,
        "p50_ttft_ms": 250.0, "p99_ttft_ms": 1500.0, "p50_tpot_ms": 12.5, "p99_tpot_ms": 20.0,
    }
"""
CONFIG = {"model_type": "llama", "num_hidden_layers": 2}


@pytest.fixture
def environment(tmp_path, monkeypatch) -> Path:
    """A folder with models, and vLLM's environment in it."""
    programs, package = tmp_path / "env" / "bin", tmp_path / "packages" / "vllm" / "benchmarks"
    programs.mkdir(parents=True), package.mkdir(parents=True)
    (package / "serve.py").write_text(LOADS)
    (tmp_path / "server.py").write_text(SERVER)
    for name, script in (("python", ""), ("vllm", f"{tmp_path / 'server.py'} ")):
        path = programs / name
        path.write_text(f'#!/bin/sh\nPYTHONPATH={tmp_path / "packages"} exec {sys.executable} {script}"$@"\n')
        path.chmod(0o755)
    for name in ("base", "converted", "broken", "silent"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text(json.dumps(CONFIG))
        (tmp_path / name / "model.safetensors").write_bytes(b"")
    monkeypatch.setenv("SEEN", str(tmp_path / "seen"))
    return tmp_path


def run(environment: Path, *arguments: object):
    program = environment / "env" / "bin" / "vllm"
    return run_here("bench", "--engine", "vllm", "--program", program, *arguments, cwd=environment)


def test_models_take_turns_and_are_sent_the_same_rising_loads(environment):
    options = ["--batch", "8,2", "--context", "100", "--new", "20", "--repeats", "2", "--cache", "1G"]
    done = run(environment, "./base", "./converted", *options, "--server-option=--enforce-eager", "--dtype=bfloat16")
    assert done.returncode == 0, done.stderr
    content = json.loads((environment / "bench" / "results.json").read_text())
    assert content["cache_tokens"] == {"./base": 1000, "./converted": 1600}
    assert content["max_concurrency"] == {"./base": 5.0, "./converted": 8.0}
    found = [(one["model"], one["round"], one["load"], one["requests_per_second"]) for one in content["loads"]]
    base = lambda index: [("./base", index, 2, 1.0), ("./base", index, 8, 2.5)]  # noqa: E731
    converted = lambda index: [("./converted", index, 2, 1.0), ("./converted", index, 8, 4.0)]  # noqa: E731
    assert found == [*base(0), *converted(0), *converted(1), *base(1)]
    assert {one["preemptions"] for one in content["loads"]} == {3}
    report = (environment / "bench" / "report.md").read_text()
    assert (
        "| ./converted |    100 |       8 |       4.00 |    1.60 |     80.0 |    0.25 / 1.50 |    12.5 / 20.0 |"
        in report
    )
    assert (environment / "bench" / "bench.png").read_bytes().startswith(b"\x89PNG")
    servers, loads = [], []
    for line in (environment / "seen").read_text().splitlines():
        (servers if line.startswith("serve ") else loads).append(line)
    assert len(servers) == 4
    for server in servers:
        assert "--kv-cache-memory-bytes=1G --max-model-len=184 --enforce-eager --dtype=bfloat16" in server
    # Four requests for each at once, other prompts in each load, the same ones for both models.
    assert loads == ["8 0", "32 1", "8 0", "32 1", "8 1000", "32 1001", "8 1000", "32 1001"]


def test_random_weights_of_a_known_shape(environment):
    options = ["--shape", "tiny", "--layers", "4", "--groups", "every:4", "--batch", "2", "--context", "100"]
    done = run(environment, *options)
    assert done.returncode == 0, done.stderr
    content = json.loads((environment / "bench" / "results.json").read_text())
    assert content["random"] == {"shape": "tiny", "groups": ["every:4"], "compensation": "auto", "layers": 4}
    assert list(content["cache_tokens"]) == ["base", "every:4"]
    servers = [line for line in (environment / "seen").read_text().splitlines() if line.startswith("serve ")]
    assert len(servers) == 2 and all("--load-format=dummy" in server for server in servers)
    # They are there only as long as they are served.
    assert not any(Path(server.split()[1]).exists() for server in servers)


@pytest.mark.parametrize(
    ("model", "message"),
    [
        ("./broken", "vLLM could not start: ValueError: no such model; to see all that it says, run "),
        ("./silent", "./silent: no request was answered at 1 requests of 512 tokens"),
    ],
)
def test_what_goes_wrong_is_said_in_one_line_and_leaves_nothing(model, message, environment):
    done = run(environment, model)
    assert done.returncode != 0
    [line] = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert message in line
    assert not (environment / "bench").exists() and not (environment / ".bench.partial").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--engine", "vllm", "--groups", "paper"], "--groups needs --shape"),
        (["--engine", "vllm", "--stock", "none"], "--stock is for --engine engine"),
        (["--cache", "4G"], "--cache is for --engine vllm"),
        (["--server-option=--enforce-eager"], "--server-option is for --engine vllm"),
    ],
)
def test_options_of_the_other_engine_are_refused(arguments, message, tmp_path):
    done = run_here("bench", *arguments, cwd=tmp_path)
    assert done.returncode != 0 and message in done.stderr
