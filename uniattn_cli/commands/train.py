"""`uniattn train`: fine-tuning of the converted model, or of its base, in the stages that the recipe lists."""

from __future__ import annotations

import math
import shutil
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from uniattn_cli.errors import DataError, RecipeError, StageError
from uniattn_cli.models.families import check_packing
from uniattn_cli.models.losses import Loss
from uniattn_cli.options import Progress, RunOptions, Silent
from uniattn_cli.recipe.schema import DatasetSpec, Recipe, TrainStage
from uniattn_cli.run.directory import COMMANDS, LOG_FILE, REPORT_FILE, RunDir
from uniattn_cli.run.files import write_json
from uniattn_cli.run.lock import alone
from uniattn_cli.tables import NOTHING, Result, Table

if TYPE_CHECKING:
    from accelerate import PartialState

    from uniattn_cli.data.screen import Screen
    from uniattn_cli.data.sequences import Tokenised
    from uniattn_cli.models.hub import Source
    from uniattn_cli.models.losses import Rows
    from uniattn_cli.training.stage import Job, StageData, StageResult

PLOT_FILE = "loss.png"
# Settings that an interrupted run must have had too.
DECISIVE = (
    *("seed", "model", "data.train", "data.holdout", "data.chat_template", "train", "evaluation.responses"),
    # How a student writes responses.
    *(f"synthesis.{name}" for name in ("prefix", "temperature", "top_p", "batch_size", "engine")),
)
FEWEST_VALIDATION_ROWS = 8


@dataclass(frozen=True)
class Training(Result):
    """Result of `train`.

    Attributes:
        directory: the trained checkpoint.
        stages: what each stage did; stages with nothing to train are skipped.
        heldout: loss on held-out responses of `converted` and `trained`, or of `base` and `control`; empty where
            there are no held-out rows.
    """

    directory: Path
    stages: list[StageResult]
    heldout: dict[str, Loss]


@alone
def train(
    *,
    run_dir: Path | str = ".",
    recipe: Path | str | None = None,
    control: bool = False,
    overrides: Sequence[str] = (),
    options: RunOptions = RunOptions(),
) -> Training:
    """Trains the converted model and writes `trained/`, or trains its base in the same way and writes `control/`.

    Resumes an interrupted run that had the same settings.

    Args:
        run_dir: holds `recipe.yaml` and `converted/`.
        recipe: another recipe than that one.
        control: train the unconverted base on the same rows, in the same order and as many steps; see `control_stages`.
        overrides: `key.path=value` strings for the recipe.
        options: device, force, progress.

    Raises:
        UniAttnError: one of its subclasses, with one clear line.
    """
    from uniattn_cli.data.chat import load_chat_tokenizer
    from uniattn_cli.data.screen import Screen
    from uniattn_cli.data.splits import check_sources
    from uniattn_cli.models.loading import load_config
    from uniattn_cli.run.process import join_processes, shared_output
    from uniattn_cli.training.preview import check_share, endless
    from uniattn_cli.training.trained import control_stages, planned_stages

    run = RunDir(run_dir)
    settings = Recipe.load(run.recipe if recipe is None else recipe, overrides)
    verb = "control" if control else "train"
    run.check_free(verb, options.force)
    base, converted = _sources(run, settings)
    config = load_config(converted, converted=True)
    if settings.train.packing:
        check_packing(config.model_type)
    stages, notes = planned_stages(settings.train.stages, config)
    stages = control_stages(stages, settings.train) if control else stages
    teachers = _teachers(run, settings, stages, base)
    process = join_processes(options)
    _check(settings, stages, process)
    progress = options.progress if process.is_main_process else Silent()
    source = base if control else converted
    tokenizer = load_chat_tokenizer(source, settings.data.chat_template)
    screen = Screen(settings.data, tokenizer, progress.warn)
    check_sources([*settings.data.train, *(spec for stage in stages for spec in stage.data or ())])
    main = _stage_data(settings.data.train, settings, tokenizer, progress, screen)
    rows = main.rows
    check_share(rows.counts, settings.train.loss)
    data = _data_of_stages(stages, main, settings, tokenizer, progress, screen)
    heldout = _heldout(settings, tokenizer, progress, screen)
    warning = endless(rows.dataset, tokenizer, source.path, settings.train.max_length)
    if warning:
        progress.warn(warning)
    inputs = {"model": base.fingerprint, "data": rows.digest}
    if others := dict.fromkeys(each.rows.digest for each in data if each is not main):
        inputs["stage_data"] = " ".join(others)
    if not control:
        inputs["converted"] = converted.fingerprint
    if teachers:
        inputs["teacher"] = " ".join(teacher.fingerprint for teacher in teachers.values())
    _refuse_changes(run, verb, settings, inputs, options.force)

    from uniattn_cli.training.monitor import Log
    from uniattn_cli.training.stage import Job
    from uniattn_cli.training.teaching import Teaching

    for each, stage in {id(each): (each, stage) for each, stage in zip(data, stages, strict=True)}.values():
        progress.note(_step_size(settings, each, process, "" if each is main else f" of stage '{stage.label}'"))
    teaching = Teaching(settings, teachers, run.root, process, progress)
    with shared_output(process, run, verb, settings, inputs, force=options.force, decisive=DECISIVE) as partial:
        job = Job(
            recipe=settings,
            stages=stages,
            source=source,
            dtype=config.dtype,
            tokenizer=tokenizer,
            data=data,
            validation=_validation(settings, tokenizer, heldout, progress),
            teaching=teaching,
            partial=partial,
            process=process,
            progress=progress,
            log=Log(partial / LOG_FILE, writes=process.is_main_process),
        )
        names = ("base", "control") if control else ("converted", "trained")
        result = _train(job, rows, heldout, run.output(verb), names, notes)
    return result


