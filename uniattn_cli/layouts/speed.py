"""What plans save of the time of a decoding step, as the decoding engine measures it at one batch and context."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace

from uniattn_cli.errors import LayoutError
from uniattn_cli.layouts.budget import Budget
from uniattn_cli.layouts.solver import Option
from uniattn_cli.layouts.workbench import Workbench
from uniattn_cli.modeling.configuration_uniattn import layer_windows
from uniattn_cli.modeling.layout_uniattn import LayerPlan, Layout

# Whole numbers, which the solver adds up exactly: millionths of the base's step.
WHOLE = 1_000_000
STEPS, ROUNDS = 16, 5
# Shares add up only roughly: what a layout may miss.
TOLERANCE = 0.03

Form = tuple[str, "str | int", "int | None", "int | None"]


@dataclass(frozen=True)
class SpeedBudget(Budget):
    """How many times as fast decoding has to be.

    Attributes:
        windows: of each layer, see `layer_windows`.
        shares: of the base's step that one layer of a form saves.
    """

    windows: Sequence[int | None] = ()
    shares: Mapping[Form, float] = field(default_factory=dict, repr=False)

    @property
    def whole(self) -> int:
        return WHOLE

    @property
    def needed(self) -> int:
        return math.ceil(WHOLE * (1 - 1 / self.limit) - 1e-6)

    def saved_by(self, index: int, plan: LayerPlan) -> int:
        """Millionths of the base's step that one layer saves."""
        return 0 if plan.kind == "own" else round(WHOLE * self.shares[form_of(plan, self.windows[index])])

    def nearest(self, saved: float) -> str:
        """The ratio of a layout that saves so much, as a user would write it."""
        return f"{math.floor(WHOLE / (WHOLE - saved) * 1e3 + 1e-6) / 1e3:g}"

    def scaled(self, layout: Layout, ratio: float) -> SpeedBudget:
        """With what was measured of a layout: shares by which it is so many times as fast as the base."""
        factor = WHOLE * (1 - 1 / ratio) / self.saved(layout)
        return replace(self, shares={form: share * factor for form, share in self.shares.items()})


def form_of(plan: LayerPlan, window: int | None) -> Form:
    """What makes plans take another time, whatever heads they borrow."""
    return plan.kind, plan.compensation, plan.kv_heads, window


def measured_budget(bench: Workbench, options: Iterable[Option]) -> SpeedBudget:
    """The budget `layout.speed`, with one measurement for each form of the plans.

    Raises:
        LayoutError: the engine cannot run the model, or the batch does not fit into memory.
    """
    spec = bench.recipe.layout
    ratio, batch, context = spec.workload
    windows = layer_windows(bench.base.config)
    by_form: dict[Form, list[Option]] = {}
    for option in options:
        by_form.setdefault(form_of(option.plan, windows[option.layer]), []).append(option)
    shares = {}
    with bench.options.progress.track("timing decoding steps", len(by_form)) as advance:
        for form, found in by_form.items():
            layout = _layout_with(found, bench.measured.shape.layers)
            shares[form] = (1 - 1 / speed_of(bench, layout, batch, context)) / len(layout.changed)
            advance(1, f"{form[0]}: {shares[form]:.2%} of a step for each layer")
    shape = bench.measured.shape
    return SpeedBudget("speed", ratio, f"budget speed {spec.speed}", shape, None, windows=windows, shares=shares)


def _layout_with(options: Sequence[Option], layers: int) -> Layout:
    """As many layers as possible that have one of the plans, so that their time stands out."""
    layout = Layout.own(layers)
    lending: set[int] = set()
    for option in sorted(options, key=lambda option: option.layer):
        sources = set(option.plan.source_layers)
        if layout[option.layer].kind == "own" and option.layer not in lending and not sources & set(layout.changed):
            layout = layout.with_plan(option.layer, option.plan)
            lending |= sources
    return layout


def confirmed(bench: Workbench, layout: Layout) -> float:
    """How many times as fast as the base a layout really decodes, at the batch and context of `layout.speed`."""
    _, batch, context = bench.recipe.layout.workload
    return speed_of(bench, layout, batch, context)


def speed_of(bench: Workbench, layout: Layout, batch: int, context: int) -> float:
    """How many times as fast as the base a layout decodes; weights do not matter, so that nothing is fitted.

    Raises:
        LayoutError: the engine cannot run the model, or the batch does not fit into memory.
    """
    from uniattn_cli.inference.engine import engine_for
    from uniattn_cli.inference.measurement import measure_shape
    from uniattn_cli.inference.program import UnsupportedError
    from uniattn_cli.models.building import build_converted

    models = {"base": bench.base, "converted": build_converted(bench.base, layout)}
    try:
        engines = {name: engine_for(model) for name, model in models.items()}
    except UnsupportedError as error:
        raise LayoutError(f"the decoding engine cannot run this model ({error}); leave out --speed") from None
    found = measure_shape(engines, batch, context, new=STEPS, repeats=ROUNDS, prompts=False, bandwidth=1.0)
    times = [each.step.median for each in found if each.step is not None]
    if len(times) < len(found):
        notes = "; ".join(dict.fromkeys(each.note for each in found if each.note))
        raise LayoutError(f"--speed at a batch of {batch} and a context of {context}: {notes}; give smaller ones")
    return times[0] / times[1]
