"""The base model and calibration text on which layouts are really converted, to match heads and to compare layouts."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import TYPE_CHECKING

from uniattn_cli.errors import DataError, ModelError
from uniattn_cli.fitting.match_maps import Matcher
from uniattn_cli.layouts.considered import Validated
from uniattn_cli.modeling.layout_uniattn import Layout
from uniattn_cli.models.costs import count_parameters
from uniattn_cli.models.families import check_target
from uniattn_cli.models.placement import Placement, place
from uniattn_cli.recipe.schema import Recipe

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel

    from uniattn_cli.analysis.measured import Measured
    from uniattn_cli.fitting.match_outputs import SourceChooser
    from uniattn_cli.models.hub import Source
    from uniattn_cli.options import RunOptions

# Tokens that a layout of the shortlist is fitted on: enough to tell layouts apart.
SHORTLIST_TOKENS = 16384
# How many of them are trained, where the recipe wants that.
TRIED = 4


@dataclass(frozen=True)
class Texts:
    """Calibration windows, LongTensor [n, length] each, that have no passage in common.

    Attributes:
        fit: candidates are fitted on them.
        score: they judge the candidates of a search.
        check: they judge the shortlist, whose layouts the search has bent towards `score`.
    """

    fit: torch.Tensor
    score: torch.Tensor
    check: torch.Tensor


@dataclass(frozen=True)
class Workbench:
    """The base model and calibration text on which layouts are converted; loaded when first needed."""

    recipe: Recipe
    source: Source
    measured: Measured
    options: RunOptions

    @cached_property
    def base(self) -> PreTrainedModel:
        check_target(self.measured.model_type, self.recipe.conversion.aim)
        self.options.progress.note(f"loading {self.recipe.model.name} to convert candidates")
        return self.placement.load(self.source, self.recipe.model)

    @cached_property
    def placement(self) -> Placement:
        """Where the model is kept and where its layers run."""
        from uniattn_cli.models.loading import load_config

        parameters = count_parameters(load_config(self.source), Layout.own(self.measured.shape.layers))
        device = self.options.torch_device()
        weights = parameters * self.measured.element_size
        return place(self.source, self.recipe.conversion.offload, weights, device)

    @cached_property
    def matcher(self) -> Matcher:
        spec = self.recipe.layout
        return Matcher(self.measured.score, self.measured.shape, spec.head_map, spec.sources)

    def windows(self, tokens: int) -> torch.Tensor:
        """Calibration windows. Raises `DataError` if the text does not hold even one."""
        from uniattn_cli.data.chat import load_chat_tokenizer
        from uniattn_cli.data.screen import Screen
        from uniattn_cli.data.windows import calibration_windows

        recipe = self.recipe
        length = recipe.conversion.length
        tokenizer = load_chat_tokenizer(self.source, recipe.data.chat_template)
        screen = Screen(recipe.data, tokenizer, self.options.progress.warn)
        return calibration_windows(
            recipe.data, tokenizer, tokens=tokens, length=length, seed=recipe.seed, screen=screen
        )

    @cached_property
    def texts(self) -> Texts:
        """`conversion.tokens` for fits, `layout.score_tokens` for the search and again for the comparison.

        Where the text is shorter, each part is so in proportion.

        Raises:
            DataError: the text does not hold a window for each part and one more for the fit.
        """
        import torch

        spec, score = self.recipe.conversion, self.recipe.layout.score_tokens
        wanted = [max(1, tokens // spec.length) for tokens in (spec.tokens, score, score)]
        found = self.windows(sum(wanted) * spec.length)
        if len(found) < sum(wanted):
            if len(found) < 4:
                raise DataError(
                    f"the calibration text has {len(found)} windows of {spec.length} tokens, but comparing layouts by "
                    "conversion needs at least 4; add more text in data.calibration, or lower conversion.length"
                )
            judging = [max(1, len(found) * part // sum(wanted)) for part in wanted[1:]]
            wanted = [len(found) - sum(judging), *judging]
            parts = ", ".join(f"{part * spec.length:,}" for part in wanted)
            self.options.progress.warn(
                f"the calibration text has only {found.numel():,} tokens: {parts} of them for fit, search, comparison"
            )
        return Texts(*torch.split(found, wanted))

    def lenders(self, layout: Layout, layer: int) -> list[int]:
        return self.matcher.lenders(layout, layer, self.recipe.layout.max_group)

    def leaders(self, layout: Layout, layer: int) -> list[int]:
        """The layers that a fixed layout names, where they were measured."""
        return [other for other in layout[layer].source_layers if layer - other <= self.measured.max_distance]

    def chooser(self, lenders: Callable[[Layout, int], list[int]]) -> SourceChooser | None:
        """Matches heads where the recipe wants them matched by output."""
        from uniattn_cli.fitting.match_outputs import Limits, SourceChooser

        if not matches_by_output(self.recipe):
            return None
        limits = Limits.of(self.options.torch_device())
        return SourceChooser(self.matcher, lenders, limits, match_keys=self.recipe.conversion.align > 0)

    def match_heads(self, layout: Layout, *, fixed: bool = False) -> Layout:
        """The layout with the heads that a conversion matches by output; as it is where there is nothing to match.

        Args:
            fixed: layers keep the lenders that the layout names.
        """
        from uniattn_cli.fitting.match_outputs import Limits

        if not matches_by_output(self.recipe) or not any(plan.traits.borrows for plan in layout):
            return layout
        tokens = min(self.recipe.conversion.tokens, Limits.of(self.options.torch_device()).tokens)
        with self.options.progress.track("matching heads", len(layout)) as advance:
            model = self.converted(layout, self.windows(tokens), fixed=fixed, trial=True, advance=advance)
        return model.config.layout

    def converted(
        self,
        layout: Layout,
        windows: torch.Tensor,
        *,
        fixed: bool = False,
        trial: bool = False,
        advance: Callable[..., None] = lambda steps=1, text="": None,
    ) -> PreTrainedModel:
        """The base converted to a layout, fitted on windows, its heads matched where the recipe wants that.

        Args:
            layout: what to convert to.
            windows: LongTensor [n, length].
            fixed: layers keep the lenders that the layout names.
            trial: only the heads are wanted.
            advance: told about each layer.
        """
        import torch

        from uniattn_cli.fitting.fit import fit_layers, for_trials
        from uniattn_cli.models.building import build_converted

        spec = self.recipe.conversion
        torch.manual_seed(self.recipe.seed)
        model = build_converted(self.base, layout)
        fit_layers(
            self.base,
            model,
            windows,
            for_trials(spec) if trial else spec,
            chooser=self.chooser(self.leaders if fixed else self.lenders),
            device=self.placement.device,
            batch_size=self.recipe.evaluation.batch_size,
            advance=advance,
        )
        return model

    @property
    def _shortlist_fit(self) -> torch.Tensor:
        return self.texts.fit[: max(1, SHORTLIST_TOKENS // self.recipe.conversion.length)]

    @cached_property
    def _compared(self) -> dict[Layout, tuple[Layout, torch.Tensor]]:
        """Layouts that were converted: as they came out, and their divergence from the base by sequence."""
        return {}

    def validate(self, layouts: dict[str, Layout]) -> list[Validated]:
        """Converts each layout and measures its divergence from the base on `texts.check`, best first.

        Args:
            layouts: by name; those of earlier calls are not converted again.
        """
        from uniattn_cli.models.losses import window_divergences
        from uniattn_cli.models.residence import layer_by_layer

        base, device, batch_size = self.base, self.placement.device, self.recipe.evaluation.batch_size
        fit = self._shortlist_fit
        missing = {name: layout for name, layout in layouts.items() if layout not in self._compared}
        layers = self.measured.shape.layers
        with self.options.progress.track("converting the shortlist", len(missing) * layers) as advance:
            for name, layout in missing.items():
                model = self.converted(
                    layout, fit, advance=lambda steps=1, text="", name=name: advance(steps, f"{name}, {text}")
                )
                with layer_by_layer(base, device), layer_by_layer(model, device):
                    rows = window_divergences(base, model, self.texts.check, batch_size=batch_size)
                self._compared[layout] = model.config.layout, rows
        found = [(name, *self._compared[layout]) for name, layout in layouts.items()]
        found.sort(key=lambda entry: entry[2].mean().nan_to_num(nan=math.inf).item())
        best = found[0][2]
        if not best.isfinite().all():
            raise ModelError(
                f"no layout in the shortlist gives finite logits in {str(base.dtype).removeprefix('torch.')}; "
                "set model.dtype to bfloat16 or float32"
            )
        return [
            Validated(name, layout, rows.mean().item(), stderr(rows), (rows - best).mean().item(), stderr(rows - best))
            for name, layout, rows in found
        ]

    def tried(self, shortlist: Sequence[Validated], tokens: int) -> list[Validated]:
        """Trains the best of a shortlist, and puts them in the order of their divergence after that.

        Args:
            shortlist: best first.
            tokens: that each is trained on: calibration text that follows all others, and that of the fits.
        """
        import torch

        from uniattn_cli.layouts.shortly import steps_of, train_shortly
        from uniattn_cli.models.losses import window_divergences

        length, texts = self.recipe.conversion.length, self.texts
        seen = sum(map(len, (texts.fit, texts.score, texts.check)))
        windows = torch.cat([self.windows(seen * length + tokens)[seen:], texts.fit])
        best = [entry for entry in shortlist[:TRIED] if entry.layout.changed]
        found = []
        with self.options.progress.track("training the best", len(best) * steps_of(tokens, length)) as advance:
            for entry in best:
                model = self.converted(entry.layout, self._shortlist_fit, fixed=True)
                train_shortly(self.base, model, windows, tokens, functools.partial(advance, text=entry.name))
                rows = window_divergences(self.base, model, texts.check, batch_size=self.recipe.evaluation.batch_size)
                found.append(replace(entry, trained=rows.mean().nan_to_num(nan=math.inf).item()))
        found.sort(key=lambda entry: entry.trained or 0.0)
        return [*found, *(entry for entry in shortlist if entry not in best)]


def matches_by_output(recipe: Recipe) -> bool:
    """Whether heads are matched in a conversion, for which W_o has to be solved."""
    spec = recipe.layout
    return spec.match == "output" and spec.head_map != "identity" and recipe.conversion.solve in ("both", "output")


def stderr(values: torch.Tensor) -> float:
    """Standard error of the mean; NaN for one value."""
    return (values.std() / len(values) ** 0.5).item() if len(values) > 1 else float("nan")
