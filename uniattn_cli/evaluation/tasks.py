"""Tasks through lm-evaluation-harness: built-in and local multiple choice without network, or any of its own tasks."""

from __future__ import annotations

import contextlib
import hashlib
import importlib.util
import json
import logging
import math
import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from uniattn_cli.checkpoint import transport_errors
from uniattn_cli.data import load_choices
from uniattn_cli.errors import DataError, suggest

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

MISSING_HARNESS = "Tasks are left out: lm-evaluation-harness is not installed; `pip install 'uniattn[eval]'` adds it."
BUILTIN_PREFIX = "builtin:"
# The harness's own default, with which its command line draws few-shot examples.
FEWSHOT_SEED = 1234


@dataclass(frozen=True)
class MetricScores:
    """One metric of one task for one model.

    Attributes:
        value: as the harness aggregates it.
        values: of each item in order, where `value` is their mean; else None.
        higher_is_better: direction.
        n: number of items.
    """

    value: float
    values: list[float] | None
    higher_is_better: bool
    n: int


TaskScores = dict[str, dict[str, MetricScores]]


@dataclass(frozen=True)
class TaskSet:
    """Tasks that are loaded once and run on every model, so that all see the same items.

    Attributes:
        loaded: what the harness's task manager returned.
        members: for each entry of the recipe, by the name it is shown under, the harness's tasks it stands for.
        digest: identifies local items.
    """

    loaded: dict[str, Any] = field(default_factory=dict)
    members: dict[str, list[str]] = field(default_factory=dict)
    digest: str = ""


def harness_installed() -> bool:
    """Whether lm-evaluation-harness can be imported."""
    return importlib.util.find_spec("lm_eval") is not None


def load_tasks(names: Sequence[str]) -> TaskSet:
    """Loads the recipe's tasks.

    Args:
        names: `builtin:NAME`, local .jsonl files, or tasks, groups and tags of the harness.

    Raises:
        DataError: an unknown task, items that cannot be read, or a data set that cannot be downloaded.
    """
    local = {name: load_choices(name) for name in dict.fromkeys(names) if is_local(name)}
    foreign = [name for name in dict.fromkeys(names) if name not in local]
    labels = _labels(list(local))
    with quiet_harness():
        from lm_eval.tasks import TaskManager

        manager = TaskManager(include_defaults=bool(foreign))
        _check_known(foreign, manager.all_tasks)
        # As the harness's own entry point does: some tasks shuffle their choices when they are loaded.
        random.seed(0)
        specs = [_choice_task(labels[name], items) for name, items in local.items()]
        members = {labels[name]: [labels[name]] for name in local}
        loaded = {"tasks": {}, "groups": {}, "group_map": {}}
        for spec in (*specs, *foreign):
            found = _load_task(manager, spec)
            if isinstance(spec, str):
                members[spec] = list(found["tasks"])
            for key, entries in found.items():
                loaded[key].update(entries)
    for name, task in loaded["tasks"].items():
        _prepare(name, task)
    digest = hashlib.sha256(json.dumps(local, sort_keys=True).encode()).hexdigest()[:16]
    return TaskSet(loaded, members, digest)


def is_local(name: str) -> bool:
    """Whether a task of the recipe comes from the built-in corpus or from a file."""
    return name.startswith(BUILTIN_PREFIX) or name.endswith((".jsonl", ".json")) or Path(name).is_file()


def _labels(names: list[str]) -> dict[str, str]:
    """Short names to show: of the built-in task or of the file, or the whole entry where two would be the same."""
    short = {
        name: name.removeprefix(BUILTIN_PREFIX) if name.startswith(BUILTIN_PREFIX) else Path(name).stem
        for name in names
    }
    found = list(short.values())
    return {name: label if found.count(label) == 1 else name for name, label in short.items()}


def _check_known(names: Sequence[str], known: Sequence[str]) -> None:
    for name in names:
        if name not in known:
            raise DataError(
                f"evaluation.tasks: '{name}' is not a task of lm-evaluation-harness{suggest(name, known)}; "
                "`lm_eval ls tasks` lists them, built-in ones begin with 'builtin:', local ones end in .jsonl"
            )


def _choice_task(name: str, items: list[dict]) -> dict[str, Any]:
    """An inline task of the harness: the choice whose likelihood after the query is largest, as it is or per byte."""
    import datasets

    return {
        "task": name,
        "custom_dataset": lambda **_: {"test": datasets.Dataset.from_list(items)},
        "test_split": "test",
        "output_type": "multiple_choice",
        "doc_to_text": "query",
        "doc_to_choice": "choices",
        "doc_to_target": "gold",
        "metric_list": [
            {"metric": metric, "aggregation": "mean", "higher_is_better": True} for metric in ("acc", "acc_norm")
        ],
    }


