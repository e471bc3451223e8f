"""The command line as users meet it: help, version, speed, exit codes, and what reaches the stage functions."""

from __future__ import annotations

import errno
import getpass
import io
import json
import logging
import os
import pwd
import random
import re
import shutil
import signal
import subprocess
import sys
import time
import warnings
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest
import typer
from conftest import run_process
from rich.cells import cell_len
from rich.console import Console
from typer.testing import CliRunner

import uniattn_cli
from uniattn_cli.__main__ import main
from uniattn_cli.cli import app as app_module
from uniattn_cli.cli import console, doctor, flags, guard, settings, start
from uniattn_cli.errors import DataError, DataWarning, RecipeError, StageError, UsageError
from uniattn_cli.evaluation import cache
from uniattn_cli.modeling.layout_uniattn import KINDS
from uniattn_cli.models.families import FAMILIES
from uniattn_cli.options import RunOptions
from uniattn_cli.recipe.paths import located
from uniattn_cli.recipe.schema import Recipe
from uniattn_cli.tables import Result, Sample, Table, to_markdown

ROOT = Path(uniattn_cli.__file__).resolve().parent.parent
STAGES = {
    "analyze": "uniattn_cli.commands.analyze",
    "score": "uniattn_cli.commands.score",
    "group": "uniattn_cli.commands.group",
    "convert": "uniattn_cli.commands.convert",
    "train": "uniattn_cli.commands.train",
    "eval": "uniattn_cli.commands.evaluate",
    "compare": "uniattn_cli.commands.compare",
    "sweep": "uniattn_cli.commands.sweep",
    "synthesize": "uniattn_cli.commands.synthesize",
}
COMMANDS = [
    *STAGES, "init", "report", "generate", "chat", "bench", "serve", "data", "recipe", "recipes", "schema", "families",
    "doctor", "push",
]  # fmt: skip


# --- help, version, speed ---------------------------------------------------------------------------------------------


def test_version(uniattn):
    done = uniattn("--version")
    assert (done.returncode, done.stdout.strip()) == (0, f"uniattn {uniattn_cli.__version__}")


def test_help_lists_every_command(uniattn):
    done = uniattn("--help")
    assert done.returncode == 0
    for name in COMMANDS:
        assert re.search(rf"^  {name} .*\.$", done.stdout, re.MULTILINE), f"{name} has a whole sentence"
    assert "--install-completion" in done.stdout
    purposes = re.findall(r"^(\w[\w ]*):$", done.stdout, re.MULTILINE)
    assert purposes == ["Options", "Pipeline", "Look at", "Share and serve", "About"]


# What prints a result; the others print text as it comes, or a file.
PRINTING = {*COMMANDS} - {"init", "generate", "chat", "serve", "schema"}


@pytest.mark.parametrize("name", COMMANDS)
def test_whatever_prints_a_table_prints_json(name, uniattn):
    assert ("--json" in uniattn(name, "--help").stdout) == (name in PRINTING)


@pytest.mark.parametrize("words", [("recipe", "layout"), ("recipes",), ("families",), ("doctor",)])
def test_json_says_what_the_table_says(words, uniattn):
    shown, found = uniattn(*words).stdout, json.loads(uniattn(*words, "--json").stdout)
    assert list(found) == ["title", "picture", "samples", "tables", "notes"]
    for table in found["tables"]:
        assert table["rows"] and all(len(row) == len(table["columns"]) for row in table["rows"])
        # Long cells are folded on a screen.
        assert all(row[0] in shown for row in table["rows"])


def test_stages_print_json_too(monkeypatch, tmp_path):
    result = Result(title="t", tables=[Table("", ["a", "b"], [["1", "é"]])], notes=["n"])
    monkeypatch.setattr("uniattn_cli.commands.group.group", lambda **_: result)
    done = CliRunner().invoke(app_module.app, ["group", "-C", str(tmp_path), "--json"])
    assert json.loads(done.stdout)["tables"] == [{"title": "", "columns": ["a", "b"], "rows": [["1", "é"]]}]


# --- the first recipe, and its schema ---------------------------------------------------------------------------------


