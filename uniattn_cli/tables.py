"""What a command returns, for the command line, reports and notebooks to show. Standard library only."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field, fields

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

    def is_numeric(self, column: int) -> bool:
        """Whether a column holds figures, which are aligned to the right; the first one names the rows."""
        return column > 0 and all(_is_number(row[column]) for row in self.rows)


@dataclass(frozen=True)
class Sample:
    """A row of data as it is trained on.

    Attributes:
        title: its data set and its lengths, in one line.
        pieces: decoded text, and whether it is learned; long pieces are shortened in their middle.
    """

    title: str
    pieces: list[tuple[str, bool]]

    @property
    def marked(self) -> str:
        """The text, with what is learned between ⟦ and ⟧."""
        return "".join(f"⟦{text}⟧" if learned else text for text, learned in self.pieces)


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

    def _repr_markdown_(self) -> str:
        """What Jupyter shows."""
        parts = [f"**{self.title}**"] if self.title else []
        # Four, because what they hold may have three.
        parts += [f"````text\n{self.picture}\n````"] if self.picture else []
        parts += [f"{sample.title}\n\n````text\n{sample.marked}\n````" for sample in self.samples]
        parts += map(to_markdown, self.tables)
        return "\n\n".join([*parts, "\n".join(f"- {note}" for note in self.notes)])


def to_json(result: Result) -> str:
    """Title, picture, samples, tables and notes of a result as JSON; what a command adds to them is in its files."""
    shown = {entry.name: getattr(result, entry.name) for entry in fields(Result)}
    return json.dumps(shown, default=asdict, ensure_ascii=False, indent=2)


def to_markdown(table: Table) -> str:
    """The table in Markdown, its title as a bold line; columns of numbers are aligned to the right.

    >>> print(to_markdown(Table("", ["model", "ppl"], [["base", "15.5"]])))
    | model |  ppl |
    | :---- | ---: |
    | base  | 15.5 |
    """
    lines = [[_escape(cell) for cell in row] for row in (table.columns, *table.rows)]
    widths = [max(3, *(len(line[index]) for line in lines)) for index in range(len(table.columns))]
    columns = list(zip(widths, map(table.is_numeric, range(len(widths))), strict=True))

    def line(cells: list[str]) -> str:
        padded = [
            cell.rjust(width) if right else cell.ljust(width)
            for cell, (width, right) in zip(cells, columns, strict=True)
        ]
        return "| " + " | ".join(padded) + " |"

    rule = ["-" * (width - 1) + ":" if right else ":" + "-" * (width - 1) for width, right in columns]
    heading = [f"**{table.title}**", ""] if table.title else []
    return "\n".join([*heading, line(lines[0]), line(rule), *map(line, lines[1:])])


def _escape(cell: str) -> str:
    return cell.replace("|", "\\|").replace("\n", " ")


def _is_number(cell: str) -> bool:
    # Figures come with units and signs, so anything that holds a digit before a letter counts, and so do blanks.
    text = cell.strip().lstrip("+-−±≈~<>x×")
    return not text or text in (NOTHING, "—", "n/a", "all") or text[0].isdigit()
