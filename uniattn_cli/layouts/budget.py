"""What a layout may cost, and what it saves in the same unit."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

from uniattn_cli.modeling.layout_uniattn import AttentionShape, LayerPlan, Layout
from uniattn_cli.models.costs import cached_heads, count_parameters
from uniattn_cli.recipe.schema import SAVINGS, LayoutSpec

DEFAULT_KV = 0.8


@dataclass(frozen=True)
class Budget:
    """One limit on a layout.

    Attributes:
        unit: `followers` (changed layers), `kv` (share of the KV bytes) or `params` (share of the parameters).
        limit: changed layers at least, or the share kept at most.
        words: the budget in words.
        shape: of the model.
        config: the stock configuration.
    """

    unit: str
    limit: float
    words: str
    shape: AttentionShape
    config: Any = field(repr=False)
    _weights: dict[tuple, int] = field(default_factory=dict, repr=False, compare=False)

    @classmethod
    def all_of(cls, spec: LayoutSpec, shape: AttentionShape, config: Any) -> list[Budget]:
        """The budgets that a recipe names, or the default one where nothing limits the layout."""
        limits = {unit: getattr(spec, unit) for unit in SAVINGS if getattr(spec, unit) is not None}
        if not limits and spec.max_loss is None and spec.speed is None:
            return [cls("kv", DEFAULT_KV, f"default budget kv {DEFAULT_KV}", shape, config)]
        return [cls(unit, limit, f"budget {unit} {limit}", shape, config) for unit, limit in limits.items()]

    @classmethod
    def of(cls, spec: LayoutSpec, shape: AttentionShape, config: Any) -> Budget:
        """The budget of a search that takes a single one."""
        return cls.all_of(spec, shape, config)[0]

    @property
    def needed(self) -> int:
        """The least that a layout has to save."""
        if self.unit == "followers":
            return int(self.limit)
        # A share such as 0.7 of 10 is not a whole number in binary.
        return self.whole - math.floor(self.limit * self.whole + 1e-6)

    @property
    def whole(self) -> int:
        """What the base has: layers, cached heads or parameters."""
        if self.unit == "followers":
            return self.shape.layers
        if self.unit == "kv":
            return 2 * self.shape.kv_heads * self.shape.layers
        if () not in self._weights:
            self._weights[()] = count_parameters(self.config, Layout.own(self.shape.layers))
        return self._weights[()]

    def saved(self, layout: Layout) -> int:
        """Changed layers, cached heads or parameters that a layout does without."""
        return sum(self.saved_by(index, layout[index]) for index in layout.changed)

    def met(self, layout: Layout) -> bool:
        """Whether the layout stays within the limit."""
        return self.saved(layout) >= self.needed

    def saved_by(self, index: int, plan: LayerPlan) -> int:
        """What one changed layer saves; layers of one kind save alike, so the weights of each are counted once."""
        if plan.kind == "own":
            return 0
        if self.unit == "followers":
            return 1
        if self.unit == "kv":
            return 2 * self.shape.kv_heads - cached_heads(plan, self.shape)
        key = (plan.kind, plan.compensation, plan.kv_heads)
        if key not in self._weights:
            alone = Layout.own(self.shape.layers).with_plan(index, plan)
            self._weights[key] = self.whole - count_parameters(self.config, alone)
        return self._weights[key]

    def nearest(self, saved: float) -> str:
        """The limit that a layout meets which saves so much, as a user would write it."""
        if self.unit == "followers":
            return f"{saved:.0f}"
        return f"{math.ceil((self.whole - saved) / self.whole * 1e4 - 1e-6) / 1e4:g}"
