"""The examples of the documentation: code runs, commands and options exist, recipes are valid."""

from __future__ import annotations

import argparse
import contextlib
import importlib
import itertools
import json
import re
import runpy
import shlex
import shutil

import matplotlib
import pytest
import torch
import typer
import typer.main
from conftest import ROOT, run_here
from tiny_run import QUICK, make_model, settings, write_data

import uniattn_cli
from uniattn_cli.cli.app import app
from uniattn_cli.modeling.layout_uniattn import KINDS
from uniattn_cli.recipe.files import apply_overrides, read_tree, write_tree
from uniattn_cli.recipe.schema import Recipe

PAGES = [ROOT / "README.md", ROOT / "AGENTS.md", *sorted((ROOT / "docs").rglob("*.md"))]
TEXTS = {page.relative_to(ROOT).as_posix(): page.read_text(encoding="utf-8") for page in PAGES}


# A page, its language and its code, for every block.
BLOCKS = [
    (name, language, code)
    for name, text in TEXTS.items()
    for language, code in re.findall(r"^```(.*)\n((?:.*\n)*?)^```$", text, re.M)
]
# Blocks of output: how a line of ours begins, and what belongs to another program.
FOREIGN = ("AttributeError: module transformers", "plain:", "plugin:")


def blocks(language: str) -> list[str]:
    return [code for _, found, code in BLOCKS if found == language]


def shell_lines() -> list[list[str]]:
    """The words of every line that a shell is given, without comments and what it does with the output."""
    joined = [re.sub(r"\\\n\s*", "", code) for code in blocks("sh")]
    lines = [shlex.split(line, comments=True) for code in joined for line in _whole_lines(code)]
    return [list(itertools.takewhile(lambda word: word not in ("<", ">"), line)) for line in lines if line]


def _whole_lines(code: str) -> list[str]:
    """The commands of a block; a quoted text may go on over several lines."""
    found: list[str] = []
    for line in code.splitlines():
        if found and found[-1].count("'") % 2:
            found[-1] += " " + line
        else:
            found += line.split(" && ")
    return found


def commands() -> list[str]:
    return sorted({shlex.join(words) for words in shell_lines() if words[0] == "uniattn"})


def test_every_block_is_of_a_language_that_is_checked_here():
    assert {language for _, language, _ in BLOCKS} == {"sh", "python", "yaml", "text", "bibtex"}
    for name, text in TEXTS.items():
        rest = re.sub(r"^```.*\n(?:.*\n)*?^```$", "", text, flags=re.M)
        assert "```" not in rest and not re.search(r"\n\n    \S", rest), f"{name} has a block without a language"


def test_every_page_begins_with_something_to_run():
    for name, text in TEXTS.items():
        # Generated tables and a list of words.
        if (name.startswith("docs/benchmarks/") and not name.endswith("README.md")) or name == "docs/glossary.md":
            continue
        start = text.partition("\n## ")[0]
        assert re.search(r"^```(sh|python)$", start, re.M), name


def test_code_runs(tmp_path, monkeypatch):
    """One block after the other, as a reader would; of those that need other libraries only the syntax is checked."""
    monkeypatch.chdir(tmp_path)
    # A directory of that name wins over the hub.
    make_model(tmp_path / "meta-llama" / "Llama-3.2-1B-Instruct")
    run = tmp_path / "run"
    run.mkdir()
    write_data(run)
    (run / "recipe.yaml").write_text("model: {name: ../meta-llama/Llama-3.2-1B-Instruct}\n", encoding="utf-8")
    tree = read_tree(run / "recipe.yaml")
    apply_overrides(tree, settings())
    write_tree(tree, run / "recipe.yaml")
    known = {"input_ids": torch.arange(4, 12)[None], "attention_mask": torch.ones(1, 8, dtype=torch.long)}
    ran = 0
    for code in blocks("python"):
        compiled = compile(code, "a block", "exec")
        modules = set(re.findall(r"^from (\w+)", code, re.M))
        if modules and modules <= {"uniattn_cli", "transformers"}:
            exec(compiled, known)
            ran += 1
        if (run / "converted").is_dir() and not (tmp_path / "trained").exists():
            # What the pages call so is a checkpoint of the same form.
            shutil.copytree(run / "converted", tmp_path / "trained")
    assert ran >= 5
    assert known["conversion"].layout == known["layout"] and len(known["layout"].changed) == 4
    assert known["found"].tokens.shape[0] == 1


