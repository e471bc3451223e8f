"""Tables, sentences and the plot of a benchmark."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from uniattn_cli.charts import MARKERS, Chart, colour, write_png
from uniattn_cli.tables import NOTHING, Table

if TYPE_CHECKING:
    from uniattn_cli.inference.measurement import Measurement
    from uniattn_cli.models.device import Series

LINES = {"engine": "-", "transformers dynamic": ":", "transformers static": "-."}


def explanation(bandwidth: float) -> str:
    """How to read the tables."""
    return (
        "Median of the rounds, ± half their range; all models take turns in every round. “× floor” is the time divided "
        "by the time needed to read the weights and the KV cache once at this device's copy bandwidth "
        f"({bandwidth / 1e9:.0f} GB/s, reads plus writes). “× first” is the speed relative to the first model, in "
        "decoding and to the first token; more is faster."
    )


def tables(measurements: Sequence[Measurement]) -> list[Table]:
    """One table of decoding steps, and one of prompts where any were timed."""
    found = [Table("Decoding", STEP_COLUMNS, [_step_row(one, measurements) for one in measurements])]
    if any(one.first for one in measurements):
        rows = [_first_row(one, measurements) for one in measurements if one.first]
        found.append(Table("Time to first token", FIRST_COLUMNS, rows))
    return found


STEP_COLUMNS = ["model", "run by", "batch", "context", "ms per step", "× floor", "tokens/s", "× first", "KV cache, GB"]
FIRST_COLUMNS = ["model", "run by", "batch", "context", "ms", "× first"]


def _step_row(one: Measurement, measurements: Sequence[Measurement]) -> list[str]:
    place = [one.model, one.path, str(one.batch), str(one.context)]
    size = f"{one.kv_bytes / 1e9:.3f}" if one.kv_bytes else NOTHING
    if one.step is None:
        return [*place, "out of memory" if not one.fits else NOTHING, NOTHING, NOTHING, NOTHING, size]
    floor = f"{one.step.median / one.floor:.2f}" if one.floor else NOTHING
    first = reference(one, measurements)
    ratio = f"{first.step.median / one.step.median:.2f}" if first and first.step else NOTHING
    return [*place, _milliseconds(one.step), floor, f"{one.tokens_per_second:,.0f}", ratio, size]


def _first_row(one: Measurement, measurements: Sequence[Measurement]) -> list[str]:
    first, own = reference(one, measurements), one.first
    ratio = f"{first.first.median / own.median:.2f}" if own and first and first.first else NOTHING
    return [one.model, one.path, str(one.batch), str(one.context), _milliseconds(own) if own else NOTHING, ratio]


def _milliseconds(series: Series) -> str:
    return f"{series.median * 1e3:.3f} ± {series.median * series.spread * 500:.3f}"


def reference(one: Measurement, measurements: Sequence[Measurement], path: str = "engine") -> Measurement | None:
    """The first model of the comparison, run in this way at the same shape."""
    name = measurements[0].model
    same = [
        other
        for other in measurements
        if (other.model, other.path, other.batch, other.context) == (name, path, one.batch, one.context)
    ]
    return same[0] if same else None


def conclusions(measurements: Sequence[Measurement]) -> list[str]:
    """What each further model gains over the first one, over all shapes, one sentence for each way of running them."""
    found, base = [], measurements[0].model
    for path, name in itertools.product(LINES, dict.fromkeys(one.model for one in measurements)):
        same = [one for one in measurements if (one.model, one.path) == (name, path)]
        pairs = [(one, first) for one in same if (first := reference(one, measurements, path)) and first is not one]
        steps = [(one.step.median, first.step.median) for one, first in pairs if one.step and first.step]
        firsts = [(one.first.median, first.first.median) for one, first in pairs if one.first and first.first]
        if steps and path == "engine":
            span = _span([theirs / own for own, theirs in steps])
            found.append(f"{name} decodes {span} times as many tokens per second as {base}.")
        elif steps and firsts:
            times = [_span([own / theirs for own, theirs in values]) for values in (steps, firsts)]
            found.append(
                f"Run by {path}, {name} takes {times[0]} times as long as {base} per token, and {times[1]} times as "
                "long to the first token."
            )
    return found


def _span(ratios: Sequence[float]) -> str:
    least, most = (f"{ratio:.2f}" for ratio in (min(ratios), max(ratios)))
    return least if least == most else f"{least} to {most}"


def draw(measurements: Sequence[Measurement], path: Path) -> None:
    """Time per step against context, one panel for each batch size, floors dashed."""
    batches = sorted({one.batch for one in measurements})
    charts = [Chart(f"Batch {batch}", "", partial(_steps, measurements, batch)) for batch in batches]
    write_png(charts, path, columns=len(charts), note="thin dashed lines: floor")


def _steps(measurements: Sequence[Measurement], batch: int, axis: Any) -> None:
    for index, name in enumerate(dict.fromkeys(one.model for one in measurements)):
        for line, style in LINES.items():
            points = [
                (one.context, one.step.median * 1e3, one.floor * 1e3)
                for one in measurements
                if (one.model, one.path, one.batch) == (name, line, batch) and one.step
            ]
            if not points:
                continue
            contexts, times, floors = zip(*sorted(points), strict=True)
            label = name if line == "engine" else f"{name}, {line}"
            axis.plot(contexts, times, style, marker=MARKERS[index % len(MARKERS)], color=colour(index), label=label)
            if line == "engine":
                axis.plot(contexts, floors, "--", color=colour(index), alpha=0.5, linewidth=1)
    axis.set(xlabel="context, tokens", ylabel="ms per step")
    axis.set_xscale("log", base=2)
    axis.set_yscale("log")
    if axis.get_legend_handles_labels()[1]:
        axis.legend()
