"""What a layout may cost, and what it saves in the same unit."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from uniattn_cli.modeling.layout_uniattn import AttentionShape, LayerPlan, Layout
from uniattn_cli.models.costs import cached_heads, count_parameters, kv_bytes_per_token
from uniattn_cli.recipe.schema import LayoutSpec

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
    def of(cls, spec: LayoutSpec, shape: AttentionShape, config: Any) -> Budget:
        """The budget that a recipe names, or the default one."""
        for unit in ("followers", "params", "kv"):
            limit = getattr(spec, unit)
            if limit is not None:
                return cls(unit, limit, f"budget {unit} {limit}", shape, config)
        return cls("kv", DEFAULT_KV, f"default budget kv {DEFAULT_KV}", shape, config)

    def saved(self, layout: Layout) -> int:
        """Changed layers, cached heads or parameters that a layout does without."""
        if self.unit == "followers":
            return len(layout.changed)
        if self.unit == "kv":
            own = 2 * self.shape.kv_heads * self.shape.layers
            return own - sum(cached_heads(plan, self.shape) for plan in layout)
        return sum(self._saved_weights(layout, index) for index in layout.changed)

    def met(self, layout: Layout) -> bool:
        """Whether the layout stays within the limit."""
        if self.unit == "followers":
            return len(layout.changed) >= self.limit
        if self.unit == "kv":
            own = kv_bytes_per_token(Layout.own(self.shape.layers), self.shape, 1)
            return kv_bytes_per_token(layout, self.shape, 1) <= self.limit * own
        return self._total - self.saved(layout) <= self.limit * self._total

    @property
    def _total(self) -> int:
        if () not in self._weights:
            self._weights[()] = count_parameters(self.config, Layout.own(self.shape.layers))
        return self._weights[()]

    def _saved_weights(self, layout: Layout, index: int) -> int:
        """Parameters saved by one layer; layers of one kind save alike, so each kind is counted once."""
        plan: LayerPlan = layout[index]
        key = (plan.kind, plan.compensation, plan.kv_heads)
        if key not in self._weights:
            alone = Layout.own(self.shape.layers).with_plan(index, plan)
            self._weights[key] = self._total - count_parameters(self.config, alone)
        return self._weights[key]
