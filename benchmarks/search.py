"""Layouts from scores of single layers: how near the sum of scores comes to the loss that is measured.

    python -m benchmarks.search MODEL --calibration c4.jsonl wikipedia.jsonl chat.jsonl:120 --work DIR

Parts: `scores` scores every plan of every layer once; `budgets` solves for each budget, converts the best prediction
and one whose scores were corrected in its company; `pool` converts the other solutions and each kind alone; `loss` asks
for the smallest cache at each of `--losses` and measures the result on text that the choice has not seen; `speed` asks
for each of `--speeds` and times the result again. Without a GPU this takes hours. Parts may share `--work`, which keeps
analysis and scores.
"""

from __future__ import annotations

import argparse
import itertools
import json
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from benchmarks import runner
from uniattn_cli.analysis.measured import Measured
from uniattn_cli.charts import MARKERS, colour
from uniattn_cli.commands.analyze import analyze
from uniattn_cli.layouts.by_scores import by_scores
from uniattn_cli.layouts.choose import compensation_of
from uniattn_cli.layouts.considered import kinds_in_words
from uniattn_cli.layouts.on_demand import ScoresOnDemand
from uniattn_cli.layouts.scores import Score, company_of
from uniattn_cli.layouts.solutions import Wish, loss, pool, problem_of
from uniattn_cli.layouts.solver import Option, layout_of, total
from uniattn_cli.layouts.speed import confirmed
from uniattn_cli.layouts.workbench import Workbench, stderr
from uniattn_cli.modeling.layout_uniattn import AttentionShape, Layout
from uniattn_cli.models.costs import kv_bytes_per_token
from uniattn_cli.models.device import describe_device, timed
from uniattn_cli.models.hub import locate
from uniattn_cli.models.loading import load_config
from uniattn_cli.models.losses import window_divergences
from uniattn_cli.options import RunOptions, Silent
from uniattn_cli.recipe.schema import Recipe
from uniattn_cli.run.directory import RunDir
from uniattn_cli.run.process import join_processes
from uniattn_cli.tables import Table

SETTINGS = ["model.dtype=float32", "layout.search=scores", "evaluation.batch_size=32"]


class Bench:
    """The model, its calibration text and the results so far."""

    def __init__(self, arguments: argparse.Namespace, results: runner.Results):
        self.arguments, self.results = arguments, results
        self.process = join_processes(RunOptions(device=str(arguments.device)), objects=True)
        self.device = self.process.device
        self.options = RunOptions(device=str(self.device), progress=Printed())
        if not self.process.is_main_process:
            # It helps with scores, and only the main one writes.
            results.out = Path(tempfile.mkdtemp()) / "helper.json"
        self.run = RunDir(Path(arguments.work or tempfile.mkdtemp(prefix="uniattn-search-")))
        place = Path(arguments.model)
        model = str(place.absolute()) if place.is_dir() else arguments.model
        specs: list[dict[str, Any]] = []
        for name in arguments.calibration:
            path, _, limit = name.partition(":")
            specs.append({"source": str(Path(path).absolute()), **({"limit": int(limit)} if limit else {})})
        calibration = [f"data.calibration={json.dumps(specs)}"] if specs else []
        kinds = f"layout.kinds=[{', '.join(arguments.kinds)}]"
        settings = [f"model.name={json.dumps(model)}", *SETTINGS, *calibration, kinds, *arguments.set]
        with self.process.main_process_first():
            if not self.run.is_complete("analyze"):
                analyze(model, run_dir=self.run.root, overrides=settings, options=self.options)
        self.recipe = Recipe.load(self.run.recipe, settings)
        self.source = locate(model)
        self.config = load_config(self.source)
        self.measured = Measured.load(self.run.output("analyze"))
        spec = self.recipe.conversion
        results.begin(
            {
                "model": place.name,
                "dtype": self.recipe.model.dtype,
                "device": describe_device(self.device),
                "kinds": list(self.recipe.layout.kinds),
                "calibration": [Path(name).name for name in arguments.calibration],
                "window": spec.length,
                "tokens": {"fit": spec.tokens, "score": self.recipe.layout.score_tokens},
                "align": spec.align,
                "refine": spec.refine,
            }
        )

    @property
    def shape(self) -> AttentionShape:
        return self.measured.shape

    @cached_property
    def workbench(self) -> Workbench:
        return Workbench(self.recipe, self.source, self.measured, self.options)

    def missing(self, key: str) -> bool:
        return bool(self.results.missing("rows", [key]))

    @cached_property
    def scores(self) -> ScoresOnDemand:
        return ScoresOnDemand(self.run, self.workbench, compensation_of(self.recipe), process=self.process)

    def share(self, layout: Layout) -> float:
        """Of the base's KV bytes."""
        own = Layout.own(self.shape.layers)
        return kv_bytes_per_token(layout, self.shape, 1) / kv_bytes_per_token(own, self.shape, 1)

    def wish(self, **fields: Any) -> Wish:
        """What a recipe with these budgets asks."""
        return Wish.of(replace(self.recipe.layout, **fields), self.shape, self.config)

    def compare(self, key: str, layout: Layout, **facts: Any) -> None:
        """Converts a layout as the shortlist does, measures it and adds its row."""
        if not self.missing(key):
            return
        seconds: list[float] = []
        with timed(seconds, self.device):
            (entry,) = self.workbench.validate({key: layout})
        self.add(key, entry.layout, entry.divergence, entry.stderr, convert_seconds=round(seconds[0], 1), **facts)

    def add(self, key: str, layout: Layout, divergence: float, deviation: float, **facts: Any) -> None:
        """One row of a layout that was measured."""
        row = {
            "kinds": kinds_in_words(layout),
            "kv_share": round(self.share(layout), 4),
            "divergence": round(divergence, 5),
            "stderr": round(deviation, 5),
            **facts,
        }
        self.results.add("rows", key, row | {"layers": layout.to_list()}, row)


