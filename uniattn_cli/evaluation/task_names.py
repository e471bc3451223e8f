"""Names of the tasks of lm-evaluation-harness, read from the text of its files.

The harness parses all of its 14,000 files before it knows one name, which takes ten seconds, or a minute on a busy
machine. Who mistyped a name is told in one.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Sequence
from pathlib import Path

from uniattn_cli.errors import DataError, suggest

# `task: NAME`, and lists of names below a key, with or without quotes.
ENTRY = re.compile(r"""^["']?(?:task|group|tag)["']?[ \t]*:[ \t]*(.*(?:\n[ \t]*- .*)*)""", re.MULTILINE)
NAME = re.compile(r"""^[ \t]*(?:- *)?["']?(\w[^\s"':,]*)["']?[ \t]*$""", re.MULTILINE)


def check_mentioned(names: Sequence[str]) -> None:
    """Refuses names that no file of the harness mentions.

    Raises:
        DataError: with the nearest name.
    """
    text = read_text() if names else ""
    for name in names:
        if name not in text:
            raise unknown_task(name, names_in(text))


def read_text() -> str:
    """All settings of all tasks. Files that others include need not end in .yaml."""
    from lm_eval import tasks

    paths = (path for path in Path(tasks.__file__).parent.rglob("*") if path.suffix in ("", ".yaml"))
    return "\n".join(path.read_text(encoding="utf-8") for path in paths if path.is_file())


def names_in(text: str) -> set[str]:
    """Names of tasks, groups and tags in settings, and very few other words."""
    return {name for entry in ENTRY.findall(text) for name in NAME.findall(entry)}


def unknown_task(name: str, known: Collection[str]) -> DataError:
    """The error for a name that is not among the known ones."""
    return DataError(
        f"evaluation.tasks: '{name}' is not a task of lm-evaluation-harness{suggest(name, known)}; "
        "`lm_eval ls tasks` lists them; built-in tasks start with 'builtin:', local ones end in .jsonl or .txt"
    )
