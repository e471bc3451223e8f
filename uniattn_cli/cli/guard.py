"""What happens around every stage: run directory, quiet libraries, errors as one line with the right exit code."""

from __future__ import annotations

import contextlib
import logging
import os
import re
import signal
import sys
import threading
import traceback
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import typer

from uniattn_cli import __version__
from uniattn_cli.errors import DataWarning, RecipeError, StageError, UniAttnError, UsageError
from uniattn_cli.models.device import is_out_of_memory
from uniattn_cli.options import RunOptions
from uniattn_cli.run.files import file_errors, made
from uniattn_cli.tables import Result

# Signals that ask a process to end, as batch systems and closed terminals send them.
ENDING = ("SIGTERM", "SIGHUP")
QUIET_ENVIRONMENT = {
    "DATASETS_VERBOSITY": "error",
    "HF_DATASETS_DISABLE_PROGRESS_BARS": "1",
    "HF_HUB_DISABLE_PROGRESS_BARS": "1",
    "HF_HUB_VERBOSITY": "error",
    "LMEVAL_LOG_LEVEL": "ERROR",
    "TQDM_DISABLE": "1",
    "TRANSFORMERS_NO_ADVISORY_WARNINGS": "1",
    "TRANSFORMERS_VERBOSITY": "error",
}
LESS_MEMORY = {
    "analyze": "--set analysis.length=256",
    "score": "--set conversion.length=256",
    "convert": "--set conversion.length=256",
    "train": "--set train.micro_batch_size=1, --set train.gradient_checkpointing=true or --set train.max_length=256",
    "eval": "--set evaluation.batch_size=1 or --set evaluation.length=256",
    "compare": "--set evaluation.batch_size=1 or --set evaluation.length=256",
    "sweep": "--set conversion.length=256, --set evaluation.batch_size=1 or --set evaluation.length=256",
    "synthesize": "--set synthesis.batch_size=8 or --set train.max_length=256",
    "bench": "fewer checkpoints or --dtype bfloat16",
}
# What the same command does after an interruption; the others start over.
RESUMED = {
    "score": "resumes",
    "train": "resumes from its last checkpoint",
    "eval": "resumes",
    "compare": "resumes",
    "sweep": "resumes",
}


@dataclass(frozen=True)
class Common:
    """The options that every stage has."""

    run_dir: Path
    settings: Sequence[str]
    device: str
    force: bool
    debug: bool
    json: bool = False


def run_command(
    name: str, common: Common, overrides: Sequence[str], call: Callable[[list[str], RunOptions], Result]
) -> None:
    """Runs a command in its run directory and prints its result.

    Args:
        name: the command.
        common: the common options.
        overrides: `key.path=value` strings from the command's own options; `--set` comes after them and wins.
        call: imports and calls the stage.

    Raises:
        typer.Exit: with the exit code of the error, after printing it.
    """
    with guard(name, common.debug):
        if sys.flags.optimize > 1:
            raise UsageError("transformers needs docstrings; start Python without -OO and unset PYTHONOPTIMIZE")
        from uniattn_cli.cli.console import RichProgress, show

        progress = RichProgress()
        if not common.debug:
            quiet_libraries(progress.warn)
        options = RunOptions(device=common.device, force=common.force, progress=progress)
        with run_directory(common.run_dir, create=name == "analyze"), file_errors(Path(".")):
            result = call([*overrides, *common.settings], options)
            # Only one of the processes that a launcher starts prints.
            if os.environ.get("RANK", "0") == "0":
                show(result, as_json=common.json)


@contextlib.contextmanager
def run_directory(path: Path, *, create: bool) -> Iterator[None]:
    """Works inside `path`, so that every relative path of command line and recipe means the same in every stage.

    An error that names a path which is in the folder that one came from, and not here, says so.

    Args:
        path: the run directory.
        create: make it if it is missing; what was made is removed again if nothing was written.

    Raises:
        StageError: it does not exist, cannot be entered, or is removed meanwhile.
    """
    try:
        home = Path.cwd()
    except FileNotFoundError:
        raise StageError("the current folder has been removed; change to another one") from None
    with contextlib.ExitStack() as stack:
        try:
            with file_errors(path, making=create):
                if create:
                    stack.enter_context(made(path))
                os.chdir(path)
        except FileNotFoundError:
            raise StageError(f"-C {path}: no such directory; `uniattn analyze MODEL -C {path}` makes it") from None
        place = Path.cwd()
        try:
            yield
        except FileNotFoundError as error:
            if place.exists():
                raise
            raise StageError(f"{place} has been removed while the command was at work there") from error
        except UniAttnError as error:
            if name := _left_behind(home, str(error)):
                error.add(f"; paths start at -C {path}: write {os.path.relpath(home / name)}")
            raise
        finally:
            with contextlib.suppress(FileNotFoundError):
                os.chdir(home)