def _check(recipe: Recipe, stages: Sequence[TrainStage], process: PartialState) -> None:
    """Finds out about what is missing or impossible here, before anything slow begins.

    Raises:
        RecipeError: the batch cannot be divided evenly, or a setting cannot be had here or says nothing.
        StageError: peft is missing.
    """
    from uniattn_cli.training import lora
    from uniattn_cli.training.order import accumulation
    from uniattn_cli.training.stage import quiet_training
    from uniattn_cli.training.trl_config import check_reporters, make_config

    spec = recipe.train
    passes = accumulation(spec, process.num_processes)
    check_reporters(spec.report_to)
    if spec.fsdp and process.num_processes == 1:
        raise RecipeError(
            "train.fsdp needs several processes; start with `accelerate launch` or `torchrun`, or remove it"
        )
    if spec.fsdp and process.device.type == "cpu":
        raise RecipeError("train.fsdp needs GPUs (accelerate does not shard on CPUs); remove it")
    if any(stage.trains == "lora" for stage in stages):
        lora.check_installed()
    for stage in stages:
        if stage.changed_learning_rate is not None and stage.only_changed:
            raise RecipeError(
                f"stage '{stage.label}' trains only changed layers; remove changed_learning_rate, set learning_rate"
            )
    with quiet_training():
        for stage in stages:
            make_config(
                spec, stage, folder=Path("."), steps=1, accumulation=passes, device=process.device, seed=recipe.seed
            )


def _teachers(run: RunDir, recipe: Recipe, stages: Sequence[TrainStage], base: Source) -> dict[str, Source]:
    """The teachers of these stages, by what the recipe calls them.

    Raises:
        StageError: the control is the teacher, and is missing or of another base.
    """
    from uniattn_cli.models.of_run import CONTROL, find

    spec = recipe.train
    names = {spec.distillation_of(stage).teacher for stage in stages if stage.loss == "distillation"}
    names |= {"base" for stage in stages if stage.loss == "local"}
    found = {"base": base} if "base" in names else {}
    if "control" not in names:
        return found
    made_from = run.record("control")["inputs"].get("model")
    if made_from != base.fingerprint:
        raise StageError(
            f"{run.output('control')} was trained from a different base ({made_from}, now {base.fingerprint}); run "
            f"`uniattn {COMMANDS['control']} --force` or correct model.name"
        )
    return found | {"control": find(run, CONTROL)}


def _refuse_changes(run: RunDir, verb: str, recipe: Recipe, inputs: dict, force: bool) -> None:
    """Never resumes with other settings than an interrupted run had, and never throws its work away unasked.

    Raises:
        StageError: says what is different.
    """
    from uniattn_cli.training.stage import worth_keeping

    if force or not worth_keeping(run.partial(verb) / "stages"):
        return
    changes = run.changes(verb, recipe, inputs, DECISIVE)
    if changes is None:
        changes = [f"the record of {run.partial(verb)} cannot be read"]
    if changes:
        raise StageError(
            f"the interrupted run had different settings, data or weights ({'; '.join(changes)}); undo the change to "
            f"resume it, or start over with `uniattn {COMMANDS[verb]} --force`"
        )


def _step_size(recipe: Recipe, data: StageData, process: PartialState, where: str) -> str:
    """How much an optimiser step sees, and how it is divided; the first does not depend on the second.

    Args:
        where: which steps, where the stages have data of their own.
    """
    from uniattn_cli.training.order import accumulation

    spec = recipe.train
    tokens, learned = spec.batch_size * sum(data.lengths) / len(data.lengths), data.rows.counts.share
    passes = accumulation(spec, process.num_processes)
    processes = f" x {process.num_processes} processes" if process.num_processes > 1 else ""
    return (
        f"each optimiser step{where}: {spec.batch_size} sequences, about {tokens:,.0f} tokens, {learned:.0%} of "
        f"them in the loss ({spec.micro_batch_size} per forward pass x {passes} accumulated{processes})"
    )


