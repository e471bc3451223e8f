"""The run directory: where each stage reads and writes, and the guarantee that a directory that exists is complete.

A stage writes into a hidden folder beside its output and renames it at the end, so that an interrupted stage leaves
nothing that looks finished. `stage.json` in every output says what was done, with what, and from what.
"""

from __future__ import annotations

import contextlib
import functools
import json
import stat
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from uniattn_cli.errors import StageError
from uniattn_cli.recipe.schema import Recipe
from uniattn_cli.run.files import file_errors, hidden, now, read_json, taken, versions, write_json, written

STAGE_FILE = "stage.json"
# Stands in the hidden folder instead of `stage.json` until the stage is finished.
STARTED_FILE = "started.json"
# Beside a converted or trained checkpoint: what its fit or its training did.
REPORT_FILE = "uniattn_report.json"
# Beside a trained checkpoint: one line per logged step.
LOG_FILE = "log.jsonl"
OUTPUTS = {
    "analyze": "analysis",
    "score": "scores",
    "group": "grouping",
    "convert": "converted",
    "train": "trained",
    "control": "control",
    "eval": "evaluation",
    "compare": "comparison",
    "synthesize": "synthetic",
}
COMMANDS = {
    "analyze": "analyze MODEL",
    "score": "score",
    "group": "group",
    "convert": "convert --groups auto",
    "train": "train recipe.yaml",
    "control": "train recipe.yaml --control",
    "eval": "eval",
    "compare": "compare A B",
    "synthesize": "synthesize",
}


class RunDir:
    """Paths of one run."""

    def __init__(self, root: Path | str = "."):
        self.root = Path(root)

    @property
    def recipe(self) -> Path:
        return self.root / "recipe.yaml"

    def output(self, stage: str) -> Path:
        return self.root / OUTPUTS[stage]

    def partial(self, stage: str) -> Path:
        return hidden(self.output(stage))

    def is_complete(self, stage: str) -> bool:
        return (self.output(stage) / STAGE_FILE).is_file()

    def missing(self, stage: str) -> StageError:
        """The error that says which command makes a stage's output."""
        return StageError(f"{self.output(stage)} is missing; run `uniattn {COMMANDS[stage]}` first")

    def record(self, stage: str) -> dict:
        """The `stage.json` of a finished stage.

        Raises:
            StageError: the stage has not been run here, or its record is damaged.
        """
        if not self.is_complete(stage):
            raise self.missing(stage)
        path, next_step = self.output(stage) / STAGE_FILE, f"run `uniattn {COMMANDS[stage]}` again with --force"
        content = read_json(path, next_step)
        if not isinstance(content.get("inputs"), dict):
            raise StageError(f"{path} is damaged (not the record of a stage); {next_step}")
        return content

    def check_free(self, stage: str, force: bool) -> None:
        """Refuses to overwrite.

        Raises:
            StageError: the output exists and `force` is off.
        """
        output = self.output(stage)
        if taken(output) and not force:
            state = "is complete" if self.is_complete(stage) else "exists but was not written by uniattn"
            raise StageError(f"{output} {state}; use --force to replace it")

    def changes(
        self, stage: str, recipe: Recipe | None, inputs: dict[str, Any], decisive: Sequence[str] = ("",)
    ) -> list[str] | None:
        """What has changed since a run of the stage was interrupted.

        Args:
            decisive: settings, or sections of them, that must be the same; by default all.

        Returns:
            One `key: old -> new` for each difference; None if no such run is there, or its record is damaged.
        """
        try:
            old = read_json(self.partial(stage) / STARTED_FILE, "the stage starts over")
            before = [dict(_flat(old[key] or {})) for key in ("settings", "inputs")]
        except (StageError, KeyError):
            return None
        after = [dict(_flat(json.loads(json.dumps(value)))) for value in (recipe.to_dict() if recipe else {}, inputs)]
        found = []
        for part, (was, now_) in enumerate(zip(before, after, strict=True)):
            for key in dict.fromkeys([*was, *now_]):
                if (part or _matters(key, decisive)) and was.get(key) != now_.get(key):
                    found.append(f"{key}: {_shown(was, key)} -> {_shown(now_, key)}")
        return found

    @contextlib.contextmanager
    def write(
        self,
        stage: str,
        recipe: Recipe | None,
        inputs: dict[str, Any],
        *,
        force: bool = False,
        resume: bool = False,
        decisive: Sequence[str] = ("",),
    ) -> Iterator[Path]:
        """Gives a hidden folder to fill; on success it becomes the stage's output directory.

        Args:
            stage: key of `OUTPUTS`.
            recipe: the resolved settings, recorded in `stage.json`; None for a stage that has none.
            inputs: fingerprints of what the stage read.
            force: replace an existing output.
            resume: keep what an interrupted run left in the hidden folder, if it had the same settings and inputs.
            decisive: see `changes`.

        Raises:
            StageError: the output is in the way, or the disk is read-only or full.
        """
        self.check_free(stage, force)
        record = {
            "stage": stage,
            "settings": recipe and recipe.to_dict(),
            "seed": recipe and recipe.seed,
            "inputs": inputs,
            "versions": versions(),
            "started": now(),
        }
        errors = functools.partial(file_errors, self.root)
        goes_on = resume and self.changes(stage, recipe, inputs, decisive) == []
        keep = _has_work if resume else lambda partial: False
        with written(self.output(stage), errors, resume=goes_on, keep=keep) as partial:
            with errors(making=True):
                # Settings such as train.max_rise may be infinite.
                write_json(partial / STARTED_FILE, record, finite=False)
            yield partial
            record["finished"] = now()
            (partial / STARTED_FILE).unlink()
            write_json(partial / STAGE_FILE, record, finite=False)
            _share_weights(partial)


def _share_weights(folder: Path) -> None:
    """Gives weights the permissions of the other files; safetensors lets nobody but their owner read them."""
    mode = stat.S_IMODE((folder / STAGE_FILE).stat().st_mode)
    for path in folder.rglob("*.safetensors"):
        # Some file systems have one mode for all files, and refuse to set any.
        if stat.S_IMODE(path.stat().st_mode) != mode:
            path.chmod(mode)


def _has_work(partial: Path) -> bool:
    return any(path.is_file() and path.name != STARTED_FILE for path in partial.rglob("*"))


def _shown(values: dict[str, Any], key: str) -> str:
    return json.dumps(values[key]) if key in values else "absent"


def _flat(value: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    """Each setting by its dotted path: `train.stages[0].trains`."""
    if isinstance(value, dict) and value:
        for key, item in value.items():
            yield from _flat(item, f"{path}.{key}" if path else str(key))
    elif isinstance(value, list) and value:
        for index, item in enumerate(value):
            yield from _flat(item, f"{path}[{index}]")
    else:
        yield path, value


def _matters(path: str, decisive: Sequence[str]) -> bool:
    return any(path == key or key == "" or path.startswith((f"{key}.", f"{key}[")) for key in decisive)
