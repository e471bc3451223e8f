"""The pass over calibration text: runs the model, feeds the accumulators and keeps the time."""

from __future__ import annotations

from collections.abc import Callable
from statistics import median
from typing import TYPE_CHECKING

import torch

from uniattn_cli.analysis.borrowing import MOMENT_BYTES, BorrowingError, compensation_bytes, held_out
from uniattn_cli.analysis.capture import OUTPUT_PROJECTIONS, Captured, LayerStates, capture
from uniattn_cli.analysis.measured import Measured
from uniattn_cli.analysis.similarity import MapStatistics
from uniattn_cli.errors import ModelError, UsageError
from uniattn_cli.modeling.configuration_uniattn import attention_shape
from uniattn_cli.models.device import timed
from uniattn_cli.models.residence import layer_by_layer

if TYPE_CHECKING:
    from accelerate import PartialState
    from transformers import PreTrainedModel

    from uniattn_cli.modeling.layout_uniattn import AttentionShape
    from uniattn_cli.recipe.schema import AnalysisSpec

# Sequences that are also run plainly, to state the cost of measuring.
TIMED_SEQUENCES = 3


def measure(
    model: PreTrainedModel,
    windows: torch.Tensor,
    spec: AnalysisSpec,
    source,
    advance: Callable[[], None] = lambda: None,
    *,
    device: torch.device | None = None,
    at_once: int = 1,
    process: PartialState | None = None,
) -> tuple[Measured, list[str]]:
    """Runs the model over windows and accumulates all similarities and errors.

    Args:
        model: any whose attention goes through transformers' AttentionInterface.
        windows: tokens [sequences, length], none of them padding.
        spec: what is measured.
        source: where the model came from; its `name` and `fingerprint` are kept.
        advance: called after each sequence.
        device: where layers run one at a time, while the model is elsewhere; None: all where the model is.
        at_once: sequences of one pass, which wait together in CPU memory, so that layers are fetched less often.
        process: one of several that share the sequences among them, and all end with all that was measured.

    Returns:
        What was measured, and notes on what was not.

    Raises:
        UsageError: there are more processes than sequences.
        ModelError: some layers' attention does not go through the interface, or its maps are not finite.
    """
    shape = attention_shape(model.config)
    survey = _Survey(model, shape, spec, len(windows), device)
    apart = torch.device("cpu") if device is not None or at_once > 1 else None
    judges = held_out(len(windows))
    plain: list[float] = []
    fitted = [index for index in range(len(windows)) if index not in judges]
    count, number = (process.num_processes, process.process_index) if process else (1, 0)
    if count > len(fitted):
        raise UsageError(f"{count} processes cannot share {len(fitted)} sequences; start fewer, or analyse more tokens")
    fitted, judges = fitted[number::count], judges[number::count]
    with torch.no_grad(), layer_by_layer(model, device), capture(model, apart) as captured:
        for batch in windows[fitted].split(at_once):
            survey.add(captured, batch, advance)
        survey.solve(shared=count > 1)
        for batch in windows[judges].split(at_once) if judges else ():
            survey.add(captured, batch, advance)
    if count > 1:
        survey.gather(number)
    if not all(entry.mean.isfinite().all() for entry in survey.statistics.heads.values()):
        dtype = str(model.dtype).removeprefix("torch.")
        raise ModelError(
            f"attention maps are not finite: hidden states overflow in {dtype}; use --dtype bfloat16 or float32"
        )
    with torch.no_grad(), layer_by_layer(model, device):
        for batch in windows[: max(TIMED_SEQUENCES, at_once) if apart is None else at_once].split(at_once):
            with timed(plain, survey.device):
                survey.forward(batch)
            plain[-1] /= len(batch)
    heads, layers = survey.statistics.heads, survey.statistics.layers
    measured = Measured(
        model=source.name,
        fingerprint=source.fingerprint,
        model_type=model.config.model_type,
        shape=shape,
        element_size=model.dtype.itemsize,
        tokens=windows.numel(),
        sequences=len(windows),
        length=windows.shape[1],
        max_distance=survey.statistics.max_distance,
        seconds=sum(survey.times) + sum(survey.solving),
        # Medians, since the first passes of a process are slow for reasons of their own.
        forward_ratio=(median(survey.times) + sum(survey.solving) / len(windows)) / median(plain),
        layers={
            name: {"mean": entry.mean.tolist(), "stderr": entry.stderr.tolist()}
            for name, entry in sorted(layers.items())
        },
        sink=survey.statistics.sink.mean.tolist(),
        output_error=None if survey.borrowing is None else survey.borrowing.results(),
        heads={name: entry.mean.numpy() for name, entry in heads.items()},
        heads_stderr={name: entry.stderr.numpy() for name, entry in heads.items()},
    )
    return measured, survey.notes


