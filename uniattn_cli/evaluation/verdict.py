"""What the figures mean, in plain words that have to be earned.

A score of a model is

    as good as the base   where the whole 95 % interval of its difference lies within a margin (`evaluation.margins`),
    worse, or better      where zero is outside, after a correction for the number of scores (Holm): the more are
                          measured, the likelier one of them is far off by chance,
    not told apart        else, with the number of items that would probably tell.

A model is worse or better by any score that was measured. It is as good where all of `SUMMARIES` are: single tasks,
text lengths and retrieval are too small to show that much, so tasks count there by their means. No correction is needed
for that, because all of these have to lie within their margins.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from uniattn_cli.evaluation.figures import Figure
from uniattn_cli.evaluation.intervals import LEVEL, Difference
from uniattn_cli.evaluation.wording import as_difference, as_value
from uniattn_cli.recipe.schema import MarginSpec

SUMMARIES = {
    "perplexity": "perplexity",
    "response_loss": "loss on responses",
    "accuracy": "accuracy",
    "generated": "generated answers",
}
SAME, AS_GOOD, BETTER, WORSE, MIXED, UNTOLD = "same", "as good", "better", "worse", "mixed", "not told apart"
SENTENCES = {
    SAME: "equal to the base in every score",
    AS_GOOD: "as good as the base",
    WORSE: "worse than the base",
    BETTER: "better than the base",
    MIXED: "better than the base in some scores, worse in others",
    UNTOLD: "not told apart from the base",
}


@dataclass(frozen=True)
class Score:
    """A difference that is judged.

    Attributes:
        name: in words.
        value: of the model.
        unit: of the value and of the difference.
        better: `higher` or `lower`.
        difference: from the base or the control.
        keep: writes the judged difference to where it came from.
    """

    name: str
    value: float
    unit: str
    better: str | None
    difference: Difference
    keep: Callable[[Difference], None]

    def in_margins(self, margins: MarginSpec) -> tuple[float, float, float] | None:
        """The difference and the ends of its interval, in units of the margin; None where there are none."""
        if self.difference.interval is None:
            return None
        parts = (self.difference.value, *self.difference.interval)
        if self.unit == "share":
            return _scaled(parts, margins.points / 100)
        if self.unit == "nats per token":
            return _scaled(parts, margins.nats)
        if self.unit.endswith("perplexity"):
            base = self.value - self.difference.value
            return _scaled([math.log(max(1 + part / base, 1e-9)) for part in parts], margins.nats)
        return None


def _scaled(parts: Sequence[float], margin: float) -> tuple[float, float, float]:
    value, low, high = (part / margin for part in parts)
    return value, low, high


def judge(score: Score, margins: MarginSpec, p: float | None) -> str:
    """The word for one score; see the head of this file.

    Args:
        p: of its difference, corrected for the number of scores; None where nothing is known about it.
    """
    difference = score.difference
    if difference.value == 0 and not difference.stderr:
        return SAME
    relative = score.in_margins(margins)
    if relative is not None and max(map(abs, relative[1:])) <= 1:
        return AS_GOOD
    if p is None or p >= 1 - LEVEL:
        return UNTOLD
    return BETTER if (difference.value > 0) == (score.better == "higher") else WORSE


def corrected(values: Sequence[float | None]) -> list[float | None]:
    """Probabilities after Holm's correction for their number; None stays None and does not count."""
    known = sorted((p, place) for place, p in enumerate(values) if p is not None)
    found: list[float | None] = [None] * len(values)
    largest = 0.0
    for index, (p, place) in enumerate(known):
        largest = max(largest, min(1.0, p * (len(known) - index)))
        found[place] = largest
    return found


def more_needed(score: Score, margins: MarginSpec, n: int) -> int | None:
    """About how many more rows or items would tell, if the difference stays what it is; None where it is not known.

    They would if the interval left out zero, or fitted into the margin, whichever needs fewer.
    """
    relative = score.in_margins(margins)
    if relative is None:
        return None
    value, low, high = relative
    half = (high - low) / 2
    wanted = max(abs(value), 1 - abs(value))
    return max(1, math.ceil(n * ((half / wanted) ** 2 - 1)))


def add_verdicts(model: dict[str, Any], margins: MarginSpec) -> None:
    """Writes a word into each difference of a model's scores, from the base and from the control."""
    for other in ("base", "control"):
        scores = _scores(model, other)
        for score, p in zip(scores, corrected([score.difference.p for score in scores]), strict=True):
            score.keep(replace(score.difference, verdict=judge(score, margins, p)))


