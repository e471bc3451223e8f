"""What goes wrong for users: every fault is one clear line and the right exit code, and nothing is written."""

from __future__ import annotations

import contextlib
import errno
import http.server
import json
import os
import shutil
import signal
import socket
import subprocess
import threading
import time
from pathlib import Path

import pytest
import torch
from conftest import ROOT, command
from huggingface_hub import close_session, constants
from safetensors import SafetensorError
from safetensors.numpy import load_file, save_file
from tiny_run import make_model, settings, write_data

from uniattn_cli.analysis.measured import Measured
from uniattn_cli.cli.guard import run_directory
from uniattn_cli.commands.analyze import analyze
from uniattn_cli.commands.convert import convert
from uniattn_cli.commands.evaluate import evaluate
from uniattn_cli.commands.group import group
from uniattn_cli.data.rows import read_rows
from uniattn_cli.errors import CheckpointError, DataError, LayoutError, ModelError, RecipeError, StageError, UsageError
from uniattn_cli.models import loading
from uniattn_cli.models.hub import locate
from uniattn_cli.models.tokenizer import load_tokenizer
from uniattn_cli.options import RunOptions
from uniattn_cli.recipe.files import read_tree, write_tree
from uniattn_cli.recipe.schema import ModelSpec, Recipe
from uniattn_cli.run.directory import RunDir
from uniattn_cli.run.files import file_errors
from uniattn_cli.run.lock import LOCK_FILE

FORCE = RunOptions(device="cpu", force=True)


@pytest.fixture
def model(tiny_runs):
    return tiny_runs / "model"


@pytest.fixture(scope="module")
def other(tmp_path_factory):
    """Another model."""
    return make_model(tmp_path_factory.mktemp("other") / "other", seed=1)


@pytest.fixture
def run(tiny_runs, tmp_path):
    """A run directory that was analysed and converted, to be spoilt."""
    later = shutil.ignore_patterns("trained", "evaluation")
    return Path(shutil.copytree(tiny_runs / "finished", tmp_path / "run", ignore=later))


def contents(folder: Path) -> dict[str, bytes | None]:
    """Everything in a folder: files with what they hold."""
    return {str(path.relative_to(folder)): path.read_bytes() if path.is_file() else None for path in folder.rglob("*")}


@pytest.fixture
def refuses(uniattn):
    """`refuses(folder, *arguments, says=[…])`: the command ends with one clear line and leaves the folder as it was."""

    def check(folder: Path, *arguments, says: list[str], code: int = 1, lines: int = 1):
        before = contents(folder)
        done = uniattn(*arguments, cwd=folder)
        errors = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
        assert done.returncode == code, done.stderr
        assert len(errors) == lines, done.stderr
        assert done.stderr.splitlines()[-lines:] == errors
        assert "Traceback" not in done.stderr
        assert done.stdout == ""
        for words in says:
            assert words in "\n".join(errors)
        assert contents(folder) == before

    return check


def edit_recipe(run: Path, section: str, **values) -> None:
    tree = read_tree(run / "recipe.yaml")
    tree.setdefault(section, {}).update(values)
    write_tree(tree, run / "recipe.yaml")


def edit_json(path: Path, change) -> None:
    path.write_text(json.dumps(change(json.loads(path.read_text()))))


