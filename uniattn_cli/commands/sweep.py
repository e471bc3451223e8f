"""`uniattn sweep`: conversions under several budgets, kinds of layer and fits, all scored in the same way, in one plot.

Each point is a run directory of its own in `sweep/`, with the analysis of the run; the base is scored once, and so are
plans for all points of the same fit. After an interruption the same command resumes.
"""

from __future__ import annotations

import contextlib
import hashlib
import itertools
import json
import os
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from uniattn_cli.analysis.measured import Measured
from uniattn_cli.commands.compare import write_comparison
from uniattn_cli.commands.convert import convert
from uniattn_cli.commands.evaluate import evaluate
from uniattn_cli.errors import LayoutError, StageError
from uniattn_cli.evaluation.comparison import PLOT, Merged, Part, table
from uniattn_cli.evaluation.figures import RESULTS, read_results
from uniattn_cli.layouts.choose import check_analysis
from uniattn_cli.layouts.scores import inputs_of
from uniattn_cli.layouts.workbench import Workbench
from uniattn_cli.models.hub import Source
from uniattn_cli.models.of_run import base_of
from uniattn_cli.options import RunOptions
from uniattn_cli.recipe.files import apply_overrides, read_tree, write_tree
from uniattn_cli.recipe.reading import move_paths
from uniattn_cli.recipe.schema import BUDGETS, Recipe, fast_search_takes
from uniattn_cli.run.directory import RunDir
from uniattn_cli.run.files import read_json, remove, taken, write_json
from uniattn_cli.run.lock import alone
from uniattn_cli.tables import Result, Table

FOLDER = "sweep"
POINT_FILE = "point.json"
SUMMARY = "sweep.json"
SCORES = "scores"
# Scores of plans, for each fit.
PLANS = "plans"
DEFAULT_KV = (0.9, 0.8, 0.7)


@dataclass(frozen=True)
class SweepPoint:
    """One conversion to try.

    Attributes:
        unit: `kv` or `followers`.
        limit: the budget in this unit.
        kinds: kinds of layer that may be used.
        solve: what the fit solves.
    """

    unit: str
    limit: float
    kinds: tuple[str, ...]
    solve: str

    @property
    def name(self) -> str:
        """Names the point in tables and its folder."""
        return f"{self.unit}{self.limit:g}-{'+'.join(self.kinds)}-{self.solve}"

    def overrides(self, search: str) -> list[str]:
        """The settings of the point; several kinds, and those that do not borrow, are more than a fast search takes.

        Args:
            search: of the recipe.
        """
        if not fast_search_takes(self.kinds):
            search = "scores"
        budgets = dict.fromkeys(BUDGETS, "null") | {self.unit: f"{self.limit:g}"}
        return [
            "layout.groups=auto",
            *(f"layout.{unit}={limit}" for unit, limit in budgets.items()),
            "layout.save=kv",
            f"layout.kinds=[{', '.join(self.kinds)}]",
            f"layout.search={search}",
            f"conversion.solve={self.solve}",
        ]


@dataclass(frozen=True)
class Sweep(Result):
    """Result of `sweep`.

    Attributes:
        directory: what was written.
        skipped: why, for each point that is impossible.
    """

    directory: Path
    skipped: dict[str, str]


@alone
def sweep(
    *,
    run_dir: Path | str = ".",
    kv: Sequence[float] = (),
    followers: Sequence[int] = (),
    kinds: Sequence[Sequence[str]] = (),
    solve: Sequence[str] = (),
    discard: bool = False,
    overrides: Sequence[str] = (),
    options: RunOptions = RunOptions(),
) -> Sweep:
    """Converts and scores the model at every combination of budgets, kinds and fits.

    Args:
        run_dir: holds `recipe.yaml` and `analysis/`; gets `sweep/`.
        kv: budgets, as shares of the KV bytes; `DEFAULT_KV` if there is no other budget.
        followers: budgets, as numbers of changed layers.
        kinds: sets of kinds that a layout may use; the recipe's if there are none.
        solve: what the fit solves; the recipe's if there is none. With `both` all kinds have a W_c, unless the recipe
            has another `conversion.rank`.
        discard: delete the weights of each point once it is scored.
        overrides: `key.path=value` settings that override the recipe's at every point.
        options: device, starting over, progress.

    Raises:
        StageError: there is no analysis of the recipe's model.
        UniAttnError: as `convert` and `evaluate`; a budget that cannot be met only skips its point.
    """
    run = RunDir(run_dir)
    recipe = Recipe.load(run.recipe, overrides)
    options.torch_device()  # a device that is not there is told before any work
    source = base_of(recipe)
    check_analysis(run, recipe, source.fingerprint)
    if "both" in solve and recipe.conversion.rank == "auto":
        # Who names what is solved wants a W_c from `both`, also in kinds that have none by default.
        overrides = [*overrides, "conversion.rank=full"]
    points = _points(recipe, kv, followers, kinds, solve)
    # All faults are told before the first point is begun.
    recipes = {
        point: Recipe.load(run.recipe, [*overrides, *point.overrides(recipe.layout.search), "layout.layers=null"])
        for point in points
    }
    folder = run.root / FOLDER
    if options.force and taken(folder):
        remove(folder)
    skipped = {}
    for number, point in enumerate(points, 1):
        options.progress.note(f"{number} of {len(points)}: {point.name}")
        place = RunDir(folder / point.name)
        reason = _run_point(run, place, recipes[point], source, folder / SCORES, discard, options)
        if reason is not None:
            skipped[point.name] = reason
            options.progress.note(f"{point.name} is impossible and skipped: {reason}")
    done = [point for point in points if point.name not in skipped]
    return _summarise(folder, points, done, skipped)


