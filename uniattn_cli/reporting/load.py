"""What loads gave that were sent to servers, as a table and a plot."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from uniattn_cli.charts import Chart, from_zero, plot, write_png
from uniattn_cli.tables import Table

COLUMNS = ["model", "prompt", "at once", "requests/s", "× first", "tokens/s", "first token, s", "later ones, ms"]
COLUMNS += ["preempted", "failed"]


@dataclass(frozen=True)
class Load:
    """What one load gave.

    Attributes:
        model: whose server it was sent to.
        round: which round, from 0.
        context: tokens of a prompt.
        load: requests that were sent at the same time.
        requests_per_second, tokens_per_second: answered requests, and new tokens.
        first: seconds to the first token, median and 99th percentile.
        later: seconds from one later token to the next, mean of a request: median and 99th percentile.
        preemptions: requests that lost their place in the cache and started over.
        failed: requests without an answer.
    """

    model: str
    round: int
    context: int
    load: int
    requests_per_second: float
    tokens_per_second: float
    first: tuple[float, float]
    later: tuple[float, float]
    preemptions: int
    failed: int


def table(loads: Sequence[Load]) -> Table:
    """Means over rounds, one row for each model, context and load; each model beside the first one."""
    rows = []
    for context, load in sorted({(one.context, one.load) for one in loads}):
        reference = 0.0
        for model in dict.fromkeys(one.model for one in loads):
            rounds = [one for one in loads if (one.model, one.context, one.load) == (model, context, load)]
            requests = statistics.mean(one.requests_per_second for one in rounds)
            reference = reference or requests
            rows.append(
                [
                    *(model, f"{context:,}", str(load), f"{requests:.2f}", f"{requests / reference:.2f}"),
                    f"{statistics.mean(one.tokens_per_second for one in rounds):.1f}",
                    _pair([one.first for one in rounds], 1, 2),
                    _pair([one.later for one in rounds], 1e3, 1),
                    f"{statistics.mean(one.preemptions for one in rounds):g}",
                    f"{statistics.mean(one.failed for one in rounds):g}",
                ]
            )
    return Table("", COLUMNS, rows)


def _pair(values: Sequence[tuple[float, float]], scale: float, digits: int) -> str:
    return " / ".join(f"{scale * statistics.mean(each):.{digits}f}" for each in zip(*values, strict=True))


def draw(loads: Sequence[Load], path: Path) -> None:
    """Requests per second against requests that are sent at once, one panel for each length of prompt."""
    contexts = sorted({one.context for one in loads})
    charts = [Chart(f"Prompts of {context:,} tokens", "", partial(_rates, loads, context)) for context in contexts]
    write_png(charts, path, columns=len(charts))


def _rates(loads: Sequence[Load], context: int, axis: Any) -> None:
    for index, model in enumerate(dict.fromkeys(one.model for one in loads)):
        points: dict[int, list[float]] = {}
        for one in loads:
            if (one.model, one.context) == (model, context):
                points.setdefault(one.load, []).append(one.requests_per_second)
        plot(axis, model, [(load, statistics.mean(values)) for load, values in points.items()], style=index)
    axis.set(xlabel="requests at once", ylabel="requests per second")
    axis.set_xscale("log", base=2)
    from_zero(axis)
    axis.legend()
