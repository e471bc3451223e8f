"""A batch of sequences that is being decoded: caches, one pass over the layers, and the captured step."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.nn import functional

from uniattn_cli.inference.caches import GRAIN, Caches, whole_grains
from uniattn_cli.inference.ops import TorchOps
from uniattn_cli.inference.program import Asked, LayerProgram, Program, UnsupportedError
from uniattn_cli.inference.sampling import Sampling, choose
from uniattn_cli.inference.step import Step

# Tokens of the prompt, over all rows, that go through the layers together.
CHUNK_TOKENS = 1 << 15
WARM_UP_STEPS = 2
# Rotary embeddings whose frequencies depend on the longest position asked for.
CHANGING_ROTARY = {"dynamic", "longrope"}


@dataclass
class State:
    """What a step changes, all on the device.

    Attributes:
        token: [batch], the newest token.
        starts, ends: [batch] int32, see `Step`.
        count: [1], tokens chosen so far.
        output: [batch, limit], the tokens chosen.
        finished: [batch], rows that have met an end-of-sequence token.
        noise: [limit, batch], see `Sampling`.
    """

    token: torch.Tensor
    starts: torch.Tensor
    ends: torch.Tensor
    count: torch.Tensor
    output: torch.Tensor
    finished: torch.Tensor
    noise: torch.Tensor

    def tensors(self) -> list[torch.Tensor]:
        """All of them, in a fixed order."""
        return list(vars(self).values())


class Session:
    """Decodes one batch.

    Args:
        program: the model.
        batch: rows.
        limit: tokens per row, prompt and new ones together.
        new: most new tokens.
        ops: the class of the operations, such as `TorchOps`.
        sampling: how tokens are chosen.
        stop: end-of-sequence tokens; a row that has met one goes on with `pad`.
        graph: capture the step as a CUDA graph.
        reuse: borrowers use what their lender's pass gives them; else each computes its map anew, see `TorchOps`.
        flat: memory for the caches, shared with other sessions that are not in use.
    """

    def __init__(
        self,
        program: Program,
        batch: int,
        limit: int,
        new: int,
        *,
        ops: type[TorchOps] = TorchOps,
        sampling: Sampling | None = None,
        stop: Sequence[int] = (),
        pad: int = 0,
        graph: bool = False,
        reuse: bool = True,
        flat: torch.Tensor | None = None,
    ):
        self.program, self.batch, self.limit, self.new = program, batch, limit, new
        self.sampling = sampling or Sampling()
        self.caches = Caches(program, batch, whole_grains(limit), flat)
        self.ops = ops(program, self.caches, reuse=reuse)
        self.ops.tune()
        device = program.device
        self.stop = torch.tensor(list(stop), dtype=torch.int64, device=device)
        self.pad = torch.tensor(pad, dtype=torch.int64, device=device)
        self.tables: dict[str, tuple[torch.Tensor, torch.Tensor]] = {}
        ints: dict[str, Any] = {"dtype": torch.int32, "device": device}
        self.state = State(
            token=torch.zeros(batch, dtype=torch.int64, device=device),
            starts=torch.zeros(batch, **ints),
            ends=torch.zeros(batch, **ints),
            count=torch.zeros(1, dtype=torch.int64, device=device),
            output=torch.zeros(batch, new, dtype=torch.int64, device=device),
            finished=torch.zeros(batch, dtype=torch.bool, device=device),
            noise=torch.zeros(new, batch, device=device),
        )
        self._table_length = 0
        self.length = 0
        self.padded = False
        self.use_graph = graph
        self.graph: torch.cuda.CUDAGraph | None = None
        # Joined input of the output projection; the norm and the attention write into it.
        self.joined = {
            width: torch.zeros(batch, width, dtype=program.dtype, device=device)
            for width in {layer.output.shape[1] for layer in program.layers if layer.output is not None}
        }

    @torch.inference_mode()
    def prefill(
        self,
        tokens: torch.Tensor,
        lengths: torch.Tensor | None = None,
        chunk: int | None = None,
        new: int | None = None,
    ) -> None:
        """Processes the prompt and chooses the first token.

        Args:
            tokens: [batch, prompt], padded on the left.
            lengths: [batch], tokens of each row that are not padding; None where all are.
            chunk: tokens per row that go through the layers together.
            new: tokens that will be asked for; default: as many as there is room for.
        """
        new = self.new if new is None else new
        prompt = tokens.shape[1]
        state, device = self.state, self.program.device
        longest = prompt if lengths is None else int(lengths.max())
        self.padded = lengths is not None and bool((lengths < prompt).any())
        self._prepare_tables(longest, new)
        state.starts.copy_((prompt - lengths) if lengths is not None else torch.zeros_like(state.starts))
        if not self.sampling.greedy:
            state.noise[:new] = self.sampling.noise(new, self.batch).to(device)
        state.count.zero_()
        state.finished.zero_()
        size = chunk or max(CHUNK_TOKENS // self.batch, GRAIN)
        for first in range(0, prompt, size):
            part = tokens[:, first : first + size].to(device)
            state.ends.fill_(first + part.shape[1])
            places = torch.arange(first, first + part.shape[1], device=device, dtype=torch.int32)
            logits = self._run(part, self._step(places.expand(self.batch, -1), part.shape[1], first), decoding=False)
        self.length = prompt
        self._accept(logits)

    def advance(self) -> None:
        """Takes the newest token in and chooses the next one."""
        if self.use_graph:
            if self.graph is None:
                self.graph = self._capture()
            self.graph.replay()
        else:
            self._advance()
        self.length += 1

    def pretend(self, length: int) -> None:
        """Takes the caches as they are for the context of so many tokens per row, for measuring time."""
        self._prepare_tables(length, self.new)
        self.state.starts.zero_()
        self.state.ends.fill_(length)
        self.state.count.zero_()
        self.state.finished.zero_()
        self.length, self.padded = length, False

    def _prepare_tables(self, longest: int, new: int) -> None:
        """Makes tables of rotary embeddings, again only if they change: a captured graph holds their addresses."""
        total = longest + new
        check_rotary(self.program, longest, total)
        total = total if rotary_types(self.program) & CHANGING_ROTARY else self.caches.capacity
        if total != self._table_length:
            self.tables, self._table_length, self.graph = rotary_tables(self.program, total), total, None

    @torch.inference_mode()
    def _advance(self) -> None:
        state = self.state
        state.ends += 1
        places = (state.ends - 1)[:, None]
        first = None if self.use_graph else self.length
        self._accept(self._run(state.token[:, None], self._step(places, 1, first), decoding=True))

    def _step(self, places: torch.Tensor, tokens: int, first: int | None) -> Step:
        starts = self.state.starts
        positions = (places - starts[:, None]).clamp(min=0).reshape(-1)
        return Step(
            self.caches,
            self.tables,
            starts,
            self.state.ends,
            places.reshape(-1),
            positions,
            tokens,
            first,
            self.padded,
        )

    def _accept(self, logits: torch.Tensor) -> None:
        state = self.state
        self.logits = logits
        noise = state.noise.index_select(0, state.count)[0]
        token = choose(logits, self.sampling, noise)
        token = torch.where(state.finished, self.pad, token)
        if len(self.stop):
            state.finished |= (token[:, None] == self.stop).any(-1)
        state.output.index_copy_(1, state.count, token[:, None])
        state.count += 1
        state.token.copy_(token)

    def _capture(self) -> torch.cuda.CUDAGraph:
        """Captures one step; running it for that leaves no trace but in places that the next step writes."""
        before = [tensor.clone() for tensor in self.state.tensors()]

        def restore() -> None:
            for tensor, old in zip(self.state.tensors(), before, strict=True):
                tensor.copy_(old)

        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(WARM_UP_STEPS):
                self._advance()
                restore()
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            self._advance()
        restore()
        return graph

    def _run(self, tokens: torch.Tensor, step: Step, *, decoding: bool) -> torch.Tensor:
        """Logits [batch, vocabulary] after the newest token of each row; tokens [batch, tokens]."""
        program, ops = self.program, self.ops
        residual = _scaled(program.embed(tokens).flatten(0, 1), program.embed_scale)
        update: torch.Tensor | None = None
        post: nn.Module | None = None
        lent: dict[int, torch.Tensor] = {}
        asked: dict[int, dict[int, torch.Tensor]] = {}
        for layer in program.layers:
            if layer.kind.attends or layer.compensation is not None:
                joined = self.joined[layer.output.shape[1]] if decoding and layer.output is not None else None
                wanted = joined[:, layer.width :] if joined is not None and layer.takes_input else None
                residual, normed = ops.residual_norm(residual, update, post, layer.pre_attention, wanted)
                update = _scaled(self._attention(layer, normed, step, lent, asked, joined), program.update_scale)
                post = layer.post_attention
            for source in [source for source in lent if program.layout.last_use[source] <= layer.index]:
                del lent[source]
            residual, normed = ops.residual_norm(residual, update, post, layer.pre_mlp)
            update, post = _scaled(ops.feed_forward(layer.feed, normed, step), program.update_scale), layer.post_mlp
        assert update is not None, "every layer adds something"
        residual, update = (states.unflatten(0, (step.batch, -1))[:, -1].contiguous() for states in (residual, update))
        _, normed = ops.residual_norm(residual, update, post, program.norm)
        logits = _scaled(ops.linear(normed, program.head), program.logit_scale)
        if program.logit_cap is not None:
            logits = torch.tanh(logits / program.logit_cap) * program.logit_cap
        return logits

    def _attention(
        self,
        layer: LayerProgram,
        normed: torch.Tensor,
        step: Step,
        lent: dict[int, torch.Tensor],
        asked: dict[int, dict[int, torch.Tensor]],
        joined: torch.Tensor | None,
    ) -> torch.Tensor:
        """Output of the attention part, compensation included, [tokens, hidden].

        Args:
            lent: queries of layers that lend them, see `TorchOps.prompt`.
            asked: for each layer that asked early, its queries by the first of their heads.
        """
        if layer.output is None:
            assert layer.compensation is not None
            return layer.compensation(normed)
        low_rank = layer.extra > 0 and not layer.takes_input
        extra: torch.Tensor | None = None
        if low_rank:
            extra = normed.new_empty(len(normed), layer.extra) if joined is None else joined[:, layer.width :]
        projected = self._project(layer, normed)
        placed = None if projected is None else self.ops.place(layer, projected, step, extra)
        used = layer.heads if "q" in layer.parts else 0
        for one in layer.asked:
            assert placed is not None, "a lender projects"
            asked.setdefault(one.borrower, {})[one.first] = placed[:, used : used + one.heads]
            used += one.heads
        queries = placed
        if layer.kind.early:
            found = asked.pop(layer.index)
            if joined is None or layer.index not in self.ops.served:
                queries = torch.cat([found[first] for first in sorted(found)], dim=1) if len(found) > 1 else found[0]
        if joined is not None:
            self.ops.decode(layer, queries, step, joined[:, : layer.width])
            return self.ops.linear(joined, layer.output, layer.output_bias)
        heads = self.ops.prompt(layer, queries, lent, step)
        result = functional.linear(heads, layer.output[:, : layer.width], layer.output_bias)
        other = normed if layer.takes_input else extra
        if other is not None:
            # Joining the inputs would copy a whole prompt; adding a product to a matrix costs nothing more.
            result = torch.addmm(result, other, layer.output[:, layer.width :].T)
        return result

    def _project(self, layer: LayerProgram, normed: torch.Tensor) -> torch.Tensor | None:
        """What a layer projects, for itself and for those that ask early, [tokens, rows]; None if nothing."""
        if layer.project is None:
            return None
        projected = self.ops.linear(normed, layer.project, layer.project_bias)
        apart = [one for one in layer.asked if one.weight is not None]
        if not apart:
            return projected
        joined = layer.joined_heads * layer.head_dim
        found = [self._ask(layer, one, normed) for one in apart]
        return torch.cat([projected[:, :joined], *found, projected[:, joined:]], dim=1)

    def _ask(self, layer: LayerProgram, asked: Asked, normed: torch.Tensor) -> torch.Tensor:
        """Normed queries of another layer that take a product of their own, [tokens, heads * head_dim]."""
        assert asked.weight is not None, "those without are rows of the lender's projection"
        states = self.ops.linear(normed, asked.weight, asked.bias)
        if asked.norm is None:
            return states
        if asked.wide:
            first, last = (head * layer.head_dim for head in (asked.first, asked.first + asked.heads))
            return asked.norm(states)[:, first:last]
        return asked.norm(states.unflatten(-1, (-1, layer.head_dim))).flatten(1)


def _scaled(states: torch.Tensor, factor: float) -> torch.Tensor:
    return states if factor == 1.0 else states * factor


def _rotary_settings(program: Program) -> list[dict]:
    parameters = getattr(program.config, "rope_parameters", None) or {}
    return [value for value in parameters.values() if isinstance(value, dict)] or [parameters]


def rotary_types(program: Program) -> set[str]:
    """The sorts of rotary embedding that a model has."""
    return {rope.get("rope_type", "default") for rope in _rotary_settings(program)}


def check_rotary(program: Program, prompt: int, total: int) -> None:
    """Refuses lengths at which frequencies change while decoding, so that cached keys would be of another sort.

    Refused, too, are lengths at which queries are scaled by their position.

    Args:
        prompt: tokens of the longest row of the prompt.
        total: the same with all new tokens.

    Raises:
        UnsupportedError: they change.
    """
    for rope in _rotary_settings(program):
        known = program.config.max_position_embeddings
        if rope.get("rope_type") == "dynamic" and total > known:
            raise UnsupportedError("its rotary frequencies grow with the length")
        original = rope.get("original_max_position_embeddings") or known
        if rope.get("rope_type") == "longrope" and prompt <= original < total:
            raise UnsupportedError(f"its rotary frequencies change at {original} tokens, while decoding")
        if rope.get("llama_4_scaling_beta") and total > original:
            raise UnsupportedError(f"its queries are scaled by their position from {original} tokens on")


def rotary_tables(program: Program, total: int) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    """Cosines and sines of the model's own rotary module for positions below `total`, [total, rotary width] each."""
    like = torch.empty(0, dtype=program.dtype, device=program.device)
    positions = torch.arange(total, device=program.device)[None]
    tables = {}
    for key in program.rotary_keys:
        cos, sin = program.rotary(like, positions, key) if key else program.rotary(like, positions)
        tables[key] = (cos[0].contiguous(), sin[0].contiguous())
    return tables
