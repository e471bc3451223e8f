"""What the operations of one pass over the layers share: caches, places, positions."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from uniattn_cli.inference.caches import Caches


@dataclass
class Step:
    """One pass: a chunk of the prompt, or one new token per row.

    Attributes:
        caches: of the session.
        tables: for each kind of rotary embedding cosines and sines, [positions, rotary width].
        starts: [batch] int32, first place of a row that holds a token (padding is on the left).
        ends: [batch] int32, the place after its newest token.
        places: [batch * tokens] int32, where each new token goes.
        positions: the same, counted from the start of the row, for the rotary embedding.
        tokens: new tokens per row.
        first: place of the first new token of every row, where the host knows it; None inside a captured graph.
        padded: some row starts later than the first place.
    """

    caches: Caches
    tables: dict[str, tuple[torch.Tensor, torch.Tensor]]
    starts: torch.Tensor
    ends: torch.Tensor
    places: torch.Tensor
    positions: torch.Tensor
    tokens: int
    first: int | None
    padded: bool

    @property
    def batch(self) -> int:
        return self.starts.shape[0]

    @property
    def filled(self) -> int:
        """Places that have to be looked at, masks aside: as few as the host knows."""
        return self.caches.capacity if self.first is None else self.first + self.tokens

    @property
    def filled_blocks(self) -> int:
        """The same, up to the end of the last block."""
        return -(-self.filled // self.caches.block) * self.caches.block


def gather(states: dict[int, torch.Tensor], sources: tuple[tuple[int, int], ...], length: int) -> torch.Tensor:
    """Heads of several caches, [batch, heads, length, head_dim]; a view where all heads of one layer are in order."""
    layers = {layer for layer, _ in sources}
    heads = [head for _, head in sources]
    first = states[sources[0][0]]
    if len(layers) == 1:
        whole = first[:, :, :length]
        return whole if heads == list(range(first.shape[1])) else whole[:, heads]
    return torch.stack([states[layer][:, head, :length] for layer, head in sources], dim=1)