# --- the recipe -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("verb", "text", "says"),
    [
        ("convert", "model:\n  name: m\nlayout: [1\nseed: 0\n", ["recipe.yaml, line 4: not valid YAML"]),
        ("train", "model:\n\tname: m\n", ["recipe.yaml, line 2: not valid YAML"]),
        ("eval", "- model\n", ["recipe.yaml: the file must be a mapping"]),
        ("group", "model: {name: m}\nanalysis:\n  tokns: 64\n", ["line 3: unknown key 'analysis.tokns'", "'tokens'?"]),
        ("convert", "model: {name: m}\nconvertion: {}\n", ["line 2: unknown key 'convertion'", "'conversion'?"]),
        ("convert", "model: {name: m}\nconversion:\n  tokens: many\n", ["line 3: conversion.tokens", "a whole number"]),
        ("train", "model: {name: m}\ntrain: 3\n", ["recipe.yaml, line 2: train must be a mapping", "not 3"]),
        ("group", "model: {name: m}\nlayout: {kv: 1.5}\n", ["line 2: layout.kv must be at most 1, not 1.5"]),
        ("eval", f"model: {{name: m}}\nseed: {10**20}\n", ["line 2: seed must be at most 4294967295"]),
        ("group", "model: {name: m}\nlayout: {kv: 0.5, followers: 3}\n", ["only one budget", "followers and kv"]),
        ("convert", "model: {name: m}\nlayout: {max_group: 2}\n", ["layout.max_group needs layout.sources: one"]),
        ("train", "model: {name: m}\ndata: {train: []}\n", ["data.train is empty; name at least one data set"]),
        ("convert", "seed: 3\n", ["model.name is missing; give a hub id or a directory"]),
    ],
)
def test_a_faulty_recipe(verb, text, says, refuses, tmp_path):
    (tmp_path / "recipe.yaml").write_text(text)
    refuses(tmp_path, verb, says=says)


def test_all_faults_of_a_recipe_are_told_at_once(refuses, tmp_path):
    (tmp_path / "recipe.yaml").write_text("model: {nam: m}\nlayout:\n  kv: -1\n  followers: few\n")
    refuses(tmp_path, "group", says=["line 1: unknown key", "line 3: layout.kv", "line 4: layout.followers"], lines=3)


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--set", "analysis.tokns=64"], ["--set analysis.tokns=64: unknown key", "did you mean 'tokens'?"]),
        (["--tokens", "3"], ["--set analysis.tokens=3: analysis.tokens must be at least 64, not 3"]),
        (["--set", "analysis.tokens"], ["write KEY=VALUE"]),
    ],
)
def test_a_faulty_setting_is_named_as_it_was_given(arguments, says, refuses, tmp_path):
    refuses(tmp_path, "analyze", "some/model", *arguments, says=says)


# --- the model --------------------------------------------------------------------------------------------------------

ANSWERS = {
    "unknown": (404, {"X-Error-Code": "RepoNotFound"}, b"", ["owner/model: no such model on the hub", "hf auth login"]),
    "gated": (403, {"X-Error-Code": "GatedRepo"}, b"", ["owner/model is gated: accept its terms", "hf auth login"]),
    "down": (503, {}, b"", ["the hub returns HTTP status 503", "nor in the cache"]),
    "sign-in page": (
        200,
        {},
        b"<html>please sign in</html>",
        ["the hub gives no valid answer", "nor in the cache"],
    ),
}


@pytest.fixture
def at(monkeypatch, tmp_path):
    """`at(address)` makes that the hub, with an empty cache; huggingface_hub reads its variables once, at import."""

    def use(address: str) -> None:
        monkeypatch.setattr(constants, "ENDPOINT", address)
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
        monkeypatch.setenv("NO_PROXY", "*")
        close_session()

    yield use
    close_session()


@pytest.fixture
def hub(at):
    """Starts a server that gives one answer to everything, in the hub's place."""
    servers = []

    def start(status: int, headers: dict[str, str], body: bytes) -> None:
        class Handler(http.server.BaseHTTPRequestHandler):
            def do_GET(self):
                self.send_response(status)
                for name, value in {**headers, "Content-Length": str(len(body))}.items():
                    self.send_header(name, value)
                self.end_headers()
                self.wfile.write(body)

            do_HEAD = do_GET  # noqa: N815

            def log_message(self, *args):
                pass

        server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        servers.append(server)
        threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
        at(f"http://127.0.0.1:{server.server_port}")

    yield start
    for server in servers:
        server.shutdown()
        server.server_close()


@pytest.mark.parametrize("answer", ANSWERS)
def test_a_model_that_the_hub_does_not_give(answer, hub, refuses, tmp_path):
    *reply, says = ANSWERS[answer]
    folder = tmp_path / "empty"
    folder.mkdir()
    hub(*reply)
    refuses(folder, "analyze", "owner/model", says=says)


