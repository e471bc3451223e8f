"""`make demo`: the four commands on a small real model, in a fresh run directory under demo/, each one timed.

With DEMO_SHORT=1 in the environment they work on very little data; the figures mean nothing then.
"""

from __future__ import annotations

import argparse
import os
import shlex
import shutil
import subprocess
import sys
import time
from pathlib import Path

from fetch_demo_model import MODELS

ROOT = Path(__file__).resolve().parent.parent
FOLDER = ROOT / "demo"
COMMANDS = {
    "analyze": "uniattn analyze ../{directory} --recipe ../../recipes/quick.yaml",
    "convert": "uniattn convert --groups auto",
    "train": "uniattn train recipe.yaml",
    "eval": "uniattn eval",
}
# The run directory under demo/, and the training: the learning rate of the recipe spoils Gemma in a few steps.
RUNS = {"smollm2-135m-instruct": "run", "gemma3-270m": "run-gemma3-270m"}
OWN = {"gemma3-270m": {"train": "--set train.stages='[{trains: all, steps: 40, learning_rate: 2.0e-5}]'"}}
# Written into the recipe, so that the commands after the first are the documented ones.
SHORT = {
    "analyze": "--tokens 512 --length 256 --set data.train='[{source: builtin, limit: 96}]' "
    "--set conversion.tokens=1024 --set conversion.length=256 --set conversion.align=5 --set conversion.refine=2 "
    "--set train.stages='[{trains: all, steps: 2, learning_rate: 2.0e-5}]' --set train.batch_size=4 "
    "--set evaluation.tokens=1024 --set evaluation.length=256 --set evaluation.responses=8 "
    "--set evaluation.limit=8 --set evaluation.lengths=[256] --set evaluation.length_tokens=512 "
    "--set evaluation.retrieval=1 --set evaluation.samples=1 --set evaluation.sample_tokens=8 "
    "--set evaluation.speed.prompt=32 --set evaluation.speed.new=8 --set evaluation.speed.repeats=2",
}


def main() -> None:
    """Fetches the model, runs the commands, shows the report."""
    # The line buffer keeps our lines in order with those of the commands when the output is a file.
    sys.stdout.reconfigure(line_buffering=True)
    short = os.environ.get("DEMO_SHORT", "0") not in ("", "0")
    model = arguments().model
    step([sys.executable, str(ROOT / "scripts" / "fetch_demo_model.py"), str(FOLDER), "--model", model], ROOT)
    run = FOLDER / RUNS[model]
    shutil.rmtree(run, ignore_errors=True)
    run.mkdir(parents=True)
    print(f"\nIn {run}:")
    took = {}
    for verb, command in COMMANDS.items():
        more = (SHORT if short else OWN.get(model, {})).get(verb, "")
        command = f"{command.format(directory=MODELS[model].directory)} {more}".strip()
        print(f"\n$ {command}")
        took[verb] = step(shlex.split(command), run)
        print(f"({verb}: {took[verb]:.0f} s)")
    report(run, took)


def arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", choices=MODELS, default=next(iter(MODELS)))
    return parser.parse_args()


def step(command: list[str], folder: Path) -> float:
    """Runs a command; returns the seconds it took. Ends the demo with its exit code if it fails."""
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")])
    started = time.monotonic()
    code = subprocess.run(command, cwd=folder, env={**os.environ, "PATH": path}, check=False).returncode
    if code:
        sys.exit(code)
    return time.monotonic() - started


def report(run: Path, took: dict[str, float]) -> None:
    """Prints the comparison, the times and where the files are."""
    print("\n" + (run / "evaluation" / "report.md").read_text(encoding="utf-8"))
    print(f"Report: {(run / 'evaluation' / 'report.html').relative_to(ROOT)}\nPlots:")
    for plot in sorted(run.rglob("*.png")):
        print(f"  {plot.relative_to(ROOT)}")
    times = ", ".join(f"{verb} {seconds:.0f} s" for verb, seconds in took.items())
    print(f"Times: {times}; together {sum(took.values()):.0f} s")


if __name__ == "__main__":
    main()
