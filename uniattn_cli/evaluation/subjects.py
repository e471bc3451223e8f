"""The models that are compared: those of the run and others, checked to belong together."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from uniattn_cli.errors import CheckpointError, StageError
from uniattn_cli.models.hub import Source
from uniattn_cli.models.of_run import BASE, CONTROL, CONVERTED, STAGES, Subject, own_models, with_given
from uniattn_cli.models.tokenizer import load_tokenizer
from uniattn_cli.recipe.schema import Recipe
from uniattn_cli.run.directory import COMMANDS, RunDir

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# Settings in which `control/` and `trained/` must agree to be comparable.
SHARED_SETTINGS = (
    "seed",
    "data.train",
    "data.holdout",
    "train.stages",
    "train.batch_size",
    "train.max_length",
    "train.loss",
)


def find_subjects(run: RunDir, recipe: Recipe, checkpoints: Sequence[str]) -> tuple[list[Subject], list[str]]:
    """The models to compare, the base first.

    Returns:
        The models, and a note for each stage that is missing.

    Raises:
        ModelError: the base or a further checkpoint is not there.
        StageError: a stage's output was made from other models than the present ones.
    """
    own = own_models(run, recipe)
    sources = {subject.name: subject.source for subject in own}
    notes = []
    for name, stage in STAGES.items():
        if name in sources:
            _check_inputs(run, stage, sources)
        elif run.output(stage).exists():
            notes.append(f"{name}/ was not written by uniattn and is skipped; give it as a checkpoint to compare it.")
        elif name != CONTROL:
            notes.append(f"{name}/ is missing and skipped; `uniattn {COMMANDS[stage]}` creates it.")
    subjects, repeated = with_given(own, checkpoints)
    return subjects, [*notes, *_control_notes(run), *repeated]


def _control_notes(run: RunDir) -> list[str]:
    """Limits of the comparison with the control: there is none, or it was not trained like the model."""
    if not run.is_complete("train"):
        return []
    if not run.is_complete("control"):
        return [
            "control/ is missing: differences between trained and base include the effect of training; "
            f"`uniattn {COMMANDS['control']}` trains the base on the same rows, for a fair comparison."
        ]
    trained, control = run.record("train"), run.record("control")
    different = [key for key in SHARED_SETTINGS if _lookup(trained, key) != _lookup(control, key)]
    (rows, further), (other_rows, other_further) = _rows(trained), _rows(control)
    losses = {stage.get("loss") for stage in _lookup(trained, "train.stages") or ()}
    distils = losses <= {"distillation", "local"}
    excused = distils and rows == other_rows and bool(further) and not other_further
    # A setting that was not named had its default.
    if excused or (rows, further) == (other_rows, other_further):
        different = [key for key in different if key != "data.train"]
    if not excused and trained["inputs"].get("data") != control["inputs"].get("data"):
        different.append("the training rows")
    notes = []
    if excused:
        notes = [
            f"control/ was not trained on {', '.join(further)} (heldout: false): the comparison is fair only if the "
            "base generated these rows, since it could learn nothing from them."
        ]
    if not different:
        return notes
    return [
        *notes,
        f"control/ is not a fair comparison: it was not trained like trained/ (they differ in {', '.join(different)}); "
        f"run `uniattn {COMMANDS['control']} --force`.",
    ]


def _rows(record: dict) -> tuple[list[dict], list[str]]:
    """The data sets of a stage that hold rows out, and the sources of those that do not, such as what a model wrote."""
    specs = [{"heldout": True} | spec for spec in _lookup(record, "data.train") or []]
    return [spec for spec in specs if spec["heldout"]], [spec["source"] for spec in specs if not spec["heldout"]]


def _lookup(record: dict, key: str) -> Any:
    value = record.get("settings", {})
    for part in key.split("."):
        value = value.get(part) if isinstance(value, dict) else None
    return value


def _check_inputs(run: RunDir, stage: str, sources: dict[str, Source]) -> None:
    """Refuses a stage's output that was made from something else than what lies there now."""
    inputs = run.record(stage)["inputs"]
    for key, name in (("model", BASE), ("converted", CONVERTED)):
        source = sources.get(name)
        # A model trained elsewhere, or whose `converted/` was deleted, can still be compared with the base.
        recorded = key in inputs or (stage == "convert" and name == BASE)
        if source is not None and recorded and inputs.get(key) != source.fingerprint:
            raise StageError(
                f"{run.output(stage)} was made from another version of {source.name} ({inputs.get(key)}, now "
                f"{source.fingerprint}); run `uniattn {COMMANDS[stage]} --force`, or undo the change"
            )


def check_tokenizers(subjects: Sequence[Subject], tokenizer: PreTrainedTokenizerBase) -> None:
    """Refuses models whose tokens are not those of the base: losses per token would mean different things.

    Raises:
        CheckpointError: names the first such model.
    """
    vocabulary = tokenizer.get_vocab()
    for subject in subjects:
        if load_tokenizer(subject.source).get_vocab() != vocabulary:
            raise CheckpointError(
                f"{subject.name} has another vocabulary than the base, so perplexities cannot be compared; remove it"
            )