def test_init_writes_what_was_answered(monkeypatch, tmp_path):
    monkeypatch.setattr(start.sys.stdin, "isatty", lambda: True, raising=False)
    # What cannot be is asked again.
    given = iter(["owner/model", "rows.jsonl", 7.0, float("nan"), 0.7, "nothing", "loss"])
    monkeypatch.setattr(start.typer, "prompt", lambda *_, **__: next(given))
    start.init(run_dir=tmp_path)
    recipe = Recipe.load(tmp_path / "recipe.yaml")
    assert (recipe.model.name, recipe.data.train[0].source) == ("owner/model", "rows.jsonl")
    assert (recipe.layout.kv, recipe.layout.kinds) == (0.7, ("key",))
    assert next(given, None) is None


def test_whoever_does_not_answer_init_has_ended_it(monkeypatch, capsys, tmp_path):
    """Ctrl-C and Ctrl-D at a question."""

    def leave(*_, **__):
        raise typer.Abort

    monkeypatch.setattr(start.sys.stdin, "isatty", lambda: True, raising=False)
    monkeypatch.setattr(start.typer, "prompt", leave)
    with pytest.raises(typer.Exit) as caught:
        start.init(run_dir=tmp_path / "new")
    assert caught.value.exit_code == 130
    shown = capsys.readouterr().err
    assert shown == "\nerror: interrupted; the same command starts over, and no partial output is left\n"
    assert not (tmp_path / "new").exists()


def test_init_asks_nobody_where_nobody_is(uniattn, tmp_path):
    done = uniattn("init", "owner/model", "--train", "a.jsonl", "--train", "b.jsonl", "-C", tmp_path / "new")
    assert done.returncode == 0, done.stderr
    recipe = Recipe.load(tmp_path / "new" / "recipe.yaml")
    assert [spec.source for spec in recipe.data.train] == ["a.jsonl", "b.jsonl"] and recipe.layout.kinds == ("early",)
    done = uniattn("init", "-C", tmp_path / "new")
    assert (done.returncode, done.stderr.count("\n")) == (1, 1) and "recipe.yaml exists; edit it" in done.stderr


def test_init_leaves_nothing_where_an_answer_is_impossible(uniattn, tmp_path):
    done = uniattn("init", "owner/model", "--kv", "2", "-C", tmp_path / "new")
    assert (done.returncode, done.stderr) == (1, "error: --kv 2.0: layout.kv must be at most 1, not 2.0\n")
    assert not (tmp_path / "new").exists()


def test_the_schema_has_every_setting_with_its_bounds(uniattn):
    schema = json.loads(uniattn("schema").stdout)

    def parts(node):
        """A node, what it refers to, and its alternatives."""
        if "$ref" in node:
            yield from parts(schema["$defs"][node["$ref"].rpartition("/")[2]])
        for other in node.get("anyOf", ()):
            yield from parts(other)
        yield node
        if "items" in node:
            yield from parts(node["items"])

    for entry in settings.settings():
        node = schema
        for key in entry.key.replace("[]", "").split("."):
            node = next(part for part in parts(node) if key in part.get("properties", ()))["properties"][key]
        assert node["description"] == entry.help
        said = json.dumps(list(parts(node)))
        for word, bound in re.findall(r"(>=|<=|>) (\S+?)(?:,|$)", entry.allowed):
            name = {">=": "minimum", "<=": "maximum", ">": "exclusiveMinimum"}[word]
            assert bound in [f"{part[name]:g}" for part in parts(node) if name in part], entry.key
        for choice in entry.allowed.partition(",")[0].split(" | "):
            if choice not in {*settings.TYPE_NAMES.values(), "null", "list"} and not choice.startswith("list"):
                assert f'"{choice}"' in said, (entry.key, choice)


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_has_help_with_an_example_that_parses(name, uniattn):
    done = uniattn(name, "--help")
    assert done.returncode == 0
    example = re.search(r"Example:\n\s+uniattn (.+)", done.stdout).group(1)
    done = uniattn(*example.split(), "--help")
    assert done.returncode == 0, done.stderr


def test_help_is_quick(tmp_path):
    # Half a second is the aim; the bound leaves room for a busy machine.
    def seconds():
        started = time.perf_counter()
        assert run_process("analyze", "--help", cwd=tmp_path).returncode == 0
        return time.perf_counter() - started

    assert min(seconds() for _ in range(3)) < 1.5


