"""Figures with their uncertainty, and `results.json`.

Schema of `results.json` (`"schema": 2`):

    schema    2
    models    one entry per model, the base first, keyed by its name (`base`, `control`, `converted`, `trained`, or as
              given); the control is the base after the training that the trained model has had
      role, path, fingerprint    what it is, where it came from, which weights
      dtype, dtype_on_disk, attention    of the loaded weights and cache; of the files; the backend
      layers                     number of layers of each kind, such as {"own": 24, "softmax": 6}
      quality    perplexity, text_loss, response_loss, and accuracy (mean of `acc` or `exact_match`
                 over the tasks that have either): figures
      tasks      {task: {metric: figure}}; metrics as in lm-evaluation-harness
      cost       parameters, checkpoint_bytes, kv_bytes_per_token, kv_bytes_per_token_predicted and, where speed was
                 measured, time_to_first_token, time_per_output_token, tokens_per_second: figures
      agreement  with the base on the longest windows (not in the base's entry): kl and top1 (figures: KL(base || model)
                 of next-token distributions; share of equal greedy tokens), and by_position: edges, kl, top1, where
                 bucket i holds the positions from edges[i] to edges[i + 1]
      lengths    [{length, perplexity, stderr, tokens, difference}]: the same text in windows of several lengths;
                 difference as difference_to_base of a figure
      retrieval  [{length, correct, items, difference}]: questions answered from a text of that length
      verdict    null for the base; else `quality` (worse, better, mixed, within noise, same, uncertain) and `sentence`
    tasks     entries of the recipe, in the order of the tables; other tasks are members of a group
    speed_grid    [{batch, context, new, models: {name: {ttft, tpot, peak_bytes}}}]: ttft and tpot (seconds to the first
              token, and for each further one) are {median, low, high, ratio_to_base}; the ratio is that of rounds
              side by side, null for the base and for another dtype or attention backend; peak_bytes is null without
              CUDA
    capacity  [{memory_gb, models: {name: {context, batch, at_context, window}}}]: what fits into a memory by the
              formula in settings: the longest context of one sequence, and the largest batch at a context; null where
              memory does not limit it
    identity  what has to be equal in two results before they may be compared: quality, speed
    settings  what was tested, how, and for speed: device, threads, run_by, cache, prompt, new,
              batch, repeats, warm_up, interleaved
    samples   [{prompt, reference, texts: {model: text}}]: greedy answers to held-out prompts, and what the row says;
              absent where none were asked for
    notes     what was left out, and what limits a comparison

    A figure is
      value     a number
      unit      of value, difference and range
      n, of     sample size, and of what (windows, rows, items, rounds); null where nothing was sampled
      stderr    standard error of value over that sample; null where there is none
      range     [smallest, largest] round, for times, whose value is the median; else null
      better    higher, lower, or null
      difference_to_base    {value, stderr, interval, method}: the model minus the base, *paired* on the same rows or
                            items, so that its stderr is much smaller than that of either value; interval is the 95 %
                            interval [low, high] and method says how it was made (see `intervals`); all three are null
                            for exact counts, times, and metrics that are no means over items; the whole is null for the
                            base, and for bytes of another dtype than the base's
      difference_to_control    the same against the control, for scores of all other models but the base where there
                            is a control; else null
      ratio_to_base         the model divided by the base (for times the median of the ratios of the interleaved
                            rounds); null where the difference is, and for scores

`items/` beside it holds, for each model, the rows' and items' scores from which all of this follows.
"""

from __future__ import annotations

import dataclasses
import math
import statistics
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from uniattn_cli.errors import StageError
from uniattn_cli.evaluation.intervals import (
    EXPONENTIAL,
    IDENTITY,
    LARGEST_LOSS,
    Difference,
    mean_difference,
    paired_difference,
)
from uniattn_cli.evaluation.tasks import MetricScores
from uniattn_cli.models.losses import RowLosses, summarise
from uniattn_cli.models.of_run import BASE
from uniattn_cli.run.files import read_json

