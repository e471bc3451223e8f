"""95 % intervals for differences between two models that were scored on the same rows or items.

Two sorts of scores need two methods. Right or wrong answers: the interval of Bonett and Price (2012) for paired
proportions, made from the discordant items that McNemar's test counts; it does not shrink to nothing where no item
differs. Everything else: a studentised bootstrap over rows (Efron and Tibshirani 1993, section 12.5), whose ends lean
towards the longer tail, as those of losses should. Each comes with the probability of a difference at least as large
where there is none: below 5 % where the interval leaves zero out, and what a correction for several scores needs.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass

LEVEL = 0.95
Z = statistics.NormalDist().inv_cdf(0.5 + LEVEL / 2)
RESAMPLES = 2000
# With fewer rows too many resamples hold hardly two different ones, and Student's t is used.
FEWEST_ROWS = 10
SEED = 2502
MCNEMAR, BOOTSTRAP, STUDENT = "paired proportions (Bonett-Price)", "bootstrap over rows", "Student's t over rows"
# How a mean becomes the figure: as it is, or perplexity from a mean loss.
IDENTITY, EXPONENTIAL = "identity", "exponential"
LARGEST_LOSS = 700.0  # e to this is still a float


@dataclass(frozen=True)
class Difference:
    """A difference between two models and what is known about it.

    Attributes:
        value: the model minus the base.
        stderr: its standard error over rows or items; None for fewer than two, and where nothing was sampled.
        interval: the 95 % interval, lowest and highest; None where there is no standard error.
        method: how the interval was made.
        p: probability of a difference at least as large, in either direction, where there is none; None where interval
            is.
        verdict: what it means, one of the words of `verdict`; None where nothing is judged.
    """

    value: float
    stderr: float | None = None
    interval: tuple[float, float] | None = None
    method: str | None = None
    p: float | None = None
    verdict: str | None = None

    @classmethod
    def from_dict(cls, entry: dict) -> Difference:
        """The difference that an entry of `results.json` states."""
        return cls(**{**entry, "interval": entry["interval"] and tuple(entry["interval"])})


def paired_difference(
    model: Sequence[float],
    base: Sequence[float],
    weights: Sequence[float] | None = None,
    *,
    transform: str = IDENTITY,
    resamples: int = RESAMPLES,
) -> Difference:
    """f(Σa/Σw) − f(Σb/Σw) for the scores a of a model and b of the base on the same rows.

    Args:
        model: one score per row, such as a sum of losses over its tokens, or 0 and 1.
        base: the same rows.
        weights: such as the tokens of each row; 1 each if None.
        transform: f, `IDENTITY` or `EXPONENTIAL`.
        resamples: of the bootstrap.
    """
    import numpy

    rows = numpy.array([model, base, weights or [1.0] * len(base)], dtype=numpy.float64)
    if weights is None and transform == IDENTITY and len(base) > 1 and set(model) | set(base) <= {0, 1}:
        return _paired_proportions(rows[0] - rows[1])
    value, stderr = (part.item() for part in _estimate(rows[:, None, :], transform))
    count = len(base)
    if count < 2:
        return Difference(value)
    if not stderr:
        return Difference(value, 0.0, (value, value), BOOTSTRAP, float(value == 0))
    if count >= FEWEST_ROWS:
        picks = numpy.random.default_rng(SEED).integers(0, count, (resamples, count))
        values, stderrs = _estimate(rows[:, picks], transform)
        usable = stderrs > 0
        if usable.mean() > LEVEL:
            scores = (values[usable] - value) / stderrs[usable]
            low, high = numpy.quantile(scores, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
            # No tail is known to be thinner than one resample.
            tail = min((scores >= value / stderr).mean(), (scores <= value / stderr).mean()) + 1 / len(scores)
            interval = float(value - high * stderr), float(value - low * stderr)
            return Difference(value, stderr, interval, BOOTSTRAP, min(2 * float(tail), 1.0))
    from scipy.stats import t

    half, p = float(t.ppf(0.5 + LEVEL / 2, count - 1)) * stderr, 2 * float(t.sf(abs(value) / stderr, count - 1))
    return Difference(value, stderr, (value - half, value + half), STUDENT, p)


def _estimate(rows, transform: str):
    """Difference and linearised standard error of samples [3, samples, rows]: scores, base scores, weights."""
    import numpy

    model, base, weights = rows
    count, total = weights.shape[-1], weights.sum(-1)
    means = numpy.stack([model.sum(-1), base.sum(-1)]) / total
    if transform == EXPONENTIAL:
        values = slopes = numpy.exp(numpy.minimum(means, LARGEST_LOSS))
    else:
        values, slopes = means, numpy.ones_like(means)
    residuals = slopes[0][:, None] * (model - means[0][:, None] * weights)
    residuals -= slopes[1][:, None] * (base - means[1][:, None] * weights)
    variance = numpy.square(residuals).sum(-1) * count / max(count - 1, 1)
    return values[0] - values[1], numpy.sqrt(variance) / total


def _paired_proportions(differences) -> Difference:
    """Of differences −1, 0, 1: one more item of each discordant sort is assumed, so that no interval is empty."""
    count = len(differences)
    gained, lost = int((differences > 0).sum()), int((differences < 0).sum())
    value = (gained - lost) / count
    stderr = math.sqrt(((gained + lost) / count - value**2) / (count - 1))
    up, down = (gained + 1) / (count + 2), (lost + 1) / (count + 2)
    half = Z * math.sqrt((up + down - (up - down) ** 2) / (count + 2))
    middle = up - down
    interval = max(middle - half, -1.0), min(middle + half, 1.0)
    return Difference(value, stderr, interval, MCNEMAR, _two_sided(Z * middle / half if half else 0.0))


def _two_sided(score: float) -> float:
    """The probability of a normal deviate at least as far from zero."""
    return 2 * statistics.NormalDist().cdf(-abs(score))


def mean_difference(parts: Sequence[Difference]) -> Difference:
    """The mean of independent differences, such as those of several tasks.

    The distances from value to the ends are combined as standard errors are (MOVER; Zou and Donner 2008).
    """
    value = statistics.fmean(part.value for part in parts)
    stderrs = [part.stderr for part in parts if part.stderr is not None]
    stderr = math.hypot(*stderrs) / len(parts) if len(stderrs) == len(parts) else None
    bounded = [(part.value, *part.interval) for part in parts if part.interval is not None]
    if len(bounded) < len(parts):
        return Difference(value, stderr)
    below = math.hypot(*(middle - low for middle, low, _ in bounded)) / len(parts)
    above = math.hypot(*(high - middle for middle, _, high in bounded)) / len(parts)
    methods = {part.method for part in parts}
    towards_zero = below if value > 0 else above
    p = _two_sided(Z * value / towards_zero) if towards_zero else float(value == 0)
    method = methods.pop() if len(methods) == 1 else "combined"
    return Difference(value, stderr, (value - below, value + above), method, p)