class Printed(Silent):
    """Notes and warnings as lines."""

    def note(self, text: str) -> None:
        print(text, flush=True)

    warn = note


def run_scores(bench: Bench) -> None:
    """Scores everything, and says how long that takes."""
    if not bench.results.missing("times", ["scores"]):
        return
    _ = bench.workbench.base, bench.workbench.texts  # loading is not scoring
    bench.process.wait_for_everyone()
    cuda = bench.device.type == "cuda"
    if cuda:
        torch.cuda.reset_peak_memory_stats(bench.device)
    seconds: list[float] = []
    with timed(seconds, bench.device):
        scores = bench.scores.known
    facts = {"seconds": round(seconds[0], 1), "processes": bench.process.num_processes, "plans": len(scores)}
    if cuda:
        facts["peak_gib"] = round(torch.cuda.max_memory_allocated(bench.device) / 2**30, 2)
    for (layer, kind), group in itertools.groupby(
        scores, key=lambda score: (score.question.layer, score.question.kind)
    ):
        best = min(group, key=lambda score: score.divergence)
        row = {"divergence": round(best.divergence, 6), "stderr": round(best.stderr, 6)}
        bench.results.content["scores"][f"layer {layer} | {kind}"] = row | {"plan": best.plan.to_dict()}
    bench.results.add("times", "scores", facts)


def run_budgets(bench: Bench) -> None:
    """The best prediction for each budget, and the best of scores that were corrected in its company."""
    for kv in bench.arguments.budgets:
        key = f"kv {kv:g} | scores"
        solution, facts = _solved(bench, kv)
        bench.compare(key, layout_of(solution), **facts)
        key = f"kv {kv:g} | scores, corrected"
        if bench.missing(key):
            started = time.perf_counter()
            company = company_of(bench.workbench, solution)
            found, facts = _solved(bench, kv, company.corrected)
            facts["seconds"] = round(time.perf_counter() - started, 1)
            bench.compare(key, layout_of(found), **facts)


