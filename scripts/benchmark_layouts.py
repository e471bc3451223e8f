"""What layouts, head maps, compensations and kinds cost before any training, as ratios of perplexity to the base's.

    python scripts/benchmark_layouts.py MODEL --text c4.jsonl --wikitext wiki.tokens \\
        --calibration wikipedia.jsonl chat.jsonl:120 --out docs/benchmarks/layouts.json

Rows already in the output are not measured again, so that a run can be continued or extended; `--parts` picks some,
`--mixes` some of the part `aligned`. Several processes, each with its own `--out`, share the work; `--merge` puts their
files together. A table of the same name with `.md` is written beside the JSON. Evaluation: the first 30,720 tokens of
the pages of `--text` (`c4`; the other pages are calibration text) and the first 65,536 tokens of `--wikitext` (`wt`),
in windows of 1,024. Needs a GPU for the searches to end in minutes.
"""

from __future__ import annotations

import argparse
import json
import platform
import tempfile
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from functools import cached_property
from pathlib import Path

import numpy as np
import torch
import transformers

from uniattn_cli.analysis.measure import measure
from uniattn_cli.analysis.measured import Measured
from uniattn_cli.data import splits
from uniattn_cli.data.windows import calibration_windows
from uniattn_cli.fitting.fit import fit_layers
from uniattn_cli.fitting.match_maps import Matcher
from uniattn_cli.fitting.match_outputs import Limits, SourceChooser
from uniattn_cli.layouts.budget import Budget
from uniattn_cli.layouts.fast import frontier
from uniattn_cli.layouts.greedy import ThoroughSearch
from uniattn_cli.layouts.shorthand import parse_groups
from uniattn_cli.layouts.thorough import proposer
from uniattn_cli.modeling.configuration_uniattn import attention_shape
from uniattn_cli.modeling.layout_uniattn import LayerPlan, Layout
from uniattn_cli.models.building import build_converted
from uniattn_cli.models.costs import count_parameters, kv_bytes_per_token
from uniattn_cli.models.hub import locate
from uniattn_cli.models.loading import load_model, load_tokenizer
from uniattn_cli.models.losses import window_loss
from uniattn_cli.recipe.schema import AnalysisSpec, ConversionSpec, DatasetSpec, DataSpec, LayoutSpec, ModelSpec, Recipe

LENGTH = 1024
TEXT_TOKENS, WIKITEXT_TOKENS = 30 * LENGTH, 64 * LENGTH
ANALYSIS_TOKENS, SEARCH_TOKENS, SCORE_TOKENS = 80 * LENGTH, 80 * LENGTH, 24 * LENGTH
KINDS = ("softmax", "kv", "linear", "none")
# Searched and converted with queries aligned to borrowed keys; those above, with `kv` and a mix, were without.
ALIGNED = {"key": ("key",), "kv": ("kv",), "softmax + key + kv + linear": ("softmax", "key", "kv", "linear")}
PARTS = ("layouts", "compensation", "heads", "kinds", "aligned")


