"""What training recovers, by layout and recipe, compared with the base after the same training.

    python -m benchmarks.training MODEL --train chat.jsonl more.jsonl --text c4.jsonl --wikitext wiki.tokens \\
        --tokens 2000000 --seeds 0 1 2 --out docs/benchmarks/training.json

Every row is made by the tool's own commands in a run directory of its own, with the same number of training tokens in
the same order for a seed. The score is the mean of log perplexity on `--text` (first 30,720 tokens; the other pages are
calibration text), of log perplexity on `--wikitext` (first 65,536 tokens) and of the loss on held-out responses; lower
is better. The gap is the score minus that of the control of the same seed. `--parts` and `--layouts` pick rows.
`control converted` converts the control instead of the base and learns from it, so that it has seen the data twice.
A row that was interrupted goes on from its last checkpoint, if `--set train.save_steps=N` made any.
`--synthetic` adds rows of `uniattn synthesize`; with `--controls`, controls of other runs, without these rows, are the
teachers. A part may name its own learning rates and settings of the recipe's `train.distillation`: `one@3e-4`,
`two@3e-3,1e-4`, `distillation+weight=1+tokens=all@2e-4` (without any, half of the loss is a teacher's distribution at
learned tokens); `one@1e-4/1e-3` has the second for the attention of changed layers. Stages before it, each for a share
of `--tokens`, are `local`, `base teaches` and `control teaches`, with the recipe's defaults: `local*0.2@1e-3 > one`
leaves the part the other tokens; that of `broad base teaches*4@2e-4 > one` learns from `--broad` and leaves it all of
them. In `on policy`, the last of several, the student writes the responses that the control corrects. `equal time*2`
trains in one stage on twice as many tokens. Layouts are searched, or taken with `--layouts-from` from files of this
benchmark or of `benchmarks/layouts.py`.

The same command goes on where it was stopped: rows of the file are not made again, nor are layouts searched again.
Without the `--work` of before, the control of a seed is trained again where it teaches.
"""

from __future__ import annotations

import argparse
import json
import math
import re
import shutil
import statistics
import tempfile
from dataclasses import replace
from pathlib import Path

from benchmarks import runner, texts
from uniattn_cli import analyze, convert, train
from uniattn_cli.data import sequences, splits
from uniattn_cli.data.heldout import response_rows
from uniattn_cli.models.device import describe_device
from uniattn_cli.models.hub import locate
from uniattn_cli.models.loading import load_model
from uniattn_cli.models.losses import row_losses, window_loss
from uniattn_cli.models.tokenizer import load_tokenizer
from uniattn_cli.options import RunOptions
from uniattn_cli.recipe.schema import ModelSpec, Recipe
from uniattn_cli.run.files import read_json
from uniattn_cli.tables import Table
from uniattn_cli.training.trainer import pack

# Twelve followers of SmolLM2-135M save 20 % of the KV bytes; the others save the same.
LAYOUTS = {
    "softmax": "[softmax]",
    "mixed": "[softmax, kv, linear]",
    "kv": "[kv]",
    "linear": "[linear]",
    "none": "[none]",
    "pooled": "[pooled]",
    "key": "[key]",
    "early": "[early]",
    "early-kv": "[early-kv]",
    "any": "[softmax, key, kv, linear]",
}
# What these layouts are called in the file of benchmarks/layouts.py.
SEARCHED = {"softmax": "softmax, free", "mixed": "mixed", "linear": "linear", "none": "none"}
SEARCHED |= {
    "early": "early, aligned",
    "early-kv": "early-kv, aligned",
    "key": "key, aligned",
    "kv": "kv, aligned",
    "any": "softmax + key + kv + linear, aligned",
}
PARTS = ("base", "control", "converted", "one", "two", "distillation", "control teaches", "control converted", "lora")
PARTS += ("equal time", "on policy")
TABLES = ("layouts", "rows")
LOSSES = ("text", "wikitext", "responses")
# Stages before a part, with their learning rates.
FIRST = {"local": 1e-3, "base teaches": 2e-4, "control teaches": 2e-4}
BROAD = "broad "
# Learning rate of text that the student writes.
OWN_RATE = 5e-5
# What teaches with `--controls`.
TEACHER = "control of other runs"
RATES = {"compensation": 1e-3, "all": 1e-4, "lora": 2e-4}
# Share of the steps of the two-stage recipe that only train the compensation: 0.25 of 1.25 epochs.
FIRST_SHARE = 0.2
# Steps of the part `equal time` over the others': the time that a teacher costs.
EQUAL_TIME = 1.5
# What all rows have in common, before `--set`.
SETTINGS = [
    *("model.dtype=float32", "analysis.tokens=163840", "analysis.length=1024"),
    *("conversion.tokens=163840", "conversion.length=1024"),
    *("evaluation.length=1024", "evaluation.responses=200", "evaluation.batch_size=32"),
    *("train.batch_size=16", "train.micro_batch_size=16", "train.max_length=512", "train.group_by_length=true"),
    # Writing takes longer than the steps of so small a model; so do measurements of the best state, which with this
    # schedule is the last.
    *("train.save_steps=1000000", "train.eval_steps=300"),
    *("layout.kv=0.8", "layout.head_map=free", "layout.search=scores", "layout.score_tokens=24576"),
]