class _Survey:
    """All accumulators of one pass, and the time it took."""

    def __init__(
        self,
        model: PreTrainedModel,
        shape: AttentionShape,
        spec: AnalysisSpec,
        sequences: int,
        device: torch.device | None,
    ):
        self.model = model
        self.shape = shape
        self.sequences = sequences
        self.device = device or next(model.parameters()).device
        self.statistics = MapStatistics(min(spec.max_distance, shape.layers - 1), spec.rows, spec.top_k)
        self.borrowing: BorrowingError | None = None
        self.notes: list[str] = []
        self.times: list[float] = []
        self.solving: list[float] = []

    def forward(self, windows: torch.Tensor) -> None:
        self.model.base_model(windows.to(self.device), use_cache=False)

    def add(self, captured: Captured, windows: torch.Tensor, advance: Callable[[], None]) -> None:
        """Runs sequences and adds them one by one; their states are let go before the next ones are run."""
        spent: list[float] = []
        with timed(spent, self.device):
            self.forward(windows)
            for index in range(len(windows)):
                layers = captured.take(index=index, device=self.device)
                if not self.times and not index:
                    self._begin(captured, layers)
                self.statistics.add(layers)
                if self.borrowing is not None:
                    self.borrowing.add(layers)
                del layers
                advance()
            captured.clear()
        self.times += [spent[0] / len(windows)] * len(windows)

    def solve(self, shared: bool) -> None:
        """Ends the fit of compensations.

        Args:
            shared: other processes have added sequences, too.
        """
        with timed(self.solving, self.device):
            if self.borrowing is not None:
                if shared:
                    self.borrowing.share()
                self.borrowing.solve()

    def gather(self, number: int) -> None:
        """Adds what the other processes measured.

        Args:
            number: of this one.
        """
        from accelerate.utils import gather_object

        errors = None if self.borrowing is None else (self.borrowing.before, self.borrowing.after)
        found = gather_object([(self.statistics, errors)])
        for other, (statistics, errors) in enumerate(found):
            if other != number:
                self.statistics.merge(statistics)
                if self.borrowing is not None:
                    self.borrowing.merge(errors)

    def _begin(self, captured: Captured, layers: list[LayerStates]) -> None:
        """Looks at the first sequence: what can be measured of this model?"""
        if len(layers) != self.shape.layers:
            raise ModelError(
                f"attention can be captured in only {len(layers)} of {self.shape.layers} layers; "
                "this model cannot be analysed"
            )
        reason = _unknown_output(captured, layers)
        if reason is not None:
            self.notes.append(f"output errors of borrowing were not measured: {reason}")
            return
        distance, compensate = self.statistics.max_distance, self.sequences > 1
        size = compensation_bytes(self.shape.layers, self.shape.hidden_size, distance)
        if not compensate:
            self.notes.append("one sequence: no confidence intervals, and no errors after compensation")
        elif size > MOMENT_BYTES:
            compensate = False
            self.notes.append(f"errors after compensation were not measured: fitting would take {size / 2**30:.0f} GiB")
        projections = [captured.projections[layer] for layer in range(self.shape.layers)]
        self.borrowing = BorrowingError(projections, self.shape.mask_types, distance, compensate, self.device)


def _unknown_output(captured: Captured, layers: list[LayerStates]) -> str | None:
    """Why the attention block's output cannot be computed from the heads; None if it can."""
    for index, state in enumerate(layers):
        if index not in captured.projections or state.inputs is None:
            return f"layer {index} has no linear output projection named {', '.join(OUTPUT_PROJECTIONS)}"
        if index in captured.gated:
            return f"layer {index} changes what its heads found before projecting it"
    return None