if TYPE_CHECKING:
    from uniattn_cli.evaluation.scores import Measured
    from uniattn_cli.inference.timing import Timing

SCHEMA = 2
RESULTS = "results.json"

FigureDict = dict[str, Any]


def read_results(path: Path) -> dict[str, Any]:
    """The content of a `results.json`.

    Raises:
        StageError: it is missing, damaged, or of another version of this tool.
    """
    results = read_json(path, "run `uniattn eval --force`")
    if "schema" not in results:
        raise StageError(f"{path} is not the result of an evaluation (it has no schema)")
    if results["schema"] != SCHEMA:
        raise StageError(
            f"{path} has schema {results['schema']}, this version of uniattn reads {SCHEMA}; make it again with "
            "`uniattn eval --force`"
        )
    if BASE not in (results.get("models") or ()):
        raise StageError(f"{path} is not the result of an evaluation (it has no base)")
    return results


def figure(value: float, unit: str, better: str | None, **others: Any) -> FigureDict:
    """A figure with all keys of the schema; those not given are null."""
    empty = dict.fromkeys(
        ("n", "of", "stderr", "range", "difference_to_base", "difference_to_control", "ratio_to_base")
    )
    unknown = set(others) - set(empty)
    if unknown:
        raise TypeError(f"a figure has no {unknown}")
    return {"value": value, "unit": unit, "better": better, **empty, **others}


def against_control(entry: FigureDict, compared: FigureDict) -> FigureDict:
    """A score with its difference to the control.

    Args:
        entry: compared with the base.
        compared: the same score, compared with the control in the base's place.
    """
    return {**entry, "difference_to_control": compared["difference_to_base"]}


def quality_figures(model: Measured, base: Measured | None) -> dict[str, FigureDict]:
    """Perplexity, losses and mean accuracy of a model, against the base if one is given."""
    return {
        "perplexity": _perplexity_figure(model.text, base and base.text),
        "text_loss": _loss_figure(model.text, base and base.text, "windows"),
        "response_loss": _loss_figure(model.responses, base and base.responses, "rows"),
    }


def _loss_figure(losses: RowLosses, base: RowLosses | None, of: str) -> FigureDict:
    loss = _summary(losses.sums, losses.counts)
    return figure(
        loss.mean,
        "nats per token",
        "lower",
        n=loss.windows,
        of=of,
        stderr=_known(loss.stderr),
        difference_to_base=_difference_of_losses(losses, base, IDENTITY),
    )


def _difference_of_losses(losses: RowLosses, base: RowLosses | None, transform: str) -> dict[str, Any] | None:
    if base is None:
        return None
    return paired_difference(losses.sums, base.sums, losses.counts, transform=transform).to_dict()


def _perplexity_figure(losses: RowLosses, base: RowLosses | None) -> FigureDict:
    """The standard error is that of the loss, carried through the exponential."""
    loss = _summary(losses.sums, losses.counts)
    perplexity = math.exp(min(loss.mean, LARGEST_LOSS))
    return figure(
        perplexity,
        "perplexity",
        "lower",
        n=loss.windows,
        of="windows",
        stderr=_known(loss.stderr * perplexity),
        difference_to_base=_difference_of_losses(losses, base, EXPONENTIAL),
    )


def _summary(sums: Sequence[float], counts: Sequence[int]) -> Any:
    import torch

    return summarise(torch.tensor(sums, dtype=torch.float64), torch.tensor(counts, dtype=torch.float64))


def _known(stderr: float) -> float | None:
    return stderr if math.isfinite(stderr) else None


