"""The tables of an evaluation, made from `results.json`: page, Markdown, terminal and card show the same."""

from __future__ import annotations

import functools
import itertools
import operator
from collections.abc import Callable, Sequence
from typing import Any

from uniattn_cli.evaluation.figures import Figure
from uniattn_cli.evaluation.verdict import AS_GOOD, BETTER, MIXED, SAME, UNTOLD, WORSE
from uniattn_cli.evaluation.wording import as_difference, as_interval, as_range, as_ratio, as_setting, as_value, number
from uniattn_cli.models.of_run import BASE
from uniattn_cli.tables import Table

# Models beside the base in one table; more make further tables, each with the base again.
BESIDE = 3
QUALITY = {
    "perplexity": "perplexity of text",
    "response_loss": "loss on responses",
    "accuracy": "mean accuracy of the tasks",
    "generated": "right answers generated",
}
COSTS = {
    "parameters": "parameters",
    "checkpoint_bytes": "weights on disk",
    "kv_bytes_per_token": "KV cache per token, measured",
    "peak_bytes": "peak memory",
    "time_to_first_token": "time to first token",
    "time_per_output_token": "time per output token",
    "tokens_per_second": "tokens per second",
}
DIFFERENCE = "  − base, paired"
AGAINST_CONTROL = "  − control, paired"
INTERVAL = "  95 % interval"
SYMBOLS = {BETTER: "▲", WORSE: "▼", AS_GOOD: "≈", SAME: "=", MIXED: "◆", UNTOLD: "?"}
RATIO = "  ÷ base"
RANGE = "  smallest–largest"
EXPLANATION = (
    "± is one standard error. The lines “− base, paired” give the difference from the base on the same rows or items "
    "and its 95 % interval. ≈ (as good) means that all of it lies within the margin, ▼ (worse) and ▲ (better) that "
    "zero is outside after a correction for the number of scores, ? that the two are not told apart, = that nothing "
    "differs. The control is the base after the same training; “− control, paired” is the cost of sharing. Times are "
    "medians over rounds, and ratios to the base compare adjacent rounds. Tokens per second are counted after the "
    "first token."
)


def tables(results: dict[str, Any]) -> list[Table]:
    """Quality and cost, one column per model."""
    others = [name for name in results["models"] if name != BASE]
    found = []
    for start in range(0, max(len(others), 1), BESIDE):
        names = [BASE, *others[start : start + BESIDE]]
        columns = ["", *map(short, names)]
        found.append(Table("Quality (± standard error)", columns, _quality_rows(results, names)))
        found.append(Table("Cost", columns, _cost_rows(results, names)))
    return found


def length_tables(results: dict[str, Any]) -> list[Table]:
    """Perplexity, retrieval and agreement with the base by length, one column per model; none where not measured."""
    others = [name for name in results["models"] if name != BASE]
    found = []
    for start in range(0, max(len(others), 1), BESIDE):
        names = [BASE, *others[start : start + BESIDE]]
        rows = _length_rows(results, names)
        if rows:
            found.append(Table("By length, and agreement with the base", ["", *map(short, names)], rows))
    return found


def short(name: str, width: int = 24) -> str:
    """The end of a long path, which tells more than its beginning."""
    return name if len(name) <= width else "…" + name[1 - width :]


def _quality_rows(results: dict[str, Any], names: Sequence[str]) -> list[list[str]]:
    rows = []
    for key, label in QUALITY.items():
        if key in results["models"][BASE]["quality"]:
            rows += _rows(results, names, label, ("quality", key), _difference)
    for task in results["tasks"]:
        for metric in results["models"][BASE]["tasks"][task]:
            rows += _rows(
                results,
                names,
                f"{task}, {metric}",
                ("tasks", task, metric),
                _difference,
            )
    return rows


def _cost_rows(results: dict[str, Any], names: Sequence[str]) -> list[list[str]]:
    rows = []
    for key, label in COSTS.items():
        if key in results["models"][BASE]["cost"]:
            rows += _rows(results, names, label, ("cost", key), as_ratio)
    return rows


def _length_rows(results: dict[str, Any], names: Sequence[str]) -> list[list[str]]:
    """Perplexity and retrieval at each length, and how often and how far models differ from the base."""
    models = [results["models"][name] for name in names]
    rows = []
    for entries in zip(*(model["lengths"] for model in models), strict=True):
        cells = [f"{number(entry['perplexity'], 2)}" for entry in entries]
        rows.append([f"perplexity at {entries[0]['length']:,} tokens", *cells])
    for entries in zip(*(model["retrieval"] for model in models), strict=True):
        cells = [f"{entry['correct']} of {entry['items']}" for entry in entries]
        rows.append([f"codes retrieved from {entries[0]['length']:,} tokens", *cells])
    agreements = [model.get("agreement") for model in models]
    if not any(agreements):
        return rows
    for key, label in (("kl", "KL from the base, nats"), ("top1", "same greedy token")):
        rows.append([label, *("" if one is None else as_value(one[key], error=True) for one in agreements)])
    edges = next(one for one in agreements if one is not None)["by_position"]["edges"]
    for bucket, (start, end) in enumerate(itertools.pairwise(edges)):
        cells = ["" if one is None else number(one["by_position"]["kl"][bucket], 3) for one in agreements]
        rows.append([f"  KL at positions {start:,}–{end - 1:,}", *cells])
    return rows


