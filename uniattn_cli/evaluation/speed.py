"""Time to first token and time per output token, measured on all models in turn in one process."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from uniattn_cli.inference.timing import Timing, ratios


@dataclass(frozen=True)
class Runner:
    """What generated in the measurement of speed.

    Attributes:
        engine: this package's engine; else transformers with a dynamic cache.
        reason: why it was not the engine, where it should have been.
    """

    engine: bool = False
    reason: str = ""

    def note(self) -> str:
        """For the report."""
        if self.engine:
            return "Speed: all models were run by this package's decoding engine."
        reason = f" ({self.reason})" if self.reason else ""
        return (
            f"Speed: all models were run by transformers{reason}, where each layer that borrows keys reads them again; "
            "`uniattn bench` times this package's engine."
        )


@dataclass(frozen=True)
class GridPoint:
    """All models at one batch size and one length of the prompt.

    Attributes:
        batch: sequences at once.
        context: tokens of the prompt.
        timings: by model, one per round; the first model, with which the others are compared, has one more at the end.
    """

    batch: int
    context: int
    timings: dict[str, list[Timing]]


def grid_entry(point: GridPoint, comparable: Mapping[str, bool], new: int) -> dict[str, Any]:
    """One entry of `speed_grid` in `results.json`.

    Args:
        point: the timings.
        comparable: for each model whether it may be divided by the first (same dtype and attention backend).
        new: tokens generated.
    """
    base = next(iter(point.timings.values()))
    quantities: dict[str, Callable[[Timing], float]] = {
        "ttft": lambda timing: timing.first,
        "tpot": lambda timing: timing.rest / (new - 1),
    }
    models = {}
    for name, rounds in point.timings.items():
        entry: dict[str, Any] = {}
        for key, of in quantities.items():
            values = [of(timing) for timing in rounds]
            ratio = statistics.median(ratios(rounds, base, of)) if rounds is not base and comparable[name] else None
            median = statistics.median(values)
            entry[key] = {"median": median, "low": min(values), "high": max(values), "ratio_to_base": ratio}
        peaks = [timing.peak for timing in rounds if timing.peak is not None]
        models[name] = entry | {"peak_bytes": max(peaks, default=None)}
    return {"batch": point.batch, "context": point.context, "new": new, "models": models}
