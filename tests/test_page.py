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

from uniattn_cli.charts import COLOURS, LABEL_HEIGHT, SERIES, Chart, label, plot, to_svg
from uniattn_cli.commands import evaluate, report
from uniattn_cli.errors import StageError
from uniattn_cli.evaluation import figures
from uniattn_cli.modeling.layout_uniattn import BORROWING_KINDS, KINDS, Layout
from uniattn_cli.models.fingerprint import fingerprint
from uniattn_cli.reporting import charts, reproduce, tables
from uniattn_cli.reporting.evidence import RECORDED, Evidence, collect
from uniattn_cli.reporting.report import TEMPLATES, THEMES, page
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
    return page(results, found)


def test_everything_is_shown_once(whole):
    headings = [element.words() for element in Tree(whole).root.all("h2")]
    assert headings == [
        "Verdict",
        "Quality and cost",
        "Quality against KV cache",
        "Notes",
        "By length, and agreement with the base",
        "Speed and memory",
        "Layers",
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
    text = page(bare, Evidence(model="m"))
    headings = [element.words() for element in Tree(text).root.all("h2")]
    assert not {"Layers", "Training", "Samples"} & set(headings)
    assert "None" not in text and "nan" not in re.sub(r"<style>.*?</style>", "", text)


def test_nothing_is_loaded_and_nothing_runs(whole):
    root = Tree(whole).root
    for name in ("script", "link", "img", "iframe", "object", "image"):
        assert not root.all(name)
    assert not re.search(r"url\((?!#)", whole) and "@import" not in whole
    assert not re.search(r"https?://", whole)
    for element in root.all("use"):
        assert element.attributes["href"].startswith("#")
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


def test_every_picture_has_words(whole):
    root = Tree(whole).root
    ids = re.findall(r' id="([^"]*)"', whole)
    assert len(ids) == len(set(ids))
    assert len(root.all("figure")) == 2 + 2 + 2 + 3 + 1
    for figure in root.all("figure"):
        assert figure.children[-1].name == "figcaption" and len(figure.children[-1].words()) > 20
        drawing = figure.all("svg")[0]
        assert drawing.attributes["role"] == "img"
        assert [child.name for child in drawing.children[:2]] == ["title", "desc"]
        named = [child.attributes["id"] for child in drawing.children[:2]]
        assert drawing.attributes["aria-labelledby"].split() == named
        assert all(child.words().strip() for child in drawing.children[:2])
        assert drawing.all("text"), "text is text, so that it can be searched and read aloud"
    for numbers in re.findall(r' (?:d|points|x|y|transform)="([^"]*)"', whole):
        assert not re.search(r"nan|inf|None", numbers)


def test_tables_can_be_read_aloud(whole):
    root = Tree(whole).root
    ids = set(re.findall(r' id="([^"]*)"', whole))
    assert len(root.all("table")) >= 6
    for table in root.all("table"):
        assert table.attributes["aria-labelledby"] in ids
        # A heading without words would be read aloud as nothing.
        assert all(cell.words() for cell in table.all("th"))
        width = len(table.all("tr")[0].children)
        assert all(cell.attributes["scope"] == "col" for cell in table.all("thead")[0].all("th"))
        for row in table.all("tbody")[0].all("tr"):
            assert row.children[0].attributes["scope"] == "row" and len(row.children) == width
        assert table.parent.attributes["class"] == "scroll" and table.parent.attributes["tabindex"] == "0"


def test_differences_to_a_control_stand_beside_those_to_the_base(whole):
    rows = [row for row in Tree(whole).root.all("tr") if row.words().startswith(tables.AGAINST_CONTROL)]
    assert [row.words().count("−123.00") for row in rows] == [2]


def test_tables_are_those_of_terminal_and_markdown(run, results):
    text = (run / "evaluation" / "report.html").read_text(encoding="utf-8")
    markdown = (run / "evaluation" / "report.md").read_text(encoding="utf-8")
    found = [
        [[cell.words() for cell in row.children] for row in table.all("tr")] for table in Tree(text).root.all("table")
    ]
    wanted = [*tables.tables(results), *tables.length_tables(results), tables.models_table(results)]
    for table in wanted:
        assert [table.columns, *table.rows] in found, table.title
        assert all(cell.replace("|", "\\|") in markdown for row in table.rows for cell in row)
    for model in results["models"].values():
        if model["verdict"]:
            assert model["verdict"]["sentence"] in Tree(text).root.words()


def test_judgements_are_symbols_and_words(whole, results):
    root = Tree(whole).root
    cards = root.all("article")
    assert len(cards) == len(results["models"]) - 1
    for card in cards:
        assert re.match(r"[▲▼≈=◆?] \w", card.all("p")[0].words())
    assert all(symbol in tables.EXPLANATION for word, symbol in tables.SYMBOLS.items() if word != "mixed")


def luminance(colour: str) -> float:
    parts = [int(colour[start : start + 2], 16) / 255 for start in (1, 3, 5)]
    linear = [part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


@pytest.mark.parametrize("colours", THEMES.values(), ids=THEMES)
def test_contrast_of_everything_that_is_read(colours):
    for name in ("ink", "soft", "good", "bad", "even", *SERIES):
        for ground in ("page", "panel"):
            light, dark = sorted((luminance(colours[name]), luminance(colours[ground])), reverse=True)
            assert (light + 0.05) / (dark + 0.05) >= 4.5, f"{name} on {ground}"
    used = set(re.findall(r"var\(--(\w+)\)", (TEMPLATES / "report.css").read_text(encoding="utf-8")))
    assert used | set(COLOURS) <= set(colours)


def test_the_same_results_give_the_same_page(results):
    assert page(results, evidence()) == page(copy.deepcopy(results), evidence())


# --- charts -----------------------------------------------------------------------------------------------------------


def drawn(draw) -> str:
    return to_svg(Chart("t", "w", draw), 0)


def written(drawing: str) -> dict[str, tuple[float, float]]:
    """Where each text begins."""
    found = re.findall(r'<text [^>]*?x="([\d.-]+)" y="([\d.-]+)"[^>]*>([^<]*)</text>', drawing)
    return {html.unescape(text): (float(x), float(y)) for x, y, text in found}


def test_every_colour_of_a_chart_follows_the_theme(results):
    everything = [*charts.of_models(results), *charts.lengths(with_lengths(results)), *charts.training(evidence())]
    everything += charts.existing(charts.layer_map, charts.frontier, charts.damage, evidence=evidence())
    assert len(everything) == 2 + 2 + 1 + 3
    for chart in everything:
        drawing = to_svg(chart, 0)
        assert "var(--ink)" in drawing and not re.search(r"#[0-9a-fA-F]{6}\b", drawing), chart.title
        assert "<style" not in drawing and "font-family" not in drawing


def test_texts_of_a_chart_are_texts():
    def draw(axis):
        plot(axis, HOSTILE, [(1, 2), (3, 4)], errors=[0.1, None])
        axis.set(xlabel="$x$ < 1")
        axis.legend()

    assert {HOSTILE, "$x$ < 1"} <= set(written(drawn(draw)))


def test_numbers_of_an_axis_are_written_in_full():
    texts = written(drawn(lambda axis: plot(axis, "a", [(0.0, 0.0), (1.0, 0.125)])))
    assert {"0.02", "0.12"} <= set(texts)


@pytest.mark.parametrize("value", [0.0, 1.0, -3.0, 1e-12, 1e9])
def test_a_single_value_can_be_drawn(value):
    drawing = drawn(lambda axis: plot(axis, "a", [(value, value)], errors=[0.0]))
    assert "<use " in drawing and not re.search(r"nan|inf", drawing)


def test_labels_do_not_cover_each_other():
    def draw(axis):
        for style, name in enumerate(("first", "second", "third")):
            label(axis, name, (1.0, 1.0), style)

    heights = sorted(y for name, (_, y) in written(drawn(draw)).items() if name in ("first", "second", "third"))
    assert min(b - a for a, b in itertools.pairwise(heights)) >= LABEL_HEIGHT - 0.2


def test_the_map_frames_what_is_borrowed():
    found = evidence()
    layout = Layout.from_list(found.conversion["layout"])
    assert [charts.lenders(layout, layer) for layer in (2, 3, 5)] == [{}, {1: 0.5, 2: 0.5}, {2: 1.0}]
    chart = charts.layer_map(found)
    assert "3 of 6 layers were changed: 3 from 1 and 2; 4 (nothing borrowed); 5 from 2." in chart.words
    drawing = to_svg(chart, 0)
    paths = re.findall(r'<path d="([^"]*)"[^>]*style="([^"]*)"', drawing)
    cells = "".join(path for path, look in paths if "fill: var(--heat)" in look).count("M")
    assert cells == sum(value is not None for row in found.similarity for value in row)
    frames = [look for _, look in paths if "fill: none" in look and "stroke: var(--s1)" in look and "width" in look]
    assert len(frames) == 3


@pytest.mark.parametrize("kind", BORROWING_KINDS)
def test_words_below_the_map_explain_frames_whatever_is_borrowed(kind):
    found = evidence()
    found.conversion = {"layout": [{"kind": "own"}] * 5 + [{"kind": kind, "leader": 2}]}
    words = charts.layer_map(found).words
    assert "Frames show the lenders" in words and KINDS[kind].phrase in words and "5 from 2" in words


def test_curves_have_validation_and_held_out_losses():
    (chart,) = charts.training(evidence())
    assert {"validation rows", "held-out responses, trained", "training, all"} <= set(written(to_svg(chart, 0)))
    assert "Training loss 3.000 at the first logged step, 0.375 at the last" in chart.words
    assert "held-out responses, trained: 1.500" in chart.words


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
    command = reproduce.command("eval", {"settings": recorded}, found)
    assert command == "uniattn eval --set evaluation.tokens=20 --set 'evaluation.tasks=[\"a b\"]'"


def test_every_stage_has_a_command():
    found = Evidence(recipe="x", settings={}, records={stage: {"settings": {}} for stage in RECORDED})
    stages = [command.split()[1] for command in reproduce.commands(found)]
    assert stages == [stage for stage in RECORDED if stage != "group"]


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