def test_no_network_is_told_at_once(at, refuses, tmp_path):
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        at(f"http://127.0.0.1:{unused.getsockname()[1]}")
        folder = tmp_path / "empty"
        folder.mkdir()
        started = time.monotonic()
        says = [
            "owner/model is neither a directory nor in the cache",
            str(tmp_path / "cache"),
            "the hub cannot be reached",
        ]
        refuses(folder, "analyze", "owner/model", says=says)
        assert time.monotonic() - started < 20


@pytest.mark.parametrize(
    ("variable", "value", "says"),
    [
        ("ALL_PROXY", "socks5://127.0.0.1:1", "the hub cannot be reached (Using SOCKS proxy, but"),
        ("SSL_CERT_FILE", "/nowhere/at/all", "the hub cannot be reached ([Errno 2] No such file"),
    ],
)
def test_a_client_that_cannot_be_set_up_is_told(variable, value, says, at, refuses, monkeypatch, tmp_path):
    at("https://127.0.0.1:1")
    monkeypatch.delenv("NO_PROXY")
    monkeypatch.setenv(variable, value)
    folder = tmp_path / "empty"
    folder.mkdir()
    refuses(folder, "analyze", "owner/model", says=[says])


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("./nowhere", ["./nowhere: no such directory"]),
        ("rows.jsonl", ["rows.jsonl is a file; give the directory with config.json"]),
        ("folder", ["folder is a directory without config.json"]),
        ("two words", ["'two words' is neither a directory nor a valid hub id (OWNER/NAME)"]),
        ("a" * 300, ["a name this long is no path here"]),
        ("./" + "a" * 300, ["a name this long is no path here"]),
    ],
)
def test_a_name_that_is_no_model(name, says, refuses, tmp_path):
    (tmp_path / "folder").mkdir()
    (tmp_path / "rows.jsonl").touch()
    refuses(tmp_path, "analyze", name, says=says)


@pytest.mark.parametrize(
    "arguments",
    [
        ["analyze", "there/model"],
        ["analyze", "./there/model"],
        ["train", "there/recipe.yaml"],
        ["generate", "there/model", "Hi"],
        ["eval", "--set", "evaluation.tasks=[there/rows.jsonl]"],
        ["data", "--set", 'data.train=["there/rows.jsonl"]'],
    ],
)
def test_what_is_in_the_folder_that_one_came_from_is_told(arguments, run, tmp_path, refuses):
    (tmp_path / "there" / "model").mkdir(parents=True)
    for name in ("recipe.yaml", "rows.jsonl"):
        (tmp_path / "there" / name).touch()
    name = arguments[1] if arguments[1].lstrip("./").startswith("there") else "there/rows.jsonl"
    refuses(tmp_path, *arguments, "-C", "run", says=[f"; paths start at -C run: write ../{name.removeprefix('./')}"])


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda c: c | {"architectures": ["LlamaForSequenceClassification"]}, ["is not a causal language model but"]),
        (lambda c: c | {"model_type": "bert"}, ["models of type 'bert' are not supported; supported:", "llama"]),
        (lambda c: c | {"model_type": "uniattn_llama"}, ["already converted", "give its base model"]),
        (lambda c: [c], ["config.json is damaged (a list, not an object); copy the model again"]),
    ],
)
def test_a_model_that_cannot_be_converted(change, says, model, refuses, tmp_path):
    shutil.copytree(model, tmp_path / "model")
    edit_json(tmp_path / "model" / "config.json", change)
    refuses(tmp_path, "analyze", "model", says=says)


def test_a_tokenizer_that_is_missing_or_of_another_model(model, tmp_path):
    model = Path(shutil.copytree(model, tmp_path / "model"))
    edit_json(model / "config.json", lambda content: content | {"vocab_size": 100})
    source = locate(str(model))
    with pytest.raises(ModelError, match="the tokenizer has 300 tokens, the model only 100"):
        load_tokenizer(source)
    with pytest.raises(
        CheckpointError, match=r"lm_head.weight \(stored \[300, 48\], expected \[100, 48\]\) and 1 more"
    ):
        loading.load_model(source, ModelSpec(), torch.device("cpu"))
    for path in model.glob("tokenizer*"):
        path.unlink()
    with pytest.raises(ModelError, match=r"has no tokenizer; copy tokenizer\.json"):
        load_tokenizer(source)


