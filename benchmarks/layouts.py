"""Cost of layouts, head maps, compensations and kinds before any training, as ratios of perplexity to the base's.

    python -m benchmarks.layouts MODEL --text c4.jsonl --wikitext wiki.tokens \\
        --calibration wikipedia.jsonl chat.jsonl:120 --out docs/benchmarks/layouts.json

`--parts` picks rows, `--mixes` those of the parts `aligned` and `budgets`, of which the second has rows for every
budget of `--budgets`. Layouts are solved for from scores. Evaluation: the first 30,720 tokens of the pages of `--text`
(`c4`; the other pages are calibration text) and the first 65,536 tokens of `--wikitext` (`wt`), in windows of 1,024.
Without a GPU the scores take hours.
"""

from __future__ import annotations

import argparse
import itertools
import tempfile
from collections.abc import Iterable
from dataclasses import replace
from functools import cached_property
from pathlib import Path

import torch

from benchmarks import runner, texts
from uniattn_cli.analysis.measure import measure
from uniattn_cli.analysis.measured import Measured
from uniattn_cli.data.windows import calibration_windows
from uniattn_cli.fitting.fit import fit_layers
from uniattn_cli.fitting.match_maps import Matcher
from uniattn_cli.fitting.match_outputs import Limits, SourceChooser
from uniattn_cli.layouts.fast import frontier
from uniattn_cli.layouts.on_demand import ScoresOnDemand
from uniattn_cli.layouts.shorthand import parse_groups
from uniattn_cli.layouts.solutions import Wish, pool
from uniattn_cli.layouts.solver import layout_of
from uniattn_cli.layouts.workbench import Texts, Workbench
from uniattn_cli.modeling.configuration_uniattn import attention_shape
from uniattn_cli.modeling.layout_uniattn import LayerPlan, Layout
from uniattn_cli.models.building import build_converted
from uniattn_cli.models.costs import count_parameters, kv_bytes_per_token
from uniattn_cli.models.device import describe_device, timed
from uniattn_cli.models.hub import locate
from uniattn_cli.models.loading import load_model
from uniattn_cli.models.losses import window_loss
from uniattn_cli.models.placement import Placement
from uniattn_cli.models.tokenizer import load_tokenizer
from uniattn_cli.options import RunOptions
from uniattn_cli.recipe.schema import AnalysisSpec, ConversionSpec, DatasetSpec, DataSpec, LayoutSpec, ModelSpec, Recipe
from uniattn_cli.run.directory import RunDir
from uniattn_cli.tables import Table

LENGTH = 1024
ANALYSIS_TOKENS, SEARCH_TOKENS, SCORE_TOKENS = 80 * LENGTH, 80 * LENGTH, 24 * LENGTH
# Searched and converted with queries aligned to borrowed keys; those of the part `kinds` are without.
ALIGNED = {
    "softmax": ("softmax",),
    "linear": ("linear",),
    "key": ("key",),
    "kv": ("kv",),
    "softmax + key + kv + linear": ("softmax", "key", "kv", "linear"),
    "early": ("early",),
    "early-kv": ("early-kv",),
    "early + early-kv + linear": ("early", "early-kv", "linear"),
}
# Of these, a row without W_c too: their queries already are as many weights as W_c is for softmax followers.
WITHOUT_COMPENSATION = ("early", "early-kv")
PARTS = ("layouts", "compensation", "heads", "kinds", "aligned", "budgets")


