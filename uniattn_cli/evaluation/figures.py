"""Figures with their uncertainty, and `results.json`.

Schema of `results.json` (`"schema": 1`):

    schema    1
    models    one entry per model, the base first, keyed by its name (`base`, `converted`, `trained`, or as given)
      role, path, fingerprint    what it is, where it came from, which weights
      dtype, dtype_on_disk, attention    of the loaded weights and cache; of the files; the backend
      layers                     number of layers of each kind, such as {"own": 24, "softmax": 6}
      quality    perplexity, text_loss, response_loss, and accuracy (mean over the tasks that have `acc`): figures
      tasks      {task: {metric: figure}}; metrics as in lm-evaluation-harness
      cost       parameters, checkpoint_bytes, kv_bytes_per_token, kv_bytes_per_token_predicted and, where speed was
                 measured, time_to_first_token, time_per_output_token, tokens_per_second: figures
      verdict    null for the base; else `quality` (worse, better, mixed, within noise, same, uncertain) and `sentence`
    tasks     entries of the recipe, in the order of the tables; other tasks are members of a group
    settings  what was tested, how, and for speed: device, threads, cache, prompt, new, batch, repeats, interleaved
    samples   [{prompt, reference, texts: {model: text}}]: greedy answers to held-out prompts, and what the row says
    notes     what was left out, and what limits a comparison

    A figure is
      value     a number
      unit      of value, difference and range
      n, of     sample size, and of what (windows, rows, items, rounds); null where nothing was sampled
      stderr    standard error of value over that sample; null where there is none
      range     [smallest, largest] round, for times, whose value is the median; else null
      better    higher, lower, or null
      difference_to_base    {value, stderr}: the model minus the base, *paired* on the same rows or items, so that its
                            stderr is much smaller than that of either value; stderr is null for exact counts, times,
                            and metrics that are no means over items; all null for the base, and for bytes of another
                            dtype than the base's
      ratio_to_base         the model divided by the base (for times the median of the ratios of the interleaved
                            rounds); null where the difference is, and for scores

`items/` beside it holds, for each model, the rows' and items' scores from which all of this follows.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from uniattn_cli.evaluation.tasks import MetricScores
from uniattn_cli.heldout import RowLosses
from uniattn_cli.scoring import summarise

if TYPE_CHECKING:
    from uniattn_cli.evaluation.measured import Measured
    from uniattn_cli.evaluation.speed import Timing

SCHEMA = 1
# Differences of at most this many standard errors are called noise: about 95 % of those that are.
NOISE = 2.0
LARGEST_LOSS = 700.0  # e to this is still a float

FigureDict = dict[str, Any]


def figure(value: float, unit: str, better: str | None, **others: Any) -> FigureDict:
    """A figure with all keys of the schema; those not given are null."""
    empty = dict.fromkeys(("n", "of", "stderr", "range", "difference_to_base", "ratio_to_base"))
    unknown = set(others) - set(empty)
    if unknown:
        raise TypeError(f"a figure has no {unknown}")
    return {"value": value, "unit": unit, "better": better, **empty, **others}


def quality_figures(model: Measured, base: Measured | None) -> dict[str, FigureDict]:
    """Perplexity, losses and mean accuracy of a model, against the base if one is given."""
    return {
        "perplexity": _perplexity_figure(model.text, base and base.text),
        "text_loss": _loss_figure(model.text, base and base.text, "windows"),
        "response_loss": _loss_figure(model.responses, base and base.responses, "rows"),
    }


def _loss_figure(losses: RowLosses, base: RowLosses | None, of: str) -> FigureDict:
    loss = _summary(losses.sums, losses.counts)
    difference = None
    if base is not None:
        paired = _summary([a - b for a, b in zip(losses.sums, base.sums, strict=True)], losses.counts)
        difference = {"value": paired.mean, "stderr": _known(paired.stderr)}
    return figure(
        loss.mean,
        "nats per token",
        "lower",
        n=loss.windows,
        of=of,
        stderr=_known(loss.stderr),
        difference_to_base=difference,
    )


def _perplexity_figure(losses: RowLosses, base: RowLosses | None) -> FigureDict:
    """Standard errors by linearising the exponential; in the difference row by row, so that what is shared cancels."""
    loss, perplexity, residuals = _linearised(losses)
    difference = None
    if base is not None:
        _, base_perplexity, base_residuals = _linearised(base)
        paired = [a - b for a, b in zip(residuals, base_residuals, strict=True)]
        difference = {
            "value": perplexity - base_perplexity,
            "stderr": _known(_summary(paired, losses.counts).stderr),
        }
    return figure(
        perplexity,
        "perplexity",
        "lower",
        n=loss.windows,
        of="windows",
        stderr=_known(loss.stderr * perplexity),
        difference_to_base=difference,
    )


def _linearised(losses: RowLosses) -> tuple[Any, float, list[float]]:
    loss = _summary(losses.sums, losses.counts)
    perplexity = math.exp(min(loss.mean, LARGEST_LOSS))
    residuals = [
        perplexity * (total - loss.mean * count) for total, count in zip(losses.sums, losses.counts, strict=True)
    ]
    return loss, perplexity, residuals


def _summary(sums: Sequence[float], counts: Sequence[int]) -> Any:
    import torch

    return summarise(torch.tensor(sums, dtype=torch.float64), torch.tensor(counts, dtype=torch.float64))


def _known(stderr: float) -> float | None:
    return stderr if math.isfinite(stderr) else None


def task_figure(metric: str, scores: MetricScores, base: MetricScores | None) -> FigureDict:
    """A metric of a task; its difference is paired where the metric is a mean over items."""
    difference = None
    if base is not None:
        stderr = None
        if scores.values is not None and base.values is not None:
            stderr = mean_stderr([a - b for a, b in zip(scores.values, base.values, strict=True)])
        difference = {"value": scores.value - base.value, "stderr": stderr}
    return figure(
        scores.value,
        "share" if metric.startswith(("acc", "exact_match")) else metric.partition(",")[0],
        "higher" if scores.higher_is_better else "lower",
        n=scores.n,
        of="items",
        stderr=None if scores.values is None else mean_stderr(scores.values),
        difference_to_base=difference,
    )


def mean_stderr(values: Sequence[float]) -> float | None:
    """Standard error of a mean; None for fewer than two values."""
    return statistics.stdev(values) / math.sqrt(len(values)) if len(values) > 1 else None


def mean_accuracy(tasks: dict[str, dict[str, FigureDict]], names: Sequence[str]) -> FigureDict | None:
    """Mean of `acc` over tasks, each weighing the same; None if no task has it."""
    figures = [tasks[name]["acc"] for name in names if "acc" in tasks[name]]
    if not figures:
        return None
    pairs = [entry["difference_to_base"] for entry in figures]
    difference = None
    if None not in pairs:
        difference = {
            "value": statistics.fmean(pair["value"] for pair in pairs),
            "stderr": _stderr_of_mean([pair["stderr"] for pair in pairs]),
        }
    return figure(
        statistics.fmean(entry["value"] for entry in figures),
        "share",
        "higher",
        n=sum(entry["n"] for entry in figures),
        of="items",
        stderr=_stderr_of_mean([entry["stderr"] for entry in figures]),
        difference_to_base=difference,
    )


def _stderr_of_mean(stderrs: Sequence[float | None]) -> float | None:
    if None in stderrs:
        return None
    return math.sqrt(sum(stderr**2 for stderr in stderrs)) / len(stderrs)


def size_figures(model: Measured, base: Measured | None) -> dict[str, FigureDict]:
    """Parameters, bytes on disk and KV bytes per token; bytes of different dtypes are not compared."""
    found = {}
    for name, attribute, unit, alike in (
        ("parameters", "parameters", "parameters", None),
        ("checkpoint_bytes", "checkpoint_bytes", "bytes", "dtype_on_disk"),
        ("kv_bytes_per_token", "kv_bytes", "bytes per token", "dtype"),
        ("kv_bytes_per_token_predicted", "kv_bytes_predicted", "bytes per token", "dtype"),
    ):
        value, against = getattr(model.size, attribute), None
        if base is not None and (alike is None or getattr(model.size, alike) == getattr(base.size, alike)):
            against = getattr(base.size, attribute)
        found[name] = figure(
            value,
            unit,
            "lower",
            difference_to_base=None if against is None else {"value": value - against, "stderr": None},
            ratio_to_base=value / against if against else None,
        )
    return found


def speed_figures(
    rounds: Sequence[Timing], base: Sequence[Timing] | None, *, batch: int, new: int
) -> dict[str, FigureDict]:
    """Medians and ranges over rounds; the ratio is the median of the ratios of rounds that ran side by side."""
    quantities: dict[str, tuple[str, str, Callable[[Timing], float]]] = {
        "time_to_first_token": ("seconds", "lower", lambda timing: timing.first),
        "time_per_output_token": ("seconds", "lower", lambda timing: timing.rest / (new - 1)),
        "tokens_per_second": ("tokens per second", "higher", lambda timing: batch * (new - 1) / timing.rest),
    }
    found = {}
    for name, (unit, better, of) in quantities.items():
        values = [of(timing) for timing in rounds]
        median = statistics.median(values)
        difference = ratio = None
        if base is not None:
            against = [of(timing) for timing in base]
            ratio = statistics.median(a / b for a, b in zip(values, against, strict=True))
            difference = {"value": median - statistics.median(against), "stderr": None}
        found[name] = figure(
            median,
            unit,
            better,
            n=len(values),
            of="rounds",
            range=[min(values), max(values)],
            difference_to_base=difference,
            ratio_to_base=ratio,
        )
    return found
