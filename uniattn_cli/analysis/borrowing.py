"""What borrowing a map does to the output of attention: its error before and after the best linear compensation.

For a layer j that uses the maps of an earlier layer i, same heads, with its own values and output projection:
`before` is E|W_o (a_jj - a_ji)|^2 / E|W_o a_jj|^2, and `after` what is left of it when W_c x_j is added, with x_j what
the attention module receives and W_c fitted by ridge regression to some sequences and judged on others.

A small error of the output does not imply small damage: where an error lies matters more than how large it is, layers
differ by orders of magnitude in how much of theirs can be lost, and errors of several layers add up unforeseeably. In a
trial, layouts chosen by this number led to the worst models of all. It informs; it is not used to choose.

Outputs are seen through a random sketch of the residual stream of at most `SKETCH` directions, which leaves energies
and errors unbiased, and exact where the stream is no wider than that. Memory is that of one sequence, plus sums over
tokens whose size depends on the model alone.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import nn

from uniattn_cli.analysis.capture import LayerStates
from uniattn_cli.models.device import coarse_products
from uniattn_cli.models.on_disk import in_memory

SKETCH = 256
# Relative to the mean square of the inputs. On a few thousand tokens of SmolLM2-135M the errors are within 5 % of each
# other from 1e-2 to 3e-1.
RIDGE = 3e-2
TILE_BYTES = 96 << 20
# Sums for the compensation beyond this size would not fit beside a model on any one device.
MOMENT_BYTES = 16 << 30


def held_out(sequences: int) -> list[int]:
    """Which sequences judge a compensation that was fitted to the others: every fourth; none if there is only one."""
    return list(range(1, sequences, 4))


def compensation_bytes(layers: int, hidden: int, max_distance: int) -> int:
    """Size of the sums over tokens that fitting the compensations takes."""
    return 4 * layers * (hidden**2 + max_distance * hidden * min(hidden, SKETCH))


class RatioMean:
    """Ratio of two means over sequences, and its standard error by linearisation, in float64."""

    def __init__(self) -> None:
        self.count = 0
        self._sums: list[torch.Tensor] = []

    def add(self, above: torch.Tensor, below: torch.Tensor) -> None:
        above, below = above.cpu().double(), below.cpu().double()
        terms = [above, below, above.square(), above * below, below.square()]
        self._sums = [total + term for total, term in zip(self._sums, terms, strict=True)] if self.count else terms
        self.count += 1

    def merge(self, other: RatioMean) -> None:
        """Adds the sequences of another one, which may have none."""
        if self.count and other.count:
            self._sums = [mine + others for mine, others in zip(self._sums, other._sums, strict=True)]
        else:
            self._sums = self._sums or other._sums
        self.count += other.count

    @property
    def mean(self) -> torch.Tensor:
        return self._sums[0] / self._sums[1]

    @property
    def stderr(self) -> torch.Tensor:
        """NaN for a single sequence."""
        if self.count < 2:
            return torch.full_like(self.mean, float("nan"))
        ratio = self.mean
        squares = self._sums[2] - 2 * ratio * self._sums[3] + ratio.square() * self._sums[4]
        return (squares.clamp_min(0) * self.count / (self.count - 1)).sqrt() / self._sums[1]


def sketch_of(hidden: int, directions: int = SKETCH, seed: int = 0) -> torch.Tensor:
    """[hidden, m] with m = min(hidden, directions) and E|S^T y|^2 = |y|^2 for every y."""
    if hidden <= directions:
        return torch.eye(hidden)
    generator = torch.Generator().manual_seed(seed)
    basis = torch.linalg.qr(torch.randn(hidden, directions, generator=generator, dtype=torch.float64)).Q
    return (basis * (hidden / directions) ** 0.5).float()


def _received(state: LayerStates) -> torch.Tensor:
    """[tokens, hidden]: a layer's inputs, in float32; nothing is compensated where they are not known."""
    assert state.inputs is not None
    return state.inputs.float()


