"""Training rows and held-out rows of one or several data sets, mixed and in their order.

Rows come from `rows` (files, hub) or `builtin`; normalised, checked and hashed once, they are kept on disk (`stored`).
Held-out rows are chosen by a hash of their content, so that a row is on the same side in every stage, with every seed,
and whatever rows are added around it. torch, transformers and datasets are imported where they are used.
"""

from __future__ import annotations

import functools
import hashlib
import itertools
import json
import random
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import numpy as np

from uniattn_cli.data import builtin
from uniattn_cli.data.mixing import Mix, Share, draw, shares
from uniattn_cli.data.rows import BUILTIN, checked_rows
from uniattn_cli.data.screen import SHOWN, CheckedRow, Screen, Tally
from uniattn_cli.data.sources import find
from uniattn_cli.data.stored import stored, tokenizer_key
from uniattn_cli.errors import DataError
from uniattn_cli.recipe.schema import DatasetSpec

if TYPE_CHECKING:
    import datasets

Part = Literal["train", "heldout", "calibration"]


def load_mix(
    specs: Sequence[DatasetSpec],
    part: Literal["train", "heldout"],
    *,
    holdout: float,
    seed: int,
    repeat: bool = True,
    screen: Screen | None = None,
) -> Mix:
    """The training or the held-out rows of one or several sources, and what each source gave.

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

    Raises:
        DataError: a source cannot be read, or no row is left in the part.
    """
    heldout = part == "heldout"
    specs = [spec for spec in specs if spec.heldout or not heldout]
    check_sources(specs)
    screen = screen or Screen()
    sets = [stored_rows(spec, part, screen) for spec in specs]
    found = [_side(spec, rows, heldout, holdout) for spec, rows in zip(specs, sets, strict=True)]
    if not heldout and not all(spec.heldout for spec in specs):
        kept_back = np.concatenate([side.held for side in found])
        found = [side.without(kept_back) for side in found]
    sizes = [len(side.places) for side in found]
    names = [label(spec) for spec in specs]
    weights = [None if heldout else spec.weight for spec in specs]
    empty = [name for name, size, weight in zip(names, sizes, weights, strict=True) if weight and not size]
    if empty or not any(sizes):
        hint = "raise data.holdout or add more rows" if heldout else "add more rows"
        raise DataError(
            f"{', '.join(empty or names)}: no {'held-out' if heldout else 'training'} rows at data.holdout {holdout}; "
            f"{hint}"
        )
    drawn = shares(sizes, weights)
    order = _drawn(found, drawn, np.cumsum([0, *map(len, sets)]), seed)
    if not heldout:
        order = _shuffled(order, seed)
    if not repeat:
        order = order[np.sort(np.unique(order, return_index=True)[1])]
    return Mix(sets, order, [Share(*each) for each in zip(names, sizes, drawn, weights, strict=True)])


def check_sources(specs: Sequence[DatasetSpec]) -> None:
    """Looks for all sources before the first one is read, which may take long.

    Raises:
        DataError: a file is missing, or of no known type.
    """
    for spec in specs:
        if spec.source != BUILTIN:
            find(spec)


def shuffled_rows(specs: Sequence[DatasetSpec], seed: int, screen: Screen) -> datasets.Dataset:
    """All rows of calibration data sets; the built-in one gives its text. Columns as those of `load_mix`.

    Raises:
        DataError: a source cannot be read.
    """
    named = [replace(spec, format="text") if spec.source == BUILTIN else spec for spec in specs]
    sets = [stored_rows(spec, "calibration", screen, whole_text=True) for spec in named]
    used = [rows.data.column("hash").is_valid().to_numpy() for rows in sets]
    return Mix(sets, _shuffled(np.flatnonzero(np.concatenate(used)), seed), ()).rows


def _shuffled(order: np.ndarray, seed: int) -> np.ndarray:
    places = list(range(len(order)))
    random.Random(seed).shuffle(places)
    return order[places]


def label(spec: DatasetSpec) -> str:
    """The name of a data set in counts: its source, and what else tells it from others of that source."""
    details = [detail for detail in (spec.config, spec.split) if detail]
    return spec.source + (f" ({', '.join(details)})" if details else "")


