"""`results.json`: from the scores and timings of all models to figures, verdicts and notes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, replace
from typing import Any

from uniattn_cli.evaluation import aggregate
from uniattn_cli.evaluation.batches import Batches
from uniattn_cli.evaluation.capacity import FORMULA, Footprint, capacity_table
from uniattn_cli.evaluation.figures import SCHEMA, Figure
from uniattn_cli.evaluation.retrieval import FACTS
from uniattn_cli.evaluation.scores import Material, ModelScores
from uniattn_cli.evaluation.speed import GridPoint, Runner, grid_entry
from uniattn_cli.evaluation.verdict import add_verdicts, verdict
from uniattn_cli.inference.timing import WARM_UP_TOKENS
from uniattn_cli.models.device import describe_device
from uniattn_cli.models.loading import load_config, read_config
from uniattn_cli.models.of_run import BASE, CONTROL, Subject
from uniattn_cli.models.pool import ModelPool
from uniattn_cli.models.quantisation import quantisation_of
from uniattn_cli.recipe.schema import Recipe


def assemble(
    recipe: Recipe,
    subjects: Sequence[Subject],
    material: Material,
    measured: dict[str, ModelScores],
    points: Sequence[GridPoint],
    runner: Runner,
    pool: ModelPool,
    batches: Batches,
    notes: list[str],
) -> dict[str, Any]:
    """The content of `results.json`; see `figures` for its schema."""
    shown = list(material.tasks.members)
    # One grid point is the recipe's own, from which the figures of the cost come.
    timings = points[0].timings if points else {}
    comparable = {subject.name: _same_backend(measured[subject.name], measured[BASE]) for subject in subjects}
    models: dict[str, Any] = {}
    for subject in subjects:
        base = None if subject.name == BASE else measured[BASE]
        control = measured.get(CONTROL) if subject.name not in (BASE, CONTROL) else None
        entry = _model_entry(subject, measured[subject.name], base, control, shown)
        if timings:
            entry["cost"] |= aggregate.speed_figures(
                timings[subject.name],
                timings[BASE] if base is not None and comparable[subject.name] else None,
                batch=recipe.evaluation.speed.batch,
                new=recipe.evaluation.speed.new,
            )
        models[subject.name] = entry
        add_verdicts(entry, recipe.evaluation.margins)
        entry["verdict"] = (
            None if base is None else verdict(subject.name, models[BASE], entry, recipe.evaluation.margins)
        )
    return {
        "schema": SCHEMA,
        "models": models,
        "tasks": shown,
        "speed_grid": [grid_entry(point, comparable, recipe.evaluation.speed.new) for point in points],
        "capacity": capacity_table(_footprints(subjects, measured), recipe.evaluation.capacity),
        "settings": _settings(recipe, material, pool, batches, runner if timings else None),
        "identity": identity(recipe, subjects[0], material, measured[BASE], runner, pool),
        "notes": [*notes, *_limits(measured, pool), *([runner.note()] if timings else [])],
    }


def _model_entry(
    subject: Subject, own: ModelScores, base: ModelScores | None, control: ModelScores | None, shown: Sequence[str]
) -> dict[str, Any]:
    tasks, quality = _scores(own, base, shown)
    if control is not None:
        compared_tasks, compared = _scores(own, control, shown)
        quality = _against_control(quality, compared)
        tasks = {task: _against_control(metrics, compared_tasks[task]) for task, metrics in tasks.items()}
    return {
        "role": subject.role,
        "path": str(subject.source.name),
        "fingerprint": subject.source.fingerprint,
        "dtype": own.size.dtype,
        "dtype_on_disk": own.size.dtype_on_disk,
        "attention": own.size.attention,
        "layers": own.size.kinds,
        "quality": quality,
        "tasks": tasks,
        "cost": aggregate.size_figures(own, base),
        **aggregate.length_figures(own, base),
    }


def _against_control(scores: dict[str, Figure], compared: dict[str, Figure]) -> dict[str, Figure]:
    """Scores with their differences to the control.

    Args:
        scores: compared with the base.
        compared: the same scores, compared with the control in the base's place.
    """
    return {
        name: replace(score, difference_to_control=compared[name].difference_to_base) for name, score in scores.items()
    }


def _scores(own: ModelScores, other: ModelScores | None, shown: Sequence[str]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Figures of tasks, and of quality with means over tasks, compared with another model where one is given."""
    tasks = {
        task: {
            metric: aggregate.task_figure(metric, scores, other.tasks[task][metric] if other else None)
            for metric, scores in metrics.items()
        }
        for task, metrics in own.tasks.items()
    }
    quality = aggregate.quality_figures(own, other)
    for name, metric in (("accuracy", "acc"), ("generated", "exact_match")):
        mean = aggregate.mean_of_tasks(tasks, shown, metric)
        quality |= {} if mean is None else {name: mean}
    return tasks, quality


