"""How many sequences go through a model at once: as many as fit into memory, found by trying."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, TypeVar

from uniattn_cli.models.device import release_memory

if TYPE_CHECKING:
    import torch

Result = TypeVar("Result")


class Batches:
    """Tries a number of sequences and halves it while memory runs out.

    What was found for a part is where the next model begins with the same part, so that all models run in batches of
    the same size as far as possible: in bfloat16 the last digits depend on it.

    Args:
        first: sequences of `length` tokens tried first; longer ones are fewer.
        length: tokens.
        device: where the models are.

    Attributes:
        found: the size that fitted, for each part that was run.
        reduced: the same for the parts that memory ran out in.
    """

    def __init__(self, first: int, length: int, device: torch.device):
        self.first = first
        self.length = length
        self.device = device
        self.found: dict[str, int] = {}
        self.reduced: dict[str, int] = {}

    def start(self, length: int | None) -> int:
        """Sequences of this length that hold about as many tokens as the first try."""
        return self.first if length is None else max(1, min(self.first, self.first * self.length // length))

    def run(self, part: str, length: int | None, call: Callable[[int], Result]) -> Result:
        """Calls with a batch size that fits.

        Args:
            part: what is run.
            length: tokens of its sequences; None if unknown.
            call: gets the number of sequences; is called again with fewer after memory ran out.

        Raises:
            RuntimeError: not even one sequence fits.
        """
        from accelerate.utils.memory import should_reduce_batch_size

        size = self.found.get(part, self.start(length))
        while True:
            try:
                result = call(size)
            except RuntimeError as error:
                if size == 1 or not should_reduce_batch_size(error):
                    raise
                size //= 2
                self.reduced[part] = size
            else:
                self.found[part] = size
                return result
            # Outside the handler, whose traceback holds the tensors of the failed try.
            release_memory(self.device)
