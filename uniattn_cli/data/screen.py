"""Which rows of a data set can be used: the others are left out, counted and told, and too many of them refused."""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from uniattn_cli.data.chat import ChatRenderer
from uniattn_cli.data.conversations import Message
from uniattn_cli.errors import DataError, RowError
from uniattn_cli.recipe.schema import DataSpec

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

SHOWN = 3  # rows named with their fault


@dataclass(frozen=True)
class CheckedRow:
    """A row in the one form of all data sets; a conversation, a text, or, where it cannot be used or is empty, neither.

    Attributes:
        messages: see `conversations`.
        text: plain text.
        fault: why it cannot be used.
        unused: names of what it holds that is not used.
    """

    messages: list[Message] | None = None
    text: str | None = None
    fault: str | None = None
    unused: tuple[str, ...] = ()

    @property
    def used(self) -> bool:
        """Whether it can be used."""
        return self.messages is not None or self.text is not None


@dataclass
class Tally:
    """What was found in the rows of a data set.

    Attributes:
        source: its name.
        rows: rows read, the bad ones and those without text included.
        used: rows that can be used.
        bad: rows that cannot.
        faults: what is wrong with the first of them.
        unused: rows that hold something that is not used, by its name.
    """

    source: str
    rows: int = 0
    used: int = 0
    bad: int = 0
    faults: list[str] = field(default_factory=list)
    unused: Counter[str] = field(default_factory=Counter)

    def add(self, row: CheckedRow) -> None:
        """Counts a row."""
        self.rows += 1
        self.used += row.used
        self.unused.update(row.unused)
        if row.fault is not None:
            self.bad += 1
            self.faults += [row.fault] if len(self.faults) < SHOWN else []


class Screen:
    """Looks at the rows of data sets as one command reads them, perhaps several times.

    Args:
        data: gives `max_bad_rows`; None takes its default.
        tokenizer: conversations that its chat template refuses cannot be used; None lets all pass.
        tell: gets a line on each data set of which something is not used, once.
    """

    def __init__(
        self,
        data: DataSpec | None = None,
        tokenizer: PreTrainedTokenizerBase | None = None,
        tell: Callable[[str], None] = lambda line: None,
    ):
        self.most = (data or DataSpec()).max_bad_rows
        self.tokenizer = tokenizer
        self.renderer = None if tokenizer is None else ChatRenderer(tokenizer)
        self._tell = tell
        self._told: set[tuple[str, str]] = set()
        # A template's answer to turns of text depends on who speaks, and most conversations are of a few forms.
        self._answers: dict[tuple[str, ...], tuple[str, list[str]]] = {}

    @contextlib.contextmanager
    def counting(self, source: str) -> Iterator[Tally]:
        """Counts what a data set holds as it is read, and says so at the end.

        Raises:
            DataError: as `judge`.
        """
        tally = Tally(source)
        try:
            yield tally
        except GeneratorExit:  # enough was read
            self._report(tally)
            raise
        self.judge(tally)

    def judge(self, tally: Tally) -> None:
        """Says what was found in a data set.

        Raises:
            DataError: too many of its rows, or all, cannot be used, or there are none.
        """
        if tally.bad > self.most * tally.rows or tally.bad == tally.rows > 0:
            raise DataError(
                f"{tally.source}: {tally.bad:,} of {tally.rows:,} rows cannot be used ({tally.bad / tally.rows:.1%}, "
                f"data.max_bad_rows allows {self.most:.1%}); the first: {tally.faults[0]}"
            )
        self._report(tally)
        if not tally.used:
            raise DataError(f"{tally.source} has no rows; use a data set with at least one")

    def check(self, messages: list[Message], where: str, unused: set[str]) -> None:
        """Asks the chat template whether it takes a conversation and shows what it holds.

        Args:
            messages: the conversation.
            where: the row, for messages to the user.
            unused: gets what it does not show.

        Raises:
            RowError: it does not.
        """
        if self.renderer is None or not messages:
            return
        more = any(message.keys() - {"role", "content", "train"} for message in messages)
        form = tuple(message["role"] for message in messages)
        answer = None if more else self._answers.get(form)
        if answer is None:
            answer = _ask(self.renderer, messages)
            if not more:
                self._answers[form] = answer
        fault, hidden = answer
        if fault:
            raise RowError(f"{where}: {fault}")
        unused.update(f"{name}, which the chat template does not show," for name in hidden)

    def _report(self, tally: Tally) -> None:
        source = tally.source
        if tally.bad:
            what = (
                f"{tally.bad:,} of {tally.rows:,} rows cannot be used and {'is' if tally.bad == 1 else 'are'} left out"
            )
            self._once((source, "bad"), f"{source}: {what}: {'; '.join(tally.faults)}{'; ...' * (tally.bad > SHOWN)}")
        if tally.unused:
            named = "; ".join(f"{name} in {count:,} of {tally.rows:,} rows" for name, count in tally.unused.items())
            self._once((source, "unused"), f"{source}: {named}: not used")

    def _once(self, key: tuple[str, str], line: str) -> None:
        if key not in self._told:
            self._told.add(key)
            self._tell(line)


def _ask(renderer: ChatRenderer, messages: list[Message]) -> tuple[str, list[str]]:
    """Why the template does not take a conversation (empty if it does), and what of it is not shown."""
    try:
        hidden = renderer.unseen(messages)
    except DataError as error:
        return str(error), []
    return "the chat template does not show its tool calls" if "tool_calls" in hidden else "", hidden
