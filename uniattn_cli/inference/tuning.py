"""Which kernel computes a product with one row, measured on the device as a decoding step will run it.

Candidates are captured in graphs, so that nothing of the host is in the figures, and go through so many weights that
none of them is in a cache. In each round all of them have their turn. It takes about 0.1 s for a large model, once per
shape and process; compiling the candidates takes longer, the first time.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from itertools import cycle, islice

import torch
from torch.nn import functional

from uniattn_cli.inference import matvec, pointwise
from uniattn_cli.inference.matvec import SETTINGS, Setting
from uniattn_cli.inference.program import Gated, Program
from uniattn_cli.inference.roofline import cache_bytes
from uniattn_cli.models.device import captured, take_turns

ROUNDS = 7
# Bytes that one measurement reads, and in how many products.
READ_BYTES = 1 << 30
FEWEST_CALLS, MOST_CALLS = 4, 256
# Weights that a measurement goes through are so many times the cache.
COLD_CACHES = 4
# By `product_key`: the fastest launch setting, or None where the library, or product and gate apart, are faster.
_CHOSEN: dict[tuple, Setting | None] = {}

Product = Callable[[torch.Tensor], torch.Tensor]


def product_key(weight: torch.Tensor, bias: torch.Tensor | None = None, activation: str = "") -> tuple:
    """What the choice depends on; with an activation it is about the gate and its product in one kernel."""
    return (*weight.shape, weight.stride(), weight.dtype, weight.device, bias is None, activation)


def chosen(weight: torch.Tensor, bias: torch.Tensor | None = None, activation: str = "") -> Setting | None:
    """The launch setting that was measured to be fastest; None where none beats the other way, or none was measured."""
    return _CHOSEN.get(product_key(weight, bias, activation))


@torch.inference_mode()
def tune(program: Program) -> None:
    """Measures the products with one row that a program has, as far as they are not known yet; not while capturing."""
    groups: dict[tuple, tuple[list[torch.Tensor], torch.Tensor | None, str]] = {}
    for weight, bias, activation in _products(program):
        key = product_key(weight, bias, activation)
        if key not in _CHOSEN and weight.stride(1) == 1:
            groups.setdefault(key, ([], bias, activation))[0].append(weight)
    # Gates come after their products, whose choice they are compared with.
    for key, (weights, bias, activation) in sorted(groups.items(), key=lambda item: bool(item[1][2])):
        x = weights[0].new_ones(1, weights[0].shape[1])
        candidates = gate_candidates(x, activation) if activation else product_candidates(x, bias)
        _CHOSEN[key] = fastest(candidates, weights)


def _products(program: Program) -> Iterator[tuple[torch.Tensor, torch.Tensor | None, str]]:
    """Weight, bias and activation of all products; the one of gate and up twice where a kernel can do both."""
    for layer in program.layers:
        feed = layer.feed
        if layer.project is not None:
            yield layer.project, layer.project_bias, ""
        for asked in layer.asked:
            if asked.weight is not None:
                yield asked.weight, asked.bias, ""
        if layer.output is not None:
            yield layer.output, layer.output_bias, ""
        if isinstance(feed, Gated):
            yield feed.gate_up, None, ""
            yield feed.down, None, ""
            if feed.activation:
                yield feed.gate_up, None, feed.activation
    yield program.head, None, ""


def product_candidates(x: torch.Tensor, bias: torch.Tensor | None = None) -> dict[Setting | None, Product]:
    """The library, as None, and the kernel with every launch setting."""
    candidates: dict[Setting | None, Product] = {None: lambda weight: functional.linear(x, weight, bias)}
    for setting in SETTINGS:
        candidates[setting] = partial(matvec.matvec, x, bias=bias, setting=setting)
    return candidates


def gate_candidates(x: torch.Tensor, activation: str) -> dict[Setting | None, Product]:
    """The best product and then the gate, as None, and both in one kernel with every launch setting."""
    candidates: dict[Setting | None, Product] = {None: lambda weight: pointwise.gate(activation, product(x, weight))}
    for setting in SETTINGS:
        candidates[setting] = partial(matvec.gated_matvec, x, activation=activation, setting=setting)
    return candidates


def product(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    """`functional.linear` of one row, [1, columns] to [1, rows], in the way that was measured to be fastest."""
    setting = chosen(weight, bias)
    if setting is None:
        return functional.linear(x, weight, bias)
    return matvec.matvec(x, weight, bias, setting)


def fastest(candidates: Mapping[Setting | None, Product], weights: Sequence[torch.Tensor]) -> Setting | None:
    """The candidate with the shortest time, the first of equal ones; the first where nothing can be measured."""
    if weights[0].device.type != "cuda":
        return next(iter(candidates))
    times = measure(candidates, weights)
    return min(times, key=times.__getitem__)


def measure(
    candidates: Mapping[Setting | None, Product], weights: Sequence[torch.Tensor]
) -> dict[Setting | None, float]:
    """Median milliseconds of one call of each candidate, with weights that are in no cache.

    Args:
        candidates: functions of a weight.
        weights: of one shape; copies are added where they are too few or too small.
    """
    size = weights[0].nbytes
    calls = max(FEWEST_CALLS, min(MOST_CALLS, READ_BYTES // size))
    cold = COLD_CACHES * cache_bytes(weights[0].device)
    needed = min(calls, -(-cold // size))
    weights = list(weights[:calls])
    weights += [weights[0].clone() for _ in range(needed - len(weights))]
    turn = list(islice(cycle(weights), calls))
    replays = {name: captured([partial(call, weight) for weight in turn]) for name, call in candidates.items()}
    # Clocks rise in the first round.
    return {name: statistics.median(values[1:]) for name, values in take_turns(replays, ROUNDS).items()}