def test_nothing_heavy_is_imported_for_help():
    code = """
import sys
from uniattn_cli.cli.app import app
for arguments in {calls}:
    try:
        app(arguments)
    except SystemExit as end:
        assert not end.code, arguments
    heavy = {{"torch", "transformers", "datasets", "numpy", "scipy", "trl", "lm_eval", "matplotlib"}} & set(sys.modules)
    assert not heavy, (arguments, heavy)
"""
    calls = [["--help"], *([name, "--help"] for name in COMMANDS), ["recipe"], ["recipes"], ["schema"], ["families"]]
    command = [sys.executable, "-c", code.format(calls=calls)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=ROOT)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(
    ("own", "spins"), [({}, "1000"), ({"GOMP_SPINCOUNT": "7"}, "7"), ({"OMP_WAIT_POLICY": "active"}, None)]
)
def test_threads_do_not_spin_beside_other_work_unless_the_user_says_so(own, spins):
    """The OpenMP library reads it once, when PyTorch is loaded."""
    code = (
        "import os, sys\nfrom uniattn_cli import __main__ as entry\n"
        "assert 'torch' not in sys.modules\nsys.argv = ['uniattn', '--version']\n"
        "try: entry.main()\nexcept SystemExit: print(os.environ.get('GOMP_SPINCOUNT'))"
    )
    environment = {key: value for key, value in os.environ.items() if key not in ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY")}
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=environment | own, check=True)
    assert done.stdout.splitlines()[-1] == str(spins)


@pytest.mark.parametrize(
    ("encoding", "errors", "shown"),
    [
        ("ascii", "strict", "sch?ne ?Gr??e? ?\n"),
        ("ascii", "surrogateescape", "sch?ne ?Gr??e? ?\n"),
        ("ascii", "backslashreplace", "sch\\xf6ne \\u27e6Gr\\xfc\\xdfe\\u27e7 \\ud800\n"),
        ("latin-1", "strict", "schöne ?Grüße? ?\n"),
        ("utf-8", "strict", "schöne ⟦Grüße⟧ ?\n"),
    ],
)
def test_what_an_encoding_lacks_is_replaced(encoding, errors, shown, monkeypatch):
    stream = io.TextIOWrapper(io.BytesIO(), encoding=encoding, errors=errors)
    monkeypatch.setattr(sys, "stdout", stream)
    monkeypatch.setattr(app_module, "app", lambda prog_name: print("schöne ⟦Grüße⟧ \ud800", flush=True))
    main()
    assert stream.buffer.getvalue().decode(encoding) == shown


def test_a_closed_stdin_is_an_empty_one(monkeypatch):
    found = []
    monkeypatch.setattr(sys, "stdin", None)
    monkeypatch.setattr(app_module, "app", lambda prog_name: found.append(sys.stdin.read()))
    main()
    assert found == [""]


@pytest.mark.parametrize(
    ("error", "code", "line"),
    [
        (KeyboardInterrupt(), 130, "error: interrupted\n"),
        (OSError(errno.ENOSPC, "No space left on device"), 1, "error: cannot print: No space left on device\n"),
    ],
)
def test_what_happens_before_a_command_or_on_its_screen_is_one_line_too(error, code, line, monkeypatch, capsys):
    def fail(prog_name):
        raise error

    monkeypatch.setattr(app_module, "app", fail)
    with monkeypatch.context() as patch, pytest.raises(SystemExit) as caught:
        patch.setattr(sys, "stdout", sys.stdout)  # is taken away
        main()
    assert caught.value.code == code and capsys.readouterr().err == line


