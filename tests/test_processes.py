"""Several processes on one CPU train what one process trains: DDP and FSDP2, from torchrun and accelerate."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from tiny_run import settings
from training_run import CPU, ROOT, log_of, make_run, stages, weights

import uniattn_cli
from uniattn_cli.analysis.measured import Measured
from uniattn_cli.commands.train import train
from uniattn_cli.evaluation.figures import RESULTS
from uniattn_cli.options import RunOptions
from uniattn_cli.run.files import read_json

pytestmark = pytest.mark.slow
SETTING = [
    *stages(
        "trains: compensation, steps: 3, learning_rate: 0.001",
        "trains: all, loss: distillation, steps: 5, learning_rate: 0.0005",
        "trains: lora, steps: 3, learning_rate: 0.003",
    ),
    "train.distillation={teacher: base, weight: 0.5, attention: 0.1, hidden: 0.1, tokens: all}",
    "train.log_steps=1",
    "train.save_steps=2",
    "train.eval_steps=2",
]
LOCAL = [*stages("trains: followers, loss: local, steps: 3, learning_rate: 0.001"), *SETTING[1:]]
LAUNCHERS = {
    "torchrun": ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"],
    "accelerate": ["-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2", "--num_machines", "1"],
}
# accelerate shards models on accelerators only, so it is told that these CPUs are some. Killed where it is asked to.
SHARDED = """
import contextlib, os, signal, sys
import torch
import accelerate.state
from accelerate.utils import DistributedType
from torch.distributed.tensor import DTensor
from uniattn_cli.options import RunOptions, Silent
from uniattn_cli.commands import train as module
from uniattn_cli.training.trainer import StageTrainer

class Deadly(Silent):
    @contextlib.contextmanager
    def track(self, description, total):
        done = 0
        def advance(steps=1, text=""):
            nonlocal done
            done += steps
            if (description, done) == (sys.argv[2], int(sys.argv[3])):
                os.kill(os.getpid(), signal.SIGKILL)
        yield advance

def state_of_the_sharded(self):
    # Outside of the layers they stay whole between a validation and the next step.
    assert all(isinstance(parameter, DTensor) for parameter in self.model.model.layers.parameters())
    return trained_state(self)

trained_state, StageTrainer.trained_state = StageTrainer.trained_state, state_of_the_sharded
torch.set_num_threads(1)
class Renamed:
    def __getattr__(self, name):
        return DistributedType.MULTI_CPU if name == "MULTI_GPU" else getattr(DistributedType, name)