@pytest.mark.parametrize("device", ["nonsense", "cuda:99", "meta"])
def test_a_device_that_is_not_here(device):
    with pytest.raises(UsageError, match=f"--device {device}: no such device here; `uniattn doctor`"):
        RunOptions(device=device).torch_device()


def test_flex_attention_can_be_analysed(model, run, tmp_path):
    data = {"data__train": run / "rows.jsonl"}
    overrides = settings(model__attention="flex_attention", analysis__tokens=64, **data)
    assert analyze(str(model), run_dir=tmp_path, overrides=overrides).measured.tokens == 64


# --- the layout -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("groups", "says"),
    [
        ("layers.yaml", ["layer 3: borrows from layer 4, which is not an earlier layer"]),
        ("2-9", ["--groups 2-9: layer 9 does not exist; the model has layers 0 to 5"]),
        ("evry:2", ["--groups evry:2: not one of auto, paper, every:N, FIRST-LAST:N, a list"]),
    ],
)
def test_groups_that_break_an_invariant(groups, says, run, refuses):
    (run / "layers.yaml").write_text("layers: [{}, {}, {}, {leader: 4}, {}, {}]\n")
    refuses(run, "convert", "--force", "--groups", groups, says=says)


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--groups", "every:2", "--kv", "0.8"], ["--groups every:2 leaves nothing to choose; remove layout.kv"]),
        (["--groups", "every:2", "--set", "layout.params=0.9"], ["remove layout.params, or use --groups auto"]),
    ],
)
def test_a_budget_for_a_fixed_layout(arguments, says, run, refuses):
    refuses(run, "convert", "--force", *arguments, says=says, code=2)


def test_an_illegal_layout_in_the_recipe(run, refuses):
    layers = [{"kind": "own"}] * 5 + [{"kind": "kv", "heads": "1:0 2:1"}]
    edit_recipe(run, "layout", layers=layers)
    says = ["recipe.yaml, layout.layers: layer 5: the head map has 2 entries, kind 'kv' needs 3"]
    refuses(run, "convert", "--force", says=says)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["layout.followers=6"], "budget followers 6 cannot be met: at most 5 layers can change"),
        (["conversion.rank=500", "layout.groups=auto"], "conversion.rank is 500, but the hidden size is only 48"),
        (["layout.protect=[99]"], "layout.protect: layer 99 does not exist; the model has 0 to 5"),
        (["layout.protect=[2]"], "layer 2 is in layout.protect, but is 'softmax' in the layout"),
    ],
)
def test_a_layout_that_the_model_cannot_have(overrides, message, run):
    before = contents(run)
    with pytest.raises(LayoutError, match=message):
        group(run_dir=run, overrides=overrides)
    with pytest.raises(LayoutError, match=message):
        convert(run_dir=run, overrides=overrides, options=FORCE)
    assert contents(run) == before


def test_a_stored_layout_that_changes_a_protected_layer(run):
    edit_recipe(run, "layout", protect=[4])
    with pytest.raises(LayoutError, match=r"recipe.yaml, layout.layers: layer 4 is in layout.protect"):
        convert(run_dir=run, options=FORCE)


def test_a_budget_takes_the_place_of_the_stored_layout(run):
    assert len(Recipe.load(run / "recipe.yaml").layout.layers) == 6
    for changed in (1, 3):
        result = convert(run_dir=run, dry_run=True, overrides=[f"layout.followers={changed}"])
        assert len(result.layout.changed) == changed
    assert len(convert(run_dir=run, dry_run=True).layout.changed) == 4