def test_a_screen_that_takes_nothing_is_one_line(monkeypatch, uniattn):
    def full(result, **_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(console, "show", full)
    done = uniattn("families")
    assert done.returncode == 1 and "the disk is full" in done.stderr and len(done.stderr.splitlines()) == 1


def test_plots_are_files_whatever_backend_the_environment_names(monkeypatch):
    monkeypatch.setenv("MPLBACKEND", "of a notebook")
    monkeypatch.setattr(app_module, "app", lambda prog_name: None)
    main()
    assert os.environ["MPLBACKEND"] == "agg"


def test_python_without_docstrings_is_refused():
    command = [sys.executable, "-OO", "-m", "uniattn_cli", "analyze", "some/model"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 2 and done.stderr.startswith("error: transformers needs docstrings; start Python without")


@pytest.fixture
def stranger(monkeypatch):
    """A user whom the system does not know, without anything in the environment that says who it is."""

    def unknown(number: int) -> None:
        raise KeyError(f"getpwuid(): uid not found: {number}")

    for name in ("HOME", "USER", "LOGNAME", "LNAME", "USERNAME", "XDG_CACHE_HOME", "HF_HOME", cache.VARIABLE):
        monkeypatch.setenv(name, "none")  # is undone in the end also where it was not set
        monkeypatch.delenv(name)
    monkeypatch.setattr(pwd, "getpwuid", unknown)


def test_a_user_without_home_and_name_has_both_while_the_command_runs(stranger, monkeypatch, capsys):
    found = []
    monkeypatch.setattr(app_module, "app", lambda prog_name: found.append((Path.home(), getpass.getuser())))
    main()
    (home, name), *_ = found
    assert home.is_dir() and home.is_absolute() and name == str(os.getuid())
    assert (
        capsys.readouterr().err == "note: no home directory is known, so downloads are not kept; set HOME or HF_HOME\n"
    )
    shutil.rmtree(home)


def test_where_no_home_is_known_paths_stay_as_they_are_and_no_scores_are_kept(stranger):
    assert located("~/model") == Path("~/model") and located("~nobody-knows/model") == Path("~nobody-knows/model")
    assert cache.cache_directory() is None


def test_completion_knows_the_settings():
    assert "analysis.tokens=" in flags.complete_setting("analysis.t")
    assert flags.complete_groups("a") == ["auto"]


# --- exit codes -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "arguments",
    [
        ["bogus"],
        ["analyze", "--lenght", "3"],
        ["analyze", "a", "b"],
        ["analyze", "a", "--tokens", "many"],
        ["analyze", "a", "--dtype", "float8"],
        ["group", "--head-map", "any"],
        ["recipe", "laout"],
        ["sweep", "--kv", "much"],
        ["compare"],
        ["recipe", "layout", "--check", "recipe.yaml"],
        ["recipe", "--set", "seed=1"],
        ["generate", "hi", "--seed", str(10**30)],
        ["bench", "--batch", str(10**30)],
        ["bench", "--prompt-tokens", "-1"],
    ],
)
def test_usage_errors_exit_with_two_and_write_nothing(arguments, uniattn, tmp_path):
    done = uniattn(*arguments)
    assert done.returncode == 2
    assert "rror: " in done.stderr
    assert "Traceback" not in done.stderr
    assert not list(tmp_path.iterdir())


def test_a_recipe_with_faults_gives_one_line_each(uniattn, tmp_path):
    (tmp_path / "recipe.yaml").write_text("model: {name: x}\nanalysis: {tokns: 1}\nseed: -1\n", encoding="utf-8")
    done = uniattn("recipe", "--check", "recipe.yaml")
    assert done.returncode == 1
    assert done.stderr.splitlines() == [
        "error: recipe.yaml, line 2: unknown key 'analysis.tokns' (did you mean 'tokens'?)",
        "error: recipe.yaml, line 3: seed must be at least 0, not -1",
    ]
    assert not done.stdout


def test_a_right_recipe_passes_and_debug_shows_tracebacks(uniattn, tmp_path):
    (tmp_path / "mine.yaml").write_text("model: {name: some/model}\n", encoding="utf-8")
    done = uniattn("recipe", "--check", "mine.yaml")
    assert (done.returncode, done.stderr) == (0, "")
    assert "mine.yaml: valid" in done.stdout
    done = uniattn("recipe", "--check", "absent.yaml", "--debug")
    assert done.returncode == 1
    assert "Traceback" in done.stderr
    assert "error: absent.yaml: no such file" in done.stderr


def test_a_run_directory_that_is_missing(uniattn, tmp_path):
    done = uniattn("train", "-C", "nowhere")
    assert done.returncode == 1
    assert done.stderr == "error: -C nowhere: no such directory; `uniattn analyze MODEL -C nowhere` makes it\n"
    assert not list(tmp_path.iterdir())


def test_a_current_folder_that_is_gone(monkeypatch, tmp_path):
    (tmp_path / "gone").mkdir()
    monkeypatch.chdir(tmp_path / "gone")
    (tmp_path / "gone").rmdir()
    with (
        pytest.raises(StageError, match="the current folder has been removed"),
        guard.run_directory(Path(), create=True),
    ):
        pass


@pytest.mark.parametrize(
    ("error", "code", "line"),
    [
        (DataError("rows.jsonl is empty"), 1, "error: rows.jsonl is empty"),
        (UsageError("--device x: no such device"), 2, "error: --device x: no such device"),
        (RecipeError(["one", "two"]), 1, "error: one\nerror: two"),
        (KeyboardInterrupt(), 130, "error: interrupted; the same command resumes from its last checkpoint"),
        (MemoryError(), 1, "error: out of memory; try --set train.micro_batch_size=1"),
        (RuntimeError("MPS backend out of memory"), 1, "error: out of memory; try --set train.micro_batch_size=1"),
    ],
)
def test_errors_become_lines(error, code, line, capsys):
    with pytest.raises(typer.Exit) as caught, guard.guard("train", debug=False):
        raise error
    assert caught.value.exit_code == code
    shown = capsys.readouterr().err
    assert line in shown
    assert "Traceback" not in shown


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGHUP, 129)])
def test_what_ends_a_process_is_one_line_and_an_end_in_order(number, code, capsys):
    # pytest itself may run under nohup.
    ignored = signal.signal(number, signal.SIG_DFL)
    cleaned = []
    with pytest.raises(typer.Exit) as caught, guard.guard("train", debug=False):
        try:
            os.kill(os.getpid(), number)
            time.sleep(5)
        finally:
            # Another one, or one that is sent to no command, ends the process at once.
            cleaned.append(signal.getsignal(number))
    assert caught.value.exit_code == code
    assert capsys.readouterr().err == "error: terminated; the same command resumes from its last checkpoint\n"
    assert cleaned == [signal.SIG_DFL] == [signal.getsignal(number)]
    signal.signal(number, ignored)