class Bench:
    """The base, its texts and the results so far."""

    def __init__(self, arguments: argparse.Namespace, results: runner.Results):
        self.results = results
        self.device = arguments.device
        self.fit_tokens = arguments.fit_tokens
        source = locate(arguments.model)
        self.tokenizer = load_tokenizer(source)
        self.base = load_model(source, ModelSpec(name=arguments.model, dtype="float32"), self.device)
        self.shape = attention_shape(self.base.config)
        self.folder = tempfile.TemporaryDirectory()
        rest = Path(self.folder.name) / "rest.jsonl"
        self.texts = {
            "c4": texts.split_pages(self.tokenizer, arguments.text, rest, tokens=texts.TEXT_TOKENS, length=LENGTH),
            "wt": texts.text_windows(self.tokenizer, arguments.wikitext, tokens=texts.WIKITEXT_TOKENS, length=LENGTH),
        }
        self.calibration = [arguments.text.name, *(Path(name).name for name in arguments.calibration)]
        specs = [DatasetSpec(source=str(rest), format="text")]
        for name in arguments.calibration:
            path, _, limit = name.partition(":")
            specs.append(DatasetSpec(source=path, limit=int(limit) if limit else None))
        self.recipe = Recipe(
            model=ModelSpec(name=arguments.model, dtype="float32"),
            data=DataSpec(calibration=tuple(specs)),
            analysis=AnalysisSpec(tokens=ANALYSIS_TOKENS, length=LENGTH),
        )
        results.begin(
            {
                "model": Path(arguments.model).name,
                "dtype": "float32",
                "device": describe_device(self.device),
                "window": LENGTH,
                "evaluated_tokens": {name: windows.numel() for name, windows in self.texts.items()},
                "tokens": {
                    "analysis": ANALYSIS_TOKENS,
                    "search fit": SEARCH_TOKENS,
                    "search score": SCORE_TOKENS,
                    "final fit": self.fit_tokens,
                },
            }
        )
        self.perplexities = {name: window_loss(self.base, windows).perplexity for name, windows in self.texts.items()}
        results.content["base"] = self.perplexities
        self.source = source

    @cached_property
    def measured(self) -> Measured:
        """The analysis, made when the first part needs it."""
        with torch.no_grad():
            measured, _ = measure(self.base, self.windows(ANALYSIS_TOKENS), self.recipe.analysis, self.source)
        self.results.content["analysis"] = {
            "seconds": round(measured.seconds, 1),
            "times_a_plain_forward": round(measured.forward_ratio, 2),
        }
        return measured

    def windows(self, tokens: int, skip: int = 0, seed: int = 0) -> torch.Tensor:
        return calibration_windows(self.recipe.data, self.tokenizer, tokens=tokens, length=LENGTH, seed=seed, skip=skip)

    def matcher(self, head_map: str = "grouped", sources: str = "several") -> Matcher:
        return Matcher(self.measured.score, self.shape, head_map, sources)

    def chooser(
        self, head_map: str = "grouped", sources: str = "several", *, leaders: bool = False, match_keys: bool = True
    ) -> SourceChooser:
        matcher = self.matcher(head_map, sources)
        lenders = (lambda layout, layer: list(layout[layer].source_layers)) if leaders else matcher.lenders
        return SourceChooser(matcher, lenders, Limits.of(self.device), match_keys=match_keys)

    def fast(self, followers: int) -> Layout:
        return next(choice.layout for choice in frontier(self.matcher()) if choice.changed == followers)

    def scored(
        self, name: str, kinds: tuple[str, ...], budget: dict[str, float], head_map: str, align: int = 0
    ) -> Layout:
        """The layout with the best prediction for a budget; from the file if it has been found before."""
        if self.results.missing("layouts", [name]):
            spec = LayoutSpec(search="scores", kinds=kinds, head_map=head_map, shortlist=1, **budget)
            recipe = replace(self.recipe, layout=spec, conversion=ConversionSpec(align=align))
            bench = Workbench(recipe, self.source, self.measured, RunOptions(device=str(self.device)))
            score = self.windows(SCORE_TOKENS, SEARCH_TOKENS)
            texts = Texts(self.windows(SEARCH_TOKENS), score, score[:0])
            # What it would load and read.
            vars(bench).update(base=self.base, placement=Placement(self.device), texts=texts)
            wish = Wish.of(spec, self.shape, self.base.config)
            seconds: list[float] = []
            with timed(seconds, self.device):
                # Other budgets and kinds take what has been scored of theirs.
                run = RunDir(Path(self.folder.name) / f"{head_map}-{align}")
                scores = ScoresOnDemand(run, bench, "full")
                (solution,) = scores.settled(lambda scores: pool(scores, spec, self.shape.layers, wish)).values()
            entry = {"seconds": round(seconds[0], 1), "scored": len(scores.known)}
            # Files of a search that went step by step have more than the last.
            self.results.add("layouts", name, entry | {"steps": [layout_of(solution).to_list()]}, entry)
        return Layout.from_list(self.results.content["layouts"][name]["steps"][-1])

    def row(
        self,
        name: str,
        layout: Layout,
        seeds: list[int],
        *,
        chooser: SourceChooser | None = None,
        tokens: int | None = None,
        **spec,
    ) -> None:
        """Converts, evaluates and stores one row for each seed, unless it is there already.

        Nothing is refined unless `spec` says so: rows of these tables are older.
        """
        for key in self.results.missing("rows", [f"{name} | seed {seed}" for seed in seeds]):
            seed = int(key.rpartition(" ")[2])
            torch.manual_seed(seed)
            model = build_converted(self.base, with_compensation(layout, spec))
            windows = self.windows(tokens or self.fit_tokens, seed=seed)
            seconds: list[float] = []
            with timed(seconds, self.device):
                fit_layers(
                    self.base, model, windows, ConversionSpec(**{"refine": 0} | spec), chooser=chooser, batch_size=16
                )
            perplexity = {text: window_loss(model, w, batch_size=16).perplexity for text, w in self.texts.items()}
            final, own = model.config.layout, Layout.own(self.shape.layers)
            ratio = {text: round(value / self.perplexities[text], 4) for text, value in perplexity.items()}
            row = {
                "changed": len(final.changed),
                "kv_share": kv_bytes_per_token(final, self.shape, 1) / kv_bytes_per_token(own, self.shape, 1),
                "parameter_share": count_parameters(self.base.config, final) / count_parameters(self.base.config, own),
                "calibration": self.calibration,
                "fit_tokens": windows.numel(),
                "fit_seconds": round(seconds[0], 1),
                "perplexity": {text: round(value, 3) for text, value in perplexity.items()},
                "ratio": ratio,
            }
            self.results.add("rows", key, row, ratio)


