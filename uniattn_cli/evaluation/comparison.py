"""Several `results.json` in one: only what was scored on the same items, with the same settings, against one base."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from uniattn_cli.errors import StageError
from uniattn_cli.evaluation.figures import SCHEMA
from uniattn_cli.evaluation.wording import as_difference, as_ratio, as_value
from uniattn_cli.models.of_run import BASE
from uniattn_cli.tables import Table

QUALITY_LABELS = {
    "perplexity": ("perplexity of held-out text (lower is better)", 1),
    "accuracy": ("mean accuracy of the tasks, % (higher is better)", 100),
    "generated": ("right answers generated, % (higher is better)", 100),
}


PLOT = "pareto.png"
APART = (
    "Speeds were measured in different runs: each is divided by the base's in the same run, and "
    "tokens per second of different runs are not compared."
)


@dataclass(frozen=True)
class Part:
    """One evaluation.

    Attributes:
        label: stands before the names of its models; empty for models that keep their names.
        results: the content of `results.json`.
        origin: where it came from, for messages.
    """

    label: str
    results: dict[str, Any]
    origin: str


@dataclass(frozen=True)
class Merged:
    """Models of several evaluations.

    Attributes:
        models: as in `results.json`, the base once and first.
        tasks: as there.
        fronts: for `quality/cost` the models that no other beats in both.
        notes: what limits the comparison.
    """

    models: dict[str, Any]
    tasks: list[str]
    fronts: dict[str, list[str]]
    notes: list[str]

    def to_dict(self, parts: Sequence[Part]) -> dict[str, Any]:
        """The content of `comparison.json`."""
        return {
            "schema": SCHEMA,
            "models": self.models,
            "tasks": self.tasks,
            "pareto": self.fronts,
            "identity": parts[0].results["identity"],
            "sources": [part.origin for part in parts],
            "notes": self.notes,
        }


def merge(parts: Sequence[Part]) -> Merged:
    """Puts evaluations together.

    Raises:
        StageError: two of them were made with different items, settings or bases.
    """
    first = parts[0]
    for part in parts[1:]:
        _check_same(first, part)
    models = {BASE: first.results["models"][BASE]}
    for part in parts:
        for name, model in part.results["models"].items():
            if name != BASE:
                models[_free(f"{part.label}/{name}" if part.label else name, models)] = model
    notes = list(dict.fromkeys(note for part in parts for note in part.results["notes"]))
    costs = ["kv"]
    reason = _why_no_speed(parts)
    if reason:
        notes.append(reason)
    else:
        costs.append("speed")
        notes += [APART] if len(parts) > 1 else []
    qualities = [key for key in QUALITY_LABELS if all(key in model["quality"] for model in models.values())]
    fronts = {f"{key}/{cost}": pareto(models, key, cost) for cost in costs for key in qualities}
    return Merged(models, first.results["tasks"], fronts, notes)


def _free(name: str, taken: dict[str, Any]) -> str:
    number, free = 2, name
    while free in taken:
        free, number = f"{name} ({number})", number + 1
    return free


def _check_same(one: Part, other: Part) -> None:
    ours, theirs = one.results["identity"]["quality"], other.results["identity"]["quality"]
    if ours == theirs:
        return
    if ours["base"] != theirs["base"]:
        reason = f"their bases differ ({ours['base']}, {theirs['base']})"
    else:
        keys = [key for key in {**ours, **theirs} if ours.get(key) != theirs.get(key)]
        reason = f"they differ in {', '.join(keys)} (items, limit, examples or settings)"
    raise StageError(
        f"{one.origin} and {other.origin} cannot be compared: {reason}; evaluate both with one recipe, or give the "
        "checkpoint directories to evaluate them in the same way"
    )


def _why_no_speed(parts: Sequence[Part]) -> str | None:
    settings = [part.results["identity"]["speed"] for part in parts]
    if any("tokens_per_second" not in part.results["models"][BASE]["cost"] for part in parts):
        return "Speed is not compared: it was not measured in every run."
    for part, other in zip(parts, settings, strict=True):
        keys = [key for key in settings[0] if settings[0][key] != other.get(key)]
        if keys:
            told = ", ".join(f"{key} {settings[0][key]} and {other.get(key)}" for key in keys)
            return f"Speed is not compared: {parts[0].origin} and {part.origin} were timed differently ({told})."
    return None


def pareto(models: dict[str, Any], quality: str, cost: str) -> list[str]:
    """Models that no other equals or beats in both respects while being better in one.

    Args:
        models: as in `results.json`.
        quality: key of a model's `quality`.
        cost: `kv` (less is better) or `speed` (more is better).
    """
    points = {}
    for name, model in models.items():
        entry, place = model["quality"][quality], cost_of(model, cost)
        if place is not None:
            # Both turned so that more is better.
            points[name] = (
                entry.value * (1 if entry.better == "higher" else -1),
                place * (1 if cost == "speed" else -1),
            )
    return [
        name
        for name, point in points.items()
        if not any(
            all(a >= b for a, b in zip(other, point, strict=True)) and other != point for other in points.values()
        )
    ]


def table(merged: Merged, title: str) -> Table:
    """One row per model: quality with its difference to the base, agreement, and cost."""
    columns = ["model", "perplexity", "− base", "accuracy", "− base", "KL from base", "same tokens"]
    columns += ["KV per token", "parameters", "tokens/s ÷ base"]
    rows = []
    for name, model in merged.models.items():
        quality, cost, agreement = model["quality"], model["cost"], model.get("agreement")
        accuracy, speed = quality.get("accuracy"), cost.get("tokens_per_second")
        is_base = name == BASE
        rows.append(
            [
                name,
                as_value(quality["perplexity"]),
                "" if is_base else as_difference(quality["perplexity"]),
                as_value(accuracy) if accuracy else "",
                as_difference(accuracy) if accuracy and not is_base else "",
                as_value(agreement["kl"]) if agreement else "",
                as_value(agreement["top1"]) if agreement else "",
                as_value(cost["kv_bytes_per_token"]),
                as_value(cost["parameters"]),
                "" if speed is None else "1.00×" if is_base else as_ratio(speed),
            ]
        )
    kept = [index for index in range(len(columns)) if any(row[index] for row in rows)]
    return Table(title, [columns[index] for index in kept], [[row[index] for index in kept] for row in rows])


def front_notes(merged: Merged) -> list[str]:
    """The models on each Pareto front."""
    words = {"kv": "KV cache", "speed": "speed"}
    found = []
    for key, names in merged.fronts.items():
        quality, cost = key.split("/")
        found.append(f"Pareto front of {quality} and {words[cost]}: {', '.join(names)}.")
    return found


def cost_of(model: dict[str, Any], cost: str) -> float | None:
    """A model's place on the axis of a cost: kB per token, or its speed divided by the base's; None if unknown."""
    if cost == "kv":
        return model["cost"]["kv_bytes_per_token"].value / 1000
    speed = model["cost"].get("tokens_per_second")
    if speed is None:
        return None
    return 1.0 if model["role"] == BASE else speed.ratio_to_base