class Bench:
    """Texts, settings and the results so far."""

    def __init__(self, arguments: argparse.Namespace, results: runner.Results):
        self.arguments, self.results = arguments, results
        self.device = arguments.device
        self.options = RunOptions(device=str(self.device), force=True)
        self.work = Path(arguments.work or tempfile.mkdtemp(prefix="uniattn-training-"))
        self.work.mkdir(parents=True, exist_ok=True)
        place = Path(arguments.model)
        self.source = locate(str(place.absolute()) if place.is_dir() else arguments.model)
        self.tokenizer = load_tokenizer(self.source)
        most, length = arguments.text_tokens, self._recipe().evaluation.length
        rest = self.work / "calibration.jsonl"
        tokens = [min(most, count) for count in (texts.TEXT_TOKENS, texts.WIKITEXT_TOKENS)]
        self.texts = {
            "text": texts.split_pages(self.tokenizer, arguments.text, rest, tokens=tokens[0], length=length),
            "wikitext": texts.text_windows(self.tokenizer, arguments.wikitext, tokens=tokens[1], length=length),
        }
        results.begin(self._setting())
        self.layouts = results.content["layouts"]
        self.steps = self._steps()
        for path in arguments.layouts_from:
            self._take_layouts(path)

    def _take_layouts(self, path: Path) -> None:
        """The layouts, of those asked for, that a search chose before, unless this file has its own."""
        found = runner.read(path)["layouts"]
        for name in self.arguments.layouts:
            if isinstance(found.get(name), list):
                self.layouts.setdefault(name, found[name])
            elif SEARCHED.get(name) in found:
                self.layouts.setdefault(name, found[SEARCHED[name]]["steps"][-1])

    def _setting(self) -> dict:
        spec, recipe = self.arguments, self._recipe()
        return {
            "comparable": {
                "model": Path(spec.model).name,
                "train": [Path(name).name for name in [*spec.train, *spec.synthetic]],
                **({"synthetic": self._provenance()} if spec.synthetic else {}),
                **({"broad": [Path(name).name for name in spec.broad]} if spec.broad else {}),
                "tokens": spec.tokens,
                "kv": recipe.layout.kv,
                "batch_size": recipe.train.batch_size,
                "max_length": recipe.train.max_length,
                "group_by_length": recipe.train.group_by_length,
                # Absent from files of before they existed.
                **{key: steps for key in ("align", "refine") if (steps := getattr(recipe.conversion, key))},
                **({"refine": refine} if (refine := recipe.conversion.refine) else {}),
                **({"settings": spec.set} if spec.set else {}),
                "evaluated_tokens": {name: windows.numel() for name, windows in self.texts.items()},
                "rates": RATES,
            },
            "device": describe_device(self.device),
            "dtype": "float32 weights, bfloat16 arithmetic in training" if self.device.type == "cuda" else "float32",
        }

    def _provenance(self) -> list[dict]:
        """How `uniattn synthesize` wrote the synthetic rows, as the record beside them says."""
        found = []
        for name in self.arguments.synthetic:
            path = Path(name).with_name("stage.json")
            record = read_json(path, "keep the files of `uniattn synthesize` in one folder")["settings"]["synthesis"]
            found.append({key: record[key] for key in ("model", "tokens", "prefix", "temperature", "top_p")})
        return found

    def settings(self, seed: int, *, search: bool = False) -> list[str]:
        """What all rows of a seed have in common; those of the layout only where one is searched."""
        spec = self.arguments
        train_files = ", ".join(str(Path(name).absolute()) for name in spec.train)
        synthetic = [f"{{source: {Path(name).absolute()}, heldout: false}}" for name in spec.synthetic]
        return [
            f"seed={seed}",
            f"data.train=[{', '.join([train_files, *synthetic])}]",
            f"data.calibration=[{self.work.absolute() / 'calibration.jsonl'}, {train_files}]",
            *(each for each in [*SETTINGS, *spec.set] if search or not each.startswith("layout.")),
        ]

    def _recipe(self, seed: int = 0) -> Recipe:
        overrides = self.settings(seed, search=True)
        return Recipe.from_tree({"model": {"name": self.source.name}}, overrides=overrides)

    def _steps(self, broad: bool = False) -> int:
        """Optimiser steps that see about the wanted number of tokens, of the training rows or of `--broad`."""
        recipe = self._recipe()
        spec = recipe.train
        rows = Recipe.from_tree(recipe.to_dict(), overrides=[f"data.train={self._broad()}"]) if broad else recipe
        mix = splits.load_mix(rows.data.train, "train", holdout=recipe.data.holdout, seed=0)
        tokenised = sequences.tokenize(mix, self.tokenizer, max_length=spec.max_length, loss=spec.loss)
        count = len(pack(tokenised.dataset, spec.max_length)) if spec.packing else tokenised.counts.used
        return max(1, round(self.arguments.tokens / (tokenised.counts.tokens / count) / spec.batch_size))

    def _broad(self) -> str:
        return f"[{', '.join(str(Path(name).absolute()) for name in self.arguments.broad)}]"

    def analysis(self) -> Path:
        """A directory with `analysis/`, made once."""
        folder = self.work / "analysis"
        if not (folder / "analysis" / "stage.json").is_file():
            folder.mkdir(exist_ok=True)
            analyze(self.source.name, run_dir=folder, overrides=self.settings(0), options=self.options)
        return folder

    def run_dir(self, layout: str, seed: int) -> Path:
        """A run directory with `converted/`; the layout is chosen once and the same for all seeds."""
        folder = self.work / f"{layout}-{seed}"
        if (folder / "converted" / "stage.json").is_file():
            return folder
        shutil.rmtree(folder, ignore_errors=True)
        if layout in self.layouts:
            write_recipe(folder, self.source.name, self.layouts[layout])
            convert(run_dir=folder, overrides=self.settings(seed), options=self.options)
        else:
            shutil.copytree(self.analysis(), folder)
            settings = [*self.settings(seed, search=True), f"layout.kinds={LAYOUTS[layout]}"]
            result = convert(run_dir=folder, overrides=settings, options=self.options)
            self.results.add("layouts", layout, result.layout.to_list())
        return folder

    def converted_control(self, layout: str, seed: int) -> Path:
        """A run directory like those of `run_dir`, where not the base was converted, but the control."""
        folder = self.work / f"{layout}-{seed}-control"
        if not (folder / "converted" / "stage.json").is_file():
            self._fetch_control(self.run_dir(layout, seed), seed)
            shutil.rmtree(folder, ignore_errors=True)
            write_recipe(folder, str(self._control(seed)), self.layouts[layout])
            convert(run_dir=folder, overrides=self.settings(seed), options=self.options)
        return folder

    def row(self, layout: str, part: str, seed: int) -> None:
        """Makes one row, unless it is there already."""
        shared = name_of(part) in ("base", "control")
        key = f"{'base' if shared else layout} | {part} | seed {seed}"
        if not self.results.missing("rows", [key]):
            return
        start = self.converted_control if name_of(part) == "control converted" else self.run_dir
        folder = start(layout, seed)
        seconds = tokens = 0.0
        directory = folder / "converted"
        if part == "base":
            directory = self.source.path
        elif part != "converted":
            directory, seconds, tokens = self._train(folder, part, seed)
        self._keep(key, directory, seconds, tokens)

    def _keep(self, key: str, directory: Path, seconds: float, tokens: int) -> None:
        """Scores a model and writes its row."""
        scores = self._score(directory, int(key.rpartition(" ")[2]))
        row = {
            "score": round(statistics.fmean(scores.values()), 5),
            "seconds": round(seconds, 1),
            "tokens": int(tokens),
            **{name: round(value, 5) for name, value in scores.items()},
        }
        self.results.add("rows", key, row)

    def teacher_row(self, seed: int) -> None:
        """The control of other runs that teaches here: what the gap is to where these runs have no control."""
        key = f"base | {TEACHER} | seed {seed}"
        if self.results.missing("rows", [key]):
            self._keep(key, self._control(seed), 0.0, 0)

    def _train(self, folder: Path, part: str, seed: int) -> tuple[Path, float, int]:
        settings = [*self.settings(seed), *self.recipe_of(part)]
        if asks_control(part):
            self._fetch_control(folder, seed)
        control = name_of(part) == "control"
        unfinished = _belongs(folder, part) and not (folder / ("control" if control else "trained")).exists()
        options = replace(self.options, force=not unfinished)
        result = train(run_dir=folder, control=control, overrides=settings, options=options)
        seconds, tokens = (sum(getattr(stage, name) for stage in result.stages) for name in ("seconds", "tokens"))
        if part == "control":
            shutil.rmtree(self.work / f"control-{seed}", ignore_errors=True)
            shutil.copytree(folder / "control", self.work / f"control-{seed}")
        return result.directory, seconds, tokens

    def _fetch_control(self, folder: Path, seed: int) -> None:
        source = self._control(seed)
        if not source.is_dir():
            self._train(folder, "control", seed)
        # One that these runs have trained may not be the one that teaches.
        shutil.rmtree(folder / "control", ignore_errors=True)
        shutil.copytree(source, folder / "control")

    def _control(self, seed: int) -> Path:
        """The control that teaches: of these runs, or of others."""
        found = Path(self.arguments.controls or self.work).absolute() / f"control-{seed}"
        if self.arguments.controls and not found.is_dir():
            raise SystemExit(f"{found} is missing; run the part control of that seed with that --work first")
        return found

    def recipe_of(self, part: str) -> list[str]:
        """The stages of a part, as settings.

        Raises:
            SystemExit: its stages take all tokens.
        """
        *first, part = part.split(" > ")
        before = [self._first_stage(each) for each in first]
        # Those with rows of their own leave the others to the part.
        steps = self.steps - sum(count for count, entry in before if "data:" not in entry)
        if steps < 1:
            raise SystemExit(f"error: the stages before it leave no tokens for the part: {' > '.join([*first, part])}")
        name_and_settings, _, rates = part.partition("@")
        part, *more_settings = name_and_settings.split("+")
        part, _, factor = part.partition("*")
        distillation = "{teacher: base, weight: 0.5, tokens: learned, attention: 0, top_k: 64}"
        if part == "control teaches":
            distillation = distillation.replace("base", "control")
        if part == "two":
            first = max(1, round(FIRST_SHARE * steps))
            stages = [("compensation", first, ""), ("all", max(1, steps - first), "")]
        elif part == "lora":
            stages = [("lora", steps, "")]
        elif part in ("distillation", "control teaches", "control converted"):
            stages = [("all", steps, ", loss: distillation")]
        elif part == "on policy":
            stages, distillation = [("all", steps, ", loss: distillation")], "{on_policy: 1.0}"
            rates = rates or str(OWN_RATE)
        elif part == "equal time":
            stages = [("all", max(1, round(steps * float(factor or EQUAL_TIME))), "")]
        else:
            stages = [("all", steps, "")]
        chosen = rates.split(",") if rates else [RATES[trains] for trains, *_ in stages]
        entries = [entry for _, entry in before] + [
            f"{{trains: {trains}, steps: {count}, {_rates(str(rate))}{more}}}"
            for (trains, count, more), rate in zip(stages, chosen, strict=True)
        ]
        return [
            f"train.stages=[{', '.join(entries)}]",
            f"train.distillation={distillation}",
            *(f"train.distillation.{each}" for each in more_settings),
        ]

    def _first_stage(self, text: str) -> tuple[int, str]:
        """Steps and settings of a stage before a part."""
        name_and_settings, _, rates = text.partition("@")
        (name, *more), broad = name_and_settings.split("+"), text.startswith(BROAD)
        name, _, share = name.removeprefix(BROAD).partition("*")
        count = max(1, round(float(share) * (self._steps(broad=True) if broad else self.steps)))
        settings = [f"teacher={name.partition(' ')[0]}", *more]
        distillation = f"{{{', '.join(each.replace('=', ': ') for each in settings)}}}"
        entry = [
            f"name: {name}",
            f"steps: {count}",
            _rates(rates or str(FIRST[name])),
            "trains: followers, loss: local"
            if name == "local"
            else f"trains: all, loss: distillation, distillation: {distillation}",
            *([f"data: {self._broad()}"] if broad else []),
        ]
        return count, f"{{{', '.join(entry)}}}"

    def _score(self, directory: Path, seed: int) -> dict[str, float]:
        model = load_model(locate(str(directory)), ModelSpec(dtype="float32"), self.device)
        found = {name: window_loss(model, windows).mean for name, windows in self.texts.items()}
        rows = response_rows(self._recipe(seed), self.tokenizer)
        found["responses"] = row_losses(model, rows, batch_size=16).summary().mean
        return found