def _scores(model: dict[str, Any], other: str) -> list[Score]:
    """All that was measured; a loss on text is the logarithm of a perplexity, not another score."""
    places = [(words, model["quality"], key) for key, words in SUMMARIES.items() if key in model["quality"]]
    places += [(f"{task}, {metric}", metrics, metric) for task, metrics in model["tasks"].items() for metric in metrics]
    found = []
    for name, holder, key in places:
        entry = holder[key]
        difference = entry.difference_to(other)
        if difference is not None:

            def keep(judged: Difference, holder: dict = holder, key: str = key) -> None:
                holder[key] = replace(holder[key], **{f"difference_to_{other}": judged})

            found.append(Score(name, entry.value, entry.unit, entry.better, difference, keep))
    return found + (_scores_by_length(model) if other == "base" else [])


def _scores_by_length(model: dict[str, Any]) -> list[Score]:
    found = []
    for part, unit, better in (("lengths", "perplexity", "lower"), ("retrieval", "share", "higher")):
        for entry in model[part]:
            if entry["difference"] is not None:
                value = entry["perplexity"] if part == "lengths" else entry["correct"] / entry["items"]
                name = f"{'perplexity' if part == 'lengths' else part} at {entry['length']:,} tokens"

                def keep(judged: Difference, entry: dict = entry) -> None:
                    entry["difference"] = judged

                found.append(Score(name, value, unit, better, entry["difference"], keep))
    return found


def overall(model: dict[str, Any]) -> str:
    """One word for a model whose differences have been judged."""
    found = set()
    for score in _scores(model, "base"):
        word = score.difference.verdict or UNTOLD
        if score.name in SUMMARIES.values() or word in (WORSE, BETTER):
            found.add(word)
    if {BETTER, WORSE} <= found:
        return MIXED
    return next(word for word in (WORSE, UNTOLD, BETTER, AS_GOOD, SAME) if word in found)


def verdict(name: str, base: dict[str, Any], model: dict[str, Any], margins: MarginSpec) -> dict[str, str]:
    """The verdict on a model, whose differences have been judged.

    Args:
        name: of the model.
        base: the base's entry of `results.json`.
        model: the model's entry.

    Returns:
        `quality` (one word) and `sentence`.
    """
    quality = overall(model)
    parts = [
        _told(label, base["quality"][key], model["quality"][key], margins)
        for key, label in SUMMARIES.items()
        if key in model["quality"]
    ]
    others = [score for score in _scores(model, "base") if score.name not in SUMMARIES.values()]
    parts += [f"{each.name} {word}" for each in others if (word := each.difference.verdict) in (WORSE, BETTER)]
    points = f"{margins.points:g} point{'' if margins.points == 1 else 's'}"
    within = f" within {margins.nats:g} nats and {points}" if quality == AS_GOOD else ""
    cost = model["cost"]
    saved = [
        _change(cost["kv_bytes_per_token"], "less", "KV cache per token"),
        _change(cost["parameters"], "fewer", "parameters"),
    ]
    speed = cost.get("tokens_per_second")
    if speed is not None and speed.ratio_to_base is not None:
        saved.append(f"{speed.ratio_to_base:.2f} times the tokens per second")
    sentence = (
        f"{name} is {SENTENCES[quality]}{within}: {'; '.join(parts)}. It has {', '.join(saved)}."
        f"{_against_control(model, margins)}"
    )
    return {"quality": quality, "sentence": sentence}


def _told(label: str, base: Figure, entry: Figure, margins: MarginSpec) -> str:
    judged = _judged(label, entry, "base", margins)
    return f"{label} {as_value(base)} to {as_value(entry)} ({as_difference(entry)}, {judged})"


def _judged(label: str, entry: Figure, other: str, margins: MarginSpec) -> str:
    """The word for a difference, and what would tell where it is not told."""
    difference = entry.difference_to(other)
    assert difference is not None, "only what has a difference is judged"
    word = difference.verdict or UNTOLD
    if word != UNTOLD:
        return word
    score = Score(label, entry.value, entry.unit, entry.better, difference, lambda judged: None)
    more = more_needed(score, margins, entry.n or 0)
    if more is None:
        return f"{word}: needs more {entry.of}"
    return f"{word}: about {_rounded(more)} more {entry.of} would tell"


def _rounded(number: int) -> str:
    """To two digits: it is an estimate."""
    return f"{float(f'{number:.2g}'):,.0f}"


def _against_control(model: dict[str, Any], margins: MarginSpec) -> str:
    """What the model loses to the base after the same training; empty without a control, or without training."""
    if model["role"] == "converted":
        return ""
    entries = {label: model["quality"].get(key) for key, label in SUMMARIES.items()}
    parts = [
        f"{label} {as_difference(entry, 'control')} ({_judged(label, entry, 'control', margins)})"
        for label, entry in entries.items()
        if entry and entry.difference_to_control
    ]
    return f" Compared with the control (the base after the same training): {'; '.join(parts)}." if parts else ""


def _change(entry: Figure, less: str, what: str) -> str:
    if entry.ratio_to_base is None:
        return f"a different dtype of the {what}"
    percent = 100 * (entry.ratio_to_base - 1)
    if percent == 0:
        return f"the same {what}"
    return f"{abs(percent):.1f} % {'more' if percent > 0 else less} {what}"
