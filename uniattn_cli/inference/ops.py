"""The operations of a decoder layer in plain PyTorch; `triton_ops` replaces those that a kernel does better."""

from __future__ import annotations

import torch
from torch import nn
from torch.nn import functional

from uniattn_cli.inference import reference
from uniattn_cli.inference.caches import Caches
from uniattn_cli.inference.prefill import attend
from uniattn_cli.inference.program import Gated, LayerProgram, Program
from uniattn_cli.inference.step import Step, gather


class TorchOps:
    """Runs on any device and in any dtype. Norms and activations are the model's own modules.

    Args:
        program: the model.
        caches: of the session; tables and workspaces are made for them.
        reuse: followers use the map that their leader kept; else they compute it again from its queries and keys, as
            layers that ask early always do here.
    """

    name = "torch"
    # Layers of which each lender's pass gives all but what the newest value adds: they are decoded without queries.
    served: frozenset[int] = frozenset()

    def __init__(self, program: Program, caches: Caches, *, reuse: bool = True):
        self.program, self.caches, self.reuse = program, caches, reuse
        heads = program.shape.query_heads
        slots = {layer.index: layer.map_slot for layer in program.layers if layer.map_slot is not None}
        self.map_rows = {
            layer.index: torch.tensor(
                [slots[source] * heads + head for source, head in layer.query_sources], device=program.device
            )
            for layer in program.layers
            if layer.kind.borrows_maps
        }

    def residual_norm(
        self,
        residual: torch.Tensor,
        update: torch.Tensor | None,
        post: nn.Module | None,
        pre: nn.Module | None,
        out: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Adds a normed update to the residual stream and norms the sum for what comes next.

        Args:
            residual, update: [tokens, hidden].
            post: norm of the update, or None.
            pre: norm of the sum, or None.
            out: where the normed sum is wanted, [tokens, hidden].
        """
        if update is not None:
            residual = residual + (update if post is None else post(update))
        normed = residual if pre is None else pre(residual)
        if out is not None:
            normed = out.copy_(normed)
        return residual, normed

    def feed_forward(self, feed: Gated | nn.Module, hidden: torch.Tensor, step: Step) -> torch.Tensor:
        """[tokens, hidden] to the same."""
        if not isinstance(feed, Gated):
            return feed(hidden.view(step.batch, step.tokens, -1)).view_as(hidden)
        return self.linear(self.gated(feed, hidden), feed.down)

    def tune(self) -> None:
        """Chooses between several ways to the same product, where there are several; before steps are captured."""

    def linear(self, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
        """A projection: [tokens, columns] to [tokens, rows]."""
        return functional.linear(x, weight, bias)

    def gated(self, feed: Gated, hidden: torch.Tensor) -> torch.Tensor:
        """activation(gate) * up from the input of both: [tokens, hidden] to [tokens, intermediate]."""
        return self.gate(feed, self.linear(hidden, feed.gate_up))

    def gate(self, feed: Gated, gate_up: torch.Tensor) -> torch.Tensor:
        """activation(gate) * up: [tokens, 2 * intermediate] to [tokens, intermediate]."""
        gate, up = gate_up.chunk(2, dim=-1)
        return feed.function(gate) * up

    def place(
        self, layer: LayerProgram, projected: torch.Tensor, step: Step, extra: torch.Tensor | None = None
    ) -> torch.Tensor | None:
        """Takes what was projected to where it belongs: caches, the low-rank part of W_c into `extra`.

        Args:
            projected: [tokens, rows].
            extra: [tokens, rank].

        Returns:
            Queries [tokens, heads, head_dim], its own and then those that it projects for others, or None where there
            are none.
        """
        found, used = {}, 0
        for part in layer.parts:
            width = (layer.placed_heads if part == "q" else layer.kv_heads) * layer.head_dim
            found[part] = self._normed(layer, part, projected[:, used : used + width])
            used += width
        if extra is not None:
            extra.copy_(projected[:, used:])
        for part in "qk":
            if part in found and layer.rope is not None:
                found[part] = _rotate(found[part], *step.tables[layer.rope], step.positions)
        for part, caches in (("k", self.caches.keys), ("v", self.caches.values)):
            if part in found:
                _write(caches[layer.index], found[part], step)
        return found.get("q")

    def _normed(self, layer: LayerProgram, part: str, states: torch.Tensor) -> torch.Tensor:
        if part == "q" and layer.asked:
            heads = [layer.heads, *(asked.heads for asked in layer.asked)]
            own, *others = states.split([count * layer.head_dim for count in heads], dim=1)
            # Those that took a product of their own are normed already.
            norms = [asked.norm if asked.weight is None else None for asked in layer.asked]
            normed = [_apply(norm, one, layer) for norm, one in zip(norms, others, strict=True)]
            return torch.cat([_apply(layer.q_norm, own, layer), *normed], dim=1)
        return _apply({"q": layer.q_norm, "k": layer.k_norm}.get(part), states, layer)

    def decode(self, layer: LayerProgram, queries: torch.Tensor | None, step: Step, out: torch.Tensor) -> None:
        """Attention of one new token per row into `out` [batch, heads * head_dim].

        Args:
            queries: of `place`, or for a layer that asks early those that its lenders placed; None where it has none,
                or is one of `served`.
        """
        caches = self.caches
        if queries is not None:
            queries = queries[:, : layer.heads]
        if layer.map_slot is not None and queries is not None:
            caches.queries[layer.map_slot] = queries
        if layer.kind.borrows_maps and self.reuse:
            values = caches.values[layer.index][:, :, : step.filled_blocks]
            heads = reference.follow(caches.maps, caches.block_max, caches.lse, self.map_rows[layer.index], values)
        else:
            queries, keys, values = self._states(layer, queries, step)
            kept = None
            if layer.map_slot is not None and self.reuse:
                slot = layer.map_slot
                kept = reference.Kept(caches.maps[slot], caches.block_max[slot], caches.lse[slot])
            if kept is None and layer.softcap is None and step.first is not None:
                out.copy_(_stock(layer, queries, keys, values, step))
                return
            heads = reference.lead(
                queries,
                keys,
                values,
                step.starts,
                step.ends,
                scale=layer.scale,
                block=caches.block,
                softcap=layer.softcap,
                window=layer.window,
                kept=kept,
            )
        out.copy_(heads.flatten(1))

    def _states(
        self, layer: LayerProgram, queries: torch.Tensor | None, step: Step
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Queries, keys and values of a decoding step, own or borrowed."""
        caches, length = self.caches, step.filled_blocks
        if layer.kind.borrows_maps:
            flat = caches.queries.transpose(0, 1).flatten(1, 2)
            queries = flat[:, self.map_rows[layer.index]]
        assert queries is not None, "what borrows no map has queries"
        keys, values = borrowed_states(layer, caches, length)
        return queries, keys, values

    def prompt(
        self,
        layer: LayerProgram,
        queries: torch.Tensor | None,
        lent: dict[int, torch.Tensor],
        step: Step,
    ) -> torch.Tensor:
        """Attention of a chunk of the prompt.

        Args:
            queries: [batch * tokens, heads, head_dim], as for `decode`.
            lent: this chunk's queries of layers that lend them, [batch, heads, tokens, head_dim].

        Returns:
            [batch * tokens, heads * head_dim].
        """
        if queries is not None:
            queries = queries[:, : layer.heads].unflatten(0, (step.batch, step.tokens)).transpose(1, 2)
            if layer.map_slot is not None:
                lent[layer.index] = queries
        else:
            queries = gather(lent, layer.query_sources, step.tokens)
        keys, values = borrowed_states(layer, self.caches, step.filled)
        assert step.first is not None, "no prompt is captured"
        heads = attend(
            queries,
            keys,
            values,
            starts=step.starts if step.padded else None,
            first=step.first,
            window=layer.window,
            scale=layer.scale,
            softcap=layer.softcap,
        )
        return heads.transpose(1, 2).reshape(step.batch * step.tokens, -1)


def _stock(
    layer: LayerProgram, queries: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, step: Step
) -> torch.Tensor:
    """Attention by PyTorch's own kernel where nobody wants the map, [batch, heads * head_dim]."""
    mask = None
    if step.padded or (layer.window is not None and layer.window < step.filled):
        mask = reference.visible(step.starts, step.ends, layer.window, step.filled)[:, None, None]
    heads = functional.scaled_dot_product_attention(
        queries[:, :, None],
        keys[:, :, : step.filled],
        values[:, :, : step.filled],
        attn_mask=mask,
        scale=layer.scale,
        enable_gqa=keys.shape[1] != queries.shape[1],
    )
    return heads.flatten(1)


def borrowed_states(layer: LayerProgram, caches: Caches, length: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Keys and values of a layer, own or borrowed, [batch, kv_heads or heads, length, head_dim]."""
    keys = gather(caches.keys, layer.key_sources, length) if layer.key_sources else caches.keys[layer.index]
    if layer.kind.borrows_values:
        values = gather(caches.values, layer.key_sources, length)
    else:
        values = caches.values[layer.index]
    keys, values = keys[:, :, :length], values[:, :, :length]
    if layer.value_groups > 1:
        values = values.repeat_interleave(layer.value_groups, dim=1)
    return keys, values


def _apply(norm: nn.Module | None, states: torch.Tensor, layer: LayerProgram) -> torch.Tensor:
    """Normed heads [tokens, heads, head_dim] from [tokens, heads * head_dim]."""
    if norm is not None and layer.wide_norm:
        states = norm(states)
    states = states.unflatten(-1, (-1, layer.head_dim))
    return states if norm is None or layer.wide_norm else norm(states)


def _rotate(states: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
    """Rotary embedding of [tokens, heads, head_dim]; what lies beyond the rotary width passes."""
    cos, sin = cos[positions][:, None], sin[positions][:, None]
    turned, passed = states[..., : cos.shape[-1]], states[..., cos.shape[-1] :]
    low, high = turned.chunk(2, dim=-1)
    turned = turned * cos + torch.cat((-high, low), dim=-1) * sin
    return torch.cat((turned, passed), dim=-1).to(states.dtype)


def _write(cache: torch.Tensor, states: torch.Tensor, step: Step) -> None:
    """Puts [batch * tokens, kv_heads, head_dim] into a cache [batch, kv_heads, capacity, head_dim]."""
    states = states.unflatten(0, (step.batch, step.tokens))
    if step.first is not None:
        cache[:, :, step.first : step.first + step.tokens] = states.transpose(1, 2)
        return
    rows = torch.arange(step.batch, device=cache.device)
    cache[rows, :, step.places.view(step.batch, step.tokens)[:, 0].long()] = states[:, 0]