def test_lengths_beyond_the_window_of_the_model(model, run, tmp_path):
    with pytest.raises(RecipeError, match=r"analysis.length is 2048, but the model's context window is 1024"):
        analyze(str(model), run_dir=tmp_path / "new", overrides=["analysis.length=2048"])
    with pytest.raises(RecipeError, match=r"conversion.length is 2048, but the model's context window is 1024"):
        convert(run_dir=run, overrides=["conversion.length=2048"], options=FORCE)
    (run / "t.jsonl").write_text('{"question": "3 + 4?", "target": "7"}\n')
    with pytest.raises(RecipeError, match=r"tasks: 't', prompt \+ new is 1025, but the model's context window is 1024"):
        evaluate(run_dir=run, overrides=[f"evaluation.tasks=[{{source: {run / 't.jsonl'}, new: 1024}}]"])


# --- the model of the analysis ----------------------------------------------------------------------------------------


def test_another_model_than_the_recipe_names(model, other, run, refuses):
    says = [f"recipe.yaml is for {model}, not {other}", "-C DIR"]
    refuses(run, "analyze", other, "--force", says=says)


@pytest.mark.parametrize("groups", [[], ["--groups", "auto"]])
def test_a_recipe_for_another_model_than_the_analysis(groups, model, other, run, refuses):
    edit_recipe(run, "model", name=str(other))
    says = [f"analysis is of {model}", f"the recipe's model is {other}", "analyze --force"]
    refuses(run, "convert", "--force", *groups, says=says)


def test_a_relative_name_in_the_recipe_is_the_same_model(model, run, monkeypatch):
    monkeypatch.chdir(run)
    name = os.path.relpath(model, run)
    edit_recipe(run, "model", name=name)
    with pytest.raises(StageError, match="analysis is complete; use --force to replace it"):
        analyze(name)


# --- data -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("verb", "content", "says"),
    [
        ("convert", None, ["data file mine.jsonl not found (looked for ", "/run/mine.jsonl)"]),
        ("train", "", ["mine.jsonl has no rows"]),
        ("analyze", '{"question": "a", "reply": "b"}\n', ["lacks the needed columns", "It has: question, reply"]),
        ("eval", '{"prompt": "a", "completion": "b"}\n{"prompt": \n', ["mine.jsonl, line 2 is not JSON"]),
    ],
)
def test_a_faulty_data_set(verb, content, says, run, refuses):
    edit_recipe(run, "data", train="mine.jsonl")
    if content is not None:
        (run / "mine.jsonl").write_text(content)
    refuses(run, verb, "--force", says=says)


