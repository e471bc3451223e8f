"""Memory and time of the rows of `uniattn train`, from their file to the first optimiser step.

    python -m benchmarks.data --out docs/benchmarks/data.json

Chats of a given size are put together from Python's documentation; a tiny model with a tokenizer of 8,192 tokens is
trained on them for one step, in one process and in several that `torchrun` starts on one CPU. The first start finds an
empty cache, the second what the first has left there; further numbers of processes find it, too. Seconds are those from
the call of `train` until its rows are ready; memory is the most that any of the processes had, as the system counts it,
what of that was its own, and the most of any process that it started to share the work. Linux only.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import random
import resource
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from benchmarks import runner
from uniattn_cli.data import builtin
from uniattn_cli.options import RunOptions, Silent
from uniattn_cli.tables import Table

VOCABULARY = 8192
TEMPLATE = (
    "{% for m in messages %}<|{{ m['role'] }}|>{{ m['content'] }}{% if m['role'] == 'assistant' %}<eos>{% endif %}"
    "{% endfor %}{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
SPECIALS = ["<pad>", "<eos>", "<|user|>", "<|assistant|>"]
SMALL = (
    *("analysis.tokens=2048", "analysis.length=128", "conversion.tokens=2048", "conversion.length=128"),
    *("conversion.align=0", "conversion.refine=0", "evaluation.responses=8", "train.max_length=512"),
    "train.batch_size=8",
    "train.stages=[{trains: compensation, steps: 1}]",
)
# What `train` says when its rows are ready.
READY = "each optimiser step"


def make_model(folder: Path) -> None:
    """A random Llama of two layers, and a tokenizer that knows the words of the chats."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=VOCABULARY, special_tokens=SPECIALS, initial_alphabet=alphabet)
    tokenizer.train_from_iterator(builtin.text("train"), trainer)
    names = {"eos_token": "<eos>", "pad_token": "<pad>"}
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, chat_template=TEMPLATE, **names)
    sizes = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = LlamaConfig(vocab_size=len(fast), max_position_embeddings=1024, eos_token_id=1, pad_token_id=0, **sizes)
    LlamaForCausalLM(config).save_pretrained(folder)
    fast.save_pretrained(folder)


def chats(count: int, size: int, turns: int) -> Iterator[str]:
    """Lines of a .jsonl file, each a chat of so many questions and answers and of about `size` bytes."""
    words = " ".join(builtin.text("train")).split()
    chance = random.Random(0)
    for number in range(count):
        messages, room = [], (size - 20 - 90 * turns) // (2 * turns)
        for role in ("user", "assistant") * turns:
            start, text = chance.randrange(len(words) - room), f"{number}:"
            while len(text) < room:
                text, start = f"{text} {words[start]}", start + 1
            messages.append({"role": role, "content": text})
        yield json.dumps({"messages": messages}) + "\n"


def prepare(work: Path) -> None:
    """A run directory in which `train` can begin."""
    import uniattn_cli

    make_model(work / "model")
    with (work / "few.jsonl").open("w") as file:
        file.writelines(chats(200, 1024, 1))
    shared = {"run_dir": work, "options": RunOptions("cpu")}
    overrides = [*SMALL, f"data.train={work / 'few.jsonl'}"]
    uniattn_cli.analyze(str(work / "model"), overrides=overrides, **shared)
    uniattn_cli.convert(groups="every:2", **shared)


class Watch(Silent):
    """Notes when the rows are ready, and the most memory (KiB) that the process has, and that is its own."""

    def __init__(self) -> None:
        self.begun, self.seconds, self.peak, self.own = time.perf_counter(), 0.0, 0, 0
        threading.Thread(target=self._look, daemon=True).start()

    def note(self, text: str) -> None:
        if text.startswith(READY):
            self.seconds = time.perf_counter() - self.begun

    def _look(self) -> None:
        while True:
            found = dict(line.split(":") for line in Path("/proc/self/status").read_text().splitlines())
            self.peak, own = (int(found[name].split()[0]) for name in ("VmHWM", "RssAnon"))
            self.own = max(self.own, own)
            time.sleep(0.02)


