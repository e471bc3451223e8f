"""`make demo`: the four commands on SmolLM2-135M-Instruct, in the fresh run directory demo/run, each one timed.

With DEMO_SHORT=1 in the environment they work on very little data; the figures mean nothing then.
"""

from __future__ import annotations

import os
import shlex
import shutil
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
FOLDER = ROOT / "demo"
RUN = FOLDER / "run"
COMMANDS = (
    "uniattn analyze ../SmolLM2-135M-Instruct --recipe ../../recipes/quick.yaml",
    "uniattn convert --groups auto",
    "uniattn train recipe.yaml",
    "uniattn eval",
)
SHORT = {
    "analyze": "--tokens 1024 --length 256",
    "convert": "--set conversion.tokens=2048 --set conversion.length=256 "
    "--set evaluation.tokens=1024 --set evaluation.length=256",
    "train": "--set 'train.stages=[{trains: compensation, steps: 2}, {trains: all, steps: 2}]' "
    "--set train.batch_size=4 --set train.micro_batch_size=4 --set train.max_length=256",
    "eval": "--set evaluation.tokens=1024 --set evaluation.length=256 --set evaluation.responses=8 "
    "--set evaluation.limit=8 --set evaluation.samples=1 --set evaluation.sample_tokens=8 "
    "--set evaluation.speed.prompt=32 --set evaluation.speed.new=8 "
    "--set evaluation.speed.repeats=2",
}


def main() -> None:
    """Fetches the model, runs the commands, shows the report."""
    # The line buffer keeps our lines in order with those of the commands when the output is a file.
    sys.stdout.reconfigure(line_buffering=True)
    short = os.environ.get("DEMO_SHORT", "0") not in ("", "0")
    step([sys.executable, str(ROOT / "scripts" / "fetch_demo_model.py"), str(FOLDER)], ROOT)
    shutil.rmtree(RUN, ignore_errors=True)
    RUN.mkdir(parents=True)
    print(f"\nIn {RUN}:")
    took = {}
    for command in COMMANDS:
        verb = command.split()[1]
        if short:
            command = f"{command} {SHORT[verb]}"
        print(f"\n$ {command}")
        took[verb] = step(shlex.split(command), RUN)
        print(f"({verb}: {took[verb]:.0f} s)")
    report(took)


def step(command: list[str], folder: Path) -> float:
    """Runs a command; returns the seconds it took. Ends the demo with its exit code if it fails."""
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")])
    started = time.monotonic()
    code = subprocess.run(command, cwd=folder, env={**os.environ, "PATH": path}, check=False).returncode
    if code:
        sys.exit(code)
    return time.monotonic() - started


def report(took: dict[str, float]) -> None:
    """Prints the comparison, the times and where the files are."""
    print("\n" + (RUN / "evaluation" / "report.md").read_text(encoding="utf-8"))
    print(f"The same as a page: {(RUN / 'evaluation' / 'report.html').relative_to(ROOT)}\nPlots:")
    for plot in sorted(RUN.rglob("*.png")):
        print(f"  {plot.relative_to(ROOT)}")
    times = ", ".join(f"{verb} {seconds:.0f} s" for verb, seconds in took.items())
    print(f"Times: {times}; together {sum(took.values()):.0f} s")


if __name__ == "__main__":
    main()