def test_a_row_without_the_columns_of_the_first(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text('{"prompt": "a", "completion": "b"}\n{"text": "c"}\n')
    spec = Recipe.from_tree({"model": {"name": "m"}, "data": {"train": str(path)}}).data.train[0]
    with pytest.raises(DataError, match=r"rows.jsonl, line 2: no column 'prompt' \(it has: text\)"):
        list(read_rows(spec))


# --- stages out of order, and outputs in the way ----------------------------------------------------------------------


@pytest.mark.parametrize("verb", ["analyze", "group", "convert", "train", "eval"])
def test_a_stage_in_an_empty_folder(verb, refuses, tmp_path):
    refuses(tmp_path, verb, says=["recipe.yaml", "`uniattn analyze MODEL`"])


def test_a_stage_before_the_one_that_it_needs(run, refuses):
    shutil.rmtree(run / "converted")
    refuses(run, "train", "recipe.yaml", says=["converted is missing; run `uniattn convert --groups auto` first"])
    shutil.rmtree(run / "analysis")
    edit_recipe(run, "layout", layers=None, groups="auto")
    refuses(run, "convert", says=["analysis is missing; run `uniattn analyze MODEL` first"])


@pytest.mark.parametrize(
    ("verb", "output"),
    [("analyze", "analysis"), ("convert", "converted"), ("train", "trained"), ("eval", "evaluation")],
)
def test_an_output_in_the_way(verb, output, run, refuses):
    (run / output).mkdir(exist_ok=True)
    (run / output / "stage.json").write_text("{}")
    refuses(run, verb, says=[f"{output} is complete; use --force to replace it"])
    (run / output / "stage.json").unlink()
    (run / output / "mine.txt").write_text("precious")
    refuses(run, verb, says=[f"{output} exists but was not written by uniattn; use --force to replace it"])
    shutil.rmtree(run / output)
    (run / output).symlink_to("nowhere")
    refuses(run, verb, says=[f"{output} exists but was not written by uniattn; use --force to replace it"])


def test_a_run_directory_that_cannot_be(refuses, tmp_path):
    (tmp_path / "file").touch()
    says = ["cannot write file/run: a file is in the place of a folder"]
    refuses(tmp_path, "analyze", "some/model", "-C", "file/run", says=says)
    refuses(tmp_path, "analyze", "./nowhere", "-C", "some/new/run", says=["./nowhere: no such directory"])


@pytest.mark.parametrize("place", ["/proc/new", "/proc/new/folder", "loop/new", "nowhere/new", "file/new"])
@pytest.mark.parametrize(
    "arguments", [["analyze", "./m", "-C"], ["bench", "--shape", "unknown", "--out"], ["recipes", "copy", "quick"]]
)
def test_a_place_where_nothing_can_be_made(arguments, place, refuses, tmp_path):
    if place.startswith("/proc") and not Path("/proc/self").exists():
        pytest.skip("this system has no file system that makes nothing")
    (tmp_path / "file").touch()
    (tmp_path / "loop").symlink_to("loop")
    (tmp_path / "nowhere").symlink_to("not/there")
    refuses(tmp_path, *arguments, place, says=[place.removesuffix("/new").removesuffix("/folder")])


@pytest.mark.parametrize("inside", [True, False])
def test_a_run_directory_that_is_removed_under_a_command_is_one_line(inside, tmp_path, monkeypatch):
    run = tmp_path / "run"
    run.mkdir()
    monkeypatch.chdir(run if inside else tmp_path)
    with (
        pytest.raises(StageError, match=rf"^{run} has been removed while the command was at work there$"),
        run_directory(Path("." if inside else "run"), create=False),
    ):
        shutil.rmtree(run)
        Path("recipe.yaml").write_text("seed: 0")


# --- damage -----------------------------------------------------------------------------------------------------------


def test_a_damaged_analysis(run, refuses):
    path = run / "analysis" / "analysis.json"
    path.write_bytes(path.read_bytes()[:500])
    refuses(run, "group", "--followers", "2", says=["analysis.json is damaged", "run `uniattn analyze --force`"])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda content: [content], "is damaged"),
        (lambda content: None, "is damaged"),
        (lambda content: content | {"schema": 99}, "has schema 99"),
        (lambda content: content | {"shape": None}, "is damaged"),
        (lambda content: {key: content[key] for key in content if key != "tokens"}, "'tokens' is missing"),
    ],
)
def test_a_damaged_analysis_file(change, message, run):
    edit_json(run / "analysis" / "analysis.json", change)
    with pytest.raises(StageError, match=f"{message}.*uniattn analyze --force"):
        Measured.load(run / "analysis")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda arrays: {name: value for name, value in arrays.items() if "js" not in name}, "'js' is missing"),
        (lambda arrays: {name: value[:2].copy() for name, value in arrays.items()}, r"arrays of shape \(2, 5, 6, 6\)"),
    ],
)
def test_damaged_maps(change, message, run):
    path = run / "analysis" / "maps.safetensors"
    save_file(change(load_file(path)), path)
    with pytest.raises(StageError, match=message):
        Measured.load(run / "analysis")


@pytest.mark.parametrize("text", ["[]", "{", "{}", '{"inputs": []}'])
def test_a_damaged_record_of_a_stage(text, run):
    (run / "converted" / "stage.json").write_text(text)
    with pytest.raises(StageError, match=r"stage.json is damaged .*convert --groups auto` again with --force"):
        RunDir(run).record("convert")


# --- dry run ----------------------------------------------------------------------------------------------------------


def test_a_dry_run_needs_no_weights_and_writes_nothing(model, run, uniattn):
    model = Path(shutil.copytree(model, run / "model"))
    (model / "model.safetensors").unlink()
    edit_recipe(run, "model", name="model")
    shutil.rmtree(run / "analysis")
    before = contents(run)
    done = uniattn("convert", "--dry-run", cwd=run)
    assert done.returncode == 0, done.stderr
    for words in ("KV bytes per token", "-33.3%", "what it will take", "dry run: nothing was written"):
        assert words in done.stdout
    assert contents(run) == before


