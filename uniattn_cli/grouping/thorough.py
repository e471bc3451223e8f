"""Choosing by conversion: candidates are really converted and measured on text held out from their fit."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING

from uniattn_cli.accounting import count_parameters, kv_bytes_per_token
from uniattn_cli.errors import LayoutError
from uniattn_cli.families import check_target
from uniattn_cli.grouping.budget import Budget
from uniattn_cli.grouping.candidates import Point, Validated
from uniattn_cli.grouping.matching import Matcher
from uniattn_cli.grouping.search import plan_of
from uniattn_cli.modeling.layout_uniattn import LayerPlan, Layout
from uniattn_cli.recipe import Recipe
from uniattn_cli.tables import Table

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel

    from uniattn_cli.checkpoint import Source
    from uniattn_cli.fitting.search import Step
    from uniattn_cli.fitting.sources import SourceChooser
    from uniattn_cli.grouping.measured import Measured
    from uniattn_cli.options import RunOptions

# Tokens that a layout of the shortlist is fitted on: enough to tell layouts apart.
SHORTLIST_TOKENS = 16384


@dataclass(frozen=True)
class Workbench:
    """The base model and calibration text on which layouts are converted; loaded when first needed.

    The first `conversion.tokens` tokens are for fits, the next `layout.score_tokens` judge the candidates of a search,
    as many more judge the shortlist.
    """

    recipe: Recipe
    source: Source
    measured: Measured
    options: RunOptions

    @cached_property
    def base(self) -> PreTrainedModel:
        from uniattn_cli.checkpoint import load_model

        check_target(self.measured.model_type, self.recipe.conversion.aim)
        self.options.progress.note(f"loading {self.recipe.model.name} to convert candidates")
        return load_model(self.source, self.recipe.model, self.placement[0])

    @cached_property
    def placement(self) -> tuple[torch.device, torch.device | None]:
        """Where the model is kept and where its layers run, see `fitting.stream.placement`."""
        from uniattn_cli.checkpoint import load_config
        from uniattn_cli.fitting.stream import placement

        parameters = count_parameters(load_config(self.source), Layout.own(self.measured.shape.layers))
        device = self.options.torch_device()
        return placement(self.recipe.conversion.offload, parameters * self.measured.element_size, device)

    @cached_property
    def matcher(self) -> Matcher:
        spec = self.recipe.layout
        return Matcher(self.measured.score, self.measured.shape, spec.head_map, spec.sources)

    def windows(self, tokens: int, skip: int = 0) -> torch.Tensor:
        """Calibration windows after the first `skip` tokens. Raises `DataError` if the text does not hold enough."""
        from uniattn_cli import data
        from uniattn_cli.checkpoint import load_tokenizer

        recipe = self.recipe
        length = recipe.conversion.length
        tokenizer = load_tokenizer(self.source, recipe.data.chat_template)
        return data.calibration_windows(
            recipe.data, tokenizer, tokens=tokens, length=length, seed=recipe.seed, skip=skip
        )

    def lenders(self, layout: Layout, layer: int) -> list[int]:
        return self.matcher.lenders(layout, layer, self.recipe.layout.max_group)

    def leaders(self, layout: Layout, layer: int) -> list[int]:
        """The layers that a fixed layout names, where they were measured."""
        return [other for other in layout[layer].source_layers if layer - other <= self.measured.max_distance]

    def chooser(self, lenders: Callable[[Layout, int], list[int]]) -> SourceChooser | None:
        """Matches heads where the recipe wants them matched by output; needs W_o to be solved."""
        from uniattn_cli.fitting.sources import Limits, SourceChooser

        recipe = self.recipe
        if recipe.layout.match != "output" or recipe.conversion.solve not in ("both", "output"):
            return None
        return SourceChooser(self.matcher, lenders, Limits.of(self.options.torch_device()))

    def validate(self, layouts: dict[str, Layout], *, fixed: bool = False) -> list[Validated]:
        """Converts each layout and measures its divergence from the base on text of its own, best first.

        Args:
            layouts: by name; one alone is converted for its head maps but not compared.
            fixed: followers keep the leaders that the layout names.
        """
        import torch

        from uniattn_cli.checkpoint import build_converted
        from uniattn_cli.fitting.fit import fit_layers
        from uniattn_cli.fitting.sources import Limits
        from uniattn_cli.fitting.stream import layer_by_layer
        from uniattn_cli.scoring import window_divergences

        recipe, base, device = self.recipe, self.base, self.placement[1]
        spec, batch_size = recipe.conversion, recipe.evaluation.batch_size
        # A layout alone is converted only to match its heads.
        enough = SHORTLIST_TOKENS if len(layouts) > 1 else Limits.of(self.options.torch_device()).tokens
        fit, check = self.windows(min(spec.tokens, enough)), None
        if len(layouts) > 1:
            check = self.windows(recipe.layout.score_tokens, spec.tokens + recipe.layout.score_tokens)
        found: list[tuple[str, Layout, torch.Tensor]] = []
        with self.options.progress.track("converting the shortlist", len(layouts)) as advance:
            for name, layout in layouts.items():
                torch.manual_seed(recipe.seed)
                model = build_converted(base, layout)
                chooser = self.chooser(self.leaders if fixed else self.lenders)
                fit_layers(base, model, fit, spec, chooser=chooser, device=device, batch_size=batch_size)
                rows = torch.zeros(1)
                if check is not None:
                    with layer_by_layer(base, device), layer_by_layer(model, device):
                        rows = window_divergences(base, model, check, batch_size=batch_size)
                found.append((name, model.config.layout, rows))
                advance(1, name)
        found.sort(key=lambda entry: entry[2].mean().item())
        best = found[0][2]
        return [
            Validated(name, layout, rows.mean().item(), stderr(rows), (rows - best).mean().item(), stderr(rows - best))
            for name, layout, rows in found
        ]

    @property
    def check_tokens(self) -> int:
        """Tokens that the shortlist is compared on."""
        spec = self.recipe
        return spec.layout.score_tokens // spec.conversion.length * spec.conversion.length


def stderr(values: torch.Tensor) -> float:
    """Standard error of the mean; NaN for one value."""
    return (values.std() / len(values) ** 0.5).item() if len(values) > 1 else float("nan")


def proposer(
    matcher: Matcher, kinds: tuple[str, ...], compensation: str | int, max_group: int | None = None
) -> Callable[[Layout, int], list[LayerPlan]]:
    """Gives the plans to try for a layer: one per kind, with the best-matching sources among the `own` layers.

    Args:
        matcher: finds head maps.
        kinds: the kinds allowed.
        compensation: W_c of the plans; `linear` always has a full one and `none` has none.
        max_group: largest number of layers that one layer may lend to.
    """
    shape = matcher.shape

    def propose(layout: Layout, layer: int) -> list[LayerPlan]:
        if shape.mask_types.index(shape.mask_types[layer]) == layer:
            return []
        match = matcher.match(layer, matcher.lenders(layout, layer, max_group))
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


def search(bench: Workbench, budget: Budget, compensation: str | int) -> dict[str, list[Step]]:
    """Searches with all allowed kinds together and, to be compared with, with each of them alone.

    Returns:
        The steps of each search by its name; a search that could not meet the budget has the steps that it took.
    """
    from uniattn_cli.fitting.search import ThoroughSearch

    if bench.placement[1] is not None:
        raise LayoutError("the thorough search needs the whole model on the GPU; use --search fast")
    recipe = bench.recipe
    spec, fit, progress = recipe.layout, recipe.conversion, bench.options.progress
    propose = proposer(bench.matcher, spec.kinds, compensation, spec.max_group)
    windows = bench.windows(fit.tokens), bench.windows(spec.score_tokens, fit.tokens)
    names = {series_name(spec.kinds): spec.kinds}
    if spec.shortlist > 1:
        names |= {series_name((kind,)): (kind,) for kind in spec.kinds}
    found = {}
    with progress.track("searching", None) as advance:
        runner = ThoroughSearch(
            bench.base,
            *windows,
            fit,
            propose,
            chooser=bench.chooser(bench.lenders),
            batch_size=recipe.evaluation.batch_size,
        )
        for name, kinds in names.items():
            runner.reset()
            found[name] = runner.run(
                budget.met,
                saved=budget.saved,
                kinds=kinds,
                protect=spec.protect,
                report=lambda step: advance(1, f"layer {step.layer} {step.plan.kind}, KL {step.divergence:.4f}"),
            )
    return found


def series_name(kinds: tuple[str, ...]) -> str:
    """How a search is called in tables and files."""
    return f"thorough, {' + '.join(kinds)}"


def points_of(runs: dict[str, list[Step]], layers: int) -> list[Point]:
    """The frontier of all searches."""
    points = []
    for name, steps in runs.items():
        points.append(Point(name, Layout.own(layers), 0.0))
        points += [Point(name, step.layout, step.divergence) for step in steps]
    return points


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


def frontier_table(points: list[Point], measured: Measured) -> Table:
    """The best layout of any search at each size of the cache."""
    from uniattn_cli.grouping.candidates import kinds_in_words, lower_envelope

    own = kv_bytes_per_token(Layout.own(measured.shape.layers), measured.shape, measured.element_size)
    rows = []
    for point in lower_envelope(points, measured.shape):
        kv = kv_bytes_per_token(point.layout, measured.shape, measured.element_size)
        rows.append([f"{kv:,} ({kv / own:.0%})", kinds_in_words(point.layout), point.series, f"{point.value:.4f}"])
    return Table(
        "frontier: the best layout at each size of the cache",
        ["KV bytes/token", "changed layers", "search", "KL from base"],
        rows,
    )