COLUMNS = ["layout", "changed", "KV bytes", "parameters", "tokens of the fit", "c4", "wt", "seeds"]


def markdown(content: dict) -> str:
    """One line per layout, seeds averaged."""
    grouped: dict[str, list[dict]] = {}
    for key, row in content["rows"].items():
        grouped.setdefault(key.split(" | seed")[0], []).append(row)
    setting = content["setting"]
    bases = {text: _bases(content["rows"].values(), text) for text in ("c4", "wt")}
    table = [
        [
            name,
            str(rows[0]["changed"]),
            f"{rows[0]['kv_share']:.1%}",
            f"{rows[0]['parameter_share']:.1%}",
            f"{rows[0]['fit_tokens']:,}",
            *(runner.spread([row["ratio"][text] for row in rows]) for text in ("c4", "wt")),
            str(len(rows)),
        ]
        for name, rows in grouped.items()
    ]
    return runner.page(
        f"{setting['model']}: layouts, head maps, compensations and kinds before any training",
        f"Ratios of perplexity to the base's on the same tokens (c4 {bases['c4']}, wt {bases['wt']}); "
        f"{setting['dtype']}, {setting['device']}, windows of {setting['window']:,} tokens. Made by "
        "`benchmarks/layouts.py`, which explains what is measured; the JSON file has all numbers.",
        Table("", COLUMNS, table),
    )


def _bases(rows: Iterable[dict], text: str) -> str:
    """The base's perplexity in all rows; runs may have had other pages."""
    found = [row["perplexity"][text] / row["ratio"][text] for row in rows]
    least, most = (f"{value:.1f}" for value in (min(found), max(found)))
    return least if least == most else f"{least} to {most}"


def with_compensation(layout: Layout, spec: dict) -> Layout:
    """The layout with the W_c that a fit asks for."""
    rank = spec.get("rank", "full") if spec.get("solve", "both") in ("both", "compensation", "reference") else "none"
    return Layout(
        tuple(replace(plan, compensation=rank) if plan.traits.compensation == "optional" else plan for plan in layout)
    )


def measure_parts(arguments: argparse.Namespace, results: runner.Results) -> None:
    """All rows of the parts."""
    bench, parts, seeds = Bench(arguments, results), arguments.parts, arguments.seeds
    if set(parts) - {"aligned", "budgets"}:
        run_unaligned(bench, parts, seeds)
    if "budgets" in parts:
        run_budgets(bench, arguments.mixes, sorted(arguments.budgets, reverse=True), seeds)
    if "aligned" in parts:
        align, refined = ConversionSpec().align, {"refine": ConversionSpec().refine}
        for name in arguments.mixes:
            layout = bench.scored(f"{name}, aligned", ALIGNED[name], {"kv": 0.8}, "free", align)
            bench.row(f"KV 80 %, {name}, aligned", layout, seeds)
            bench.row(f"KV 80 %, {name}, refined", layout, seeds, **refined)
            if name in WITHOUT_COMPENSATION:
                bench.row(f"KV 80 %, {name}, aligned, no W_c", layout, seeds, solve="output")
                bench.row(f"KV 80 %, {name}, refined, no W_c", layout, seeds, solve="output", **refined)