def _belongs(folder: Path, part: str) -> bool:
    """Whether what was trained last in a run directory, and perhaps interrupted, is this part; from now on it is."""
    path = folder / "part.txt"
    same = path.is_file() and path.read_text(encoding="utf-8") == part
    path.write_text(part, encoding="utf-8")
    return same


def _rates(text: str) -> str:
    """Learning rates of a stage as settings, from `RATE` or `RATE/RATE of changed attention`."""
    rate, _, changed = text.partition("/")
    return f"learning_rate: {float(rate)}" + (f", changed_learning_rate: {float(changed)}" if changed else "")


def write_recipe(folder: Path, model: str, layers: list[dict]) -> None:
    """Makes a run directory with a model and a layout."""
    folder.mkdir()
    tree = {"model": {"name": model}, "layout": {"layers": layers}}
    (folder / "recipe.yaml").write_text(json.dumps(tree) + "\n", encoding="utf-8")


def name_of(part: str) -> str:
    """A part without its settings, factor and learning rates, and without stages before it."""
    return re.split(r"[*+@]", part.rpartition(" > ")[2])[0]


def asks_control(part: str) -> bool:
    """Whether a part, or a stage before it, learns from the control."""
    stages = (re.split(r"[*+@]", stage.removeprefix(BROAD))[0] for stage in part.split(" > "))
    return any(stage in ("control teaches", "on policy") for stage in stages)


