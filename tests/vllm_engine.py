"""vLLM as the tests use it: the real server on loopback, and the engine alone."""

from __future__ import annotations

import contextlib
import gc
import http.client
import json
import multiprocessing
import os
import re
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch

ROOT = Path(__file__).resolve().parent.parent
# A cache of 64 MiB; vLLM's own threads are left unbound, because the machine has few cores and others use them too.
ENVIRONMENT = {
    "HF_HUB_OFFLINE": "1",
    "OMP_NUM_THREADS": "1",
    "PYTHONPATH": str(ROOT),
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "VLLM_NO_USAGE_STATS": "1",
}
CACHE_BYTES = 64 << 20
QUICK = ["--enforce-eager", f"--kv-cache-memory-bytes={CACHE_BYTES}", "--dtype=float32"]
PATIENCE = 420


def reference(
    directory: Path, prompts: list[list[int]], tokens: int, dtype: torch.dtype = torch.float32
) -> list[tuple[list[int], list[float]]]:
    """Greedy tokens and their log-probabilities as transformers computes them, with its own cache."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(
        directory, trust_remote_code=True, dtype=dtype, attn_implementation="eager"
    ).eval()
    found = []
    for prompt in prompts:
        ids, past, chosen, logprobs = torch.tensor([prompt]), None, [], []
        for _ in range(tokens):
            with torch.no_grad():
                output = model(ids, past_key_values=past, use_cache=True, logits_to_keep=1)
            scores, past = output.logits[0, -1].log_softmax(-1), output.past_key_values
            chosen.append(int(scores.argmax()))
            logprobs.append(float(scores.max()))
            ids = torch.tensor([chosen[-1:]])
        found.append((chosen, logprobs))
    return found


@dataclass(frozen=True)
class Outcome:
    """What the engine did.

    Attributes:
        outputs: per load, greedy tokens and their log-probabilities of each prompt.
        blocks: blocks of the cache.
        tokens: tokens that it holds, by the engine's own account.
        concurrency: requests of full length that fit at once, likewise.
        counters: the engine's metrics by name.
    """

    outputs: list[list[tuple[list[int], list[float]]]]
    blocks: int
    tokens: int
    concurrency: float
    counters: dict[str, float]


class Engine:
    """vLLM's engine in one process of its own, which imports it once; models come and go in it.

    Not in the test's process, because vLLM changes classes of transformers in place.
    """

    def __init__(self):
        self.pool: ProcessPoolExecutor | None = None

    def run(
        self,
        directory: Path,
        *loads: tuple[list[list[int]], int],
        plugin: bool = True,
        obstacles: list[str] | None = None,
        **options: Any,
    ) -> Outcome:
        """Serves loads of (prompts, tokens), one after the other, with chunked prefill and prefix caching.

        Args:
            plugin: with uniattn's plugin; without it as if it had stepped aside.
            obstacles: what the plugin is to find in the settings; None: what it does find.
            options: further arguments of vLLM's `LLM`.
        """
        return self.call(_run, directory, loads, plugin, obstacles, options)

    def call(self, function: Callable, *arguments: Any) -> Any:
        """Calls a function in the engine's process; if that ends, a new one is started the next time."""
        if self.pool is None:
            self.pool = ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn"))
        try:
            return self.pool.submit(function, *arguments).result()
        except BrokenProcessPool:
            self.close()
            raise

    def close(self) -> None:
        if self.pool is not None:
            self.pool.shutdown()
        self.pool = None


