"""`uniattn train`: supervised fine-tuning of the converted model, in the stages that the recipe lists."""

from __future__ import annotations

import hashlib
import json
import math
import shutil
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from uniattn_cli.errors import DataError, StageError
from uniattn_cli.options import Progress, RunOptions
from uniattn_cli.recipe import Recipe
from uniattn_cli.rundir import RunDir
from uniattn_cli.scoring import Loss
from uniattn_cli.tables import Table

if TYPE_CHECKING:
    import datasets

    from uniattn_cli.checkpoint import Source
    from uniattn_cli.data import Tokenised
    from uniattn_cli.heldout import Rows
    from uniattn_cli.training.runner import Job, StageResult

REPORT_FILE = "uniattn_report.json"
LOG_FILE = "log.jsonl"
PLOT_FILE = "loss.png"
COUNTED = ("rows", "split", "used", "dropped", "truncated", "tokens", "lost", "supervised")


@dataclass(frozen=True)
class Training:
    """Result of `train`.

    Attributes:
        directory: the trained checkpoint.
        stages: what each stage did; stages with nothing to train are left out.
        heldout: loss on held-out responses of `converted` and `trained`; empty where there are no held-out rows.
    """

    directory: Path
    stages: list[StageResult]
    heldout: dict[str, Loss]
    tables: list[Table]
    notes: list[str] = field(default_factory=list)
    title: str = "training"


def train(
    recipe: Path | str = "recipe.yaml",
    *,
    run_dir: Path | str | None = None,
    overrides: Sequence[str] = (),
    options: RunOptions | None = None,
) -> Training:
    """Trains the converted model and writes `trained/`; goes on where an interrupted run with the same settings was.

    Args:
        recipe: the YAML file, relative to `run_dir`.
        run_dir: holds `converted/`; the current folder if None.
        overrides: `key.path=value` strings for the recipe.
        options: device, force, progress.

    Raises:
        UniAttnError: one of its subclasses, with one clear line.
    """
    from uniattn_cli.checkpoint import load_tokenizer
    from uniattn_cli.training.order import accumulation
    from uniattn_cli.training.preview import endless
    from uniattn_cli.training.process import Process

    options = options or RunOptions()
    run = RunDir(run_dir or ".")
    settings = Recipe.load(run.root / recipe, overrides)
    run.check_free("train", options.force)
    base, converted = _sources(run, settings)
    process = Process.current(options)
    accumulation(settings.train, process.world)
    progress = process.progress(options)
    tokenizer = load_tokenizer(converted, settings.data.chat_template)
    rows, heldout = _data(settings, tokenizer, progress)
    warning = endless(rows, tokenizer, converted.path, settings.train.max_length)
    if warning:
        progress.warn(warning)
    inputs = {"model": base.fingerprint, "converted": converted.fingerprint, "data": _digest(rows.dataset)}

    from uniattn_cli.training.runner import Job
    from uniattn_cli.training.sft import pack

    sequences = pack(rows.dataset, settings.train.max_length) if settings.train.packing else rows.dataset
    lengths = [len(row) for row in sequences["input_ids"]]
    interrupted = (run.partial("train") / "stages").exists()
    with process.output(run, settings, inputs, options.force) as partial:
        job = Job(
            settings, converted, tokenizer, sequences, lengths, partial, process, progress, _log(partial, process)
        )
        if interrupted and not job.work.exists():
            progress.warn("an interrupted run had other settings, data or weights; training starts over")
        result = _train(job, rows, heldout, run.output("train"))
    return result


def _sources(run: RunDir, recipe: Recipe) -> tuple[Source, Source]:
    """The base and the converted model, if the one was made from the other.

    Raises:
        StageError: `converted/` is missing, incomplete, or of another base.
    """
    from uniattn_cli.checkpoint import locate

    record = run.record("convert")
    base = locate(recipe.model.name, recipe.model.revision)
    made_from = record.get("inputs", {}).get("model")
    if made_from != base.fingerprint:
        name = record.get("settings", {}).get("model", {}).get("name", "another model")
        raise StageError(
            f"{run.output('convert')} was made from {name} ({made_from}), but the recipe names {recipe.model.name} "
            f"({base.fingerprint}); run `uniattn convert --force` or mend model.name"
        )
    return base, locate(str(run.output("convert").absolute()))


