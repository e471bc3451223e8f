"""From scores of rows and items, sizes and timings of a model to its figures, compared with those of the base."""

from __future__ import annotations

import dataclasses
import math
import statistics
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from uniattn_cli.evaluation.figures import Figure
from uniattn_cli.evaluation.intervals import (
    EXPONENTIAL,
    IDENTITY,
    LARGEST_LOSS,
    Difference,
    mean_difference,
    paired_difference,
)
from uniattn_cli.evaluation.tasks import MetricScores
from uniattn_cli.inference.timing import ratios
from uniattn_cli.models.losses import RowLosses, summarise

if TYPE_CHECKING:
    from uniattn_cli.evaluation.scores import ModelScores
    from uniattn_cli.inference.timing import Timing


def quality_figures(model: ModelScores, base: ModelScores | None) -> dict[str, Figure]:
    """Perplexity, losses and mean accuracy of a model, against the base if one is given."""
    return {
        "perplexity": _perplexity_figure(model.text, base.text if base else None),
        "text_loss": _loss_figure(model.text, base.text if base else None, "windows"),
        "response_loss": _loss_figure(model.responses, base.responses if base else None, "rows"),
    }


def _loss_figure(losses: RowLosses, base: RowLosses | None, of: str) -> Figure:
    loss = _summary(losses.sums, losses.counts)
    return Figure(
        loss.mean,
        "nats per token",
        "lower",
        n=loss.windows,
        of=of,
        stderr=_known(loss.stderr),
        difference_to_base=_difference_of_losses(losses, base, IDENTITY),
    )


def _difference_of_losses(losses: RowLosses, base: RowLosses | None, transform: str) -> Difference | None:
    if base is None:
        return None
    return paired_difference(losses.sums, base.sums, losses.counts, transform=transform)


def _perplexity_figure(losses: RowLosses, base: RowLosses | None) -> Figure:
    """The standard error is that of the loss, carried through the exponential."""
    loss = _summary(losses.sums, losses.counts)
    perplexity = math.exp(min(loss.mean, LARGEST_LOSS))
    return Figure(
        perplexity,
        "perplexity",
        "lower",
        n=loss.windows,
        of="windows",
        stderr=_known(loss.stderr * perplexity),
        difference_to_base=_difference_of_losses(losses, base, EXPONENTIAL),
    )


def _summary(sums: Sequence[float], counts: Sequence[float]) -> Any:
    import torch

    return summarise(torch.tensor(sums, dtype=torch.float64), torch.tensor(counts, dtype=torch.float64))


def _known(stderr: float) -> float | None:
    return stderr if math.isfinite(stderr) else None


def length_figures(model: ModelScores, base: ModelScores | None) -> dict[str, Any]:
    """What depends on length: agreement with the base by position, perplexity, and the retrieval probe."""
    found: dict[str, Any] = {}
    agreement = model.agreement
    if agreement is not None:
        windows: dict[str, Any] = {"n": len(agreement.kl), "of": "windows"}
        found["agreement"] = {
            "kl": Figure(
                statistics.fmean(agreement.kl), "nats per token", "lower", stderr=mean_stderr(agreement.kl), **windows
            ),
            "top1": Figure(
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
        entry = _perplexity_figure(losses, base.lengths[length] if base else None)
        found["lengths"].append(
            {
                "length": length,
                "perplexity": entry.value,
                "stderr": entry.stderr,
                "tokens": sum(losses.counts),
                "difference": entry.difference_to_base,
            }
        )
    found["retrieval"] = []
    for length, correct in sorted(model.retrieval.items()):
        difference = base and paired_difference(correct, base.retrieval[length])
        found["retrieval"].append(
            {"length": length, "correct": sum(correct), "items": len(correct), "difference": difference}
        )
    return found


def task_figure(metric: str, scores: MetricScores, base: MetricScores | None) -> Figure:
    """A metric of a task; its difference is paired where the metric follows from scores of the items."""
    difference = None
    if base is not None and scores.values is not None and base.values is not None:
        difference = paired_difference(scores.values, base.values, scores.weights, transform=scores.transform)
        # The harness's own value, to the last digit.
        difference = dataclasses.replace(difference, value=scores.value - base.value)
    elif base is not None:
        difference = Difference(scores.value - base.value)
    return Figure(
        scores.value,
        "share" if metric.startswith(("acc", "exact_match")) else metric.partition(",")[0],
        "higher" if scores.higher_is_better else "lower",
        n=scores.n,
        of="items",
        stderr=_metric_stderr(scores),
        difference_to_base=difference,
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


def mean_of_tasks(tasks: dict[str, dict[str, Figure]], names: Sequence[str], metric: str) -> Figure | None:
    """Mean of a metric, such as `acc`, over the tasks that have it, each weighing the same; None if no task has it."""
    figures = [tasks[name][metric] for name in names if metric in tasks[name]]
    if not figures:
        return None
    pairs = [entry.difference_to_base for entry in figures if entry.difference_to_base is not None]
    difference = mean_difference(pairs) if len(pairs) == len(figures) else None
    return Figure(
        statistics.fmean(entry.value for entry in figures),
        "share",
        "higher",
        n=sum(entry.n or 0 for entry in figures),
        of="items",
        stderr=_stderr_of_mean([entry.stderr for entry in figures]),
        difference_to_base=difference,
    )


def _stderr_of_mean(stderrs: Sequence[float | None]) -> float | None:
    known = [stderr for stderr in stderrs if stderr is not None]
    return math.sqrt(sum(stderr**2 for stderr in known)) / len(stderrs) if len(known) == len(stderrs) else None


def size_figures(model: ModelScores, base: ModelScores | None) -> dict[str, Figure]:
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
        found[name] = Figure(
            value,
            unit,
            "lower",
            difference_to_base=None if against is None else Difference(value - against),
            ratio_to_base=value / against if against else None,
        )
    return found


def speed_figures(
    rounds: Sequence[Timing], base: Sequence[Timing] | None, *, batch: int, new: int
) -> dict[str, Figure]:
    """Medians and ranges over rounds; the ratio is the median of the ratios of rounds that ran side by side.

    Args:
        base: of the base; None for the base itself, and for a model of another dtype or attention backend.
    """
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
            difference = Difference(median - statistics.median(against))
        found[name] = Figure(
            median,
            unit,
            better,
            n=len(values),
            of="rounds",
            range=(min(values), max(values)),
            difference_to_base=difference,
            ratio_to_base=ratio,
        )
    return found