class Bench:
    """The base, its texts and the results so far."""

    def __init__(self, arguments: argparse.Namespace):
        self.out = Path(arguments.out)
        self.device = torch.device(arguments.device)
        self.fit_tokens = arguments.fit_tokens
        source = locate(arguments.model)
        self.tokenizer = load_tokenizer(source)
        self.base = load_model(source, ModelSpec(name=arguments.model, dtype="float32"), self.device)
        self.shape = attention_shape(self.base.config)
        self.folder = tempfile.TemporaryDirectory()
        text, rest = self._split(Path(arguments.text))
        wikitext = splits.encode(self.tokenizer, Path(arguments.wikitext).read_text(encoding="utf-8"))
        self.texts = {"c4": text, "wt": torch.tensor(wikitext[:WIKITEXT_TOKENS]).view(-1, LENGTH)}
        self.calibration = [Path(arguments.text).name, *(Path(name).name for name in arguments.calibration)]
        specs = [DatasetSpec(source=str(rest), format="text")]
        for name in arguments.calibration:
            path, _, limit = name.partition(":")
            specs.append(DatasetSpec(source=path, limit=int(limit) if limit else None))
        self.recipe = Recipe(
            model=ModelSpec(name=arguments.model, dtype="float32"),
            data=DataSpec(calibration=tuple(specs)),
            analysis=AnalysisSpec(tokens=ANALYSIS_TOKENS, length=LENGTH),
        )
        self.content = json.loads(self.out.read_text()) if self.out.exists() else {"layouts": {}, "rows": {}}
        base = {name: window_loss(self.base, windows).perplexity for name, windows in self.texts.items()}
        self.content |= {"base": base, "setting": self._setting(arguments)}
        print("base", base, flush=True)
        self.perplexities = base
        self.source = source

    def _setting(self, arguments: argparse.Namespace) -> dict:
        on_gpu = self.device.type == "cuda"
        return {
            "model": Path(arguments.model).name,
            "dtype": "float32",
            "device": torch.cuda.get_device_name() if on_gpu else platform.processor() or "CPU",
            "torch": torch.__version__,
            "transformers": transformers.__version__,
            "window": LENGTH,
            "evaluated_tokens": {name: windows.numel() for name, windows in self.texts.items()},
            "tokens": {
                "analysis": ANALYSIS_TOKENS,
                "search fit": SEARCH_TOKENS,
                "search score": SCORE_TOKENS,
                "final fit": self.fit_tokens,
            },
        }

    def _split(self, path: Path) -> tuple[torch.Tensor, Path]:
        """Evaluation windows from the first pages, and a file with the other pages."""
        pages = [json.loads(line)["text"] for line in path.read_text(encoding="utf-8").splitlines()]
        ids: list[int] = []
        used = 0
        while len(ids) < TEXT_TOKENS:
            ids += [*splits.encode(self.tokenizer, pages[used]), self.tokenizer.eos_token_id]
            used += 1
        rest = Path(self.folder.name) / "rest.jsonl"
        rest.write_text("".join(json.dumps({"text": page}) + "\n" for page in pages[used:]), encoding="utf-8")
        return torch.tensor(ids[:TEXT_TOKENS]).view(-1, LENGTH), rest

    @cached_property
    def measured(self) -> Measured:
        """The analysis, made when the first part needs it."""
        started = time.perf_counter()
        with torch.no_grad():
            measured, _ = measure(self.base, self.windows(ANALYSIS_TOKENS), self.recipe.analysis, self.source)
        self.content["analysis"] = {
            "seconds": round(time.perf_counter() - started, 1),
            "times_a_plain_forward": round(measured.forward_ratio, 2),
        }
        print("analysis", self.content["analysis"], flush=True)
        return measured

    def windows(self, tokens: int, skip: int = 0, seed: int = 0) -> torch.Tensor:
        return calibration_windows(self.recipe.data, self.tokenizer, tokens=tokens, length=LENGTH, seed=seed, skip=skip)

    def matcher(self, head_map: str = "grouped", sources: str = "several", metric: str | None = None) -> Matcher:
        similarity = self.measured.score if metric is None else self.measured.heads[metric]
        return Matcher(similarity, self.shape, head_map, sources)

    def chooser(
        self, head_map: str = "grouped", sources: str = "several", *, leaders: bool = False, match_keys: bool = True
    ) -> SourceChooser:
        matcher = self.matcher(head_map, sources)
        lenders = (lambda layout, layer: list(layout[layer].source_layers)) if leaders else matcher.lenders
        return SourceChooser(matcher, lenders, Limits.of(self.device), match_keys=match_keys)

    def fast(self, followers: int, **kwargs) -> Layout:
        return next(c.layout for c in frontier(self.matcher(**kwargs)) if c.followers == followers)

    def searched(
        self, name: str, kinds: tuple[str, ...], budget: LayoutSpec, head_map: str, align: int = 0
    ) -> list[Layout]:
        """The layouts of all steps of a thorough search; from the file if it has been run before."""
        if name not in self.content["layouts"]:
            started = time.perf_counter()
            search = ThoroughSearch(
                self.base,
                self.windows(SEARCH_TOKENS),
                self.windows(SCORE_TOKENS, SEARCH_TOKENS),
                ConversionSpec(align=align),
                proposer(self.matcher(head_map), kinds, "full"),
                chooser=self.chooser(head_map, match_keys=align > 0),
            )
            limit = Budget.of(budget, self.shape, self.base.config)
            steps = search.run(limit.met, saved=limit.saved)
            seconds = round(time.perf_counter() - started, 1)
            self.content["layouts"][name] = {
                "seconds": seconds,
                "measured": sum(step.measured for step in steps),
                "divergences": [round(step.divergence, 5) for step in steps],
                "steps": [step.layout.to_list() for step in steps],
            }
            print("search", name, seconds, "s", flush=True)
            self.save()
        return [Layout.from_list(step) for step in self.content["layouts"][name]["steps"]]

    def row(
        self,
        name: str,
        layout: Callable[[], Layout],
        seeds: list[int],
        *,
        chooser: SourceChooser | None = None,
        tokens: int | None = None,
        **spec,
    ) -> None:
        """Converts, evaluates and stores one row for each seed, unless it is there already."""
        for seed in seeds:
            key = f"{name} | seed {seed}"
            if key in self.content["rows"]:
                continue
            torch.manual_seed(seed)
            given = with_compensation(layout(), spec)
            model = build_converted(self.base, given)
            started = time.perf_counter()
            windows = self.windows(tokens or self.fit_tokens, seed=seed)
            fit_layers(self.base, model, windows, ConversionSpec(**spec), chooser=chooser, batch_size=16)
            seconds = time.perf_counter() - started
            result = {text: window_loss(model, w, batch_size=16).perplexity for text, w in self.texts.items()}
            final = model.config.layout
            own = Layout.own(self.shape.layers)
            self.content["rows"][key] = {
                "changed": len(final.changed),
                "kv_share": kv_bytes_per_token(final, self.shape, 1) / kv_bytes_per_token(own, self.shape, 1),
                "parameter_share": count_parameters(self.base.config, final) / count_parameters(self.base.config, own),
                "calibration": self.calibration,
                "fit_tokens": windows.numel(),
                "fit_seconds": round(seconds, 1),
                "perplexity": {text: round(value, 3) for text, value in result.items()},
                "ratio": {text: round(value / self.perplexities[text], 4) for text, value in result.items()},
            }
            print(key, self.content["rows"][key]["ratio"], f"{seconds:.1f} s", flush=True)
            self.save()

    def save(self) -> None:
        """Writes JSON and table."""
        write(self.content, self.out)


