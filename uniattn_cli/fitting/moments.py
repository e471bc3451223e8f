"""Second moments of features and targets, and the ridge problems solved from them.

For a changed layer the attention output is linear in what can be refitted: `y = W_o a + W_c x` with a the concatenated
heads and x the normed input. All that a least-squares fit needs of any number of tokens are the moments of [a, x] and
y, so tokens are seen once and memory does not grow with their number. W_o is fitted as a correction to the base's W_o:
the ridge penalty pulls towards what is known to be good instead of towards zero.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

# Relative to the mean square of the features. The last one is so strong that nothing changes.
RIDGES = (1e-5, 1e-4, 1e-3, 1e-2, 3e-2, 1e-1, 3e-1, 1.0, 10.0)


class Moments:
    """Sums over tokens: features f [p], targets y [d], accumulated in float64.

    Attributes:
        ff: sum of f f^T, [p, p].
        fy: sum of f y^T, [p, d].
        yy: sum of |y|^2.
        tokens: number of tokens.
    """

    def __init__(self, features: int, targets: int, device: torch.device):
        self.ff = torch.zeros(features, features, dtype=torch.float64, device=device)
        self.fy = torch.zeros(features, targets, dtype=torch.float64, device=device)
        self.yy = torch.zeros((), dtype=torch.float64, device=device)
        self.tokens = 0

    def add(self, features: torch.Tensor, targets: torch.Tensor) -> None:
        """Adds tokens as rows: features [n, p], targets [n, d]. Products in float32, sums in float64."""
        features, targets = features.float(), targets.float()
        self.ff += (features.T @ features).double()
        self.fy += (features.T @ targets).double()
        self.yy += targets.double().square().sum()
        self.tokens += len(features)

    def merged(self, other: Moments) -> Moments:
        """Moments of both sets of tokens."""
        result = Moments(len(self.fy), self.fy.shape[1], self.ff.device)
        result.ff, result.fy, result.yy = self.ff + other.ff, self.fy + other.fy, self.yy + other.yy
        result.tokens = self.tokens + other.tokens
        return result

    def first(self, features: int) -> Moments:
        """Moments of the first features alone."""
        result = Moments(0, 0, self.ff.device)
        result.ff, result.fy, result.yy = self.ff[:features, :features], self.fy[:features], self.yy
        result.tokens = self.tokens
        return result

    def error(self, weights: torch.Tensor) -> float:
        """Mean of |y - W^T f|^2 over the tokens for weights [p, d]."""
        residual = self.yy - 2 * (weights * self.fy).sum() + (weights * (self.ff @ weights)).sum()
        return max(residual.item(), 0.0) / self.tokens


class PositionSums:
    """Sums over sequences at each position, for the paper's own initialisation of W_c.

    UniAttn (arXiv 2502.00439) averages inputs and missing outputs over calibration sequences position by position and
    takes the least-squares solution of smallest norm through those averages. It is here to be compared with: a few
    hundred averages say much less than the tokens that they are made of.
    """

    def __init__(self) -> None:
        self.features: torch.Tensor | None = None
        self.targets: torch.Tensor | None = None

    def add(self, features: torch.Tensor, targets: torch.Tensor) -> None:
        """Adds sequences of one length: features [rows, length, p], targets [rows, length, d]."""
        features, targets = features.double().sum(0), targets.double().sum(0)
        self.features = features if self.features is None else self.features + features
        self.targets = targets if self.targets is None else self.targets + targets

    def solve(self) -> torch.Tensor:
        """pinv(mean features) mean targets, [p, d]; the number of sequences cancels out."""
        return torch.linalg.pinv(self.features) @ self.targets


def solve_ridge(moments: Moments, strength: float, blocks: list[int]) -> torch.Tensor:
    """argmin over W of sum |y - W^T f|^2 + strength * penalty, [p, d].

    Args:
        strength: relative to the mean square of the features of each block.
        blocks: sizes of the groups of features that are scaled alike; they sum to p.
    """
    diagonal = moments.ff.diagonal()
    scale = torch.cat([part.mean().expand(len(part)) for part in diagonal.split(blocks)])
    # A block that is zero everywhere gets a unit penalty, so that its weights are zero and not undefined.
    penalty = torch.where(scale > 0, scale * strength, torch.ones_like(scale))
    system = moments.ff.clone()
    system.diagonal().add_(penalty)
    factor, failed = torch.linalg.cholesky_ex(system)
    if failed.item():
        return torch.linalg.lstsq(system.cpu(), moments.fy.cpu(), driver="gelsd").solution.to(system.device)
    return torch.cholesky_solve(moments.fy, factor)


@dataclass(frozen=True)
class RidgeFit:
    """A solved problem.

    Attributes:
        weights: [p, d].
        partial: the same without the tokens held out from the fit.
        strength: the ridge strength chosen; infinity where no change was better than any.
        error_before: mean |y|^2 on the tokens held out from the fit.
        error_after: mean |y - W^T f|^2 on the same tokens, with weights that have not seen them.
    """

    weights: torch.Tensor
    partial: torch.Tensor
    strength: float
    error_before: float
    error_after: float


def fit_ridge(fit: Moments, held: Moments, blocks: list[int]) -> RidgeFit:
    """Chooses the ridge strength on held-out tokens, then solves with all tokens.

    Args:
        fit: moments of the tokens to fit on.
        held: moments of the tokens to choose the strength on.
        blocks: see `solve_ridge`.
    """
    partial = torch.zeros_like(fit.fy)
    before = best = held.error(partial)
    strength = float("inf")
    for candidate in RIDGES:
        weights = solve_ridge(fit, candidate, blocks)
        error = held.error(weights)
        if error < best:
            best, strength, partial = error, candidate, weights
    whole = partial if strength == float("inf") else solve_ridge(fit.merged(held), strength, blocks)
    return RidgeFit(whole, partial, strength, before, best)


def reduce_rank(weights: torch.Tensor, moments: Moments, heads: int, rank: int, strength: float):
    """The best W_c of a given rank in the metric of the data, W_o refitted to it.

    With the heads' share of x taken out (Frisch-Waugh), the joint problem becomes reduced-rank regression: the best
    rank-r W_c is the full one projected on its leading output directions, weighted by the covariance of what is left.

    Args:
        weights: [p, d], the full solution for features [a, x].
        moments: of all tokens.
        heads: number of the features that are a; 0 if W_o is not refitted.
        rank: rank of W_c.
        strength: ridge strength of the solution.

    Returns:
        (output [heads, d], down [rank, hidden], up [d, rank]) with W_c = up down.
    """
    full = weights[heads:].T
    inputs = moments.ff[heads:, heads:]
    scale = inputs.diagonal().mean().clamp_min(1e-30) * min(strength, 1.0)
    eye = torch.eye(len(inputs), dtype=inputs.dtype, device=inputs.device)
    if heads:
        left = moments.ff[:heads, :heads]
        # Heads that are zero everywhere get weights, too, which are zero.
        scale_left = left.diagonal().mean().clamp_min(1e-30) * min(strength, 1.0)
        left = left + torch.eye(heads, dtype=left.dtype, device=left.device) * scale_left
        cross = moments.ff[:heads, heads:]
        inputs = inputs - cross.T @ torch.linalg.solve(left, cross)
    root = torch.linalg.cholesky_ex((inputs + inputs.T) / 2 + scale * eye).L
    directions = torch.linalg.svd(full @ root, full_matrices=False).U[:, :rank]
    down = directions.T @ full
    output = weights[:heads]
    if heads:
        target = moments.fy[:heads] - cross @ (directions @ down).T
        output = torch.linalg.solve(left, target)
    return output, down, directions