def _data(recipe: Recipe, tokenizer, progress: Progress) -> tuple[Tokenised, Rows | None]:
    """The tokenised training rows, checked and shown, and the held-out ones, None where there are none."""
    from uniattn_cli import data, templates
    from uniattn_cli.heldout import response_rows
    from uniattn_cli.training.preview import check_share, describe, mark

    spec = recipe.train
    raw, mixed = data.load_mix(recipe.data.train, "train", holdout=recipe.data.holdout, seed=recipe.seed)
    for share in mixed if len(mixed) > 1 else ():
        progress.note(str(share))
    if not tokenizer.chat_template and "messages" in raw.column_names:
        progress.note(templates.complete(tokenizer))
    rows = data.tokenize(raw, tokenizer, max_length=spec.max_length, loss=spec.loss)
    check_share(rows, spec.loss)
    first = rows.dataset[0]
    progress.note(describe(rows, spec.max_length))
    progress.note(f"first row, what is learned in ⟦ ⟧:\n{mark(tokenizer, first['input_ids'], first['labels'])}")
    try:
        heldout = response_rows(recipe, tokenizer)
    except DataError as error:
        progress.warn(f"no loss on held-out responses: {error}")
        heldout = None
    return rows, heldout


def _digest(rows: datasets.Dataset) -> str:
    """Identifies tokens and labels, so that a resumed run never goes on with other data."""
    found = hashlib.sha256()
    for row in zip(rows["input_ids"], rows["labels"], strict=True):
        found.update(json.dumps(row).encode())
    return found.hexdigest()[:16]


def _log(partial: Path, process):
    from uniattn_cli.training.monitor import Log

    return Log(partial / LOG_FILE, process.is_main)


def _train(job: Job, rows: Tokenised, heldout: Rows | None, output: Path) -> Training:
    """Runs the stages and fills the output folder."""
    from uniattn_cli.checkpoint import save_checkpoint
    from uniattn_cli.heldout import row_losses
    from uniattn_cli.training.runner import finished, load_after, run_stage

    recipe, progress = job.recipe, job.progress
    losses: dict[str, Loss] = {}

    def score(model, name: str) -> None:
        if heldout is not None:
            with progress.track(f"held-out responses, {name}", len(heldout)) as advance:
                size = recipe.evaluation.batch_size
                losses[name] = row_losses(model, heldout, batch_size=size, advance=advance).summary()

    score(load_after(job, 0), "converted")
    results, notes = [], []
    for index, stage in enumerate(recipe.train.stages):
        result = finished(job, index)
        if result:
            progress.note(f"stage '{result.name}' was finished before the interruption")
        else:
            result = run_stage(job, index, sum(result.steps for result in results))
        if result:
            results.append(result)
        else:
            notes.append(f"stage '{stage.name or stage.trains}' was skipped: the layout has no {stage.trains} to train")
    if not results:
        raise StageError("the layout has nothing that the stages of the recipe train; list a stage that trains `all`")
    model = load_after(job, len(recipe.train.stages))
    score(model, "trained")
    if job.process.is_main:
        save_checkpoint(model, job.tokenizer, job.partial)
        _write_report(job, rows, results, losses)
        shutil.rmtree(job.work)
    notes.append(f"checkpoint: {output}; log: {output / LOG_FILE}; picture: {output / PLOT_FILE}; next: uniattn eval")
    return Training(output, results, losses, _tables(results, losses), notes)


def _write_report(job: Job, rows: Tokenised, results: list[StageResult], losses: dict[str, Loss]) -> None:
    """Writes `uniattn_report.json` (data, stages, held-out losses in nats) and `loss.png`."""
    from uniattn_cli.training.plots import plot_loss

    counts = {name: getattr(rows, name) for name in COUNTED}
    content = {
        "schema": 1,
        "data": counts,
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
    (job.partial / REPORT_FILE).write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    plot_loss(job.log.lines(), losses, job.partial / PLOT_FILE)


def _tables(results: list[StageResult], losses: dict[str, Loss]) -> list[Table]:
    stages = [
        [
            result.name,
            f"{result.parameters:,}",
            f"{result.steps:,}",
            f"{result.tokens:,}",
            f"{result.start_loss:.3f}",
            f"{result.end_loss:.3f}",
            f"{result.seconds:.0f}",
            f"{result.tokens / result.seconds:,.0f}",
        ]
        for result in results
    ]
    columns = ["stage", "parameters", "steps", "tokens", "first loss", "last loss", "seconds", "tokens/s"]
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
