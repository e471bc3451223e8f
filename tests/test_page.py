"""`report.html`: what it must be without a browser, and that its numbers are those of `results.json`."""

from __future__ import annotations

import copy
import dataclasses
import html
import itertools
import json
import re
import shutil
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path

import pytest
from conftest import ROOT
from test_evaluation import make_run

from uniattn_cli.commands import evaluate, report
from uniattn_cli.errors import StageError
from uniattn_cli.evaluation import figures
from uniattn_cli.evaluation.wording import as_value
from uniattn_cli.modeling.layout_uniattn import BORROWING_KINDS, KINDS
from uniattn_cli.models.fingerprint import fingerprint
from uniattn_cli.reporting.page import context, curves, layers, page, plot, style
from uniattn_cli.reporting.page.evidence import Evidence, collect
from uniattn_cli.reporting.page.markup import Html, tag
from uniattn_cli.run.directory import RunDir
from uniattn_cli.run.files import write_json

HOSTILE = "<script>alert('x')</script> & <b>"


class Element:
    def __init__(self, name: str, attributes: dict, parent: Element | None):
        self.name, self.attributes, self.parent = name, attributes, parent
        self.children: list[Element] = []
        self.text = ""

    def all(self, name: str) -> list[Element]:
        found = []
        for child in self.children:
            found += [child] * (child.name == name) + child.all(name)
        return found

    def words(self) -> str:
        return self.text + "".join(child.words() for child in self.children)