def obstacles_of(**changes: Any) -> list[str]:
    """What the plugin finds in an engine's settings, of which these are not the usual ones; `__` parts their names."""
    from uniattn_cli.serving.vllm_model import obstacles

    usual = {
        "parallel_config__pipeline_parallel_size": 1,
        "parallel_config__prefill_context_parallel_size": 1,
        "parallel_config__decode_context_parallel_size": 1,
        "parallel_config__use_ubatching": False,
        "cache_config__cache_dtype": "auto",
        "cache_config__kv_cache_dtype_skip_layers": [],
        "cache_config__kv_sharing_fast_prefill": False,
        "kv_transfer_config": None,
        "speculative_config": None,
        "additional_config": {},
        "use_v2_model_runner": False,
    }
    config = SimpleNamespace(parallel_config=SimpleNamespace(), cache_config=SimpleNamespace())
    for name, value in (usual | changes).items():
        owner, _, field = name.rpartition("__")
        setattr(getattr(config, owner) if owner else config, field, value)
    return obstacles(config)


def obstacles_of_an_untried_pair() -> list[str]:
    """The same for a release on a device where nobody has tried it."""
    from uniattn_cli.serving import vllm_plugin

    with mock.patch.dict(vllm_plugin.TESTED, clear=True):
        return obstacles_of()


def _run(directory: Path, loads: Sequence, plugin: bool, obstacles: list[str] | None, options: dict) -> Outcome:
    os.environ.update(ENVIRONMENT, VLLM_ENABLE_V1_MULTIPROCESSING="0")
    from huggingface_hub.errors import StrictDataclassError
    from vllm import LLM, ModelRegistry, plugins
    from vllm.distributed.parallel_state import cleanup_dist_env_and_memory

    settings = {
        "trust_remote_code": True,
        "dtype": "float32",
        "enforce_eager": True,
        "distributed_executor_backend": "uni",
        "kv_cache_memory_bytes": CACHE_BYTES,
        "max_model_len": 256,
        "max_num_batched_tokens": 64,
        "enable_prefix_caching": True,
        "disable_log_stats": False,
    }
    plugins.load_general_plugins()
    ours = [name for name in ModelRegistry.models if name.startswith("UniAttn")]
    assert ours, "the plugin is not installed in this environment"
    taken = {} if plugin else {name: ModelRegistry.models.pop(name) for name in ours}
    from uniattn_cli.serving import vllm_model

    found = vllm_model.obstacles if obstacles is None else lambda vllm_config: obstacles
    llm = None
    try:
        with mock.patch.object(vllm_model, "obstacles", found):
            llm = LLM(str(directory), **settings | options)
        return _served(llm, loads)
    except StrictDataclassError as error:
        raise ValueError(str(error)) from None  # of a configuration; cannot be pickled itself
    finally:
        ModelRegistry.models.update(taken)
        del llm
        gc.collect()
        cleanup_dist_env_and_memory()


def _served(llm: Any, loads: Sequence) -> Outcome:
    """Runs the loads; what the engine says about itself."""
    from vllm import SamplingParams

    outputs = []
    for prompts, tokens in loads:
        sampling = SamplingParams(temperature=0, max_tokens=tokens, logprobs=0, ignore_eos=True)
        done = llm.generate([{"prompt_token_ids": prompt} for prompt in prompts], sampling, use_tqdm=False)
        choices = [output.outputs[0] for output in done]
        outputs.append([(list(c.token_ids), _chosen(c)) for c in choices])
    cache = llm.llm_engine.vllm_config.cache_config
    counters = {m.name.removeprefix("vllm:"): m.value for m in llm.get_metrics() if hasattr(m, "value")}
    return Outcome(outputs, cache.num_gpu_blocks, cache.kv_cache_size_tokens, cache.kv_cache_max_concurrency, counters)


def _chosen(completion: Any) -> list[float]:
    return [scores[i].logprob for i, scores in zip(completion.token_ids, completion.logprobs, strict=True)]