def test_a_dry_run_of_auto_loads_nothing(run, monkeypatch):
    monkeypatch.setattr(loading, "load_model", None)
    before = contents(run)
    result = convert(run_dir=run, groups="auto", dry_run=True)
    assert (result.directory, result.losses) == (None, {})
    assert result.costs.kv_bytes[1] <= 0.8 * result.costs.kv_bytes[0]
    assert contents(run) == before


# --- disks ------------------------------------------------------------------------------------------------------------


@pytest.fixture
def mounted(tmp_path):
    """`mounted("size=64k")` gives a folder on a file system of its own; skips where that is not permitted."""
    folder = tmp_path / "mounted"
    folder.mkdir()
    mounts = []

    def mount(options: str) -> Path:
        with contextlib.suppress(FileNotFoundError):
            call = ["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(folder)]
            if subprocess.run(call, capture_output=True, check=False).returncode == 0:
                mounts.append(folder)
                return folder
        pytest.skip("this user may not mount file systems")

    yield mount
    for place in mounts:
        subprocess.run(["umount", str(place)], check=True)


def test_a_read_only_run_directory(mounted, model, refuses):
    says = ["cannot write ", "the file system is read-only", "-C DIR"]
    refuses(mounted("ro"), "analyze", model, says=says)


@pytest.mark.parametrize("size", ["4k", "48k", "112k"])
def test_a_full_disk_while_analysing(size, mounted, model, run):
    folder = mounted(f"size={size}")
    overrides = settings(data__train=run / "rows.jsonl")
    with pytest.raises(
        StageError, match=r"cannot write .*: the disk is full; free some space and run the same command"
    ):
        analyze(str(model), run_dir=folder, overrides=overrides)
    assert contents(folder) == {}


def test_a_full_disk_while_saving_the_converted_model(mounted, run, refuses):
    folder = mounted("size=300k")
    shutil.rmtree(run / "converted")
    shutil.copytree(run, folder, dirs_exist_ok=True)
    refuses(folder, "convert", says=["cannot write ", "the disk is full; free some space and run the same command"])


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (OSError(errno.ENOSPC, "No space left on device", "run/x"), "cannot write run/x: the disk is full"),
        (OSError(errno.EMFILE, "Too many open files", "x"), r"^x: too many open files; raise the limit \(ulimit -n\)"),
        (OSError(errno.EIO, "Input/output error", "run/x"), "^run/x: the device reports an error"),
        (OSError(errno.EISDIR, "Is a directory", "run/x"), "^run/x: a folder is in the place of a file"),
        (OSError(errno.EROFS, "Read-only file system", "run/x"), "cannot write run/x: the file system is read-only"),
        (SafetensorError("I/O error: No space left on device (os error 28)"), "cannot write .*: the disk is full"),
        (
            SafetensorError("I/O error: File too large (os error 27)"),
            r"cannot write .*: files may not be .*raise the limit \(ulimit -f\)",
        ),
    ],
)
def test_errors_of_the_file_system_become_one_line(error, message):
    with pytest.raises(StageError, match=message), file_errors(Path("run")):
        raise error


def test_other_errors_stay_what_they_are():
    with pytest.raises(SafetensorError), file_errors(Path("run")):
        raise SafetensorError("header too large")


# --- interruptions ----------------------------------------------------------------------------------------------------


