"""`--search thorough`: the layout whose really converted model stays closest to the base, over the allowed kinds."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from uniattn_cli.accounting import count_parameters, kv_bytes_per_token
from uniattn_cli.errors import LayoutError
from uniattn_cli.families import check_target
from uniattn_cli.grouping.matching import Matcher
from uniattn_cli.grouping.search import plan_of
from uniattn_cli.modeling.layout_uniattn import AttentionShape, LayerPlan, Layout
from uniattn_cli.recipe import LayoutSpec, Recipe
from uniattn_cli.tables import Table

if TYPE_CHECKING:
    from uniattn_cli.checkpoint import Source
    from uniattn_cli.fitting.search import Step
    from uniattn_cli.grouping.measured import Measured
    from uniattn_cli.options import RunOptions


def proposer(
    matcher: Matcher, kinds: tuple[str, ...], compensation: str | int
) -> Callable[[Layout, int], list[LayerPlan]]:
    """Gives the plans to try for a layer: one per kind, with the best-matching sources among the `own` layers.

    Args:
        matcher: finds head maps.
        kinds: the kinds allowed.
        compensation: W_c of the plans; `linear` always has a full one and `none` has none.
    """
    shape = matcher.shape

    def propose(layout: Layout, layer: int) -> list[LayerPlan]:
        if shape.mask_types.index(shape.mask_types[layer]) == layer:
            return []
        own = [other for other in matcher.candidates(layer) if layout[other].kind == "own"]
        match = matcher.match(layer, own)
        plans = []
        for kind in kinds:
            if kind == "softmax" and match:
                plans.append(plan_of(match, compensation))
            elif kind in ("key", "kv") and match:
                firsts = match.sources[:: shape.group_size]
                heads = tuple((source, head // shape.group_size) for source, head in firsts)
                plans.append(LayerPlan(kind, heads=heads, compensation=compensation))
            elif kind == "pooled" and shape.kv_heads > 1:
                kept = max(n for n in range(1, shape.kv_heads) if shape.kv_heads % n == 0)
                plans.append(LayerPlan(kind, kv_heads=kept, compensation=compensation))
            elif kind == "linear":
                plans.append(LayerPlan(kind, compensation="full"))
            elif kind == "none":
                plans.append(LayerPlan(kind))
        return plans

    return propose


def budget_met(spec: LayoutSpec, shape: AttentionShape, config: Any, default_kv: float) -> Callable[[Layout], bool]:
    """Whether a layout saves what the recipe asks for; a budget in followers counts all changed layers."""
    own = Layout.own(shape.layers)
    if spec.followers is not None:
        return lambda layout: len(layout.changed) >= spec.followers
    if spec.params is not None:
        most = spec.params * count_parameters(config, own)
        return lambda layout: count_parameters(config, layout) <= most
    most = (default_kv if spec.kv is None else spec.kv) * kv_bytes_per_token(own, shape, 1)
    return lambda layout: kv_bytes_per_token(layout, shape, 1) <= most


def search(
    recipe: Recipe,
    source: Source,
    measured: Measured,
    met: Callable[[Layout], bool],
    compensation: str | int,
    options: RunOptions,
) -> list[Step]:
    """Runs the search on the recipe's calibration text and returns its steps.

    The first `conversion.tokens` tokens are fitted on, the next `layout.score_tokens` judge.

    Raises:
        LayoutError: the budget cannot be met.
        DataError: there is not enough calibration text for both.
    """
    from uniattn_cli import data
    from uniattn_cli.checkpoint import load_model, load_tokenizer
    from uniattn_cli.fitting.search import ThoroughSearch

    spec, fit = recipe.layout, recipe.conversion
    check_target(measured.model_type, fit.target)
    tokenizer = load_tokenizer(source)

    def windows(tokens: int, skip: int) -> Any:
        return data.calibration_windows(
            recipe.data, tokenizer, tokens=tokens, length=fit.length, seed=recipe.seed, skip=skip
        )

    fit_windows, score_windows = windows(fit.tokens, 0), windows(spec.score_tokens, fit.tokens)
    options.progress.note(f"loading {recipe.model.name} for the thorough search")
    base = load_model(source, recipe.model, options.torch_device())
    matcher = Matcher(measured.score, measured.shape, spec.head_map, spec.sources)
    propose = proposer(matcher, spec.kinds, compensation)
    with options.progress.track("searching", None) as advance:
        runner = ThoroughSearch(base, fit_windows, score_windows, fit, propose, batch_size=recipe.evaluation.batch_size)
        steps = runner.run(
            met,
            protect=spec.protect,
            report=lambda step: advance(1, f"layer {step.layer} {step.plan.kind}, KL {step.divergence:.4f}"),
        )
    if not met(steps[-1].layout if steps else Layout.own(measured.shape.layers)):
        raise LayoutError(
            f"the budget cannot be met: after {len(steps)} changed layers nothing is left to change with kinds "
            f"{', '.join(spec.kinds)}; loosen the budget, layout.protect, layout.kinds or analysis.max_distance"
        )
    return steps


def steps_table(steps: list[Step], measured: Measured) -> Table:
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
