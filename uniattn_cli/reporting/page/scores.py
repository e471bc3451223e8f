"""The parts of the page that come from figures: verdicts, and the tables of quality and cost."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from uniattn_cli.evaluation.figures import Figure
from uniattn_cli.evaluation.intervals import Difference
from uniattn_cli.evaluation.verdict import SENTENCES, SUMMARIES
from uniattn_cli.evaluation.wording import as_difference, as_interval, as_range, as_ratio, as_value
from uniattn_cli.models.of_run import BASE
from uniattn_cli.reporting.page.markup import Html, join, table, tag
from uniattn_cli.tables import NOTHING

SYMBOLS = {"better": "▲", "worse": "▼", "as good": "≈", "same": "=", "mixed": "◆", "not told apart": "?"}
EXPLANATION = (
    "± is one standard error. Below each score is its paired difference from the base, on the same rows or items: what "
    "is hard for all models cancels out, so its error is smaller than that of either score. ≈ means that its whole "
    "95 % interval lies within the margin, ▲ and ▼ that zero is outside after a correction for the number of scores. "
    "Times are medians over rounds, with their range in brackets; ratios to the base compare adjacent rounds."
)
QUALITY = {
    "perplexity": "perplexity of held-out text",
    "response_loss": "loss on held-out responses",
    "accuracy": "mean accuracy of the tasks",
    "generated": "right answers generated, mean of the tasks",
}
AGREEMENT = {"kl": "divergence from the base (KL)", "top1": "same next token as the base"}
COST = {
    "parameters": "parameters",
    "checkpoint_bytes": "weights on disk",
    "kv_bytes_per_token": "KV cache per token, measured",
    "kv_bytes_per_token_predicted": "KV cache per token, by formula",
    "peak_bytes": "peak memory",
    "time_to_first_token": "time to first token",
    "time_per_output_token": "time per output token",
    "tokens_per_second": "tokens per second",
}


def styles(results: dict[str, Any]) -> dict[str, int]:
    """The number of each model's colour and shape, the base first."""
    return {name: index for index, name in enumerate(results["models"])}


def mark(word: str) -> Html:
    """A judgement as symbol and word; its colour says no more than they do."""
    return tag("span", f"{SYMBOLS[word]} {word}", class_=f"mark {word.replace(' ', '-')}")


def verdicts(results: dict[str, Any]) -> Html:
    """One card for each model but the base."""
    cards = [_card(name, model) for name, model in results["models"].items() if model["verdict"]]
    if not cards:
        return tag("p", "Only the base was measured, so there is nothing to compare.")
    return tag("div", cards, class_="cards")


def _card(name: str, model: dict[str, Any]) -> Html:
    word = model["verdict"]["quality"]
    pairs = []
    for key, label in SUMMARIES.items():
        entry = model["quality"].get(key)
        if entry is not None:
            pairs.append((label, as_difference(entry)))
    for key, label in (
        ("kv_bytes_per_token", "KV cache ÷ base"),
        ("parameters", "parameters ÷ base"),
        ("tokens_per_second", "tokens per second ÷ base"),
    ):
        if key in model["cost"]:
            pairs.append((label, as_ratio(model["cost"][key])))
    listed = [join((tag("dt", label), tag("dd", text))) for label, text in pairs]
    return tag(
        "article",
        tag("h3", name),
        tag("p", f"{SYMBOLS[word]} {SENTENCES[word]}", class_="word"),
        tag("dl", listed),
        tag("p", model["verdict"]["sentence"]),
        class_=f"card {word.replace(' ', '-')}",
    )


def quality_table(results: dict[str, Any]) -> Html:
    """Every score of every model, the base first, with the paired difference to the base below."""
    rows = [_row(results, label, ("quality", key), _difference) for key, label in QUALITY.items()]
    for task in results["tasks"]:
        for metric in results["models"][BASE]["tasks"][task]:
            rows.append(_row(results, f"{task}, {metric}", ("tasks", task, metric), _difference))
    rows += [_row(results, label, ("agreement", key), lambda entry: None) for key, label in AGREEMENT.items()]
    return _table(results, "Quality: value ± standard error, and the paired difference from the base", rows)


def cost_table(results: dict[str, Any]) -> Html:
    """Sizes and times, with what they are of the base's."""
    rows = [_row(results, label, ("cost", key), _ratio) for key, label in COST.items()]
    return _table(results, "Cost, and its ratio to the base's", rows)


def _table(results: dict[str, Any], caption: str, rows: list[list[Any] | None]) -> Html:
    return table(caption, ["", *results["models"]], [row for row in rows if row is not None])


def _row(
    results: dict[str, Any], label: str, keys: tuple[str, ...], compare: Callable[[Figure], Any]
) -> list[Any] | None:
    """A row of figures; None if no model has the figure."""
    cells = []
    for name, model in results["models"].items():
        entry: Any = model
        for key in keys:
            entry = (entry or {}).get(key)
        cells.append(NOTHING if entry is None else _cell("/".join(("models", name, *keys)), entry, compare))
    return None if set(cells) == {NOTHING} else [label, *cells]


def _cell(place: str, entry: Figure, compare: Callable[[Figure], Any]) -> Html:
    value = tag("data", as_value(entry, error=True), value=repr(entry.value), data_figure=place)
    spread = tag("span", f"({as_range(entry)})", class_="sub") if entry.range else None
    beside = compare(entry) if entry.difference_to_base else None
    return join((value, spread, beside))


def _difference(entry: Figure) -> Html:
    parts = [tag("span", as_difference(entry), class_="sub")]
    if interval := as_interval(entry):
        parts.append(tag("span", f"95 %: {interval}", class_="sub"))
    return join((parts, _mark_of(entry.difference_to_base), _to_control(entry)))


def _mark_of(difference: Difference | None) -> Html | None:
    return mark(difference.verdict) if difference and difference.verdict else None


def _to_control(entry: Figure) -> Html | None:
    """The difference to the base after the same training, where there is such a control."""
    if entry.difference_to_control is None:
        return None
    words = f"from control: {as_difference(entry, 'control')}"
    return tag("span", words, tag("br"), _mark_of(entry.difference_to_control), class_="sub")


def _ratio(entry: Figure) -> Html | None:
    text = as_ratio(entry)
    return tag("span", text if text == "other dtype" else f"{text} of base", class_="sub")


def speed_grid(results: dict[str, Any]) -> Html | None:
    """Times over batch and context, one row for each combination and model."""
    rows = []
    for entry in results.get("speed_grid") or ():
        for name, times in entry["models"].items():
            peak = times.get("peak_bytes")
            rows.append(
                [
                    f"{entry['batch']} × {entry['context']:,}",
                    name,
                    _times(times.get("ttft")),
                    _times(times.get("tpot")),
                    NOTHING if peak is None else f"{peak / 1e6:,.0f} MB",
                ]
            )
    if not rows:
        return None
    columns = ["batch × context", "model", "time to first token", "time per output token", "peak memory"]
    return table("Speed over batch and context: median and range of rounds", columns, rows)


def _times(entry: dict[str, float] | None) -> Any:
    if not entry:
        return NOTHING
    digits = 0 if entry["median"] >= 0.1 else 1
    low, median, high = (f"{entry[key] * 1e3:,.{digits}f}" for key in ("low", "median", "high"))
    shown = tag("data", f"{median} ms", value=repr(entry["median"]))
    return join((shown, tag("span", f"({low}–{high} ms)", class_="sub")))
