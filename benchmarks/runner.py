"""What all benchmarks share: options, a file of results that grows row by row, tables, and merging.

A benchmark writes one JSON file with one row on each line, and beside it a table (`.md`) and a plot (`.png`) if it has
them. Rows that the file holds are not measured again, so that a run can be continued or extended; to measure a row
again, remove its line. Several processes, each with its own `--out`, share the work; `--merge` combines their files.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

from uniattn_cli.errors import UniAttnError
from uniattn_cli.options import RunOptions
from uniattn_cli.recipe.files import write_whole
from uniattn_cli.run.files import file_errors, read_json, versions
from uniattn_cli.tables import Table, to_markdown

Content = dict[str, Any]
# Parts of a setting that losses do not depend on; times do.
ENVIRONMENT = {"device", "versions", "torch", "transformers", "trl"}


class Results:
    """The content of a results file, written after every row.

    Args:
        out: the JSON file; continued where it exists.
        tables: names of the entries that hold rows.
        markdown: makes the table beside it.
        draw: makes the plot beside it.
        order: sorting key of the rows, by their names; without one they are in the order of measuring.
        portable: rows of other devices and versions may be added.
        fixed: tables in which a name has the same row in all files that are merged.

    Attributes:
        content: `setting`, which all rows have in common, and rows by name in each of `tables`.
    """

    def __init__(
        self,
        out: Path,
        tables: Sequence[str],
        *,
        markdown: Callable[[Content], str] | None = None,
        draw: Callable[[Content, Path], None] | None = None,
        order: Callable[[str], Any] | None = None,
        portable: bool = False,
        fixed: Sequence[str] = (),
    ):
        self.out, self.tables, self.portable, self.fixed = out, tables, portable, fixed
        self._markdown, self._draw, self._order = markdown, draw, order
        self.content: Content = self._read(out) if out.exists() else {name: {} for name in ("setting", *tables)}

    def begin(self, setting: Content) -> None:
        """States what all rows have in common.

        Raises:
            SystemExit: the file holds rows of other settings.
            StageError: it cannot be written.
        """
        setting = {**setting, "versions": versions()}
        if any(self.content[name] for name in self.tables):
            if self._differ(self.content["setting"], setting):
                sys.exit(f"error: {self.out} has rows of other settings; remove it or choose another --out")
        else:
            self.content["setting"] = setting
            # A file that cannot be written is no reason to lose what was measured first.
            self.save()

    def _read(self, path: Path) -> Content:
        content = read(path)
        if not all(isinstance(content.get(name), dict) for name in ("setting", *self.tables)):
            sys.exit(f"error: {path} was not written by this version of the benchmark; choose another file")
        return content

    def _differ(self, one: Content, other: Content) -> bool:
        names = (one.keys() | other.keys()) - (ENVIRONMENT if self.portable else set())
        # As they are read back.
        one, other = (json.loads(json.dumps(setting)) for setting in (one, other))
        return any(one.get(name) != other.get(name) for name in names)

    def missing(self, table: str, keys: Iterable[str]) -> list[str]:
        """Those of the rows that are still to be measured."""
        return [key for key in keys if key not in self.content[table]]

    def add(self, table: str, key: str, row: Any, shown: Any = None) -> None:
        """Adds a row, prints it, or what is `shown` instead, and writes everything."""
        self.content[table][key] = row
        print(f"{key}:", json.dumps(row if shown is None else shown), flush=True)
        self.save()

    def merge(self, files: Sequence[Path]) -> None:
        """Takes the rows of several files instead of its own.

        Raises:
            SystemExit: they were measured with different settings, or differ in a row of `fixed`.
        """
        self.content, *others = map(self._read, files)
        for file, other in zip(files[1:], others, strict=True):
            if self._differ(self.content["setting"], other["setting"]):
                sys.exit(f"error: {files[0]} and {file} hold rows of different settings")
            for name in self.tables:
                for key in self.content[name].keys() & other[name].keys() if name in self.fixed else ():
                    if self.content[name][key] != other[name][key]:
                        sys.exit(f"error: {file} has other {name} of the name '{key}' than a file before it")
                self.content[name] |= other[name]
        self.save()

    def save(self) -> None:
        """Writes the JSON file, and the table and the plot as soon as there are rows for them."""
        shown = self.tables[-1]
        if self._order:
            self.content[shown] = dict(sorted(self.content[shown].items(), key=lambda item: self._order(item[0])))
        with file_errors(self.out, making=True, instead="choose another --out"):
            self.out.parent.mkdir(parents=True, exist_ok=True)
            write_whole(self.out, rows_on_lines(self.content))
        if self._markdown and self.content[shown]:
            write_whole(self.out.with_suffix(".md"), self._markdown(self.content))
        if self._draw and self.content[shown]:
            self._draw(self.content, self.out.with_suffix(".png"))


def run(
    name: str,
    doc: str,
    tables: Sequence[str],
    add_options: Callable[[argparse.ArgumentParser], None],
    measure: Callable[[argparse.Namespace, Results], None],
    *,
    device: bool = True,
    **kwargs: Any,
) -> None:
    """Reads the command line and measures, or merges files.

    Args:
        name: of the results file in `docs/benchmarks`.
        doc: help text.
        tables: see `Results`; the last one is shown in the table.
        add_options: adds the benchmark's own options.
        measure: gets the options, `device` as a `torch.device`, and the results to add rows to.
        device: there is an option `--device`.
        kwargs: see `Results`.
    """
    common = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    common.add_argument("--out", type=Path, default=Path(f"docs/benchmarks/{name}.json"), help="JSON file to write")
    common.add_argument("--merge", type=Path, nargs="+", metavar="FILE", help="only combine files of several processes")
    if device:
        common.add_argument("--device", default="auto")
    # Merging needs none of the options that a benchmark asks for.
    merging, _ = common.parse_known_args()
    parser = argparse.ArgumentParser(
        prog=f"python -m benchmarks.{name}",
        description=doc,
        epilog=__doc__.partition("\n\n")[2],
        parents=[common],
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add_options(parser)
    arguments = merging if merging.merge else parser.parse_args()
    try:
        results = Results(arguments.out, tables, **kwargs)
        if arguments.merge:
            results.merge(arguments.merge)
            return
        if device:
            arguments.device = RunOptions(device=arguments.device).torch_device()
        measure(arguments, results)
    except UniAttnError as error:
        sys.exit(f"error: {error}")


def read(path: Path) -> Content:
    """A results file.

    Raises:
        StageError: it is missing or damaged.
    """
    return read_json(path, "give a file that this benchmark wrote")


def rows_on_lines(content: Content) -> str:
    """JSON in which every row of every table is on a line of its own."""

    def block(value: Any) -> str:
        rows = value.values() if isinstance(value, dict) else value
        if not isinstance(value, (dict, list)) or not any(isinstance(row, (dict, list)) for row in rows):
            return json.dumps(value)
        names = [f"{json.dumps(name)}: " for name in value] if isinstance(value, dict) else [""] * len(value)
        lines = ",\n".join(f"  {name}{json.dumps(row)}" for name, row in zip(names, rows, strict=True))
        return f"{{\n{lines}\n }}" if isinstance(value, dict) else f"[\n{lines}\n ]"

    return "{\n" + ",\n".join(f" {json.dumps(name)}: {block(value)}" for name, value in content.items()) + "\n}\n"


def page(title: str, text: str, table: Table) -> str:
    """A Markdown page of one table."""
    return f"# {title}\n\n{text}\n\n{to_markdown(table)}\n"


def spread(values: Sequence[float], digits: int = 3) -> str:
    """The mean, and the standard deviation where there are several values."""
    mean = f"{statistics.fmean(values):.{digits}f}"
    return f"{mean} ± {statistics.stdev(values):.{digits}f}" if len(values) > 1 else mean