def _points(
    recipe: Recipe,
    kv: Sequence[float],
    followers: Sequence[int],
    kinds: Sequence[Sequence[str]],
    solve: Sequence[str],
) -> list[SweepPoint]:
    budgets = [*(("kv", share) for share in kv), *(("followers", count) for count in followers)]
    budgets = budgets or [("kv", share) for share in DEFAULT_KV]
    sets = [tuple(each) for each in kinds] or [recipe.layout.kinds]
    solves = list(solve) or [recipe.conversion.solve]
    found = (SweepPoint(*budget, *others) for others in itertools.product(sets, solves) for budget in budgets)
    return list(dict.fromkeys(found))


def _run_point(
    run: RunDir, place: RunDir, recipe: Recipe, source: Source, scores: Path, discard: bool, options: RunOptions
) -> str | None:
    """Converts and scores one point, as far as that is not done. Returns why it is impossible, else None."""
    record = {"settings": recipe.to_dict(), "model": source.fingerprint, "analysis": run.record("analyze")["finished"]}
    record = json.loads(json.dumps(record))
    known = _read_point(place)
    if known is None or known.get("record") != record:
        _begin(run, place, recipe, record)
    elif known["impossible"]:
        return known["impossible"]
    if place.is_complete("eval"):
        return None
    # The point's folder is this tool's own: what lies in it without being complete is left from an interruption.
    quiet = RunOptions(device=options.device, force=True, progress=options.progress)
    if not place.is_complete("convert"):
        try:
            with _scores_shared(run, place, recipe, source, options):
                convert(run_dir=place.root, options=quiet)
        except LayoutError as error:
            _write_point(place, record, str(error))
            return str(error)
    evaluate(run_dir=place.root, scores=scores, options=quiet)
    if discard:
        remove(place.output("convert"))
    return None


def _begin(run: RunDir, place: RunDir, recipe: Recipe, record: dict[str, Any]) -> None:
    """A fresh folder with the point's recipe and the analysis of the run."""
    if taken(place.root):
        remove(place.root)
    place.root.mkdir(parents=True)
    tree = read_tree(run.recipe)
    tree.get("layout", {}).pop("layers", None)
    changed = recipe.to_dict()
    settings = [
        f"{section}.{key}={json.dumps(value)}"
        for section, values in changed.items()
        if isinstance(values, dict)
        for key, value in values.items()
    ]
    apply_overrides(tree, [*settings, f"seed={recipe.seed}"])
    move_paths(Recipe, tree, run.root, place.root)
    write_tree(tree, place.recipe)
    _link(place.output("analyze"), run.output("analyze"))
    _write_point(place, record, None)


def _link(name: Path, target: Path) -> None:
    name.symlink_to(os.path.relpath(target.resolve(), name.parent.resolve()), target_is_directory=True)


@contextlib.contextmanager
def _scores_shared(run: RunDir, place: RunDir, recipe: Recipe, source: Source, options: RunOptions) -> Iterator[None]:
    """Gives a point that is searched by scores those that there are of its fit, and keeps what it adds for others."""
    if recipe.layout.search != "scores":
        yield
        return
    inputs = inputs_of(Workbench(recipe, source, Measured.load(run.output("analyze")), options))
    digest = hashlib.sha256(json.dumps(inputs).encode()).hexdigest()[:8]
    own, shared = place.output("score"), RunDir(run.root / FOLDER / PLANS / digest)
    known = [each for each in (shared, run) if each.is_complete("score") and each.record("score")["inputs"] == inputs]
    if known and not taken(own):
        _link(own, known[0].output("score"))
    try:
        yield
    finally:
        if place.is_complete("score") and not own.is_symlink():
            kept = shared.output("score")
            kept.parent.mkdir(parents=True, exist_ok=True)
            if taken(kept):
                remove(kept)
            own.rename(kept)
            _link(own, kept)


def _write_point(place: RunDir, record: dict[str, Any], impossible: str | None) -> None:
    write_json(place.root / POINT_FILE, {"record": record, "impossible": impossible}, finite=False)


def _read_point(place: RunDir) -> dict[str, Any] | None:
    try:
        return read_json(place.root / POINT_FILE, "the point starts over")
    except StageError:
        return None


def _summarise(
    folder: Path, points: Sequence[SweepPoint], done: Sequence[SweepPoint], skipped: dict[str, str]
) -> Sweep:
    tables, notes = [], []
    if done:
        merged = _merged(folder, done)
        tables.append(table(merged, "Quality and cost of every point (± one standard error)"))
        notes += [note for note in merged.notes if not note.startswith("trained/")]
    if skipped:
        rows = [[name, reason] for name, reason in skipped.items()]
        tables.append(Table("Impossible", ["point", "reason"], rows))
    summary = {
        "schema": 1,
        "points": [{"name": point.name, **asdict(point), "impossible": skipped.get(point.name)} for point in points],
        "fronts": merged.fronts if done else {},
    }
    write_json(folder / SUMMARY, summary)
    if not done:
        raise StageError(f"no point of the sweep is possible; {next(iter(skipped.values()))}")
    notes.append(f"Plot: {folder / PLOT}; all figures: {folder / 'comparison.json'}; points: {folder / SUMMARY}")
    title = f"{len(done)} of {len(points)} points scored"
    return Sweep(folder, skipped, title=title, tables=tables, notes=notes)


def _merged(folder: Path, done: Sequence[SweepPoint]) -> Merged:
    parts = []
    for point in done:
        path = folder / point.name / "evaluation" / RESULTS
        results = read_results(path)
        models = {point.name if name == "converted" else name: model for name, model in results["models"].items()}
        parts.append(Part("", {**results, "models": models}, str(path)))
    return write_comparison(folder, parts, "uniattn sweep")
