"""What the figures mean, in plain words."""

from __future__ import annotations

from typing import Any

from uniattn_cli.evaluation.figures import Figure
from uniattn_cli.evaluation.wording import as_difference, as_value

JUDGED = {"perplexity": "perplexity", "response_loss": "loss on responses", "accuracy": "accuracy"}
SUMMARIES = {
    "same": "equal to the base in every score",
    "within noise": "as good as the base, within noise",
    "worse": "worse than the base",
    "better": "better than the base",
    "mixed": "better than the base in some scores, worse in others",
    "uncertain": "not distinguishable from the base with so few rows",
}


def judge(entry: Figure, other: str = "base") -> str:
    """`same`, `within noise`, `better`, `worse`, or `uncertain` where there is no interval.

    A difference is noise if its 95 % interval holds zero.

    Args:
        other: what it is compared with, the base or the control.
    """
    difference = entry.difference_to(other)
    assert difference is not None, "there is a verdict only where there is a difference"
    if difference.value == 0 and not difference.stderr:
        return "same"
    if difference.interval is None:
        return "uncertain"
    low, high = difference.interval
    if low <= 0 <= high:
        return "within noise"
    return "better" if (difference.value > 0) == (entry.better == "higher") else "worse"


def overall(judgements: list[str]) -> str:
    """One word for several judgements."""
    found = set(judgements)
    if {"better", "worse"} <= found:
        return "mixed"
    for word in ("worse", "better", "within noise", "uncertain"):
        if word in found:
            return word
    return "same"


def verdict(name: str, base: dict[str, Any], model: dict[str, Any]) -> dict[str, str]:
    """The verdict on a model.

    Args:
        name: of the model.
        base: the base's entry of `results.json`.
        model: the model's entry.

    Returns:
        `quality` (one word) and `sentence`.
    """
    judgements, scores = [], []
    for key, words in JUDGED.items():
        entry = model["quality"].get(key)
        if entry is None:
            continue
        judgement = judge(entry)
        judgements.append(judgement)
        before, after = as_value(base["quality"][key]), as_value(entry)
        scores.append(f"{words} {before} to {after} ({as_difference(entry)}, {judgement})")
    quality = overall(judgements)
    cost = model["cost"]
    saved = [
        _change(cost["kv_bytes_per_token"], "less", "KV cache per token"),
        _change(cost["parameters"], "fewer", "parameters"),
    ]
    speed = cost.get("tokens_per_second")
    if speed is not None and speed.ratio_to_base is not None:
        saved.append(f"{speed.ratio_to_base:.2f} times the tokens per second")
    sentence = (
        f"{name} is {SUMMARIES[quality]}: {'; '.join(scores)}. It has {', '.join(saved)}.{_against_control(model)}"
    )
    return {"quality": quality, "sentence": sentence}


def _against_control(model: dict[str, Any]) -> str:
    """What the model loses to the base after the same training; empty without a control, or without training."""
    if model["role"] == "converted":
        return ""
    entries = {words: model["quality"].get(key) for key, words in JUDGED.items()}
    parts = [
        f"{words} {as_difference(entry, 'control')} ({judge(entry, 'control')})"
        for words, entry in entries.items()
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
