"""Lets vLLM's decoding steps read borrowed keys once: the lender's pass over them does the sums of its borrowers, too.

In a batch with one new token per request, a lender's attention takes our kernels (`inference.paged`), which leave the
sums of the layers that it serves; each of these then adds what its newest value contributes. Every other batch, and
every layer that finds no place with a lender, takes vLLM's own kernel.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

from uniattn_cli.inference.program import LayerProgram
from uniattn_cli.inference.trial import attention_program
from uniattn_cli.modeling.layout_uniattn import AttentionShape, Layout

# In vLLM's `additional_config`: whether lenders serve their borrowers while decoding.
SETTING = "uniattn_fused_decoding"


def wants_fusing(vllm_config: Any) -> bool:
    """Whether the setting asks for it.

    Raises:
        ValueError: it is neither true nor false.
    """
    wanted = vllm_config.additional_config.get(SETTING, False)
    if not isinstance(wanted, bool):
        raise ValueError(f"{SETTING} in additional_config must be true or false, not {wanted!r}")
    return wanted


class FusedDecoding:
    """The passes of one rank.

    Args:
        layout: of the heads on this rank.
        shape: sizes on this rank.
        layers: vLLM's attention layers (`vllm_layers`) by index.
        rows: most requests of a batch.
        places: most tokens of a request.
        dtype, device: of keys and values.
    """

    def __init__(
        self,
        layout: Layout,
        shape: AttentionShape,
        layers: Mapping[int, Any],
        rows: int,
        places: int,
        dtype: torch.dtype,
        device: torch.device | str,
    ):
        from uniattn_cli.inference.paged import PagedOps

        self.layers = layers
        sizes = {"heads": shape.query_heads, "kv_heads": shape.kv_heads, "head_dim": shape.head_dim}
        program = attention_program(layout, **sizes, dtype=dtype, device=device)
        for index, layer in layers.items():
            self._describe(program.layers[index], layer.impl)
        self.operations = PagedOps(program, rows, places, self._pages)
        self._unbound = set(self.operations.units)

    @staticmethod
    def _describe(layer: LayerProgram, impl: Any) -> None:
        """Tells our kernels what vLLM's are told."""
        layer.scale, layer.softcap = impl.scale, impl.logits_soft_cap or None
        seen = impl.sliding_window[0] + 1
        layer.window = seen or None

    @property
    def taking_part(self) -> set[int]:
        """Layers that serve, or are served."""
        return {*self.operations.lending.lenders, *self.operations.served}

    @property
    def asked(self) -> dict[int, list[int]]:
        """Per lender the layers whose queries it has to know when it runs."""
        layers = self.operations.program.layers
        return {layer.index: [asked.borrower for asked in layer.asked] for layer in layers if layer.asked}

    def _pages(self, name: str, index: int) -> torch.Tensor:
        layer = self.layers[index]
        pages = (layer.keys if name == "k" else layer).kv_cache
        return pages if pages.dim() == 4 else pages.new_empty(0, 0, 0, 0)

    def bound(self, name: str, index: int) -> None:
        """To be called for each layer's keys and values that vLLM puts into their place; it may do so several times."""
        self._unbound.discard((name, index))
        if not self._unbound:
            self.operations.bind()
            self._unbound = set(self.operations.units)

    def attend(self, index: int, queries: torch.Tensor, metadata: Any, output: torch.Tensor) -> None:
        """Fills `output` [tokens, heads, head size] for a batch with one new token per request."""
        rows = len(metadata.seq_lens)
        out = output.view(len(output), -1)[:rows]
        self.operations.attend(index, queries[:rows], metadata.block_table, metadata.seq_lens, out)


def ask_with_lender(lender: Any, borrowers: Sequence[Any]) -> None:
    """Makes the module of a lender project the queries of layers that ask it early, when it runs.

    They go to its attention call behind its own queries, and wait in the holder of inputs for the layers themselves.

    Args:
        lender: an attention module of a converted model (`sharing_uniattn`).
        borrowers: those of the layers that are served.
    """
    states = lender.states

    def states_and_asked(hidden_states: torch.Tensor, positions: Any, past_key_values: Any, shared: Any, *rest: Any):
        queries, keys, values = states(hidden_states, positions, past_key_values, shared, *rest)
        together = [queries]
        for borrower in borrowers:
            asked = borrower.project(hidden_states, "q")
            shared.inputs[lender.layer_idx, borrower.layer_idx] = asked["q"]
            borrower.embed_positions(asked, *positions)
            together.append(asked["q"])
        return torch.cat(together, dim=1), keys, values

    lender.states = states_and_asked
    for borrower in borrowers:
        borrower.early_queries = _answered(borrower)


def _answered(borrower: Any) -> Callable:
    """In the place of `early_queries`, for a layer whose lenders have projected its queries."""

    def early_queries(inputs: dict, device: torch.device) -> torch.Tensor:
        parts = [
            inputs[layer, borrower.layer_idx].narrow(1, heads.start, heads.stop - heads.start)
            for layer, heads in borrower.asked
        ]
        return parts[0] if len(parts) == 1 else torch.cat(parts, dim=1)

    return early_queries
