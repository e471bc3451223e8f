"""What is known about a converted checkpoint, from its own files and from those of the run that it lies in.

A figure counts only where the record beside it names the very files that are published: an evaluation of other weights,
or a conversion that was repeated since, is left out, and a note says so.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from uniattn_cli.errors import CheckpointError
from uniattn_cli.evaluation.figures import RESULTS, read_results
from uniattn_cli.models.hub import Source, locate, transport_errors
from uniattn_cli.models.loading import load_config
from uniattn_cli.models.of_run import BASE
from uniattn_cli.recipe.paths import RecipePath, at_home, located
from uniattn_cli.run.directory import OUTPUTS, REPORT_FILE, STAGE_FILE, RunDir
from uniattn_cli.run.files import read_json

CARD = "README.md"
# What a checkpoint calls itself in its card.
THIS = "this model"
LICENCE_FIELDS = ("license", "license_name", "license_link")


@dataclass(frozen=True)
class Base:
    """The model that a checkpoint was made from.

    Attributes:
        name: hub id, or the last part of a local path; None where no record tells.
        hub_id: what the card's metadata link to; None for a base that is known by a local path only.
        revision: of the hub model, where the recipe names one.
        licence: the fields `license`, `license_name` and `license_link` of its own card, as far as it has them.
        folder: the local directory, where it is one.
    """

    name: str | None = None
    hub_id: str | None = None
    revision: str | None = None
    licence: dict[str, str] = field(default_factory=dict)
    folder: Path | None = None


@dataclass(frozen=True)
class Facts:
    """Everything that a model card states.

    Attributes:
        source: the checkpoint.
        config: its configuration; holds the layout.
        base: what it was made from.
        conversion: report of the fit, or None.
        conversion_settings: resolved recipe of the conversion, or None.
        training: report of the training, or None for a checkpoint that was not trained.
        training_settings: resolved recipe of the training, or None.
        evaluation: `results.json` reduced to `base` and `THIS`, with the `name` that this had there; or None.
        versions: of the packages that made the checkpoint.
        notes: what was left out, and why.
    """

    source: Source
    config: Any
    base: Base
    conversion: dict[str, Any] | None = None
    conversion_settings: dict[str, Any] | None = None
    training: dict[str, Any] | None = None
    training_settings: dict[str, Any] | None = None
    evaluation: dict[str, Any] | None = None
    versions: dict[str, str] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)


def gather(
    directory: Path, *, base_model: str | None = None, licence: str | None = None, online: bool = False
) -> Facts:
    """Reads a checkpoint's configuration and the records of the stages that made it.

    Args:
        directory: a converted checkpoint, such as `trained/` of a run directory.
        base_model: hub id of the base, where the run knew it by a local path.
        licence: identifier that takes the place of what the base's card says.
        online: the base's card may be fetched from the hub.

    Raises:
        ModelError: there is no model in the directory.
        CheckpointError: it is not a converted checkpoint, or a record in it is damaged or belongs to another layout.
        StageError: its evaluation is damaged, or of another version of this tool.
    """
    source = locate(str(directory.absolute()))
    config = load_config(source, converted=True)
    notes: list[str] = []
    record = _read(directory / STAGE_FILE) or {}
    found: dict[str, Any] = {"versions": record.get("versions", {})}
    if record.get("stage") == "train":
        found |= {"training": _read(directory / REPORT_FILE), "training_settings": record.get("settings")}
    made = _conversion_folder(directory, record, notes)
    if made is not None:
        found["conversion"] = _read(made / REPORT_FILE)
        found["conversion_settings"] = (_read(made / STAGE_FILE) or {}).get("settings")
        if found["conversion"] and found["conversion"]["layout"] != config.layout.to_list():
            raise CheckpointError(f"{made / REPORT_FILE} belongs to another layout than the checkpoint; convert again")
    found["evaluation"] = _evaluation(source, notes)
    settings = found.get("training_settings") or found.get("conversion_settings") or {}
    base = _base(settings.get("model") or {}, directory.absolute().parent, base_model, licence, online)
    return Facts(source, config, base, notes=notes, **found)


def _conversion_folder(directory: Path, record: dict[str, Any], notes: list[str]) -> Path | None:
    """Where the conversion is described that the checkpoint comes from: there, or in `converted/` beside it."""
    if record.get("stage") == "convert":
        return directory
    made = directory.absolute().parent / OUTPUTS["convert"]
    if record.get("stage") != "train":
        notes.append(f"{directory} was not written by a stage of uniattn, so the card is incomplete")
    elif not (made / "config.json").is_file():
        notes.append(f"{made} is missing, so the card says nothing about the fit")
    elif locate(str(made)).fingerprint != record.get("inputs", {}).get("converted"):
        notes.append(f"{made} has changed since training, so the card says nothing about the fit")
    else:
        return made
    return None


def _read(path: Path) -> dict[str, Any] | None:
    """A JSON object, or None where there is no file."""
    return read_json(path, "remove it, or run the stage again", CheckpointError) if path.exists() else None


def _evaluation(source: Source, notes: list[str]) -> dict[str, Any] | None:
    """The figures of this checkpoint, if `evaluation/` beside it has any, under the names `base` and `THIS`."""
    folder = RunDir(source.path.parent).output("eval")
    if not (folder / RESULTS).exists():
        notes.append("the checkpoint was not evaluated; `uniattn eval` in its run directory measures it")
        return None
    results = read_results(folder / RESULTS)
    models = results["models"]
    found = [name for name, entry in models.items() if name != BASE and entry["fingerprint"] == source.fingerprint]
    if not found:
        notes.append(
            f"{folder} has no figures of exactly these weights; run `uniattn eval --force` for figures in the card"
        )
        return None
    return results | {"models": {BASE: models[BASE], THIS: models[found[0]]}, "name": found[0]}


def _base(model: dict[str, Any], run_dir: Path, hub_id: str | None, licence: str | None, online: bool) -> Base:
    name, revision = model.get("name") or "", model.get("revision")
    folder = located(RecipePath(name, run_dir)) if name else None
    # What is named by a path was local, whether or not it is still there; a path tells strangers nothing.
    local = folder if folder and (at_home(name).is_absolute() or folder.is_dir()) else None
    if hub_id is None and name and not local:
        hub_id = name
    if licence:
        stated = {"license": licence}
    elif local and (local / CARD).is_file():
        stated = _licence(_metadata(local / CARD))
    else:
        stated = _licence(_hub_metadata(hub_id, revision, online)) if hub_id else {}
    shown = hub_id or (folder.name if folder is not None else None)
    return Base(shown, hub_id, None if local else revision, stated, local if local and local.is_dir() else None)


def _licence(metadata: dict[str, Any]) -> dict[str, str]:
    return {key: str(metadata[key]) for key in LICENCE_FIELDS if metadata.get(key)}


def _metadata(card: Path) -> dict[str, Any]:
    """The metadata at the head of a model card."""
    from huggingface_hub import metadata_load
    from yaml import YAMLError

    try:
        return metadata_load(card) or {}
    except (OSError, ValueError, YAMLError) as error:
        reason = " ".join(str(error).split())
        raise CheckpointError(f"{card} cannot be read ({reason}); fix it, or give --license") from None


def _hub_metadata(name: str, revision: str | None, online: bool) -> dict[str, Any]:
    """The metadata of a hub model's card: from the cache, or with one question to the hub."""
    from huggingface_hub import HfApi, try_to_load_from_cache
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, OfflineModeIsEnabled

    try:
        cached = try_to_load_from_cache(name, CARD, revision=revision)
        if isinstance(cached, str):
            return _metadata(Path(cached))
        card = HfApi().model_info(name, revision=revision, timeout=10).card_data if online else None
    except transport_errors(HfHubHTTPError, HFValidationError, OfflineModeIsEnabled):
        # Whether the hub can be written to is told later; a base that cannot be asked has no known licence.
        return {}
    return card.to_dict() if card is not None else {}