def test_a_signal_ends_forked_workers_and_other_processes_of_a_launcher_at_once(monkeypatch, capfd):
    with guard.guard("train", debug=False):
        there, here = os.pipe()
        child = os.fork()
        if not child:
            os.write(here, b"!")
            time.sleep(30)
            os._exit(0)
        os.read(there, 1)
        os.kill(child, signal.SIGTERM)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGTERM
        before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
        with guard.guard("convert", debug=False):
            assert signal.getsignal(signal.SIGHUP) is signal.SIG_IGN, "nohup"
        signal.signal(signal.SIGHUP, before)
    monkeypatch.setenv("RANK", "1")
    with guard.guard("train", debug=False):
        assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL
    assert capfd.readouterr() == ("", "")


def test_running_out_of_memory_on_a_gpu_is_one_line(capsys):
    torch = pytest.importorskip("torch")
    with pytest.raises(typer.Exit), guard.guard("eval", debug=False):
        raise torch.cuda.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.\nSee documentation")
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: out of memory; try --set evaluation.batch_size=1")


def test_a_bug_keeps_its_traceback_and_says_that_it_is_one(capsys):
    with pytest.raises(typer.Exit) as caught, guard.guard("train", debug=False):
        raise ZeroDivisionError("oops")
    assert caught.value.exit_code == 1
    shown = capsys.readouterr().err
    assert "ZeroDivisionError: oops" in shown
    assert "bug in uniattn" in shown.splitlines()[-1]


def test_warnings_about_data_are_told_and_those_of_libraries_are_silent(monkeypatch):
    found: list[str] = []
    monkeypatch.setattr(logging.root.manager, "disable", 0)
    monkeypatch.setattr(warnings, "showwarning", warnings.showwarning)  # is replaced
    with warnings.catch_warnings():
        guard.quiet_libraries(found.append)
        warnings.warn("of a library", stacklevel=1)
        warnings.warn("about data", DataWarning, stacklevel=1)
    assert found == ["about data"]


# --- what reaches the stages ------------------------------------------------------------------------------------------


@pytest.fixture
def stages(monkeypatch):
    """Stage functions that record their arguments and where they were called."""
    calls: list[SimpleNamespace] = []

    def fake(name):
        def stage(*args, **kwargs):
            calls.append(SimpleNamespace(name=name, args=args, cwd=Path.cwd(), **kwargs))
            table = Table("", ["model", "ppl"], [["base", "15.5"]])
            return Result(title=f"done {name}", tables=[table], notes=["files in x/"], picture="0 ●")

        return stage

    for module_name in STAGES.values():
        module = ModuleType(module_name)
        function = module_name.rsplit(".", 1)[1]
        setattr(module, function, fake(function))
        monkeypatch.setitem(sys.modules, module_name, module)
    # It changes the whole process for good.
    monkeypatch.setattr(guard, "quiet_libraries", lambda warn: None)
    return calls


