"""Local items as inline tasks of lm-evaluation-harness, one function per shape."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

from uniattn_cli.recipe.schema import TaskSpec

NUMBER = r"-?\d[\d,]*(?:\.\d+)?"


def local_task(name: str, shape: str, items: list[dict[str, Any]], task: TaskSpec) -> dict[str, Any]:
    """The harness's configuration of a local task.

    Args:
        name: under which the harness knows it.
        shape: a key of `items.SHAPES`.
        items: as `items.load_items` gives them.
        task: settings of the shape.
    """
    import datasets

    common = {
        "task": name,
        "custom_dataset": lambda **_: {"test": datasets.Dataset.from_list(items)},
        "test_split": "test",
    }
    return common | SHAPES[shape](task)


def _choices(task: TaskSpec) -> dict[str, Any]:
    """The choice whose likelihood after the query is largest, as it is or per character."""
    return {
        "output_type": "multiple_choice",
        "doc_to_text": "query",
        "doc_to_choice": "choices",
        "doc_to_target": "gold",
        "metric_list": [_metric("acc"), _metric("acc_norm")],
    }


def _generate(task: TaskSpec) -> dict[str, Any]:
    """Greedy generation; what is extracted from it must be the target."""
    return {
        "output_type": "generate_until",
        "doc_to_text": "Question: {{question}}\nAnswer:",
        "doc_to_target": "{{answer}}",
        "generation_kwargs": {"until": ["\n\n", "Question:"], "max_gen_toks": task.new, "do_sample": False},
        "process_results": matcher(task.extract),
        "metric_list": [_metric("exact_match")],
    }


def _last_word(task: TaskSpec) -> dict[str, Any]:
    """Likelihood of the last word, and whether greedy decoding gives it, as in LAMBADA."""
    return {
        "output_type": "loglikelihood",
        "doc_to_text": "{{query}}",
        # The harness puts no delimiter between the two for this output type.
        "doc_to_target": " {{target}}",
        "metric_list": [
            _metric("acc"),
            {"metric": "perplexity", "aggregation": "perplexity", "higher_is_better": False},
        ],
    }


def _perplexity(task: TaskSpec) -> dict[str, Any]:
    """Perplexity of whole texts, per word and per byte, so that other tokenizers can be compared."""
    return {
        "output_type": "loglikelihood_rolling",
        "doc_to_text": "",
        "doc_to_target": "text",
        "metric_list": [
            {"metric": metric, "aggregation": aggregation, "higher_is_better": False}
            for metric, aggregation in (
                ("word_perplexity", "weighted_perplexity"),
                ("bits_per_byte", "bits_per_byte"),
            )
        ],
    }


SHAPES: dict[str, Callable[[TaskSpec], dict[str, Any]]] = {
    "choices": _choices,
    "generate": _generate,
    "last_word": _last_word,
    "perplexity": _perplexity,
}


def _metric(name: str) -> dict[str, Any]:
    return {"metric": name, "aggregation": "mean", "higher_is_better": True}


def matcher(extract: str) -> Callable[[dict[str, Any], list[str]], dict[str, float]]:
    """A function of the harness that scores a generated text: 1 if what counts of it is the target, else 0.

    Args:
        extract: `number`, `line`, or a regular expression whose last match counts (its first group, if it has one).
    """

    def score(item: dict[str, Any], texts: list[str]) -> dict[str, float]:
        found, target = extracted(texts[0], extract), item["target"].strip()
        if extract == "number":
            return {"exact_match": float(found is not None and _as_number(found) == _as_number(target))}
        return {"exact_match": float(found is not None and found.strip().lower() == target.lower())}

    return score


def extracted(text: str, extract: str) -> str | None:
    """What counts of a generated text; None where nothing of the sort is in it.

    >>> extracted("It is 3 + 4 = 1,007.", "number"), extracted("yes\\nno", "line"), extracted("(B)", r"\\((.)\\)")
    ('1,007', 'yes', 'B')
    """
    if extract == "line":
        return text.strip().partition("\n")[0]
    matches = list(re.finditer(NUMBER if extract == "number" else extract, text))
    if not matches:
        return None
    last = matches[-1]
    return last.group(1) if last.re.groups else last.group()


def _as_number(text: str) -> float | str:
    """Numbers are equal however they are written: 7, 7.0, 1,007."""
    try:
        return float(text.replace(",", "").lstrip("$"))
    except ValueError:
        return text