def length_figures(model: Measured, base: Measured | None) -> dict[str, Any]:
    """What depends on length: agreement with the base by position, perplexity, and the retrieval probe."""
    found: dict[str, Any] = {}
    agreement = model.agreement
    if agreement is not None:
        windows = {"n": len(agreement.kl), "of": "windows"}
        found["agreement"] = {
            "kl": figure(
                statistics.fmean(agreement.kl), "nats per token", "lower", stderr=mean_stderr(agreement.kl), **windows
            ),
            "top1": figure(
                statistics.fmean(agreement.top1), "share", "higher", stderr=mean_stderr(agreement.top1), **windows
            ),
            "by_position": {
                "edges": agreement.edges,
                "kl": agreement.kl_by_position,
                "top1": agreement.top1_by_position,
            },
        }
    found["lengths"] = []
    for length, losses in sorted(model.lengths.items()):
        entry = _perplexity_figure(losses, base and base.lengths[length])
        found["lengths"].append(
            {
                "length": length,
                "perplexity": entry["value"],
                "stderr": entry["stderr"],
                "tokens": sum(losses.counts),
                "difference": entry["difference_to_base"],
            }
        )
    found["retrieval"] = []
    for length, correct in sorted(model.retrieval.items()):
        difference = base and paired_difference(correct, base.retrieval[length]).to_dict()
        found["retrieval"].append(
            {"length": length, "correct": sum(correct), "items": len(correct), "difference": difference}
        )
    return found


def task_figure(metric: str, scores: MetricScores, base: MetricScores | None) -> FigureDict:
    """A metric of a task; its difference is paired where the metric follows from scores of the items."""
    difference = None
    if base is not None and scores.values is not None and base.values is not None:
        difference = paired_difference(scores.values, base.values, scores.weights, transform=scores.transform)
        # The harness's own value, to the last digit.
        difference = dataclasses.replace(difference, value=scores.value - base.value)
    elif base is not None:
        difference = Difference(scores.value - base.value, None, None, None)
    return figure(
        scores.value,
        "share" if metric.startswith(("acc", "exact_match")) else metric.partition(",")[0],
        "higher" if scores.higher_is_better else "lower",
        n=scores.n,
        of="items",
        stderr=_metric_stderr(scores),
        difference_to_base=difference and difference.to_dict(),
    )


def _metric_stderr(scores: MetricScores) -> float | None:
    if scores.values is None:
        return None
    if scores.weights is None and scores.transform == IDENTITY:
        return mean_stderr(scores.values)
    summary = _summary(scores.values, scores.weights or [1] * len(scores.values))
    return _known(summary.stderr * (scores.value if scores.transform == EXPONENTIAL else 1))


def mean_stderr(values: Sequence[float]) -> float | None:
    """Standard error of a mean; None for fewer than two values."""
    return statistics.stdev(values) / math.sqrt(len(values)) if len(values) > 1 else None


def mean_accuracy(tasks: dict[str, dict[str, FigureDict]], names: Sequence[str]) -> FigureDict | None:
    """Mean of `acc` or `exact_match` over tasks, each weighing the same; None if no task has either."""
    found = (tasks[name].get("acc", tasks[name].get("exact_match")) for name in names)
    figures = [entry for entry in found if entry is not None]
    if not figures:
        return None
    pairs = [entry["difference_to_base"] for entry in figures]
    difference = None if None in pairs else mean_difference([Difference(**pair) for pair in pairs]).to_dict()
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
            difference_to_base=None if against is None else Difference(value - against, None, None, None).to_dict(),
            ratio_to_base=value / against if against else None,
        )
    return found


def speed_figures(
    rounds: Sequence[Timing], base: Sequence[Timing] | None, *, batch: int, new: int
) -> dict[str, FigureDict]:
    """Medians and ranges over rounds; the ratio is the median of the ratios of rounds that ran side by side.

    Args:
        base: of the base; None for the base itself, and for a model of another dtype or attention backend.
    """
    # Loads PyTorch, which who only reads results can do without.
    from uniattn_cli.inference.timing import ratios

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
            ratio = statistics.median(ratios(rounds, base, of))
            difference = Difference(median - statistics.median(against), None, None, None).to_dict()
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
