"""Pictures of an analysis, legible from 4 to 100 layers."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from uniattn_cli.analysis.measured import Measured


def plot_heatmap(measured: Measured, path: Path) -> None:
    """Layer-pair similarity: same heads with and without the sink, and head-averaged maps, side by side."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    names = [
        ("averaged_cosine", "maps averaged over heads"),
        ("cosine", "same heads"),
        ("cosine_no_sink", "same heads, without the first key"),
    ]
    layers = measured.shape.layers
    size = float(np.clip(layers * 0.13, 4.0, 5.5))
    figure = Figure(figsize=(3 * size + 1.2, size + 1.1), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(1, len(names), sharey=True)
    step = max(1, round(layers / 10))
    for axis, (name, title) in zip(axes, names, strict=True):
        image = axis.imshow(measured.layers[name]["mean"], vmin=0, vmax=1, cmap="viridis", interpolation="nearest")
        axis.set_title(title)
        axis.set_xlabel("layer")
        axis.set_xticks(range(0, layers, step))
        axis.set_yticks(range(0, layers, step))
    axes[0].set_ylabel("layer")
    figure.colorbar(image, ax=axes, shrink=0.9, label="cosine similarity of attention rows")
    figure.suptitle(f"{Path(measured.model).name}: similarity of the attention maps ({measured.tokens:,} tokens)")
    figure.savefig(path, dpi=110)


def plot_depth(measured: Measured, path: Path) -> None:
    """Similarity of each layer to the one before over depth; below it, what borrowing from that layer does."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    layers = measured.shape.layers
    panels = 1 if measured.output_error is None else 2
    figure = Figure(figsize=(float(np.clip(layers * 0.2, 7.5, 14)), 5.2 + 3 * (panels - 1)), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(panels, 1, sharex=True, squeeze=False, height_ratios=[5, 3][:panels])[:, 0]
    _draw_similarities(measured, axes[0])
    if measured.output_error is not None:
        _draw_errors(measured.output_error, axes[1])
    axes[-1].set_xlabel("layer (compared with the layer before)")
    axes[0].set_title(f"{Path(measured.model).name}: attention over depth")
    figure.legend(*axes[0].get_legend_handles_labels(), fontsize=8, loc="outside lower center", ncols=2)
    figure.savefig(path, dpi=110)


def _draw_similarities(measured: Measured, axis) -> None:
    """Layer similarity, best possible head map, and weight of the first key."""
    layers = measured.shape.layers
    for name, label in (
        ("averaged_cosine", "cosine, maps averaged over heads"),
        ("cosine", "cosine, same heads"),
        ("cosine_no_sink", "cosine, same heads, without the first key"),
        ("js", "1 - Jensen-Shannon, same heads"),
    ):
        _draw_line(axis, measured.layers[name]["mean"], measured.layers[name]["stderr"], label)
    best = measured.heads["cosine_no_sink"][1:].max(axis=(1, 3)).mean(axis=1)
    axis.plot(
        np.arange(1, layers), best, "k--", linewidth=1, label="cosine without the first key, best head within distance"
    )
    axis.plot(np.arange(layers), measured.sink, ":", color="grey", label="weight of the first key")
    axis.set(ylabel="similarity", ylim=(0, 1.02), xlim=(0, layers - 1))
    axis.grid(alpha=0.3)


def _draw_errors(errors: dict[str, list], axis) -> None:
    """Relative squared error of the attention block's output when it borrows from the layer before."""
    for name, label in (("before", "uncompensated"), ("after", "with the best compensation, held-out tokens")):
        _draw_line(axis, errors[name], errors[name + "_stderr"], label)
    axis.axhline(1, color="grey", linewidth=0.8)
    axis.set(ylabel="output error\nwith borrowed maps", ylim=(0, None))
    axis.grid(alpha=0.3)
    axis.legend(fontsize=8)


def _draw_line(axis, mean: list, stderr: list, label: str) -> None:
    """Each layer against the one before, with its 95 % interval; nothing where nothing was measured."""
    depth = np.arange(1, len(mean))
    line, width = (np.array(values, dtype=float)[depth, depth - 1] for values in (mean, stderr))
    axis.plot(depth, line, marker=".", label=label)
    axis.fill_between(depth, line - 1.96 * width, line + 1.96 * width, alpha=0.2)
