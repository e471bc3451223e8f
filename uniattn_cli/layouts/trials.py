"""Layouts tried on a base model whose hidden states before every layer are kept: each is really converted and measured.

A layout is fitted to the hidden states that really arrive at its changed layers, and the layers after them are run on
held-out tokens, so that what is measured is the KL divergence of the next-token distributions that users would see. The
unchanged layers before the first change are never run again.
"""

from __future__ import annotations

import contextlib
import math
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch

from uniattn_cli.fitting.fit import fit_layer, for_trials
from uniattn_cli.fitting.match_outputs import SourceChooser
from uniattn_cli.fitting.stream import Batch, run_layer, start_batches
from uniattn_cli.modeling.configuration_uniattn import attention_shape
from uniattn_cli.modeling.layout_uniattn import Layout
from uniattn_cli.modeling.sharing_uniattn import SharedStates
from uniattn_cli.models.building import build_attention, build_converted
from uniattn_cli.models.device import coarse_products
from uniattn_cli.models.losses import LOGITS_AT_ONCE, head_logits, kl_divergence
from uniattn_cli.recipe.schema import ConversionSpec

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@dataclass(frozen=True)
class Trial:
    """A layout that was converted and measured.

    Attributes:
        layout: with the sources that were chosen in the conversion.
        rows: KL(base || converted) in nats per token, averaged over each sequence, float64 [sequences].
    """

    layout: Layout
    rows: torch.Tensor

    @property
    def divergence(self) -> float:
        """Mean over all tokens. A candidate that overflows is the worst of all, not one that compares with nothing."""
        mean = self.rows.mean().item()
        return mean if math.isfinite(mean) else math.inf


class Trials:
    """One base model, converted to one layout after another.

    Args:
        base: stock model.
        fit_windows: [sequences, length] tokens for the fits.
        score_windows: [sequences, length] other tokens, for the divergence.
        spec: how layers are fitted.
        batch_size: sequences per batch.

    Attributes:
        layout: what the model is converted to now; trying another one leaves no trace unless it is kept.
    """

    def __init__(
        self,
        base: PreTrainedModel,
        fit_windows: torch.Tensor,
        score_windows: torch.Tensor,
        spec: ConversionSpec,
        *,
        batch_size: int = 16,
    ):
        self.base = base
        self.spec = for_trials(spec)
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

    def _store_base(self) -> None:
        """Hidden states before every layer: of the base for targets, of the converted model as starting points."""
        self.states = [self._rest(batch, [batch.base], 0, batch.shared) for batch in self.fit_batches]
        with coarse_products():
            self.score_states = [self._rest(batch, [batch.base], 0, batch.shared) for batch in self.score_batches]
        # As long as nothing is changed the converted model is the base, bit for bit.
        self.base_states = [list(states) for states in self.states]
        self.base_final = [states[-1] for states in self.score_states]

    def _logits(self, hidden: torch.Tensor) -> torch.Tensor:
        return head_logits(self.base, self.base.model.norm(hidden))

    def _divergences(self, finals: list[torch.Tensor]) -> torch.Tensor:
        """`Trial.rows`, from hidden states after the last layer."""
        length = finals[0].shape[1]
        rows = max(1, LOGITS_AT_ONCE // (length * self.base.config.vocab_size))
        found = []
        for ours, theirs in zip(finals, self.base_final, strict=True):
            for pair in zip(ours.split(rows), theirs.split(rows), strict=True):
                logits, base_logits = (self._logits(states.flatten(0, 1)) for states in pair)
                found.append(kl_divergence(base_logits, logits).view(-1, length).mean(1))
        return torch.cat(found).double().cpu()

    @torch.no_grad()
    def convert(self, layout: Layout, chooser: SourceChooser | None = None, *, keep: bool = False) -> Trial:
        """Converts to a layout that differs from the current one, and measures it.

        Fits the layers whose plan differs and, where it is kept, all changed layers after them too, because what
        arrives there has changed.

        Args:
            layout: candidate.
            chooser: chooses the sources of borrowing layers anew where they are fitted; None keeps those proposed.
            keep: make it the current one.
        """
        different = [i for i in range(self.shape.layers) if layout[i] != self.layout[i]]
        first = different[0]
        end = self.shape.layers if keep else different[-1] + 1
        batches = self.arriving(first)
        arriving = [states[: first + 1] for states in self.states]
        with contextlib.ExitStack() as changes:
            for index in range(first, end):
                if index in different or (keep and layout[index].kind != "own"):
                    for position, batch in enumerate(batches):
                        batch.base = self.base_states[position][index]
                    layout = self._place(layout, chooser, index, batches, changes)
                    fit_layer(self.base, self.model, index, batches, self.spec)
                else:
                    for batch in batches:
                        self._advance(batch, index)
                for states, batch in zip(arriving, batches, strict=True):
                    states.append(batch.converted)
            finals, rows = self.judge(first, keep)
            if keep:
                changes.pop_all()
        if keep:
            self.layout = layout
            self.states, self.score_states = arriving, finals
            self.fit_batches = [
                replace(batch, shared=tried.shared) for batch, tried in zip(self.fit_batches, batches, strict=True)
            ]
        return Trial(layout, rows)

    @coarse_products()
    def judge(self, first: int, keep: bool = False) -> tuple[list[list[torch.Tensor]], torch.Tensor]:
        """Runs the model as it is now from layer `first` on, on the scoring tokens.

        Args:
            first: layers before it are those of the current layout.
            keep: what layers lend is kept for later calls.

        Returns:
            Hidden states before every layer and after the last, by batch, and `Trial.rows`.
        """
        shared = [batch.shared if keep else batch.shared.copy() for batch in self.score_batches]
        finals = [
            self._rest(batch, states, first, holder)
            for batch, states, holder in zip(self.score_batches, self.score_states, shared, strict=True)
        ]
        return finals, self._divergences([states[-1] for states in finals])

    def _advance(self, batch: Batch, index: int) -> None:
        layer = self.model.model.layers[index]
        batch.converted = run_layer(layer, batch.converted, batch.kwargs[index], uniattn_shared=batch.shared)

    def _place(
        self,
        layout: Layout,
        chooser: SourceChooser | None,
        index: int,
        batches: list[Batch],
        changes: contextlib.ExitStack,
    ) -> Layout:
        """Puts a new attention module into the model, until `changes` closes. Returns the layout with its sources."""
        if chooser is not None:
            layout = layout.with_plan(index, chooser.plan(layout, index, self.base, self.model, batches))
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

    def arriving(self, layer: int) -> list[Batch]:
        """The fit batches where they enter a layer; holders are copies, so that trying a candidate leaves no trace."""
        return [
            replace(batch, base=base[layer], converted=states[layer], shared=batch.shared.copy())
            for batch, base, states in zip(self.fit_batches, self.base_states, self.states, strict=True)
        ]
