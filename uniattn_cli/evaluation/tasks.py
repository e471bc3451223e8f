"""Tasks through lm-evaluation-harness: built-in and local ones without network, or any of its own tasks."""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import importlib.util
import itertools
import json
import logging
import math
import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from uniattn_cli.data.items import is_local, load_items
from uniattn_cli.errors import DataError
from uniattn_cli.evaluation.intervals import EXPONENTIAL, IDENTITY, LARGEST_LOSS
from uniattn_cli.evaluation.local_tasks import local_task
from uniattn_cli.evaluation.task_names import check_mentioned, unknown_task
from uniattn_cli.models.hub import transport_errors
from uniattn_cli.recipe.schema import TaskSpec

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

MISSING_HARNESS = "Tasks are skipped: lm-evaluation-harness is not installed; run `pip install 'uniattn[eval]'`."
BUILTIN_PREFIX = "builtin:"
# The harness's own default, with which its command line draws few-shot examples.
FEWSHOT_SEED = 1234
# Tokens that the harness lets a model generate where a task does not say how many.
NEW_TOKENS = 256


@dataclass(frozen=True)
class MetricScores:
    """One metric of one task for one model.

    Attributes:
        value: as the harness aggregates it.
        values: of each item in order, where `value` follows from them; else None.
        higher_is_better: direction.
        n: number of items.
        weights: of each item; 1 each if None.
        transform: what makes `value` of the weighted mean; see `intervals`.
    """

    value: float
    values: list[float] | None
    higher_is_better: bool
    n: int
    weights: list[float] | None = None
    transform: str = IDENTITY


TaskScores = dict[str, dict[str, MetricScores]]


@dataclass(frozen=True)
class TaskSet:
    """Tasks that are loaded once and run on every model, so that all see the same items.

    Attributes:
        loaded: the harness's tasks by name.
        members: for each entry of the recipe, by the name it is shown under, the harness's tasks it stands for.
        digests: for each of the harness's tasks, what identifies its items and settings.
        chat_template: whether items are put into the tokenizer's chat template.
        limit: first items of each task; None takes all.
    """

    loaded: dict[str, Any] = field(default_factory=dict)
    members: dict[str, list[str]] = field(default_factory=dict)
    digests: dict[str, str] = field(default_factory=dict)
    chat_template: bool = False
    limit: int | None = None

    @property
    def digest(self) -> str:
        """Identifies all items and settings."""
        return hashlib.sha256(json.dumps(self.digests, sort_keys=True).encode()).hexdigest()[:16]


def harness_installed() -> bool:
    """Whether lm-evaluation-harness can be imported."""
    return importlib.util.find_spec("lm_eval") is not None


def load_tasks(
    specs: Sequence[TaskSpec], *, limit: int | None = None, fewshot: int | None = None, chat_template: bool = False
) -> TaskSet:
    """Loads the recipe's tasks.

    Args:
        specs: built-in tasks, local files, or tasks, groups and tags of the harness.
        limit: first items of each task; None takes all.
        fewshot: solved items in front of each item; None takes the task's own number.
        chat_template: put the items into the tokenizer's chat template.

    Raises:
        DataError: an unknown task, items that cannot be read, or a data set that cannot be downloaded.
    """
    specs = list(dict.fromkeys(specs))
    local = {spec: load_items(spec) for spec in specs if is_local(spec.source)}
    foreign = [spec for spec in specs if spec not in local]
    labels = _labels(list(local))
    loaded: dict[str, Any] = {}
    members: dict[str, Any] = {}
    with quiet_harness():
        check_mentioned([spec.source for spec in foreign])
        from lm_eval.tasks import TaskManager

        manager = TaskManager(include_defaults=bool(foreign))
        for spec in foreign:
            if spec.source not in manager.task_index:
                raise unknown_task(spec.source, manager.all_tasks)
        # As the harness's own entry point does: some tasks shuffle their choices when they are loaded.
        random.seed(0)
        for spec in (*local, *foreign):
            name = labels.get(spec, spec.source)
            found = _load_task(manager, local_task(name, *local[spec], spec) if spec in local else name)["tasks"]
            for key, task in found.items():
                _prepare(key, task, fewshot if spec.fewshot is None else spec.fewshot)
            members[name] = list(found)
            loaded |= found
    digests = {name: _digest(task, limit, chat_template) for name, task in loaded.items()}
    for spec, (_, items) in local.items():
        # Built from functions, which have no text of their own.
        settings = json.dumps([digests[labels[spec]], items, dataclasses.asdict(spec)], sort_keys=True)
        digests[labels[spec]] = hashlib.sha256(settings.encode()).hexdigest()[:16]
    return TaskSet(loaded, members, digests, chat_template, limit)


