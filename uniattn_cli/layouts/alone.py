"""One layer of the base, replaced by one plan after another while all others stay.

Conversions of the same layer have much in common, and nothing of it is computed twice: the base's attention output, how
the layer's keys and input follow from those of the lenders, what its attention would give with heads that may be
borrowed, queries aligned to the same keys, and the sums over tokens from which W_o is solved, with W_c and without.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import nn

from uniattn_cli.fitting.adam import parameters_of
from uniattn_cli.fitting.align_queries import align_queries, query_modules
from uniattn_cli.fitting.match_keys import LayerMatches
from uniattn_cli.fitting.match_outputs import SourceChooser
from uniattn_cli.fitting.solve import problem_of, solution, solved_parts
from uniattn_cli.fitting.stream import base_step
from uniattn_cli.layouts.trials import Trial, Trials
from uniattn_cli.modeling.layout_uniattn import LayerPlan, Layout
from uniattn_cli.modeling.sharing_uniattn import SharedAttentionMixin
from uniattn_cli.models.building import build_attention


class Alone:
    """One layer whose plans are tried.

    Args:
        trials: of the unchanged model, whose streams are used.
        index: number of the layer.
        lenders: all layers that may lend to it.
    """

    @torch.no_grad()
    def __init__(self, trials: Trials, index: int, lenders: Sequence[int]):
        self.trials, self.index = trials, index
        self.layer: Any = trials.model.model.layers[index]
        self.batches = trials.arriving(index)
        base_layer = trials.base.model.layers[index]
        for batch in self.batches:
            # Both streams are the same here, so that this is the target of any aim.
            batch.target = base_step(base_layer, batch.base, batch.kwargs[index])[1]
        own = build_attention(trials.base, self._own, index)
        self.matches = LayerMatches(base_layer, own, index, self.batches, lenders)
        self._queries: dict[tuple, list[nn.Parameter]] = {}

    @property
    def _own(self) -> Layout:
        return Layout.own(self.trials.shape.layers)

    def choose(self, plan: LayerPlan, chooser: SourceChooser, choices: Sequence[Sequence[int]]) -> list[LayerPlan]:
        """The plan with the heads that fit best, for each choice of lenders; see `SourceChooser.plans`."""
        return chooser.plans(plan, self.layer, self.matches, choices)

    @torch.no_grad()
    def convert(self, plans: Sequence[LayerPlan]) -> Iterator[Trial]:
        """Converts to each plan and measures it.

        Args:
            plans: that differ only in W_c.
        """
        spec, problem = self.trials.spec, None
        # The sums with the most features have those of the others.
        widest = max(plans, key=lambda plan: plan.compensation != "none")
        with self._placed(widest) as attention:
            if any(solved_parts(attention, spec)):
                problem = problem_of(self.layer, self.index, self.batches, spec)
        for plan in plans:
            with self._placed(plan) as attention:
                if problem is not None:
                    solution(problem, attention, spec).whole.write(attention)
                _, rows = self.trials.judge(self.index)
            yield Trial(self._own.with_plan(self.index, plan), rows)

    @contextlib.contextmanager
    def _placed(self, plan: LayerPlan) -> Iterator[SharedAttentionMixin]:
        """A new attention module in the model for a while, with aligned queries."""
        before = self.layer.self_attn
        attention = build_attention(self.trials.base, self._own.with_plan(self.index, plan), self.index)
        self.layer.self_attn = attention
        try:
            if self.trials.spec.align and plan.traits.aligns_queries:
                self._align(attention)
            yield attention
        finally:
            self.layer.self_attn = before

    def _align(self, attention: SharedAttentionMixin) -> None:
        parameters = parameters_of(*query_modules(attention))
        # Where queries, keys and values are one matrix, kinds keep different parts of it.
        shapes = tuple(parameter.shape for _, _, parameter in parameters)
        key = (attention.plan.traits.early, tuple(attention.key_sources), shapes)
        if key not in self._queries:
            align_queries(self.layer, self.matches, self.trials.spec.align)
            self._queries[key] = [parameter for _, _, parameter in parameters_of(*query_modules(attention))]
        for (module, name, _), parameter in zip(parameters, self._queries[key], strict=True):
            setattr(module, name, parameter)
