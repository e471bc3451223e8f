"""`make demo`: the whole pipeline on a small real model, in a fresh run directory under demo/, each command timed.

With DEMO_SHORT=1 in the environment they work on very little data; the figures mean nothing then.
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import shutil
import subprocess
import sys
import textwrap
import time
from dataclasses import dataclass
from pathlib import Path

from fetch_demo_model import MODELS

ROOT = Path(__file__).resolve().parent.parent
FOLDER = ROOT / "demo"
WIDTH = 100


@dataclass(frozen=True)
class Step:
    """One of the commands.

    Attributes:
        command: what is run, in the run directory.
        does: what that is good for.
        start: seconds until it begins to calculate, about the same everywhere.
        work: billions of multiplications, in products of large matrices, that take as long as what it calculates.
    """

    command: str
    does: str
    start: float
    work: float


STEPS = {
    "analyze": Step(
        "uniattn analyze ../{directory} --recipe ../../recipes/quick.yaml {more}",
        "compares the attention maps of all layers",
        start=6,
        work=1900,
    ),
    "convert": Step(
        "uniattn convert --groups auto",
        "lets some layers borrow the keys of earlier ones, and fits them",
        start=6,
        work=4150,
    ),
    "train": Step(
        "uniattn train recipe.yaml", "trains the converted model on questions about Python", start=10, work=8400
    ),
    "control": Step(
        "uniattn train recipe.yaml --control", "trains the base likewise, for a fair comparison", start=10, work=8500
    ),
    "eval": Step("uniattn eval", "scores all models on the same items", start=6, work=3800),
}
RUNS = {"smollm2-135m-instruct": "run", "gemma3-270m": "run-gemma3-270m"}
# What `analyze` writes into the recipe, so that the other commands are the documented ones; the recipe's learning rate
# spoils Gemma in a few steps.
OWN = {"gemma3-270m": "--set train.stages='[{trains: all, steps: 16, learning_rate: 2.0e-5}]'"}
SHORT = (
    "--tokens 512 --length 256 --set data.train='[{source: builtin, limit: 96}]' "
    "--set conversion.tokens=1024 --set conversion.length=256 --set conversion.align=5 --set conversion.refine=2 "
    "--set train.stages='[{trains: all, steps: 2, learning_rate: 2.0e-5}]' --set train.batch_size=4 "
    "--set evaluation.tokens=1024 --set evaluation.length=256 --set evaluation.responses=8 "
    "--set evaluation.samples=1 --set evaluation.sample_tokens=8"
)
GO_ON = """\
Beside the base, `trained` has learned from its training; what sharing costs is its difference from the control.
Neither says what is lost in longer answers: tasks take hundreds of items (evaluation.tasks).

Longer runs: the default kind of layer at 80 % of the KV bytes, refined for longer and distilled on two million tokens,
leaves this model 0.065 nats behind its control (docs/benchmarks/README.md).

Go on:
  {page}
      in a browser: all of it, with charts, layouts and answers
  .venv/bin/uniattn chat trained --beside base -C {run}
      talk to both
  docs/index.md
      your own model and data"""


def main() -> None:
    """Fetches the model, says what comes, runs the commands, says what came out."""
    # The line buffer keeps our lines in order with those of the commands when the output is a file.
    sys.stdout.reconfigure(line_buffering=True)
    short = os.environ.get("DEMO_SHORT", "0") not in ("", "0")
    model = arguments().model
    call([sys.executable, str(ROOT / "scripts" / "fetch_demo_model.py"), str(FOLDER), "--model", model], ROOT)
    run = FOLDER / RUNS[model]
    shutil.rmtree(run, ignore_errors=True)
    run.mkdir(parents=True)
    announce(run, MODELS[model].directory, short=short or model != next(iter(MODELS)))
    more, took = SHORT if short else OWN.get(model, ""), {}
    for verb, step in STEPS.items():
        command = step.command.format(directory=MODELS[model].directory, more=more).strip()
        print(f"\n$ {command}")
        took[verb] = call(shlex.split(command), run)
        print(f"({verb}: {took[verb]:.0f} s)")
    conclude(run, took, "The verdict, on too little data to mean anything" if short else "The verdict")


def arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", choices=MODELS, default=next(iter(MODELS)))
    return parser.parse_args()


def announce(run: Path, model: str, *, short: bool) -> None:
    """Says what the commands do and, where it is known, how long that takes on this machine."""
    rate = None if short else products_per_second()
    seconds = {verb: step.start + step.work / rate for verb, step in STEPS.items()} if rate else {}
    together = f", about {duration(sum(seconds.values()))} on this machine as busy as it is now" if seconds else ""
    print(f"\nFive commands on {model}, in {run.relative_to(ROOT)}{together}:")
    for verb, step in STEPS.items():
        print(f"  {verb:8} {duration(seconds[verb]) if seconds else '':>7}   {step.does}")


def products_per_second() -> float:
    """Billions of multiplications per second in a product of two matrices, with what else the machine does now."""
    import torch

    matrix = torch.rand(1024, 1024)
    matrix @ matrix
    count, started = 0, time.monotonic()
    while time.monotonic() - started < 2:
        matrix @ matrix
        count += 1
    return count * 1024**3 / 1e9 / (time.monotonic() - started)


def duration(seconds: float) -> str:
    """In minutes, or in seconds where it is less than one and a half."""
    return f"{seconds:.0f} s" if seconds < 90 else f"{seconds / 60:.0f} min"


def call(command: list[str], folder: Path) -> float:
    """Runs a command; returns the seconds it took. Ends the demo with its exit code if it fails."""
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")])
    started = time.monotonic()
    code = subprocess.run(command, cwd=folder, env={**os.environ, "PATH": path}, check=False).returncode
    if code:
        sys.exit(code)
    return time.monotonic() - started


def conclude(run: Path, took: dict[str, float], heading: str) -> None:
    """Prints the times, the verdict in words, what longer runs give and the way on."""
    times = ", ".join(f"{verb} {seconds:.0f} s" for verb, seconds in took.items())
    print(f"\nDone in {duration(sum(took.values()))} ({times}). {heading}:\n")
    results = json.loads((run / "evaluation" / "results.json").read_text(encoding="utf-8"))
    for model in results["models"].values():
        if model["verdict"] and model["role"] != "control":
            print(textwrap.fill(model["verdict"]["sentence"], WIDTH), end="\n\n")
    place = run.relative_to(ROOT)
    print(GO_ON.format(run=place, page=place / "evaluation" / "report.html"))


if __name__ == "__main__":
    main()
