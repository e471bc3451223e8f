"""Layouts that were considered: the frontier over budgets and the shortlist that was really converted."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from uniattn_cli.modeling.layout_uniattn import AttentionShape, Layout
from uniattn_cli.models.costs import kv_bytes_per_token
from uniattn_cli.run.files import write_json
from uniattn_cli.tables import NOTHING, Table

SCHEMA = 1
JSON_FILE = "grouping.json"


@dataclass(frozen=True)
class Point:
    """One layout of a frontier.

    Attributes:
        series: the search that found it.
        layout: the layout.
        value: what the search judged it by, see `Considered.measure`.
    """

    series: str
    layout: Layout
    value: float


@dataclass(frozen=True)
class Validated:
    """A layout of the shortlist, really converted.

    Attributes:
        name: how it was found.
        layout: with the heads that were matched in the conversion.
        divergence: mean KL(base || converted) in nats per token, on text used for neither fit nor search.
        stderr: its standard error over sequences.
        behind: mean difference of the divergence to the best of the shortlist, on the same sequences.
        behind_stderr: its standard error.
        predicted: the divergence that the sum of its layers' scores predicts; None where there are no scores.
        trained: the divergence after a short training; None where it was not trained.
    """

    name: str
    layout: Layout
    divergence: float
    stderr: float
    behind: float = 0.0
    behind_stderr: float = 0.0
    predicted: float | None = None
    trained: float | None = None


@dataclass(frozen=True)
class Considered:
    """Everything that the choice was made from.

    Attributes:
        measure: what the values of the frontier are; smaller is better.
        frontier: layouts over budgets, by series.
        shortlist: what was converted and compared, best first, those that were trained before others; empty where
            nothing was.
        tokens: tokens that the shortlist was compared on.
        chosen: the layout taken.
        max_loss: the most that it may lose, where as much as possible was to be saved.
    """

    measure: str
    frontier: list[Point]
    shortlist: list[Validated]
    tokens: int
    chosen: Layout
    max_loss: float | None = None

    def save(self, directory: Path, shape: AttentionShape) -> None:
        """Writes `grouping.json`, with every layout in full."""
        own = kv_bytes_per_token(Layout.own(shape.layers), shape, 1)

        def described(entry: Point | Validated, **more: Any) -> dict:
            return {
                **more,
                "changed": len(entry.layout.changed),
                "kv_share": round(kv_bytes_per_token(entry.layout, shape, 1) / own, 6),
                "layers": entry.layout.to_list(),
            }

        content = {
            "schema": SCHEMA,
            "measure": self.measure,
            "frontier": [described(p, series=p.series, value=_number(p.value)) for p in self.frontier],
            "shortlist": [
                described(
                    entry,
                    name=entry.name,
                    divergence=_number(entry.divergence),
                    stderr=_number(entry.stderr),
                    behind=_number(entry.behind),
                    behind_stderr=_number(entry.behind_stderr),
                    **({} if entry.predicted is None else {"predicted": _number(entry.predicted)}),
                    **({} if entry.trained is None else {"trained": _number(entry.trained)}),
                )
                for entry in self.shortlist
            ],
            "shortlist_tokens": self.tokens,
            "chosen": self.chosen.to_list(),
        }
        write_json(directory / JSON_FILE, content)

    def reason(self) -> str:
        """Why this one of the shortlist was chosen, in one sentence; empty if nothing was compared."""
        if self.max_loss is not None and self.shortlist:
            return self._reason_of_saving(self.max_loss)
        if len(self.shortlist) < 2:
            return ""
        best, second = self.shortlist[:2]
        if best.trained is not None and second.trained is not None:
            return (
                f"'{best.name}' chosen: closest to the base after a short training, of the best of "
                f"{len(self.shortlist)} layouts converted and compared on {self.tokens:,} tokens "
                f"(KL {best.trained:.4f}; '{second.name}' {second.trained:.4f})"
            )
        sure = second.behind > 1.96 * second.behind_stderr
        return (
            f"'{best.name}' chosen: closest to the base of {len(self.shortlist)} layouts converted and compared on "
            f"{self.tokens:,} tokens (KL {best.divergence:.4f}; '{second.name}' {second.divergence:.4f}"
            f"{'' if sure else ', a difference within noise'})"
        )

    def _reason_of_saving(self, limit: float) -> str:
        taken = self._taken
        compared = f"{len(self.shortlist)} layouts converted and compared on {self.tokens:,} tokens"
        if taken.divergence <= limit:
            why = f"saves most of those that lose at most {limit:g}"
        else:
            why = f"none loses at most {limit:g}, and it loses least"
        return f"'{taken.name}' chosen: {why} (KL {taken.divergence:.4f}); {compared}"

    @property
    def _taken(self) -> Validated:
        return next(entry for entry in self.shortlist if entry.layout == self.chosen)

    def table(self, shape: AttentionShape, element_size: int) -> Table | None:
        """The shortlist; None where nothing was converted."""
        if not self.shortlist:
            return None
        own = kv_bytes_per_token(Layout.own(shape.layers), shape, element_size)
        predicted, trained = (getattr(self.shortlist[0], name) is not None for name in ("predicted", "trained"))
        rows = []
        for entry in self.shortlist:
            kv = kv_bytes_per_token(entry.layout, shape, element_size)
            behind = "-" if entry.behind == 0 else f"+{_within(entry.behind, entry.behind_stderr)}"
            after = NOTHING if entry.trained is None else f"{entry.trained:.4f}"
            rows.append(
                [
                    entry.name + (" *" if entry is self._taken else ""),
                    kinds_in_words(entry.layout),
                    f"{kv:,} ({kv / own:.0%})",
                    *([] if entry.predicted is None else [f"{entry.predicted:.4f}"]),
                    _within(entry.divergence, entry.stderr),
                    behind,
                    *([after] if trained else []),
                ]
            )
        title = f"shortlist, converted and compared on {self.tokens:,} tokens (KL in nats per token, 95 %)"
        columns = ["layout", "changed layers", "KV bytes/token", *(["predicted"] if predicted else [])]
        columns += ["KL from base", "above the best", *(["trained"] if trained else [])]
        return Table(title, columns, rows)


def kinds_in_words(layout: Layout) -> str:
    """Such as `8 softmax, 2 linear`."""
    counts: dict[str, int] = {}
    for plan in layout:
        if plan.kind != "own":
            counts[plan.kind] = counts.get(plan.kind, 0) + 1
    return ", ".join(f"{count} {kind}" for kind, count in counts.items()) or "none"


def lower_envelope(points: list[Point], shape: AttentionShape) -> list[Point]:
    """The points that no other one beats in both KV bytes and value, from the largest cache to the smallest."""
    ordered = sorted(points, key=lambda point: (kv_bytes_per_token(point.layout, shape, 1), point.value))
    kept: list[Point] = []
    for point in ordered:
        if not kept or point.value < kept[-1].value:
            kept.append(point)
    return kept[::-1]


def frontier_table(points: list[Point], shape: AttentionShape, element_size: int) -> Table:
    """The layout with the smallest predicted loss at each size of the cache, whatever kinds it has."""
    own = kv_bytes_per_token(Layout.own(shape.layers), shape, element_size)
    rows = []
    for point in lower_envelope(points, shape):
        kv = kv_bytes_per_token(point.layout, shape, element_size)
        rows.append([f"{kv:,} ({kv / own:.0%})", kinds_in_words(point.layout), point.series, f"{point.value:.4f}"])
    return Table(
        "Pareto front: the best layout at each cache size (KL predicted: the sum of scores)",
        ["KV bytes/token", "changed layers", "search", "KL from base"],
        rows,
    )


def _within(value: float, stderr: float) -> str:
    """With its 95 % half-width, where there is one."""
    return f"{value:.4f}" if math.isnan(stderr) else f"{value:.4f} ± {1.96 * stderr:.4f}"


def _number(value: float) -> float | None:
    return float(f"{value:.6g}") if math.isfinite(value) else None
