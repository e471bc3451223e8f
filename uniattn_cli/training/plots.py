"""The picture of a training run."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from uniattn_cli.charts import COLOURS, Chart, from_zero, plot, write_png

# Beside the loss.
PANELS = {
    "learning_rate": "learning rate",
    "grad_norm": "gradient norm, before clipping",
    "tokens_per_second": "tokens per second",
}


def plot_training(lines: list[dict], heldout: dict[str, tuple[float, float | None]], path: Path) -> None:
    """Loss, learning rate, gradient norm and speed over optimiser steps, one colour per stage.

    Args:
        lines: of `log.jsonl`.
        heldout: loss on held-out responses before and after, with its standard error, by the model's name; may be
            empty.
        path: a PNG.
    """
    others = [_panel(lines, key, title) for key, title in PANELS.items()]
    write_png([loss_chart(lines, heldout, "Loss"), *others], path)


def loss_chart(lines: list[dict], heldout: dict[str, tuple[float, float | None]], title: str) -> Chart:
    """Training loss of each stage, the loss on validation rows, and that on held-out responses before and after.

    Args:
        lines, heldout: as `plot_training`.
        title: one line.
    """
    losses = [line["loss"] for line in lines if line.get("loss") is not None]

    def draw(axis: Any) -> None:
        _stages(axis, lines, "loss", "training, ")
        validation = [
            (offset + line["step"], line["validation_loss"])
            for offset, stage in _by_stage(lines)
            for line in stage
            if line.get("validation_loss") is not None
        ]
        if validation:
            plot(axis, "validation rows", validation, style=4)
        last = sum(stage[-1]["step"] for _, stage in _by_stage(lines))
        for position, (name, (mean, error)) in zip((0, last), heldout.items(), strict=False):
            plot(axis, f"held-out responses, {name}", [(position, mean)], errors=[error], line=False)
        axis.set_ylabel("loss, nats per token")
        if axis.get_legend_handles_labels()[1]:
            axis.legend()

    words = f"Training loss {losses[0]:.3f} at the first logged step, {losses[-1]:.3f} at the last" if losses else ""
    words += "".join(f"; held-out responses, {name}: {mean:.3f}" for name, (mean, _) in heldout.items())
    return Chart(title, f"{words}. Vertical lines separate stages.", draw)


def _panel(lines: list[dict], key: str, title: str) -> Chart:
    def draw(axis: Any) -> None:
        _stages(axis, lines, key)
        if key != "grad_norm":
            from_zero(axis)

    return Chart(title[:1].upper() + title[1:], "", draw)


def _by_stage(lines: list[dict]) -> Iterator[tuple[int, list[dict]]]:
    """(step at which a stage begins, its lines)."""
    offset = 0
    for stage in dict.fromkeys(line["stage"] for line in lines):
        own = sorted((line for line in lines if line["stage"] == stage), key=lambda line: line["step"])
        yield offset, own
        offset += own[-1]["step"]


def _stages(axis: Any, lines: list[dict], key: str, before: str = "") -> None:
    """Draws a value of every line, in a colour for each stage."""
    for style, (offset, stage) in enumerate(_by_stage(lines), 1):
        points = [(offset + line["step"], line[key]) for line in stage if line.get(key) is not None]
        if points:
            plot(axis, f"{before}{stage[0]['stage']}", points, style=style)
        if offset:
            axis.axvline(offset, color=COLOURS["soft"], linewidth=0.8)
    axis.set_xlabel("optimiser step")
    axis.xaxis.get_major_locator().set_params(integer=True)
