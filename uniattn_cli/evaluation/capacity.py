"""The longest context and the largest batch that fit into a given memory, by formula."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from uniattn_cli.modeling.configuration_uniattn import layout_of
from uniattn_cli.models.costs import kv_bytes
from uniattn_cli.models.hub import context_window

RESERVE = 1 << 29
PIECE = 2048  # tokens of a prefill chunk
CONTEXT = 4096
FORMULA = (
    "memory = weights + batch × KV cache of the context + allowance; allowance = 0.5 GiB for the runtime + "
    f"min(context, {PIECE}) × (2 × intermediate + 6 × hidden) × element size for one layer's activations of a prefill "
    "chunk + batch × vocabulary × 4 B for logits; weights and cache in the dtype of this evaluation; 1 GB = 1e9 B"
)
# Beyond this nothing is limited by memory, as where no layer caches anything.
UNLIMITED = 1 << 40


@dataclass(frozen=True)
class Footprint:
    """What decides a model's memory.

    Attributes:
        config: of the model.
        weights: bytes.
        element_size: bytes per element of cache and activations.
    """

    config: Any
    weights: int
    element_size: int

    def bytes(self, batch: int, context: int) -> int:
        """Memory for `batch` sequences of `context` tokens, by `FORMULA`."""
        config = self.config
        layout = layout_of(config)
        cache = batch * kv_bytes(config, layout, context, self.element_size)
        width = 2 * config.intermediate_size + 6 * config.hidden_size
        piece = min(context, PIECE) * width * self.element_size
        return self.weights + cache + RESERVE + piece + 4 * batch * config.vocab_size

    def longest_context(self, memory: float) -> int | None:
        """Tokens of one sequence that fit; 0 if not even one does, None if memory does not limit them."""
        return _largest(lambda tokens: self.bytes(1, tokens) <= memory)

    def largest_batch(self, memory: float, context: int) -> int | None:
        """Sequences of `context` tokens that fit; 0 if not even one does, None if memory does not limit them."""
        return _largest(lambda batch: self.bytes(batch, context) <= memory)


def _largest(fits: Callable[[int], bool]) -> int | None:
    """The largest number that fits, where all below it do; by doubling, then by halving the gap."""
    low, high = 0, 1
    while fits(high):
        low, high = high, 2 * high
        if high > UNLIMITED:
            return None
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low


def capacity_table(footprints: dict[str, Footprint], sizes: tuple[float, ...]) -> list[dict[str, Any]]:
    """One entry per memory size in GB: for each model the longest context, and the largest batch at `at_context`."""
    window = min(context_window(each.config) or CONTEXT for each in footprints.values())
    context = min(CONTEXT, window)
    return [
        {
            "memory_gb": size,
            "models": {
                name: {
                    "context": each.longest_context(size * 1e9),
                    "batch": each.largest_batch(size * 1e9, context),
                    "at_context": context,
                    "window": context_window(each.config),
                }
                for name, each in footprints.items()
            },
        }
        for size in sizes
    ]
