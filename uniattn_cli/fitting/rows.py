"""Rows of calibration tokens on which a layer's weights are trained, and attention maps written out."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from uniattn_cli.fitting.stream import Batch, positions_of, visit
from uniattn_cli.modeling.sharing_uniattn import SharedAttentionMixin, SharedStates

# Tokens of one step, in whole rows: a fifth of a second for a model of 0.1 billion parameters on two CPU cores.
STEP_TOKENS = 2048
# Scores that are alive at once, 256 MiB in float32; a few tensors of that size are.
MOST_SCORES = 1 << 26


@dataclass(frozen=True)
class Rows:
    """What a fit needs of some rows, which have no padding and equal length, so that the mask is that of one row.

    Attributes:
        states: by name, each [rows, ...]; `cos` and `sin` [rows, tokens, dim] and `position_ids` [rows, tokens] among
            them, the latter where layers are given them.
        mask: as the layer gives it to its attention module, [1, ...]; None where that is left to the backend.
        scores: of one row.
        place: where they are used, wherever they are kept.
    """

    states: dict[Any, torch.Tensor]
    mask: torch.Tensor | None
    scores: int
    place: torch.device

    @classmethod
    def of(cls, attention: SharedAttentionMixin, states: dict[Any, torch.Tensor], kwargs: dict[str, Any]) -> Rows:
        """From the states of a batch and what the attention module is called with."""
        rows, length, _ = kwargs["hidden_states"].shape
        embeddings, places = positions_of(kwargs)
        for name, each in zip(("cos", "sin"), embeddings, strict=True):
            states[name] = each.expand(rows, -1, -1)
        if places is not None:
            states["position_ids"] = places.expand(rows, -1)
        mask = kwargs.get("attention_mask")
        # One that only a backend can read says, without padding, nothing that is not known.
        mask = mask[:1] if isinstance(mask, torch.Tensor) else None
        place = kwargs["hidden_states"].device
        return cls(states, mask, attention.config.num_attention_heads * length**2, place)

    @property
    def positions(self) -> tuple[tuple[torch.Tensor, torch.Tensor], torch.Tensor | None]:
        """Rotary embeddings, float32, and positions, as `embed_positions` is given them."""
        places = self["position_ids"] if "position_ids" in self.states else None
        return (self["cos"].float(), self["sin"].float()), places

    def __getitem__(self, name: Any) -> torch.Tensor:
        return self.states[name].to(self.place)

    def __len__(self) -> int:
        return len(self.states["cos"])

    def kept(self, device: torch.device) -> Rows:
        """The same rows, kept on a device."""
        return replace(self, states={name: state.to(device) for name, state in self.states.items()})

    def split(self) -> list[Rows]:
        """Each row by itself."""
        parts = zip(*(state.split(1) for state in self.states.values()), strict=True)
        return [replace(self, states=dict(zip(self.states, part, strict=True))) for part in parts]

    @classmethod
    def together(cls, rows: Sequence[Rows]) -> Iterator[Rows]:
        """As many rows in one piece as memory allows."""
        count = max(1, MOST_SCORES // rows[0].scores)
        for start in range(0, len(rows), count):
            piece = rows[start : start + count]
            yield replace(piece[0], states={name: torch.cat([row[name] for row in piece]) for name in piece[0].states})


def rows_per_step(length: int) -> int:
    """Rows of a length on which one step trains."""
    return max(1, STEP_TOKENS // length)


def single_rows(batches: Sequence[Batch], prepare: Callable[[Batch], Rows], held: bool, most: int) -> list[Rows]:
    """So many single rows, held out or not."""
    rows: list[Rows] = []
    for batch in visit(batch for batch in batches if batch.held is held):
        rows += [row.kept(batch.home) for row in prepare(batch).split()]
        if len(rows) >= most:
            break
    return rows[:most]


def in_turn(
    rows: Sequence[Rows], count: int, gradients: Callable[[Rows], Sequence[torch.Tensor]]
) -> Callable[[int], list[torch.Tensor]]:
    """What `TrainedWeights.train` asks for: in each step gradients of a mean over the next rows.

    Args:
        rows: used over and over.
        count: rows of a step.
        gradients: of the mean over the rows of one piece.
    """

    def of_step(step: int) -> list[torch.Tensor]:
        pieces = Rows.together([rows[(step * count + place) % len(rows)] for place in range(count)])
        parts = [[gradient * (len(piece) / count) for gradient in gradients(piece)] for piece in pieces]
        return [torch.stack(part).sum(0) for part in zip(*parts, strict=True)]

    return of_step


def scores(attention: SharedAttentionMixin, queries: torch.Tensor, keys: torch.Tensor) -> torch.Tensor:
    """Scores of all pairs of tokens, float32 [rows, heads, tokens, tokens]."""
    keys = keys.float().repeat_interleave(queries.shape[1] // keys.shape[1], dim=1)
    found = (queries.float() * attention.scaling) @ keys.transpose(-1, -2)
    cap = attention.attention_arguments().get("softcap")
    return found if cap is None else cap * torch.tanh(found / cap)


def masked(
    attention: SharedAttentionMixin,
    found: torch.Tensor,
    mask: torch.Tensor | None,
    shared: SharedStates | None = None,
) -> torch.Tensor:
    """Scores where a token sees another, minus infinity elsewhere; in families with sinks, those behind the last key.

    Args:
        found: [rows, heads, tokens, keys].
        mask: of `Rows`.
        shared: what is lent to a layer that borrows maps, whose sinks they are.

    Returns:
        [rows, heads, tokens, keys], one more where there are sinks.
    """
    if mask is None:
        window = attention.attention_arguments().get("sliding_window")
        hidden = torch.ones(found.shape[-2:], dtype=torch.bool, device=found.device).triu(1)
        if window is not None:
            hidden |= torch.ones_like(hidden).tril(-window)
        found = found.masked_fill(hidden, -torch.inf)
    elif mask.dtype is torch.bool:
        found = found.masked_fill(~mask, -torch.inf)
    else:
        found = found + mask[..., : found.shape[-1]].float()
    sinks = attention.map_sinks(shared, found.device)
    if sinks is None:
        return found
    return torch.cat([found, sinks[:, :, None, None].float().expand(len(found), -1, found.shape[2], 1)], dim=-1)