def test_the_notebook_runs(tmp_path, monkeypatch):
    """Its cells, one after the other, on a tiny model in the place of the real one."""
    matplotlib.use("Agg")
    cells = json.loads((ROOT / "docs" / "tour.ipynb").read_text(encoding="utf-8"))["cells"]
    first, *codes = ["".join(cell["source"]) for cell in cells if cell["cell_type"] == "code"]
    monkeypatch.chdir(tmp_path)
    known: dict = {}
    exec(first, known)
    make_model(tmp_path / known["MODEL"])
    few = {name: value for name, value in QUICK.items() if name.startswith(("analysis", "conversion"))}
    known["SETTINGS"] += [f"{name}={value}" for name, value in few.items()]
    for code in codes:
        exec(compile(code, "a cell", "exec"), known)
    assert known["layout"].layout == known["conversion"].layout and len(known["layout"].layout.changed) == 2
    base, converted = (answer.kv_bytes / answer.cached for answer in known["said"].values())
    assert converted / base == pytest.approx(5 / 6)


@pytest.mark.parametrize("line", commands())
def test_commands_and_options_exist(line):
    _, *words = shlex.split(line)
    command = typer.main.get_command(app)
    while hasattr(command, "commands") and words[:1] != ["--help"]:
        command = command.commands[words.pop(0)] if words else command.callback
    if hasattr(command, "make_context"):
        with contextlib.suppress(typer.Exit):
            command.make_context(line, words)


def test_other_programs_are_given_what_exists():
    """Targets, scripts, benchmarks with their options, extras; what another program is given is well-formed."""
    targets = re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.M)
    project = (ROOT / "pyproject.toml").read_text(encoding="utf-8").partition("optional-dependencies]")[2]
    extras = re.findall(r"^(\w+) = ", project.partition("\n[")[0], re.M)
    for program, *words in shell_lines():
        program = program.rpartition("/")[2]
        if program == "make":
            assert words[0] in targets, words
        elif words[:1] == ["-m"] and words[1].startswith("benchmarks."):
            options = benchmark_options(words[1].removeprefix("benchmarks."))
            given = [word.partition("=")[0] for word in words[2:] if re.match("--[a-z]", word)]
            # What follows is for another program.
            known = given[: given.index("--engine")] if "--engine" in given else given
            assert set(known) <= options, words
        elif program == "python" and words[0].endswith(".py"):
            assert (ROOT / words[0]).is_file(), words
        elif program == "pip":
            assert words[0] == "install", words
            for extra in re.findall(r"(?:uniattn|\.)\[([a-z,]+)\]", words[-1]):
                assert set(extra.split(",")) <= set(extras), words
        elif program == "curl":
            json.loads(words[words.index("-d") + 1])
        elif program == "source":
            assert words == [".venv/bin/activate"], words
        elif program not in ("uniattn", "python", "python3"):
            raise AssertionError(f"nothing checks `{program}`")


def benchmark_options(name: str) -> set[str]:
    """The options of a benchmark, and those that all of them have."""
    parser = argparse.ArgumentParser()
    importlib.import_module(f"benchmarks.{name}").add_options(parser)
    common = re.findall(r'"(--[a-z-]+)"', (ROOT / "benchmarks" / "runner.py").read_text(encoding="utf-8"))
    return {*common, *(option for action in parser._actions for option in action.option_strings)}


def test_output_is_what_the_code_says():
    """Each line of output has a piece of text between its figures that stands in the code, or consists of figures."""
    code = "".join(path.read_text(encoding="utf-8") for path in sorted((ROOT / "uniattn_cli").rglob("*.py")))
    # Long texts are broken over several lines of the code.
    code = re.sub(r'"\s*\n\s*f?"', "", code)
    for name, language, block in BLOCKS:
        for line in block.splitlines() if language == "text" else ():
            if name == "docs/architecture.md":
                continue
            if line.startswith(FOREIGN) or not re.search("[A-Za-z]{7}", line):
                continue
            pieces = [piece.strip(" ()") for piece in re.split(r"[\d,.]+x?|: |, ", line)] + re.split(" {3,}", line)
            assert any(len(piece) > 12 and piece in code for piece in pieces), line