def order(key: str) -> tuple:
    """Where a row stands in the file: the base's first, then by layout, part and seed."""
    layout, part, seed = key.split(" | ")
    known = list(LAYOUTS).index(layout) if layout in LAYOUTS else -1
    return layout != "base", known, [*PARTS, TEACHER].index(name_of(part)), part, seed


def grouped(rows: dict[str, dict]) -> list[dict]:
    """One entry for each layout and part, seeds together, with the gap to the control of the same seed."""
    found: dict[tuple[str, str], dict] = {}
    for key, row in rows.items():
        layout, part, seed = key.split(" | ")
        entry = found.setdefault((layout, part), {"layout": layout, "part": part, "rows": [], "gap": []})
        entry["rows"].append(row)
        control = rows.get(f"base | control | {seed}") or rows.get(f"base | {TEACHER} | {seed}")
        if control is not None:
            entry["gap"].append(row["score"] - control["score"])
    return list(found.values())


COLUMNS = ["layout", "trained", "score", "gap", *LOSSES, "tokens", "seconds", "seeds"]


def markdown(content: runner.Content) -> str:
    """One line for each layout and part; means over seeds, with their standard deviation."""
    setting, comparable = content["setting"], content["setting"]["comparable"]
    rates = ", ".join(f"{name} {rate:g}" for name, rate in comparable["rates"].items())
    table = []
    for entry in grouped(content["rows"]):
        rows = entry["rows"]
        score, *losses = (runner.spread([row[name] for row in rows]) for name in ("score", *LOSSES))
        means = [f"{statistics.fmean(row[name] for row in rows):,.0f}" for name in ("tokens", "seconds")]
        gap = runner.spread(entry["gap"]) if entry["gap"] else "–"
        table.append([entry["layout"], words(entry["part"]), score, gap, *losses, *means, str(len(rows))])
    return runner.page(
        f"{comparable['model']}: what training recovers",
        f"{comparable['tokens']:,} training tokens, {comparable['kv']:.0%} of the KV bytes kept; {setting['device']}, "
        f"{setting['dtype']}. Score: mean of the three losses (nats per token, lower is better); gap: score minus that "
        "of the control of the same seed: the base after the same training, or the control of other runs that is the "
        f"teacher. Learning rates, unless given: {rates}. Made by `benchmarks/training.py`; the JSON file "
        "has all numbers.",
        Table("", COLUMNS, table),
    )


