"""`uniattn eval`: base, converted and trained model side by side, in quality, size and speed."""

from __future__ import annotations

import json
import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from uniattn_cli.checkpoint import load_config, load_tokenizer
from uniattn_cli.errors import RecipeError
from uniattn_cli.evaluation import figures, report
from uniattn_cli.evaluation.measured import Material, Measured, items_file, measure
from uniattn_cli.evaluation.page.page import PAGE, write_page
from uniattn_cli.evaluation.plot import draw
from uniattn_cli.evaluation.samples import find_prompts, sample_all
from uniattn_cli.evaluation.speed import Timing, describe_device, measure_speed, prompt_tokens
from uniattn_cli.evaluation.subjects import BASE, ModelPool, Subject, check_tokenizers, find_subjects
from uniattn_cli.evaluation.tasks import MISSING_HARNESS, TaskSet, harness_installed, load_tasks
from uniattn_cli.evaluation.verdict import verdict
from uniattn_cli.heldout import response_rows, text_rows
from uniattn_cli.options import RunOptions
from uniattn_cli.recipe import Recipe
from uniattn_cli.rundir import RunDir
from uniattn_cli.tables import Table

RESULTS = "results.json"
REPORT = "report.md"
DEFAULT_OPTIONS = RunOptions()


@dataclass(frozen=True)
class Evaluation:
    """What `evaluate` found.

    Attributes:
        title: one line.
        tables: quality and cost.
        notes: verdicts, what was left out, and where everything is.
        directory: what was written.
        results: content of `results.json`; see `figures` for its schema.
    """

    title: str
    tables: list[Table]
    notes: list[str]
    directory: Path
    results: dict[str, Any]


def evaluate(
    run_dir: Path | str = ".",
    *,
    checkpoints: Sequence[str] = (),
    overrides: Sequence[str] = (),
    options: RunOptions = DEFAULT_OPTIONS,
) -> Evaluation:
    """Compares the models of a run and writes `evaluation/`.

    An interrupted evaluation continues with the models that were not finished, if nothing has changed.

    Args:
        run_dir: holds `recipe.yaml` and what the other stages wrote; stages that were not run are left out.
        checkpoints: further models, as directories or hub ids.
        overrides: `key.path=value` settings that take the place of the recipe's.
        options: device, overwriting, progress.

    Raises:
        RecipeError: the recipe is faulty.
        ModelError: a model cannot be found or read, or gives no numbers.
        CheckpointError: a checkpoint is damaged, or has another vocabulary than the base.
        DataError: text, rows or tasks cannot be read.
        StageError: a stage was run on another model, or `evaluation/` exists and may not be replaced.
    """
    run = RunDir(run_dir)
    recipe = Recipe.load(run.recipe, overrides)
    run.check_free("eval", options.force)
    device = options.torch_device()
    subjects, notes = find_subjects(run, recipe, checkpoints)
    _check_lengths(recipe, load_config(subjects[0].source))
    material = _material(recipe, subjects, notes)
    window = getattr(load_config(subjects[0].source), "max_position_embeddings", None)
    prompts = find_prompts(recipe, material.tokenizer, window)
    for note in notes:
        options.progress.note(note)
    inputs = {
        "model": subjects[0].source.fingerprint,
        "models": {subject.name: subject.source.fingerprint for subject in subjects},
        "data": material.digest(),
    }
    with run.write("eval", recipe, inputs, force=options.force, resume=True) as folder:
        pool = ModelPool(recipe.model, device)
        measured = _measure_all(folder, subjects, pool, material, recipe, options)
        timings = _time_all(subjects, pool, material, recipe, options)
        results = _results(recipe, subjects, material, measured, timings, pool, notes)
        new = recipe.evaluation.sample_tokens
        results["samples"] = sample_all(folder, subjects, pool, material.tokenizer, prompts, new, options.progress)
        settings = [word for override in overrides for word in ("--set", override)]
        command = shlex.join(["uniattn", "eval", *checkpoints, *settings, "--force"])
        text = json.dumps(results, indent=2, ensure_ascii=False, allow_nan=False)
        (folder / RESULTS).write_text(text + "\n", encoding="utf-8")
        (folder / REPORT).write_text(report.markdown(results, command=command), encoding="utf-8")
        draw(results, folder / report.PLOT)
        write_page(run, results, folder)
    return _evaluation(run.output("eval"), results)