def kill_in_the_middle(folder: Path, partial: str, *arguments: str) -> None:
    """Runs a command and kills it as soon as its hidden folder is there."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    with subprocess.Popen(
        [*command(), *arguments], cwd=folder, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
    ) as process:
        while process.poll() is None and not (folder / partial / "started.json").exists():
            time.sleep(0.002)
        process.kill()
    assert process.returncode == -signal.SIGKILL, process.stdout
    assert (folder / partial).is_dir()


@pytest.mark.slow
def test_analyze_killed_and_run_again(model, uniattn, tmp_path):
    write_data(tmp_path)
    overrides = settings(analysis__tokens=6400)
    arguments = ["analyze", str(model), *(word for one in overrides for word in ("--set", one))]
    kill_in_the_middle(tmp_path, ".analysis.partial", *arguments)
    assert not (tmp_path / "analysis").exists()
    done = uniattn(*arguments, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert sorted(path.name for path in tmp_path.iterdir()) == ["analysis", "recipe.yaml", "rows.jsonl", "text.txt"]
    assert Measured.load(tmp_path / "analysis").tokens == 6400


@pytest.mark.slow
def test_convert_killed_and_run_again_replaces_what_was_there(run, uniattn):
    before = contents(run)
    arguments = ["convert", "--force", "--groups", "every:2", "--set", "conversion.solve=none"]
    kill_in_the_middle(run, ".converted.partial", *arguments)
    left = (".converted.partial", LOCK_FILE)
    assert {name: data for name, data in contents(run).items() if not name.startswith(left)} == before
    (run / ".converted.partial" / "model.safetensors").write_bytes(b"half a file")
    done = uniattn(*arguments, cwd=run)
    assert done.returncode == 0, done.stderr
    assert not (run / ".converted.partial").exists()
    assert set(contents(run)) == set(before)
    config = loading.load_config(locate(str(run / "converted")), converted=True)
    assert config.layout.followers == [1, 3, 5]


@pytest.fixture
def fails_in_the_middle(tmp_path):
    """Writes a stage's output and stops with an error before the end."""

    def write(work: bool, resume: bool) -> Path:
        directory = RunDir(tmp_path)
        with pytest.raises(DataError), directory.write("train", Recipe(), {"model": "a"}, resume=resume) as folder:
            if work:
                (folder / "weights").write_text("half")
            raise DataError("a row in the middle")
        return directory.partial("train")

    return write


@pytest.mark.parametrize(("work", "resume", "kept"), [(True, False, False), (False, True, False), (True, True, True)])
def test_after_a_failure_only_what_can_be_resumed_is_kept(work, resume, kept, fails_in_the_middle):
    assert fails_in_the_middle(work, resume).exists() == kept


def test_work_of_other_settings_is_not_resumed(fails_in_the_middle, tmp_path):
    for model, kept in (("a", True), ("b", False)):
        fails_in_the_middle(True, True)
        with RunDir(tmp_path).write("train", Recipe(), {"model": model}, resume=True) as folder:
            assert (folder / "weights").exists() == kept
        shutil.rmtree(tmp_path / "trained")


@pytest.mark.parametrize("kind", ["file", "link", "dangling"])
def test_whatever_has_the_name_of_the_hidden_folder_is_in_no_ones_way(kind, tmp_path):
    directory = RunDir(tmp_path)
    if kind == "file":
        directory.partial("eval").write_text("a file")
    else:
        directory.partial("eval").symlink_to(tmp_path / "target")
    if kind == "link":
        (tmp_path / "target").mkdir()
        (tmp_path / "target" / "precious").touch()
    with directory.write("eval", Recipe(), {}) as folder:
        (folder / "results.json").write_text("{}")
    assert sorted(path.name for path in directory.output("eval").iterdir()) == ["results.json", "stage.json"]
    assert kind != "link" or (tmp_path / "target" / "precious").exists()


@pytest.mark.parametrize("kind", ["file", "link", "dangling"])
def test_force_replaces_whatever_has_the_name_but_not_what_a_link_leads_to(kind, tmp_path):
    directory = RunDir(tmp_path / "run")
    directory.root.mkdir()
    target = tmp_path / "target"
    if kind == "file":
        directory.output("eval").write_text("a file")
    else:
        directory.output("eval").symlink_to(target)
    if kind == "link":
        target.mkdir()
        (target / "precious").touch()
    with directory.write("eval", Recipe(), {}, force=True) as folder:
        (folder / "results.json").write_text("{}")
    assert sorted(path.name for path in directory.output("eval").iterdir()) == ["results.json", "stage.json"]
    assert kind != "link" or (target / "precious").exists()
