"""What training wins back, layout by layout and recipe by recipe, against the base after the same training.

    python scripts/benchmark_training.py MODEL --train chat.jsonl more.jsonl --text c4.jsonl --wikitext wiki.tokens \\
        --tokens 2000000 --seeds 0 1 2 --out docs/benchmarks/training.json

Every row is made by the tool's own commands in a run directory of its own, with the same number of training tokens in
the same order for a seed. The score is the mean of log perplexity on `--text` (first 30,720 tokens; the other pages are
calibration text), of log perplexity on `--wikitext` (first 65,536 tokens) and of the loss on held-out responses; lower
is better. The gap is the score minus that of the control of the same seed. Rows already in the output are not measured
again; `--parts` and `--layouts` pick some. `control converted` converts the control instead of the base and learns from
it, so that it has seen the data twice. `--synthetic` adds rows of `uniattn synthesize`; with `--controls` controls of
other runs, without these rows, teach. A part may name its own learning rates and settings of the recipe's
`train.distillation`: `one@3e-4`, `two@3e-3,1e-4`, `distillation+weight=1+tokens=all@2e-4`.
Layouts are searched, or taken from `benchmark_layouts.py` with `--layouts-from`. Several processes, each with its own
`--out`, share the work; `--merge` puts their files together. A table (`.md`) and a picture (`.png`) are written beside
the JSON file.
"""

from __future__ import annotations

import argparse
import json
import math
import platform
import shutil
import statistics
import tempfile
from collections.abc import Sequence
from pathlib import Path

import torch
import transformers
import trl

from uniattn_cli import analyze, convert, train
from uniattn_cli.data import sequences, splits
from uniattn_cli.data.heldout import response_rows
from uniattn_cli.models.hub import locate
from uniattn_cli.models.loading import load_model, load_tokenizer
from uniattn_cli.models.losses import row_losses, window_loss
from uniattn_cli.options import RunOptions
from uniattn_cli.recipe.schema import ModelSpec, Recipe
from uniattn_cli.training.trainer import pack

TEXT_TOKENS, WIKITEXT_TOKENS = 30 * 1024, 64 * 1024
# Twelve followers of SmolLM2-135M save 20 % of the KV bytes; the others save the same.
LAYOUTS = {
    "softmax": "[softmax]",
    "mixed": "[softmax, kv, linear]",
    "kv": "[kv]",
    "linear": "[linear]",
    "none": "[none]",
    "pooled": "[pooled]",
    "key": "[key]",
    "any": "[softmax, key, kv, linear]",
}
# What these layouts are called in the file of benchmark_layouts.py.
SEARCHED = {"softmax": "softmax, free", "mixed": "mixed", "linear": "linear", "none": "none"}
SEARCHED |= {"key": "key, aligned", "kv": "kv, aligned", "any": "softmax + key + kv + linear, aligned"}
PARTS = ("base", "control", "converted", "one", "two", "distillation", "control teaches", "control converted", "lora")
PARTS += ("equal time",)
# What teaches with `--controls`.
TEACHER = "control of other runs"
RATES = {"compensation": 1e-3, "all": 1e-4, "lora": 2e-4}
# Share of the steps of the two-stage recipe that only train the compensation: 0.25 of 1.25 epochs.
FIRST_SHARE = 0.2