def _digest(task: Any, limit: int | None, chat_template: bool) -> str:
    """Identifies what a task of the harness asks: its settings and the items up to the limit."""
    items = itertools.islice(iter(task.eval_docs), limit)
    config = {
        key: value for key, value in task.dump_config().items() if isinstance(value, (str, int, float, list, dict))
    }
    parts = [str(task.VERSION), config, limit, chat_template, *items]
    found = hashlib.sha256()
    for part in parts:
        found.update(json.dumps(part, sort_keys=True, default=_name_of).encode())
    return found.hexdigest()[:16]


def answer_lengths(tasks: TaskSet) -> dict[str, int]:
    """Tokens that the tasks with generated answers need at least, by what asks for them."""
    found = {}
    for name, task in tasks.loaded.items():
        if task.OUTPUT_TYPE == "generate_until":
            new = (task.get_config("generation_kwargs") or {}).get("max_gen_toks", NEW_TOKENS)
            found[f"evaluation.tasks: '{name}', prompt + new"] = 1 + int(new)
    return found


def _name_of(value: Any) -> str:
    # Addresses of functions and objects differ from process to process.
    return getattr(value, "__qualname__", type(value).__name__)


def _labels(specs: list[TaskSpec]) -> dict[TaskSpec, str]:
    """Short names to show: as given, of the built-in task or of the file; the source where two would be the same."""
    short = {spec: spec.name or _short(spec.source) for spec in specs}
    found = list(short.values())
    labels = {spec: label if found.count(label) == 1 else spec.source for spec, label in short.items()}
    twice = [label for label in labels.values() if list(labels.values()).count(label) > 1]
    if twice:
        raise DataError(f"evaluation.tasks: '{twice[0]}' appears twice with different settings; give each a `name`")
    return labels


def _short(source: str) -> str:
    return source.removeprefix(BUILTIN_PREFIX) if source.startswith(BUILTIN_PREFIX) else Path(source).stem


def _load_task(manager: Any, spec: str | dict) -> dict[str, Any]:
    try:
        return manager.load([spec])
    except transport_errors(OSError) as error:
        name = spec if isinstance(spec, str) else spec["task"]
        reason = str(error).strip().splitlines()
        raise DataError(
            f"evaluation.tasks: the data set of '{name}' cannot be loaded ({reason[0] if reason else error!r}); "
            "check the network, or use a local .jsonl file"
        ) from None


def _prepare(name: str, task: Any, fewshot: int | None) -> None:
    if getattr(task, "UNSAFE_CODE", False):
        raise DataError(f"evaluation.tasks: '{name}' runs model-generated code; evaluate it with lm_eval itself")
    own = task.get_config("num_fewshot")
    if fewshot is None:
        task.set_config(key="num_fewshot", value=own or 0)
    elif own != 0:
        # As in the harness: a task that sets 0 itself means it.
        task.set_config(key="num_fewshot", value=fewshot)
    items = len(list(itertools.islice(iter(task.eval_docs), (fewshot or 0) + 1)))
    if items <= (fewshot or 0) and not task.has_training_docs():
        raise DataError(f"evaluation.tasks: '{name}' has {items} items, too few for {fewshot} few-shot examples")