def _sources(run: RunDir, recipe: Recipe) -> tuple[Source, Source]:
    """The base and the converted model, if the one was made from the other.

    Raises:
        StageError: `converted/` is missing, incomplete, or of another base.
    """
    from uniattn_cli.models.of_run import CONVERTED, base_of, find

    record = run.record("convert")
    base = base_of(recipe)
    made_from = record.get("inputs", {}).get("model")
    if made_from != base.fingerprint:
        name = record.get("settings", {}).get("model", {}).get("name", "another model")
        raise StageError(
            f"{run.output('convert')} was made from {name} ({made_from}), but the recipe names {recipe.model.name} "
            f"({base.fingerprint}); run `uniattn convert --force` or correct model.name"
        )
    return base, find(run, CONVERTED)


def _stage_data(
    specs: Sequence[DatasetSpec], recipe: Recipe, tokenizer, progress: Progress, screen: Screen
) -> StageData:
    """Training rows, tokenised, shown, and packed where the recipe says so."""
    from uniattn_cli.data import sequences, splits, templates
    from uniattn_cli.training.preview import describe, mark
    from uniattn_cli.training.stage import StageData
    from uniattn_cli.training.trainer import pack

    spec, data = recipe.train, recipe.data
    with progress.track("reading rows", None):
        mix = splits.load_mix(specs, "train", holdout=data.holdout, seed=recipe.seed, screen=screen)
    for share in mix.shares if len(mix.shares) > 1 else ():
        progress.note(str(share))
    if not tokenizer.chat_template and "messages" in mix.rows.column_names:
        progress.note(templates.complete(tokenizer))
    with progress.track("tokenising", None):
        rows = sequences.tokenize(mix, tokenizer, max_length=spec.max_length, loss=spec.loss, workers=data.workers)
    first = rows.dataset[0]
    progress.note(describe(rows.counts, spec.max_length))
    progress.note(f"first row, loss tokens in ⟦ ⟧:\n{mark(tokenizer, first['input_ids'], first['labels'])}")
    if not spec.packing:
        return StageData(rows, rows.dataset, rows.lengths)
    packed = pack(rows.dataset, spec.max_length)
    return StageData(rows, packed, list(map(sum, packed["seq_lengths"][:])))


def _data_of_stages(
    stages: Sequence[TrainStage], main: StageData, recipe: Recipe, tokenizer, progress: Progress, screen: Screen
) -> tuple[StageData, ...]:
    """What each stage is trained on.

    Args:
        main: of stages without data of their own.
    """
    known: list[tuple[Sequence[DatasetSpec] | None, StageData]] = [(None, main), (recipe.data.train, main)]
    found = []
    for stage in stages:
        data = next((data for specs, data in known if specs == stage.data), None)
        if data is None:
            assert stage.data is not None
            progress.note(f"rows of stage '{stage.label}':")
            data = _stage_data(stage.data, recipe, tokenizer, progress, screen)
            known.append((stage.data, data))
        found.append(data)
    return tuple(found)


def _heldout(recipe: Recipe, tokenizer, progress: Progress, screen: Screen) -> Rows | None:
    """All held-out rows, None where there are none."""
    from uniattn_cli.data.heldout import response_rows

    try:
        return response_rows(recipe, tokenizer, screen=screen)
    except DataError as error:
        progress.warn(f"no loss on held-out responses: {error}")
        return None


def _validation(recipe: Recipe, tokenizer, heldout: Rows | None, progress: Progress) -> Rows | None:
    """Held-out rows by which states of the training are compared: others than those that the result is reported on.

    Where there are not enough of them, the same rows serve for both, and the report is a little too good.
    """
    from uniattn_cli.data.heldout import response_rows

    if heldout is None:
        return None
    try:
        rows = response_rows(recipe, tokenizer, skip=recipe.evaluation.responses)
    except DataError:
        rows = None
    if rows is not None and len(rows) >= FEWEST_VALIDATION_ROWS:
        return rows
    progress.note(
        "too few rows are held out for a separate validation set, so the weights to keep are chosen on the rows of the "
        "reported loss on held-out responses (a larger data.holdout avoids that)"
    )
    return heldout


