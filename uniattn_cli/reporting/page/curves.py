"""The charts of the page: quality against KV bytes, agreement, length, training."""

from __future__ import annotations

from typing import Any

from uniattn_cli.evaluation.wording import as_value
from uniattn_cli.models.of_run import BASE
from uniattn_cli.reporting.markdown import short
from uniattn_cli.reporting.page.evidence import Evidence
from uniattn_cli.reporting.page.markup import Html, figure, join, tag
from uniattn_cli.reporting.page.plot import LEFT, RIGHT, WIDTH, Axis, DataSeries, chart, legend
from uniattn_cli.reporting.page.scores import styles

BARS = "Bars: one standard error of the paired difference from the base."


def pareto(results: dict[str, Any]) -> list[Html]:
    """Perplexity, and accuracy where tasks were run, each against KV bytes per token."""
    found = []
    for key, title, factor, unit in (
        ("perplexity", "Perplexity against KV cache (down and left is better)", 1, "perplexity of held-out text"),
        ("accuracy", "Accuracy against KV cache (up and left is better)", 100, "mean accuracy of the tasks, %"),
        ("generated", "Generated answers against KV cache (up and left is better)", 100, "right answers, %"),
    ):
        models = {name: model for name, model in results["models"].items() if key in model["quality"]}
        if not models:
            continue
        series = [_dot(name, model, key, factor, style) for (name, style), model in _styled(results, models)]
        words = "; ".join(
            f"{name}: {as_value(model['quality'][key])} at {as_value(model['cost']['kv_bytes_per_token'])} per token"
            for name, model in models.items()
        )
        values = [entry.points[0][1] for entry in series]
        y = Axis(unit, log=min(values) > 0 and max(values) > 4 * min(values))
        base = results["models"][BASE]["quality"][key].value * factor
        longest = 7.2 * max(len(entry.name) for entry in series) + 14
        room = longest / (WIDTH - LEFT - RIGHT - longest)
        drawn = chart(
            title, words, series, Axis("KV cache, kB per token", zero=True), y, limits=[("", base)], room=room
        )  # fmt: skip
        names = legend([(short(entry.name), entry.style, False) for entry in series])
        found.append(figure(join((drawn, names)), f"{BARS} The dashed line is the base's. {words}."))
    return found


def _styled(results: dict[str, Any], models: dict[str, Any]) -> list[tuple[tuple[str, int], Any]]:
    numbers = styles(results)
    return [((name, numbers[name]), model) for name, model in models.items()]


def _dot(name: str, model: dict[str, Any], key: str, factor: float, style: int) -> DataSeries:
    entry = model["quality"][key]
    error = entry.difference_to_base and entry.difference_to_base.stderr
    point = (model["cost"]["kv_bytes_per_token"].value / 1000, entry.value * factor)
    return DataSeries(
        short(name, 15), [point], [None if error is None else error * factor], style, line=False, label=True
    )  # fmt: skip


def agreement(results: dict[str, Any]) -> list[Html]:
    """KL and share of equal greedy tokens by position."""
    models = {
        name: model["agreement"]["by_position"]
        for name, model in results["models"].items()
        if (model.get("agreement") or {}).get("by_position")
    }
    found = []
    for key, title, factor, unit in (
        ("kl", "Divergence from the base by position (lower is better)", 1, "KL, nats per token"),
        ("top1", "Same next token as the base by position (higher is better)", 100, "share of positions, %"),
    ):
        series = []
        for (name, style), buckets in _styled(results, models):
            edges, values = buckets["edges"], buckets[key]
            ends = list(edges[1 : len(values) + 1])
            ends += [edges[-1] * 2] * (len(values) - len(ends))
            # A bucket stands at its geometric middle, because the axis is logarithmic.
            middles = [((start + 1) * max(end, start + 1)) ** 0.5 for start, end in zip(edges, ends, strict=False)]
            series.append(
                DataSeries(name, [(x, y * factor) for x, y in zip(middles, values, strict=True)], style=style)
            )  # fmt: skip
        if series:
            words = "; ".join(f"{entry.name}: " + _ends(entry, "position") for entry in series)
            drawn = chart(title, words, series, Axis("position in the text, tokens", log=True), Axis(unit, zero=True))
            found.append(figure(join((drawn, _legend(series))), f"By position in the text. {words}."))
    return found


