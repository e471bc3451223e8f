"""Data of every stage: training rows with their masks, calibration and held-out windows, multiple-choice items.

Rows come from `rows` (files, hub) or `corpus` (built in). Held-out rows are chosen by a hash of their content, so that
a row is on the same side in every stage, with every seed, and whatever rows are added around it. torch, transformers
and datasets are imported where they are used.
"""

from __future__ import annotations

import hashlib
import json
import random
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any, Literal

from uniattn_cli.data import builtin
from uniattn_cli.data.mixing import Share, draw, shares
from uniattn_cli.data.rows import BUILTIN, read_rows
from uniattn_cli.data.screen import Screen
from uniattn_cli.errors import DataError
from uniattn_cli.recipe.schema import DatasetSpec

if TYPE_CHECKING:
    import datasets


def load_rows(
    specs: Sequence[DatasetSpec],
    part: Literal["train", "heldout"],
    *,
    holdout: float,
    seed: int,
    repeat: bool = True,
    screen: Screen | None = None,
) -> datasets.Dataset:
    """The training or the held-out rows of one or several sources, normalised; `load_mix` without its counts."""
    return load_mix(specs, part, holdout=holdout, seed=seed, repeat=repeat, screen=screen)[0]


def load_mix(
    specs: Sequence[DatasetSpec],
    part: Literal["train", "heldout"],
    *,
    holdout: float,
    seed: int,
    repeat: bool = True,
    screen: Screen | None = None,
) -> tuple[datasets.Dataset, list[Share]]:
    """The training or the held-out rows of one or several sources, normalised, and what each source gave.

    A row is held out if a hash of its content falls below `holdout`: duplicates never straddle, the two parts are
    disjoint, and neither the seed nor other rows change the side of a row. Built-in rows have a held-out part of
    their own; of a source with `heldout: false` every row is a training row that no other source holds out. The seed
    shuffles training rows; held-out rows come in the order of their hashes, so that any first few are the same sample
    in every run. Weights mix training rows (see `mixing`) and leave held-out ones alone, so that losses of other mixes
    stay comparable.

    Args:
        repeat: whether a source with fewer rows than its share gives them several times; otherwise each row comes
            once, and such a source runs out before the end.
        screen: leaves out rows that cannot be used; None is one that tells nobody.

    Returns:
        Columns `messages` (see `conversations`) and `text`, one of them None per row (a column that is None
        everywhere is left out), and `source`.

    Raises:
        DataError: a source cannot be read, or no row is left in the part.
    """
    heldout = part == "heldout"
    specs = [spec for spec in specs if spec.heldout or not heldout]
    kept_back: set[str] = set()
    # In the order of hashes, so that the order of a file decides nothing.
    screen = screen or Screen()
    read = [sorted(_part_rows(spec, heldout, holdout, kept_back, screen), key=_first) for spec in specs]
    if not heldout and not all(spec.heldout for spec in specs):
        read = [[pair for pair in rows if pair[0] not in kept_back] for rows in read]
    names = [label(spec) for spec in specs]
    weights = [None if heldout else spec.weight for spec in specs]
    empty = [name for name, rows, weight in zip(names, read, weights, strict=True) if weight and not rows]
    if empty or not any(read):
        hint = "raise data.holdout or add more rows" if heldout else "add more rows"
        raise DataError(
            f"{', '.join(empty or names)}: no {'held-out' if heldout else 'training'} rows at data.holdout {holdout}; "
            f"{hint}"
        )
    drawn = shares([len(rows) for rows in read], weights)
    mixed = [Share(*parts) for parts in zip(names, map(len, read), drawn, weights, strict=True)]
    found = [pair for rows, count in zip(read, drawn, strict=True) if rows for pair in draw(rows, count, seed)]
    found.sort(key=_first)
    if not heldout:
        random.Random(seed).shuffle(found)
    if not repeat:
        found = list({id(row): (digest, row) for digest, row in found}.values())
    return _dataset([row for _, row in found]), mixed


def _dataset(rows: Sequence[dict[str, Any]]) -> datasets.Dataset:
    import datasets

    columns: dict[str, list] = {key: [row[key] for row in rows] for key in ("messages", "text", "source")}
    plain = {"role": datasets.Value("string"), "content": datasets.Value("string")}
    more = any(message.keys() != plain.keys() for row in rows for message in row["messages"] or ())
    features = {
        # The arguments of calls have other names in every row, which a table would give to all of them.
        "messages": datasets.List(datasets.Json() if more else plain),
        "text": datasets.Value("string"),
        "source": datasets.Value("string"),
    }
    used = {key: values for key, values in columns.items() if any(value is not None for value in values)}
    return datasets.Dataset.from_dict(used, features=datasets.Features({key: features[key] for key in used}))


def _first(pair: tuple[str, Any]) -> str:
    return pair[0]


def label(spec: DatasetSpec) -> str:
    """The name of a data set in counts: its source, and what else tells it from others of that source."""
    details = [detail for detail in (spec.config, spec.split) if detail]
    return spec.source + (f" ({', '.join(details)})" if details else "")


def _hash(row: dict[str, Any]) -> str:
    content = json.dumps([row["messages"], row["text"]], ensure_ascii=False, sort_keys=True)
    return hashlib.sha256(content.encode("utf-8", "surrogatepass")).hexdigest()


def _part_rows(
    spec: DatasetSpec, heldout: bool, holdout: float, kept_back: set[str], screen: Screen
) -> Iterator[tuple[str, dict[str, Any]]]:
    """Hash and row of those in the part; `kept_back` gets the hashes of rows that the source holds out."""
    if spec.source == BUILTIN:
        for row in _builtin_rows(spec, "heldout" if heldout else "train"):
            yield _hash(row), row
        return
    for row in read_rows(spec, screen=screen):
        digest = _hash(row)
        held = spec.heldout and int(digest[:13], 16) / 16**13 < holdout
        if held:
            kept_back.add(digest)
        if held == heldout:
            yield digest, {**row, "source": label(spec)}


def _builtin_rows(spec: DatasetSpec, part: str) -> Iterator[dict[str, Any]]:
    """Rows of the built-in corpus: instructions, or its text where the format says so."""
    if spec.split or spec.config or spec.columns or spec.format not in ("auto", "messages", "text"):
        raise DataError("the built-in data has only the formats messages and text, and no split, config or columns")
    if spec.format == "text":
        rows = [{"messages": None, "text": text} for text in builtin.text(part)]
    else:
        rows = [{"messages": row["messages"], "text": None} for row in builtin.instructions(part)]
    for row in rows[: spec.limit]:
        yield {**row, "source": BUILTIN}