def stored_rows(spec: DatasetSpec, part: Part, screen: Screen, *, whole_text: bool = False) -> datasets.Dataset:
    """All rows of a data set, in the order of its files, those that cannot be used included.

    Args:
        part: of the built-in data; other sources are one.
        screen: says what cannot be used.
        whole_text: see `read_rows`.

    Returns:
        Columns `messages` (JSON), `text`, `hash` (int64), None in rows that cannot be used; `fault` and `unused`, see
        `CheckedRow`.

    Raises:
        DataError: as `read_rows`, or it cannot be kept on disk.
    """
    import datasets

    if spec.source == BUILTIN:
        given = list(_builtin_rows(spec, part))
        key: list[Any] = [[_hash(row) for row in given]]
        rows: Iterator[CheckedRow] = iter(given)
    else:
        source = find(spec)
        asked = [spec.format, spec.columns, spec.limit, whole_text]
        key = [source.key(), asked, screen.tokenizer and tokenizer_key(screen.tokenizer)]
        rows = checked_rows(spec, source.rows(whole_text), screen)
    features = {
        "messages": datasets.Value("string"),
        "text": datasets.Value("string"),
        "hash": datasets.Value("int64"),
        "fault": datasets.Value("string"),
        "unused": datasets.List(datasets.Value("string")),
    }
    found = stored(["rows", *key], functools.partial(_records, rows), features)
    screen.judge(_tally(spec.source, found))
    return found


def _records(rows: Iterator[CheckedRow]) -> Iterator[dict[str, Any]]:
    # What is kept may not be nothing.
    for row in itertools.chain([next(rows, CheckedRow())], rows):
        yield {
            "messages": None if row.messages is None else json.dumps(row.messages, ensure_ascii=False),
            "text": row.text,
            "hash": _hash(row) if row.used else None,
            "fault": row.fault,
            "unused": row.unused,
        }


def _hash(row: CheckedRow) -> int:
    """The first 64 bits of the SHA-256 of its content, less 2^63: Arrow takes no larger numbers from Python."""
    content = json.dumps([row.messages, row.text], ensure_ascii=False, sort_keys=True)
    return int.from_bytes(hashlib.sha256(content.encode("utf-8", "surrogatepass")).digest()[:8], "big") - 2**63


def _tally(source: str, rows: datasets.Dataset) -> Tally:
    """What `Tally` counts as rows are read, of stored ones."""
    import pyarrow.compute

    hashes, faults, unused = (rows.data.column(name) for name in ("hash", "fault", "unused"))
    tally = Tally(source, rows=len(rows), used=len(rows) - hashes.null_count, bad=len(rows) - faults.null_count)
    if tally.bad:
        tally.faults.extend(faults.drop_null()[:SHOWN].to_pylist())
    for entry in pyarrow.compute.value_counts(pyarrow.compute.list_flatten(unused)).to_pylist():
        tally.unused[entry["values"]] = entry["counts"]
    return tally


class _Side(NamedTuple):
    """Usable rows of a data set that are trained on, or those that are held out, in the order of their hashes.

    That order makes the one of a file decide nothing.
    """

    hashes: np.ndarray  # int64
    places: np.ndarray  # in the data set, int64
    held: np.ndarray  # hashes of all rows that it holds out, int64

    def without(self, hashes: np.ndarray) -> _Side:
        """Without the rows that have one of these hashes."""
        keep = ~np.isin(self.hashes, hashes)
        return _Side(self.hashes[keep], self.places[keep], self.held)


def _side(spec: DatasetSpec, rows: datasets.Dataset, heldout: bool, holdout: float) -> _Side:
    column = rows.data.column("hash")
    places = np.flatnonzero(column.is_valid().to_numpy())
    hashes = column.fill_null(0).to_numpy()[places]
    if spec.source == BUILTIN:
        held = np.full(len(hashes), heldout)  # these are the rows of that part
    else:
        held = spec.heldout & ((hashes >> 12) / 2**52 + 0.5 < holdout)
    chosen = np.flatnonzero(held == heldout)
    chosen = chosen[np.argsort(hashes[chosen], kind="stable")]
    return _Side(hashes[chosen], places[chosen], hashes[held])


def _drawn(sides: Sequence[_Side], counts: Sequence[int], first: np.ndarray, seed: int) -> np.ndarray:
    """Places of so many rows of each data set in all of them, in the order of hashes; `first` is where each begins."""
    order, hashes = [], []
    for side, count, start in zip(sides, counts, first, strict=False):
        if count:
            picks = draw(range(len(side.places)), count, seed)
            order.append(side.places[picks] + start)
            hashes.append(side.hashes[picks])
    return np.concatenate(order)[np.argsort(np.concatenate(hashes), kind="stable")]


def _builtin_rows(spec: DatasetSpec, part: Part) -> Iterator[CheckedRow]:
    """Rows of the built-in corpus: instructions, or its text where the format says so."""
    if spec.split or spec.config or spec.columns or spec.streaming or spec.format not in ("auto", "messages", "text"):
        raise DataError("the built-in data has only the formats messages and text, and no split, config or columns")
    if spec.format == "text":
        rows = [CheckedRow(text=text) for text in builtin.text(part)]
    else:
        rows = [CheckedRow(messages=row["messages"]) for row in builtin.instructions(part)]
    yield from rows[: spec.limit]