def run_budgets(bench: Bench, mixes: list[str], budgets: list[float], seeds: list[int]) -> None:
    """Every budget; early layers without W_c."""
    for name, share in itertools.product(mixes, budgets):
        layout = bench.scored(f"{name}, {share:.0%}", ALIGNED[name], {"kv": share}, "free", ConversionSpec().align)
        spec = {"solve": "output"} if name in WITHOUT_COMPENSATION else {}
        bench.row(f"KV {share:.0%}, {name}", layout, seeds, refine=ConversionSpec().refine, **spec)


def run_unaligned(bench: Bench, parts: list[str], seeds: list[int]) -> None:
    """All parts but `aligned`; they compare with layouts of softmax followers."""
    names = {12: "softmax", 8: "8 softmax"}
    paper = {count: parse_groups(groups, bench.shape, "full") for count, groups in ((12, "paper"), (8, "14-29:2"))}
    few = {"seeds": [0], "tokens": 80 * LENGTH}
    for count, name in names.items():
        free, grouped = (
            bench.scored(f"{name}, {heads}", ("softmax",), {"followers": count}, heads) for heads in ("free", "grouped")
        )
        if "layouts" in parts:
            own = {head_map: bench.chooser(head_map, "one", leaders=True) for head_map in ("free", "grouped")}
            bench.row(f"{count} paper, free", paper[count], seeds, chooser=own["free"])
            bench.row(f"{count} paper, grouped", paper[count], seeds, chooser=own["grouped"])
            fast = bench.fast(count)
            bench.row(f"{count} similarity alone", fast, seeds)
            bench.row(f"{count} fast, grouped", fast, seeds, chooser=bench.chooser())
            bench.row(f"{count} fast, free", fast, seeds, chooser=bench.chooser("free"))
            bench.row(f"{count} scores, grouped", grouped, seeds)
            bench.row(f"{count} scores, free", free, seeds)
        if "compensation" in parts:
            for solve in ("none", "reference", "compensation", "output", "both"):
                bench.row(f"{count} scores, solve {solve}", grouped, **few, solve=solve)
            for rank in (32, 64, 128):
                bench.row(f"{count} scores, rank {rank}", grouped, **few, rank=rank)
        if "heads" in parts:
            bench.row(f"{count} scores, heads identity", nearest(grouped), **few)
            for head_map, sources in itertools.product(("grouped", "free"), ("one", "several")):
                name = f"{count} scores, heads {head_map} from {sources}"
                bench.row(name, grouped, **few, chooser=bench.chooser(head_map, sources))
    if "compensation" in parts:
        for solve in ("none", "reference", "compensation", "both"):
            bench.row(f"12 paper identity, solve {solve}", paper[12], **few, solve=solve)
    if "kinds" in parts:
        budget = {"kv": 0.8}
        for kind in ("kv", "linear", "none"):
            bench.row(f"KV 80 %, {kind} alone", bench.scored(kind, (kind,), budget, "grouped"), seeds, align=0)
        softmax = bench.scored("softmax, free", ("softmax",), {"followers": 12}, "free")
        bench.row("KV 80 %, softmax alone", softmax, seeds)
        mixed = bench.scored("mixed", ("softmax", "kv", "linear"), budget, "free")
        bench.row("KV 80 %, softmax + kv + linear", mixed, seeds, align=0)


def nearest(layout: Layout) -> Layout:
    """The same followers with all heads from the nearest layer before that computes its own map."""
    own = [index for index, plan in enumerate(layout) if plan.kind == "own"]
    return Layout(
        tuple(
            plan if plan.kind == "own" else LayerPlan("softmax", leader=max(o for o in own if o < index))
            for index, plan in enumerate(layout)
        )
    )


def add_options(parser: argparse.ArgumentParser) -> None:
    """The options of this benchmark."""
    texts.add_options(parser, seeds=[0])
    parser.add_argument("--calibration", nargs="*", default=[], help="more calibration text, FILE or FILE:ROWS")
    parser.add_argument("--fit-tokens", type=int, default=448 * LENGTH, help="tokens of the fits that are not compared")
    parser.add_argument("--parts", nargs="*", choices=PARTS, default=list(PARTS))
    parser.add_argument(
        "--mixes", nargs="*", choices=ALIGNED, default=list(ALIGNED), help="of the parts `aligned` and `budgets`"
    )
    parser.add_argument(
        "--budgets", nargs="*", type=float, default=[0.8, 0.7, 0.6], metavar="SHARE", help="of KV bytes"
    )


if __name__ == "__main__":
    tables = ("layouts", "rows")
    runner.run("layouts", __doc__, tables, add_options, measure_parts, markdown=markdown, portable=True)
