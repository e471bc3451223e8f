"""How a stage is run, as opposed to what it does: device, overwriting, progress. Never stored in a checkpoint."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Protocol

from uniattn_cli.errors import UsageError


class Progress(Protocol):
    """Where a stage reports progress; the command line draws it, a notebook may ignore it."""

    def track(self, description: str, total: int | None) -> contextlib.AbstractContextManager[Callable[..., None]]:
        """A bar; yields `advance(steps=1, text="")`, where text is shown beside the bar."""
        ...

    def note(self, text: str) -> None:
        """One line that stays on the screen."""
        ...

    def warn(self, text: str) -> None:
        """One line that stays on the screen and that the user should act on; a command may say it twice."""
        ...


class Silent:
    """Reports nothing."""

    @contextlib.contextmanager
    def track(self, description: str, total: int | None) -> Iterator[Callable[..., None]]:
        yield lambda steps=1, text="": None

    def note(self, text: str) -> None:
        pass

    def warn(self, text: str) -> None:
        pass


@dataclass(frozen=True)
class RunOptions:
    """How to run a stage.

    Attributes:
        device: `auto` (CUDA, then MPS, then CPU) or a torch device string.
        force: replace a complete output directory.
        progress: receiver of progress and notes.
    """

    device: str = "auto"
    force: bool = False
    progress: Progress = field(default_factory=Silent)

    def torch_device(self):
        """The device as a `torch.device`.

        Raises:
            UsageError: the device is unknown or not present.
        """
        import torch

        if self.device == "auto":
            if torch.cuda.is_available():
                return torch.device("cuda")
            return torch.device("mps" if torch.backends.mps.is_available() else "cpu")
        try:
            device = torch.device(self.device)
            # A device without memory, such as `meta`, has nothing to read back.
            torch.zeros(1, device=device).item()
        except (RuntimeError, AssertionError, NotImplementedError):
            raise UsageError(f"--device {self.device}: no such device here; `uniattn doctor` lists them") from None
        return device
