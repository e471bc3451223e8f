"""`uniattn eval`: base, control, converted and trained model side by side, in quality, size and speed."""

from __future__ import annotations

import shlex
import shutil
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from uniattn_cli.data.chat import load_chat_tokenizer
from uniattn_cli.data.heldout import length_rows, response_rows, text_rows
from uniattn_cli.data.screen import Screen
from uniattn_cli.errors import DataError, ModelError
from uniattn_cli.evaluation.agreement import Reference
from uniattn_cli.evaluation.batches import Batches
from uniattn_cli.evaluation.cache import ScoreStore, cache_directory, model_key
from uniattn_cli.evaluation.figures import RESULTS
from uniattn_cli.evaluation.results import assemble
from uniattn_cli.evaluation.retrieval import RetrievalItem, retrieval_items
from uniattn_cli.evaluation.samples import Prompt, find_prompts, sample_all
from uniattn_cli.evaluation.scores import Bench, Material, ModelScores, items_file, measure
from uniattn_cli.evaluation.speed import GridPoint, Runner
from uniattn_cli.evaluation.subjects import check_tokenizers, find_subjects
from uniattn_cli.evaluation.tasks import MISSING_HARNESS, TaskSet, answer_lengths, harness_installed, load_tasks
from uniattn_cli.inference.timing import measure_speed, prompt_tokens
from uniattn_cli.models.hub import context_window
from uniattn_cli.models.loading import check_lengths, load_config
from uniattn_cli.models.losses import Rows
from uniattn_cli.models.of_run import Subject
from uniattn_cli.models.pool import ModelPool
from uniattn_cli.options import RunOptions, Silent
from uniattn_cli.recipe.schema import Recipe
from uniattn_cli.reporting import tables
from uniattn_cli.reporting.report import PAGE, PLOT, TEXT, write_page, write_text
from uniattn_cli.run.directory import RunDir
from uniattn_cli.run.files import write_json
from uniattn_cli.run.lock import alone
from uniattn_cli.run.process import join_processes, shared_output
from uniattn_cli.tables import Result

if TYPE_CHECKING:
    from accelerate import PartialState

# Scores of single parts while the evaluation is not finished.
PARTS = "parts"


@dataclass(frozen=True)
class Evaluation(Result):
    """Result of `evaluate`.

    Attributes:
        directory: what was written.
        results: content of `results.json`, with a `Figure` for each figure; see `evaluation.figures` for its schema.
            Empty in processes that help the main one.
    """

    directory: Path
    results: dict[str, Any]


@alone
def evaluate(
    checkpoints: Sequence[str] = (),
    *,
    run_dir: Path | str = ".",
    scores: Path | None = None,
    overrides: Sequence[str] = (),
    options: RunOptions = RunOptions(),
) -> Evaluation:
    """Compares the models of a run and writes `evaluation/`.

    Resumes an interrupted evaluation if nothing has changed. Several processes, started by `torchrun`, share the models
    among them; speeds are measured by one.

    Args:
        checkpoints: additional models, as directories or hub ids.
        run_dir: holds `recipe.yaml` and what the other stages wrote; stages that were not run are left out.
        scores: an additional folder for cached scores; see `evaluation.cache`.
        overrides: `key.path=value` settings that override the recipe's.
        options: device, overwriting, progress.

    Raises:
        RecipeError: the recipe is faulty.
        ModelError: a model cannot be found or read, or gives no numbers.
        CheckpointError: a checkpoint is damaged, or has another vocabulary than the base.
        DataError: text, rows or tasks cannot be read.
        StageError: a stage was run on another model, or `evaluation/` exists and may not be replaced.
    """
    run = RunDir(run_dir)
    recipe = Recipe.load(run.recipe, overrides)
    run.check_free("eval", options.force)
    process = join_processes(options, objects=True)  # a device that is not there is told before any work
    progress = options.progress if process.is_main_process else Silent()
    options = replace(options, device=str(process.device), progress=progress)
    subjects, notes = find_subjects(run, recipe, checkpoints)
    settings = [word for override in overrides for word in ("--set", override)]
    command = shlex.join(["uniattn", "eval", *checkpoints, *settings, "--force"])
    material = prepare(recipe, subjects, notes)
    window = context_window(load_config(subjects[0].source))
    prompts = find_prompts(recipe, material.tokenizer, window)
    inputs = inputs_of(subjects, material)
    with shared_output(process, run, "eval", recipe, inputs, force=options.force) as folder:
        given = (folder, recipe, subjects, material, notes, command, options, scores, prompts)
        results = evaluate_into(*given, process=process)
        if process.is_main_process:
            write_page(run, results, folder)
    if not process.is_main_process:
        return Evaluation(run.output("eval"), results, title="evaluated by the main process")
    return _evaluation(run.output("eval"), results)