def _solved(
    bench: Bench, kv: float, corrected: Callable[[Sequence[Score]], Sequence[Score]] = lambda scores: scores
) -> tuple[list[Option], dict[str, float]]:
    """The best solution, its prediction, and the seconds that it took, with those of plans that were scored for it."""
    spec, layers, wish = bench.recipe.layout, bench.shape.layers, bench.wish(kv=kv)

    def solve(scores: Sequence[Score]) -> dict[str, list[Option]]:
        solution = wish.best(problem_of(corrected(scores), spec, layers, spec.kinds))
        if solution is None:
            raise SystemExit(f"error: no layout keeps {kv:g} of the KV bytes; give other --budgets")
        return {"": solution}

    started = time.perf_counter()
    (solution,) = bench.scores.settled(solve).values()
    facts = {"predicted": round(total(solution, loss), 5), "seconds": round(time.perf_counter() - started, 2)}
    return solution, facts


def run_pool(bench: Bench) -> None:
    """The other solutions of the pool, and each kind alone."""
    layers = bench.shape.layers
    for kv in bench.arguments.budgets:
        spec, wish = replace(bench.recipe.layout, kv=kv), bench.wish(kv=kv)
        solutions = bench.scores.settled(lambda scores, spec=spec, wish=wish: pool(scores, spec, layers, wish))
        for name, solution in itertools.islice(solutions.items(), 1, None):
            bench.compare(f"kv {kv:g} | {name}", layout_of(solution), predicted=round(total(solution, loss), 5))


def run_losses(bench: Bench) -> None:
    """The smallest cache for each loss, converted with all tokens and measured on text that nothing has seen."""
    texts = bench.workbench.texts
    seen = sum(len(part) for part in (texts.fit, texts.score, texts.check))
    windows = bench.workbench.windows((seen + len(texts.check)) * bench.recipe.conversion.length)
    fresh = windows[seen:]
    for limit in bench.arguments.losses:
        key = f"max_loss {limit:g}"
        if not bench.missing(key):
            continue
        workbench, wish = bench.workbench, bench.wish(max_loss=limit)
        seconds: list[float] = []
        with timed(seconds, bench.device):
            considered = by_scores(bench.run, workbench, wish, compensation_of(bench.recipe), True).considered
        chosen = next(entry for entry in considered.shortlist if entry.layout == considered.chosen)
        model = workbench.converted(considered.chosen, texts.fit)
        rows = window_divergences(workbench.base, model, fresh, batch_size=bench.recipe.evaluation.batch_size)
        facts = {
            "asked": limit,
            "predicted": round(chosen.predicted or 0.0, 5),
            "compared": round(chosen.divergence, 5),
            "tried": len(considered.shortlist),
            "seconds": round(seconds[0], 1),
        }
        bench.add(key, model.config.layout, rows.mean().item(), stderr(rows), **facts)


def run_speeds(bench: Bench) -> None:
    """The layout with the smallest predicted loss for each ratio, and the ratio that the engine measures afterwards."""
    for text in bench.arguments.speeds:
        key = f"speed {text}"
        if not bench.missing(key):
            continue
        recipe = replace(bench.recipe, layout=replace(bench.recipe.layout, speed=text, shortlist=1))
        workbench = replace(bench.workbench, recipe=recipe)
        vars(workbench)["base"] = bench.workbench.base
        seconds: list[float] = []
        with timed(seconds, bench.device):
            found = by_scores(bench.run, workbench, bench.wish(speed=text), compensation_of(recipe), True)
        again = confirmed(workbench, found.layout)
        facts = {"predicted": round(found.predicted, 5), "seconds": round(seconds[0], 1)}
        bench.compare(key, found.layout, speed=round(found.speed or 1.0, 4), speed_again=round(again, 4), **facts)


MEASURES = {
    "scores": run_scores,
    "budgets": run_budgets,
    "pool": run_pool,
    "loss": run_losses,
    "speed": run_speeds,
}
COLUMNS = ["budget", "found by", "changed layers", "KV bytes", "predicted", "measured"]


