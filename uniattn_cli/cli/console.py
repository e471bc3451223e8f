"""Everything drawn on the terminal. The only module that knows rich.

Results go to stdout; progress, notes and warnings go to stderr, so that a redirected result stays clean.
"""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Callable, Iterator, Sequence

from rich import box
from rich.cells import cell_len
from rich.console import Console, JustifyMethod
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table as RichTable
from rich.text import Text

from uniattn_cli.tables import Result, Sample, Table, to_json

# Width of output that is not a terminal, where nothing is gained by folding cells.
WIDTH_OF_FILES = 160
# Width above which a table is turned on its side if that makes it fit.
WIDTH_OF_PAGES = 80
# Columns of the screen between two cells.
GAP = 3
# Columns of the screen that a bar takes beside its description and text: bar, counts, two times and the gaps.
WIDTH_OF_BAR = 12 + 11 + 7 + 5 + 5
PLAIN_INTERVAL = 20.0


def make_console(*, stderr: bool = False) -> Console:
    """A console as wide as the terminal, or wide enough not to fold tables where there is none."""
    console = Console(stderr=stderr, highlight=False, markup=False)
    if not console.is_terminal and "COLUMNS" not in os.environ:
        console.width = WIDTH_OF_FILES
    return console


def show(result: Result, console: Console | None = None, *, as_json: bool = False) -> None:
    """Prints what a command returned, for people or, as JSON, for programs."""
    if as_json:
        print(to_json(result))
        return
    console = console or make_console()
    if result.title:
        console.print(Text(result.title, style="bold"), soft_wrap=True)
    if result.picture:
        console.print()
        console.print(Text(result.picture), soft_wrap=True)
    for sample in result.samples:
        show_sample(sample, console)
    for table in result.tables:
        show_table(table, console)
    if result.notes:
        console.print()
    for note in result.notes:
        console.print(Text(note), soft_wrap=True)


def show_sample(sample: Sample, console: Console) -> None:
    """Draws a row with its mask: what is learned in colour, or between ⟦ and ⟧ where there are no colours."""
    console.print()
    console.print(Text(sample.title, style="bold"), soft_wrap=True)
    drawn = Text(sample.marked)
    if console.is_terminal and not console.no_color and console.color_system is not None:
        drawn = Text.assemble(*((text, "green" if learned else "dim") for text, learned in sample.pieces))
    console.print(drawn, soft_wrap=True)


def show_table(table: Table, console: Console) -> None:
    """Draws a table; one that is too wide is turned on its side if that helps, or divided into several."""
    page = min(console.width, WIDTH_OF_PAGES) if not console.is_terminal else console.width
    turned = transposed(table)
    if natural_width(table) > page >= natural_width(turned):
        table = turned
    console.print()
    if table.title:
        console.print(Text(table.title, style="bold"), soft_wrap=True)
    for index, part in enumerate(divided(table, console.width)):
        if index:
            console.print()
        console.print(_drawn(part, console.width))


