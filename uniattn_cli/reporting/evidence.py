"""What the page shows beside `results.json`: files that the other stages left in the run directory, where they fit.

A file that is absent is left out silently. One that is damaged, or that belongs to another state of a model than the
one that was evaluated, is left out with a note, so that the page never shows the damage of one model beside the scores
of another.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from uniattn_cli.errors import RecipeError, StageError
from uniattn_cli.layouts.considered import JSON_FILE as GROUPING_FILE
from uniattn_cli.models.fingerprint import fingerprint
from uniattn_cli.models.of_run import CONTROL, CONVERTED, STAGES, TRAINED
from uniattn_cli.recipe.schema import Recipe
from uniattn_cli.run.directory import LOG_FILE, REPORT_FILE, STAGE_FILE, STARTED_FILE, RunDir
from uniattn_cli.run.files import read_json, read_lines

RECORDED = ("analyze", "score", "group", "convert", "train", "eval")


@dataclass
class Evidence:
    """Optional parts of the page; empty or None where there are no files for them.

    Attributes:
        model: name of the base.
        similarity: [layer][earlier layer], mean over heads of the best head's similarity; None where not measured.
        similarity_tokens: tokens that it was measured on.
        conversion: `uniattn_report.json` of `converted/`: layout, fits and losses.
        training: for each trained model `lines` of its log and `report`.
        grouping: `grouping.json`.
        records: the `stage.json` of each stage.
        recipe: text of `recipe.yaml`.
        settings: every setting of it; None if it is missing or cannot be read any more.
        notes: what was left out, and why.
    """

    model: str = ""
    similarity: list[list[float | None]] | None = None
    similarity_tokens: int = 0
    conversion: dict[str, Any] | None = None
    training: dict[str, dict[str, Any]] = field(default_factory=dict)
    grouping: dict[str, Any] | None = None
    records: dict[str, dict[str, Any]] = field(default_factory=dict)
    recipe: str | None = None
    settings: dict[str, Any] | None = None
    notes: list[str] = field(default_factory=list)


def collect(run: RunDir, results: dict[str, Any], evaluation: Path) -> Evidence:
    """Reads whatever fits the results.

    Args:
        run: the run directory.
        results: content of `results.json`.
        evaluation: the folder that holds it, which may still be the hidden one.
    """
    models = results["models"]
    base = next(iter(models.values()))
    found = Evidence(model=base["path"])
    for stage in RECORDED:
        folder = evaluation if stage == "eval" else run.output(stage)
        name = STAGE_FILE if (folder / STAGE_FILE).is_file() else STARTED_FILE
        record = _read(folder / name, found.notes)
        if record is not None:
            found.records[stage] = record
    if run.recipe.is_file():
        found.recipe = run.recipe.read_text(encoding="utf-8", errors="replace")
        try:
            found.settings = Recipe.load(run.recipe).to_dict()
        except RecipeError as error:
            found.notes.append(f"recipe.yaml is no longer valid ({error.faults[0]}).")
    _read_analysis(run, base["fingerprint"], found)
    by_role = {model["role"]: model for model in models.values()}
    if _same(run.output("convert"), by_role.get(CONVERTED), found.notes):
        found.conversion = _read(run.output("convert") / REPORT_FILE, found.notes)
        grouping = _read(run.output("group") / GROUPING_FILE, found.notes)
        # A layout that was given by hand later has nothing to do with the choice that lies there.
        if grouping and found.conversion and _plain(grouping.get("chosen") or []) == _plain(found.conversion["layout"]):
            found.grouping = grouping
    for role in (TRAINED, CONTROL):
        path = run.output(STAGES[role])
        if not (path / LOG_FILE).is_file() or not _same(path, by_role.get(role), found.notes):
            continue
        report = _read(path / REPORT_FILE, found.notes) or {}
        found.training[role] = {"lines": read_lines(path / LOG_FILE), "report": report}
    return found


def _read(path: Path, notes: list[str]) -> dict[str, Any] | None:
    if not path.is_file():
        return None
    try:
        return read_json(path, "it is left out.")
    except StageError as error:
        notes.append(str(error))
        return None


def _same(folder: Path, model: dict[str, Any] | None, notes: list[str]) -> bool:
    """Whether a checkpoint is the one that was evaluated."""
    if model is None or not (folder / "config.json").is_file():
        return False
    if fingerprint(folder) == model["fingerprint"]:
        return True
    notes.append(f"{folder.name}/ has changed since the evaluation; its details are left out.")
    return False


def _plain(layout: list[dict[str, Any]]) -> list[Any]:
    """A layout without its compensations, which the choice does not decide."""
    return [{key: value for key, value in entry.items() if key != "compensation"} for entry in layout]


def _read_analysis(run: RunDir, base: str, found: Evidence) -> None:
    from uniattn_cli.analysis.measured import JSON_FILE, Measured

    folder = run.output("analyze")
    if not (folder / JSON_FILE).is_file():
        return
    try:
        measured = Measured.load(folder)
    except StageError as error:
        found.notes.append(f"The similarity map is left out: {error}.")
        return
    if measured.fingerprint != base:
        found.notes.append("analysis/ belongs to another version of the base; the similarity map is left out.")
        return
    found.model, found.similarity_tokens = measured.model, measured.tokens
    # Of each head the most alike one of the earlier layer, then the mean over heads.
    best = measured.score.max(axis=3).mean(axis=2)
    layers, distances = best.shape
    found.similarity = [
        [
            float(best[layer, layer - other - 1])
            if layer - other <= distances and math.isfinite(best[layer, layer - other - 1])
            else None
            for other in range(layer)
        ]
        for layer in range(layers)
    ]
