"""Every error that a user can cause, and the exit code it ends with.

The command line prints the message of a `UniAttnError` as one line (or one line per fault) and exits with its code; any
other exception is a bug and keeps its traceback. Messages say what was wrong, where, and the next step.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class UniAttnError(Exception):
    """Base of all errors that a user can cause or fix; exit code 1."""

    exit_code = 1

    def add(self, words: str) -> None:
        """Ends the message with these words, too."""
        self.args = (f"{self}{words}",)


class UsageError(UniAttnError):
    """An option or argument of the command line that makes no sense; exit code 2, as Click uses it."""

    exit_code = 2


class RecipeError(UniAttnError):
    """One or more faults in a recipe, all reported at once.

    Args:
        faults: one line per fault, already naming file, line and key.
    """

    def __init__(self, faults: str | Iterable[str]):
        self.faults = [faults] if isinstance(faults, str) else list(faults)
        super().__init__("\n".join(self.faults))

    def add(self, words: str) -> None:
        self.faults[-1] += words


class LayoutError(UniAttnError):
    """A layout that breaks an invariant, or a shorthand that cannot be read."""


class ModelError(UniAttnError):
    """A model that cannot be found or read, or of an unsupported family."""


class CheckpointError(UniAttnError):
    """A checkpoint directory that is incomplete, damaged or of another format."""


class DataError(UniAttnError):
    """A data set that is missing, empty or lacks the needed columns."""


class DataWarning(UserWarning):
    """Data that can be used, but that the user should know something about; the command line shows it as one line."""


class RowError(DataError):
    """A row that cannot be used, although others of its data set may be."""


class HubError(UniAttnError):
    """A hub that cannot be reached, or that does not let the user write."""


class StageError(UniAttnError):
    """A stage whose input is missing or from another run, or whose output exists."""


def suggest(name: str, known: Iterable[str]) -> str:
    """Returns ` (did you mean 'x'?)` for the nearest known name, or an empty string.

    >>> suggest("lenght", ["length", "tokens"])
    " (did you mean 'length'?)"
    """
    near = difflib.get_close_matches(name, list(known), n=1, cutoff=0.6)
    return f" (did you mean '{near[0]}'?)" if near else ""