def train(work: Path, rows: Path, extra: list[str]) -> None:
    """One process of a training; writes what it took."""
    from trl import SFTTrainer  # noqa: F401  # what takes its time in every command is not counted

    import uniattn_cli

    watch = Watch()
    overrides = [f"data.train={rows}", *extra]
    uniattn_cli.train(run_dir=work, overrides=overrides, options=RunOptions("cpu", force=True, progress=watch))
    workers = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss
    found = {"seconds": watch.seconds, "peak": watch.peak, "own": watch.own, "worker": workers}
    (work / f"rank-{os.environ.get('RANK', 0)}.json").write_text(json.dumps(found))


def measure(work: Path, rows: Path, processes: int, extra: list[str]) -> dict[str, Any]:
    """Starts a training and gathers what its processes took."""
    launch = [] if processes == 1 else ["-m", "torch.distributed.run", f"--nproc-per-node={processes}"]
    command = [sys.executable, *launch, "-m", "benchmarks.data", "--one", str(work), str(rows), *extra]
    environment = {**os.environ, "HF_DATASETS_CACHE": str(work / "cache"), "OMP_NUM_THREADS": "1"}
    subprocess.run(command, env=environment, check=True, stdout=subprocess.DEVNULL)
    found = [json.loads((work / f"rank-{rank}.json").read_text()) for rank in range(processes)]
    mebibytes = {name: round(max(each[name] for each in found) / 1024) for name in ("peak", "own", "worker")}
    return {"seconds": round(found[0]["seconds"], 1), **{f"{name}_mib": size for name, size in mebibytes.items()}}


def measure_all(arguments: argparse.Namespace, results: runner.Results) -> None:
    """All sizes and numbers of processes that were asked for."""
    results.begin({"size": arguments.size, "turns": arguments.turns, "cores": os.cpu_count(), "set": arguments.set})
    starts = itertools.product(arguments.rows, arguments.processes)
    names = {f"{count} x {processes}": (count, processes) for count, processes in starts}
    missing = results.missing("starts", names)
    if not missing:
        return
    with tempfile.TemporaryDirectory(dir=arguments.work) as folder:
        work = Path(folder)
        prepare(work)
        cached = 0
        for name in missing:
            count, processes = names[name]
            rows = work / f"{count}.jsonl"
            row: dict[str, Any] = {}
            if count != cached:
                with rows.open("w") as file:
                    file.writelines(chats(count, arguments.size, arguments.turns))
                shutil.rmtree(work / "cache", ignore_errors=True)
                row["first"], cached = measure(work, rows, processes, arguments.set), count
            row["second"] = measure(work, rows, processes, arguments.set)
            sizes = {"rows": rows.stat().st_size, "cache": sum(path.stat().st_size for path in work.rglob("*.arrow"))}
            results.add("starts", name, row | {f"{each}_megabytes": round(size / 1e6) for each, size in sizes.items()})


def markdown(content: runner.Content) -> str:
    """One line for each start."""
    table = []
    for name, row in content["starts"].items():
        count, processes = name.split(" x ")
        for start in [each for each in ("first", "second") if each in row]:
            found = row[start]
            sizes = [f"{found[f'{part}_mib']:,}" for part in ("peak", "own", "worker")]
            table.append([f"{int(count):,}", processes, start, f"{found['seconds']:,.1f}", *sizes])
    columns = ["chats", "processes", "start", "seconds", "peak MiB", "its own", "a worker's peak"]
    setting = content["setting"]
    return runner.page(
        "Rows of training",
        f"Chats of {setting['size']} bytes in turns of question and answer: {setting['turns']}; {setting['cores']} CPU "
        "cores, shared with other work; memory of the process that had most. "
        "Made by `benchmarks/data.py`.",
        Table("", columns, table),
    )


def add_options(parser: argparse.ArgumentParser) -> None:
    """The options of this benchmark."""
    parser.add_argument("--rows", type=int, nargs="+", default=[200, 60_000, 1_000_000])
    parser.add_argument("--processes", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--size", type=int, default=1024, help="bytes of a chat, about")
    parser.add_argument("--turns", type=int, default=1, help="questions and answers of a chat")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="setting of the recipe")
    parser.add_argument("--work", type=Path, help="where files go while it runs")


if __name__ == "__main__":
    if sys.argv[1:2] == ["--one"]:
        train(Path(sys.argv[2]), Path(sys.argv[3]), [each.removeprefix("--set=") for each in sys.argv[4:]])
    else:
        runner.run("data", __doc__, ("starts",), add_options, measure_all, device=False, markdown=markdown)