def words(part: str) -> str:
    """A part's name for tables: `control teaches, weight 1.0, tokens all, 2e-4`."""
    *first, part = part.split(" > ")
    if first:
        return " > ".join(map(words, [*first, part]))
    names, _, rates = part.partition("@")
    # Where a teacher's distributions come from changes the time and no result.
    kept = [name.replace("=", " ") for name in names.split("+") if not name.startswith("precompute")]
    return ", ".join([*kept, *(rates.split(",") if rates else [])])


def draw(content: runner.Content, path: Path) -> None:
    """Gaps as bars, one group for each layout."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    entries = grouped(content["rows"])
    shown = [entry for entry in entries if entry["gap"] and entry["part"] not in ("control", TEACHER)]
    if not shown:
        return
    figure = Figure(figsize=(8, 0.24 * len(shown) + 1), dpi=150, layout="constrained")
    FigureCanvasAgg(figure)
    axis = figure.subplots()
    layouts = list(dict.fromkeys(entry["layout"] for entry in shown))
    colours = ("#000000", "#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#999999")
    for place, entry in enumerate(shown):
        error = statistics.stdev(entry["gap"]) if len(entry["gap"]) > 1 else math.nan
        colour = colours[layouts.index(entry["layout"]) % len(colours)]
        axis.barh(place, statistics.fmean(entry["gap"]), xerr=error, capsize=3, color=colour, alpha=0.85)
    labels = [f"{entry['layout']}: {words(entry['part'])}" for entry in shown]
    axis.set_yticks(range(len(shown)), labels, fontsize=8)
    axis.invert_yaxis()
    axis.set_xlabel("gap to the control, nats per token")
    axis.grid(axis="x", alpha=0.3)
    axis.spines[["top", "right"]].set_visible(False)
    figure.savefig(path)


def part_named(text: str) -> str:
    """A part with its settings, for argparse."""
    if name_of(text) not in PARTS:
        raise argparse.ArgumentTypeError(f"unknown part: {text} (known: {', '.join(PARTS)})")
    if "*" in text.rpartition(" > ")[2] and name_of(text) != "equal time":
        raise argparse.ArgumentTypeError(f"unknown part: {text} (only stages before a part have a *SHARE)")
    for stage in text.split(" > ")[:-1]:
        name = re.split(r"[*+@]", stage.removeprefix(BROAD))[0]
        if name not in FIRST or "*" not in stage:
            raise argparse.ArgumentTypeError(f"unknown stage: {stage} (known: {', '.join(FIRST)}, each with *SHARE)")
    return text


def add_options(parser: argparse.ArgumentParser) -> None:
    """The options of this benchmark."""
    option = parser.add_argument
    texts.add_options(parser, seeds=[0, 1, 2])
    option("--train", nargs="+", required=True, help="training rows, files or hub data sets")
    option("--synthetic", nargs="*", default=[], help="additional training rows, from `uniattn synthesize`")
    option("--broad", nargs="*", default=[], help="text that stages before a part may learn from")
    option("--work", help="folder of the run directories, kept; a temporary one by default")
    option("--controls", help="--work of other runs, whose controls are the teachers; by default those of these runs")
    option("--tokens", type=int, default=2_000_000, help="training tokens of each row")
    known = f"{', '.join(PARTS)}; +SETTING=VALUE and @RATE after any trained"
    # The last stage of several is none by itself.
    option("--parts", nargs="*", type=part_named, default=[part for part in PARTS if part != "on policy"], help=known)
    option("--layouts", nargs="*", choices=LAYOUTS, default=list(LAYOUTS))
    option("--layouts-from", nargs="*", type=Path, default=[], help="files to take layouts from")
    option("--set", action="append", default=[], metavar="KEY=VALUE", help="a setting of the recipe, for all rows")
    option("--text-tokens", type=int, default=texts.WIKITEXT_TOKENS, help="at most this many of each text")


def measure(arguments: argparse.Namespace, results: runner.Results) -> None:
    """All rows that were asked for."""
    bench = Bench(arguments, results)
    for part in arguments.parts:
        # Before anything slow begins.
        bench.recipe_of(part)
    for seed in arguments.seeds:
        if arguments.controls:
            bench.teacher_row(seed)
        for layout in arguments.layouts:
            for part in arguments.parts:
                bench.row(layout, part, seed)


if __name__ == "__main__":
    kept = {"markdown": markdown, "draw": draw, "order": order, "portable": True, "fixed": ("layouts",)}
    runner.run("training", __doc__, TABLES, add_options, measure, **kept)
