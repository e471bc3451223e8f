"""Pictures of an analysis, legible from 4 to 100 layers."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from uniattn_cli.analysis.measured import Measured
from uniattn_cli.charts import COLOURS, Chart, write_png

MAPS = {
    "averaged_cosine": "Maps averaged over heads",
    "cosine": "Same heads",
    "cosine_no_sink": "Same heads, without the first key",
}
LINES = {
    "averaged_cosine": "cosine, maps averaged over heads",
    "cosine": "cosine, same heads",
    "cosine_no_sink": "cosine, same heads, without the first key",
    "js": "1 - Jensen-Shannon, same heads",
}


def plot_heatmap(measured: Measured, path: Path) -> None:
    """Layer-pair similarity: same heads with and without the sink, and head-averaged maps, side by side."""
    charts = [Chart(title, "", partial(_draw_map, measured, name), height=3.4) for name, title in MAPS.items()]
    note = f"{Path(measured.model).name}: cosine similarity of attention rows, {measured.tokens:,} tokens"
    write_png(charts, path, columns=len(charts), note=note)


def _draw_map(measured: Measured, name: str, axis: Any) -> None:
    image = axis.imshow(measured.layers[name]["mean"], vmin=0, vmax=1, cmap="viridis", interpolation="nearest")
    axis.set(xlabel="layer", ylabel="layer")
    axis.grid(visible=False)
    axis.figure.colorbar(image, ax=axis, shrink=0.8)


def plot_depth(measured: Measured, path: Path) -> None:
    """Similarity of each layer to the one before over depth; below it, what borrowing from that layer does."""
    name = Path(measured.model).name
    charts = [Chart(f"{name}: attention over depth", "", partial(_draw_similarities, measured))]
    if measured.output_error is not None:
        charts.append(Chart("Output error with borrowed maps", "", partial(_draw_errors, measured.output_error)))
    write_png(charts, path, columns=1, note="each layer compared with the one before; bands: 95 % intervals")


def _draw_similarities(measured: Measured, axis: Any) -> None:
    """Layer similarity, best possible head map, and weight of the first key."""
    layers = measured.shape.layers
    for name, label in LINES.items():
        _draw_line(axis, measured.layers[name]["mean"], measured.layers[name]["stderr"], label)
    best = measured.heads["cosine_no_sink"][1:].max(axis=(1, 3)).mean(axis=1)
    axis.plot(np.arange(1, layers), best, "--", color=COLOURS["ink"], label="without the first key, best head in reach")
    axis.plot(np.arange(layers), measured.sink, ":", color=COLOURS["soft"], label="weight of the first key")
    axis.set(xlabel="layer", ylabel="similarity", ylim=(0, 1.02), xlim=(0, layers - 1))
    axis.legend(fontsize=6.5, ncols=2, loc="upper center", bbox_to_anchor=(0.5, -0.16))


def _draw_errors(errors: dict[str, list], axis: Any) -> None:
    """Relative squared error of the attention block's output when it borrows from the layer before."""
    for name, label in (("before", "uncompensated"), ("after", "with the best compensation, held-out tokens")):
        _draw_line(axis, errors[name], errors[name + "_stderr"], label)
    axis.axhline(1, color=COLOURS["soft"], linewidth=0.8)
    axis.set(xlabel="layer", ylabel="relative squared error", ylim=(0, None))
    axis.legend()


def _draw_line(axis: Any, mean: list, stderr: list, label: str) -> None:
    """Each layer against the one before, with its 95 % interval; nothing where nothing was measured."""
    depth = np.arange(1, len(mean))
    line, width = (np.array(values, dtype=float)[depth, depth - 1] for values in (mean, stderr))
    axis.plot(depth, line, marker=".", label=label)
    axis.fill_between(depth, line - 1.96 * width, line + 1.96 * width, alpha=0.2)
