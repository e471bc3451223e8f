"""The thorough search: greedy on the measured divergence from the base, every candidate really converted.

A candidate changes one layer, see `trials`. Scores of candidates that were measured under an earlier layout are kept as
estimates and measured again only when one of them looks best (lazy greedy).
"""

from __future__ import annotations

import heapq
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from uniattn_cli.fitting.match_outputs import SourceChooser
from uniattn_cli.layouts.trials import Trials
from uniattn_cli.modeling.layout_uniattn import LayerPlan, Layout
from uniattn_cli.models.costs import cached_heads
from uniattn_cli.recipe.schema import ConversionSpec

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@dataclass(frozen=True)
class SearchStep:
    """One accepted change.

    Attributes:
        layer: what changed.
        plan: its plan.
        layout: the layout after the change.
        divergence: mean KL(base || converted) per token on the scoring tokens, nats.
        measured: how many candidates were measured for this step.
    """

    layer: int
    plan: LayerPlan
    layout: Layout
    divergence: float
    measured: int


class ThoroughSearch(Trials):
    """Greedy search over layouts of one base model.

    Args:
        base: stock model.
        fit_windows: [sequences, length] tokens for the fits.
        score_windows: [sequences, length] other tokens, for the divergence.
        spec: how layers are fitted.
        propose: gives, for the set of layers that are still `own` and a layer, the plans to try for that layer.
        chooser: chooses the sources of borrowing layers anew where they are fitted; None keeps those proposed.
        batch_size: sequences per batch.
    """

    def __init__(
        self,
        base: PreTrainedModel,
        fit_windows: torch.Tensor,
        score_windows: torch.Tensor,
        spec: ConversionSpec,
        propose: Callable[[Layout, int], Sequence[LayerPlan]],
        *,
        chooser: SourceChooser | None = None,
        batch_size: int = 16,
    ):
        super().__init__(base, fit_windows, score_windows, spec, batch_size=batch_size)
        self.propose = propose
        self.chooser = chooser
        self.divergence = 0.0
        self._first: dict[tuple[int, LayerPlan], float] = {}

    def candidate_layout(self, layer: int, plan: LayerPlan) -> Layout | None:
        """The current layout with one layer changed; borrowers of a layer that stops lending get new sources."""
        plans = list(self.layout)
        plans[layer] = plan
        after = Layout(tuple(plans))
        for index, other in enumerate(self.layout):
            if layer in other.source_layers:
                again = [entry for entry in self.propose(after, index) if entry.kind == other.kind]
                if not again:
                    return None
                plans[index] = again[0]
        return Layout(tuple(plans))

    def measure(self, layout: Layout, *, keep: bool = False) -> float:
        """Divergence of a layout that differs from the current one, see `Trials.convert`."""
        measured = self.convert(layout, self.chooser, keep=keep).divergence
        if keep:
            self.divergence = measured
        return measured

    def heads_saved(self, layout: Layout) -> int:
        """Cached heads per token that a layout does without."""
        own = 2 * self.shape.kv_heads * self.shape.layers
        return own - sum(cached_heads(plan, self.shape) for plan in layout)

    def run(
        self,
        done: Callable[[Layout], bool],
        *,
        saved: Callable[[Layout], float] | None = None,
        kinds: Sequence[str] | None = None,
        protect: Sequence[int] = (),
        report: Callable[[SearchStep], None] = lambda s: None,
        tried: Callable[[int, LayerPlan], None] = lambda layer, plan: None,
    ) -> list[SearchStep]:
        """Greedy steps until `done` says that the budget is met, or nothing is left to change.

        Candidates are ranked by added divergence per unit saved. Those of the first step are measured once, however
        many searches start from the unchanged model.

        Args:
            done: whether a layout meets the budget.
            saved: what a layout saves, in the unit of the budget; cached heads if None.
            kinds: kinds to use of those proposed; all if None.
            protect: layers that stay as they are.
            report: told about each step.
            tried: told about each candidate that was measured.

        Returns:
            The accepted steps, in order.
        """
        saved = saved or self.heads_saved
        steps: list[SearchStep] = []
        queue = self._first_candidates(kinds, protect)
        while queue and not done(self.layout):
            measured = 0
            while queue:
                _, age, layer, index, plan = heapq.heappop(queue)
                if age == len(steps):
                    break
                fresh = self._refreshed(layer, plan)
                if fresh is None or (layout := self.candidate_layout(layer, fresh)) is None:
                    continue
                gain = saved(layout) - saved(self.layout)
                if gain <= 0:
                    continue
                added, was_measured = self._added(layout, layer, fresh)
                measured += was_measured
                if was_measured:
                    tried(layer, fresh)
                heapq.heappush(queue, (added / gain, len(steps), layer, index, fresh))
            else:
                break
            layout = self.candidate_layout(layer, plan)
            assert layout is not None, "it was measured under the same layout"
            self.measure(layout, keep=True)
            steps.append(SearchStep(layer, self.layout[layer], self.layout, self.divergence, measured))
            report(steps[-1])
        return steps

    def _first_candidates(self, kinds: Sequence[str] | None, protect: Sequence[int]) -> list[tuple]:
        plans = [
            (layer, plan)
            for layer in range(1, self.shape.layers)
            if layer not in protect
            for plan in self.propose(self.layout, layer)
            if kinds is None or plan.kind in kinds
        ]
        queue = [(float("-inf"), -1, layer, index, plan) for index, (layer, plan) in enumerate(plans)]
        heapq.heapify(queue)
        return queue

    def _added(self, layout: Layout, layer: int, plan: LayerPlan) -> tuple[float, bool]:
        """Divergence that a candidate adds, and whether it had to be measured."""
        if self.layout.changed:
            return self.measure(layout) - self.divergence, True
        key = (layer, plan)
        known = key in self._first
        if not known:
            self._first[key] = self.measure(layout)
        return self._first[key], not known

    def reset(self) -> None:
        super().reset()
        self.divergence = 0.0

    def _refreshed(self, layer: int, plan: LayerPlan) -> LayerPlan | None:
        """The proposal of the same kind under the current layout: its sources may have stopped lending."""
        if self.layout[layer].kind == plan.kind:
            return None
        return next((entry for entry in self.propose(self.layout, layer) if entry.kind == plan.kind), None)
