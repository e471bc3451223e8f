"""Verdicts are earned: little data tells nothing, a margin has to be kept, and many scores make no one look worse."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace

import numpy
import pytest

from benchmarks.verdicts import SIZES, Size, judged
from uniattn_cli.evaluation.figures import Figure
from uniattn_cli.evaluation.intervals import Difference
from uniattn_cli.evaluation.verdict import (
    AS_GOOD,
    BETTER,
    MIXED,
    SAME,
    UNTOLD,
    WORSE,
    Score,
    corrected,
    judge,
    more_needed,
    overall,
    verdict,
)
from uniattn_cli.recipe.schema import MarginSpec

MARGINS = MarginSpec(nats=0.02, points=1.0)


def score(value, low, high, *, unit="nats per token", better="lower", at=3.0):
    return Score("it", at, unit, better, Difference(value, (high - low) / 4, (low, high)), lambda judged: None)


@pytest.mark.parametrize(
    ("one", "p", "expected"),
    [
        (score(0.0, -0.019, 0.019), 1.0, AS_GOOD),
        (score(0.01, 0.005, 0.015), 0.001, AS_GOOD),
        (score(0.0, -0.021, 0.019), 1.0, UNTOLD),
        (score(0.03, 0.01, 0.05), 0.01, WORSE),
        (score(0.03, 0.001, 0.06), 0.06, UNTOLD),
        (score(-0.03, -0.05, -0.01), 0.01, BETTER),
        (score(0.003, -0.008, 0.009, unit="share", better="higher"), 0.5, AS_GOOD),
        (score(-0.03, -0.05, -0.01, unit="share", better="higher"), 0.01, WORSE),
        # 2 % of a perplexity of 100 are 0.02 nats.
        (score(1.0, 0.1, 1.9, unit="perplexity", at=101.0), 0.03, AS_GOOD),
        (score(1.0, 0.1, 2.1, unit="word_perplexity", at=101.0), 0.03, WORSE),
        (score(0.0, -0.001, 0.001, unit="bleu", better="higher"), 1.0, UNTOLD),
        (replace(score(0.0, 0.0, 0.0), difference=Difference(0.0, 0.0, (0.0, 0.0))), 1.0, SAME),
        (replace(score(0.0, 0.0, 0.0), difference=Difference(0.3)), None, UNTOLD),
    ],
)
def test_judgement(one, p, expected):
    assert judge(one, MARGINS, p) == expected


def test_many_scores_have_to_be_further_off():
    assert corrected([0.01, None, 0.04, 0.03]) == pytest.approx([0.03, None, 0.06, 0.06])
    assert corrected([0.9, 0.9]) == [1.0, 1.0] and corrected([None]) == [None]


def test_how_much_more_would_tell():
    # A margin of half the interval's half width needs four times the rows; so does a difference of that size.
    assert more_needed(score(0.0, -0.04, 0.04), MARGINS, 100) == 300
    assert more_needed(score(0.04, -0.04, 0.12), MARGINS, 100) == 300
    assert more_needed(score(0.01, -0.01, 0.03), MARGINS, 100) == 300
    assert more_needed(score(0.0, -1.0, 1.0, unit="bleu"), MARGINS, 100) is None


def shares(size: Size, effect: float, trials: int) -> Counter:
    rng = numpy.random.default_rng(0)
    counts = Counter(overall(judged(size, effect, effect, rng)) for _ in range(trials))
    return Counter({word: count / trials for word, count in counts.items()})


def test_verdicts_are_seldom_wrong():
    few, many = SIZES["default recipe"], Size(200, 600, 2, 10_000)
    equal = shares(few, 0.0, 60)
    assert equal[AS_GOOD] + equal[WORSE] + equal[MIXED] + equal[BETTER] <= 0.1, "so few rows tell nothing"
    assert shares(few, 5.0, 20)[WORSE] >= 0.9
    equal, at_the_margin = shares(many, 0.0, 20), shares(many, 1.0, 20)
    assert equal[AS_GOOD] >= 0.3 and equal[WORSE] + equal[MIXED] <= 0.1
    assert at_the_margin[AS_GOOD] <= 0.05 and at_the_margin[WORSE] >= 0.9


def test_the_sentence_says_what_would_tell_and_which_single_score_is_worse():
    model = judged(SIZES["default recipe"], 0.0, 0.0, numpy.random.default_rng(0)) | {"role": "trained"}
    ratio = Figure(8.0, "bytes per token", "lower", ratio_to_base=0.8)
    model["cost"] = {"kv_bytes_per_token": ratio, "parameters": ratio}
    task = model["tasks"]["choices 1"]
    words = verdict("it", model, model, MARGINS)
    assert words["quality"] == UNTOLD and "it is not told apart from the base: perplexity" in words["sentence"]
    assert "more items would tell" in words["sentence"] and "more rows would tell" in words["sentence"]
    task["acc"] = replace(task["acc"], difference_to_base=replace(task["acc"].difference_to_base, verdict=WORSE))
    words = verdict("it", model, model, MARGINS)
    assert words["quality"] == WORSE and "; choices 1, acc worse." in words["sentence"]