def lengths(results: dict[str, Any]) -> list[Html]:
    """Perplexity by length of the text, and the retrieval probe by length."""
    found = []
    series = []
    for (name, style), entries in _styled(
        results, {name: model["lengths"] for name, model in results["models"].items() if model.get("lengths")}
    ):
        points = [(entry["length"], entry["perplexity"]) for entry in entries]
        series.append(DataSeries(name, points, [entry["stderr"] for entry in entries], style))
    if series:
        words = "; ".join(f"{entry.name}: " + _ends(entry, "length") for entry in series)
        drawn = chart(
            "Perplexity by length of the text (lower is better)",
            words,
            series,
            Axis("tokens of the text", log=True, ticks=_xs(series)),
            Axis("perplexity"),
        )
        found.append(figure(join((drawn, _legend(series))), f"Bars: one standard error of each value. {words}."))
    series = []
    for (name, style), entries in _styled(
        results, {name: model["retrieval"] for name, model in results["models"].items() if model.get("retrieval")}
    ):
        points = [(entry["length"], 100 * entry["correct"] / entry["items"]) for entry in entries if entry["items"]]
        series.append(DataSeries(name, points, style=style))
    if series:
        words = "; ".join(f"{entry.name}: " + _ends(entry, "length") for entry in series)
        drawn = chart(
            "Retrieval from a long text (higher is better)",
            words,
            series,
            Axis("tokens of the text", log=True, ticks=_xs(series)),
            Axis("correct answers, %", zero=True),
        )
        found.append(figure(join((drawn, _legend(series))), f"Share of correct answers by length. {words}."))
    return found


def _xs(series: list[DataSeries]) -> list[float]:
    return sorted({x for entry in series for x, _ in entry.points})


def _ends(entry: DataSeries, what: str) -> str:
    (first_x, first), (last_x, last) = entry.points[0], entry.points[-1]
    return f"{first:.4g} at {what} {first_x:,.0f}, {last:.4g} at {last_x:,.0f}"


def _legend(series: list[DataSeries]) -> Html:
    return legend([(entry.name, entry.style, entry.line) for entry in series])


def training(evidence: Evidence) -> list[Html]:
    """Loss over steps, one chart for each trained model, with the loss on held-out rows."""
    return [
        drawn
        for folder, content in evidence.training.items()
        if (drawn := _curve(folder, content["lines"], content["report"])) is not None
    ]


def _curve(folder: str, lines: list[dict[str, Any]], report: dict[str, Any]) -> Html | None:
    series, breaks, offset, validation = [], [], 0, []
    for style, stage in enumerate(dict.fromkeys(line["stage"] for line in lines), 1):
        own = [line for line in lines if line["stage"] == stage]
        points = [(offset + line["step"], line["loss"]) for line in own if line.get("loss") is not None]
        if points:
            series.append(DataSeries(f"training, {stage}", points, style=style))
        validation += [
            (offset + line["step"], line["validation_loss"])
            for line in own
            if line.get("validation_loss") is not None
        ]  # fmt: skip
        offset += max(line["step"] for line in own)
        breaks.append(offset)
    if not series:
        return None
    if validation:
        series.append(DataSeries("validation rows", validation, style=4))
    heldout = list((report.get("heldout_responses") or {}).items())
    if heldout:
        # Before the first step and after the last.
        places = [0, offset][: len(heldout)]
        points = [(x, entry["mean"]) for x, (_, entry) in zip(places, heldout, strict=False)]
        errors = [entry["stderr"] for _, entry in heldout[: len(points)]]
        series.append(DataSeries("held-out responses", points, errors, style=0, line=False))
    first, last = series[0].points[0][1], [entry for entry in series if entry.name.startswith("training")][-1]
    words = f"training loss {first:.3f} at the first logged step, {last.points[-1][1]:.3f} at the last"
    for name, entry in heldout:
        words += f"; held-out responses, {name}: {entry['mean']:.3f}"
    drawn = chart(
        f"Training of {folder}/ (lower is better)",
        words,
        series,
        Axis("optimiser step", whole=True),
        Axis("loss, nats per token"),
        breaks=breaks[:-1],
    )
    note = " Dashed lines separate stages." if len(breaks) > 1 else ""
    return figure(join((drawn, _legend(series))), f"{words.capitalize()}.{note}")


def section(drawn: list[Html]) -> Html | None:
    """Charts side by side where there is room."""
    return tag("div", drawn, class_="plots") if drawn else None
