"""`uniattn data`: what training will see, from the recipe and the tokenizer alone. No weights are read."""

from __future__ import annotations

import itertools
import json
import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import numpy as np

from uniattn_cli.errors import DataError
from uniattn_cli.options import RunOptions
from uniattn_cli.recipe.schema import Recipe
from uniattn_cli.run.directory import RunDir
from uniattn_cli.tables import NOTHING, Result, Sample, Table
from uniattn_cli.training.order import stage_steps
from uniattn_cli.training.preview import check_share, endless, pieces

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from uniattn_cli.data.counts import Counts
    from uniattn_cli.data.mixing import Mix, Share
    from uniattn_cli.data.sequences import Tokenised

BARS = 12  # lines of the histogram
WIDTH = 30  # characters of its longest bar


@dataclass(frozen=True)
class DataView(Result):
    """Result of `view_data`.

    Attributes:
        tokenised: the rows, and the sequences they became.
        shares: rows drawn from each data set.
    """

    tokenised: Tokenised
    shares: Sequence[Share]


def view_data(
    *,
    run_dir: Path | str = ".",
    recipe: Path | str | None = None,
    model: str | None = None,
    train: Sequence[str] = (),
    samples: int = 3,
    seed: int | None = None,
    part: Literal["train", "heldout"] = "train",
    overrides: Sequence[str] = (),
    options: RunOptions = RunOptions(),
) -> DataView:
    """Reads, renders and tokenises the recipe's training or held-out rows, and counts them.

    Args:
        run_dir: holds `recipe.yaml`; with `model`, there need not be one.
        recipe: another file, or the name of a ready recipe, with which paths of overrides start at the run directory.
        model: hub id or directory, in place of the recipe's.
        train: files or hub data sets, in place of the recipe's training rows.
        samples: rows to show.
        seed: which ones; None takes the recipe's. It changes nothing else.
        part: the rows that are trained on, or those that are held out.
        overrides: `key.path=value` strings for the recipe.
        options: progress.

    Raises:
        UniAttnError: one of its subclasses, with one clear line.
    """
    from uniattn_cli.data import sequences, splits, templates
    from uniattn_cli.data.chat import load_chat_tokenizer
    from uniattn_cli.data.screen import Screen
    from uniattn_cli.models.of_run import base_of

    settings = _settings(RunDir(run_dir), recipe, model, train, overrides)
    source = base_of(settings)
    tokenizer = load_chat_tokenizer(source, settings.data.chat_template)
    data = settings.data
    notes: list[str] = []
    screen = Screen(data, tokenizer, notes.append)
    with options.progress.track("reading rows", None):
        mix = splits.load_mix(data.train, part, holdout=data.holdout, seed=settings.seed, screen=screen)
    if not tokenizer.chat_template and "messages" in mix.rows.column_names:
        notes.append(templates.complete(tokenizer))
    shown = _samples(settings, tokenizer, mix, samples, settings.seed if seed is None else seed)
    # Held-out rows are scored on their responses, whatever is learned in training.
    loss = settings.train.loss if part == "train" else "responses"
    with options.progress.track("tokenising", None):
        tokenised = sequences.tokenize(
            mix, tokenizer, max_length=settings.train.max_length, loss=loss, workers=data.workers, needed=False
        )
    counts, limit = tokenised.counts, settings.train.max_length
    tables = [_counted(tokenised, mix.shares), _lengths(tokenised.sources, limit), histogram(np.sort(counts.lengths))]
    if part == "train":
        tables += [_steps(settings, tokenised)] if counts.used else []
        notes += _remarks(settings, counts)
        warning = endless(tokenised.dataset, tokenizer, source.path, limit)
        notes += [warning] if warning else []
    title = f"{'training' if part == 'train' else 'held-out'} rows of {settings.model.name}"
    return DataView(tokenised, mix.shares, title=title, samples=shown, tables=tables, notes=notes)