def _load_task(manager: Any, spec: str | dict) -> dict[str, Any]:
    try:
        return manager.load([spec])
    except (OSError, *transport_errors()) as error:
        name = spec if isinstance(spec, str) else spec["task"]
        reason = str(error).strip().splitlines()
        raise DataError(
            f"evaluation.tasks: the data set of '{name}' cannot be loaded ({reason[0] if reason else error!r}); "
            "connect, or name a local .jsonl file"
        ) from None


def _prepare(name: str, task: Any) -> None:
    if getattr(task, "UNSAFE_CODE", False):
        raise DataError(f"evaluation.tasks: '{name}' runs code that the model writes; evaluate it with lm_eval itself")
    if task.get_config("num_fewshot") is None:
        task.set_config(key="num_fewshot", value=0)
    task.set_fewshot_seed(seed=FEWSHOT_SEED)


def run_tasks(
    tasks: TaskSet,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    *,
    batch_size: int,
    limit: int | None,
    advance: Callable[[int], None] = lambda steps: None,
) -> TaskScores:
    """Runs all tasks on one model, without chat template, exactly as `lm_eval --model hf` does.

    Args:
        limit: first items of each task; None takes all.
        advance: told the number of finished sequences.
    """
    if not tasks.members:
        return {}
    with quiet_harness(), _without_cache(model):
        from lm_eval.evaluator import evaluate

        found = evaluate(
            _harness_model(model, tokenizer, batch_size, advance),
            tasks.loaded,
            limit=limit,
            bootstrap_iters=0,
            log_samples=True,
        )
    scores = {}
    for name in tasks.loaded["tasks"]:
        better = found["higher_is_better"].get(name, {})
        scores[name] = _metrics(found["results"][name], found["samples"][name], better)
    for name, members in tasks.members.items():
        if name not in scores:
            scores[name] = _pooled([scores[member] for member in members])
    return scores


def _harness_model(model: Any, tokenizer: Any, batch_size: int, advance: Callable[[int], None]) -> Any:
    from lm_eval.models.huggingface import HFLM

    class Reporting(HFLM):
        """Reports progress."""

        def _model_call(self, inps: Any, *args: Any, **kwargs: Any) -> Any:
            logits = super()._model_call(inps, *args, **kwargs)
            advance(len(inps))
            return logits

        def _model_generate(self, context: Any, *args: Any, **kwargs: Any) -> Any:
            tokens = super()._model_generate(context, *args, **kwargs)
            advance(len(context))
            return tokens

    return Reporting(pretrained=model, backend="causal", tokenizer=tokenizer, batch_size=batch_size)


def _metrics(results: dict[str, Any], samples: list[dict], better: dict[str, bool]) -> dict[str, MetricScores]:
    """The numeric metrics of one task, keyed as `acc`, or `exact_match,strict` where a filter is not the default."""
    found = {}
    for key, value in results.items():
        metric, comma, chosen = key.partition(",")
        if not comma or metric.endswith("_stderr") or not isinstance(value, (int, float)):
            continue
        rows = [sample for sample in samples if sample["filter"] == chosen]
        values = [row.get(metric) for row in rows]
        is_mean = bool(values) and all(isinstance(item, (bool, int, float)) for item in values)
        if is_mean:
            values = [float(item) for item in values]
            is_mean = math.isclose(sum(values) / len(values), value, rel_tol=1e-9, abs_tol=1e-12)
        name = metric if chosen == "none" else key
        found[name] = MetricScores(float(value), values if is_mean else None, better.get(metric, True), len(rows))
    return found


def _pooled(members: list[dict[str, MetricScores]]) -> dict[str, MetricScores]:
    """Metrics that all tasks of a group have, over the items of all of them."""
    found = {}
    for metric in members[0]:
        parts = [scores.get(metric) for scores in members]
        if all(part is not None and part.values is not None for part in parts):
            values = [value for part in parts for value in part.values]
            found[metric] = MetricScores(sum(values) / len(values), values, parts[0].higher_is_better, len(values))
    return found


@contextlib.contextmanager
def _without_cache(model: PreTrainedModel) -> Iterator[None]:
    """Log-likelihood calls would build a KV cache each time and throw it away; generation asks for one itself."""
    before = model.config.use_cache
    model.config.use_cache = False
    try:
        yield
    finally:
        model.config.use_cache = before


@contextlib.contextmanager
def quiet_harness() -> Iterator[None]:
    """Silences the harness's log lines and progress bars, ours excepted."""
    from tqdm.std import tqdm

    logger = logging.getLogger("lm_eval")
    level, start = logger.level, tqdm.__init__

    def silent(bar: Any, *args: Any, **kwargs: Any) -> None:
        # Its calls pass `disable=False` explicitly, so that no environment variable can turn them off.
        start(bar, *args, **{**kwargs, "disable": True})

    logger.setLevel(logging.ERROR)
    tqdm.__init__ = silent
    try:
        yield
    finally:
        logger.setLevel(level)
        tqdm.__init__ = start