class Bench:
    """Texts, settings and the results so far."""

    def __init__(self, arguments: argparse.Namespace):
        self.arguments = arguments
        self.out = Path(arguments.out)
        self.options = RunOptions(device=arguments.device, force=True)
        self.device = self.options.torch_device()
        self.work = Path(arguments.work or tempfile.mkdtemp(prefix="uniattn-training-"))
        self.work.mkdir(parents=True, exist_ok=True)
        self.source = locate(
            str(Path(arguments.model).absolute()) if Path(arguments.model).is_dir() else arguments.model
        )
        self.tokenizer = load_tokenizer(self.source)
        self.texts = {"text": self._text(Path(arguments.text)), "wikitext": self._wikitext(Path(arguments.wikitext))}
        self.content = json.loads(self.out.read_text()) if self.out.exists() else {"layouts": {}, "rows": {}}
        setting = self._setting()
        if self.content.setdefault("setting", setting)["comparable"] != setting["comparable"]:
            raise SystemExit(f"{self.out} holds rows of other settings ({self.content['setting']['comparable']})")
        self.steps = self._steps()
        for name in arguments.layouts_from:
            self._take_layouts(Path(name))

    def _take_layouts(self, path: Path) -> None:
        """The layouts that a search chose before, unless this file has its own."""
        found = json.loads(path.read_text(encoding="utf-8"))["layouts"]
        for name, stored in SEARCHED.items():
            if stored in found:
                self.content["layouts"].setdefault(name, found[stored]["steps"][-1])

    def _text(self, path: Path) -> torch.Tensor:
        """Evaluation windows from the first pages; the other pages go into a file for calibration."""
        pages = [json.loads(line)["text"] for line in path.read_text(encoding="utf-8").splitlines()]
        wanted = min(TEXT_TOKENS, self.arguments.text_tokens)
        ids: list[int] = []
        used = 0
        while len(ids) < wanted:
            ids += [*splits.encode(self.tokenizer, pages[used]), self.tokenizer.eos_token_id]
            used += 1
        rest = "".join(json.dumps({"text": page}) + "\n" for page in pages[used:])
        (self.work / "calibration.jsonl").write_text(rest, encoding="utf-8")
        return self._windows(ids[:wanted])

    def _wikitext(self, path: Path) -> torch.Tensor:
        ids = splits.encode(self.tokenizer, path.read_text(encoding="utf-8"))
        return self._windows(ids[: min(WIKITEXT_TOKENS, self.arguments.text_tokens)])

    def _windows(self, ids: Sequence[int]) -> torch.Tensor:
        length = self.arguments.length
        return torch.tensor(ids[: len(ids) // length * length]).view(-1, length)

    def _setting(self) -> dict:
        on_gpu = self.device.type == "cuda"
        return {
            "comparable": {
                "model": Path(self.arguments.model).name,
                "train": [Path(name).name for name in [*self.arguments.train, *self.arguments.synthetic]],
                **({"synthetic": self._provenance()} if self.arguments.synthetic else {}),
                "tokens": self.arguments.tokens,
                "kv": self.arguments.kv,
                "batch_size": self.arguments.batch_size,
                "max_length": self.arguments.max_length,
                "group_by_length": self._recipe().train.group_by_length,
                **({"align": align} if (align := self._recipe().conversion.align) else {}),
                **({"settings": self.arguments.set} if self.arguments.set else {}),
                "evaluated_tokens": {name: windows.numel() for name, windows in self.texts.items()},
                "rates": RATES,
            },
            "device": torch.cuda.get_device_name() if on_gpu else platform.processor() or "CPU",
            "dtype": "float32 weights, bfloat16 arithmetic in training" if on_gpu else "float32",
            "torch": torch.__version__,
            "transformers": transformers.__version__,
            "trl": trl.__version__,
        }

    def _provenance(self) -> list[dict]:
        """How `uniattn synthesize` wrote the synthetic rows, as the record beside them says."""
        found = []
        for name in self.arguments.synthetic:
            path = Path(name).with_name("stage.json")
            if not path.is_file():
                raise SystemExit(f"{path} is missing; leave what `uniattn synthesize` wrote in one folder")
            record = json.loads(path.read_text(encoding="utf-8"))["settings"]["synthesis"]
            found.append({key: record[key] for key in ("model", "tokens", "prefix", "temperature", "top_p")})
        return found

    def settings(self, seed: int) -> list[str]:
        """What all rows of a seed have in common."""
        spec = self.arguments
        train_files = ", ".join(str(Path(name).absolute()) for name in spec.train)
        synthetic = [f"{{source: {Path(name).absolute()}, heldout: false}}" for name in spec.synthetic]
        return [
            f"seed={seed}",
            "model.dtype=float32",
            f"data.train=[{', '.join([train_files, *synthetic])}]",
            f"data.calibration=[{self.work.absolute() / 'calibration.jsonl'}, {train_files}]",
            f"analysis.tokens={spec.fit_tokens}",
            f"analysis.length={spec.length}",
            f"conversion.tokens={spec.fit_tokens}",
            f"conversion.length={spec.length}",
            f"evaluation.length={spec.length}",
            f"evaluation.responses={spec.responses}",
            f"train.batch_size={spec.batch_size}",
            f"train.micro_batch_size={spec.micro_batch_size}",
            f"train.max_length={spec.max_length}",
            "train.group_by_length=true",
            # Nobody resumes these runs, and writing takes longer than the steps of so small a model; so do measurements
            # of the best state, which with this schedule is the last.
            "train.save_steps=1000000",
            "train.eval_steps=300",
            "evaluation.batch_size=32",
            *spec.set,
        ]

    def _recipe(self, seed: int = 0) -> Recipe:
        return Recipe.from_tree({"model": {"name": self.source.name}}, overrides=self.settings(seed))

    def _steps(self) -> int:
        """Optimiser steps that see about the wanted number of tokens."""
        recipe = self._recipe()
        spec = recipe.train
        rows = splits.load_rows(recipe.data.train, "train", holdout=recipe.data.holdout, seed=0)
        tokenised = sequences.tokenize(rows, self.tokenizer, max_length=spec.max_length, loss=spec.loss)
        count = len(pack(tokenised.dataset, spec.max_length)) if spec.packing else tokenised.counts.used
        return max(1, round(self.arguments.tokens / (tokenised.counts.tokens / count) / spec.batch_size))

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
        stored = self.content["layouts"].get(layout)
        settings = self.settings(seed)
        if stored is None:
            shutil.copytree(self.analysis(), folder)
            search = self.arguments.search if layout == "softmax" else "thorough"
            settings += [f"layout.kv={self.arguments.kv}", f"layout.search={search}"]
            settings += [f"layout.kinds={LAYOUTS[layout]}", f"layout.head_map={self.arguments.head_map}"]
            settings += [f"layout.score_tokens={self.arguments.score_tokens}"]
        else:
            write_recipe(folder, self.source.name, stored)
        result = convert(run_dir=folder, overrides=settings, options=self.options)
        if stored is None:
            self.content["layouts"][layout] = result.layout.to_list()
            self.save()
        return folder

    def converted_control(self, layout: str, seed: int) -> Path:
        """A run directory like those of `run_dir`, where not the base was converted, but the control."""
        folder = self.work / f"{layout}-{seed}-control"
        if not (folder / "converted" / "stage.json").is_file():
            self._fetch_control(self.run_dir(layout, seed), seed)
            shutil.rmtree(folder, ignore_errors=True)
            write_recipe(folder, str(self._control(seed)), self.content["layouts"][layout])
            convert(run_dir=folder, overrides=self.settings(seed), options=self.options)
        return folder

    def row(self, layout: str, part: str, seed: int) -> None:
        """Makes one row, unless it is there already."""
        shared = name_of(part) in ("base", "control")
        key = f"{'base' if shared else layout} | {part} | seed {seed}"
        if key in self.content["rows"]:
            return
        start = self.converted_control if name_of(part) == "control converted" else self.run_dir
        folder = start(layout, seed)
        seconds = tokens = 0.0
        directory = folder / "converted"
        if part == "base":
            directory = self.source.path
        elif part != "converted":
            directory, seconds, tokens = self._train(folder, layout, part, seed)
        self._keep(key, directory, seconds, tokens)

    def _keep(self, key: str, directory: Path, seconds: float, tokens: int) -> None:
        """Scores a model and writes its row."""
        scores = self._score(directory, int(key.rpartition(" ")[2]))
        self.content["rows"][key] = {
            "score": round(statistics.fmean(scores.values()), 5),
            "seconds": round(seconds, 1),
            "tokens": int(tokens),
            **{name: round(value, 5) for name, value in scores.items()},
        }
        print(key, self.content["rows"][key], flush=True)
        self.save()

    def teacher_row(self, seed: int) -> None:
        """The control of other runs that teaches here: what the gap is to where these runs have no control."""
        key = f"base | {TEACHER} | seed {seed}"
        if key not in self.content["rows"]:
            self._keep(key, self._control(seed), 0.0, 0)

    def _train(self, folder: Path, layout: str, part: str, seed: int) -> tuple[Path, float, int]:
        settings = [*self.settings(seed), *self._recipe_of(part, layout, seed)]
        if name_of(part) == "control teaches":
            self._fetch_control(folder, seed)
        control = name_of(part) == "control"
        result = train(run_dir=folder, control=control, overrides=settings, options=self.options)
        seconds, tokens = (sum(getattr(stage, name) for stage in result.stages) for name in ("seconds", "tokens"))
        if part == "control":
            shutil.rmtree(self.work / f"control-{seed}", ignore_errors=True)
            shutil.copytree(folder / "control", self.work / f"control-{seed}")
        return result.directory, seconds, tokens

    def _fetch_control(self, folder: Path, seed: int) -> None:
        source = self._control(seed)
        if not source.is_dir():
            self._train(folder, "", "control", seed)
        # One that these runs have trained may not be the one that teaches.
        shutil.rmtree(folder / "control", ignore_errors=True)
        shutil.copytree(source, folder / "control")

    def _control(self, seed: int) -> Path:
        """The control that teaches: of these runs, or of others."""
        found = Path(self.arguments.controls or self.work).absolute() / f"control-{seed}"
        if self.arguments.controls and not found.is_dir():
            raise SystemExit(f"{found} is missing; run the part control of that seed with that --work first")
        return found

    def _recipe_of(self, part: str, layout: str, seed: int) -> list[str]:
        """The stages of a part, as settings."""
        steps = self.steps
        name_and_settings, _, rates = part.partition("@")
        part, *more_settings = name_and_settings.split("+")
        if part == "two":
            first = max(1, round(FIRST_SHARE * steps))
            stages = [("compensation", first, ""), ("all", max(1, steps - first), "")]
        elif part == "lora":
            stages = [("lora", steps, "")]
        elif part in ("distillation", "control teaches", "control converted"):
            stages = [("all", steps, ", loss: distillation")]
        elif part == "equal time":
            stages = [("all", max(1, round(steps * self.arguments.equal_time)), "")]
        else:
            stages = [("all", steps, "")]
        chosen = rates.split(",") if rates else [RATES[trains] for trains, *_ in stages]
        entries = [
            f"{{trains: {trains}, steps: {count}, learning_rate: {float(rate)}{more}}}"
            for (trains, count, more), rate in zip(stages, chosen, strict=True)
        ]
        teacher = "control" if part == "control teaches" else "base"
        return [
            f"train.stages=[{', '.join(entries)}]",
            f"train.distillation={{teacher: {teacher}, top_k: 64}}",
            *(f"train.distillation.{each}" for each in more_settings),
        ]

    def _score(self, directory: Path, seed: int) -> dict[str, float]:
        model = load_model(locate(str(directory)), ModelSpec(dtype="float32"), self.device)
        found = {name: window_loss(model, windows).mean for name, windows in self.texts.items()}
        rows = response_rows(self._recipe(seed), self.tokenizer)
        found["responses"] = row_losses(model, rows, batch_size=self.arguments.micro_batch_size).summary().mean
        return found

    def save(self) -> None:
        """Writes JSON, table and picture."""
        write(self.content, self.out)


def write_recipe(folder: Path, model: str, layers: list[dict]) -> None:
    """Makes a run directory with a model and a layout."""
    folder.mkdir()
    tree = {"model": {"name": model}, "layout": {"layers": layers}}
    (folder / "recipe.yaml").write_text(json.dumps(tree) + "\n", encoding="utf-8")


def name_of(part: str) -> str:
    """A part without its settings and learning rates."""
    return part.partition("@")[0].partition("+")[0]


def merged(contents: Sequence[dict]) -> dict:
    """One file's content from those of several processes."""
    together = contents[0]
    for content in contents[1:]:
        if content["setting"]["comparable"] != together["setting"]["comparable"]:
            raise SystemExit("these files hold rows of different settings")
        for name in ("layouts", "rows"):
            together[name] |= content[name]
    places = [list(LAYOUTS), [*PARTS, TEACHER]]

    def place(key: str) -> list:
        layout, part, seed = key.split(" | ")
        return [
            layout != "base",
            *(places[0].index(layout) if layout in LAYOUTS else -1, places[1].index(name_of(part))),
            part,
            seed,
        ]

    together["rows"] = {key: together["rows"][key] for key in sorted(together["rows"], key=place)}
    return together


def write(content: dict, out: Path) -> None:
    """Writes JSON, table and picture."""
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    entries = grouped(content["rows"])
    out.with_suffix(".md").write_text(markdown(content["setting"], entries), encoding="utf-8")
    if any(entry["gap"] for entry in entries):
        draw(entries, out.with_suffix(".png"))


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


def markdown(setting: dict, entries: Sequence[dict]) -> str:
    """One line for each layout and part; means over seeds, with their standard deviation."""
    comparable = setting["comparable"]
    rates = ", ".join(f"{name} {rate:g}" for name, rate in comparable["rates"].items())
    lines = [
        f"# {comparable['model']}: what training wins back",
        "",
        f"{comparable['tokens']:,} training tokens, {comparable['kv']:.0%} of the KV bytes kept; {setting['device']}, "
        f"{setting['dtype']}. Score: mean of the three losses (nats per token, lower is better); gap: score minus that "
        "of the control of the same seed: the base after the same training, or the control of other runs that teaches. "
        "Learning rates, where none is named: "
        f"{rates}. Made by `scripts/benchmark_training.py`; the JSON file beside has all numbers.",
        "",
        "| layout | trained | score | gap | text | wikitext | responses | tokens | seconds | seeds |",
        "| :--- | :--- | ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: |",
    ]
    for entry in entries:
        rows = entry["rows"]
        cells = [entry["layout"], words(entry["part"]), spread([row["score"] for row in rows])]
        cells.append(spread(entry["gap"]) if entry["gap"] else "–")
        cells += [spread([row[name] for row in rows]) for name in ("text", "wikitext", "responses")]
        cells += [f"{statistics.fmean(row[name] for row in rows):,.0f}" for name in ("tokens", "seconds")]
        lines.append("| " + " | ".join([*cells, str(len(rows))]) + " |")
    return "\n".join(lines) + "\n"


def words(part: str) -> str:
    """A part's name for tables: `control teaches, weight 1.0, tokens all, 2e-4`."""
    names, _, rates = part.partition("@")
    # Where a teacher's distributions come from changes the time and no result.
    kept = [name.replace("=", " ") for name in names.split("+") if not name.startswith("precompute")]
    return ", ".join([*kept, *(rates.split(",") if rates else [])])


def spread(values: Sequence[float]) -> str:
    """Mean, and standard deviation over seeds where there are several."""
    mean = statistics.fmean(values)
    return f"{mean:.3f} ± {statistics.stdev(values):.3f}" if len(values) > 1 else f"{mean:.3f}"


def draw(entries: Sequence[dict], path: Path) -> None:
    """Gaps as bars, one group for each layout."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

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


def main() -> None:
    """Reads the command line and measures."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", help="directory or hub id")
    parser.add_argument("--train", nargs="+", required=True, help="training rows, files or hub data sets")
    parser.add_argument(
        "--synthetic", nargs="*", default=[], help="further training rows, which `uniattn synthesize` wrote"
    )
    parser.add_argument("--text", required=True, help="JSONL with a column `text`")
    parser.add_argument("--wikitext", required=True, help="plain text")
    parser.add_argument("--out", default="docs/benchmarks/training.json")
    parser.add_argument("--work", help="folder of the run directories, kept; a temporary one by default")
    parser.add_argument(
        "--controls", help="--work of other runs, whose controls teach here; by default those of these runs do"
    )
    parser.add_argument("--tokens", type=int, default=2_000_000, help="training tokens of each row")
    parser.add_argument(
        "--parts",
        nargs="*",
        default=list(PARTS),
        help=f"{', '.join(PARTS)}; +SETTING=VALUE and @RATE after any trained",
    )
    parser.add_argument("--layouts", nargs="*", choices=LAYOUTS, default=list(LAYOUTS))
    parser.add_argument("--seeds", nargs="*", type=int, default=[0, 1, 2])
    parser.add_argument("--kv", type=float, default=0.8, help="share of the KV bytes that all layouts keep")
    parser.add_argument("--search", choices=("fast", "thorough"), default="thorough", help="of the softmax layout")
    parser.add_argument("--head-map", default="free")
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--micro-batch-size", type=int, default=16)
    parser.add_argument("--max-length", type=int, default=512)
    parser.add_argument(
        "--set", action="append", default=[], metavar="KEY=VALUE", help="a further setting of the recipe, for all rows"
    )
    parser.add_argument("--length", type=int, default=1024, help="tokens of a window of text")
    parser.add_argument("--fit-tokens", type=int, default=163840)
    parser.add_argument("--score-tokens", type=int, default=24576, help="that judge candidates of the search")
    parser.add_argument("--text-tokens", type=int, default=WIKITEXT_TOKENS, help="at most this many of each text")
    parser.add_argument("--responses", type=int, default=200, help="held-out rows of the score")
    parser.add_argument(
        "--equal-time",
        type=float,
        default=1.5,
        help="steps of that part over the others': the time that a teacher costs",
    )
    parser.add_argument("--device", default="auto")
    parser.add_argument(
        "--layouts-from", nargs="*", default=[], help="JSON files of benchmark_layouts.py, for their layouts"
    )
    parser.add_argument("--merge", nargs="*", default=[], help="only put these JSON files of other processes together")
    arguments = parser.parse_args()
    unknown = [part for part in arguments.parts if name_of(part) not in PARTS]
    if unknown:
        parser.error(f"unknown parts: {', '.join(unknown)} (known: {', '.join(PARTS)})")
    out = Path(arguments.out)
    if arguments.merge:
        write(merged([json.loads(Path(name).read_text(encoding="utf-8")) for name in arguments.merge]), out)
        return
    bench = Bench(arguments)
    for seed in arguments.seeds:
        if arguments.controls:
            bench.teacher_row(seed)
        for layout in arguments.layouts:
            for part in arguments.parts:
                bench.row(layout, part, seed)
    bench.save()


if __name__ == "__main__":
    main()