def _check_lengths(recipe: Recipe, config: Any) -> None:
    """Refuses lengths beyond the model's window, where every model would look equally bad."""
    spec, window = recipe.evaluation, getattr(config, "max_position_embeddings", None)
    wanted = {"evaluation.length": spec.length}
    if spec.speed.enabled:
        wanted["evaluation.speed: prompt + new"] = spec.speed.prompt + spec.speed.new
    faults = [f"{key} is {value}, but the model's window is {window}" for key, value in wanted.items()]
    faults = [fault for fault, value in zip(faults, wanted.values(), strict=True) if window and value > window]
    if faults:
        raise RecipeError(faults)


def _material(recipe: Recipe, subjects: Sequence[Subject], notes: list[str]) -> Material:
    """Loads everything that the models are tested on, before anything slow begins."""
    tokenizer = load_tokenizer(subjects[0].source)
    check_tokenizers(subjects[1:], tokenizer)
    tasks = TaskSet()
    if recipe.evaluation.tasks:
        if harness_installed():
            tasks = load_tasks(recipe.evaluation.tasks)
        else:
            notes.append(MISSING_HARNESS)
    return Material(tokenizer, text_rows(recipe, tokenizer), response_rows(recipe, tokenizer), tasks)


def _measure_all(
    folder: Path,
    subjects: Sequence[Subject],
    pool: ModelPool,
    material: Material,
    recipe: Recipe,
    options: RunOptions,
) -> dict[str, Measured]:
    """Measures model after model; what an interrupted run finished is read back."""
    found = {}
    (folder / "items").mkdir(exist_ok=True)
    for index, subject in enumerate(subjects):
        path = items_file(folder, index, subject.name)
        if not path.is_file():
            load = lambda subject=subject: pool.get(subject)  # noqa: E731
            measure(subject, load, material, recipe.evaluation, options.progress).write(path)
        found[subject.name] = Measured.read(path)
    return found


def _time_all(
    subjects: Sequence[Subject], pool: ModelPool, material: Material, recipe: Recipe, options: RunOptions
) -> dict[str, list[Timing]]:
    """Times all models in turn if they fit into memory together, else one after the other."""
    spec = recipe.evaluation.speed
    if not spec.enabled:
        return {}
    prompt = prompt_tokens(material.text.tokens, spec.batch, spec.prompt)
    found: dict[str, list[Timing]] = {}
    with options.progress.track("speed", len(subjects) * (spec.repeats + 1)) as advance:
        for subject in subjects:
            pool.get(subject)
        groups = [subjects] if pool.together else [[subject] for subject in subjects]
        for group in groups:
            models = {subject.name: pool.get(subject) for subject in group}
            found |= measure_speed(models, prompt, new=spec.new, repeats=spec.repeats, advance=advance)
            # Nothing may hold a model that the pool has to drop before the next one fits.
            del models
    return found


