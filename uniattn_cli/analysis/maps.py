"""Rows of the attention maps of all layers, computed from captured queries and keys a few at a time."""

from __future__ import annotations

import math

import torch

from uniattn_cli.analysis.capture import LayerStates

# Below this, what a row has left without the first key is rounding; its square is still a float32.
SMALLEST = 1e-18


class SequenceMaps:
    """The attention maps of one sequence. Holds its keys in float32; maps exist only as rows are asked for."""

    def __init__(self, layers: list[LayerStates]):
        self.layers = layers
        self.heads, self.tokens = layers[0].queries.shape[:2]
        self.device = layers[0].queries.device
        groups: dict[tuple, list[int]] = {}
        for index, state in enumerate(layers):
            groups.setdefault((id(state.mask), state.scaling, state.softcap, state.window), []).append(index)
        # Layers with the same kind of mask are computed together: a few large operations instead of many small ones.
        self._groups = [
            (indices, torch.stack([layers[index].keys for index in indices]).float()) for indices in groups.values()
        ]

    def rows(self, rows: slice | torch.Tensor, keys: int) -> torch.Tensor:
        """Materialises rows of all maps.

        Args:
            rows: query positions, a slice or [rows].
            keys: number of keys that these rows can see at most.

        Returns:
            float32 [layers, query_heads, rows, keys]; what attention sinks take is missing from a row's sum.
        """
        positions = torch.arange(self.tokens, device=self.device)[rows]
        if len(self._groups) == 1:
            return self._group_rows(*self._groups[0], rows, positions, keys)
        maps = torch.empty(len(self.layers), self.heads, len(positions), keys, device=self.device)
        for indices, stacked in self._groups:
            maps[indices] = self._group_rows(indices, stacked, rows, positions, keys)
        return maps

    def _group_rows(
        self, indices: list[int], stacked: torch.Tensor, rows: slice | torch.Tensor, positions: torch.Tensor, keys: int
    ) -> torch.Tensor:
        state = self.layers[indices[0]]
        queries = torch.stack([self.layers[index].queries[:, rows] for index in indices]).float() * state.scaling
        # [layers, kv_heads, query heads of a group * rows, head_dim]: grouped-query attention without copies of keys.
        queries = queries.unflatten(1, (stacked.shape[1], -1)).flatten(2, 3)
        scores = (queries @ stacked[:, :, :keys].transpose(2, 3)).view(len(indices), self.heads, len(positions), keys)
        if state.softcap is not None:
            scores = scores.div_(state.softcap).tanh_().mul_(state.softcap)
        scores = _masked(scores, state, positions)
        if state.sinks is None:
            return scores.softmax(-1)
        sinks = torch.stack([sinks for index in indices if (sinks := self.layers[index].sinks) is not None]).float()
        taken = sinks[:, :, None, None].expand(-1, -1, len(positions), 1)
        return torch.cat([scores, taken], dim=-1).softmax(-1)[..., :keys]


def _masked(scores: torch.Tensor, state: LayerStates, positions: torch.Tensor) -> torch.Tensor:
    """Hides from each row what it cannot see, in place; scores [layers, heads, rows, keys]."""
    keys = scores.shape[-1]
    if state.mask is not None:
        mask = state.mask[0][:, positions][..., :keys]
        return scores.masked_fill_(~mask, -math.inf) if mask.dtype == torch.bool else scores.add_(mask.float())
    distance = positions[:, None] - torch.arange(keys, device=scores.device)
    hidden = distance < 0
    if state.window is not None:
        hidden |= distance >= state.window
    return scores.masked_fill_(hidden, -math.inf)


def drop_sink(maps: torch.Tensor) -> torch.Tensor:
    """The maps with nothing on their first key, each row made to sum to 1 again."""
    rest = maps.clone()
    rest[..., 0] = 0
    return rest.div_(rest.sum(-1, keepdim=True).clamp_min_(SMALLEST))