def write(content: dict, out: Path) -> None:
    """Writes JSON and table."""
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    # A search is kept before there is a row of its layouts.
    if content["rows"]:
        out.with_suffix(".md").write_text(markdown(content), encoding="utf-8")


def merged(contents: Sequence[dict]) -> dict:
    """One file's content from those of several processes."""
    together = contents[0]
    for content in contents[1:]:
        if content["setting"] != together["setting"]:
            raise SystemExit("these files hold rows of different settings")
        for name in ("layouts", "rows"):
            together[name] |= content[name]
    return together


def markdown(content: dict) -> str:
    """One line per row, seeds averaged."""
    grouped: dict[str, list[dict]] = {}
    for key, row in content["rows"].items():
        grouped.setdefault(key.split(" | seed")[0], []).append(row)
    setting = content["setting"]
    bases = {text: _bases(content["rows"].values(), text) for text in ("c4", "wt")}
    lines = [
        f"# {setting['model']}: layouts, head maps, compensations and kinds before any training",
        "",
        f"Ratios of perplexity to the base's on the same tokens (c4 {bases['c4']}, wt {bases['wt']}); "
        f"{setting['dtype']}, {setting['device']}, windows of {setting['window']:,} tokens. Made by "
        "`scripts/benchmark_layouts.py`, which says what is measured; all numbers are in the JSON file beside.",
        "",
        "| what | changed | KV bytes | parameters | tokens of the fit | c4 | wt | seeds |",
        "| :--- | ---: | ---: | ---: | ---: | ---: | ---: | ---: |",
    ]
    for name, rows in grouped.items():
        cells = [
            name.replace("|", "/"),
            str(rows[0]["changed"]),
            f"{rows[0]['kv_share']:.1%}",
            f"{rows[0]['parameter_share']:.1%}",
            f"{rows[0]['fit_tokens']:,}",
        ]
        for text in ("c4", "wt"):
            values = [row["ratio"][text] for row in rows]
            spread = f" ± {np.std(values):.3f}" if len(values) > 1 else ""
            cells.append(f"{np.mean(values):.3f}{spread}")
        lines.append("| " + " | ".join([*cells, str(len(rows))]) + " |")
    return "\n".join(lines) + "\n"


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


def run(bench: Bench, parts: list[str], seeds: list[int], mixes: list[str]) -> None:
    """All rows of the parts."""
    if set(parts) - {"aligned"}:
        run_unaligned(bench, parts, seeds)
    if "aligned" in parts:
        align = ConversionSpec().align
        for name in mixes:
            steps = bench.searched(f"{name}, aligned", ALIGNED[name], LayoutSpec(kv=0.8), "free", align)
            bench.row(f"KV 80 %, {name}, aligned", lambda s=steps: s[-1], seeds)