def _settings(
    run: RunDir, recipe: Path | str | None, model: str | None, train: Sequence[str], overrides: Sequence[str]
) -> Recipe:
    from uniattn_cli.recipe import ready

    def from_here(name: str) -> str:
        # What a given recipe names starts at its folder.
        return str(Path(name).resolve()) if recipe is not None and Path(name).exists() else name

    named = [] if model is None else [f"model.name={json.dumps(from_here(model))}"]
    named += [f"data.train={json.dumps([from_here(name) for name in train])}"] if train else []
    if recipe is None and model is not None and not run.recipe.exists():
        return Recipe.from_tree({}, "recipe", [*named, *overrides], run.root)
    path = run.recipe if recipe is None else ready.resolve(recipe)
    # A ready recipe lies in the package, where no user's file is.
    folder = None if recipe is None or path == Path(recipe) else run.root
    return Recipe.load(path, [*named, *overrides], folder)


def _samples(recipe: Recipe, tokenizer: PreTrainedTokenizerBase, mix: Mix, count: int, seed: int) -> list[Sample]:
    """Rows drawn from every data set in turn, with everything of them that is trained on."""
    from uniattn_cli.data.sequences import RowEncoder
    from uniattn_cli.models.losses import IGNORED

    rows, chosen = mix.rows, mix.chosen
    places: dict[str, np.ndarray] = {}
    for number, share in enumerate(mix.shares):
        others = places.get(share.source, np.zeros(0, np.int64))
        places[share.source] = np.sort(np.concatenate([others, np.flatnonzero(chosen == number)]))
    generator = random.Random(seed)
    drawn = [generator.sample(found.tolist(), min(count, len(found))) for _, found in sorted(places.items())]
    in_turn = [index for turn in itertools.zip_longest(*drawn) for index in turn if index is not None]
    encoder, limit, shown = RowEncoder(tokenizer, recipe.train.loss), recipe.train.max_length, []
    for index in in_turn[:count]:
        row = rows[index]
        sequences = encoder.batch([row.get("messages")], [row.get("text")])[0]
        for number, (ids, mask) in enumerate(sequences, 1):
            labels = [token if learned else IGNORED for token, learned in zip(ids, mask, strict=True)][:limit]
            learned = sum(label != IGNORED for label in labels)
            title = f"{mix.shares[chosen[index]].source}: {len(labels):,} tokens, {learned:,} in the loss"
            title += f", {len(ids) - limit:,} more truncated" if len(ids) > limit else ""
            title += "" if learned else ", so it is dropped"
            title += f", answer {number} of {len(sequences)}" if len(sequences) > 1 else ""
            shown.append(Sample(title, pieces(tokenizer, ids[:limit], labels)))
    return shown


def _counted(tokenised: Tokenised, shares: Sequence[Share]) -> Table:
    given = {share.source: share.rows for share in shares}
    parts = tokenised.sources | ({"together": tokenised.counts} if len(tokenised.sources) > 1 else {})
    whole = tokenised.counts.tokens
    rows = []
    for name, part in parts.items():
        rows.append(
            [
                name,
                f"{given.get(name, sum(given.values())):,}",
                f"{part.rows:,}",
                f"{part.used:,}",
                f"{part.tokens:,}",
                f"{part.tokens / whole:.1%}" if whole else NOTHING,
                f"{part.share:.1%}" if part.tokens else NOTHING,
                f"{part.truncated:,}",
                f"{part.lost_share:.1%}" if part.tokens + part.lost else NOTHING,
                f"{part.dropped:,}",
            ]
        )
    columns = [
        "data set",
        "rows",
        "drawn",
        "sequences",
        "tokens",
        "of all",
        "in the loss",
        "truncated",
        "tokens lost",
        "dropped",
    ]
    return Table("rows, and the sequences they become", columns, rows)