def _left_behind(home: Path, message: str) -> str | None:
    """The word of the command line that a message names and that is a path in `home`, but not here."""
    words = [word for argument in sys.argv[1:] for word in (argument, *re.split(r"[=,\[\]{}\s\"']+", argument))]
    return next(
        # Unlike `Path.exists`, this raises nothing for names that are too long.
        (
            word
            for word in words
            if word and word in message and not os.path.exists(word) and os.path.exists(home / word)
        ),
        None,
    )


class EndedError(BaseException):
    """A signal has asked this process to end; it is the only argument. No `except Exception` takes it for a failure."""


@contextlib.contextmanager
def end_in_order() -> Iterator[None]:
    """Signals of `ENDING` raise `EndedError`, so that partial output and the lock are removed as after Ctrl-C.

    A signal that is ignored (`nohup`) stays so. Of the processes that a launcher starts, all but the main one write
    nothing and end at once: one that waits for others in a collective would not get to see an exception.
    """
    owner = os.getpid()

    def end(number: int, frame: object) -> None:
        # The second one ends it at once.
        signal.signal(number, signal.SIG_DFL)
        if os.getpid() != owner:  # a forked worker, which its pool ends in this way
            os.kill(os.getpid(), number)
            return
        raise EndedError(signal.Signals(number))

    changed = []
    # Windows lacks SIGHUP.
    for number in (getattr(signal, name) for name in ENDING if hasattr(signal, name)):
        main = threading.current_thread() is threading.main_thread() and os.environ.get("RANK", "0") == "0"
        if main and signal.getsignal(number) is signal.SIG_DFL:
            signal.signal(number, end)
            changed.append(number)
    try:
        yield
    finally:
        for number in changed:
            signal.signal(number, signal.SIG_DFL)


@contextlib.contextmanager
def guard(name: str, debug: bool) -> Iterator[None]:
    """Turns errors into lines on stderr and an exit code.

    Args:
        name: the command, for the advice that depends on it.
        debug: show tracebacks of user errors too.

    Raises:
        typer.Exit: for everything that went wrong, except a closed pipe, which Click handles.
    """
    try:
        with end_in_order(), file_errors(Path(".")):
            yield
    except (typer.Exit, BrokenPipeError):
        raise
    except UniAttnError as error:
        _fail(error.faults if isinstance(error, RecipeError) else [str(error)], debug)
        raise typer.Exit(error.exit_code) from None
    except (KeyboardInterrupt, EndedError) as error:
        number, what = (
            (error.args[0], "terminated") if isinstance(error, EndedError) else (signal.SIGINT, "interrupted")
        )
        again = RESUMED.get(name, "starts over, and no partial output is left")
        _fail([f"{what}; the same command {again}"], debug)
        # As shells give it where a signal has ended a process.
        raise typer.Exit(128 + number) from None
    except Exception as error:  # the one place where every other exception ends: it is a bug, and says so
        if not is_out_of_memory(error):
            traceback.print_exc()
            _fail(
                [
                    f"this is a bug in uniattn {__version__}; please report it with the lines above and the output of "
                    "`uniattn doctor`"
                ],
                debug=False,
            )
            raise typer.Exit(1) from None
        smaller = LESS_MEMORY.get(name)
        advice = f"; try {smaller}" if smaller else ""
        _fail([f"out of memory{advice}, or a larger device with --device"], debug)
        raise typer.Exit(1) from None


def _fail(lines: Sequence[str], debug: bool) -> None:
    if debug:
        traceback.print_exc()
    for line in lines:
        print("error: " + " ".join(line.split("\n")), file=sys.stderr)


def quiet_libraries(warn: Callable[[str], None] = lambda line: None) -> None:
    """Silences progress bars, warnings and logs of the libraries below; must run before they are imported.

    A variable that the user has set wins.

    Args:
        warn: gets each `DataWarning`, which are ours, as one line.
    """
    for name, value in QUIET_ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    warnings.simplefilter("ignore")
    warnings.simplefilter("always", DataWarning)
    warnings.showwarning = lambda message, *_: warn(str(message))
    logging.disable(logging.WARNING)