def run_unaligned(bench: Bench, parts: list[str], seeds: list[int]) -> None:
    """All parts but `aligned`; they compare with layouts of softmax followers."""
    free = bench.searched("softmax, free", ("softmax",), LayoutSpec(followers=12), "free")
    grouped = bench.searched("softmax, grouped", ("softmax",), LayoutSpec(followers=12), "grouped")
    if "layouts" in parts:
        for count in (12, 8):
            paper = parse_groups("paper" if count == 12 else "14-29:2", bench.shape, "full")
            bench.row(
                f"{count} paper, free", lambda g=paper: g, seeds, chooser=bench.chooser("free", "one", leaders=True)
            )
            bench.row(
                f"{count} paper, grouped", lambda g=paper: g, seeds, chooser=bench.chooser(sources="one", leaders=True)
            )
            bench.row(f"{count} similarity alone", lambda c=count: bench.fast(c), seeds)
            bench.row(f"{count} fast, grouped", lambda c=count: bench.fast(c), seeds, chooser=bench.chooser())
            bench.row(f"{count} fast, free", lambda c=count: bench.fast(c), seeds, chooser=bench.chooser("free"))
            bench.row(f"{count} thorough, grouped", lambda c=count: grouped[c - 1], seeds)
            bench.row(f"{count} thorough, free", lambda c=count: free[c - 1], seeds)
    if "compensation" in parts:
        for count in (12, 8):
            for solve in ("none", "reference", "compensation", "output", "both"):
                bench.row(
                    f"{count} thorough, solve {solve}",
                    lambda c=count: grouped[c - 1],
                    [0],
                    tokens=80 * LENGTH,
                    solve=solve,
                )
            for rank in (32, 64, 128):
                bench.row(
                    f"{count} thorough, rank {rank}", lambda c=count: grouped[c - 1], [0], tokens=80 * LENGTH, rank=rank
                )
        paper = parse_groups("paper", bench.shape, "full")
        for solve in ("none", "reference", "compensation", "both"):
            bench.row(f"12 paper identity, solve {solve}", lambda: paper, [0], tokens=80 * LENGTH, solve=solve)
    if "heads" in parts:
        for count in (12, 8):
            layout = grouped[count - 1]
            identity = nearest(layout)
            bench.row(f"{count} thorough, heads identity", lambda g=identity: g, [0], tokens=80 * LENGTH)
            for head_map in ("grouped", "free"):
                for sources in ("one", "several"):
                    chooser = bench.chooser(head_map, sources)
                    name = f"{count} thorough, heads {head_map} from {sources}"
                    bench.row(name, lambda g=layout: g, [0], tokens=80 * LENGTH, chooser=chooser)
    if "kinds" in parts:
        budget = LayoutSpec(kv=0.8)
        for kind in KINDS[1:]:
            steps = bench.searched(kind, (kind,), budget, "grouped")
            bench.row(f"KV 80 %, {kind} alone", lambda s=steps: s[-1], seeds, align=0)
        bench.row("KV 80 %, softmax alone", lambda: free[11], seeds)
        steps = bench.searched("mixed", ("softmax", "kv", "linear"), budget, "free")
        bench.row("KV 80 %, softmax + kv + linear", lambda: steps[-1], seeds, align=0)


def nearest(layout: Layout) -> Layout:
    """The same followers with all heads from the nearest layer before that computes its own map."""
    own = [index for index, plan in enumerate(layout) if plan.kind == "own"]
    return Layout(
        tuple(
            plan if plan.kind == "own" else LayerPlan("softmax", leader=max(o for o in own if o < index))
            for index, plan in enumerate(layout)
        )
    )


def main() -> None:
    """Reads the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", help="directory or hub id")
    parser.add_argument("--text", required=True, help="JSONL with a column `text`")
    parser.add_argument("--wikitext", required=True, help="plain text")
    parser.add_argument("--calibration", nargs="*", default=[], help="more calibration text, FILE or FILE:ROWS")
    parser.add_argument("--out", default="docs/benchmarks/layouts.json")
    parser.add_argument("--fit-tokens", type=int, default=448 * LENGTH, help="tokens of the fits that are not compared")
    parser.add_argument("--parts", nargs="*", choices=PARTS, default=list(PARTS))
    parser.add_argument("--mixes", nargs="*", choices=ALIGNED, default=list(ALIGNED), help="of the part `aligned`")
    parser.add_argument("--seeds", nargs="*", type=int, default=[0])
    parser.add_argument("--merge", nargs="*", default=[], help="only put these JSON files of other processes together")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    arguments = parser.parse_args()
    if arguments.merge:
        contents = [json.loads(Path(name).read_text(encoding="utf-8")) for name in arguments.merge]
        write(merged(contents), Path(arguments.out))
        return
    bench = Bench(arguments)
    run(bench, arguments.parts, arguments.seeds, arguments.mixes)
    bench.save()


if __name__ == "__main__":
    main()