accelerate.state.DistributedType = Renamed()
module._check = lambda *arguments: None
options = RunOptions(device="cpu", progress=Deadly())
module.train(run_dir=sys.argv[1], overrides=["train.fsdp=true", *sys.argv[4:]], options=options)
"""


@pytest.fixture(scope="module")
def template(tmp_path_factory) -> Path:
    """A run that one process has trained."""
    run = make_run(tmp_path_factory.mktemp("processes") / "run")
    train(run_dir=run, overrides=SETTING, options=CPU)
    (run / "trained").rename(run / "one")
    return run


@pytest.fixture
def run(template: Path) -> Path:
    """The same run, of which `trained/` is to be made."""
    subprocess.run(["rm", "-rf", template / "trained", template / ".trained.partial"], check=True)
    return template


def launch(launcher: str, *command: str) -> subprocess.CompletedProcess:
    paths = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    environment = {**os.environ, "PYTHONPATH": paths, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, *LAUNCHERS[launcher], *command]
    return subprocess.run(command, env=environment, capture_output=True, text=True, check=False)


def check_equal_to_one_process(run: Path, *, tolerance: float) -> None:
    """Compares weights, by how far they moved, and all logged figures."""
    start, one, other = (weights(run / name) for name in ("converted", "one", "trained"))
    assert list(one) == list(other)
    changed = [name for name in one if not torch.equal(start[name], one[name])]
    assert changed == [name for name in one if not torch.equal(start[name], other[name])]
    apart, moved = (sum((one[name] - x[name]).square().sum() for name in changed) for x in (other, start))
    assert apart.sqrt() <= 50 * tolerance * moved.sqrt()
    lines, expected = log_of(run / "trained"), log_of(run / "one")
    assert len(lines) == len(expected)
    for line, wanted in zip(lines, expected, strict=True):
        assert line.keys() == wanted.keys()
        for key in line.keys() - {"seconds", "tokens_per_second", "stage"}:
            allowed = 10 * tolerance if key in ("grad_norm", "attention", "hidden", "divergence") else tolerance
            assert line[key] == pytest.approx(wanted[key], rel=allowed), (key, wanted)


@pytest.mark.parametrize("launcher", LAUNCHERS)
def test_two_processes_train_what_one_does(run, launcher):
    setting = [word for each in SETTING for word in ("--set", each)]
    done = launch(launcher, "-m", "uniattn_cli", "train", "-C", str(run), "--device", "cpu", *setting)
    assert done.returncode == 0, done.stderr
    check_equal_to_one_process(run, tolerance=1e-4)
    # One of them speaks, and says how the step is divided.
    assert done.stdout.count("checkpoint: trained") == 1
    assert "8 sequences" in done.stderr and "4 per forward pass x 1 accumulated x 2 processes" in done.stderr


def test_two_processes_train_layers_locally_as_one_does(tmp_path):
    run = make_run(tmp_path / "run")
    train(run_dir=run, overrides=LOCAL, options=CPU)
    (run / "trained").rename(run / "one")
    setting = [word for each in LOCAL for word in ("--set", each)]
    done = launch("torchrun", "-m", "uniattn_cli", "train", "-C", str(run), "--device", "cpu", *setting)
    assert done.returncode == 0, done.stderr
    check_equal_to_one_process(run, tolerance=1e-4)


def test_two_processes_that_shard_the_model_train_what_one_does_even_if_killed(run, tmp_path):
    script = tmp_path / "sharded.py"
    script.write_text(SHARDED)
    killed = launch("torchrun", str(script), str(run), "training all", "3", *SETTING)
    assert killed.returncode != 0 and not (run / "trained").exists()
    assert (run / ".trained.partial" / "stages" / "2-all" / "checkpoint-2").is_dir()
    done = launch("torchrun", str(script), str(run), "", "0", *SETTING)
    assert done.returncode == 0, done.stderr
    # Sharded weights are bfloat16 in the forward pass, norms and embeddings too.
    check_equal_to_one_process(run, tolerance=4e-3)
    from uniattn_cli.models.hub import locate
    from uniattn_cli.models.loading import load_model
    from uniattn_cli.recipe.schema import ModelSpec

    load_model(locate(str(run / "trained")), ModelSpec(), torch.device("cpu"))


@pytest.mark.gpu
@pytest.mark.parametrize("sharded", ["false", "true"])
def test_two_gpus_train_what_one_does(tmp_path, sharded):
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two CUDA devices")
    run = make_run(tmp_path / "run")
    train(run_dir=run, overrides=SETTING, options=RunOptions(device="cuda:0"))
    (run / "trained").rename(run / "one")
    setting = [word for each in (*SETTING, f"train.fsdp={sharded}") for word in ("--set", each)]
    done = launch("torchrun", "-m", "uniattn_cli", "train", "-C", str(run), *setting)
    assert done.returncode == 0, done.stderr
    # Forward passes of other sizes round differently in bfloat16.
    check_equal_to_one_process(run, tolerance=4e-3)


def test_processes_share_the_layers_that_are_scored(tiny_runs, tmp_path):
    """Two score what one scores, go on where one stopped, and only the main one writes."""
    few = settings(conversion__tokens=512, conversion__align=4, layout__score_tokens=256)
    asked = [*few, "layout.kinds=[key, linear]", "layout.protect=[1, 2]"]
    one, two = (Path(shutil.copytree(tiny_runs / "analysed", tmp_path / name)) for name in ("one", "two"))
    expected = uniattn_cli.score(run_dir=one, overrides=asked, options=CPU).scores
    uniattn_cli.score(run_dir=two, overrides=[*few, "layout.kinds=[linear]", "layout.protect=[1, 2, 3]"], options=CPU)
    flags = [word for entry in asked for word in ("--set", entry)]
    done = launch("torchrun", "-m", "uniattn_cli", "score", "-C", str(two), "--device", "cpu", *flags)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("scores: ") == 1
    found = uniattn_cli.score(run_dir=two, overrides=asked, options=CPU).scores
    assert [each.question for each in found] == [each.question for each in expected]
    for each, other in zip(found, expected, strict=True):
        assert each.plan == other.plan and each.divergence == pytest.approx(other.divergence, rel=1e-4)


def test_processes_share_sequences_of_an_analysis_and_models_of_an_evaluation(tiny_runs, tmp_path):
    """Two measure what one measures, up to the order of sums, and only the main one writes and speaks."""
    run = shutil.copytree(tiny_runs / "finished", tmp_path / "run")
    one = uniattn_cli.analyze(run_dir=run, overrides=settings(), options=replace(CPU, force=True)).measured
    uniattn_cli.evaluate(run_dir=run, options=replace(CPU, force=True))
    expected = read_json(run / "evaluation" / RESULTS, "")["models"]
    flags = [word for entry in settings() for word in ("--set", entry)]
    for command in ("analyze", "eval"):
        more = flags if command == "analyze" else ["--set", "evaluation.cache=false"]
        done = launch("torchrun", "-m", "uniattn_cli", command, "-C", str(run), "--device", "cpu", "--force", *more)
        assert done.returncode == 0, done.stderr
        assert done.stdout.count("plots and figures: ") + done.stdout.count("Report: ") == 1
    two = Measured.load(run / "analysis")
    assert (one.tokens, one.sequences) == (two.tokens, two.sequences)
    for name, values in one.heads.items():
        assert two.heads[name] == pytest.approx(values, abs=1e-5), name
        assert two.heads_stderr[name] == pytest.approx(one.heads_stderr[name], abs=1e-5), name
    for name in ("before", "after"):
        # What was not measured is None in the file.
        errors = [np.array(measured.output_error[name], dtype=float) for measured in (one, two)]
        np.testing.assert_allclose(*errors, rtol=1e-3, atol=1e-5)
    found = read_json(run / "evaluation" / RESULTS, "")["models"]
    assert list(found) == list(expected)
    for name, model in expected.items():
        figures = {figure: wanted["value"] for figure, wanted in model["quality"].items() if wanted}
        assert "text_loss" in figures
        for figure, wanted in figures.items():
            assert found[name]["quality"][figure]["value"] == pytest.approx(wanted, rel=1e-4), (name, figure)