def grid_table(results: dict[str, Any]) -> Table | None:
    """Times over batch and context; None where only the point of the cost table was measured."""
    grid = results["speed_grid"]
    if len(grid) < 2:
        return None
    rows = []
    for point in grid:
        for key, label in (("ttft", "time to first token"), ("tpot", "time per output token")):
            cells = []
            for model in point["models"].values():
                time = model[key]
                ratio = "" if time["ratio_to_base"] is None else f", {time['ratio_to_base']:.2f}×"
                low, high = (number(1e3 * time[end], 1) for end in ("low", "high"))
                cells.append(f"{number(1e3 * time['median'], 1)} ms ({low}–{high}{ratio})")
            rows.append([f"{point['batch']} × {point['context']:,}: {label}", *cells])
        peaks = [model["peak_bytes"] for model in point["models"].values()]
        if None not in peaks:
            rows.append(
                [f"{point['batch']} × {point['context']:,}: peak memory", *(f"{peak / 1e9:.2f} GB" for peak in peaks)]
            )
    title = "Speed by batch × context: median (smallest–largest, divided by the base's)"
    return Table(title, ["", *map(short, grid[0]["models"])], rows)


def capacity_table(results: dict[str, Any]) -> Table | None:
    """What fits into memory, by formula; None where it was not computed."""
    if not results["capacity"]:
        return None
    rows = []
    for entry in results["capacity"]:
        models = list(entry["models"].values())
        context = models[0]["at_context"]
        size = f"{entry['memory_gb']:g} GB"
        rows.append([f"{size}: longest context", *(_fits(model["context"], model["window"]) for model in models)])
        rows.append(
            [f"{size}: largest batch at {context:,} tokens", *(_fits(model["batch"], None) for model in models)]
        )
    names = list(results["capacity"][0]["models"])
    return Table("What fits into memory, by formula", ["", *map(short, names)], rows)


def _fits(value: int | None, window: int | None) -> str:
    if value is None:
        return "any"
    beyond = " (beyond its context window)" if window and value > window else ""
    return f"{value:,}{beyond}"


def _rows(
    results: dict[str, Any],
    names: Sequence[str],
    label: str,
    place: Sequence[str],
    compare: Callable[[Figure], str],
) -> list[list[str]]:
    """A row of the values at a place in a model's results, and rows of its range and of what compares it."""
    figures = [functools.reduce(operator.getitem, place, results["models"][name]) for name in names]
    rows = [[label, *(as_value(entry, error=True) for entry in figures)]]
    if figures[0].range is not None:
        rows.append([RANGE, *map(as_range, figures)])
    if len(names) > 1:
        words = DIFFERENCE if compare is _difference else RATIO
        rows.append([words, "", *map(compare, figures[1:])])
        if compare is _difference and any(map(as_interval, figures[1:])):
            rows.append([INTERVAL, "", *map(as_interval, figures[1:])])
    against = [entry.difference_to_control and _difference(entry, "control") for entry in figures]
    if any(against):
        rows.append([AGAINST_CONTROL, *(cell or "" for cell in against)])
    return rows


def _difference(entry: Figure, other: str = "base") -> str:
    """The difference to the base, or the control, and what it means."""
    difference = entry.difference_to(other)
    verdict = difference and difference.verdict
    return as_difference(entry, other) + (f" {SYMBOLS[verdict]}" if verdict else "")


def models_table(results: dict[str, Any]) -> Table:
    """What the models are and where they came from."""
    rows = []
    for name, model in results["models"].items():
        layers = ", ".join(f"{count} {kind}" for kind, count in model["layers"].items())
        dtype = (
            model["dtype"]
            if model["dtype"] == model["dtype_on_disk"]
            else f"{model['dtype']} ({model['dtype_on_disk']} on disk)"
        )
        rows.append([name, layers, dtype, model["attention"], model["path"], model["fingerprint"]])
    return Table("Models", ["model", "layers", "dtype", "attention", "from", "fingerprint"], rows)


def settings_table(results: dict[str, Any]) -> Table:
    """What was tested, and how; the formula of the capacity stands with its table."""
    settings = {part: value for part, value in results["settings"].items() if part != "capacity"}
    rows = [[part.replace("_", " "), as_setting(value)] for part, value in settings.items()]
    return Table("Settings", ["part", "settings"], rows)