def prepare(recipe: Recipe, subjects: Sequence[Subject], notes: list[str]) -> Material:
    """Checks settings and loads what the models, the base first, are tested on; adds to the notes."""
    _check_lengths(recipe, load_config(subjects[0].source))
    return load_material(recipe, subjects, notes)


def inputs_of(subjects: Sequence[Subject], material: Material) -> dict[str, Any]:
    """Fingerprints of models and material, for the record of a stage."""
    return {
        "model": subjects[0].source.fingerprint,
        "models": {subject.name: subject.source.fingerprint for subject in subjects},
        "data": material.digest(),
    }


def evaluate_into(
    folder: Path,
    recipe: Recipe,
    subjects: Sequence[Subject],
    material: Material,
    notes: list[str],
    command: str,
    options: RunOptions,
    scores: Path | None = None,
    prompts: Sequence[Prompt] = (),
    process: PartialState | None = None,
) -> dict[str, Any]:
    """Measures models, the base first, and writes results, report, picture and items into a folder.

    Args:
        folder: may hold what an interrupted run of the same settings left.
        command: that makes the report again.
        scores: as for `evaluate`.
        prompts: that every model answers, for the page.
        process: one of several that share the models among them; the main one does all that follows.

    Returns:
        The content of `results.json`; nothing in a process that is not the main one.
    """
    pool = ModelPool(recipe.model, options.torch_device())
    batches = _batches(recipe, pool)
    store = ScoreStore([path for path in (folder / PARTS, scores, _kept(recipe)) if path is not None])
    measured = _measure_all(folder, subjects, pool, material, batches, store, options, process)
    if process is not None and not process.is_main_process:
        return {}
    points, runner = _time_all(subjects, pool, material, recipe, options)
    results = assemble(recipe, subjects, material, measured, points, runner, pool, batches, notes)
    if prompts:
        new = recipe.evaluation.sample_tokens
        results["samples"] = sample_all(folder, subjects, pool, material.tokenizer, prompts, new, options.progress)
    write_json(folder / RESULTS, results)
    write_text(results, folder, command)
    # All of it stands in `items/`.
    shutil.rmtree(folder / PARTS, ignore_errors=True)
    return results


def _kept(recipe: Recipe) -> Path | None:
    return cache_directory() if recipe.evaluation.cache else None


def _batches(recipe: Recipe, pool: ModelPool) -> Batches:
    spec = recipe.evaluation
    first = spec.max_batch_size if pool.device.type == "cuda" else spec.batch_size
    return Batches(first, spec.length, pool.device)


def _check_lengths(recipe: Recipe, config: Any) -> None:
    """Rejects lengths beyond the model's context window, where every model would look equally bad."""
    spec, speed = recipe.evaluation, recipe.evaluation.speed
    wanted = {"evaluation.length": spec.length}
    wanted |= {f"evaluation.lengths[{index}]": length for index, length in enumerate(spec.lengths or ())}
    if speed.enabled:
        wanted["evaluation.speed: prompt + new"] = speed.prompt + speed.new
        if speed.contexts:
            wanted["evaluation.speed: contexts + new"] = max(speed.contexts) + speed.new
    check_lengths(config, wanted)


def load_material(recipe: Recipe, subjects: Sequence[Subject], notes: list[str]) -> Material:
    """Loads everything that the models are tested on, before anything slow begins."""
    spec, tokenizer = recipe.evaluation, load_chat_tokenizer(subjects[0].source, recipe.data.chat_template)
    check_tokenizers(subjects[1:], tokenizer)
    tasks = TaskSet()
    if spec.tasks:
        if spec.chat_template and not tokenizer.chat_template:
            raise DataError("evaluation.chat_template: the base's tokenizer has no chat template; set it to false")
        if harness_installed():
            tasks = load_tasks(spec.tasks, limit=spec.limit, fewshot=spec.fewshot, chat_template=spec.chat_template)
            check_lengths(load_config(subjects[0].source), answer_lengths(tasks))
        else:
            notes.append(MISSING_HARNESS)
    screen = Screen(recipe.data, tokenizer, notes.append)
    text, responses = text_rows(recipe, tokenizer, screen), response_rows(recipe, tokenizer, screen=screen)
    lengths = length_rows(recipe, tokenizer, load_config(subjects[0].source), notes)
    return Material(tokenizer, text, responses, tasks, lengths, _retrieval(recipe, tokenizer, text, lengths))


def _retrieval(recipe: Recipe, tokenizer: Any, text: Rows, lengths: Iterable[int]) -> dict[int, list[RetrievalItem]]:
    filler, count = [token for row in text.tokens for token in row.tolist()], recipe.evaluation.retrieval
    found = {
        length: retrieval_items(tokenizer, filler, length=length, count=count, seed=recipe.seed) for length in lengths
    }
    return {length: items for length, items in found.items() if items}