def divided(table: Table, page: int) -> list[Table]:
    """The table, or several with some of its columns each, so that what is on the screen can be read.

    Names and figures keep to their line, and texts are folded into few. Every part begins with the first column.

    Args:
        page: columns of the screen.
    """
    groups: list[list[int]] = [[]]
    left = room = page - min(widest(table, 0), page // 2)
    for index in range(1, len(table.columns)):
        width = widest(table, index)
        needed = GAP + (width if _is_whole(table, index, page) else min(width, width // 3 + 10, page // 3))
        if needed > left and groups[-1]:
            groups.append([])
            left = room
        groups[-1].append(index)
        left -= needed
    return [_columns(table, [0, *group]) for group in groups]


def _is_whole(table: Table, column: int, page: int) -> bool:
    """Whether cells stay on one line: names and figures, unless they leave no room for anything else."""
    return (not column or table.is_numeric(column)) and widest(table, column) <= page // 2


def _drawn(table: Table, page: int) -> RichTable:
    drawn = RichTable(box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False)
    for index, column in enumerate(table.columns):
        justify: JustifyMethod = "right" if table.is_numeric(index) else "left"
        drawn.add_column(Text(column), justify=justify, overflow="fold", no_wrap=_is_whole(table, index, page))
    for row in table.rows:
        drawn.add_row(*(Text(cell) for cell in row))
    return drawn


def _columns(table: Table, kept: Sequence[int]) -> Table:
    return Table(
        table.title, [table.columns[index] for index in kept], [[row[index] for index in kept] for row in table.rows]
    )


def natural_width(table: Table) -> int:
    """Columns of the screen that a table needs without folding a cell."""
    return sum(widest(table, index) + GAP for index in range(len(table.columns))) - GAP


def widest(table: Table, column: int) -> int:
    """Columns of the screen that the cells of a column need, its heading included."""
    return max(cell_len(cells[column]) for cells in (table.columns, *table.rows))


def transposed(table: Table) -> Table:
    """Rows and columns exchanged; the first column becomes the heading."""
    first, *others = (list(cells) for cells in zip(table.columns, *table.rows, strict=True))
    return Table(table.title, first, others)


def shorten(text: str, width: int) -> str:
    """Cuts a text to at most `width` columns, with an ellipsis where something is missing."""
    cut = Text(text)
    cut.truncate(max(width, 0), overflow="ellipsis")
    return cut.plain


class RichProgress:
    """Bars on a terminal, occasional lines elsewhere; implements `uniattn_cli.options.Progress`."""

    def __init__(self, console: Console | None = None):
        self.console = console or make_console(stderr=True)
        self._bars: Progress | None = None
        self._open = 0
        self._warned: set[str] = set()

    @contextlib.contextmanager
    def track(self, description: str, total: int | None) -> Iterator[Callable[..., None]]:
        """A bar, which may stand among others; yields `advance(steps=1, text="")`."""
        if not self.console.is_terminal:
            line = PlainBar(self.console, description, total)
            yield line.advance
            line.close()
            return
        bars = self._bars or self._start()
        description = shorten(description, self.console.width // 3)
        room = self.console.width - cell_len(description) - WIDTH_OF_BAR
        task = bars.add_task(description, total=total, text="")
        self._open += 1

        def advance(steps: int = 1, text: str = "") -> None:
            bars.update(task, advance=steps, text=shorten(text, room))

        try:
            yield advance
        finally:
            self._open -= 1
            if self._open:
                # The outer bar shows what is left.
                bars.remove_task(task)
            else:
                bars.stop()
                self._bars = None

    def _start(self) -> Progress:
        self._bars = Progress(
            TextColumn("{task.description}", markup=False),
            BarColumn(bar_width=12),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TimeRemainingColumn(compact=True),
            TextColumn("{task.fields[text]}", markup=False),
            console=self.console,
        )
        self._bars.start()
        return self._bars

    def note(self, text: str) -> None:
        """One line that stays on the screen."""
        self.console.print(Text(text), soft_wrap=True)

    def warn(self, text: str) -> None:
        """One line that stays on the screen and that the user should act on; the same is said once."""
        if text in self._warned:
            return
        self._warned.add(text)
        self.console.print(Text("warning: ", style="yellow") + Text(text), soft_wrap=True)


class PlainBar:
    """Progress as lines of a log: one every `PLAIN_INTERVAL` seconds, one at the end of anything that took a while."""

    def __init__(self, console: Console, description: str, total: int | None):
        self.console = console
        self.description = description
        self.total = total
        self.done = 0
        self.text = ""
        self.started = self.printed = time.monotonic()

    def advance(self, steps: int = 1, text: str = "") -> None:
        """Counts; prints if the last line is old."""
        self.done += steps
        self.text = text
        now = time.monotonic()
        if now - self.printed >= PLAIN_INTERVAL and self.done != self.total:
            self.printed = now
            self._print(now)

    def close(self) -> None:
        """Prints the last line, unless it was all over in a second."""
        now = time.monotonic()
        if now - self.started >= 1:
            self._print(now)

    def _print(self, now: float) -> None:
        elapsed = now - self.started
        parts = [f"{self.done}/{self.total}" if self.total else str(self.done), f"{elapsed:.0f} s"]
        if self.total and 0 < self.done < self.total:
            parts.append(f"about {elapsed / self.done * (self.total - self.done):.0f} s left")
        if self.text:
            parts.append(self.text)
        self.console.print(Text(f"{self.description}: {', '.join(parts)}"), soft_wrap=True)