def _settings(
    recipe: Recipe, material: Material, pool: ModelPool, batches: Batches, runner: Runner | None
) -> dict[str, Any]:
    """What was tested and how.

    Args:
        runner: of the measurement of speed; None without one.
    """
    import torch

    spec = recipe.evaluation
    text, responses = material.text, material.responses
    speed = runner and {
        "device": describe_device(pool.device),
        "threads": torch.get_num_threads(),
        "run_by": _name_of(runner),
        "cache": "static" if runner.engine else "dynamic",
        "prompt": spec.speed.prompt,
        "new": spec.speed.new,
        "batch": spec.speed.batch,
        "warm_up": WARM_UP_TOKENS,
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
        "tasks": {
            "names": list(material.tasks.members),
            "limit": spec.limit,
            "fewshot": {name: task.get_config("num_fewshot") for name, task in material.tasks.loaded.items()},
            "chat_template": spec.chat_template,
        },
        "margins": asdict(spec.margins),
        "lengths": {
            "tokens": spec.length_tokens,
            "lengths": list(material.lengths),
            "retrieval": {"items": spec.retrieval, "candidates": FACTS} if material.retrieval else None,
        },
        "batch": {"sequences": batches.first, "reduced": batches.reduced},
        "capacity": FORMULA,
        "speed": speed,
    }


def _name_of(runner: Runner) -> str:
    return "engine" if runner.engine else "transformers"


def identity(
    recipe: Recipe, base: Subject, material: Material, measured: ModelScores, runner: Runner, pool: ModelPool
) -> dict[str, Any]:
    """What must be the same for two results to be compared: for quality, and besides for speed."""
    spec = recipe.evaluation.speed
    return {
        "quality": {
            "base": base.source.fingerprint,
            "base dtype": measured.size.dtype,
            **material.parts(),
        },
        "speed": {
            "device": describe_device(pool.device),
            "dtype": measured.size.dtype,
            "attention": measured.size.attention,
            "run by": _name_of(runner),
            "prompt": spec.prompt,
            "new": spec.new,
            "batch": spec.batch,
        },
    }


def _same_backend(model: ModelScores, base: ModelScores) -> bool:
    return (model.size.dtype, model.size.attention) == (base.size.dtype, base.size.attention)


def _footprints(subjects: Sequence[Subject], measured: dict[str, ModelScores]) -> dict[str, Footprint]:
    import torch

    found = {}
    for subject in subjects:
        size = measured[subject.name].size
        element = getattr(torch, size.dtype).itemsize
        config = load_config(subject.source, converted=None, quantised=True)
        # Quantised weights take in memory what they take on disk.
        stored = quantisation_of(read_config(subject.source.path))
        found[subject.name] = Footprint(config, size.checkpoint_bytes if stored else size.parameters * element, element)
    return found


def _limits(measured: dict[str, ModelScores], pool: ModelPool) -> list[str]:
    """Limits of the comparison."""
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
        found.append(
            "The models do not fit into memory together, so they were timed one after the other, not in turns."
        )
    return found
