"""Intervals of paired differences: right about as often as they say, and honest where there is little to go by."""

from __future__ import annotations

import math

import numpy
import pytest

from uniattn_cli.evaluation import intervals

TRIALS = 500


def covered(draw, truth: float) -> float:
    """Share of trials whose interval holds the truth."""
    rng = numpy.random.default_rng(1)
    hits = 0
    for _ in range(TRIALS):
        low, high = draw(rng).interval
        hits += low <= truth <= high
    return hits / TRIALS


@pytest.mark.parametrize("items", [20, 60, 200])
def test_right_and_wrong_answers_are_covered(items):
    """The base is right in 60 % of items; the model answers 20 % of them the other way round."""

    def draw(rng):
        base = rng.random(items) < 0.6
        model = numpy.where(rng.random(items) < 0.2, ~base, base)
        return intervals.paired_difference(model.astype(float).tolist(), base.astype(float).tolist())

    assert 0.93 <= covered(draw, 0.2 * (0.4 - 0.6)) <= 0.99


@pytest.mark.parametrize("rows", [16, 64])
def test_losses_of_rows_of_any_length_are_covered(rows):
    """The damage is skewed over rows, and much smaller than the spread of the losses themselves."""

    def draw(rng):
        counts = rng.integers(20, 200, rows)
        base = counts * rng.normal(2.0, 0.5, rows)
        model = base + counts * 0.1 * rng.gamma(2.0, 0.5, rows)
        return intervals.paired_difference(model.tolist(), base.tolist(), counts.tolist(), resamples=500)

    assert 0.92 <= covered(draw, 0.1) <= 0.98


def test_perplexity_is_covered():
    """Losses per token of rows that are all alike in length: the truth is known in closed form."""

    def draw(rng):
        base = rng.normal(2.0, 0.3, 40)
        return intervals.paired_difference(
            (base + rng.normal(0.1, 0.05, 40)).tolist(), base.tolist(), transform=intervals.EXPONENTIAL, resamples=500
        )

    assert 0.92 <= covered(draw, math.exp(2.1) - math.exp(2.0)) <= 0.98


def test_mean_of_tasks_is_covered():
    def draw(rng):
        parts = []
        for items, flips in ((30, 0.1), (80, 0.3)):
            base = rng.random(items) < 0.6
            model = numpy.where(rng.random(items) < flips, ~base, base)
            parts.append(intervals.paired_difference(model.astype(float).tolist(), base.astype(float).tolist()))
        return intervals.mean_difference(parts)

    assert 0.93 <= covered(draw, (0.1 + 0.3) / 2 * (0.4 - 0.6)) <= 0.99


def test_no_difference_seen_is_not_no_difference():
    same = intervals.paired_difference([1.0, 0.0] * 30, [1.0, 0.0] * 30)
    assert same.value == 0 and same.stderr == 0
    low, high = same.interval
    assert low == -high and 0.02 < high < 0.06, "a few points may hide among sixty items"


@pytest.mark.parametrize("rows", [6, 60])
def test_the_probability_is_that_of_the_interval(rows):
    """Below 5 % where the interval leaves zero out, and spread evenly where there is no difference."""
    rng, values = numpy.random.default_rng(2), []
    for _ in range(TRIALS):
        base = rng.normal(2.0, 0.5, rows)
        model = base + rng.normal(0.0, 0.1, rows)
        found = intervals.paired_difference(model.tolist(), base.tolist(), resamples=500)
        outside = not found.interval[0] <= 0 <= found.interval[1]
        assert outside == (found.p < 0.05) or abs(found.p - 0.05) < 0.006
        values.append(found.p)
    assert 0.02 <= numpy.mean(numpy.array(values) < 0.05) <= 0.08 and 0.42 <= numpy.mean(values) <= 0.58


def test_few_rows_get_students_t():
    few = intervals.paired_difference([1.0, 2.5, 3.0], [1.0, 2.0, 2.0])
    assert few.method == intervals.STUDENT and few.value == pytest.approx(0.5)
    assert few.interval[1] - few.value == pytest.approx(4.303 * 0.5 / math.sqrt(3), rel=1e-3)
    alone = intervals.paired_difference([1.0], [2.0])
    assert alone.stderr is None and alone.interval is None
    assert alone.p is None


def test_the_bootstrap_is_the_same_each_time():
    rng = numpy.random.default_rng(3)
    scores = rng.random((2, 30)).tolist()
    assert intervals.paired_difference(*scores) == intervals.paired_difference(*scores)
