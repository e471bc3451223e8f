"""The thorough search: greedy on the measured divergence from the base, every candidate really converted.

A candidate changes one layer. It is fitted to the hidden states that really arrive there, and the layers after it are
run on held-out tokens, so that its score is the KL divergence of the next-token distributions that users would see. The
unchanged layers before it are never run again. Scores of candidates that were measured under an earlier layout are kept
as estimates and measured again only when one of them looks best (lazy greedy).
"""

from __future__ import annotations

import contextlib
import heapq
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch

from uniattn_cli.fitting.fit import fit_layer, for_trials
from uniattn_cli.fitting.match_outputs import SourceChooser
from uniattn_cli.fitting.stream import Batch, run_layer, start_batches
from uniattn_cli.modeling.configuration_uniattn import attention_shape
from uniattn_cli.modeling.layout_uniattn import LayerPlan, Layout
from uniattn_cli.modeling.sharing_uniattn import SharedStates
from uniattn_cli.models.building import build_attention, build_converted
from uniattn_cli.models.costs import cached_heads
from uniattn_cli.models.losses import head_logits, kl_divergence
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


class ThoroughSearch:
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
        self.base = base
        self.spec = for_trials(spec)
        self.propose = propose
        self.chooser = chooser
        self.shape = attention_shape(base.config)
        self.layout = Layout.own(self.shape.layers)
        self.model = build_converted(base, self.layout)
        for layer in self.model.model.layers:
            # Any own layer may become a source of a later candidate.
            layer.self_attn.lend_to(None)
        with torch.no_grad():
            self.fit_batches = start_batches(base, fit_windows, spec.holdout, batch_size)
            self.score_batches = start_batches(base, score_windows, 0.0, batch_size)
            for batch in self.score_batches:
                batch.held = False
            self._store_base()
        self.divergence = 0.0
        self._first: dict[tuple[int, LayerPlan], float] = {}

    def _store_base(self) -> None:
        """Hidden states before every layer: of the base for targets, of the converted model as starting points."""
        self.states = [self._rest(batch, [batch.base], 0, batch.shared) for batch in self.fit_batches]
        self.score_states = [self._rest(batch, [batch.base], 0, batch.shared) for batch in self.score_batches]
        # As long as nothing is changed the converted model is the base, bit for bit.
        self.base_states = [list(states) for states in self.states]
        self.base_final = [states[-1] for states in self.score_states]

    def _logits(self, hidden: torch.Tensor) -> torch.Tensor:
        return head_logits(self.base, self.base.model.norm(hidden))

    def _kl(self, finals: list[torch.Tensor]) -> float:
        """Mean KL(base || converted) in nats per token from hidden states after the last layer."""
        total, tokens = 0.0, 0
        for ours, theirs in zip(finals, self.base_final, strict=True):
            for row, base_row in zip(ours, theirs, strict=True):
                total += kl_divergence(self._logits(base_row), self._logits(row)).sum().item()
                tokens += len(row)
        # A candidate that overflows is the worst of all, not one that compares with nothing.
        return total / tokens if math.isfinite(total) else math.inf

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

    @torch.no_grad()
    def measure(self, layout: Layout, *, keep: bool = False) -> float:
        """Divergence of a layout that differs from the current one.

        Fits the layers whose plan differs and, where it is kept, all changed layers after them too, because what
        arrives there has changed.

        Args:
            layout: candidate.
            keep: make it the current one.
        """
        different = [i for i in range(self.shape.layers) if layout[i] != self.layout[i]]
        first = different[0]
        end = self.shape.layers if keep else different[-1] + 1
        batches = [self._at(batch, position, first) for position, batch in enumerate(self.fit_batches)]
        arriving = [states[: first + 1] for states in self.states]
        with contextlib.ExitStack() as changes:
            for index in range(first, end):
                if index in different or (keep and layout[index].kind != "own"):
                    for position, batch in enumerate(batches):
                        batch.base = self.base_states[position][index]
                    layout = self._place(layout, index, batches, changes)
                    fit_layer(self.base, self.model, index, batches, self.spec)
                else:
                    for batch in batches:
                        self._advance(batch, index)
                for states, batch in zip(arriving, batches, strict=True):
                    states.append(batch.converted)
            shared = [batch.shared if keep else batch.shared.copy() for batch in self.score_batches]
            finals = [
                self._rest(batch, states, first, holder)
                for batch, states, holder in zip(self.score_batches, self.score_states, shared, strict=True)
            ]
            measured = self._kl([states[-1] for states in finals])
            if keep:
                changes.pop_all()
        if keep:
            self.layout, self.divergence = layout, measured
            self.states, self.score_states = arriving, finals
            self.fit_batches = [
                replace(batch, shared=tried.shared) for batch, tried in zip(self.fit_batches, batches, strict=True)
            ]
        return measured

    def _advance(self, batch: Batch, index: int) -> None:
        layer = self.model.model.layers[index]
        batch.converted = run_layer(layer, batch.converted, batch.kwargs[index], uniattn_shared=batch.shared)

    def _place(self, layout: Layout, index: int, batches: list[Batch], changes: contextlib.ExitStack) -> Layout:
        """Puts a new attention module into the model, until `changes` closes. Returns the layout with its sources."""
        if self.chooser is not None:
            layout = layout.with_plan(index, self.chooser.plan(layout, index, self.base, self.model, batches))
        layer = self.model.model.layers[index]
        changes.callback(setattr, layer, "self_attn", layer.self_attn)
        layer.self_attn = build_attention(self.base, layout, index)
        layer.self_attn.lend_to(None)
        return layout

    def _rest(self, batch: Batch, states: list[torch.Tensor], first: int, shared: SharedStates) -> list[torch.Tensor]:
        """The hidden states before every layer and after the last, run anew from layer `first` on."""
        states = states[: first + 1]
        for index in range(first, self.shape.layers):
            layer = self.model.model.layers[index]
            states.append(run_layer(layer, states[-1], batch.kwargs[index], uniattn_shared=shared))
        return states

    def _at(self, batch: Batch, position: int, layer: int) -> Batch:
        """A fit batch as it arrives at a layer; its holder is a copy, so that trying a candidate leaves no trace."""
        hidden = self.states[position][layer]
        return replace(batch, base=self.base_states[position][layer], converted=hidden, shared=batch.shared.copy())

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
        """Starts again from the unchanged model."""
        if not self.layout.changed:
            return
        self.layout, self.divergence = Layout.own(self.shape.layers), 0.0
        for index, layer in enumerate(self.model.model.layers):
            if layer.self_attn.plan.kind != "own":
                layer.self_attn = build_attention(self.base, self.layout, index)
                layer.self_attn.lend_to(None)
        for batch in (*self.fit_batches, *self.score_batches):
            batch.shared = SharedStates()
        with torch.no_grad():
            self._store_base()

    def _refreshed(self, layer: int, plan: LayerPlan) -> LayerPlan | None:
        """The proposal of the same kind under the current layout: its sources may have stopped lending."""
        if self.layout[layer].kind == plan.kind:
            return None
        return next((entry for entry in self.propose(self.layout, layer) if entry.kind == plan.kind), None)
