"""`uniattn generate` and `uniattn chat` at the terminal: arguments, streamed output, the chat loop."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from uniattn_cli.errors import DataError, UsageError
from uniattn_cli.options import RunOptions
from uniattn_cli.recipe.paths import at_home
from uniattn_cli.tables import Result

if TYPE_CHECKING:
    from uniattn_cli.commands.generate import Chat
    from uniattn_cli.generation.decode import Answer, Decoding

COMMANDS = "/reset resets the conversation, /exit or Ctrl-D quits"
ENDED = {"length": "stopped at --max-new-tokens", "window": "the context window is full"}


class Printer:
    """Prints answers as they come; what is not the answer itself goes to stderr, unless there are two to tell apart."""

    def __init__(self, *, names: bool, stats: bool):
        self.names = names
        self.stats = stats

    def begin(self, name: str) -> None:
        """A heading, where there are two models."""
        if self.names:
            print(f"[{name}]", flush=True)

    def text(self, piece: str) -> None:
        """A piece of text, at once."""
        print(piece, end="", flush=True)

    def finish(self, name: str, answer: Answer) -> None:
        """The end of a line, and the figures."""
        print(flush=True)
        if self.stats:
            print(describe(name, answer), file=sys.stderr, flush=True)
        if self.names:
            print(flush=True)


def describe(name: str, answer: Answer) -> str:
    """One line of figures: tokens, rate, cache."""
    rate = answer.tokens_per_second
    parts = [
        f"{len(answer.tokens):,} tokens",
        "speed unknown" if rate is None else f"{rate:.1f} tokens/s after the first",
        f"first after {answer.first * 1e3:.0f} ms",
        f"prompt {answer.prompt:,} tokens" + (f", {answer.reused:,} of them cached" if answer.reused else ""),
        f"KV cache {answer.kv_bytes:,} B for {answer.cached:,} tokens",
        ENDED.get(answer.ended, ""),
        f"run by {answer.path}" + (f", not the engine: {answer.reason}" if answer.reason else ""),
    ]
    return f"({name}: {'; '.join(filter(None, parts))})"


def make_decoding(
    max_new_tokens: int, temperature: float | None, top_p: float | None, seed: int, greedy: bool
) -> Decoding:
    """The settings of both commands; greedy unless a temperature or a share is given.

    Raises:
        UsageError: `--greedy` together with settings of sampling, or a value that makes no sense.
    """
    from uniattn_cli.generation.decode import Decoding

    sampling = temperature is not None or top_p is not None
    if greedy and sampling:
        raise UsageError("--greedy excludes sampling; remove it, or remove --temperature and --top-p")
    if not sampling:
        return Decoding(max_new_tokens, seed=seed)
    if temperature == 0 and top_p is not None:
        raise UsageError("--temperature 0 is greedy, so --top-p has no effect; remove one of them")
    return Decoding(
        max_new_tokens, 1.0 if temperature is None else temperature, 1.0 if top_p is None else top_p, seed
    )  # fmt: skip


def split_arguments(words: Sequence[str]) -> tuple[str | None, str]:
    """`[CHECKPOINT] [PROMPT]` as (checkpoint, prompt); `-`, or no prompt, reads it from stdin.

    A single word is the prompt, unless it is a model directory.

    Raises:
        UsageError: more than two words, or no prompt.
        DataError: stdin is not text.
    """
    if len(words) > 2:
        raise UsageError(f"got {len(words)} arguments, expected at most [CHECKPOINT] PROMPT; quote the prompt")
    if len(words) == 2:
        checkpoint, prompt = words
    elif words and (at_home(words[0]) / "config.json").is_file():
        checkpoint, prompt = words[0], "-"
    else:
        checkpoint, prompt = None, words[0] if words else "-"
    prompt = read_stdin() if prompt == "-" else prompt
    if not prompt:
        raise _no_prompt()
    return checkpoint, prompt


def _no_prompt() -> UsageError:
    return UsageError('no prompt; give one in quotes, as in: uniattn generate "Why is the sky blue?"')


def read_stdin() -> str:
    """All of stdin, without the line end at its end.

    Raises:
        UsageError: stdin is a terminal.
        DataError: it is not UTF-8.
    """
    if sys.stdin.isatty():
        raise _no_prompt()
    try:
        return sys.stdin.read().rstrip("\r\n")
    except UnicodeDecodeError as error:
        raise DataError(f"stdin is not UTF-8 text ({error})") from None


def run_generate(
    words: Sequence[str],
    decoding: Callable[[], Decoding],
    *,
    beside: str | None,
    raw: bool,
    engine: str,
    stats: bool,
    overrides: Sequence[str],
    options: RunOptions,
) -> Result:
    """`uniattn generate`; the result is empty, because the answers have been printed already."""
    checkpoint, prompt = split_arguments(words)
    settings = decoding()
    from uniattn_cli.commands.generate import generate

    generate(
        prompt,
        checkpoint,
        beside=beside,
        raw=raw,
        decoding=settings,
        engine=engine,
        overrides=overrides,
        options=options,
        listener=Printer(names=beside is not None, stats=stats),
    )
    return Result()


def run_chat(
    checkpoint: str | None,
    decoding: Callable[[], Decoding],
    *,
    beside: str | None,
    stats: bool,
    overrides: Sequence[str],
    options: RunOptions,
) -> Result:
    """`uniattn chat`: line by line, until `/exit` or the end of stdin; returns what `run_generate` does."""
    settings = decoding()
    from uniattn_cli.commands.generate import Chat

    chat = Chat.open(checkpoint, beside=beside, decoding=settings, overrides=overrides, options=options)
    options.progress.note(COMMANDS)
    printer = Printer(names=beside is not None, stats=stats)
    while (line := next_line()) is not None:
        words = line.strip()
        if words in ("/exit", "/quit"):
            break
        if words == "/reset":
            chat.reset()
            options.progress.note("conversation reset")
        elif words.startswith("/") and " " not in words:
            options.progress.note(f"unknown command {words}; {COMMANDS}")
        elif words:
            take_turn(chat, line, printer, options)
    return Result()


def take_turn(chat: Chat, line: str, printer: Printer, options: RunOptions) -> None:
    """One turn; after an error that the user can fix, the conversation continues without this turn."""
    try:
        chat.say(line, printer)
    except KeyboardInterrupt:
        print(flush=True)
        options.progress.note("stopped; this turn was discarded")
    except DataError as error:
        options.progress.warn(f"{error}; this turn was discarded, /reset resets the conversation")


def next_line() -> str | None:
    """What the user types, or the next line of a file; None at the end and after Ctrl-C.

    Raises:
        DataError: it is not UTF-8.
    """
    try:
        if sys.stdin.isatty():
            # Gives the line editing and the history of earlier lines.
            import readline  # noqa: F401

            return input("> ")
        line = sys.stdin.readline()
    except (EOFError, KeyboardInterrupt):
        print(flush=True)
        return None
    except UnicodeDecodeError as error:
        raise DataError(f"stdin is not UTF-8 text ({error})") from None
    return line.rstrip("\r\n") if line else None
