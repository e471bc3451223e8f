"""What a command returns, for the command line, reports and notebooks to show. Standard library only."""

from __future__ import annotations

from dataclasses import dataclass, field

# What a cell holds where there is no figure.
NOTHING = "–"


@dataclass(frozen=True)
class Table:
    """A table of text, drawn by whoever shows it.

    Attributes:
        title: one line above the table; may be empty.
        columns: heading of each column.
        rows: one list of cells per row, as long as `columns`.
    """

    title: str
    columns: list[str]
    rows: list[list[str]]

    def __post_init__(self) -> None:
        for row in self.rows:
            if len(row) != len(self.columns):
                raise ValueError(f"table '{self.title}': a row has {len(row)} cells, not {len(self.columns)}: {row}")


@dataclass(frozen=True)
class Sample:
    """A row of data as it is trained on.

    Attributes:
        title: its data set and its lengths, in one line.
        pieces: decoded text, and whether it is learned; long pieces are shortened in their middle.
    """

    title: str
    pieces: list[tuple[str, bool]]


@dataclass(frozen=True, kw_only=True)
class Result:
    """What a command returns; all of it is shown, in this order. Commands that return more than text extend it.

    Attributes:
        title: one line; may be empty.
        picture: drawn with characters; may be empty.
        samples: rows of data.
        tables: the figures.
        notes: warnings, and where everything was written; one line each.
    """

    title: str = ""
    picture: str = ""
    samples: list[Sample] = field(default_factory=list)
    tables: list[Table] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)


def to_markdown(table: Table) -> str:
    """The table in Markdown, its title as a bold line; all columns but the first are aligned to the right.

    >>> print(to_markdown(Table("", ["model", "ppl"], [["base", "15.5"]])))
    | model |  ppl |
    | :---- | ---: |
    | base  | 15.5 |
    """
    lines = [[_escape(cell) for cell in row] for row in (table.columns, *table.rows)]
    widths = [max(3, *(len(line[index]) for line in lines)) for index in range(len(table.columns))]

    def line(cells: list[str]) -> str:
        padded = [
            cell.rjust(width) if index else cell.ljust(width)
            for index, (cell, width) in enumerate(zip(cells, widths, strict=True))
        ]
        return "| " + " | ".join(padded) + " |"

    rule = ["-" * (width - 1) + ":" if index else ":" + "-" * (width - 1) for index, width in enumerate(widths)]
    heading = [f"**{table.title}**", ""] if table.title else []
    return "\n".join([*heading, line(lines[0]), line(rule), *map(line, lines[1:])])


def _escape(cell: str) -> str:
    return cell.replace("|", "\\|").replace("\n", " ")
