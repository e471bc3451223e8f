"""Choosing by conversion: candidates are really converted and measured on text held out from their fit."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from uniattn_cli.errors import LayoutError
from uniattn_cli.fitting.match_maps import Matcher
from uniattn_cli.layouts.budget import Budget
from uniattn_cli.layouts.considered import Point
from uniattn_cli.layouts.fast import plan_of
from uniattn_cli.layouts.shorthand import plan_alone
from uniattn_cli.layouts.workbench import Workbench
from uniattn_cli.modeling.layout_uniattn import BORROWING_KINDS, KINDS, AttentionShape, LayerPlan, Layout
from uniattn_cli.models.costs import kv_bytes_per_token
from uniattn_cli.tables import Table

if TYPE_CHECKING:
    from uniattn_cli.analysis.measured import Measured
    from uniattn_cli.layouts.greedy import SearchStep


def proposer(
    matcher: Matcher, kinds: tuple[str, ...], compensation: str | int, max_group: int | None = None
) -> Callable[[Layout, int], list[LayerPlan]]:
    """Gives the plans to try for a layer: one per kind, with the best-matching sources among the `own` layers.

    Args:
        matcher: finds head maps.
        kinds: the kinds allowed.
        compensation: W_c that is asked for, see `Kind.compensation_for`; `linear` always has a full one.
        max_group: largest number of layers that one layer may lend to.
    """
    matchers = {kind: matcher.for_kind(kind) for kind in kinds}

    def propose(layout: Layout, layer: int) -> list[LayerPlan]:
        if not may_change(matcher.shape, layer):
            return []
        lenders = matcher.lenders(layout, layer, max_group)
        plans = (proposal(matchers[kind], layer, kind, compensation, lenders) for kind in kinds)
        return [plan for plan in plans if plan is not None]

    return propose


def may_change(shape: AttentionShape, layer: int) -> bool:
    """Whether a layer may be anything but `own`: the first one of each mask type has to stay."""
    return shape.mask_types.index(shape.mask_types[layer]) != layer


def proposal(
    matcher: Matcher, layer: int, kind: str, compensation: str | int, lenders: Sequence[int]
) -> LayerPlan | None:
    """The plan of a kind to try for a layer, with the best-matching sources; None where there is none.

    Args:
        matcher: of the kind, see `Matcher.for_kind`.
        compensation: W_c that is asked for, see `Kind.compensation_for`; `linear` always has a full one.
        lenders: layers that may lend.
    """
    shape, traits = matcher.shape, KINDS[kind]
    if traits.borrows:
        match = matcher.match(layer, list(lenders))
        return plan_of(match, compensation, kind, shape.group_size) if match else None
    if traits.fewer_heads and shape.kv_heads == 1:
        return None
    return plan_alone(kind, shape, "full" if traits.compensation == "required" else compensation)


def search(bench: Workbench, budget: Budget, compensation: str | int) -> dict[str, list[SearchStep]]:
    """Searches with all allowed kinds together and, unless nothing is to be compared, with each of them alone.

    A greedy search may be led astray, so that the mix is worse than one kind: only a comparison tells.

    Returns:
        The steps of each search by its name; a search that could not meet the budget has the steps that it took.
    """
    from uniattn_cli.layouts.greedy import ThoroughSearch

    if not bench.placement.whole:
        raise LayoutError(
            "the thorough search needs the whole model on the GPU; use --search fast with one of "
            f"{', '.join(BORROWING_KINDS)} in --kinds"
        )
    recipe = bench.recipe
    spec, progress = recipe.layout, bench.options.progress
    propose = proposer(bench.matcher, spec.kinds, compensation, spec.max_group)
    names = {series_name(spec.kinds): spec.kinds}
    if spec.compared != 1:
        names |= {series_name((kind,)): (kind,) for kind in spec.kinds}
    found = {}
    with progress.track("converting candidates", None) as advance:
        runner = ThoroughSearch(
            bench.base,
            bench.texts.fit,
            bench.texts.score,
            recipe.conversion,
            propose,
            chooser=bench.chooser(bench.lenders),
            batch_size=recipe.evaluation.batch_size,
        )
        for name, kinds in names.items():
            runner.reset()
            report, tried = functools.partial(_report, advance, name), functools.partial(_tried, advance, name)
            found[name] = runner.run(
                budget.met, saved=budget.saved, kinds=kinds, protect=spec.protect, report=report, tried=tried
            )
    return found


def _report(advance: Callable[..., None], name: str, step: SearchStep) -> None:
    advance(0, f"{name}: {len(step.layout.changed)} layers changed, KL {step.divergence:.4f}")


def _tried(advance: Callable[..., None], name: str, layer: int, plan: LayerPlan) -> None:
    advance(1, f"{name}: layer {layer} {plan.kind} tried")


def series_name(kinds: tuple[str, ...]) -> str:
    """How a search is called in tables and files."""
    return f"thorough, {' + '.join(kinds)}"


def points_of(runs: dict[str, list[SearchStep]], layers: int) -> list[Point]:
    """The frontier of all searches."""
    points = []
    for name, steps in runs.items():
        points.append(Point(name, Layout.own(layers), 0.0))
        points += [Point(name, step.layout, step.divergence) for step in steps]
    return points


def steps_table(steps: list[SearchStep], measured: Measured) -> Table:
    """What each accepted change saved and cost, in order."""
    own = kv_bytes_per_token(Layout.own(measured.shape.layers), measured.shape, measured.element_size)
    rows = []
    for number, step in enumerate(steps, 1):
        kv = kv_bytes_per_token(step.layout, measured.shape, measured.element_size)
        rows.append(
            [str(number), str(step.layer), step.plan.kind, f"{step.divergence:.4f}", f"{kv:,} ({kv / own:.0%})"]
        )
    columns = ["changed", "layer", "kind", "KL from base", "KV bytes/token"]
    return Table("steps of the thorough search (KL in nats per token, on tokens held out from the fit)", columns, rows)


def frontier_table(points: list[Point], measured: Measured, origin: str = "on the tokens of the search") -> Table:
    """The best layout of any search at each size of the cache.

    Args:
        origin: of the divergences, in words.
    """
    from uniattn_cli.layouts.considered import kinds_in_words, lower_envelope

    own = kv_bytes_per_token(Layout.own(measured.shape.layers), measured.shape, measured.element_size)
    rows = []
    for point in lower_envelope(points, measured.shape):
        kv = kv_bytes_per_token(point.layout, measured.shape, measured.element_size)
        rows.append([f"{kv:,} ({kv / own:.0%})", kinds_in_words(point.layout), point.series, f"{point.value:.4f}"])
    return Table(
        f"Pareto front: the best layout of any search at each cache size (KL {origin})",
        ["KV bytes/token", "changed layers", "search", "KL from base"],
        rows,
    )
