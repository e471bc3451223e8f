"""Which models a run has: what they are called, what they are, and where they lie."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from uniattn_cli.errors import StageError, UsageError, suggest
from uniattn_cli.models.hub import ADAPTER, Source, locate
from uniattn_cli.models.loading import load_model
from uniattn_cli.models.tokenizer import load_tokenizer
from uniattn_cli.options import RunOptions
from uniattn_cli.recipe.paths import at_home
from uniattn_cli.recipe.schema import DTYPES, ModelSpec, Recipe
from uniattn_cli.run.directory import RunDir

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

BASE, CONTROL, CONVERTED, TRAINED = "base", "control", "converted", "trained"
# The stage that makes each of the others.
STAGES = {CONTROL: "control", CONVERTED: "convert", TRAINED: "train"}
# What is any other model that a user names.
GIVEN = "given"


@dataclass(frozen=True)
class Subject:
    """One model among those of a run.

    Attributes:
        name: `base`, `control`, `converted`, `trained`, or another model as the user wrote it.
        role: `base`, `control`, `converted`, `trained` or `given`.
        source: where its files are.
    """

    name: str
    role: str
    source: Source


def base_of(recipe: Recipe) -> Source:
    """The model that a recipe names.

    Raises:
        ModelError: there is no such model.
    """
    return locate(recipe.model.name, recipe.model.revision)


def find(run: RunDir, name: str, recipe: Recipe | None = None) -> Source:
    """A model by name; a directory that is called like one of the run's own models is named by its path (`./base`).

    Args:
        name: `base`, `control`, `converted` or `trained`, a directory or a hub id.
        recipe: names the base; None reads that of the run.

    Raises:
        StageError: the base is asked for and there is no recipe, or a stage that has not been run.
        ModelError: there is no such model.
    """
    if name == BASE:
        if recipe is None and not run.recipe.is_file():
            raise StageError(f"'{BASE}' is the model of recipe.yaml, which does not exist here; give a model instead")
        return base_of(recipe or Recipe.load(run.recipe))
    if name not in STAGES:
        return locate(name)
    folder = run.output(STAGES[name])
    if not folder.is_dir():
        raise run.missing(STAGES[name])
    return locate(str(folder))


def own_models(run: RunDir, recipe: Recipe) -> list[Subject]:
    """The base, and what the finished stages of a run made.

    Raises:
        ModelError: the base is not there, or what lies in a stage's directory is no model.
    """
    finished = [name for name, stage in STAGES.items() if run.is_complete(stage)]
    return [Subject(name, name, find(run, name, recipe)) for name in (BASE, *finished)]


def with_given(subjects: Sequence[Subject], names: Sequence[str]) -> tuple[list[Subject], list[str]]:
    """Adds models that a user names; one that is there already is counted once.

    Args:
        names: directories or hub ids.

    Returns:
        All models, and a note for each that was left out.

    Raises:
        ModelError: there is no such model.
    """
    found, notes = list(subjects), []
    for name in names:
        source = locate(name)
        if any(source.path.resolve() == known.source.path.resolve() for known in found):
            notes.append(f"{name} is already included and counted once.")
            continue
        taken = any(name == known.name for known in found)
        found.append(Subject(f"./{name}" if taken else name, GIVEN, source))
    return found, notes


def newest(run: RunDir) -> Path:
    """The directory that the last finished of `train` and `convert` wrote.

    Raises:
        StageError: neither has been run here.
    """
    stages = [STAGES[name] for name in (TRAINED, CONVERTED)]
    done = [stage for stage in stages if run.is_complete(stage)]
    if not done:
        raise StageError(
            f"{run.root.absolute()} has neither {TRAINED}/ nor {CONVERTED}/; give a checkpoint, or run "
            "`uniattn convert --groups auto` first"
        )
    # Times are in UTC and ISO 8601, so that their order is that of the text; of equal ones the furthest stage.
    return run.output(max(done, key=lambda stage: (run.record(stage).get("finished") or "", -stages.index(stage))))


def checkpoint_in(directory: Path) -> Path:
    """A directory itself if it is a model or an adapter, else the newest one of the run that it holds.

    Raises:
        StageError: it is neither.
    """
    is_model = any((directory / name).is_file() for name in ("config.json", ADAPTER))
    return directory if is_model else newest(RunDir(directory))


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
    path = at_home(directory)
    source = locate(str(checkpoint_in(path) if path.is_dir() else directory))
    where = RunOptions(device=device).torch_device()
    return load_model(source, ModelSpec(dtype=dtype), where), load_tokenizer(source)
