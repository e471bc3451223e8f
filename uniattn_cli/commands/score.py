"""`uniattn score`: what every plan of every layer costs, once for all budgets."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from uniattn_cli.analysis.measured import Measured
from uniattn_cli.layouts.choose import check_analysis, check_protected, check_rank, compensation_of
from uniattn_cli.layouts.considered import frontier_table
from uniattn_cli.layouts.on_demand import ScoresOnDemand
from uniattn_cli.layouts.scores import Score
from uniattn_cli.layouts.solutions import frontier, frontier_solutions
from uniattn_cli.layouts.workbench import Workbench
from uniattn_cli.modeling.configuration_uniattn import attention_shape
from uniattn_cli.models.loading import load_config
from uniattn_cli.models.of_run import base_of
from uniattn_cli.options import RunOptions, Silent
from uniattn_cli.recipe.schema import Recipe
from uniattn_cli.run.directory import RunDir
from uniattn_cli.run.lock import alone
from uniattn_cli.run.process import join_processes
from uniattn_cli.tables import NOTHING, Result, Table


@dataclass(frozen=True)
class Scoring(Result):
    """Result of `score`.

    Attributes:
        scores: of all plans that the recipe allows.
        directory: where they are.
    """

    scores: list[Score]
    directory: Path


@alone
def score(*, run_dir: Path | str = ".", overrides: Sequence[str] = (), options: RunOptions = RunOptions()) -> Scoring:
    """Converts every plan that the recipe allows, alone, measures the loss and writes `scores/`.

    What was scored before with the same model, text and fit is not scored again, and an interrupted run goes on.
    Several processes, started by `torchrun`, share the layers among them.

    Args:
        run_dir: holds `recipe.yaml` and `analysis/`.
        overrides: `key.path=value` strings for the recipe.
        options: device, force (score all anew), progress.

    Raises:
        UniAttnError: one of its subclasses, with one clear line.
    """
    run = RunDir(run_dir)
    # Any kinds may be scored, whatever search the recipe has.
    recipe = Recipe.load(run.recipe, [*overrides, "layout.search=scores"])
    source = base_of(recipe)
    shape = attention_shape(load_config(source))
    rank = compensation_of(recipe)
    check_rank(rank, shape)
    check_protected(recipe.layout, shape)
    check_analysis(run, recipe, source.fingerprint)
    process = join_processes(options, objects=True)  # a device that is not there is told before any work
    progress = options.progress if process.is_main_process else Silent()
    own = replace(options, device=str(process.device), progress=progress)
    bench = Workbench(recipe, source, Measured.load(run.output("analyze")), own)
    found = ScoresOnDemand(run, bench, rank, process=process, force=options.force)
    # What the smallest caches take is scored too.
    found.settled(lambda scores: frontier_solutions(scores, recipe.layout, shape))
    scores = found.known
    output = run.output("score")
    notes = [
        f"{len(scores)} plans, scored on {bench.texts.score.numel():,} tokens; of each kind the best is shown",
        f"scores: {output}; next: uniattn convert --search scores",
    ]
    tables = [_table(scores, recipe.layout.kinds)]
    if process.is_main_process:
        points = frontier(scores, recipe.layout, shape)
        tables.append(frontier_table(points, shape, bench.measured.element_size))
    return Scoring(scores, output, title="scores", tables=tables, notes=notes)


def _table(scores: Sequence[Score], kinds: Sequence[str]) -> Table:
    """The smallest divergence of each kind in each layer."""
    rows = []
    for layer in dict.fromkeys(score.question.layer for score in scores):
        best = {}
        for kind in kinds:
            found = [each for each in scores if (each.question.layer, each.question.kind) == (layer, kind)]
            best[kind] = min(found, key=lambda each: each.divergence, default=None)
        rows.append([str(layer), *(NOTHING if each is None else _figure(each) for each in best.values())])
    return Table("KL from the base with one layer replaced, nats per token (± standard error)", ["layer", *kinds], rows)


def _figure(score: Score) -> str:
    if score.stderr != score.stderr:
        return f"{score.divergence:.4f}"
    return f"{score.divergence:.4f} ± {score.stderr:.4f}"
