"""The examples of the documentation: code runs, commands and options exist, recipes are valid."""

from __future__ import annotations

import re
import runpy
import shlex

import pytest
import torch
import typer.main
from conftest import ROOT, run_here
from tiny_run import make_model, settings, write_data

from uniattn_cli.cli.app import app
from uniattn_cli.modeling.layout_uniattn import KINDS
from uniattn_cli.recipe.files import apply_overrides, read_tree, write_tree
from uniattn_cli.recipe.schema import Recipe

PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
TEXTS = {page.relative_to(ROOT).as_posix(): page.read_text(encoding="utf-8") for page in PAGES}


def blocks(language: str) -> list[str]:
    return [code for text in TEXTS.values() for code in re.findall(rf"^```{language}\n(.*?)^```", text, re.M | re.S)]


def commands() -> list[str]:
    """Every command line of the pages, without its comment and what the shell does with its output."""
    joined = [re.sub(r"\\\n\s*", "", text) for text in TEXTS.values()]
    lines = [line.strip() for text in joined for line in re.findall(r"^    uniattn .*$", text, re.M)]
    return sorted({shlex.join(shlex.split(line.partition(" < ")[0], comments=True)) for line in lines})


def test_code_runs(tmp_path, monkeypatch):
    """One block after the other, as a reader would; those of transformers and vLLM alone are tested elsewhere."""
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
    ours = [code for code in blocks("python") if "uniattn_cli" in code]
    assert len(ours) >= 3
    known = {"input_ids": torch.arange(4, 12)[None], "attention_mask": torch.ones(1, 8, dtype=torch.long)}
    for code in ours:
        exec(compile(code, "README.md", "exec"), known)
    assert known["conversion"].layout == known["layout"] and len(known["layout"].changed) == 4
    assert known["found"].tokens.shape[0] == 1


@pytest.mark.parametrize("line", commands())
def test_commands_and_options_exist(line):
    _, *words = shlex.split(line)
    command = typer.main.get_command(app)
    while hasattr(command, "commands"):
        command = command.commands[words.pop(0)] if words else command.callback
    if hasattr(command, "make_context"):
        command.make_context(line, words)


@pytest.mark.parametrize("line", [line for line in commands() if line.startswith("uniattn recipe")])
def test_quick_commands_run(line, tmp_path):
    done = run_here(*shlex.split(line)[1:], cwd=tmp_path)
    assert (done.returncode, done.stderr) == (0, "")


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
