"""How often each verdict is given of models that are as good as their base, slightly worse and clearly worse.

    python -m benchmarks.verdicts --out docs/benchmarks/verdicts.json

Evaluations are drawn at random: losses of windows of text and of responses, multiple choice in which a fifth of the
answers flip, and generated answers of which a tenth do. The true difference is a number of margins (0.02 nats, 1
point), the same in all scores or in generated answers alone. Judging is that of `uniattn eval`.
"""

from __future__ import annotations

import argparse
from collections import Counter
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import numpy

from benchmarks import runner
from uniattn_cli.evaluation.aggregate import mean_of_tasks, quality_figures, task_figure
from uniattn_cli.evaluation.tasks import MetricScores
from uniattn_cli.evaluation.verdict import AS_GOOD, BETTER, MIXED, SAME, UNTOLD, WORSE, add_verdicts, overall
from uniattn_cli.models.losses import RowLosses
from uniattn_cli.recipe.schema import MarginSpec
from uniattn_cli.tables import Table

MARGINS = MarginSpec()
# True differences in margins, of generated answers and of all other scores; from 1 on a model is not as good.
EFFECTS = {"0": (0.0, 0.0), "0.25": (0.25, 0.25), "1": (1.0, 1.0), "1, generated alone": (1.0, 0.0), "3": (3.0, 3.0)}
WORDS = (SAME, AS_GOOD, BETTER, WORSE, MIXED, UNTOLD)


@dataclass(frozen=True)
class Size:
    """How much is measured: windows of text, rows of responses, and items of each of several tasks."""

    windows: int
    rows: int
    tasks: int
    items: int


SIZES = {"default recipe": Size(16, 64, 2, 60), "ten thousand items a task": Size(512, 1000, 5, 10_000)}


def judged(size: Size, generated: float, effect: float, rng: numpy.random.Generator) -> dict[str, Any]:
    """A model's entry of `results.json`, as far as it is judged, for an evaluation drawn at random.

    Args:
        generated: true difference of generated answers, in margins.
        effect: of all other scores.
    """
    model, base = SimpleNamespace(), SimpleNamespace()
    for name, rows, tokens, spread in (("text", size.windows, 511, 0.03), ("responses", size.rows, 120, 0.06)):
        losses = rng.normal(2.5, 0.4, rows) * tokens
        worse = rng.normal(effect * MARGINS.nats, spread, rows) * tokens
        setattr(base, name, RowLosses(losses.tolist(), [tokens] * rows))
        setattr(model, name, RowLosses((losses + worse).tolist(), [tokens] * rows))
    tasks = {f"choices {index}": {"acc": _task("acc", size.items, 0.2, effect, rng)} for index in range(size.tasks)}
    tasks["questions"] = {"exact_match": _task("exact_match", size.items, 0.1, generated, rng)}
    quality = quality_figures(model, base)  # type: ignore[arg-type]  # as much of the scores as it reads
    for name, metric in (("accuracy", "acc"), ("generated", "exact_match")):
        mean = mean_of_tasks(tasks, list(tasks), metric)
        assert mean is not None, "there are such tasks"
        quality[name] = mean
    entry = {"quality": quality, "tasks": tasks, "lengths": [], "retrieval": []}
    add_verdicts(entry, MARGINS)
    return entry


def _task(metric: str, items: int, flips: float, effect: float, rng: numpy.random.Generator) -> Any:
    """A task of which the base solves half, and whose answers flip both ways, in balance but for the effect."""
    base, drawn = rng.random(items) < 0.5, rng.random(items)
    lost = MARGINS.points / 100 * effect
    model = numpy.where(drawn < numpy.where(base, flips + lost, flips - lost), ~base, base)
    scores = [MetricScores(float(each.mean()), each.astype(float).tolist(), True, items) for each in (model, base)]
    return task_figure(metric, *scores)


def add_options(parser: argparse.ArgumentParser) -> None:
    """The options of this benchmark."""
    parser.add_argument("--trials", type=int, default=200)


def measure(arguments: argparse.Namespace, results: runner.Results) -> None:
    """Counts the verdicts for each size and effect."""
    results.begin({"trials": arguments.trials, "nats": MARGINS.nats, "points": MARGINS.points})
    for name, size in SIZES.items():
        for words, effects in EFFECTS.items():
            key = f"{name} | {words}"
            if results.missing("rows", [key]):
                rng = numpy.random.default_rng(0)
                counts = Counter(overall(judged(size, *effects, rng)) for _ in range(arguments.trials))
                results.add("rows", key, {word: counts[word] / arguments.trials for word in WORDS})


def markdown(content: runner.Content) -> str:
    """One line for each size and effect."""
    setting, table = content["setting"], []
    for key, shares in content["rows"].items():
        name, effect = key.split(" | ")
        table.append([name, effect, *(f"{100 * shares[word]:.1f} %" for word in WORDS)])
    return runner.page(
        "How often each verdict is given",
        f"{setting['trials']} evaluations drawn for each line. True difference in margins ({setting['nats']} nats, "
        f"{setting['points']} point), the model being worse. Made by `benchmarks/verdicts.py`.",
        Table("", ["measured", "true difference", *WORDS], table),
    )


def order(key: str) -> tuple[int, int]:
    """Where a row stands in the file."""
    name, effect = key.split(" | ")
    return list(SIZES).index(name), list(EFFECTS).index(effect)


if __name__ == "__main__":
    runner.run("verdicts", __doc__, ("rows",), add_options, measure, markdown=markdown, order=order)