def _lengths(sources: dict[str, Counts], limit: int) -> Table:
    rows = []
    for name, part in sources.items():
        ordered = np.sort(part.lengths)
        cells = [f"{percentile(ordered, share):,}" for share in (0.1, 0.5, 0.9, 0.99, 1.0)]
        rows.append([name, f"{sum(ordered) / len(ordered):,.0f}", *cells])
    columns = ["data set", "mean", "10 %", "median", "90 %", "99 %", "longest"]
    return Table(f"tokens per sequence before truncation to train.max_length ({limit:,})", columns, rows)


def percentile(ordered: np.ndarray, share: float) -> int:
    """The smallest of the values that is not exceeded by this share of them.

    >>> percentile(np.array([1, 2, 3, 4]), 0.5), percentile(np.array([1, 2, 3, 4]), 1.0)
    (2, 4)
    """
    rank = -int(-share * len(ordered) // 1)
    return int(ordered[max(rank, 1) - 1])


def histogram(ordered: np.ndarray) -> Table:
    """Sequences by length, in steps of a round number of tokens; what is longer than 99 % of them is one line.

    Args:
        ordered: tokens of each sequence, ascending.
    """
    usual = percentile(ordered, 0.99)
    step = next(
        step
        for scale in itertools.count()
        for step in (10**scale, 2 * 10**scale, 5 * 10**scale)
        if usual // step < BARS
    )
    last = usual // step
    counted = np.bincount(np.minimum(ordered // step, last + 1), minlength=last + 2).tolist()
    rows = []
    for index, count in enumerate(counted):
        if index > last and not count:
            continue
        name = f"{index * step:,}–{(index + 1) * step - 1:,}" if index <= last else f"{index * step:,} and more"
        bar = "█" * max(round(WIDTH * count / max(counted)), int(count > 0))
        rows.append([name, f"{count:,}", bar or " "])
    return Table("sequences by length", ["tokens", "sequences", ""], rows)


def _steps(recipe: Recipe, tokenised: Tokenised) -> Table:
    """Optimiser steps of an epoch and of each stage."""
    spec, counts = recipe.train, tokenised.counts
    sequences = counts.used
    if spec.packing:
        from uniattn_cli.training.trainer import pack

        sequences = len(pack(tokenised.dataset, spec.max_length))
    epoch = sequences / spec.batch_size
    rows = []
    for stage in (stage for stage in spec.stages if stage.data is None):
        steps = stage_steps(stage, sequences, spec.batch_size)
        seen = steps * spec.batch_size
        tokens = seen / sequences * counts.tokens
        rows.append([stage.name or stage.trains, f"{steps:,}", f"{steps / epoch:.2f}", f"{seen:,}", f"{tokens:,.0f}"])
    packed = " packed" if spec.packing else ""
    title = (
        f"one epoch: {sequences:,}{packed} sequences in {epoch:,.1f} steps of {spec.batch_size}, "
        f"about {counts.tokens / epoch:,.0f} tokens each"
    )
    return Table(title, ["stage", "steps", "epochs", "sequences", "tokens (approx.)"], rows)


def _remarks(recipe: Recipe, counts: Counts) -> list[str]:
    """What the user should know or change before training."""
    notes = []
    if counts.split:
        notes.append(
            f"the chat template changes earlier turns, so multi-turn conversations became one sequence per answer: "
            f"{counts.split:,} more sequences than rows"
        )
    if counts.divided:
        notes.append(f"texts longer than train.max_length were split: {counts.divided:,} more sequences than rows")
    if counts.dropped and counts.used:
        notes.append(f"{counts.dropped:,} sequences have nothing to learn: {counts.why_dropped}")
    if counts.lost_share > 0.1:
        notes.append(f"{counts.lost_share:.0%} of all tokens are lost; raise train.max_length if memory allows")
    if others := [f"'{stage.label}'" for stage in recipe.train.stages if stage.data is not None]:
        notes.append(
            f"rows of {', '.join(others)} are not among these: the stage has data of its own; --train FILE shows them"
        )
    try:
        check_share(counts, recipe.train.loss)
    except DataError as error:
        notes.append(f"`uniattn train` will refuse these rows: {error}")
    return notes