class Tree(HTMLParser):
    """Parses a page and refuses tags that are not closed in order."""

    def __init__(self, text: str):
        super().__init__(convert_charrefs=True)
        self.root = self.here = Element("root", {}, None)
        self.feed(text)
        self.close()
        assert self.here is self.root, f"<{self.here.name}> is not closed"

    def handle_starttag(self, name, attributes):
        assert len(dict(attributes)) == len(attributes), f"<{name}> names an attribute twice"
        element = Element(name, dict(attributes), self.here)
        self.here.children.append(element)
        if name not in ("meta", "br"):
            self.here = element

    def handle_endtag(self, name):
        assert self.here.name == name, f"</{name}> closes <{self.here.name}>"
        self.here = self.here.parent

    def handle_data(self, text):
        self.here.text += text


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run directory after an evaluation of three models."""
    root = make_run(tmp_path_factory.mktemp("page"))
    shutil.copytree(root / "base", root / "copy")
    evaluate.evaluate(run_dir=root, checkpoints=[str(root / "copy")])
    return root


@pytest.fixture
def results(run) -> dict:
    return figures.read_results(run / "evaluation" / "results.json")


def with_lengths(results: dict) -> dict:
    """The results with everything that may be there."""
    found = copy.deepcopy(results)
    for index, model in enumerate(found["models"].values()):
        model["lengths"] = [
            {"length": length, "perplexity": 15.0 + index, "stderr": 0.3, "tokens": 4096} for length in (256, 1024)
        ]
        model["retrieval"] = [{"length": length, "correct": 3, "items": 4} for length in (256, 1024)]
        if index:
            perplexity = model["quality"]["perplexity"]
            control = dataclasses.replace(perplexity.difference_to_base, value=-123.0)
            model["quality"]["perplexity"] = dataclasses.replace(perplexity, difference_to_control=control)
            kl = figures.Figure(0.125, "nats per token", "lower", n=4, of="windows", stderr=0.01)
            top1 = figures.Figure(0.875, "share", "higher", n=4, of="windows", stderr=0.01)
            by_position = {"edges": [0, 16, 64], "kl": [0.1, 0.2], "top1": [0.9, 0.8]}
            model["agreement"] = {"kl": kl, "top1": top1, "by_position": by_position}
    times = {"median": 0.0315, "low": 0.03, "high": 0.033}
    models = {name: {"ttft": times, "tpot": times, "peak_bytes": None} for name in found["models"]}
    found["speed_grid"] = [{"batch": 2, "context": 4096, "models": models}]
    fits = {name: {"context": None, "batch": 7, "at_context": 4096, "window": 8192} for name in found["models"]}
    found["capacity"] = [{"memory_gb": 24.0, "models": fits}]
    return found


def evidence() -> Evidence:
    """Files of a made-up run of six layers."""
    layout = [{"kind": "own"}] * 3 + [
        {"kind": "softmax", "heads": "1:0 1:1 2:0 2:1", "compensation": "full"},
        {"kind": "linear", "compensation": "full"},
        {"kind": "softmax", "leader": 2, "compensation": "none"},
    ]
    fits = [{"layer": n, "kind": "softmax", "error_before": 1.5 / n, "error_after": 0.3 / n} for n in (3, 4, 5)]
    lines = [{"stage": "all", "step": n, "loss": 3.0 / n} for n in range(1, 9)]
    lines.append({"stage": "all", "step": 8, "validation_loss": 1.25})
    frontier = [
        {"series": "fast", "value": 0.5 * n, "changed": n, "kv_share": 1 - 0.1 * n, "layers": layout} for n in (1, 3)
    ]
    heldout = {"trained": {"mean": 1.5, "stderr": 0.1}}
    return Evidence(
        model="some/model",
        similarity=[[0.2 + 0.1 * other if layer - other < 4 else None for other in range(layer)] for layer in range(6)],
        similarity_tokens=4096,
        conversion={"layout": layout, "fits": fits},
        training={"trained": {"lines": lines, "report": {"heldout_responses": heldout}}},
        grouping={"measure": "KL < 1", "frontier": frontier, "chosen": layout},
    )  # fmt: skip


@pytest.fixture
def whole(results):
    """A page with every section, made from hostile names and texts."""
    results = with_lengths(results)
    results["models"] = {(HOSTILE if name.endswith("copy") else name): m for name, m in results["models"].items()}
    for entry in results["speed_grid"] + results["capacity"]:
        entry["models"] = dict(zip(results["models"], entry["models"].values(), strict=True))
    results["samples"] = [{"prompt": HOSTILE, "reference": HOSTILE, "texts": {"base": HOSTILE, HOSTILE: ""}}]
    results["notes"] = [HOSTILE]
    found = evidence()
    found.recipe, found.model = HOSTILE, "owner/<i>&amp;"
    return page.page(results, found)


def test_everything_is_shown_once(whole):
    headings = [element.words() for element in Tree(whole).root.all("h2")]
    assert headings == [
        "Verdict",
        "Quality and cost",
        "Quality against KV cache",
        "Notes",
        "Agreement with the base",
        "Long texts",
        "Speed and memory",
        "Shared layers",
        "Error by layer",
        "Training",
        "Samples",
        "Settings and versions",
        "How to reproduce it",
    ]
    levels = [int(name[1]) for name in re.findall(r"<(h[1-6])[ >]", whole)]
    assert levels[0] == 1 and all(after - before <= 1 for before, after in itertools.pairwise(levels))


def test_what_is_not_there_is_left_out_silently(results):
    bare = copy.deepcopy({key: value for key, value in results.items() if key != "samples"})
    for model in bare["models"].values():
        model.pop("agreement", None)
    text = page.page(bare, Evidence(model="m"))
    headings = [element.words() for element in Tree(text).root.all("h2")]
    assert "Agreement with the base" not in headings and "Training" not in headings and "Samples" not in headings
    assert "None" not in text and "nan" not in re.sub(r"<style>.*?</style>", "", text)


def test_nothing_is_loaded_and_nothing_runs(whole):
    root = Tree(whole).root
    for name in ("script", "link", "img", "iframe", "object", "use"):
        assert not root.all(name)
    assert "url(" not in whole and "@import" not in whole
    assert not re.search(r"https?://", whole)
    for element in root.all("a"):
        assert element.attributes["href"].startswith("#")
    assert "default-src 'none'" in root.all("meta")[2].attributes["content"]
    assert not [key for key in re.findall(r"<[^>]* (on\w+)=", whole)]


def test_names_and_texts_are_escaped(whole):
    root = Tree(whole).root
    assert root.all("h1")[0].words() == "<i>&amp;: converted model compared with the base"
    assert HOSTILE in [element.words() for element in root.all("h4")]
    assert HOSTILE in [element.words() for element in root.all("pre")]
    assert HOSTILE in [element.words() for element in root.all("th")]
    assert [element.words() for element in root.all("li")].count(HOSTILE) >= 1
    assert tag("p", "a<b", Html("<i></i>"), title='"') == '<p title="&quot;">a&lt;b<i></i></p>'


def test_every_picture_has_words(whole):
    root = Tree(whole).root
    ids = re.findall(r' id="([^"]*)"', whole)
    assert len(ids) == len(set(ids))
    assert len(root.all("figure")) == 2 + 2 + 2 + 2 + 1 + 1
    for figure in root.all("figure"):
        assert figure.children[-1].name == "figcaption" and len(figure.children[-1].words()) > 20
        drawing = figure.all("svg")[0]
        assert drawing.attributes["role"] == "img"
        assert [child.name for child in drawing.children[:2]] == ["title", "desc"]
        named = [child.attributes["id"] for child in drawing.children[:2]]
        assert drawing.attributes["aria-labelledby"].split() == named
        assert all(child.words().strip() for child in drawing.children[:2])
        for swatch in figure.all("svg")[1:]:
            assert swatch.attributes["aria-hidden"] == "true"
    for numbers in re.findall(r' (?:d|points|x|y|transform)="([^"]*)"', whole):
        assert not re.search(r"nan|inf|None", numbers)


def test_tables_can_be_read_aloud(whole):
    root = Tree(whole).root
    ids = set(re.findall(r' id="([^"]*)"', whole))
    assert len(root.all("table")) >= 7
    for table in root.all("table"):
        assert table.attributes["aria-labelledby"] in ids
        width = len(table.all("thead")[0].all("th"))
        assert all(cell.attributes["scope"] == "col" for cell in table.all("thead")[0].all("th"))
        for row in table.all("tbody")[0].all("tr"):
            assert row.children[0].attributes["scope"] == "row" and len(row.children) == width
        assert table.parent.attributes["class"] == "scroll" and table.parent.attributes["tabindex"] == "0"


def test_differences_to_a_control_stand_beside_those_to_the_base(whole):
    told = [element.words() for element in Tree(whole).root.all("span") if "from control" in element.words()]
    assert len(told) == 2 and all(words.startswith("from control: −123.00") for words in told)


def test_numbers_are_those_of_the_results(run, results):
    text = (run / "evaluation" / "report.html").read_text(encoding="utf-8")
    shown = {
        element.attributes["data-figure"]: element
        for element in Tree(text).root.all("data")
        if "data-figure" in element.attributes
    }
    for place, element in shown.items():
        # Names of models may hold slashes.
        name = max((n for n in results["models"] if place.startswith(f"models/{n}/")), key=len)
        entry = results["models"][name]
        for key in place.removeprefix(f"models/{name}/").split("/"):
            entry = entry[key]
        assert float(element.attributes["value"]) == entry.value
        assert element.words() == as_value(entry, error=True)
    for name, model in results["models"].items():
        wanted = [f"quality/{key}" for key in ("perplexity", "response_loss", "accuracy")]
        wanted += [f"cost/{key}" for key in model["cost"]]
        wanted += [f"tasks/{task}/{metric}" for task in results["tasks"] for metric in model["tasks"][task]]
        assert {f"models/{name}/{key}" for key in wanted} <= set(shown)
        if model["verdict"]:
            assert model["verdict"]["sentence"] in Tree(text).root.words()


def test_judgements_are_symbols_and_words(whole, results):
    root = Tree(whole).root
    marks = {element.words() for element in root.all("span") if "mark" in element.attributes.get("class", "")}
    assert marks and all(re.fullmatch(r"[▲▼≈=◆?] (better|worse|as good|same|mixed|not told apart)", m) for m in marks)
    cards = root.all("article")
    assert len(cards) == len(results["models"]) - 1
    for card in cards:
        assert re.match(r"[▲▼≈=◆?] \w", card.all("p")[0].words())


def luminance(colour: str) -> float:
    parts = [int(colour[start : start + 2], 16) / 255 for start in (1, 3, 5)]
    linear = [part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


@pytest.mark.parametrize("colours", [style.LIGHT, style.DARK], ids=["light", "dark"])
def test_contrast_of_everything_that_is_read(colours):
    for name in ("ink", "soft", "good", "bad", "even", *(f"s{index}" for index in range(style.SERIES))):
        for ground in ("page", "panel"):
            light, dark = sorted((luminance(colours[name]), luminance(colours[ground])), reverse=True)
            assert (light + 0.05) / (dark + 0.05) >= 4.5, f"{name} on {ground}"
    assert set(style.LIGHT) == set(style.DARK)
    used = set(re.findall(r"var\(--(\w+)\)", style.sheet()))
    assert used <= set(style.LIGHT)


def test_the_same_results_give_the_same_page(results):
    assert page.page(results, evidence()) == page.page(copy.deepcopy(results), evidence())


# --- charts -----------------------------------------------------------------------------------------------------------


def places(drawing: str) -> list[tuple[float, float]]:
    return [(float(x), float(y)) for x, y in re.findall(r'<circle cx="([\d.]+)" cy="([\d.]+)"', drawing)]


def test_points_stand_where_their_values_are():
    series = [plot.DataSeries("a", [(0, 1.0), (5, 2.0), (10, 4.0)])]
    (x0, y0), (x1, y1), (x2, y2) = places(plot.chart("t", "d", series, plot.Axis("x"), plot.Axis("y")))
    assert x1 - x0 == pytest.approx(x2 - x1, abs=0.2)
    assert (y0 - y1) * 2 == pytest.approx(y1 - y2, abs=0.3) and y0 > y1 > y2
    log = plot.Axis("y", log=True)
    (_, y0), (_, y1), (_, y2) = places(plot.chart("t", "d", series, plot.Axis("x"), log))
    assert y0 - y1 == pytest.approx(y1 - y2, abs=0.2)


@pytest.mark.parametrize("value", [0.0, 1.0, -3.0, 1e-12, 1e9])
def test_a_single_value_can_be_drawn(value):
    series = [plot.DataSeries("a", [(value, value)], [0.0], label=True)]
    ((x, y),) = places(plot.chart("t", "d", series, plot.Axis("x", whole=True), plot.Axis("y", zero=True)))
    assert 0 <= x <= plot.WIDTH and 0 <= y <= plot.HEIGHT


def test_labels_do_not_cover_each_other():
    series = [plot.DataSeries(name, [(1.0, 1.0)], style=n, label=True) for n, name in enumerate(("a", "b", "c"))]
    drawing = plot.chart("t", "d", series, plot.Axis("x"), plot.Axis("y"))
    heights = sorted(float(y) for y in re.findall(r'y="([\d.]+)" class="label', drawing))
    assert min(b - a for a, b in itertools.pairwise(heights)) >= plot.LABEL_HEIGHT - 0.1


def test_the_map_frames_what_is_borrowed():
    drawing = layers.redundancy(evidence())
    told = re.findall(r"<title>(layer \d+ borrows [^<]*)</title>", drawing)
    assert told == [
        "layer 3 borrows 50% of its heads from layer 1",
        "layer 3 borrows 50% of its heads from layer 2",
        "layer 5 borrows 100% of its heads from layer 2",
    ]
    assert "3 of 6 layers were changed: 3 from 1 and 2; 4 (nothing borrowed); 5 from 2." in drawing
    cells = "".join(re.findall(r'<path d="([^"]*)" class="heat"', drawing)).count("M")
    assert cells == sum(value is not None for row in evidence().similarity for value in row)


@pytest.mark.parametrize("kind", BORROWING_KINDS)
def test_the_legend_explains_frames_whatever_is_borrowed(kind):
    found = evidence()
    found.conversion = {"layout": [{"kind": "own"}] * 5 + [{"kind": kind, "leader": 2}]}
    drawing = layers.redundancy(found)
    assert "layer 5 borrows 100% of its heads from layer 2" in drawing
    assert "from this layer (thicker for more heads)" in drawing and html.escape(KINDS[kind].phrase) in drawing


def test_curves_have_validation_and_held_out_losses():
    (drawing,) = curves.training(evidence())
    assert "validation rows" in drawing and "held-out responses, trained: 1.500" in drawing
    assert "training loss 3.000 at the first logged step, 0.375 at the last" in drawing


# --- what lies in the run directory -----------------------------------------------------------------------------------


def test_stale_and_damaged_files_are_left_out_with_a_note(run, results, tmp_path):
    shutil.copytree(run, tmp_path / "run")
    here = RunDir(tmp_path / "run")
    report = {"layout": [{"kind": "own"}] * 6, "fits": []}
    (here.output("convert") / "uniattn_report.json").write_text(json.dumps(report), encoding="utf-8")
    results["models"]["converted"]["fingerprint"] = fingerprint(here.output("convert"))
    found = collect(here, results, here.output("eval"))
    assert found.conversion == report and not found.notes
    (here.output("convert") / "uniattn_report.json").write_text("{", encoding="utf-8")
    results["models"]["converted"]["fingerprint"] = fingerprint(here.output("convert"))
    found = collect(here, results, here.output("eval"))
    assert found.conversion is None and "uniattn_report.json is damaged" in found.notes[0]
    results["models"]["converted"]["fingerprint"] = "another"
    found = collect(here, results, here.output("eval"))
    assert found.notes == ["converted/ has changed since the evaluation; its details are left out."]
    (tmp_path / "run" / "analysis").mkdir()
    (tmp_path / "run" / "analysis" / "analysis.json").write_text("{}", encoding="utf-8")
    assert any("similarity map" in note for note in collect(here, results, here.output("eval")).notes)


def test_commands_tell_what_was_set_on_the_command_line():
    found = Evidence(
        recipe="x", settings={"model": {"name": "m"}, "data": {}, "evaluation": {"tokens": 10, "tasks": []}}
    )
    recorded = {"model": {"name": "m"}, "data": {}, "evaluation": {"tokens": 20, "tasks": ["a b"]}}
    command = context._command("eval", {"settings": recorded}, found)
    assert command == "uniattn eval --set evaluation.tokens=20 --set 'evaluation.tasks=[\"a b\"]'"


def test_the_command_makes_the_page_again_without_torch(run, results, tmp_path):
    root = tmp_path / "run"
    shutil.copytree(run, root)
    before = (root / "evaluation" / "report.html").read_text(encoding="utf-8")
    (root / "evaluation" / "report.html").unlink()
    code = (
        "import sys\nfrom uniattn_cli.cli.app import app\n"
        f"try: app(['report', '-C', {str(root)!r}])\nexcept SystemExit as end: assert not end.code\n"
        "sys.exit('torch' if 'torch' in sys.modules else 0)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    assert "page: evaluation/report.html" in done.stdout
    again = (root / "evaluation" / "report.html").read_text(encoding="utf-8")
    assert Tree(again).root.all("table")[0].words() == Tree(before).root.all("table")[0].words()
    results["notes"].append("a new note")
    write_json(root / "evaluation" / "results.json", results)
    report.report(run_dir=root)
    assert "a new note" in (root / "evaluation" / "report.html").read_text(encoding="utf-8")


def test_without_results_there_is_one_line(tmp_path):
    with pytest.raises(StageError, match=r"evaluation is missing; run `uniattn eval` first"):
        report.report(run_dir=tmp_path)
    folder = tmp_path / "evaluation"
    folder.mkdir()
    (folder / "results.json").write_text("[]", encoding="utf-8")
    with pytest.raises(StageError, match=r"is damaged .a list, not"):
        report.report(run_dir=tmp_path)
    assert [path.name for path in folder.iterdir()] == ["results.json"]


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"schema": 1}, r"has schema 1, this version of uniattn reads 3; run `uniattn eval --force`"),
        ({"schema": None}, "has schema None"),
        ({"models": {}}, r"not the result of an evaluation .it has no base.; run `uniattn eval --force`"),
    ],
)
def test_results_of_another_version_are_refused_in_one_line(changes, words, results, tmp_path):
    (tmp_path / "evaluation").mkdir()
    write_json(tmp_path / "evaluation" / "results.json", results | changes)
    with pytest.raises(StageError, match=words):
        report.report(run_dir=tmp_path)
    assert not (tmp_path / "evaluation" / "report.html").exists()


# --- samples ----------------------------------------------------------------------------------------------------------


def test_samples_are_greedy_answers_of_all_models(run, results):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    assert len(results["samples"]) == 2
    tokenizer = AutoTokenizer.from_pretrained(run / "base")
    model = AutoModelForCausalLM.from_pretrained(run / "base")
    for sample in results["samples"]:
        assert set(sample["texts"]) == set(results["models"])
        assert sample["texts"]["base"] == sample["texts"][str(run / "copy")]
        prompt = [{"role": "user", "content": sample["prompt"]}]
        text = tokenizer.apply_chat_template(prompt, tokenize=False, add_generation_prompt=True)
        ids = tokenizer(text, add_special_tokens=False, return_tensors="pt")
        said = model.generate(**ids, max_new_tokens=4, do_sample=False)[0, ids["input_ids"].shape[1] :]
        assert sample["texts"]["base"] == tokenizer.decode(said, skip_special_tokens=True)
        assert sample["reference"].endswith(".")
        assert sample["prompt"] in Path(run / "chats.jsonl").read_text(encoding="utf-8")