def run_task(
    tasks: TaskSet,
    name: str,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    *,
    batch_size: int,
    advance: Callable[[int], None] = lambda steps: None,
) -> dict[str, MetricScores]:
    """Runs one task on one model, exactly as `lm_eval --model hf --tasks NAME` does.

    Each task runs alone, so that its scores do not depend on which others the recipe names: the harness batches the
    items of all tasks together, and in bfloat16 the company that a sequence has in its batch moves its last digits.

    Args:
        name: a key of `tasks.loaded`.
        advance: told the number of finished sequences.
    """
    task = tasks.loaded[name]
    # Examples are drawn from a generator that goes on from model to model unless it is set again.
    task.set_fewshot_seed(seed=FEWSHOT_SEED)
    with quiet_harness(), _without_cache(model):
        from lm_eval.evaluator import evaluate

        found = evaluate(
            _harness_model(model, tokenizer, batch_size, advance),
            {"tasks": {name: task}, "groups": {}, "group_map": {}},
            limit=tasks.limit,
            bootstrap_iters=0,
            log_samples=True,
            apply_chat_template=tasks.chat_template,
            fewshot_as_multiturn=True,
        )
    return _metrics(found["results"][name], found["samples"][name], found["higher_is_better"].get(name, {}))


def with_groups(tasks: TaskSet, scores: TaskScores) -> TaskScores:
    """Adds, for each entry of the recipe that stands for several tasks, their metrics over the items of all."""
    pooled = {
        name: _pooled([scores[member] for member in members])
        for name, members in tasks.members.items()
        if name not in scores
    }
    return scores | pooled


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
        rows = [sample.get(metric) for sample in samples if sample["filter"] == chosen]
        name = metric if chosen == "none" else key
        found[name] = _from_items(float(value), rows, better.get(metric, True))
    return found


def _from_items(value: float, rows: list[Any], higher_is_better: bool) -> MetricScores:
    """Scores of the items, where the harness's value is seen to follow from them."""
    values = weights = None
    if rows and all(isinstance(row, (bool, int, float)) for row in rows):
        values = [float(row) for row in rows]
    elif rows and all(isinstance(row, (tuple, list)) and len(row) == 2 for row in rows):
        values, weights = [float(row[0]) for row in rows], [float(row[1]) for row in rows]
    if values is not None:
        total = sum(values) / (sum(weights) if weights else len(values))
        # A mean; a perplexity from log-likelihoods; or bits from them.
        for factor, transform in ((1.0, IDENTITY), (-1.0, EXPONENTIAL), (-1 / math.log(2), IDENTITY)):
            mean = factor * total
            expected = math.exp(min(mean, LARGEST_LOSS)) if transform == EXPONENTIAL else mean
            if math.isclose(expected, value, rel_tol=1e-9, abs_tol=1e-12):
                scaled = values if factor == 1 else [factor * item for item in values]
                return MetricScores(value, scaled, higher_is_better, len(rows), weights, transform)
    return MetricScores(value, None, higher_is_better, len(rows))


def _pooled(members: list[dict[str, MetricScores]]) -> dict[str, MetricScores]:
    """Metrics that all tasks of a group have, over the items of all of them."""
    found = {}
    for metric in members[0]:
        parts = [scores.get(metric) for scores in members]
        # Perplexities of different tasks are not of one text, and are not pooled.
        pooled = [part for part in parts if part is not None and part.values is not None and _is_plain_mean(part)]
        if len(pooled) == len(parts):
            values = [value for part in pooled for value in part.values or ()]
            found[metric] = MetricScores(sum(values) / len(values), values, pooled[0].higher_is_better, len(values))
    return found


def _is_plain_mean(scores: MetricScores) -> bool:
    return scores.weights is None and scores.transform == IDENTITY


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