class BorrowingError:
    """Accumulates both errors for all pairs of layers of the same mask type up to a largest distance.

    `add` all sequences to fit to, `solve`, and `add` those held out. Apart from that their order means nothing.

    Args:
        projections: output projection of each layer.
        mask_types: mask type of each layer.
        max_distance: largest distance of a pair.
        compensate: whether to fit compensations.
        device: where sums are kept; None for where the projections are.
    """

    def __init__(
        self,
        projections: Sequence[nn.Linear],
        mask_types: Sequence[str],
        max_distance: int,
        compensate: bool = True,
        device: torch.device | None = None,
    ):
        sketch = sketch_of(projections[0].out_features).to(device or projections[0].weight.device)
        # [layers, query_heads * head_dim, m]
        self.projections = torch.stack([in_memory(p.weight).to(sketch).T @ sketch for p in projections])
        self.layers = len(projections)
        self.max_distance = max_distance
        self.borrowers = [
            [j for j in range(i + 1, min(i + max_distance, self.layers - 1) + 1) if mask_types[j] == mask_types[i]]
            for i in range(self.layers)
        ]
        device = self.projections.device
        self._indices = [torch.tensor(borrowers, dtype=torch.long, device=device) for borrowers in self.borrowers]
        self.compensate = compensate
        self.before = RatioMean()
        self.after = RatioMean()
        self._second: torch.Tensor | None = None
        self._cross: torch.Tensor | None = None
        self._weights: torch.Tensor | None = None

    def add(self, layers: list[LayerStates]) -> None:
        """Adds one sequence: captured states, `inputs` among them, one per layer."""
        judging = self._weights is not None
        fitting = self.compensate and not judging
        # The backend computes maps as in the model; only what is summed over tokens may be coarse.
        with coarse_products():
            own = torch.stack([s.output.flatten(1).float() @ p for s, p in zip(layers, self.projections, strict=True)])
            if fitting:
                self._add_second(layers)
        before, after = (own.new_zeros(self.layers, self.max_distance) for _ in range(2))
        for source, state in enumerate(layers):
            for borrowers, pairs in self._parts(source, state):
                values = torch.stack([layers[j].values for j in borrowers])
                found = state.attend(values).flatten(2).float()
                with coarse_products():
                    difference = own[pairs[0]] - found @ self.projections[pairs[0]]
                    before[pairs] = difference.square().sum((1, 2))
                    if not (fitting or judging):
                        continue
                    inputs = torch.stack([_received(layers[j]) for j in borrowers])
                    if self._weights is None:
                        assert self._cross is not None
                        self._cross[pairs] += inputs.transpose(1, 2) @ difference
                    else:
                        left = torch.baddbmm(difference, inputs, self._weights[pairs], alpha=-1)
                        after[pairs] = left.square().sum((1, 2))
        energy = own.square().sum((1, 2))[:, None]
        self.before.add(before, energy)
        if judging:
            self.after.add(after, energy)

    def _parts(self, source: int, state: LayerStates) -> Iterator[tuple[list[int], tuple[torch.Tensor, torch.Tensor]]]:
        """Borrowers of a layer that are computed together, as many as fit a tile, and where their sums are kept."""
        tokens, heads = state.output.shape[:2]
        size = state.output.numel() + tokens * self.projections.shape[2]
        size += heads * tokens**2 if state.materialises else 0
        step = max(1, TILE_BYTES // (4 * size))
        for start in range(0, len(self.borrowers[source]), step):
            index = self._indices[source][start : start + step]
            yield self.borrowers[source][start : start + step], (index, index - source - 1)

    def _add_second(self, layers: list[LayerStates]) -> None:
        if self._second is None:
            hidden, directions = _received(layers[0]).shape[1], self.projections.shape[2]
            self._second = self.projections.new_zeros(self.layers, hidden, hidden)
            self._cross = self.projections.new_zeros(self.layers, self.max_distance, hidden, directions)
        for second, state in zip(self._second, layers, strict=True):
            inputs = _received(state)
            second.addmm_(inputs.T, inputs)

    def share(self) -> None:
        """Sums up what several processes have added for the fit."""
        from accelerate.utils import reduce

        if self._second is not None:
            self._second, self._cross = reduce(self._second, "sum"), reduce(self._cross, "sum")

    def merge(self, other: tuple[RatioMean, RatioMean]) -> None:
        """Adds the errors that another process measured, before and after compensation."""
        self.before.merge(other[0])
        self.after.merge(other[1])

    def solve(self) -> None:
        """Ends the fit. Turns the sums into compensations, in float64; they take the place of the sums."""
        if self._cross is None or self._second is None:
            return
        device = torch.device("cpu") if self._cross.device.type == "mps" else self._cross.device
        for second, cross in zip(self._second, self._cross, strict=True):
            system = second.to(device).double()
            scale = system.diagonal().mean()
            # Inputs that are zero everywhere get a unit penalty, so that their weights are zero and not undefined.
            system.diagonal().add_(scale * RIDGE if scale > 0 else 1.0)
            # [hidden, max_distance * m]: all pairs of a layer share their inputs.
            targets = cross.to(device).double().transpose(0, 1).flatten(1)
            factor, failed = torch.linalg.cholesky_ex(system)
            # Only inputs that are not finite can fail; then nothing is known about the compensation.
            weights = torch.cholesky_solve(targets, factor).masked_fill_(failed > 0, float("nan"))
            cross.copy_(weights.unflatten(1, (self.max_distance, -1)).transpose(0, 1))
        self._weights, self._second, self._cross = self._cross, None, None

    def results(self) -> dict[str, list[list[float]]]:
        """`before`, `before_stderr`, `after`, `after_stderr`: [borrower][source], NaN where nothing was measured."""
        nothing = torch.full((self.layers, self.max_distance), float("nan"))
        found = {}
        for name, ratio in (("before", self.before), ("after", self.after)):
            found[name] = self._by_layer(ratio.mean if ratio.count else nothing)
            found[name + "_stderr"] = self._by_layer(ratio.stderr if ratio.count else nothing)
        return found

    def _by_layer(self, values: torch.Tensor) -> list[list[float]]:
        result = torch.full((self.layers, self.layers), float("nan"), dtype=torch.float64)
        for source, borrowers in enumerate(self.borrowers):
            for j in borrowers:
                result[j, source] = values[j, j - source - 1]
        return result.tolist()
