"""The picture of a training run."""

from __future__ import annotations

from pathlib import Path

from uniattn_cli.scoring import Loss


def plot_loss(lines: list[dict], heldout: dict[str, Loss], path: Path) -> None:
    """Training loss over optimiser steps, one colour per stage, with the held-out loss before and after.

    Args:
        lines: of `log.jsonl`.
        heldout: loss on held-out responses of `converted` and `trained`; may be empty.
        path: a PNG.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    figure = Figure(figsize=(8, 4.4), layout="constrained")
    FigureCanvasAgg(figure)
    axis = figure.subplots()
    offset = 0
    for stage in dict.fromkeys(line["stage"] for line in lines):
        own = [line for line in lines if line["stage"] == stage]
        steps = [offset + line["step"] for line in own]
        axis.plot(steps, [line["loss"] for line in own], marker=".", label=f"training, {stage}")
        if offset:
            axis.axvline(offset, color="0.7", linewidth=1)
        offset = steps[-1]
    for (name, loss), position in zip(heldout.items(), (0, offset), strict=False):
        axis.errorbar(
            position, loss.mean, yerr=loss.stderr, color="black", marker="D", capsize=3, linestyle="none",
            label=f"held-out responses, {name}: {loss.mean:.3f}",
        )  # fmt: skip
    axis.set_xlabel("optimiser step")
    axis.set_ylabel("loss, nats per learned token")
    axis.xaxis.set_major_locator(MaxNLocator(integer=True))
    axis.grid(alpha=0.3)
    axis.legend()
    figure.savefig(path, dpi=120)
