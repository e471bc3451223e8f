"""The picture of a training run."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from uniattn_cli.models.losses import Loss

PANELS = {
    "loss": "loss, nats per token",
    "learning_rate": "learning rate",
    "grad_norm": "gradient norm, before clipping",
    "tokens_per_second": "tokens per second",
}
# Distinct for people who cannot tell red from green (Okabe and Ito).
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")


def plot_training(lines: list[dict], heldout: dict[str, Loss], path: Path) -> None:
    """Loss, learning rate, gradient norm and speed over optimiser steps, one colour per stage.

    With the training loss stand the loss on validation rows, and that on held-out responses before and after.

    Args:
        lines: of `log.jsonl`.
        heldout: loss on held-out responses before and after, by the model's name; may be empty.
        path: a PNG.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    figure = Figure(figsize=(11, 7), layout="constrained")
    FigureCanvasAgg(figure)
    axes = dict(zip(PANELS, figure.subplots(2, 2, sharex=True).flat, strict=True))
    offset = 0
    for number, stage in enumerate(dict.fromkeys(line["stage"] for line in lines)):
        own = [line for line in lines if line["stage"] == stage]
        _stage(axes, own, offset, stage, COLOURS[number % len(COLOURS)])
        offset += max(line["step"] for line in own)
    for (name, loss), position in zip(heldout.items(), (0, offset), strict=False):
        axes["loss"].errorbar(
            position, loss.mean, yerr=loss.stderr, color="black", marker="D", capsize=3, linestyle="none",
            label=f"held-out responses, {name}: {loss.mean:.3f}",
        )  # fmt: skip
    for key, axis in axes.items():
        axis.set_ylabel(PANELS[key])
        axis.xaxis.set_major_locator(MaxNLocator(integer=True))
        axis.grid(alpha=0.3)
        axis.spines[["top", "right"]].set_visible(False)
        if key in ("learning_rate", "tokens_per_second"):
            axis.set_ylim(bottom=0)
    for axis in (axes["grad_norm"], axes["tokens_per_second"]):
        axis.set_xlabel("optimiser step")
    axes["loss"].legend(fontsize=8)
    figure.savefig(path, dpi=120)


def _stage(axes: dict[str, Any], lines: list[dict], offset: int, stage: str, colour: str) -> None:
    """Draws one stage into every panel, from step `offset` on."""
    for key, axis in axes.items():
        points = [(offset + line["step"], line[key]) for line in lines if line.get(key) is not None]
        label = f"training, {stage}" if key == "loss" else None
        axis.plot(*zip(*points, strict=True), marker=".", color=colour, label=label)
        if offset:
            axis.axvline(offset, color="0.7", linewidth=1)
    points = [(offset + line["step"], line["validation_loss"]) for line in lines if "validation_loss" in line]
    if points:
        steps, losses = zip(*points, strict=True)
        axes["loss"].plot(steps, losses, marker="s", linestyle="--", color=colour, label=f"validation rows, {stage}")