def invoke(*arguments):
    result = CliRunner().invoke(app_module.app, list(arguments))
    assert result.exit_code == 0, result.output
    return result


def test_the_four_commands_of_the_readme(stages, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    result = invoke("analyze", "some/model")
    for part in ("done analyze", "0 ●", "model", "15.5", "files in x/"):
        assert part in result.output
    invoke("convert", "--groups", "auto")
    invoke("train", "recipe.yaml")
    invoke("eval")
    analyze, convert, train, evaluate = stages
    assert analyze.args == ("some/model",)
    assert analyze.overrides == []
    assert (convert.groups, convert.dry_run) == ("auto", False)
    assert (train.args, train.recipe) == ((), Path("recipe.yaml"))
    assert evaluate.args == ((),)
    for call in stages:
        assert isinstance(call.options, RunOptions)
        assert (call.options.device, call.options.force) == ("auto", False)
        assert isinstance(call.options.progress, console.RichProgress)


def test_options_become_overrides_and_set_wins(stages, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    invoke(
        *("analyze", "m", "--tokens", "128", "--length", "32", "--max-distance", "4", "--dtype", "bfloat16"),
        *("--set", "analysis.tokens=256", "--set", "seed=3", "--device", "cpu", "--force"),
    )
    (call,) = stages
    assert call.overrides == [
        "analysis.tokens=128",
        "analysis.length=32",
        "analysis.max_distance=4",
        "model.dtype=bfloat16",
        "analysis.tokens=256",
        "seed=3",
    ]
    assert (call.options.device, call.options.force) == ("cpu", True)


def test_lists_of_sweep_and_inputs_of_compare(stages, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    invoke("sweep", "--kv", "0.9, 0.8", "--kinds", "softmax;softmax,kv", "--solve", "both,output", "--discard")
    invoke("compare", "a", "b/c", "--recipe", "other.yaml", "--set", "seed=1")
    swept, compared = stages
    assert (swept.kv, swept.followers, swept.solve, swept.discard) == ([0.9, 0.8], [], ["both", "output"], True)
    assert swept.kinds == [["softmax"], ["softmax", "kv"]]
    assert compared.args == (["a", "b/c"],) and compared.recipe == Path("other.yaml")
    assert compared.overrides == ["seed=1"]


@pytest.mark.parametrize("name", ["group", "convert"])
def test_a_budget_on_the_command_line_replaces_the_others(name, stages, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    invoke(name, "--followers", "12", "--head-map", "free", "--sources", "one")
    invoke(name, "--kv", "0.8")
    assert sorted(stages[0].overrides) == [
        "layout.followers=12",
        "layout.head_map=free",
        "layout.kv=null",
        "layout.max_loss=null",
        "layout.params=null",
        "layout.save=kv",
        "layout.sources=one",
        "layout.speed=null",
    ]
    assert [entry for entry in sorted(stages[1].overrides) if "null" not in entry] == [
        "layout.kv=0.8",
        "layout.save=kv",
    ]


@pytest.mark.parametrize("name", ["group", "convert"])
def test_budgets_may_be_given_together(name, stages, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    flags = ["--params", "0.95", "--kv", "0.8", "--max-loss", "0.03", "--save", "params", "--search", "scores"]
    flags += ["--speed", "1.1@4x64"]
    invoke(name, *flags)
    assert sorted(stages[0].overrides) == [
        "layout.followers=null",
        "layout.kv=0.8",
        "layout.max_loss=0.03",
        "layout.params=0.95",
        "layout.save=params",
        "layout.search=scores",
        "layout.speed=1.1@4x64",
    ]


def test_the_run_directory_is_where_the_stage_works(stages, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "run").mkdir()
    invoke("train", "-C", "run")
    invoke("eval", "a", "b", "--run-dir", "run")
    assert [call.cwd for call in stages] == [tmp_path / "run"] * 2
    assert stages[1].args == (["a", "b"],)
    assert Path.cwd() == tmp_path


def test_analyze_makes_the_run_directory_and_leaves_none_behind_when_nothing_was_written(stages, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    invoke("analyze", "m", "-C", "new")
    assert stages[0].cwd == tmp_path / "new"
    assert not (tmp_path / "new").exists()


# --- doctor, console, tables ------------------------------------------------------------------------------------------


def test_doctor_shows_versions_devices_and_caches(uniattn):
    done = uniattn("doctor")
    assert (done.returncode, done.stderr) == (0, "")
    for part in ("torch", "transformers", "cpu", "float32", "sdpa", "HF_HOME", "GiB"):
        assert part in done.stdout


def test_families_lists_every_family_with_models_masks_and_backends(uniattn):
    done = uniattn("families")
    assert (done.returncode, done.stderr) == (0, "")
    lines = {line.split()[0]: line for line in done.stdout.splitlines() if line.strip()}
    for name, family in FAMILIES.items():
        for part in (family.models, family.masks, *[backend.split("_")[0] for backend in family.backends]):
            assert part in lines[name]
    assert "sdpa" in lines["llama"] and "sdpa" not in lines["gemma2"]
    assert all(kind in done.stdout for kind in KINDS)


def test_a_family_that_is_not_there_is_refused_with_the_list(uniattn, tmp_path):
    (tmp_path / "config.json").write_text('{"model_type": "mamba"}', encoding="utf-8")
    done = uniattn("analyze", str(tmp_path), "-C", "run")
    assert done.returncode == 1
    (line,) = done.stderr.splitlines()
    assert line.startswith("error: models of type 'mamba' are not supported; supported: ")
    assert all(name in line for name in FAMILIES)
    assert not (tmp_path / "run").exists()


def test_doctor_names_the_command_that_installs_a_missing_extra(monkeypatch):
    found = doctor._version
    monkeypatch.setattr(doctor, "_version", lambda package: None if package == "lm_eval" else found(package))
    notes = doctor.examine().notes
    assert any("pip install 'uniattn[eval]'" in note for note in notes)
    assert not any("gguf" in note for note in notes)


def test_doctor_knows_every_extra_of_the_project():
    text = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    section = text.partition("[project.optional-dependencies]")[2].partition("\n[")[0]
    extras = dict(re.findall(r"^(\w+) = \[\"([\w.-]+)", section, re.MULTILINE))
    # For those who work on the project.
    del extras["dev"], extras["docs"]
    assert extras == {name: package for name, (package, _) in doctor.EXTRAS.items()}


def test_a_wide_table_is_turned_and_long_lines_are_not_cut(capsys):
    names = [f"measure number {index}" for index in range(9)]
    wide = Table("Comparison", ["model", *names], [["base", *map(str, range(9))], ["trained", *map(str, range(9))]])
    result = Result(tables=[wide], notes=["x" * 300])
    console.show(result)
    shown = capsys.readouterr().out
    assert re.search(r"^measure number 3\s+3\s+3\s*$", shown, re.MULTILINE)
    assert "x" * 300 in shown


def random_table(seed: int) -> Table:
    """A table as commands print them: names, and columns of figures or of texts."""
    pick = random.Random(seed)
    texts = [pick.random() < 0.3 for _ in range(pick.randrange(20))]
    names = [
        "/".join("abc" * pick.randrange(1, 9) for _ in range(pick.randrange(1, 4))) for _ in range(pick.choice([2, 12]))
    ]
    rows = []
    for name in names:
        figures = [f"{pick.uniform(-9, 999):.{pick.randrange(5)}f} ± {pick.random():.2f} %" for _ in texts]
        words = [" ".join("word" * pick.randrange(1, 4) for _ in range(pick.randrange(60))) for _ in texts]
        rows.append([name, *(words[index] if text else figures[index] for index, text in enumerate(texts))])
    return Table("", ["name", *(f"column {index}" for index in range(len(texts)))], rows)


@pytest.mark.parametrize("seed", range(24))
def test_whatever_a_table_holds_it_is_read_in_100_columns(seed):
    table, screen = random_table(seed), Console(file=io.StringIO(), width=100)
    console.show_table(table, screen)
    shown = screen.file.getvalue()
    assert max(map(cell_len, shown.splitlines())) <= 100
    for name, *cells in table.rows:
        assert len(name) > 50 or name in shown
        assert all(part in shown for cell in cells for part in ([cell] if "±" in cell else cell.split()))
    for part in console.divided(table, 100):
        longest = max((len(cell) for row in part.rows for cell in row[1:]), default=0)
        lines = screen.render_lines(console._drawn(part, 100))
        assert len(lines) <= 2 + len(part.rows) * max(4, longest // 30), "no short text is folded into many lines"


# What each command that prints a table is given in a finished run; those that take seconds are for the slow tests.
LINES = {
    "analyze": "--force",
    "score": "--kinds key,kv",
    "group": "--kv 0.9",
    "convert": "--dry-run",
    "synthesize": "--tokens 256",
    "train": "recipe.yaml --force",
    "eval": "--force",
    "data": "",
    "compare": ". converted",
    "sweep": "--kv 0.9,0.8 --discard",
    "bench": "--batch 1 --context 32 --new 2 --repeats 1",
    "push": "trained someone/tiny --dry-run",
    "recipe": "",
    "recipes": "",
    "families": "",
    "doctor": "",
}
SLOW = ("analyze", "score", "synthesize", "train", "eval", "compare", "sweep", "bench")


@pytest.mark.parametrize("name", [pytest.param(name, marks=[pytest.mark.slow] * (name in SLOW)) for name in LINES])
def test_tables_of_every_command_are_read_in_100_columns(name, tiny_runs, tmp_path, uniattn, monkeypatch):
    run = shutil.copytree(tiny_runs / "finished", tmp_path / "finished")
    (tmp_path / "model").symlink_to(tiny_runs / "model")
    drawn = []
    show_table = console.show_table

    def show_narrow(table, screen):
        with screen.capture() as shown:
            show_table(table, screen)
        drawn.append((table, shown.get()))

    monkeypatch.setattr(console, "show_table", show_narrow)
    done = uniattn(name, *LINES[name].split(), cwd=run, env={"COLUMNS": "100"})
    assert done.returncode == 0, done.stderr
    assert drawn
    for table, shown in drawn:
        lines = shown.splitlines()
        assert max(map(cell_len, lines)) <= 100
        # Seven cells of a row at most are under each other where a table was turned or divided.
        assert len(lines) <= 8 + 4 * len(table.rows) * max(1, len(table.columns) // 4), shown


def test_the_commands_whose_tables_are_looked_at_are_all():
    # Its result is the verdict in words.
    assert {*LINES} == PRINTING - {"report"}


def test_a_notebook_shows_all_of_a_result():
    sample = Sample("the first row", [("```q", False), ("a", True)])
    result = Result(title="T", picture="■■", samples=[sample], tables=[Table("", ["a"], [["1"]])], notes=["n", "m"])
    assert result._repr_markdown_() == (
        "**T**\n\n````text\n■■\n````\n\nthe first row\n\n````text\n```q⟦a⟧\n````\n\n"
        "| a   |\n| :-- |\n| 1   |\n\n- n\n- m"
    )


def test_brackets_are_not_markup(capsys):
    console.show(Result(title="[bold]t", tables=[Table("", ["[red]a"], [["[x]"]])], notes=["[dim]n"]))
    shown = capsys.readouterr().out
    for part in ("[bold]t", "[red]a", "[x]", "[dim]n"):
        assert part in shown


def test_progress_without_a_terminal_is_a_line_at_the_end(capsys, monkeypatch):
    now = iter([0.0, 5.0, 30.0, 31.0])
    monkeypatch.setattr(console.time, "monotonic", lambda: next(now))
    with console.RichProgress().track("fitting", 3) as advance:
        advance()
        advance(text="loss 2.5 [x]")
    assert capsys.readouterr().err.splitlines() == [
        "fitting: 2/3, 30 s, about 15 s left, loss 2.5 [x]",
        "fitting: 2/3, 31 s, about 16 s left, loss 2.5 [x]",
    ]


def test_bars_on_a_terminal_nest_and_notes_pass():
    terminal = console.Console(force_terminal=True, width=80, record=True, file=io.StringIO())
    progress = console.RichProgress(terminal)
    with progress.track("outer", 2) as outer:
        with progress.track("inner", None) as inner:
            inner(1, "text " * 30)
            progress.note("a [note]")
            progress.warn("care")
        outer(2, "done")
    text = terminal.export_text()
    assert "a [note]" in text
    assert "warning: care" in text
    assert max(map(len, text.splitlines())) <= 80
    assert progress._bars is None


def test_markdown():
    table = Table("T", ["a", "b|c"], [["x", "1"]])
    assert to_markdown(table) == "**T**\n\n| a   | b\\|c |\n| :-- | ---: |\n| x   |    1 |"
    with pytest.raises(ValueError, match="a row has 1 cells, not 2"):
        Table("T", ["a", "b"], [["x"]])