class Server:
    """The server that `uniattn serve` (or another command) starts, on a free port of this machine.

    Args:
        directory: what is served.
        arguments: further arguments of the engine.
        log: file for its output.
        environment: further variables.
        port: take this port instead of a free one.
        program: the command up to the directory.
    """

    def __init__(
        self,
        directory: Path,
        *arguments: str,
        log: Path,
        environment: dict | None = None,
        port: int | None = None,
        program: tuple[str, ...] = (sys.executable, "-m", "uniattn_cli", "serve"),
    ):
        self.port = port or free_port()
        self.log = log
        self.model = str(directory)
        command = [*program, str(directory), "--port", str(self.port), "--host=127.0.0.1", *arguments]
        with log.open("ab") as output:
            self.process = subprocess.Popen(
                command,
                stdout=output,
                stderr=subprocess.STDOUT,
                env={**os.environ, **ENVIRONMENT, **(environment or {})},
                start_new_session=True,
            )

    def __enter__(self) -> Server:
        return self

    def __exit__(self, *_) -> None:
        self.stop()

    def wait(self) -> Server:
        """Waits until the server is healthy; fails with the end of its log if it is not in time."""
        deadline = time.monotonic() + PATIENCE
        while time.monotonic() < deadline:
            if self.process.poll() is not None:
                raise AssertionError(f"the server ended with {self.process.returncode}:\n{self.tail()}")
            with contextlib.suppress(OSError):
                if self.request("/health")[0] == 200:
                    return self
            time.sleep(1)
        raise AssertionError(f"the server is not healthy after {PATIENCE} seconds:\n{self.tail()}")

    def tail(self) -> str:
        return self.log.read_text(encoding="utf-8", errors="replace")[-4000:]

    def stop(self, how: int = signal.SIGTERM) -> None:
        """Ends the server and whatever it started."""
        if self.process.poll() is None:
            os.killpg(self.process.pid, how)
            with contextlib.suppress(subprocess.TimeoutExpired):
                self.process.wait(60)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()

    def request(self, path: str, body: dict | bytes | None = None, timeout: float = 300) -> tuple[int, Any]:
        """Status and answer, read as JSON where it is."""
        data = json.dumps(body).encode() if isinstance(body, dict) else body
        request = urllib.request.Request(
            f"http://127.0.0.1:{self.port}{path}", data, {"Content-Type": "application/json"}
        )
        try:
            with urllib.request.urlopen(request, timeout=timeout) as answer:
                status, content = answer.status, answer.read()
        except urllib.error.HTTPError as error:
            status, content = error.code, error.read()
        try:
            return status, json.loads(content)
        except ValueError:
            return status, content.decode()

    def complete(self, prompt: str | list[int], tokens: int) -> dict:
        """Greedy completion with log-probabilities; the first choice."""
        body = {"model": self.model, "prompt": prompt, "max_tokens": tokens, "temperature": 0, "logprobs": 0}
        status, answer = self.request("/v1/completions", body | {"ignore_eos": True, "return_token_ids": True})
        assert status == 200, answer
        return answer["choices"][0]

    def killed_while_answering(self, prompt: str, tokens: int) -> bytes:
        """Kills the server after the first piece of a streamed answer; what still arrived of it, if anything."""
        body = {"model": self.model, "prompt": prompt, "max_tokens": tokens, "ignore_eos": True, "stream": True}
        request = urllib.request.Request(
            f"http://127.0.0.1:{self.port}/v1/completions",
            json.dumps(body).encode(),
            {"Content-Type": "application/json"},
        )
        with urllib.request.urlopen(request, timeout=300) as answer:
            assert answer.readline().startswith(b"data: {")
            self.stop(signal.SIGKILL)
            try:
                return answer.read()
            except http.client.IncompleteRead as error:
                return error.partial
            except OSError:
                return b""

    def metric(self, name: str) -> float:
        """A counter that the server publishes."""
        _, text = self.request("/metrics")
        return sum(float(value) for value in re.findall(rf"^vllm:{name}(?:{{.*}})? (\S+)$", text, re.MULTILINE))

    def cache(self) -> tuple[int, float]:
        """Tokens that the cache holds, and requests of full length at once, as the engine logged them."""
        found = re.search(r"KV cache size: ([\d,]+) tokens, Maximum concurrency .*: ([\d.]+)x", self.log.read_text())
        return int(found[1].replace(",", "")), float(found[2])


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]
