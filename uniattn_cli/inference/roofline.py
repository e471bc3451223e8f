"""The limit: bytes that a decoding step has to read, over the bandwidth that the device really has."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from uniattn_cli.inference.program import Gated, LayerProgram, Program
from uniattn_cli.models.device import timed

FALLBACK_CACHE = 50 << 20

COPY_BYTES = {"cuda": 1 << 31}
COPY_BYTES_ELSEWHERE = 1 << 27
COPY_ROUNDS = 10


@dataclass(frozen=True)
class StepBytes:
    """What one decoding step of a whole batch has to read.

    Attributes:
        weights: every weight that takes part, once.
        caches: keys and values that the layers look at; borrowed ones count again for every layer that reads them.
    """

    weights: int
    caches: int

    @property
    def total(self) -> int:
        return self.weights + self.caches

    def seconds(self, bandwidth: float) -> float:
        """The floor: no step that reads these bytes is faster."""
        return self.total / bandwidth


def step_bytes(program: Program, batch: int, context: int) -> StepBytes:
    """Counts for one new token per row with so many tokens before it.

    The floor leaves out what is small beside these (activations, the maps that a leader keeps, norms, one row of the
    embedding per sequence). Of experts, as many count as the rows of the batch can choose at most.
    """
    size = program.dtype.itemsize
    weights = program.head.numel() + sum(_weights(layer, program, batch) for layer in program.layers)
    caches = sum(_heads_read(layer) * min(context, layer.window or context) for layer in program.layers)
    return StepBytes(weights * size, caches * program.shape.head_dim * batch * size)


def _weights(layer: LayerProgram, program: Program, batch: int) -> int:
    own = [layer.project, layer.output, *(asked.weight for asked in layer.asked)]
    count = sum(tensor.numel() for tensor in own if tensor is not None)
    if not layer.kind.attends and layer.compensation is not None:
        count += _parameters(layer.compensation)
    if isinstance(layer.feed, Gated):
        return count + layer.feed.gate_up.numel() + layer.feed.down.numel()
    return count + _expert_weights(layer.feed, program, batch)


def _expert_weights(module: Any, program: Program, batch: int) -> int:
    every, config = _parameters(module), program.config
    experts = getattr(config, "num_experts", None) or getattr(config, "num_local_experts", None)
    if not experts or not hasattr(module, "experts"):
        return every
    inside = _parameters(module.experts)
    return every - inside + inside * min(experts, batch * config.num_experts_per_tok) // experts


def _parameters(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def _heads_read(layer: LayerProgram) -> int:
    """Heads of keys and of values that a layer looks at, whoever owns them."""
    if not layer.kind.attends:
        return 0
    # Borrowed maps, and keys that are asked early, are read with the lender's.
    once = layer.kind.borrows_maps or layer.kind.early
    return layer.kv_heads * (len(layer.kind.caches) if once else 2)


def cache_bytes(device: torch.device) -> int:
    """Size of the device's L2 cache; that of an H100 where the device does not say or has none."""
    if device.type != "cuda":
        return FALLBACK_CACHE
    return getattr(torch.cuda.get_device_properties(device), "L2_cache_size", 0) or FALLBACK_CACHE


def copy_bandwidth(device: torch.device) -> float:
    """Bytes per second, read and written together, of a large copy on the device; the fastest of some.

    Clocks may need a while to rise, and a limit that is too low would flatter everything that is compared with it.
    """
    count = COPY_BYTES.get(device.type, COPY_BYTES_ELSEWHERE)
    if device.type == "cuda":
        count = min(count, torch.cuda.mem_get_info(device)[0] // 4)
    # Some memory systems pack zeros.
    source = torch.randint(256, (count,), dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    times: list[float] = []
    for _ in range(COPY_ROUNDS):
        with timed(times, device):
            target.copy_(source)
    return 2 * count / min(times)