def _train(
    job: Job,
    rows: Tokenised,
    heldout: Rows | None,
    output: Path,
    names: tuple[str, str],
    notes: Sequence[str],
) -> Training:
    """Runs the stages and fills the output folder.

    Args:
        names: what the model is called before and after.
    """
    from uniattn_cli.generation.continuing import check_engine
    from uniattn_cli.models.building import save_checkpoint
    from uniattn_cli.models.losses import row_losses
    from uniattn_cli.training.stage import finished, load_after, run_stage

    recipe, progress = job.recipe, job.progress
    losses: dict[str, Loss] = {}

    def score(model, name: str) -> None:
        if heldout is not None:
            with progress.track(f"held-out responses, {name}", len(heldout)) as advance:
                size = recipe.evaluation.batch_size
                losses[name] = row_losses(model, heldout, batch_size=size, advance=advance).summary()

    start = load_after(job, 0)
    if any(map(recipe.train.on_policy_of, job.stages)):
        # A stage that comes after days must not find out.
        check_engine(start, recipe.synthesis)
    score(start, names[0])
    del start
    results: list[StageResult] = []
    for index in range(len(job.stages)):
        result = finished(job, index)
        if result:
            progress.note(f"stage '{result.name}' was already finished")
        else:
            result = run_stage(job, index)
        results.append(result)
    model = load_after(job, len(job.stages))
    score(model, names[1])
    trouble = _trouble(results, losses, names)
    for words in trouble:
        progress.warn(words)
    notes = [*notes, *_kept_notes(results), *trouble]
    if job.process.is_main_process:
        save_checkpoint(model, job.tokenizer, job.partial)
        _write_report(job, rows, results, losses)
        shutil.rmtree(job.work)
    notes.append(f"checkpoint: {output}; log: {output / LOG_FILE}; plot: {output / PLOT_FILE}; next: uniattn eval")
    return Training(output, results, losses, title="training", tables=_tables(results, losses), notes=notes)


def _trouble(results: Sequence[StageResult], losses: dict[str, Loss], names: tuple[str, str]) -> list[str]:
    """What a user must not overlook: training that did not help, as a whole or in a stage."""
    warnings = [
        f"STAGE '{result.name}' DID NOT IMPROVE THE MODEL: the loss on validation rows was lowest before it "
        f"({result.validation[0]:.4f}), so its weights were discarded; try a lower learning_rate (train.keep: last "
        "keeps them)"
        for result in results
        if result.validation is not None and result.kept_step == 0
    ]
    if losses and losses[names[1]].mean > losses[names[0]].mean:
        warnings.append(
            f"TRAINING MADE HELD-OUT RESPONSES WORSE: {losses[names[0]].mean:.4f} before, {losses[names[1]].mean:.4f} "
            "after; try a lower learning_rate in train.stages"
        )
    return warnings


def _kept_notes(results: Sequence[StageResult]) -> list[str]:
    return [
        f"stage '{result.name}' ends with the weights of step {result.kept_step} of {result.steps}, where the loss on "
        f"validation rows was lowest ({result.validation[1]:.4f})"
        for result in results
        if result.validation is not None and 0 < result.kept_step < result.steps
    ]


def _write_report(job: Job, rows: Tokenised, results: list[StageResult], losses: dict[str, Loss]) -> None:
    """Writes `uniattn_report.json` (data, stages, held-out losses in nats) and `loss.png`."""
    from uniattn_cli.training.plots import plot_training

    content = {
        "schema": 1,
        "data": rows.counts.to_dict(),
        "stages": [asdict(result) for result in results],
        "heldout_responses": {
            name: {
                "mean": loss.mean,
                "stderr": None if math.isnan(loss.stderr) else loss.stderr,
                "tokens": loss.tokens,
                "rows": loss.windows,
            }
            for name, loss in losses.items()
        },
    }
    write_json(job.partial / REPORT_FILE, content)
    plot_training(
        job.log.lines(), {name: (loss.mean, loss.stderr) for name, loss in losses.items()}, job.partial / PLOT_FILE
    )


def _tables(results: list[StageResult], losses: dict[str, Loss]) -> list[Table]:
    stages = [
        [
            result.name,
            f"{result.parameters:,}",
            f"{result.steps:,}",
            f"{result.tokens:,}",
            f"{result.start_loss:.3f}",
            f"{result.end_loss:.3f}",
            NOTHING if result.validation is None else " -> ".join(f"{loss:.4f}" for loss in result.validation),
            f"{result.kept_step:,}",
            f"{result.seconds:.0f}",
            f"{result.tokens / result.seconds:,.0f}",
        ]
        for result in results
    ]
    columns = ["stage", "parameters", "steps", "tokens", "first loss", "last loss", "validation loss"]
    columns += ["step kept", "seconds", "tokens/s"]
    tables = [Table("stages", columns, stages)]
    if losses:
        any_loss = next(iter(losses.values()))
        title = f"loss on {any_loss.windows} held-out responses ({any_loss.tokens:,} tokens), nats per token"
        rows = [
            [name, f"{loss.mean:.4f}", f"± {loss.stderr:.4f}", f"{loss.perplexity:.2f}"]
            for name, loss in losses.items()
        ]
        tables.append(Table(title, ["model", "loss", "stderr", "perplexity"], rows))
    return tables
