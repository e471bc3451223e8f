"""The models that speak: found by the names that a user gives them, and loaded."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from uniattn_cli.errors import StageError, UsageError, suggest
from uniattn_cli.models.hub import Source, locate
from uniattn_cli.models.loading import load_model, load_tokenizer
from uniattn_cli.options import RunOptions
from uniattn_cli.recipe.schema import DTYPES, ModelSpec, Recipe
from uniattn_cli.run.directory import RunDir

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

BASE = "base"
# Stages that leave a model, the furthest first.
STAGES = ("train", "convert")


@dataclass(frozen=True)
class Speaker:
    """A loaded model.

    Attributes:
        name: as the user knows it.
        model, tokenizer: in evaluation mode, on the device.
    """

    name: str
    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase


def load_speakers(
    run: RunDir, checkpoint: str | None, beside: str | None, overrides: Sequence[str], options: RunOptions
) -> list[Speaker]:
    """Loads the asked model, and the one beside it if there is one, which comes first.

    Args:
        run: the run directory.
        checkpoint: directory, hub id or `base`; None is what the last finished of `train` and `convert` left.
        beside: another of these, to compare with.
        overrides: `model.dtype=…` and `model.attention=…` in place of the recipe's.
        options: device and progress.

    Raises:
        StageError: there is no model in the run directory, or no recipe that names the base.
        ModelError, CheckpointError, RecipeError: see `checkpoint`.
    """
    names = ([] if beside is None else [beside]) + [newest(run) if checkpoint is None else checkpoint]
    # All faults of names are told before any weights are read.
    sources = {name: find(run, name) for name in names}
    spec = model_spec(run, overrides)
    device = options.torch_device()
    speakers = []
    for name, source in sources.items():
        options.progress.note(f"loading {name} on {device}")
        speakers.append(Speaker(name, load_model(source, spec, device), load_tokenizer(source)))
    return speakers


def load(
    directory: Path | str, *, dtype: str = "auto", device: str = "auto"
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Loads a model and its tokenizer.

    Args:
        directory: a base or converted checkpoint, a run directory, of which the last finished of `trained/` and
            `converted/` is taken, or a hub id.
        dtype: `auto` (the checkpoint's own), `float32`, `bfloat16` or `float16`.
        device: `auto` (CUDA, then MPS, then CPU) or a torch device string.

    Returns:
        The transformers model, in evaluation mode on the device, and its tokenizer.

    Raises:
        StageError: a run directory in which nothing was converted.
        ModelError, CheckpointError: there is no model of that name, or it cannot be loaded.
        UsageError: the dtype or the device does not exist.
    """
    if dtype not in DTYPES:
        raise UsageError(f"dtype '{dtype}': give one of {', '.join(DTYPES)}{suggest(dtype, DTYPES)}")
    path = Path(directory).expanduser()
    of_run = path.is_dir() and not (path / "config.json").is_file()
    source = locate(newest(RunDir(path)) if of_run else str(directory))
    where = RunOptions(device=device).torch_device()
    return load_model(source, ModelSpec(dtype=dtype), where), load_tokenizer(source)


def newest(run: RunDir) -> str:
    """The directory that the last finished of `train` and `convert` wrote.

    Raises:
        StageError: neither has been run here.
    """
    done = [stage for stage in STAGES if run.is_complete(stage)]
    if not done:
        raise StageError(
            f"neither trained/ nor converted/ is in {run.root.absolute()}; name a checkpoint directory or a hub id, or "
            "run `uniattn convert --groups auto` first"
        )
    # Times are in UTC and ISO 8601, so that their order is that of the text; of equal ones the furthest stage.
    return str(run.output(max(done, key=lambda stage: (run.record(stage).get("finished") or "", -STAGES.index(stage)))))


def find(run: RunDir, name: str) -> Source:
    """A model by directory or hub id; `base` is the recipe's model unless a directory has that name.

    Raises:
        StageError: `base`, and there is no recipe.
        ModelError: there is no such model.
    """
    if name == BASE and not Path(name).is_dir():
        if not run.recipe.is_file():
            raise StageError(f"'{BASE}' is the model of recipe.yaml, but there is none here; name the model instead")
        spec = Recipe.load(run.recipe).model
        return locate(spec.name, spec.revision)
    return locate(name)


def model_spec(run: RunDir, overrides: Sequence[str]) -> ModelSpec:
    """Dtype and attention backend: the recipe's where there is one."""
    if run.recipe.is_file():
        return Recipe.load(run.recipe, overrides).model
    return Recipe.from_tree({"model": {"name": "given on the command line"}}, "--set", overrides).model


@dataclass(frozen=True)
class Subject:
    """One model of the comparison.

    Attributes:
        name: `base`, `control`, `converted`, `trained`, or a further checkpoint as the user wrote it.
        role: `base`, `control`, `converted`, `trained` or `given`.
        source: where its files are.
    """

    name: str
    role: str
    source: Source


def find_models(run_dir: Any, checkpoints: Sequence[str]) -> dict[str, Any]:
    """Where the models are: the checkpoints named, or base, `converted/` and `trained/` of a run.

    Raises:
        ModelError: a checkpoint is not there.
        RecipeError: there is no recipe and no checkpoint was named, or it is faulty.
    """
    if checkpoints:
        return {text.rstrip("/"): locate(text) for text in checkpoints}
    run = RunDir(run_dir)
    recipe = Recipe.load(run.recipe)
    found = {BASE: locate(recipe.model.name, recipe.model.revision)}
    for stage, name in (("convert", "converted"), ("train", "trained")):
        if run.is_complete(stage):
            found[name] = locate(str(run.output(stage)))
    return found


def load_models(sources: dict[str, Any], dtype: str, device: torch.device) -> dict[str, PreTrainedModel]:
    """Loads them all; they are measured in turn, so they have to fit together.

    Raises:
        ModelError, CheckpointError: as `load_model`.
    """
    spec = ModelSpec(dtype=dtype)
    return {name: load_model(source, spec, device) for name, source in sources.items()}
