"""Figures with their uncertainty, and `results.json`, which holds them.

Schema of `results.json` (`"schema": 3`):

    schema    3
    models    one entry per model, the base first, keyed by its name (`base`, `control`, `converted`, `trained`, or as
              given); the control is the base after the training that the trained model has had
      role, path, fingerprint    what it is, where it came from, which weights
      dtype, dtype_on_disk, attention    of the loaded weights and cache; of the files; the backend
      layers                     number of layers of each kind, such as {"own": 24, "softmax": 6}
      quality    perplexity, text_loss, response_loss, accuracy (mean of `acc` over the tasks that have it) and
                 generated (mean of `exact_match`): figures
      tasks      {task: {metric: figure}}; metrics as in lm-evaluation-harness
      cost       parameters, checkpoint_bytes, kv_bytes_per_token, kv_bytes_per_token_predicted and, where speed was
                 measured, time_to_first_token, time_per_output_token, tokens_per_second: figures
      agreement  with the base on the longest windows (not in the base's entry): kl and top1 (figures: KL(base || model)
                 of next-token distributions; share of equal greedy tokens), and by_position: edges, kl, top1, where
                 bucket i holds the positions from edges[i] to edges[i + 1]
      lengths    [{length, perplexity, stderr, tokens, difference}]: the same text in windows of several lengths;
                 difference as difference_to_base of a figure
      retrieval  [{length, correct, items, difference}]: questions answered from a text of that length
      verdict    null for the base; else `quality` (a word of `verdict`) and `sentence`
    tasks     entries of the recipe, in the order of the tables; other tasks are members of a group
    speed_grid    [{batch, context, new, models: {name: {ttft, tpot, peak_bytes}}}]: ttft and tpot (seconds to the first
              token, and for each further one) are {median, low, high, ratio_to_base}; the ratio is that of rounds
              side by side, null for the base and for another dtype or attention backend; peak_bytes is null without
              CUDA
    capacity  [{memory_gb, models: {name: {context, batch, at_context, window}}}]: what fits into a memory by the
              formula in settings: the longest context of one sequence, and the largest batch at a context; null where
              memory does not limit it
    identity  what has to be equal in two results before they may be compared: quality, speed
    settings  what was tested, how, and for speed: device, threads, run_by, cache, prompt, new,
              batch, repeats, warm_up, interleaved
    samples   [{prompt, reference, texts: {model: text}}]: greedy answers to held-out prompts, and what the row says;
              absent where none were asked for
    notes     what was left out, and what limits a comparison

`items/` beside it holds, for each model, the rows' and items' scores from which all of this follows.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from uniattn_cli.errors import StageError
from uniattn_cli.evaluation.intervals import Difference
from uniattn_cli.models.of_run import BASE
from uniattn_cli.run.files import read_json

SCHEMA = 3
RESULTS = "results.json"


@dataclass(frozen=True)
class Figure:
    """One number about one model and what is known about it; `results.json` has its attributes as keys, in this order.

    Attributes:
        value: a number.
        unit: of value, differences and range.
        better: `higher`, `lower`, or None.
        n: sample size; None where nothing was sampled.
        of: what was sampled: windows, rows, items, rounds.
        stderr: standard error of value over that sample; None where there is none.
        range: smallest and largest round, for times, whose value is the median; else None.
        difference_to_base: the model minus the base, *paired* on the same rows or items, so that its standard error is
            much smaller than that of either value; without an error for exact counts, times, and metrics that are no
            means over items; None for the base, and for bytes of another dtype than the base's.
        difference_to_control: the same against the control, for scores of all other models but the base where there is
            a control; else None.
        ratio_to_base: the model divided by the base (for times the median of the ratios of the interleaved rounds);
            None where the difference is, and for scores.
    """

    value: float
    unit: str
    better: str | None
    n: int | None = None
    of: str | None = None
    stderr: float | None = None
    range: tuple[float, float] | None = None
    difference_to_base: Difference | None = None
    difference_to_control: Difference | None = None
    ratio_to_base: float | None = None

    def difference_to(self, other: str) -> Difference | None:
        """The difference to `base` or `control`."""
        return {"base": self.difference_to_base, "control": self.difference_to_control}[other]

    @classmethod
    def from_dict(cls, entry: dict[str, Any]) -> Figure:
        """The figure that an entry of `results.json` states."""
        read = {
            name: entry[name] and Difference.from_dict(entry[name])
            for name in ("difference_to_base", "difference_to_control")
        }
        return cls(**{**entry, **read, "range": entry["range"] and tuple(entry["range"])})


def read_results(path: Path) -> dict[str, Any]:
    """The content of a `results.json`, with a `Figure` for each figure and a `Difference` for each difference.

    Raises:
        StageError: it is missing, damaged, or of another version of this tool.
    """
    results = read_json(path, "run `uniattn eval --force`")
    if "schema" not in results:
        raise StageError(f"{path} is not the result of an evaluation (it has no schema); run `uniattn eval --force`")
    if results["schema"] != SCHEMA:
        raise StageError(
            f"{path} has schema {results['schema']}, this version of uniattn reads {SCHEMA}; run `uniattn eval --force`"
        )
    if BASE not in (results.get("models") or ()):
        raise StageError(f"{path} is not the result of an evaluation (it has no base); run `uniattn eval --force`")
    try:
        return {**results, "models": {name: _read_model(model) for name, model in results["models"].items()}}
    except (KeyError, TypeError, AttributeError) as error:
        raise StageError(f"{path} is damaged ({error!r}); run `uniattn eval --force`") from None


def _read_model(model: dict[str, Any]) -> dict[str, Any]:
    found = {
        **model,
        "quality": _read_figures(model["quality"]),
        "tasks": {task: _read_figures(metrics) for task, metrics in model["tasks"].items()},
        "cost": _read_figures(model["cost"]),
    }
    for part in ("lengths", "retrieval"):
        found[part] = [
            {**entry, "difference": entry["difference"] and Difference.from_dict(entry["difference"])}
            for entry in model[part]
        ]
    if "agreement" in model:
        by_position = model["agreement"]["by_position"]
        whole = {key: entry for key, entry in model["agreement"].items() if key != "by_position"}
        found["agreement"] = {**_read_figures(whole), "by_position": by_position}
    return found


def _read_figures(entries: dict[str, Any]) -> dict[str, Figure]:
    return {name: Figure.from_dict(entry) for name, entry in entries.items()}