def _results(
    recipe: Recipe,
    subjects: Sequence[Subject],
    material: Material,
    measured: dict[str, Measured],
    timings: dict[str, list[Timing]],
    pool: ModelPool,
    notes: list[str],
) -> dict[str, Any]:
    shown = list(material.tasks.members)
    models: dict[str, Any] = {}
    for subject in subjects:
        base = None if subject.name == BASE else measured[BASE]
        entry = _model_entry(subject, measured[subject.name], base, shown)
        if timings:
            entry["cost"] |= figures.speed_figures(
                timings[subject.name],
                None if base is None else timings[BASE],
                batch=recipe.evaluation.speed.batch,
                new=recipe.evaluation.speed.new,
            )
        models[subject.name] = entry
        entry["verdict"] = None if base is None else verdict(subject.name, models[BASE], entry)
    return {
        "schema": figures.SCHEMA,
        "models": models,
        "tasks": shown,
        "settings": _settings(recipe, material, pool, bool(timings)),
        "notes": [*notes, *_limits(measured, pool)],
    }


def _model_entry(subject: Subject, own: Measured, base: Measured | None, shown: Sequence[str]) -> dict[str, Any]:
    tasks = {
        task: {
            metric: figures.task_figure(metric, scores, base and base.tasks[task][metric])
            for metric, scores in metrics.items()
        }
        for task, metrics in own.tasks.items()
    }
    quality = figures.quality_figures(own, base)
    accuracy = figures.mean_accuracy(tasks, shown)
    return {
        "role": subject.role,
        "path": str(subject.source.name),
        "fingerprint": subject.source.fingerprint,
        "dtype": own.size.dtype,
        "dtype_on_disk": own.size.dtype_on_disk,
        "attention": own.size.attention,
        "layers": own.size.kinds,
        "quality": quality if accuracy is None else {**quality, "accuracy": accuracy},
        "tasks": tasks,
        "cost": figures.size_figures(own, base),
    }


def _settings(recipe: Recipe, material: Material, pool: ModelPool, timed: bool) -> dict[str, Any]:
    import torch

    spec = recipe.evaluation
    text, responses = material.text, material.responses
    speed = {
        "device": describe_device(pool.device),
        "threads": torch.get_num_threads(),
        "cache": "dynamic",
        "compiled": False,
        "prompt": spec.speed.prompt,
        "new": spec.speed.new,
        "batch": spec.speed.batch,
        "repeats": spec.speed.repeats,
        "interleaved": pool.together,
    }
    return {
        "text": {"windows": len(text), "length": spec.length, "sources": [each.source for each in recipe.data.text]},
        "responses": {
            "rows": len(responses),
            "tokens": sum(int((labels[1:] >= 0).sum()) for labels in responses.labels),
            "sources": [each.source for each in recipe.data.train],
        },
        "tasks": {"names": list(material.tasks.members), "limit": spec.limit, "chat_template": False},
        "batch": {"sequences": spec.batch_size},
        "speed": speed if timed else None,
    }


def _limits(measured: dict[str, Measured], pool: ModelPool) -> list[str]:
    """What a reader has to know before comparing."""
    found = []
    for attribute, words in (
        ("dtype", "run in different dtypes, which changes scores, cache and speed; use --set model.dtype=…"),
        ("dtype_on_disk", "are stored in different dtypes; compare parameters, not bytes on disk"),
        ("attention", "use different attention backends; use --set model.attention=…"),
    ):
        values = {name: getattr(one.size, attribute) for name, one in measured.items()}
        if len(set(values.values())) > 1:
            listed = ", ".join(f"{name} {value}" for name, value in values.items())
            found.append(f"The models {words} ({listed}).")
    if not pool.together:
        found.append("The models do not fit into memory together, so speed was measured one model after the other.")
    return found


def _evaluation(directory: Path, results: dict[str, Any]) -> Evaluation:
    sentences = [model["verdict"]["sentence"] for model in results["models"].values() if model["verdict"]]
    files = (
        f"Report: {directory / PAGE}, and as text {directory / REPORT}; plot: {directory / report.PLOT}; "
        f"all figures: {directory / RESULTS}"
    )
    return Evaluation(
        title=f"{len(results['models'])} models compared" if sentences else "Only the base was measured",
        tables=report.tables(results),
        notes=[*sentences, *results["notes"], files],
        directory=directory,
        results=results,
    )
