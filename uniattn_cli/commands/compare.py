"""`uniattn compare`: checkpoints and finished evaluations in one table, with the Pareto front."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from uniattn_cli.charts import write_png
from uniattn_cli.commands.evaluate import evaluate_into, inputs_of, prepare
from uniattn_cli.errors import ModelError, StageError
from uniattn_cli.evaluation.comparison import PLOT, Merged, Part, front_notes, merge, table
from uniattn_cli.evaluation.figures import RESULTS, read_results
from uniattn_cli.models.of_run import BASE, Subject, base_of, with_given
from uniattn_cli.options import RunOptions
from uniattn_cli.recipe.paths import at_home
from uniattn_cli.recipe.schema import Recipe
from uniattn_cli.reporting.charts import BARS, quality_chart
from uniattn_cli.run.directory import OUTPUTS, RunDir
from uniattn_cli.run.files import write_json
from uniattn_cli.run.lock import alone
from uniattn_cli.tables import Result, to_markdown

COMPARISON = "comparison.json"
TEXT = "comparison.md"


@dataclass(frozen=True)
class Comparison(Result):
    """Models side by side.

    Attributes:
        directory: what was written.
        merged: the figures.
    """

    directory: Path
    merged: Merged = field(repr=False)


@alone
def compare(
    inputs: Sequence[str],
    *,
    run_dir: Path | str = ".",
    recipe: Path | str | None = None,
    overrides: Sequence[str] = (),
    options: RunOptions = RunOptions(),
) -> Comparison:
    """Compares models of several runs and writes `comparison/`.

    Args:
        inputs: `results.json` files, run directories that have been evaluated, and checkpoints (directories or hub
            ids), which are evaluated with the recipe, using cached scores of earlier runs.
        run_dir: holds `recipe.yaml`, which only checkpoints need, and gets `comparison/`.
        recipe: another recipe for the checkpoints.
        overrides: `key.path=value` settings for it.
        options: device, overwriting, progress.

    Raises:
        StageError: results of other items, settings or bases, which cannot be compared, or nothing to read.
        RecipeError, ModelError, CheckpointError, DataError: as `evaluate`.
    """
    run = RunDir(run_dir)
    files = {text: path for text in inputs if (path := results_file(text)) is not None}
    parts = [Part(label, read_results(files[text]), text) for text, label in _labels(list(files)).items()]
    checkpoints = list(dict.fromkeys(text for text in inputs if text not in files))
    run.check_free("compare", options.force)
    command = shlex.join(["uniattn", "compare", *inputs, "--force"])
    if not checkpoints:
        if not parts:
            raise StageError("nothing to compare; give checkpoints, run directories or results.json files")
        merge(parts)  # before anything is written
        with run.write("compare", None, {"results": list(files)}, force=options.force) as folder:
            merged = write_comparison(folder, parts, command)
        return _comparison(run.output("compare"), merged)
    settings = Recipe.load(run.recipe if recipe is None else recipe, overrides)
    subjects, notes = with_given([Subject(BASE, BASE, base_of(settings))], checkpoints)
    if len(subjects) == 1:
        raise ModelError(f"{checkpoints[0]} is the base itself; name something to compare it with")
    material = prepare(settings, subjects, notes)
    record = {**inputs_of(subjects, material), "results": list(files)}
    with run.write("compare", settings, record, force=options.force, resume=True) as folder:
        results = evaluate_into(folder / "evaluation", settings, subjects, material, notes, command, options)
        merged = write_comparison(folder, [Part("", results, "the recipe"), *parts], command)
    return _comparison(run.output("compare"), merged)


def results_file(text: str) -> Path | None:
    """The `results.json` that an argument stands for; None for a checkpoint.

    Raises:
        StageError: a run directory without an evaluation.
    """
    path = at_home(text)
    if path.suffix == ".json" or path.is_file():
        return path
    for candidate in (path / RESULTS, path / OUTPUTS["eval"] / RESULTS):
        if candidate.is_file():
            return candidate
    if path.is_dir() and not (path / "config.json").is_file():
        if (path / "recipe.yaml").is_file():
            raise StageError(f"{text} has not been evaluated; run `uniattn eval -C {shlex.quote(text)}` first")
        raise StageError(f"{text} is neither a checkpoint (config.json), nor a run directory, nor results")
    return None


def _labels(names: Sequence[str]) -> dict[str, str]:
    """For each argument a short label: the run directory's name, or the whole where two would be the same."""
    short = {}
    for name in names:
        path = at_home(name).absolute()
        path = path.parent if path.suffix == ".json" else path
        short[name] = (path.parent if path.name in OUTPUTS.values() else path).name
    found = list(short.values())
    return {name: label if found.count(label) == 1 else name for name, label in short.items()}


def write_comparison(folder: Path, parts: Sequence[Part], command: str) -> Merged:
    """Writes `comparison.json`, `comparison.md` and the picture.

    Raises:
        StageError: the parts cannot be compared.
    """
    merged = merge(parts)
    write_json(folder / COMPARISON, merged.to_dict(parts))
    charts = []
    for key, front in merged.fronts.items():
        quality, cost = key.split("/")
        charts.append(quality_chart(merged.models, quality, cost, front))
    write_png(charts, folder / PLOT, note=BARS)
    lines = [
        "# Comparison",
        to_markdown(table(merged, "")),
        f"![Quality against cost]({PLOT})",
        "“− base” is the difference from the base on the same rows or items, ± one standard error. A model is on the "
        "Pareto front if no other model is at least as good in both quality and cost.",
        *(f"- {note}" for note in (*front_notes(merged), *merged.notes)),
        f"```\n{command}\n```",
    ]
    (folder / TEXT).write_text("\n\n".join(lines) + "\n", encoding="utf-8")
    return merged


def _comparison(directory: Path, merged: Merged) -> Comparison:
    sentences = [model["verdict"]["sentence"] for model in merged.models.values() if model["verdict"]]
    files = f"Plot: {directory / PLOT}; all figures: {directory / COMPARISON}"
    count: Any = len(merged.models)
    return Comparison(
        title=f"{count} models compared",
        tables=[table(merged, "Quality and cost (± one standard error)")],
        notes=[*(sentences if count <= 4 else []), *front_notes(merged), *merged.notes, files],
        directory=directory,
        merged=merged,
    )