def markdown(content: runner.Content) -> str:
    """One line per layout, the best of each budget first."""
    rows = sorted(content["rows"].items(), key=lambda item: (item[0].partition(" | ")[0], item[1]["divergence"]))
    lines = []
    for key, row in rows:
        budget, _, name = key.partition(" | ")
        predicted = f"{row['predicted']:.4f}"
        measured = f"{row['divergence']:.4f} ± {1.96 * row['stderr']:.4f}"
        lines.append([budget, name or "scores", row["kinds"], f"{row['kv_share']:.1%}", predicted, measured])
    setting = content["setting"]
    times = [f"{name}: {row['seconds']:g} s" for name, row in content["times"].items()]
    text = (
        "Loss of converted models before training: KL from the base, nats per token (95 %), on text that no score has "
        f"seen; {setting['dtype']}, {setting['device']}, {setting['tokens']['fit']:,} tokens for fits and "
        f"{setting['tokens']['score']:,} for scores. Predicted: the sum of scores. "
        f"Time of the scoring: {'; '.join(times) or 'not measured'}. Made by `benchmarks/search.py`, which explains "
        "what is measured; the JSON file has all numbers."
    )
    return runner.page(f"{setting['model']}: layouts from scores", text, Table("", COLUMNS, lines))


def draw(content: runner.Content, path: Path) -> None:
    """Predicted against measured loss; beside it the loss over the KV bytes."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10.4, 4.4), layout="constrained")
    FigureCanvasAgg(figure)
    left, right = figure.subplots(1, 2)
    series: dict[str, list[dict]] = {}
    for key, row in content["rows"].items():
        series.setdefault(_series(key, content["setting"]["kinds"]), []).append(row)
    most = max(row["divergence"] for row in content["rows"].values())
    for number, (name, rows) in enumerate(series.items()):
        style = {"color": colour(number), "marker": MARKERS[number % len(MARKERS)], "label": name}
        left.scatter([row["predicted"] for row in rows], [row["divergence"] for row in rows], s=24, **style)
        right.scatter([100 * row["kv_share"] for row in rows], [row["divergence"] for row in rows], s=24, **style)
    left.plot([0, most], [0, most], linestyle=":", color="gray", label="equal")
    left.set_xlabel("predicted: sum of the layers' scores, nats per token")
    right.set_xlabel("KV bytes per token kept, % of the base")
    for axes in (left, right):
        axes.set_ylabel("measured: KL from the base, nats per token")
        axes.set_ylim(bottom=0)
    right.legend()
    figure.savefig(path, dpi=110)


def _series(key: str, kinds: list[str]) -> str:
    """Rows of one series have one colour: all kinds together, each kind alone, and the limited loss."""
    name = key.partition(" | ")[2]
    if not name:
        return "scores, limited loss"
    words = name.partition(", ")[2]
    if words in kinds:
        return words
    return "scores" if name == "scores" else "scores, other solutions"


def measure_parts(arguments: argparse.Namespace, results: runner.Results) -> None:
    """All rows of the parts."""
    bench = Bench(arguments, results)
    for part in arguments.parts:
        if part == "scores" or bench.process.is_main_process:
            MEASURES[part](bench)


def add_options(parser: argparse.ArgumentParser) -> None:
    """The options of this benchmark."""
    parser.add_argument("model", help="directory or hub id")
    parser.add_argument("--calibration", nargs="*", default=[], help="FILE or FILE:ROWS; the built-in text without")
    parser.add_argument("--kinds", nargs="*", default=["key", "kv", "early", "softmax", "linear"])
    parser.add_argument("--budgets", nargs="*", type=float, default=[0.9, 0.8, 0.7, 0.6], metavar="SHARE")
    parser.add_argument("--losses", nargs="*", type=float, default=[0.02, 0.05, 0.1], metavar="NATS")
    parser.add_argument("--speeds", nargs="*", default=["1.1@64x8192", "1.2@64x8192"], metavar="RATIO@BATCHxCONTEXT")
    parser.add_argument("--work", type=Path, help="folder of the analysis and the scores")
    parser.add_argument("--set", nargs="*", default=[], metavar="KEY=VALUE", help="further settings of the recipe")
    parser.add_argument("--parts", nargs="*", choices=MEASURES, default=list(MEASURES))


if __name__ == "__main__":
    tables = ("scores", "times", "rows")
    runner.run("search", __doc__, tables, add_options, measure_parts, markdown=markdown, draw=draw)