def _measure_all(
    folder: Path,
    subjects: Sequence[Subject],
    pool: ModelPool,
    material: Material,
    batches: Batches,
    store: ScoreStore,
    options: RunOptions,
    process: PartialState | None = None,
) -> dict[str, ModelScores]:
    """Measures model after model; what an interrupted run finished is read back."""
    (folder / "items").mkdir(parents=True, exist_ok=True)
    base = subjects[0]
    reference = None
    if material.lengths:
        longest = max(material.lengths)
        windows = _stacked(material.lengths[longest].tokens)
        reference = Reference(lambda: pool.get(base), windows, batches.start(longest))
    bench = Bench(material, batches, store, reference, model_key(base.source), options.progress)
    count, number = (process.num_processes, process.process_index) if process else (1, 0)
    paths = {subject.name: items_file(folder, index, subject.name) for index, subject in enumerate(subjects)}
    for index, subject in enumerate(subjects):
        if index % count == number and not paths[subject.name].is_file():
            load = lambda subject=subject: pool.get(subject)  # noqa: E731
            measure(subject, load, bench, is_base=not index).write(paths[subject.name])
    if process is not None:
        process.wait_for_everyone()
    found = {name: ModelScores.read(path) for name, path in paths.items()}
    if store.found:
        options.progress.note(
            f"{store.found} of {store.found + store.made} scores come from the cache; "
            "--set evaluation.cache=false recomputes them"
        )
    return found


def _stacked(rows: Sequence[Any]) -> Any:
    """Rows of equal length as one tensor."""
    import torch

    return torch.stack(list(rows))


def _time_all(
    subjects: Sequence[Subject], pool: ModelPool, material: Material, recipe: Recipe, options: RunOptions
) -> tuple[list[GridPoint], Runner]:
    """Times all models in turn if they fit into memory together, else one after the other; the recipe's point first."""
    from uniattn_cli.inference.engine import engine_for

    spec = recipe.evaluation.speed
    if not spec.enabled:
        return [], Runner()
    points = list(
        dict.fromkeys(
            (batch, context) for batch in (spec.batch, *spec.batches) for context in (spec.prompt, *spec.contexts)
        )
    )
    found = [GridPoint(batch, context, {}) for batch, context in points]
    rounds = len(subjects) * (spec.repeats + 1) + (len(subjects) > 1)
    with options.progress.track("speed", len(points) * rounds) as advance:
        runner = _choose_runner(subjects, pool, spec.engine)
        groups = [subjects] if pool.together else [[subject] for subject in subjects]
        for group in groups:
            models = {subject.name: pool.get(subject) for subject in group}
            engines = {name: engine_for(model) for name, model in models.items()} if runner.engine else None
            for point in found:
                prompt = prompt_tokens(material.text.tokens, point.batch, point.context)
                timings = measure_speed(
                    models, prompt, new=spec.new, repeats=spec.repeats, engines=engines, advance=advance
                )
                point.timings.update(timings)
            # Nothing may hold a model that the pool has to drop before the next one fits.
            del models, engines
    return found, runner


def _choose_runner(subjects: Sequence[Subject], pool: ModelPool, choice: str) -> Runner:
    """One way of generating for all models, so that their speeds may be compared; loads each of them.

    Raises:
        ModelError: the engine was asked for and cannot run a model.
    """
    from uniattn_cli.inference.engine import engine_for, engine_wanted
    from uniattn_cli.inference.program import UnsupportedError

    wanted, reason = engine_wanted(choice, pool.device), ""
    for subject in subjects:
        model = pool.get(subject)
        if wanted and not reason:
            try:
                engine_for(model)
            except UnsupportedError as error:
                reason = f"the engine cannot run {subject.name}: {error}"
        del model
    if reason and choice == "engine":
        raise ModelError(f"evaluation.speed.engine: {reason}; set it to auto or transformers")
    return Runner(wanted and not reason, reason)


def _evaluation(directory: Path, results: dict[str, Any]) -> Evaluation:
    sentences = [model["verdict"]["sentence"] for model in results["models"].values() if model["verdict"]]
    files = (
        f"Report: {directory / PAGE}, and as text {directory / TEXT}; plot: {directory / PLOT}; "
        f"all figures: {directory / RESULTS}"
    )
    return Evaluation(
        title=f"{len(results['models'])} models compared" if sentences else "Only the base was measured",
        tables=[*tables.tables(results), *tables.length_tables(results)],
        notes=[*sentences, *results["notes"], files],
        directory=directory,
        results=results,
    )
