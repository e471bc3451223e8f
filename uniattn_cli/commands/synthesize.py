"""`uniattn synthesize`: training rows that a model writes itself."""

from __future__ import annotations

import itertools
import json
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from uniattn_cli.errors import DataError
from uniattn_cli.generation.writer import LEAST_ROOM, LEFT_OUT, Writer
from uniattn_cli.models.of_run import find
from uniattn_cli.options import RunOptions
from uniattn_cli.recipe.schema import DatasetSpec, Recipe, flow
from uniattn_cli.run.directory import RunDir
from uniattn_cli.tables import Result, Table

FILES = {"text": "text.jsonl", "messages": "chats.jsonl"}


@dataclass(frozen=True)
class Synthesis(Result):
    """Result of `synthesize`.

    Attributes:
        rows: rows written, by kind (`text`, `messages`).
        tokens: their tokens, prompts included.
        left_out: what was written and not kept, by the keys of `LEFT_OUT`.
        directory: where they are.
    """

    rows: dict[str, int]
    tokens: int
    left_out: dict[str, int]
    directory: Path


def synthesize(
    *, run_dir: Path | str = ".", overrides: Sequence[str] = (), options: RunOptions = RunOptions()
) -> Synthesis:
    """Lets a model write training rows and puts them into `synthetic/`.

    Args:
        run_dir: holds `recipe.yaml`.
        overrides: `key.path=value` strings for the recipe.
        options: device, force, progress.

    Raises:
        UniAttnError: one of its subclasses, with one clear line.
    """
    from uniattn_cli.data import splits
    from uniattn_cli.data.chat import load_chat_tokenizer
    from uniattn_cli.models.loading import check_lengths, load_model

    run = RunDir(run_dir)
    recipe = Recipe.load(run.recipe, overrides)
    spec, length = recipe.synthesis, recipe.train.max_length
    run.check_free("synthesize", options.force)
    if spec.prefix + LEAST_ROOM > length:
        raise DataError(
            f"synthesis.prefix is {spec.prefix} tokens, but rows have {length}; raise train.max_length or lower it"
        )
    source = find(run, spec.model, recipe)
    device = options.torch_device()
    tokenizer = load_chat_tokenizer(source, recipe.data.chat_template)
    # What a model wrote is not continued once more.
    given = [each for each in recipe.data.train if each.heldout]
    rows = splits.load_rows(given, "train", holdout=recipe.data.holdout, seed=recipe.seed, repeat=False)
    options.progress.note(f"loading {source.name} on {device}")
    model = load_model(source, recipe.model, device)
    check_lengths(model.config, {"train.max_length": length})
    writer = Writer(model, tokenizer, spec, length, recipe.seed)
    started = time.perf_counter()
    counts: Counter[str] = Counter()
    with run.write("synthesize", recipe, {"model": source.fingerprint}, force=options.force) as directory:
        with options.progress.track("generating", spec.tokens) as advance:
            for kind, row, size in itertools.chain.from_iterable(writer.batches(rows)):
                with (directory / FILES[kind]).open("a", encoding="utf-8") as file:
                    file.write(json.dumps({kind: row}, ensure_ascii=False) + "\n")
                counts[kind] += 1
                counts["tokens"] += size
                advance(size)
    seconds = time.perf_counter() - started
    written = {kind: counts[kind] for kind in FILES if counts[kind]}
    output = run.output("synthesize")
    table = _table(source.name, written, counts["tokens"], seconds, writer.left_out)
    notes = [f"run by {writer.path}" + (f", not the engine: {writer.reason}" if writer.reason else "")]
    if counts["tokens"] < spec.tokens:
        notes.append(f"only {counts['tokens']:,} of {spec.tokens:,} tokens: another pass gave nothing new")
    notes.append(f"use it with data.train: {_data_sets(recipe, [f'{output.name}/{FILES[kind]}' for kind in written])}")
    notes.append("for stages with loss: distillation; cross-entropy gains nothing from it, so train a control first")
    left_out = dict(writer.left_out)
    return Synthesis(written, counts["tokens"], left_out, output, title="synthesis", tables=[table], notes=notes)


def _data_sets(recipe: Recipe, files: Sequence[str]) -> str:
    """The recipe's training data with these files, as YAML in one line."""
    weighted = any(spec.weight is not None for spec in recipe.data.train)
    added = [DatasetSpec(file, heldout=False, weight=1.0 if weighted else None) for file in files]
    # What an earlier run wrote was replaced.
    kept = [spec for spec in recipe.data.train if spec.source not in {each.source for each in added}]
    return flow((*kept, *added))


def _table(name: str, rows: dict[str, int], tokens: int, seconds: float, left_out: Counter[str]) -> Table:
    lines = [["texts continued", f"{rows.get('text', 0):,}"]]
    lines += [["conversations answered", f"{rows.get('messages', 0):,}"]]
    lines += [["tokens", f"{tokens:,}"], ["tokens per second", f"{tokens / seconds:,.0f}"]]
    lines += [[f"skipped: {LEFT_OUT[key]}", f"{count:,}"] for key, count in left_out.items()]
    return Table(f"generated by {name}", ["", "count"], lines)
