"""The thorough search: greedy on the measured divergence from the base, every candidate really converted.

A candidate changes one layer. It is fitted to the hidden states that really arrive there, and the layers after it are
run on held-out tokens, so that its score is the KL divergence of the next-token distributions that users would see. The
unchanged layers before it are never run again. Scores of candidates that were measured under an earlier layout are kept
as estimates and measured again only when one of them looks best (lazy greedy).
"""

from __future__ import annotations

import heapq
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch

from uniattn_cli.accounting import cached_heads
from uniattn_cli.checkpoint import build_converted
from uniattn_cli.fitting.fit import step_layer
from uniattn_cli.fitting.stream import Batch, run_layer, start_batches
from uniattn_cli.modeling.configuration_uniattn import attention_shape
from uniattn_cli.modeling.layout_uniattn import LayerPlan, Layout
from uniattn_cli.modeling.sharing_uniattn import SharedStates
from uniattn_cli.recipe import ConversionSpec

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@dataclass(frozen=True)
class Step:
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
        batch_size: int = 16,
    ):
        self.base = base
        self.spec = spec
        self.propose = propose
        self.shape = attention_shape(base.config)
        self.layout = Layout.own(self.shape.layers)
        self.model = self._build(self.layout)
        with torch.no_grad():
            self.fit_batches = start_batches(base, fit_windows, spec.holdout, batch_size)
            self.score_batches = start_batches(base, score_windows, 0.0, batch_size)
            for batch in self.score_batches:
                batch.held = False
            self._store_base()
        self.divergence = 0.0

    def _build(self, layout: Layout) -> PreTrainedModel:
        model = build_converted(self.base, layout)
        for layer in model.model.layers:
            # Any own layer may become a source of a later candidate.
            layer.self_attn.is_source = layer.self_attn.plan.kind in ("own", "pooled")
        return model

    def _store_base(self) -> None:
        """Hidden states before every layer: of the base for targets, of the converted model as starting points."""
        layers = self.shape.layers
        self.base_states: list[list[torch.Tensor]] = []
        self.states: list[list[torch.Tensor]] = []
        for batch in self.fit_batches:
            states = [batch.base]
            for index in range(layers):
                states.append(run_layer(self.base.model.layers[index], states[-1], batch.kwargs[index]))
            self.base_states.append(states)
        self.score_states: list[list[torch.Tensor]] = []
        self._advance_from(0, self.fit_batches, self.states)
        self._advance_from(0, self.score_batches, self.score_states)
        self.base_final = [states[-1] for states in self.score_states]

    def _advance_from(self, first: int, batches: list[Batch], store: list[list[torch.Tensor]]) -> None:
        """Runs the current model from layer `first` on and stores the hidden states before every layer."""
        for position, batch in enumerate(batches):
            if len(store) <= position:
                store.append([batch.converted])
            states = store[position][: first + 1]
            for index in range(first, self.shape.layers):
                layer = self.model.model.layers[index]
                states.append(run_layer(layer, states[-1], batch.kwargs[index], uniattn_shared=batch.shared))
            store[position] = states

    def _logits(self, hidden: torch.Tensor) -> torch.Tensor:
        logits = self.base.lm_head(self.base.model.norm(hidden)).float()
        cap = getattr(self.base.config, "final_logit_softcapping", None)
        return logits if cap is None else torch.tanh(logits / cap) * cap

    def _kl(self, finals: list[torch.Tensor]) -> float:
        """Mean KL(base || converted) in nats per token from hidden states after the last layer."""
        total, tokens = 0.0, 0
        for ours, theirs in zip(finals, self.base_final, strict=True):
            for row, base_row in zip(ours, theirs, strict=True):
                logp = self._logits(row).log_softmax(-1)
                base_logp = self._logits(base_row).log_softmax(-1)
                total += (base_logp.exp() * (base_logp - logp)).sum().item()
                tokens += len(row)
        return total / tokens

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

        Fits the layers whose plan differs and, where it is kept, all changed layers after them too.

        Args:
            layout: candidate.
            keep: make it the current one.
        """
        different = [i for i in range(self.shape.layers) if layout[i] != self.layout[i]]
        first, last = different[0], max(different)
        model = self._build(layout)
        for index, layer in enumerate(model.model.layers):
            if layout[index] == self.layout[index] and layout[index].kind != "own":
                layer.self_attn = self.model.model.layers[index].self_attn
        end = self.shape.layers if keep else last + 1
        batches = [self._at(batch, position, first) for position, batch in enumerate(self.fit_batches)]
        for index in range(first, end):
            fits = index in different or keep
            spec = self.spec if fits else replace(self.spec, solve="none")
            if keep and layout[index].kind != "own" and index not in different:
                # Refit from the base's weights: the inputs of this layer have changed.
                model.model.layers[index].self_attn.take_weights(self.base.model.layers[index].self_attn)
            for position, batch in enumerate(batches):
                batch.base = self.base_states[position][index]
            step_layer(self.base.model.layers[index], model.model.layers[index], index, batches, spec)
        previous, self.model = self.model, model
        finals, stores = [], []
        for position, batch in enumerate(self.score_batches):
            shared = batch.shared if keep else self._copy(batch.shared)
            states = self.score_states[position][: first + 1]
            for index in range(first, self.shape.layers):
                layer = model.model.layers[index]
                states.append(run_layer(layer, states[-1], batch.kwargs[index], uniattn_shared=shared))
            finals.append(states[-1])
            stores.append(states)
        divergence = self._kl(finals)
        if keep:
            self.layout, self.divergence, self.score_states = layout, divergence, stores
            self._advance_from(first, self.fit_batches, self.states)
        else:
            self.model = previous
        return divergence

    def _at(self, batch: Batch, position: int, layer: int) -> Batch:
        """A fit batch as it arrives at a layer; its holder is a copy, so that trying a candidate leaves no trace."""
        hidden = self.states[position][layer]
        return replace(batch, base=self.base_states[position][layer], converted=hidden, shared=self._copy(batch.shared))

    @staticmethod
    def _copy(shared: SharedStates) -> SharedStates:
        copy = SharedStates()
        copy.queries, copy.keys, copy.values = dict(shared.queries), dict(shared.keys), dict(shared.values)
        return copy

    def saved(self, layout: Layout) -> int:
        """Cached heads per token that a layout does without."""
        own = 2 * self.shape.kv_heads * self.shape.layers
        return own - sum(cached_heads(plan, self.shape) for plan in layout)

    def run(
        self,
        done: Callable[[Layout], bool],
        *,
        protect: Sequence[int] = (),
        report: Callable[[Step], None] = lambda s: None,
    ) -> list[Step]:
        """Greedy steps until `done` says that the budget is met, or nothing is left to change.

        Candidates are ranked by added divergence per saved head of the cache.

        Returns:
            The accepted steps, in order.
        """
        steps: list[Step] = []
        queue: list[tuple[float, int, int, LayerPlan]] = []
        for layer in range(1, self.shape.layers):
            if layer not in protect:
                queue += [(-1.0, -1, layer, plan) for plan in self.propose(self.layout, layer)]
        queue = [(rank, age, layer, index, plan) for index, (rank, age, layer, plan) in enumerate(queue)]
        heapq.heapify(queue)
        while queue and not done(self.layout):
            measured = 0
            while queue:
                rank, age, layer, index, plan = heapq.heappop(queue)
                if age == len(steps):
                    break
                fresh = self._refreshed(layer, plan)
                if fresh is None:
                    continue
                layout = self.candidate_layout(layer, fresh)
                if layout is None:
                    continue
                gain = self.saved(layout) - self.saved(self.layout)
                if gain <= 0:
                    continue
                measured += 1
                rank = (self.measure(layout) - self.divergence) / gain
                heapq.heappush(queue, (rank, len(steps), layer, index, fresh))
            else:
                break
            layout = self.candidate_layout(layer, plan)
            self.measure(layout, keep=True)
            steps.append(Step(layer, plan, layout, self.divergence, measured))
            report(steps[-1])
        return steps

    def _refreshed(self, layer: int, plan: LayerPlan) -> LayerPlan | None:
        """The proposal of the same kind under the current layout: its sources may have stopped lending."""
        if self.layout[layer].kind == plan.kind:
            return None
        return next((entry for entry in self.propose(self.layout, layer) if entry.kind == plan.kind), None)