def test_the_map_of_the_code_names_what_exists():
    (code,) = (code for name, language, code in BLOCKS if (name, language) == ("docs/architecture.md", "text"))
    places = re.findall(r"\b[a-z_]+/[a-z_]+\b", code)
    assert len(places) >= 10
    for place in places:
        assert (ROOT / "uniattn_cli" / place).exists() or (ROOT / "uniattn_cli" / f"{place}.py").exists(), place


@pytest.mark.parametrize("line", [line for line in commands() if line.startswith("uniattn recipes")])
def test_quick_commands_run(line, tmp_path):
    done = run_here(*shlex.split(line)[1:], cwd=tmp_path)
    assert (done.returncode, done.stderr) == (0, "")


WRITTEN = runpy.run_path(str(ROOT / "scripts" / "write_docs.py"))


@pytest.mark.parametrize("name", WRITTEN["PAGES"])
def test_what_follows_from_the_code_is_up_to_date(name):
    assert TEXTS[f"docs/{name}"] == WRITTEN["page"](name), "run scripts/write_docs.py"


def test_messages_explained_by_hand_are_those_of_the_code():
    known = {text for _, text in WRITTEN["all_messages"]()}
    by_hand = TEXTS["docs/troubleshooting.md"].partition(WRITTEN["MARK"])[0]
    quoted = re.findall(r"^> (`+) ?(.*?) ?\1$", by_hand, re.M)
    assert len(quoted) >= 6
    assert {text for _, text in quoted} <= known


def test_every_function_of_the_package_is_on_the_page_of_the_api():
    described = re.findall(r"^::: uniattn_cli\.(\S+)$", TEXTS["docs/python.md"], re.M)
    assert {place.rpartition(".")[2] for place in described} == {*uniattn_cli.__all__} - {"__version__"}
    for place in described:
        module, _, name = place.rpartition(".")
        assert getattr(importlib.import_module(f"uniattn_cli.{module}"), name) is getattr(uniattn_cli, name)


def test_every_page_is_in_the_navigation_of_the_site():
    listed = re.findall(r'"([\w/]+\.md)"', (ROOT / "zensical.toml").read_text(encoding="utf-8"))
    assert len(listed) == len(set(listed))
    on_disk = {name.removeprefix("docs/") for name in TEXTS if name.startswith("docs/")}
    # Tables of further runs are linked from the page on benchmarks.
    further = {name for name in on_disk if re.match(r"benchmarks/training(/|_\d|_own)", name)}
    assert set(listed) == on_disk - further


def anchors(text: str) -> set[str]:
    """What a link to a heading of a page may name."""
    headings = re.findall(r"^#+ (.*)$", text, re.M)
    return {re.sub(r"[^a-z0-9 _-]", "", heading.lower()).strip().replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", TEXTS)
def test_links_lead_somewhere(page):
    for target in re.findall(r"\]\(([^)\s]+)\)", TEXTS[page]):
        if not target.startswith("http"):
            name, _, anchor = target.partition("#")
            path = (ROOT / page).parent / name if name else ROOT / page
            assert path.exists(), target
            # The site holds docs/ alone.
            assert "/" not in page or path.resolve().is_relative_to(ROOT / "docs"), target
            assert not anchor or anchor in anchors(path.read_text(encoding="utf-8")), target


def test_the_readme_is_short():
    assert len(TEXTS["README.md"].split()) <= 1500 and TEXTS["README.md"].count("\n") <= 220


def test_the_picture_of_kinds_is_up_to_date_and_the_page_has_them_all():
    drawn = runpy.run_path(str(ROOT / "scripts" / "draw_kinds.py"))
    assert drawn["TARGET"].read_text(encoding="utf-8") == drawn["picture"]() + "\n", "run scripts/draw_kinds.py"
    assert all(f"`{name}`" in TEXTS["docs/kinds.md"] for name in KINDS if name != "own")


@pytest.mark.parametrize("text", [text for text in blocks("yaml")])
def test_recipes_are_valid(text, tmp_path):
    path = tmp_path / "recipe.yaml"
    path.write_text(text, encoding="utf-8")
    Recipe.load(path, ["model.name=some/model"])
